"""The Triton backend: where it runs, and the twin of each op that autograd and torch.compile see.

An eager call without gradients goes straight to the launch function. Otherwise it goes through
`torch.ops.engram_kernels_triton.<op>`, which has the schema, fake and autograd of `torch.ops.engram_kernels.<op>` and is
implemented by the same launch function.
"""
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from engram_kernels import _transforms
from engram_kernels._checks import wants_grad

NAMESPACE = "engram_kernels_triton"
MIN_CUDA_CAPABILITY = (8, 0)  # Triton's bfloat16
AMD_TARGETS = ("gfx90a", "gfx942", "gfx950")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")  # as Triton reads it
INSTALLED = importlib.util.find_spec("triton") is not None

_LIB = torch.library.Library(NAMESPACE, "DEF")
_twins: set[str] = set()


def device_type() -> str:
    """Where the kernels run: "cuda" (AMD's too, in torch's words), or "cpu" under Triton's interpreter."""
    return "cpu" if INTERPRETED else "cuda"


def why_not(op: str) -> str | None:
    """Why `op` has no Triton implementation here; None: it has one, given a device."""
    if not INSTALLED:
        return "Triton is not installed: pip install 'engram-kernels[triton]'"
    try:
        found = importlib.util.find_spec(f"engram_kernels.triton_kernels.{op}")
    except ModuleNotFoundError:  # the folder triton_kernels is a link in a checkout, and may be missing in a copy of it
        found = None
    return None if found else "there is no Triton kernel yet"


@functools.cache
def why_not_on(device_index: int) -> str | None:
    """Why the kernels cannot run on this GPU; None: they can."""
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(device_index).gcnArchName.partition(":")[0]
        return None if arch in AMD_TARGETS else f"the Triton kernels support {', '.join(AMD_TARGETS)}; the GPU is {arch}"
    major, minor = torch.cuda.get_device_capability(device_index)
    if (major, minor) >= MIN_CUDA_CAPABILITY:
        return None
    return f"the Triton kernels need sm_80 or later; the GPU is sm_{major}{minor}"


def implementation(op: str, check_data: Callable[..., None] | None) -> Callable[..., Any]:
    """What `backends.select` returns: takes the op's tensor-level arguments and `out`, which have been checked.

    Args:
        op: op name.
        check_data: raises for bad data; called in the interpreter, where the data can be looked at, before anything is written.
    """
    def run(*args, out=None):
        if not is_compiling() and forward_ad._current_level >= 0:
            raise NotImplementedError(f"{stem(op)}: the Triton kernel has no forward-mode derivative; use backend='reference'")
        transformed = _transforms.active()
        if is_compiling() or transformed or (out is None and wants_grad(*(x for x in args if isinstance(x, Tensor)))):
            twin = getattr(getattr(torch.ops, NAMESPACE), op)
            if out is None:
                return _transforms.call(twin.default, *args) if transformed else twin.default(*args)
            twin.out(*args, out=out)
            return out
        if INTERPRETED and check_data is not None:
            check_data(*args)
        written = [x for x in (out, *(args[i] for i in written_arguments(op))) if x is not None]
        out = launch_function(op)(*args, out=out)
        for x in written:  # autograd does not know of the write: a backward pass that saved one of them must raise
            torch.autograd.graph.increment_version(x)
        return out
    return run


@functools.cache
def launch_function(op: str) -> Callable[..., Any]:
    """The function `op` of triton_kernels/<op>.py, or of the file of the op that it belongs to. Imports Triton."""
    return getattr(importlib.import_module(f"engram_kernels.triton_kernels.{stem(op)}"), op)


def stem(op: str) -> str:
    """The op that a backward or an update belongs to. `row_update` is an op of its own."""
    return op if op == "row_update" else op.removesuffix("_bwd").removesuffix("_update")


@functools.cache
def written_arguments(op: str) -> tuple[int, ...]:
    """Places of the arguments that the op writes."""
    arguments = getattr(torch.ops.engram_kernels, op).default._schema.arguments
    return tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


def define_twin(op: str) -> None:
    """Defines `engram_kernels_triton::<op>` from the schemas and fakes of `engram_kernels::<op>`, unless it is there."""
    if op in _twins or why_not(stem(op)):
        return
    _twins.add(op)
    packet = getattr(torch.ops.engram_kernels, op)
    for overload in packet.overloads():
        original = getattr(packet, overload)
        name = op if overload == "default" else f"{op}.{overload}"
        _LIB.define(str(original._schema).removeprefix("engram_kernels::"))
        torch.library.register_fake(f"{NAMESPACE}::{name}", original, lib=_LIB)
        _LIB.impl(name, functools.partial(_call, op), "CPU" if INTERPRETED else "CUDA")


def _call(op, *args, out=None):
    result = launch_function(op)(*args) if out is None else launch_function(op)(*args, out=out)
    return result if out is None else None


def take_errors() -> list[tuple[str, int, int]]:
    """(op, device index, bad values) counted since the last call; the counters start again at 0. Waits for the devices."""
    launch = sys.modules.get("engram_kernels.triton_runtime.launch")
    return [] if launch is None else launch.take_errors()


def register_autograd(op: str, backward: Callable[..., Any], setup_context: Callable[..., Any] | None, lib: Any) -> None:
    """Registers the derivative of `op` and of its twin.

    Args:
        op: op name.
        backward: takes the namespace of the ops (`torch.ops.engram_kernels` or that of the twins), ctx and the gradients.
        setup_context: as torch.library.register_autograd has it.
        lib: the library of `engram_kernels`.
    """
    for namespace, library in libraries_of(op, lib).items():
        _transforms.define(namespace, op, backward, setup_context)
        torch.library.register_autograd(f"{namespace}::{op}", functools.partial(backward, getattr(torch.ops, namespace)),
                                        setup_context=setup_context, lib=library)


def libraries_of(op: str, lib: Any) -> dict[str, Any]:
    """Namespaces that have `op`, and their libraries; its twin is defined."""
    define_twin(op)
    return {"engram_kernels": lib} | ({NAMESPACE: _LIB} if op in _twins else {})
