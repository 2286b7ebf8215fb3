"""Gate: how much of the memory's value enters each branch of the hidden state."""
import torch
from torch import Tensor

from engram_kernels._checks import FLOAT_DTYPES, expect_choice, expect_tensor
from engram_kernels.ops._op import Op
from engram_kernels.reference.gate import gate as _reference

ZERO_SIGNS = ("copysign", "sign")
_FLOAT_TINY, _FLOAT_MAX = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # the kernels take float32


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
    return _OP.call(backend, (hidden, key, value, w_hidden, w_key, mask, eps, clamp, zero_sign, add_residual), out)


def check_eps(op: str, eps: float) -> None:
    """Raises TypeError or ValueError unless `eps` is a number that float32 has, at least 0."""
    if not isinstance(eps, int | float):
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
    if not 0 <= eps <= _FLOAT_MAX:
        raise ValueError(f"{op}: eps is {eps}, expected a finite number >= 0")


def check_options(op: str, eps: float, clamp: float, zero_sign: str, add_residual: bool) -> None:
    """Raises TypeError or ValueError unless the options of gate, gather_gate and engram_forward are in range."""
    check_eps(op, eps)
    if not isinstance(clamp, int | float):
        raise TypeError(f"{op}: clamp must be a number, got {type(clamp).__name__}")
    if not isinstance(add_residual, bool | int | None):  # what torch's parser takes for a bool
        raise TypeError(f"{op}: add_residual must be True or False, got {type(add_residual).__name__}")
    if not _FLOAT_TINY <= clamp <= _FLOAT_MAX:
        raise ValueError(f"{op}: clamp is {clamp}, expected a number from {_FLOAT_TINY} to {_FLOAT_MAX}")
    expect_choice(op, "zero_sign", zero_sign, ZERO_SIGNS)


def expect_hidden(op: str, hidden: Tensor) -> torch.Size:
    """The shape of `hidden`; raises unless it is [T, M, H] with at least one branch of at least one element."""
    expect_tensor(op, "hidden", hidden, FLOAT_DTYPES, ("T", "M", "H"), dense_dims=1)
    if hidden.shape[1] == 0 or hidden.shape[2] == 0:
        raise ValueError(f"{op}: hidden must have at least one branch of at least one element, got {list(hidden.shape)}")
    return hidden.shape


def expect_weights_mask_out(op: str, hidden: Tensor, w_hidden: Tensor, w_key: Tensor, mask: Tensor | None,
                            out: Tensor | None) -> None:
    """Raises unless these fit `hidden`."""
    (tokens, branches, size), device = hidden.shape, hidden.device
    expect_tensor(op, "w_hidden", w_hidden, (hidden.dtype, torch.float32), (branches, size), device, dense_dims=2)
    expect_tensor(op, "w_key", w_key, (w_hidden.dtype,), (branches, size), device, dense_dims=2)
    if mask is not None:
        expect_tensor(op, "mask", mask, (torch.bool,), (tokens,), device, dense_dims=1)
    if out is not None:
        expect_tensor(op, "out", out, (hidden.dtype,), (tokens, branches, size), device, dense_dims=3)


def empty_like_hidden(hidden: Tensor, *args: object) -> Tensor:
    """The output of an op on `hidden`: contiguous, whatever the strides of `hidden`."""
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _check(args, out):
    hidden, key, value, w_hidden, w_key, mask, eps, clamp, zero_sign, add_residual = args
    tokens, branches, size = expect_hidden("gate", hidden)
    expect_tensor("gate", "key", key, (hidden.dtype,), (tokens, branches, size), hidden.device, dense_dims=1)
    expect_tensor("gate", "value", value, (hidden.dtype,), (tokens, size), hidden.device, dense_dims=1)
    expect_weights_mask_out("gate", hidden, w_hidden, w_key, mask, out)
    check_options("gate", eps, clamp, zero_sign, add_residual)


def _fake_bwd(grad_out, hidden, key, value, w_hidden, w_key, *options):
    return tuple(x.new_empty(x.shape) for x in (hidden, key, value, w_hidden, w_key))


_OP = Op("gate", "Tensor hidden, Tensor key, Tensor value, Tensor w_hidden, Tensor w_key, Tensor? mask, float eps, float clamp, "
         "str zero_sign, bool add_residual", empty=empty_like_hidden, reference=_reference, check=_check,
         differentiable=("hidden", "key", "value", "w_hidden", "w_key"), in_place="hidden")
_OP.derive("(Tensor, Tensor, Tensor, Tensor, Tensor)", _fake_bwd)
