"""Argument checks that the ops share. Every message: op, argument, what was expected, what came."""
import numbers
import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from engram_kernels._files import shorten
from engram_kernels._modes import fake_mode_of

are_transforms_active = torch._C._are_functorch_transforms_active
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def expect_tensor(op: str, name: str, x: object, dtypes: Sequence[torch.dtype], shape: Sequence[int | str],
                  device: torch.device | None = None, dense_dims: int = 0) -> None:
    """Raises unless `x` is such a tensor.

    Args:
        op: op name, for the message.
        name: argument name, for the message.
        x: the argument.
        dtypes: the dtypes that are allowed.
        shape: one entry a dimension; a string names a size that may be anything.
        device: the device it must be on; None: any.
        dense_dims: how many trailing dimensions must be dense (contiguous among themselves).

    Raises:
        TypeError: `x` is no tensor.
        ValueError: dtype, shape, device or strides differ.
    """
    if isinstance(x, Tensor) and x.dtype in dtypes and (device is None or x.device == device):
        sizes = x.shape
        if len(sizes) == len(shape) and (dense_dims == 0 or x.is_contiguous()):
            for got, want in zip(sizes, shape, strict=True):
                if got != want and not isinstance(want, str):
                    break
            else:
                return  # the common case, kept cheap: a decode step calls this a dozen times
    _explain(op, name, x, dtypes, shape, device, dense_dims)


def _explain(op: str, name: str, x: object, dtypes: Sequence[torch.dtype], shape: Sequence[int | str],
             device: torch.device | None, dense_dims: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise ValueError(f"{op}: {name} must be {' or '.join(str(d) for d in dtypes)}, got {x.dtype}")
    if x.dim() != len(shape) or any(not isinstance(want, str) and got != want for got, want in zip(x.shape, shape, strict=True)):
        wanted = ", ".join(str(s) for s in shape)
        raise ValueError(f"{op}: {name} must have shape [{wanted}], got {list(x.shape)}")
    if device is not None and x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")
    if x.numel() == 0:
        return  # no element, no stride
    stride = 1
    for dim in range(x.dim() - 1, x.dim() - 1 - dense_dims, -1):
        if x.shape[dim] > 1 and x.stride(dim) != stride:
            raise ValueError(f"{op}: the last {dense_dims} dimensions of {name} must be contiguous, got strides "
                             f"{list(x.stride())} for shape {list(x.shape)}")
        stride *= x.shape[dim]


def expect_bounds(op: str, cu_seqlens: object, num_tokens: int, device: torch.device) -> None:
    """Raises unless `cu_seqlens` is int32 [B+1] on `device`, B at least 1 where there are tokens. Its data is not looked at."""
    expect_tensor(op, "cu_seqlens", cu_seqlens, (torch.int32,), ("B+1",), device, dense_dims=1)
    entries = cu_seqlens.shape[0]  # type: ignore[attr-defined]
    if entries == 0:
        raise ValueError(f"{op}: cu_seqlens must have at least one entry, got none")
    if entries == 1 and num_tokens > 0:
        raise ValueError(f"{op}: cu_seqlens must start at 0, not decrease and end at the number of tokens, {num_tokens}; got one "
                         "entry, so no sequence")


def expect_one_device(op: str, *tensors: Tensor | None) -> None:
    """Raises ValueError unless all tensors are on one device: for the fakes, which the dispatcher takes for any meta tensor."""
    devices = {x.device for x in tensors if x is not None}
    if len(devices) > 1:
        raise ValueError(f"{op}: the tensors are on {' and '.join(sorted(str(d) for d in devices))}, expected one device")


def expect_int(op: str, name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int. TypeError unless it is an integer (numpy's too; no bool), ValueError unless it is within [low, high]."""
    number: int = value if type(value) is int else _index(op, name, value)
    if number < low:
        raise ValueError(f"{op}: {name} is {number}, expected at least {low}")
    if high is not None and number > high:
        raise ValueError(f"{op}: {name} is {number}, expected at most {high}")
    return number


def _index(op: str, name: str, value: object) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:  # a tensor of a float, too, has an __index__
        pass
    raise TypeError(f"{op}: {name} is {shorten(repr(value))}, expected an integer")


def expect_seconds(op: str, name: str, value: object) -> float:
    """`value` as a float. TypeError unless it is a number (no bool), ValueError unless it is more than 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} is {shorten(repr(value))}, expected seconds, more than 0")
    seconds = float(value)
    if not seconds > 0:  # nan too
        raise ValueError(f"{op}: {name} is {value!r}, expected seconds, more than 0")
    return seconds


def expect_choice(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {name} is {value!r}, expected {' or '.join(repr(c) for c in choices)}")


def expect_apart(op: str, name: str, x: Tensor, out: Tensor, may_be_same: bool = False,
                 out_name: str = "out") -> None:
    """Raises ValueError where `out` shares memory with `x`, unless it may be `x` itself and is. As the bindings check it."""
    if x.numel() == 0 or out.numel() == 0 or is_compiling() or are_transforms_active():
        return  # tensors of torch.compile and torch.func have no address
    if any(t.is_meta or fake_mode_of(t) is not None for t in (x, out)):
        return  # nor have those without data
    begin, out_begin = x.data_ptr(), out.data_ptr()
    strides = zip(x.shape, x.stride(), out.stride(), strict=False)
    if may_be_same and begin == out_begin and all(n <= 1 or a == b for n, a, b in strides):
        return
    if begin < out_begin + _extent_bytes(out) and out_begin < begin + _extent_bytes(x):
        raise ValueError(f"{op}: {out_name} shares memory with {name}{', without being it' if may_be_same else ''}")


def _extent_bytes(x: Tensor) -> int:
    return (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))) * x.element_size()


def wants_grad(*tensors: Tensor) -> bool:
    """Whether autograd has to see this call."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def no_second_derivative(op: str):
    """A backward for the registration of `<op>_bwd`, which is not differentiable itself."""
    def backward(ops, ctx, *grads):
        raise NotImplementedError(f"{op}: there is no second derivative; use backend='reference'")
    return backward
