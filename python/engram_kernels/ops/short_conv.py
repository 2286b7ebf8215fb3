"""Short convolution: a causal depthwise convolution over a few tokens, behind a norm, added to its input."""
import torch
from torch import Tensor
from torch.compiler import is_compiling

from engram_kernels import _transforms, backends
from engram_kernels._checks import (
    FLOAT_DTYPES,
    expect_bounds,
    expect_one_device,
    expect_tensor,
    mark_written,
    no_second_derivative,
    refuse_forward_ad,
    wants_grad,
)
from engram_kernels._library import LIB
from engram_kernels.reference.short_conv import short_conv as _reference
from engram_kernels.reference.short_conv import short_conv_update as _reference_update
from engram_kernels.triton_runtime.dispatch import libraries_of, register_autograd

_INPUTS = "Tensor x, Tensor weight, Tensor norm_weight, Tensor cu_seqlens"
_UPDATE = (f"{_INPUTS}, Tensor positions, int dilation, float eps, Tensor(a!) state, Tensor? state_indices=None, "
           "Tensor(b!)? state_ends=None")
LIB.define(f"short_conv({_INPUTS}, int dilation, float eps) -> Tensor")
LIB.define(f"short_conv.out({_INPUTS}, int dilation, float eps, *, Tensor(a!) out) -> ()")
LIB.define(f"short_conv_update({_UPDATE}) -> Tensor")
LIB.define(f"short_conv_update.out({_UPDATE}, *, Tensor(c!) out) -> ()")
LIB.define(f"short_conv_bwd(Tensor grad_out, {_INPUTS}, int dilation, float eps) -> (Tensor, Tensor, Tensor)")

MAX_WIDTH = 8


@torch.library.register_fake("engram_kernels::short_conv", lib=LIB)
def _fake(x, weight, norm_weight, cu_seqlens, dilation, eps):
    expect_one_device("short_conv", x, weight, norm_weight, cu_seqlens)
    return x.new_empty(x.shape)


@torch.library.register_fake("engram_kernels::short_conv.out", lib=LIB)
def _fake_out(x, weight, norm_weight, cu_seqlens, dilation, eps, *, out):
    return None


@torch.library.register_fake("engram_kernels::short_conv_update", lib=LIB)
def _fake_update(x, weight, norm_weight, cu_seqlens, positions, dilation, eps, state, state_indices=None, state_ends=None):
    expect_one_device("short_conv", x, weight, norm_weight, cu_seqlens, positions, state, state_indices, state_ends)
    return x.new_empty(x.shape)


@torch.library.register_fake("engram_kernels::short_conv_update.out", lib=LIB)
def _fake_update_out(x, weight, norm_weight, cu_seqlens, positions, dilation, eps, state, state_indices=None, state_ends=None, *,
                     out):
    return None


@torch.library.register_fake("engram_kernels::short_conv_bwd", lib=LIB)
def _fake_bwd(grad_out, x, weight, norm_weight, cu_seqlens, dilation, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), norm_weight.new_empty(norm_weight.shape)


