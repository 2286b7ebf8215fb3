"""How every Triton kernel here is launched: compiled once a variant, never again for another number of tokens.

A variant is a kernel, the types of its arguments, its constants and its warps. Every integer argument is an int64 that no code
is specialised on, and all pointers of a launch are taken as 16-byte aligned or none is, so a variant depends on dtypes, on the
spec and on the shape class that `tuning` names, not on token counts, strides or addresses. `warmup` compiles ahead what a spec
needs; a launch then costs a dictionary look-up.
"""
import contextlib
import ctypes
import functools
import operator
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engram_kernels.triton_runtime import dispatch
from engram_kernels.triton_runtime.tuning import parameters_of

POINTER_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int8: "*i8",
                 torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*u8"}
NUMBER_TYPES = {int: "i64", float: "fp32"}
ABSENT, ALIGNMENT = "absent", 16
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


# triton.cdiv and triton.next_power_of_2 take microseconds of the host's time
def ceil_div(count: int, by: int) -> int:
    """count / by, rounded up; both positive."""
    return -(-count // by)


def power_of_two_from(count: int) -> int:
    """The least that is not less than `count`, which is at least 1."""
    return 1 << (count - 1).bit_length()


def empty_like(x: Tensor) -> Tensor:
    """Contiguous, of the shape, dtype and device of `x`; where that is dense, in less than half of torch.empty's time."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device)


class Variant(NamedTuple):
    """What a kernel is compiled for."""
    kernel: Any  # triton.jit function
    dtypes: tuple[torch.dtype | None, ...]  # of the tensors; None: there is none
    numbers: tuple[type, ...]  # of the other runtime arguments: int or float
    constants: tuple[Any, ...]  # of the constexpr parameters, which come last
    num_warps: int
    aligned: bool  # every pointer is a multiple of 16 bytes

    @property
    def types(self) -> tuple[str, ...]:
        """Types of the runtime arguments, as Triton spells them, or ABSENT."""
        return (*(ABSENT if x is None else POINTER_TYPES[x] for x in self.dtypes), *(NUMBER_TYPES[x] for x in self.numbers))

    def compile(self, target: GPUTarget) -> Any:
        """Machine code for `target`; needs no GPU."""
        names, types = self.kernel.arg_names, self.types
        kinds = [*("constexpr" if t == ABSENT else t for t in types), *["constexpr"] * len(self.constants)]
        constants = {(i,): None for i, t in enumerate(types) if t == ABSENT}
        constants |= {(len(types) + i,): x for i, x in enumerate(self.constants)}
        attrs = {(i,): [["tt.divisibility", ALIGNMENT]] for i, t in enumerate(types) if self.aligned and t[0] == "*"}
        source = ASTSource(self.kernel, dict(zip(names, kinds, strict=True)), constants, attrs)
        options = {"num_warps": self.num_warps}
        if getattr(self.kernel, "is_exact", False):  # every operation is rounded by itself
            options["enable_fp_fusion"] = False
        if target.backend == "cuda":  # without a limit ptxas spills a few registers to reach an occupancy of its own choice
            options["maxnreg"] = min(65536 // (32 * self.num_warps), 255)
        return triton.compile(source, target=target, options=options)


Executor = Callable[[Variant, tuple[int, int, int], tuple[Any, ...]], None]
# None: the GPU, or the interpreter. Of this thread alone: `warmup` records launches while other threads serve
_executor: ContextVar[Executor | None] = ContextVar("executor", default=None)
_compiled: dict[tuple[Any, ...], Any] = {}  # what `launch` looks up -> compiled kernel
_errors: dict[tuple[str, torch.device], Tensor] = {}


def launch(kernel: Any, grid: tuple[int, int, int], tensors: tuple[Tensor | None, ...], numbers: tuple[int | float, ...],
           constants: tuple[Any, ...], num_warps: int) -> None:
    """Launches `kernel` on the current stream of the device of its tensors.

    Args:
        kernel: a triton.jit function of tensors, then numbers, then constexpr parameters.
        grid: programs; none may be 0.
        tensors: passed as pointers; None: absent. The first is on the device; a table may be in pinned host memory.
        numbers: int (int64) or float (float32); a parameter is always the same of the two.
        constants: values of the constexpr parameters.
        num_warps: warps of a program.
    """
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    aligned = functools.reduce(operator.or_, addresses) % ALIGNMENT == 0
    dtypes = tuple([None if x is None else x.dtype for x in tensors])
    executor = _executor.get()
    if executor is not None:
        return executor(_variant(kernel, dtypes, numbers, constants, num_warps, aligned), grid, (*tensors, *numbers))
    if dispatch.INTERPRETED:
        # bool is a byte to the kernels; the interpreter reads a tensor's own dtype
        bytes_for_bools = (x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x for x in tensors)
        with np.errstate(all="ignore"):  # Inf and NaN are results
            kernel[grid](*bytes_for_bools, *numbers, *constants)
        return None
    device_index = tensors[0].get_device()  # type: ignore[union-attr]
    if device_index != torch.cuda.current_device():
        with torch.cuda.device(device_index):
            return launch(kernel, grid, tensors, numbers, constants, num_warps)
    # by the Python function: hashing what triton.jit makes of it takes a lock
    compiled = _compiled.get((device_index, kernel.fn, dtypes, constants, num_warps, aligned))
    if compiled is None:
        compiled = compiled_for(_variant(kernel, dtypes, numbers, constants, num_warps, aligned), device_index)
    compiled[grid](*addresses, *numbers, *constants)
    return None


def _variant(kernel, dtypes, numbers, constants, num_warps, aligned):
    return Variant(kernel, dtypes, tuple(map(type, numbers)), constants, num_warps, aligned)


def compiled_for(variant: Variant, device_index: int) -> Any:
    """The kernel, compiled for a device, which is the current one; kept for `launch`."""
    key = (device_index, variant.kernel.fn, variant.dtypes, variant.constants, variant.num_warps, variant.aligned)
    found = _compiled.get(key)
    if found is None:
        found = _compiled[key] = variant.compile(current_target())
    return found


def current_target() -> GPUTarget:
    """Target of the current device."""
    return triton.runtime.driver.active.get_current_target()


@contextlib.contextmanager
def executing_on(executor: Executor, target: str) -> Iterator[None]:
    """Sends every launch of this thread to `executor` instead of the device: to record it, to simulate it, or to do nothing.

    Args:
        executor: takes the variant, the grid and the runtime arguments.
        target: whose launch parameters are chosen, such as "sm_90".
    """
    before = _executor.set(executor)
    try:
        with parameters_of(target):
            yield
    finally:
        _executor.reset(before)


def variants_of(call: Callable[[], Any], target: str) -> list[Variant]:
    """The variants that `call` launches on `target`, each once; nothing runs, and tensors may be on the meta device."""
    found: dict[Variant, None] = {}
    with executing_on(lambda variant, grid, args: found.setdefault(variant), target):
        call()
    return list(found)


def error_counter(op: str, device: torch.device) -> Tensor:
    """int32 [1] on `device`, where the kernels of `op` count bad values; see `check_errors`."""
    counter = _errors.get((op, device))
    if counter is None:
        # under a graph capture it would be memory of the graph, and each replay would zero it; another stream is not captured
        captured = device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        with torch.inference_mode(False), _beside_capture(device) if captured else contextlib.nullcontext():
            counter = torch.zeros(1, dtype=torch.int32, device=device)
        if device.type == "cuda":
            counter = _errors.setdefault((op, device), counter)  # another thread's, if that was first
    return counter


@contextlib.contextmanager
def _beside_capture(device: torch.device) -> Iterator[None]:
    """A stream that is not captured, on which this thread may allocate and wait: a capture in global mode, torch's default,
    forbids both, and torch lifts that only where the current stream is the captured one."""
    stream, mode = torch.cuda.Stream(device), ctypes.c_int(_RELAXED)
    exchange = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    if error := exchange(ctypes.byref(mode)):
        raise RuntimeError(f"engram_kernels: cuThreadExchangeStreamCaptureMode: CUDA error {error}")
    try:
        with torch.cuda.stream(stream):
            yield
            stream.synchronize()  # before the graph, which no stream orders behind this one
    finally:
        exchange(ctypes.byref(mode))


def take_errors() -> list[tuple[str, int, int]]:
    """(op, device index, bad values) of what was counted since the last call. Counters are only read, never cleared: what a
    kernel counts in between would be lost."""
    taken = []
    for (op, device), counter in list(_errors.items()):
        count = int(counter.item())
        fresh = (count - getattr(counter, "reported", 0)) % (1 << 32)  # also where it has wrapped
        counter.reported = count  # type: ignore[attr-defined]
        if fresh:
            taken.append((op, device.index or 0, fresh))
    return taken
