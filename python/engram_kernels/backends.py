"""Which implementation runs: one table, no environment variables, no silent fallback."""
from collections.abc import Callable
from typing import Any

import torch

from engram_kernels._library import COMPILE_ERROR

BACKENDS = ("reference", "cpu", "cuda", "triton")
# "auto": the first of these that is available, by the device of the tensors
AUTO_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_DEVICES = {"reference": None, "cpu": "cpu", "cuda": "cuda", "triton": "cuda"}

_IMPLEMENTATIONS: dict[tuple[str, str], Callable[..., Any]] = {}
_WHY_NOT: dict[tuple[str, str], str] = {}


def register(op: str, backend: str, implementation: Callable[..., Any] | None, why_not: str | None = None) -> None:
    """Adds `implementation` for (op, backend), or records why there is none."""
    if implementation is None:
        _WHY_NOT[op, backend] = why_not or "unknown"
    else:
        _IMPLEMENTATIONS[op, backend] = implementation


def register_op(op: str, reference: Callable[..., Any], compiled: Callable[..., Any]) -> None:
    """Registers what every op has: its reference and its compiled CPU kernel, or the reason why it is missing."""
    register(op, "reference", reference)
    register(op, "cpu", None if COMPILE_ERROR else compiled, COMPILE_ERROR)
    register(op, "cuda", None, "this build has no CUDA library")
    register(op, "triton", None, "there is no Triton kernel yet")


def select(op: str, device: torch.device, backend: str) -> Callable[..., Any]:
    """The implementation of `op` for tensors on `device`. A named backend never falls back.

    Args:
        op: op name, such as "gate".
        device: where the tensors are.
        backend: "auto" or one of BACKENDS.

    Returns:
        A callable with the op's tensor-level signature.

    Raises:
        ValueError: `backend` is no backend name, or cannot run on `device`.
        RuntimeError: the backend is not available; the message says why.
    """
    if backend == "auto":
        for name in AUTO_ORDER.get(device.type, ("reference",)):
            if (op, name) in _IMPLEMENTATIONS:
                return _IMPLEMENTATIONS[op, name]
        raise RuntimeError(f"{op}: no backend is available for {device}")
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}, expected auto, {', '.join(BACKENDS)}")
    if (op, backend) not in _IMPLEMENTATIONS:
        raise RuntimeError(f"{op}: backend {backend!r} is not available: {_WHY_NOT.get((op, backend), 'unknown op')}")
    if _DEVICES[backend] not in (None, device.type):
        raise ValueError(f"{op}: backend {backend!r} runs on {_DEVICES[backend]}, the tensors are on {device}")
    return _IMPLEMENTATIONS[op, backend]


def available(op: str) -> tuple[str, ...]:
    """Backends of `op` that can run here."""
    return tuple(name for name in BACKENDS if (op, name) in _IMPLEMENTATIONS)


def ops() -> tuple[str, ...]:
    """Every registered op, in the order of registration."""
    return tuple(dict.fromkeys(op for op, _ in (*_IMPLEMENTATIONS, *_WHY_NOT)))


def explain(op: str, backend: str) -> str:
    """One line: available, or the reason why not."""
    why = "available" if (op, backend) in _IMPLEMENTATIONS else _WHY_NOT.get((op, backend), "no such op or backend")
    return f"{op}/{backend}: {why}"
