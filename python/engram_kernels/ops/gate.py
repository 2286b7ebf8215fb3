"""Gate: how much of the memory's value enters each branch of the hidden state."""
import torch
from torch import Tensor
from torch.compiler import is_compiling

from engram_kernels import _transforms, backends
from engram_kernels._checks import (
    FLOAT_DTYPES,
    expect_choice,
    expect_one_device,
    expect_tensor,
    mark_written,
    no_second_derivative,
    refuse_forward_ad,
    wants_grad,
)
from engram_kernels._library import COMPILE_ERROR, LIB
from engram_kernels.reference.gate import gate as _reference
from engram_kernels.triton_runtime.dispatch import register_autograd

_INPUTS = "Tensor hidden, Tensor key, Tensor value, Tensor w_hidden, Tensor w_key, Tensor? mask"
_OPTIONS = "float eps, float clamp, str zero_sign, bool add_residual"
LIB.define(f"gate({_INPUTS}, {_OPTIONS}) -> Tensor")
LIB.define(f"gate.out({_INPUTS}, {_OPTIONS}, *, Tensor(a!) out) -> ()")
LIB.define(f"gate_bwd(Tensor grad_out, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")

ZERO_SIGNS = ("copysign", "sign")
_FLOAT_TINY, _FLOAT_MAX = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # the kernels take float32


@torch.library.register_fake("engram_kernels::gate", lib=LIB)
def _fake(hidden, key, value, w_hidden, w_key, mask, eps, clamp, zero_sign, add_residual):
    expect_one_device("gate", hidden, key, value, w_hidden, w_key, mask)
    return hidden.new_empty(hidden.shape)


@torch.library.register_fake("engram_kernels::gate.out", lib=LIB)
def _fake_out(hidden, key, value, w_hidden, w_key, mask, eps, clamp, zero_sign, add_residual, *, out):
    return None


@torch.library.register_fake("engram_kernels::gate_bwd", lib=LIB)
def _fake_bwd(grad_out, hidden, key, value, w_hidden, w_key, mask, eps, clamp, zero_sign, add_residual):
    return tuple(x.new_empty(x.shape) for x in (hidden, key, value, w_hidden, w_key))


