"""Which implementation runs: one table, no environment variables, no silent fallback."""
from collections.abc import Callable
from typing import Any

import torch

from engram_kernels._library import COMPILE_ERROR, CUDA_ERROR
from engram_kernels._names import BACKENDS
from engram_kernels.triton_runtime import dispatch

# "auto": the first of these that is available, by the device of the tensors
AUTO_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference"),
              "meta": ("cpu", "cuda", "reference")}  # no data, so a kernel's fake
_DEVICES = {"reference": None, "cpu": "cpu", "cuda": "cuda", "triton": dispatch.device_type()}

_OUT_OF_RANGE = "ids or sequence bounds out of range"
_WRONG = {"row_update": "ids out of range, gradients that are not finite or counts of steps that cannot grow; the update was "
                        "refused"}
_IMPLEMENTATIONS: dict[tuple[str, str], Callable[..., Any]] = {}
_WHY_NOT: dict[tuple[str, str], str] = {}


def register(op: str, backend: str, implementation: Callable[..., Any] | None, why_not: str | None = None) -> None:
    """Adds `implementation` for (op, backend), or records why there is none."""
    if implementation is None:
        _WHY_NOT[op, backend] = why_not or "unknown"
    else:
        _IMPLEMENTATIONS[op, backend] = implementation


def register_op(op: str, reference: Callable[..., Any], compiled: Callable[..., Any], *,
                check_data: Callable[..., None] | None = None) -> None:
    """Registers what every op has: its reference, its compiled and its Triton kernels, or the reasons why they are missing.

    Args:
        op: op name.
        reference: checks the data, then runs the reference.
        compiled: calls `torch.ops.engram_kernels.<op>`.
        check_data: the data checks that kernels on a GPU cannot make; takes the tensor-level arguments.
    """
    register(op, "reference", reference)
    register(op, "cpu", None if COMPILE_ERROR else compiled, COMPILE_ERROR)
    no_cuda = CUDA_ERROR
    if no_cuda is None and not torch._C._dispatch_has_kernel_for_dispatch_key(f"engram_kernels::{op}", "CUDA"):
        no_cuda = "there is no CUDA kernel of it yet"
    register(op, "cuda", None if no_cuda else compiled, no_cuda)
    missing = dispatch.why_not(dispatch.stem(op))
    register(op, "triton", None if missing else dispatch.implementation(op, check_data), missing)
    if not missing:
        dispatch.define_twin(op)


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
            if (op, name) in _IMPLEMENTATIONS and not (name == "triton" and _unsupported(name, device)):
                return _IMPLEMENTATIONS[op, name]
        raise RuntimeError(f"{op}: no backend is available for {device}")
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}, expected auto, {', '.join(BACKENDS)}")
    if (op, backend) not in _IMPLEMENTATIONS or (device.type == "cpu" and _no_device(backend)):
        raise RuntimeError(f"{op}: backend {backend!r} is not available: {_why_not(op, backend)}")
    if _DEVICES[backend] not in (None, device.type):
        raise ValueError(f"{op}: backend {backend!r} runs on {_DEVICES[backend]}, the tensors are on {device}")
    if backend == "triton" and (reason := _unsupported(backend, device)):
        raise RuntimeError(f"{op}: backend {backend!r} is not available: {reason}")
    return _IMPLEMENTATIONS[op, backend]


def available(op: str) -> tuple[str, ...]:
    """Backends of `op` that can run here."""
    return tuple(name for name in BACKENDS if (op, name) in _IMPLEMENTATIONS and not _no_device(name))


def ops() -> tuple[str, ...]:
    """Every registered op with a public function, in the order of registration."""
    registered = dict.fromkeys(op for op, _ in (*_IMPLEMENTATIONS, *_WHY_NOT))
    return tuple(op for op in registered if dispatch.stem(op) == op)


def explain(op: str, backend: str) -> str:
    """One line: available, or the reason why not."""
    return f"{op}/{backend}: {_why_not(op, backend) or 'available'}"


def _unsupported(backend: str, device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on `device`."""
    if _DEVICES[backend] != device.type:
        return f"backend {backend!r} runs on {_DEVICES[backend]}"
    return dispatch.why_not_on(device.index or 0) if device.type == "cuda" else None


def _no_device(backend: str) -> bool:
    # asked late: importing this package must not start CUDA
    return _DEVICES.get(backend) == "cuda" and not torch.cuda.is_available()


def _why_not(op: str, backend: str) -> str:
    if (op, backend) not in _IMPLEMENTATIONS:
        return _WHY_NOT.get((op, backend), "no such op or backend")
    return "the kernels are loaded, but torch finds no CUDA device" if _no_device(backend) else ""


def check_errors() -> None:
    """Raises if an op on a GPU met bad data since the last call. Waits for the devices.

    A GPU op cannot look at its ids before it runs: a bad one gives zeros (gather_rows, gather_gate) or hashes as a dead token,
    reads nothing out of bounds, and is counted on the device. An update (row_update) with a bad id, or with a row whose
    gradient is not finite, writes no row and no moment.

    Raises:
        IndexError: names each op, device and count; the counters start again at 0.
    """
    errors = dispatch.take_errors()
    if not CUDA_ERROR:
        from engram_kernels import _C_cuda
        errors += _C_cuda.take_errors()
    if errors:
        raise IndexError("; ".join(f"{op}: {count} bad values ({_WRONG.get(op, _OUT_OF_RANGE)}) on cuda:{device}"
                                   for op, device, count in errors))
