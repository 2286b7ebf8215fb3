"""Short convolution: a causal depthwise convolution over a few tokens, behind a norm, added to its input."""
import torch
from torch import Tensor

from engram_kernels._checks import FLOAT_DTYPES, expect_bounds, expect_tensor
from engram_kernels.ops._op import Op
from engram_kernels.ops.gate import check_eps
from engram_kernels.reference.short_conv import short_conv as _reference
from engram_kernels.reference.short_conv import short_conv_update as _reference_update

MAX_WIDTH = 8
MAX_DILATION = (2**31 - 1) // MAX_WIDTH


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
    if state is None:
        for name, given in (("positions", positions), ("state_indices", state_indices), ("state_ends", state_ends)):
            if given is not None:
                raise ValueError(f"short_conv: {name} is given without state")
        return _OP.call(backend, (x, weight, norm_weight, cu_seqlens, dilation, eps), out)
    return _UPDATE.call(backend, (x, weight, norm_weight, cu_seqlens, positions, dilation, eps, state, state_indices, state_ends),
                        out)


def _check(args, out):
    op, (x, weight, norm_weight, cu_seqlens, dilation, eps) = "short_conv", args
    expect_tensor(op, "x", x, FLOAT_DTYPES, ("T", "M", "H"), dense_dims=1)
    tokens, branches, size = x.shape
    if branches == 0 or size == 0:
        raise ValueError(f"{op}: x must have at least one branch of at least one element, got {list(x.shape)}")
    expect_tensor(op, "weight", weight, (x.dtype, torch.float32), (branches, size, "W"), x.device, dense_dims=3)
    if not 1 <= weight.shape[2] <= MAX_WIDTH:
        raise ValueError(f"{op}: weight has {weight.shape[2]} taps, expected 1..{MAX_WIDTH}")
    expect_tensor(op, "norm_weight", norm_weight, (weight.dtype,), (branches, size), x.device, dense_dims=2)
    expect_bounds(op, cu_seqlens, tokens, x.device)
    if not isinstance(dilation, int):
        raise TypeError(f"{op}: dilation must be an integer, got {type(dilation).__name__}")
    if not 1 <= dilation <= MAX_DILATION:
        raise ValueError(f"{op}: dilation is {dilation}, expected 1..{MAX_DILATION}")
    check_eps(op, eps)
    if out is not None:
        expect_tensor(op, "out", out, (x.dtype,), (tokens, branches, size), x.device, dense_dims=3)


def _check_update(args, out):
    x, weight, norm_weight, cu_seqlens, positions, dilation, eps, state, state_indices, state_ends = args
    _check((x, weight, norm_weight, cu_seqlens, dilation, eps), out)
    op, sequences, reach = "short_conv", cu_seqlens.shape[0] - 1, (weight.shape[2] - 1) * dilation
    rings = sequences if state_indices is None else "R"
    expect_tensor(op, "state", state, (x.dtype,), (rings, f"{reach}+K", *x.shape[1:]), x.device, dense_dims=3)
    if state.shape[1] < reach:
        raise ValueError(f"{op}: state has {state.shape[1]} slots, expected at least {reach}, (W-1) * dilation")
    if state.shape[0] > 1 and state.stride(0) < state[0].numel():
        raise ValueError(f"{op}: the rings of state share memory")
    if positions is None:
        raise ValueError(f"{op}: positions is None, expected a tensor with state")
    expect_tensor(op, "positions", positions, (torch.int32, torch.int64), (sequences,), x.device)
    if state_indices is not None:
        expect_tensor(op, "state_indices", state_indices, (positions.dtype,), (sequences,), x.device)
    if state_ends is not None:
        expect_tensor(op, "state_ends", state_ends, (torch.int64,), (state.shape[0], 2), x.device, dense_dims=2)


def _check_data(x, weight, norm_weight, cu_seqlens, *options):
    steps = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or (steps < 0).any() or cu_seqlens[-1] != x.shape[0]:
        raise ValueError(f"short_conv: cu_seqlens must start at 0, not decrease and end at the number of tokens, {x.shape[0]}; "
                         f"got {cu_seqlens.tolist()}")


def _check_update_data(x, weight, norm_weight, cu_seqlens, positions, dilation, eps, state, state_indices, state_ends):
    _check_data(x, weight, norm_weight, cu_seqlens)
    steps = cu_seqlens.diff()
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
    if end > furthest:
        raise ValueError(f"short_conv: state_ends[{ring}] is [{end}, {furthest}], expected the inputs that the ring has, and at "
                         "least as many as the most that it has had")
    if furthest - position > spare:
        raise ValueError(f"short_conv: positions[{b}] is {position}, {furthest - position} before the furthest input, expected "
                         f"at most {spare} (the slots of state beyond (W-1) * dilation), or 0 for a new sequence")


def _empty(x, *args):
    return x.new_empty(x.shape)


def _fake_bwd(grad_out, x, weight, norm_weight, *args):
    return tuple(x.new_empty(x.shape) for x in (x, weight, norm_weight))


_INPUTS = "Tensor x, Tensor weight, Tensor norm_weight, Tensor cu_seqlens"
_OP = Op("short_conv", f"{_INPUTS}, int dilation, float eps", empty=_empty, reference=_reference, check=_check,
         check_data=_check_data, differentiable=("x", "weight", "norm_weight"))
_OP.derive("(Tensor, Tensor, Tensor)", _fake_bwd)
_UPDATE = Op("short_conv_update", f"{_INPUTS}, Tensor positions, int dilation, float eps, Tensor(a!) state, "
             "Tensor? state_indices=None, Tensor(b!)? state_ends=None", empty=_empty, reference=_reference_update,
             check=_check_update, check_data=_check_update_data, differentiable=("x", "weight", "norm_weight", "state"),
             writes=("state", "state_ends"))
