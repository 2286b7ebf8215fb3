"""Multi-head n-gram hash: token ids -> row ids of every memory layer."""
import torch
from torch import Tensor

from engram_kernels._checks import expect_bounds, expect_tensor
from engram_kernels.layout import Layout
from engram_kernels.ops._op import Op
from engram_kernels.reference.ngram_hash import ngram_hash as _reference
from engram_kernels.token_map import TokenMap


def ngram_hash(token_ids: Tensor, cu_seqlens: Tensor, layout: Layout, token_map: TokenMap | None = None,
               history: Tensor | None = None, dead_mask: Tensor | None = None, *, out: Tensor | None = None,
               backend: str = "auto") -> Tensor:
    """Row ids of the n-grams that end at each token, for every memory layer, order and head.

    ``row[l, t, c] = offset[l, c] + mix(l, t, c) mod modulus[l, c]``, where mix is
    ``XOR over s < order of id[t-s] * multiplier[l, s]`` or, for the polynomial family, the sum of
    ``id[t-s] * multiplier[l, c, s]``. Products wrap in int64; the remainder is never negative.

    A position is blocked when it lies before its sequence (and history does not say otherwise), is dead, or is a lookback
    equal to ``layout.eos_id``; so is every older one. Blocked positions contribute ``layout.boundary_id``.
    Hashing a sequence in any chunking, with the right history, gives the same bits as hashing it whole.

    Args:
        token_ids: [T] int32 or int64, all sequences packed back to back; any stride. In [0, vocab) where alive.
        cu_seqlens: [B+1] int32, first 0, last T, non-decreasing; empty sequences are allowed.
        layout: constants of the hash, from `EngramSpec.layout()`.
        token_map: compression of token ids; None: `token_ids` and `history` are canonical already.
        history: [B, N-1], dtype of `token_ids`, the ids before each sequence's chunk, column 0 the nearest;
            -1 before the sequence start, -2 a dead token. Once -1, every older entry is -1. None: every sequence starts here.
        dead_mask: [T] bool, True where the token must not be hashed; its id is not looked at.
        out: [L, T, C] int32, contiguous, written instead of a new tensor.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        [L, T, C] int32 row ids on the device of `token_ids`; `out` when given. T = 0 or B = 0 give an empty tensor.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a shape, dtype, device or stride is wrong, `cu_seqlens` is no partition of [0, T], or `token_map` does
            not belong to `layout`.
        IndexError: a token id or history entry is out of range, or a history entry is older than a -1 and is not -1; names the
            position and the value, nothing is written. On a GPU it is counted, `check_errors` raises, and the entry and what
            is older hash as dead.
        RuntimeError: the named backend is not available.

    Source: arXiv 2601.07372 section 2 and its public demo; families and boundary rules: `EngramSpec`.
    """
    if not isinstance(layout, Layout):
        raise TypeError(f"ngram_hash: layout must be a Layout (EngramSpec.layout()), got {type(layout).__name__}")
    if token_map is not None:
        _check_token_map(token_map, layout)
    return _OP.call(backend, (token_ids, cu_seqlens, layout.moduli, layout.offsets, layout.multipliers,
                              None if token_map is None else token_map.map, history, dead_mask, layout.num_ids,
                              layout.boundary_id, layout.eos_id), out)


def _check_token_map(token_map, layout):
    if not isinstance(token_map, TokenMap):
        raise TypeError(f"ngram_hash: token_map must be a TokenMap, got {type(token_map).__name__}")
    if token_map.num_classes != layout.num_ids:
        raise ValueError(f"ngram_hash: token_map has {token_map.num_classes} classes, the layout was made for {layout.num_ids}")
    if token_map.map.shape[0] != layout.spec.vocab_size:
        raise ValueError(f"ngram_hash: token_map has {token_map.map.shape[0]} token ids, the layout was made for "
                         f"{layout.spec.vocab_size}")


def _check(args, out):
    op = "ngram_hash"
    token_ids, cu_seqlens, moduli, _, multipliers, token_map, history, dead_mask, *_ = args
    expect_tensor(op, "token_ids", token_ids, (torch.int32, torch.int64), ("T",))
    tokens, device = token_ids.shape[0], token_ids.device
    expect_bounds(op, cu_seqlens, tokens, device)
    expect_tensor(op, "layout.moduli", moduli, (torch.int64,), ("L", "C"), device, dense_dims=2)
    if token_map is not None:
        expect_tensor(op, "token_map.map", token_map, (torch.int32,), ("vocab",), device, dense_dims=1)
    if history is not None:
        shape = (cu_seqlens.shape[0] - 1, multipliers.shape[-1] - 1)
        expect_tensor(op, "history", history, (token_ids.dtype,), shape, device, dense_dims=2)
    if dead_mask is not None:
        expect_tensor(op, "dead_mask", dead_mask, (torch.bool,), (tokens,), device, dense_dims=1)
    if out is not None:
        expect_tensor(op, "out", out, (torch.int32,), (moduli.shape[0], tokens, moduli.shape[1]), device, dense_dims=3)


def _empty(token_ids, cu_seqlens, moduli, *args):
    return token_ids.new_empty((moduli.shape[0], token_ids.shape[0], moduli.shape[1]), dtype=torch.int32)


def _check_data(token_ids, cu_seqlens, moduli, offsets, multipliers, token_map, history, dead_mask, num_ids, boundary_id, eos_id):
    """The data checks that the C++ kernels make themselves, for the others."""
    op, steps, vocab_size = "ngram_hash", cu_seqlens.diff(), num_ids if token_map is None else token_map.shape[0]
    if cu_seqlens[0] != 0 or (steps < 0).any() or cu_seqlens[-1] != token_ids.shape[0]:
        raise ValueError(f"{op}: cu_seqlens must start at 0, not decrease and end at the number of tokens, "
                         f"{token_ids.shape[0]}; got {cu_seqlens.tolist()}")
    alive = torch.ones_like(token_ids, dtype=torch.bool) if dead_mask is None else ~dead_mask
    for name, ids, wrong in (("token_ids", token_ids, ((token_ids < 0) | (token_ids >= vocab_size)) & alive),
                             ("history", history, None if history is None else (history < -2) | (history >= vocab_size))):
        if wrong is not None and wrong.any():
            where = wrong.nonzero()[0].tolist()
            raise IndexError(f"{op}: {name}{where} is {ids[tuple(where)].item()}, expected [0, {vocab_size})"
                             + ("; unresolved placeholders must not be hashed" if name == "token_ids"
                                else ", -1 (before the start) or -2 (dead)"))
    if history is not None and (older := ((history == -1).cumsum(1) > 0) & (history != -1)).any():
        b, column = older.nonzero()[0].tolist()
        raise IndexError(f"{op}: history[{b}, {column}] is {history[b, column].item()}, older than a -1 (before the start), "
                         "expected -1; unresolved placeholders must not be hashed")


_OP = Op("ngram_hash", "Tensor token_ids, Tensor cu_seqlens, Tensor moduli, Tensor offsets, Tensor multipliers, "
         "Tensor? token_map, Tensor? history, Tensor? dead_mask, int num_ids, int boundary_id, int eos_id",
         empty=_empty, reference=_reference, check=_check, check_data=_check_data)