def gate(hidden: Tensor, key: Tensor, value: Tensor, w_hidden: Tensor, w_key: Tensor, mask: Tensor | None = None, *,
         eps: float = 1e-6, clamp: float = 1e-6, zero_sign: str = "copysign", add_residual: bool = True,
         out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Adds the memory's value to every branch of the hidden state, weighted by how well branch and key agree.

    ``out = h + sigmoid(copysign(sqrt(max(|x|, clamp)), x)) * v`` with
    ``x = sum(h * w_h * k * w_k) * rsqrt(mean(h^2) + eps) * rsqrt(mean(k^2) + eps) / sqrt(H)``,
    per token and branch, in float32 from inputs to output, rounded once (to nearest even). NaN and Inf propagate within
    their own token. A masked token has gate 0: its hidden state passes bit for bit, whatever key and value hold.

    Args:
        hidden: [T, M, H] bfloat16, float16 or float32. The last dimension is dense, the strides of the others are free.
        key: [T, M, H] of the dtype of `hidden`; strides likewise (a slice of a fused projection is read in place).
        value: [T, H] of the dtype of `hidden`; strides likewise.
        w_hidden: [M, H] contiguous, norm weight of hidden; float32 or the dtype of `hidden`.
        w_key: [M, H] contiguous, norm weight of key, of the dtype of `w_hidden`.
        mask: [T] bool, contiguous; True = masked (dead). None: no token is.
        eps: added to the mean squares; >= 0.
        clamp: least |x| under the square root; > 0. Inside the clamp the derivative of the score is 0.
        zero_sign: sign of the score where x is 0: "copysign" (that of the zero) or "sign" (the score is 0).
        add_residual: False leaves ``h +`` away; masked tokens are then zeros.
        out: [T, M, H] of the dtype of `hidden`, contiguous, written instead of a new tensor. May be `hidden` itself (in
            place); any other overlap with an input is an error. Not with inputs that require grad.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        [T, M, H] contiguous, dtype and device of `hidden`; `out` when given. T = 0 gives an empty tensor. Nothing else
        of a size that depends on T is allocated, forward or (beside the gradients) backward.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a shape, dtype, device, stride or option is wrong, or `out` overlaps an input.
        RuntimeError: the named backend is not available.
        NotImplementedError: forward-mode or second derivatives of a compiled backend; the reference has both.

    Source: arXiv 2601.07372 section 2; the copysign rule: the TileKernels library.
    """
    args = (hidden, key, value, w_hidden, w_key, mask, eps, clamp, zero_sign, add_residual)
    if backend in ("auto", "cpu") and runs_compiled(*args[:6], out):
        try:  # the binding checks all that _check does: at the size of one token, checking twice costs as much as the op
            return _compiled(*args, out=out)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            pass  # below, in better words
    _check(hidden, key, value, w_hidden, w_key, mask, out)
    check_options("gate", eps, clamp, zero_sign)
    run = backends.select("gate", hidden.device, backend)
    return run(*args, out=out)


def runs_compiled(*tensors: object) -> bool:
    """Whether the compiled CPU op can take this call as it is: every tensor there is on the CPU, nothing is traced."""
    if COMPILE_ERROR is not None or is_compiling():
        return False
    return all(x is None or getattr(x, "is_cpu", False) for x in tensors)


def check_options(op: str, eps: float, clamp: float, zero_sign: str) -> None:
    """Raises ValueError unless the options of gate and gather_gate are in range."""
    if not 0 <= eps <= _FLOAT_MAX:
        raise ValueError(f"{op}: eps is {eps}, expected a finite number >= 0")
    if not _FLOAT_TINY <= clamp <= _FLOAT_MAX:
        raise ValueError(f"{op}: clamp is {clamp}, expected a number from {_FLOAT_TINY} to {_FLOAT_MAX}")
    expect_choice(op, "zero_sign", zero_sign, ZERO_SIGNS)


def check_out(op: str, out: Tensor | None, inputs: tuple[Tensor, ...]) -> None:
    """Raises ValueError where `out` is given for a call that autograd would have to follow."""
    if out is not None and wants_grad(*inputs, out):
        raise ValueError(f"{op}: out cannot be given while an input requires grad; leave it away or use torch.no_grad()")


def _check(hidden, key, value, w_hidden, w_key, mask, out):
    op = "gate"
    expect_tensor(op, "hidden", hidden, FLOAT_DTYPES, ("T", "M", "H"), dense_dims=1)
    tokens, branches, size = hidden.shape
    device, dtype = hidden.device, hidden.dtype
    if branches == 0 or size == 0:
        raise ValueError(f"{op}: hidden must have at least one branch of at least one element, got {list(hidden.shape)}")
    expect_tensor(op, "key", key, (dtype,), (tokens, branches, size), device, dense_dims=1)
    expect_tensor(op, "value", value, (dtype,), (tokens, size), device, dense_dims=1)
    expect_tensor(op, "w_hidden", w_hidden, (dtype, torch.float32), (branches, size), device, dense_dims=2)
    expect_tensor(op, "w_key", w_key, (w_hidden.dtype,), (branches, size), device, dense_dims=2)
    if mask is not None:
        expect_tensor(op, "mask", mask, (torch.bool,), (tokens,), device, dense_dims=1)
    if out is not None:
        expect_tensor(op, "out", out, (dtype,), (tokens, branches, size), device, dense_dims=3)


def _compiled(*args, out=None):
    refuse_forward_ad("gate")
    if out is not None:
        check_out("gate", out, args[:5])
        torch.ops.engram_kernels.gate.out(*args, out=out)
        mark_written(out)
        return out
    if _transforms.active():
        return _transforms.call(torch.ops.engram_kernels.gate.default, *args)
    if is_compiling() or wants_grad(*args[:5]):
        return torch.ops.engram_kernels.gate.default(*args)
    with torch._C._AutoDispatchBelowAutograd():  # the Python autograd wrapper costs as much as the rest of the dispatch
        return torch.ops.engram_kernels.gate.default(*args)


def _reference_into(*args, out=None):
    check_out("gate", out, args[:5])
    result = _reference(*args)
    return result if out is None else out.copy_(result)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _backward(ops, ctx, grad_out):
    if grad_out.stride(-1) != 1:  # as from .sum(), whose gradient is one element with strides 0
        grad_out = grad_out.contiguous()
    grads = ops.gate_bwd.default(grad_out, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None, None


register_autograd("gate", _backward, _setup_context, LIB)
register_autograd("gate_bwd", no_second_derivative("gate"), None, LIB)
backends.register_op("gate", _reference_into, _compiled, in_place="hidden")
