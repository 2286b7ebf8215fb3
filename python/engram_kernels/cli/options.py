"""What several subcommands take: names of specs, and help texts that show a default only where there is one."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from engram_kernels._names import PRESETS
from engram_kernels._terminal import UsageError

if TYPE_CHECKING:
    from engram_kernels.spec import EngramSpec

SPEC_HELP = f"{', '.join(PRESETS)}, a JSON file of EngramSpec.to_json, or a model's config.json"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help, except where there is none or the help tells it in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or isinstance(action.default, list) or "default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def check_spec(text: str) -> None:
    """Raises UsageError unless `text` names a preset, a file, or a folder with a config.json."""
    if text not in PRESETS and not Path(text).is_file() and not (Path(text) / "config.json").is_file():
        raise UsageError(f"spec is {text!r}, expected {SPEC_HELP}")


def load_spec(text: str) -> EngramSpec:
    """The spec that `--spec` names.

    Args:
        text: the name of a preset, or the path of a JSON file: one of `EngramSpec.to_json`, or the config.json of a model, or the
            folder of one.

    Raises:
        UsageError: there is no such preset and no such file.
        ValueError: the file is neither a spec nor a config with a memory that is known; names what is wrong.
    """
    from engram_kernels.spec import EngramSpec
    check_spec(text)
    if text in PRESETS:
        spec: EngramSpec = getattr(EngramSpec, text)()
        return spec
    path = Path(text)
    # each file of to_json names the hash family, and no config does
    if path.is_file() and b'"hash_family"' in path.read_bytes():
        return EngramSpec.from_json(path)
    try:
        return EngramSpec.from_hf_config(path)
    except ValueError as err:
        raise ValueError(f"{text}: {err}") from None
