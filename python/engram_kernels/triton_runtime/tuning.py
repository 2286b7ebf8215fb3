"""Launch parameters by op, target and shape class: the package's table, and a user's file over it.

The user's file is JSON, at `$XDG_CONFIG_HOME/engram-kernels/triton.json` (`~/.config/engram-kernels/triton.json`):

    {"version": 1, "parameters": {"gather_rows": {"sm_90": {"large": {"tile": 4096, "num_warps": 8}}}}}

It is written by `tune`, read once a process, and never written while serving. Unknown ops, classes or parameters are an error
that names the file. Parameters change speed, and for `gate` the order of float32 sums, nothing else.
"""
import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from engram_kernels._files import write_atomic

VERSION = 1
SMALL_BATCH = 64  # tokens: up to here a batch is "small" (decode), above it "large" (prefill, training)

# op -> shape class -> parameters; a target that differs has an entry in TARGETS
DEFAULTS: dict[str, dict[str, dict[str, int]]] = {
    # tile: elements of a program
    "gather_rows": {"small": {"tile": 1024, "num_warps": 4}, "large": {"tile": 4096, "num_warps": 4}},
    # ids: of one order and layer at a time; layers: of a program
    "ngram_hash": {"small": {"ids": 256, "layers": 1, "num_warps": 4}, "large": {"ids": 1024, "layers": 2, "num_warps": 4}},
    # programs: at most; held: registers per thread for what the backward keeps from token to token; where more is needed, the
    # weights' gradients are summed by a kernel of their own
    "gate": {"small": {"programs": 64, "num_warps": 8}, "large": {"programs": 256, "num_warps": 8}},
    "gate_bwd": {"small": {"programs": 64, "parts": 4, "held": 80, "num_warps": 8},
                 "large": {"programs": 256, "parts": 32, "held": 80, "num_warps": 8}},
    "gather_gate": {"small": {"programs": 64, "num_warps": 8}, "large": {"programs": 256, "num_warps": 8}},
    "gather_gate_bwd": {"small": {"programs": 16, "parts": 4, "held": 140, "num_warps": 8},
                        "large": {"programs": 128, "parts": 32, "held": 140, "num_warps": 8}},
    "short_conv": {"small": {"programs": 1024}, "large": {"programs": 1024}},
    "short_conv_bwd": {"small": {"parts": 4}, "large": {"parts": 64}},
    # rows: of a program, whose lanes take 16 elements of each at a time
    "row_update": {"small": {"rows": 8, "num_warps": 4}, "large": {"rows": 8, "num_warps": 4}},
}
TARGETS: dict[tuple[str, str, str], dict[str, int]] = {  # (op, target, shape class)
    # the interpreter takes as long for a large tile as for a small one
    ("gather_rows", "cpu", "large"): {"tile": 65536},
    ("row_update", "cpu", "small"): {"rows": 64},
    ("row_update", "cpu", "large"): {"rows": 64},
    ("ngram_hash", "cpu", "small"): {"ids": 512, "layers": 2},
    ("ngram_hash", "cpu", "large"): {"ids": 4096},
    # sm_100 computes float32 in pairs of registers
    **{("gate_bwd", target, size): {"held": 40} for target in ("sm_100", "gfx942") for size in ("small", "large")},
    **{("gather_gate_bwd", "sm_100", size): {"held": 80} for size in ("small", "large")},
    # the interpreter: long walks, which load less, and few sums to add
    ("short_conv", "cpu", "small"): {"programs": 8},
    ("short_conv", "cpu", "large"): {"programs": 8},
    ("short_conv_bwd", "cpu", "large"): {"parts": 4},
}
RETIRED = "engram_forward"  # had a kernel with parameters, which a user's file may still name
_target: ContextVar[str | None] = ContextVar("target", default=None)
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "gather_rows": [{"tile": tile, "num_warps": warps} for tile in (512, 1024, 2048, 4096, 8192) for warps in (2, 4, 8)],
    "ngram_hash": [{"ids": ids, "layers": layers, "num_warps": warps} for ids in (256, 512, 1024, 2048) for layers in (1, 2)
                   for warps in (1, 2, 4, 8)],
    "gate": [{"programs": programs, "num_warps": warps} for programs in (128, 256, 512, 1024) for warps in (4, 8, 16)],
    "gate_bwd": [{"programs": programs, "parts": parts, "num_warps": warps} for programs in (128, 256, 512)
                 for parts in (16, 32, 64) for warps in (8, 16)],
    "gather_gate": [{"programs": programs, "num_warps": warps} for programs in (128, 256, 512, 1024) for warps in (4, 8, 16)],
    "gather_gate_bwd": [{"programs": programs, "parts": parts, "num_warps": warps} for programs in (64, 128, 256)
                        for parts in (16, 32, 64) for warps in (8, 16)],
    "short_conv": [{"programs": programs} for programs in (256, 512, 1024, 2048, 4096)],
    "short_conv_bwd": [{"parts": parts} for parts in (16, 32, 64, 128, 256)],
}


