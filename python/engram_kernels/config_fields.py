"""The fields of a Hugging Face configuration that nobody vouches for."""
from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_kernels._files import parse_json, shorten


class ConfigFields:
    """get(*names): the value of a field under the first of its names that is set, from `text_config` first; None: none is.

    Args:
        config: dict, object with attributes, path of a config.json or of its directory.
        reader: named by the errors.
        error: what is raised, a ValueError.

    Raises:
        error: the file is not JSON, or holds something else than an object.
        OSError: the file cannot be read.
    """

    def __init__(self, config: Any, reader: str, error: type[ValueError] = ValueError):
        self.reader, self.error = reader, error
        if isinstance(config, str | os.PathLike):
            path = Path(config, "config.json") if Path(config).is_dir() else Path(config)
            try:
                config = parse_json(path.read_bytes())
            except ValueError as problem:
                raise error(f"{reader}: {path} is not JSON: {shorten(str(problem))}") from problem
            if not isinstance(config, Mapping):
                raise error(f"{reader}: {path} holds a {type(config).__name__}, expected an object")
        self.parts = [part for part in (self._field(config, "text_config"), config) if part is not None]

    @staticmethod
    def _field(part: Any, name: str) -> Any:
        return part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)

    def found(self, *names: str) -> list[tuple[str, Any]]:
        """Name and value of each of these fields that is set, the one that counts first."""
        return [(name, v) for name in names for part in self.parts if (v := self._field(part, name)) is not None]

    def __call__(self, *names: str) -> Any:
        return next((value for _, value in self.found(*names)), None)

    def wrong(self, names: tuple[str, ...], expected: str) -> ValueError:
        """The error about the field of these names that is set."""
        name, value = self.found(*names)[0]
        return self.error(f"{self.reader}: {name} is {shorten(repr(value))}, expected {expected}")

    def required(self, *names: str) -> Any:
        """A field that must be set."""
        if (value := self(*names)) is None:
            raise self.error(f"{self.reader}: the configuration has no field {' or '.join(names)}")
        return value

    def integer(self, *names: str, default: int | None = None, low: int = 1, high: int = 2**31 - 1) -> int:
        """A field that is an integer in [low, high], 8.0 among them; without a default it must be set."""
        if default is not None and self(*names) is None:
            return default
        value = self.required(*names)
        if not _is_whole(value) or not low <= value <= high:
            raise self.wrong(names, f"an integer in [{low}, {high}]")
        return int(value)

    def integer_if_set(self, *names: str, low: int = 1) -> int | None:
        """A field that is an integer of at least `low`; None where it is missing."""
        return None if self(*names) is None else self.integer(*names, low=low)

    def integers(self, *names: str) -> tuple[int, ...]:
        """A field that is a list of integers and must be set."""
        value = self.required(*names)
        if not isinstance(value, list | tuple) or not all(map(_is_whole, value)):
            raise self.wrong(names, "a list of integers")
        return tuple(map(int, value))


def _is_whole(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value) and value == int(value)
    return isinstance(value, int) and not isinstance(value, bool)