def short_conv(x: Tensor, weight: Tensor, norm_weight: Tensor, cu_seqlens: Tensor, dilation: int, eps: float = 1e-5,
               state: Tensor | None = None, positions: Tensor | None = None, state_indices: Tensor | None = None,
               state_ends: Tensor | None = None, *, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Adds to each input a convolution over its predecessors in the same sequence.

    ``out[t] = x[t] + silu(sum over j of weight[:, :, j] * n[t - (W-1-j) * dilation])`` with
    ``n = x * rsqrt(mean(x^2) + eps) * norm_weight`` per branch; nothing before the sequence start. In float32 from inputs to
    output, rounded once.

    With `state`, a sequence may come in chunks (one token per chunk when decoding), and any chunking gives the bits of the
    whole. A ring of `state` holds the last S + K raw inputs of a sequence, S = (W-1) * dilation: the input at absolute
    position q lies in slot q mod (S + K), so that a step writes one slot and moves nothing. Slots before a sequence's first
    token are never read: a new sequence (position 0) may take over a ring as it is.

    K, the number of slots beyond S, is how many draft tokens can be rejected: set `positions` back, and the call gives what
    the sequence gives without them, whatever they were. Positions may go back by at most K from the furthest input that the
    ring has had; what lies further back has been overwritten. Neither ring nor positions show that. With `state_ends` the
    op remembers it, and refuses positions that go back too far or that skip inputs. Without `state_ends` it believes them.

    Args:
        x: [T, M, H] bfloat16, float16 or float32, sequences packed back to back; the last dimension dense, strides of the
            others free.
        weight: [M, H, W] contiguous, 1 <= W <= 8, of the dtype of `x` or float32; tap W-1 is the token itself. The weight of the
            published ``nn.Conv1d`` is ``[M*H, 1, W]``: view it.
        norm_weight: [M, H] contiguous, dtype of `weight`.
        cu_seqlens: [B+1] int32, first 0, last T, non-decreasing; empty sequences are allowed.
        dilation: tokens between taps, at least 1.
        eps: added to the mean square, >= 0.
        state: [B, S+K, M, H], K >= 0, dtype of `x`, the last three dimensions dense; updated in place. With `state_indices` a
            pool of any number of rings, [R, S+K, M, H]. Not with inputs that require grad.
        positions: [B] int32 or int64, any stride, inputs of each sequence before this chunk; given with `state` and only then.
        state_indices: [B], dtype of `positions`, any stride, the ring of each sequence. -1 skips the sequence: its outputs are
            zeros, nothing of it is read, and every ring stays as it is. None: sequence b has ring b.
        state_ends: [R, 2] int64, contiguous, how many inputs the sequence of each ring has, and the most that it has had, with
            rejected ones; updated in place. Zeros at first; for rings that are taken over at position p, both are p.
        out: [T, M, H] of the dtype of `x`, contiguous, apart from `x` and `state`; written instead of a new tensor.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        [T, M, H] contiguous, dtype and device of `x`; `out` when given. A sequence without tokens leaves its ring as it is.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a shape, dtype, device, stride or value is wrong, two sequences have one ring, or `positions` go where the
            ring cannot follow; nothing is written. On a GPU such a sequence is skipped and counted: `check_errors` raises.
        IndexError: a state index is out of range; nothing is written. On a GPU as above.
        RuntimeError: the named backend is not available.
        NotImplementedError: forward-mode or second derivatives of a compiled backend; the reference has both.

    Source: arXiv 2601.07372 section 2; deepseek-ai/Engram `engram_demo_v1.py` (`ShortConv`).
    """
    _check(x, weight, norm_weight, cu_seqlens, dilation, eps, out)
    grad = wants_grad(x, weight, norm_weight, *(t for t in (out, state) if t is not None))
    if grad and (out is not None or state is not None):
        raise ValueError(f"short_conv: {'out' if out is not None else 'state'} cannot be given while an input requires grad; "
                         "leave it away or use torch.no_grad()")
    run = backends.select("short_conv", x.device, backend)
    if state is None:
        for name, given in (("positions", positions), ("state_indices", state_indices), ("state_ends", state_ends)):
            if given is not None:
                raise ValueError(f"short_conv: {name} is given without state")
        return run(x, weight, norm_weight, cu_seqlens, dilation, eps, out=out)
    _check_state(x, weight, cu_seqlens, dilation, state, positions, state_indices, state_ends)
    return run(x, weight, norm_weight, cu_seqlens, dilation, eps, positions, state, state_indices, state_ends, out=out)


def _check(x, weight, norm_weight, cu_seqlens, dilation, eps, out):
    op = "short_conv"
    expect_tensor(op, "x", x, FLOAT_DTYPES, ("T", "M", "H"), dense_dims=1)
    tokens, branches, size = x.shape
    if branches == 0 or size == 0:
        raise ValueError(f"{op}: x must have at least one branch of at least one element, got {list(x.shape)}")
    expect_tensor(op, "weight", weight, (x.dtype, torch.float32), (branches, size, "W"), x.device, dense_dims=3)
    if not 1 <= weight.shape[2] <= MAX_WIDTH:
        raise ValueError(f"{op}: weight has {weight.shape[2]} taps, expected 1..{MAX_WIDTH}")
    expect_tensor(op, "norm_weight", norm_weight, (weight.dtype,), (branches, size), x.device, dense_dims=2)
    expect_bounds(op, cu_seqlens, tokens, x.device)
    if dilation < 1:
        raise ValueError(f"{op}: dilation is {dilation}, expected at least 1")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps is {eps}, expected a finite number >= 0")
    if out is not None:
        expect_tensor(op, "out", out, (x.dtype,), (tokens, branches, size), x.device, dense_dims=3)


def _check_state(x, weight, cu_seqlens, dilation, state, positions, state_indices, state_ends):
    op, sequences, reach = "short_conv", cu_seqlens.shape[0] - 1, (weight.shape[2] - 1) * dilation
    rings = sequences if state_indices is None else "R"
    expect_tensor(op, "state", state, (x.dtype,), (rings, f"{reach}+K", *x.shape[1:]), x.device, dense_dims=3)
    if state.shape[1] < reach:
        raise ValueError(f"{op}: state has {state.shape[1]} slots, expected at least {reach}, (W-1) * dilation")
    if positions is None:
        raise ValueError(f"{op}: positions is None, expected a tensor with state")
    expect_tensor(op, "positions", positions, (torch.int32, torch.int64), (sequences,), x.device)
    if state_indices is not None:
        expect_tensor(op, "state_indices", state_indices, (positions.dtype,), (sequences,), x.device)
    if state_ends is not None:
        expect_tensor(op, "state_ends", state_ends, (torch.int64,), (state.shape[0], 2), x.device, dense_dims=2)


def _compiled(x, weight, norm_weight, cu_seqlens, dilation, eps, positions=None, state=None, state_indices=None, state_ends=None,
              out=None):
    refuse_forward_ad("short_conv")
    args = (x, weight, norm_weight, cu_seqlens)
    if state is None:
        op, args = torch.ops.engram_kernels.short_conv, (*args, dilation, eps)
    else:
        op = torch.ops.engram_kernels.short_conv_update
        args = (*args, positions, dilation, eps, state, state_indices, state_ends)
    if _transforms.active() and out is None and state is None:
        return _transforms.call(op.default, *args)
    if is_compiling() or (out is None and wants_grad(x, weight, norm_weight)):
        if out is None:
            return op.default(*args)
        op.out(*args, out=out)
        return out
    with torch._C._AutoDispatchBelowAutograd():  # the Python autograd wrapper costs as much as the rest of the dispatch
        if out is None:
            result = op.default(*args)
        else:
            op.out(*args, out=out)
            result = out
    mark_written(out, state, state_ends)
    return result


def _check_data(x, weight, norm_weight, cu_seqlens, dilation, eps, positions=None, state=None, state_indices=None,
                state_ends=None):
    steps = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or (steps < 0).any() or cu_seqlens[-1] != x.shape[0]:
        raise ValueError(f"short_conv: cu_seqlens must start at 0, not decrease and end at the number of tokens, {x.shape[0]}; "
                         f"got {cu_seqlens.tolist()}")
    if positions is None:
        return
    indices = list(range(len(steps))) if state_indices is None else state_indices.tolist()
    spare, users = state.shape[1] - (weight.shape[2] - 1) * dilation, {}
    for b, (ring, position, chunk) in enumerate(zip(indices, positions.tolist(), steps.tolist(), strict=True)):
        if not -1 <= ring < state.shape[0]:
            raise IndexError(f"short_conv: state_indices[{b}] is {ring}, expected [0, {state.shape[0]}) or -1 (skip the "
                             "sequence)")
        if ring == -1:
            continue
        if not 0 <= position < 2**63 - chunk:
            raise ValueError(f"short_conv: positions[{b}] is {position}, expected at least 0, and room for the {chunk} tokens of "
                             "the chunk")
        if chunk == 0:
            continue
        if ring in users:
            raise ValueError(f"short_conv: state_indices[{users[ring]}] and state_indices[{b}] are both {ring}, expected a ring "
                             "for each sequence")
        users[ring] = b
        if state_ends is not None and position > 0:
            _check_ends(b, position, ring, *state_ends[ring].tolist(), spare)


def _check_ends(b, position, ring, end, furthest, spare):
    if position > end:
        raise ValueError(f"short_conv: positions[{b}] is {position}, expected at most {end}, the inputs that state_ends[{ring}] "
                         "says the ring has")
    if furthest - position > spare:
        raise ValueError(f"short_conv: positions[{b}] is {position}, {furthest - position} before the furthest input, expected "
                         f"at most {spare} (the slots of state beyond (W-1) * dilation), or 0 for a new sequence")


def _as_update(x, weight, norm_weight, cu_seqlens, dilation, eps, positions=None, state=None, *state_options):
    return None if state is None else (x, weight, norm_weight, cu_seqlens, positions, dilation, eps, state, *state_options)


def _checked_reference(x, weight, norm_weight, cu_seqlens, dilation, eps, positions=None, state=None, state_indices=None,
                       state_ends=None, out=None):
    _check_data(x, weight, norm_weight, cu_seqlens, dilation, eps, positions, state, state_indices, state_ends)
    if state is None:
        result = _reference(x, weight, norm_weight, cu_seqlens, dilation, eps)
    else:
        result = _reference_update(x, weight, norm_weight, cu_seqlens, positions, dilation, eps, state, state_indices, state_ends)
    return result if out is None else out.copy_(result)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _backward(ops, ctx, grad_out):
    if grad_out.stride(-1) != 1:  # as from .sum(), whose gradient is one element with strides 0
        grad_out = grad_out.contiguous()
    grads = ops.short_conv_bwd.default(grad_out, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None


def _refuse_grad(overload):
    """A kernel for autograd's place in the dispatch: an op that writes `state` has no derivative, and says so."""
    def kernel(*args, **kwargs):
        if wants_grad(*(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))):
            raise RuntimeError("short_conv_update: an input requires grad, but the op has no derivative; use torch.no_grad()")
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args, **kwargs)
    return kernel


for _namespace, _library in libraries_of("short_conv_update", LIB).items():
    _update = getattr(torch.ops, _namespace).short_conv_update
    _library.impl("short_conv_update", _refuse_grad(_update.default), "Autograd")
    _library.impl("short_conv_update.out", _refuse_grad(_update.out), "Autograd")
register_autograd("short_conv", _backward, _setup_context, LIB)
register_autograd("short_conv_bwd", no_second_derivative("short_conv"), None, LIB)
backends.register_op("short_conv", _checked_reference, _compiled, check_data=_check_data, as_update=_as_update)