def shape_class(num_tokens: int) -> str:
    """Class of a batch's size: "small" or "large"."""
    return "small" if num_tokens <= SMALL_BATCH else "large"


def parameters(op: str, device: torch.device, size: str) -> Mapping[str, int]:
    """Launch parameters of `op` on `device` for a shape class."""
    return _parameters(op, _target.get() or target_name(device), size)


@contextlib.contextmanager
def parameters_of(target: str) -> Iterator[None]:
    """Chooses as on `target`, wherever this thread's tensors are."""
    before = _target.set(target)
    try:
        yield
    finally:
        _target.reset(before)


@functools.cache
def target_name(device: torch.device) -> str:
    """"sm_90", "gfx942"; "cpu" and "meta" for what is no GPU."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def _parameters(op, target, size):
    chosen = {**DEFAULTS[op][size], **TARGETS.get((op, target, size), {})}
    return {**chosen, **user_table().get(op, {}).get(target, {}).get(size, {})}


def user_file() -> Path:
    """Where a user's parameters are."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "engram-kernels" / "triton.json"


@functools.cache
def user_table() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """op -> target -> shape class -> parameters, from the user's file; empty when there is none."""
    try:
        path = user_file()
    except RuntimeError:  # a user without a home folder has no file in it
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version is {content['version']}, expected {VERSION}")
        for op, targets in content["parameters"].items():
            if op == RETIRED:
                continue
            for sizes in targets.values():
                for size, chosen in sizes.items():
                    _check(op, size, chosen)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as err:
        raise ValueError(f"{path}: cannot be read: {err.strerror}; mend it, or set XDG_CONFIG_HOME to another folder") from err
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"{path}: no table of Triton launch parameters: {err}; delete it or tune again") from None
    return content["parameters"]


def _check(op, size, chosen):
    known = DEFAULTS.get(op, {}).get(size)
    if known is None:
        raise ValueError(f"{op}/{size} is no op and shape class, expected {', '.join(DEFAULTS)} and small or large")
    for name, value in chosen.items():
        if name not in known or type(value) is not int or value < 1 or (value & (value - 1) and name != "held"):
            raise ValueError(f"{op}/{size}: {name} is {value!r}, expected a power of two for one of {', '.join(known)}")


def tune(op: str, device: torch.device, size: str, time_us: Callable[[], float]) -> dict[str, int]:
    """Times `op` with each candidate and writes the fastest to the user's file. Not for a serving process.

    Args:
        op: op name.
        device: a GPU.
        size: shape class that `time_us` runs.
        time_us: runs the op on typical inputs and returns its time, the median of enough runs; a candidate that does not
            fit the GPU may raise.

    Returns:
        The parameters that were written.

    Raises:
        ValueError: no candidate for the op runs.
    """
    target, best = target_name(device), None
    for candidate in CANDIDATES.get(op, []):
        with _overridden(op, target, size, candidate):
            try:
                took = time_us()
            except (RuntimeError, ValueError):  # too much shared memory, too many threads
                continue
        if best is None or took < best[0]:
            best = took, candidate
    if best is None:
        raise ValueError(f"tune: no candidate for {op} runs on {target}")
    _write(op, target, size, best[1])
    return best[1]


class _overridden:
    """Makes `_parameters` return a candidate for one (op, target, shape class)."""

    def __init__(self, op, target, size, candidate):
        self.key, self.candidate = (op, target, size), candidate

    def __enter__(self):
        self.before = TARGETS.get(self.key)
        self.user = user_table().get(self.key[0], {}).get(self.key[1], {}).pop(self.key[2], None)
        # over what the target has, as it will be once it is in the user's table
        TARGETS[self.key] = {**(self.before or {}), **self.candidate}
        _parameters.cache_clear()

    def __exit__(self, *error: Any):
        if self.before is None:
            del TARGETS[self.key]
        else:
            TARGETS[self.key] = self.before
        if self.user is not None:
            user_table()[self.key[0]][self.key[1]][self.key[2]] = self.user
        _parameters.cache_clear()


def _write(op, target, size, chosen):
    path, table = user_file(), json.loads(json.dumps(user_table()))
    table.setdefault(op, {}).setdefault(target, {})[size] = chosen
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic("tune", path, (json.dumps({"version": VERSION, "parameters": table}, indent=1) + "\n").encode())
    user_table.cache_clear()
    _parameters.cache_clear()
