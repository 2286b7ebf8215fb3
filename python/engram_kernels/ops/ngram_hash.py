"""Multi-head n-gram hash: token ids -> row ids of every memory layer."""
import torch
from torch import Tensor

from engram_kernels._checks import expect_bounds, expect_tensor
from engram_kernels.layout import Layout
from engram_kernels.ops._op import Op
from engram_kernels.reference.ngram_hash import ngram_hash as _reference
from engram_kernels.reference.ngram_hash import ngram_hash_update as _reference_update
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
    if not isinstance(layout, Layout) or token_map is not None:
        _check_constants(layout, token_map)
    return _OP.call(backend, (token_ids, cu_seqlens, layout.moduli, layout.offsets, layout.multipliers,
                              layout.reciprocals, None if token_map is None else token_map.map, history, dead_mask,
                              layout.num_ids, layout.boundary_id, layout.eos_id), out)


def ngram_hash_and_commit(token_ids: Tensor, cu_seqlens: Tensor, layout: Layout, history: Tensor,
                          token_map: TokenMap | None = None, dead_mask: Tensor | None = None,
                          state_indices: Tensor | None = None, rejected: Tensor | None = None, *, out: Tensor | None = None,
                          backend: str = "auto") -> Tensor:
    """Row ids as `ngram_hash` gives them, and the history of each sequence brought up to date in the same call.

    For each sequence b, with row ``h = history[state_indices[b]]``:

    1. the ``rejected[b]`` nearest entries of h are dropped: drafts of earlier calls that the model did not accept
    2. the chunk is hashed with the N - 1 nearest entries that are left
    3. the ids of the chunk, the last one first, come in front of h (-2 for a dead token); the oldest entries fall off

    With W = N - 1 + K columns a history can be set back by up to K tokens. Entries that nobody can know after that become -3,
    which no hash takes, or -1 where the row ended in -1.

    A step that decodes is one launch on a GPU with CUDA: up to 128 tokens, 16 per sequence on average, and up to 32 columns
    of a layer and of the history. Larger steps, and Triton's, are two.

    Args:
        token_ids: [T] int32 or int64, all sequences packed back to back; any stride. In [0, vocab) where alive.
        cu_seqlens: [B+1] int32, first 0, last T, non-decreasing; a sequence may be empty.
        layout: constants of the hash, from `EngramSpec.layout()`.
        history: [B, W], W at least N-1, dtype of `token_ids`, rows dense; updated in place. With `state_indices` a pool of any
            number of rows, [S, W]. Column 0 is the nearest id, -1 before the sequence start, -2 a dead token. All -1: a new
            sequence.
        token_map: compression of token ids; None: `token_ids` and `history` are canonical already.
        dead_mask: [T] bool, True where the token must not be hashed; its id is not looked at.
        state_indices: [B] int32 or int64, any stride, the row of each sequence, each at most once. -1 skips the sequence: its row
            ids are -1 (no row), nothing of it is read, and every history stays as it is. None: sequence b has row b.
        rejected: [B] int32 or int64, any stride, 0 .. W-(N-1). None: nothing is dropped.
        out: [L, T, C] int32, contiguous, written instead of a new tensor.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        [L, T, C] int32 row ids on the device of `token_ids`; `out` when given.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a shape, dtype, device or stride is wrong, `cu_seqlens` is no partition of [0, T], two sequences have one row,
            more is rejected than the history has columns for, or `token_map` does not belong to `layout`.
        IndexError: a token id, a state index or one of the N-1 nearest entries of a history is out of range; names the position
            and the value. Whatever is refused, nothing is written. On a GPU it is counted and `check_errors` raises: a bad id is
            dead, and a sequence with a bad index or too much rejected is skipped.
        RuntimeError: the named backend is not available.

    Source: arXiv 2601.07372 section 2; docs/decoding.md.
    """
    if not isinstance(layout, Layout) or token_map is not None:
        _check_constants(layout, token_map)
    return _UPDATE.call(backend, (token_ids, cu_seqlens, layout.moduli, layout.offsets, layout.multipliers, layout.reciprocals,
                                  history, None if token_map is None else token_map.map, dead_mask, state_indices, rejected,
                                  layout.num_ids, layout.boundary_id, layout.eos_id), out)


def _check_constants(layout, token_map):
    if not isinstance(layout, Layout):
        raise TypeError(f"ngram_hash: layout must be a Layout (EngramSpec.layout()), got {type(layout).__name__}")
    if token_map is None:
        return
    if not isinstance(token_map, TokenMap):
        raise TypeError(f"ngram_hash: token_map must be a TokenMap, got {type(token_map).__name__}")
    if token_map.num_classes != layout.num_ids:
        raise ValueError(f"ngram_hash: token_map has {token_map.num_classes} classes, the layout was made for {layout.num_ids}")
    if token_map.map.shape[0] != layout.spec.vocab_size:
        raise ValueError(f"ngram_hash: token_map has {token_map.map.shape[0]} token ids, the layout was made for "
                         f"{layout.spec.vocab_size}")


def _check(args, out):
    token_ids, cu_seqlens, moduli, _, multipliers, _, token_map, history, dead_mask, *_ = args
    _check_tensors(token_ids, cu_seqlens, moduli, token_map, dead_mask, out)
    if history is not None:
        shape = (cu_seqlens.shape[0] - 1, multipliers.shape[-1] - 1)
        expect_tensor("ngram_hash", "history", history, (token_ids.dtype,), shape, token_ids.device, dense_dims=2)


def _check_update(args, out):
    op = "ngram_hash"
    token_ids, cu_seqlens, moduli, _, multipliers, _, history, token_map, dead_mask, state_indices, rejected, *_ = args
    _check_tensors(token_ids, cu_seqlens, moduli, token_map, dead_mask, out)
    sequences, reach, device = cu_seqlens.shape[0] - 1, multipliers.shape[-1] - 1, token_ids.device
    expect_tensor(op, "history", history, (token_ids.dtype,), (sequences if state_indices is None else "S", f"{reach}+K"), device,
                  dense_dims=1)
    if history.shape[1] < reach:
        raise ValueError(f"{op}: history has {history.shape[1]} columns, expected at least {reach}, max_order - 1")
    if history.shape[0] > 1 and history.stride(0) < history.shape[1]:
        raise ValueError(f"{op}: the rows of history share memory, got strides {list(history.stride())}")
    for name, x in (("state_indices", state_indices), ("rejected", rejected)):
        if x is not None:
            expect_tensor(op, name, x, (torch.int32, torch.int64), (sequences,), device)


def _check_tensors(token_ids, cu_seqlens, moduli, token_map, dead_mask, out):
    op = "ngram_hash"
    expect_tensor(op, "token_ids", token_ids, (torch.int32, torch.int64), ("T",))
    tokens, device = token_ids.shape[0], token_ids.device
    expect_bounds(op, cu_seqlens, tokens, device)
    expect_tensor(op, "layout.moduli", moduli, (torch.int64,), ("L", "C"), device, dense_dims=2)
    if token_map is not None:
        expect_tensor(op, "token_map.map", token_map, (torch.int32,), ("vocab",), device, dense_dims=1)
    if dead_mask is not None:
        expect_tensor(op, "dead_mask", dead_mask, (torch.bool,), (tokens,), device, dense_dims=1)
    if out is not None:
        expect_tensor(op, "out", out, (torch.int32,), (moduli.shape[0], tokens, moduli.shape[1]), device, dense_dims=3)


def _empty(token_ids, cu_seqlens, moduli, *args):
    return token_ids.new_empty((moduli.shape[0], token_ids.shape[0], moduli.shape[1]), dtype=torch.int32)


def _exact(token_ids, cu_seqlens, moduli, offsets, multipliers, reciprocals, *args):
    return _reference(token_ids, cu_seqlens, moduli, offsets, multipliers, *args)  # which divides


def _exact_update(token_ids, cu_seqlens, moduli, offsets, multipliers, reciprocals, *args):
    return _reference_update(token_ids, cu_seqlens, moduli, offsets, multipliers, *args)


def _check_data(token_ids, cu_seqlens, moduli, offsets, multipliers, reciprocals, token_map, history, dead_mask, num_ids,
                boundary_id, eos_id):
    """The data checks that the C++ kernels make themselves, for the others."""
    _check_bounds(token_ids, cu_seqlens)
    vocab_size = num_ids if token_map is None else token_map.shape[0]
    _check_ids(token_ids, None if dead_mask is None else ~dead_mask, vocab_size)
    if history is not None:
        _check_history(history, vocab_size, range(len(history)), [0] * len(history))


def _check_update_data(token_ids, cu_seqlens, moduli, offsets, multipliers, reciprocals, history, token_map, dead_mask,
                       state_indices, rejected, num_ids, boundary_id, eos_id):
    op, reach = "ngram_hash", multipliers.shape[-1] - 1
    _check_bounds(token_ids, cu_seqlens)
    sequences = cu_seqlens.shape[0] - 1
    rows = list(range(sequences)) if state_indices is None else state_indices.tolist()
    dropped, users = [0] * sequences if rejected is None else rejected.tolist(), {}
    for b, (row, drop) in enumerate(zip(rows, dropped, strict=True)):
        if not -1 <= row < history.shape[0]:
            raise IndexError(f"{op}: state_indices[{b}] is {row}, expected [0, {history.shape[0]}) or -1 (skip the sequence)")
        if row != -1 and not 0 <= drop <= history.shape[1] - reach:
            raise ValueError(f"{op}: rejected[{b}] is {drop}, expected [0, {history.shape[1] - reach}], the columns of history "
                             "beyond max_order - 1")
    for b, row in enumerate(rows):
        if row in users:
            raise ValueError(f"{op}: state_indices[{users[row]}] and state_indices[{b}] are both {row}, expected a history for "
                             "each sequence")
        users |= {row: b} if row != -1 else {}
    hashed = torch.tensor([row != -1 for row in rows], dtype=torch.bool, device=token_ids.device)
    alive = hashed.repeat_interleave(cu_seqlens.diff(), output_size=token_ids.shape[0])
    vocab_size = num_ids if token_map is None else token_map.shape[0]
    _check_ids(token_ids, alive if dead_mask is None else alive & ~dead_mask, vocab_size)
    used = [(row, drop) for row, drop in zip(rows, dropped, strict=True) if row != -1]
    if used:
        nearest = torch.stack([history[row, drop:drop + reach] for row, drop in used])
        _check_history(nearest, vocab_size, *zip(*used, strict=True))


def _check_bounds(token_ids, cu_seqlens):
    if cu_seqlens[0] != 0 or (cu_seqlens.diff() < 0).any() or cu_seqlens[-1] != token_ids.shape[0]:
        raise ValueError("ngram_hash: cu_seqlens must start at 0, not decrease and end at the number of tokens, "
                         f"{token_ids.shape[0]}; got {cu_seqlens.tolist()}")


def _check_ids(token_ids, alive, vocab_size):
    wrong = (token_ids < 0) | (token_ids >= vocab_size)
    wrong = wrong if alive is None else wrong & alive
    if wrong.any():
        t = wrong.nonzero()[0].item()
        raise IndexError(f"ngram_hash: token_ids[{t}] is {token_ids[t].item()}, expected [0, {vocab_size}); unresolved "
                         "placeholders must not be hashed")


def _check_history(nearest, vocab_size, rows, columns):
    """Raises IndexError unless the entries [.., N-1], which begin at these columns of these rows, make a history."""
    older = ((nearest == -1).cumsum(1) > 0) & (nearest != -1)
    for wrong, why in (((nearest < -2) | (nearest >= vocab_size),
                        f"expected [0, {vocab_size}), -1 (before the start) or -2 (dead)"),
                       (older, "older than a -1 (before the start), expected -1; unresolved placeholders must not be hashed")):
        if wrong.any():
            b, column = wrong.nonzero()[0].tolist()
            raise IndexError(f"ngram_hash: history[{rows[b]}, {columns[b] + column}] is {nearest[b, column].item()}, {why}")


_OP = Op("ngram_hash", "Tensor token_ids, Tensor cu_seqlens, Tensor moduli, Tensor offsets, Tensor multipliers, "
         "Tensor reciprocals, Tensor? token_map, Tensor? history, Tensor? dead_mask, int num_ids, int boundary_id, int eos_id",
         empty=_empty, reference=_exact, check=_check, check_data=_check_data)
_UPDATE = Op("ngram_hash_update", "Tensor token_ids, Tensor cu_seqlens, Tensor moduli, Tensor offsets, Tensor multipliers, "
             "Tensor reciprocals, Tensor(a!) history, Tensor? token_map, Tensor? dead_mask, Tensor? state_indices, "
             "Tensor? rejected, int num_ids, int boundary_id, int eos_id", empty=_empty, reference=_exact_update,
             check=_check_update, check_data=_check_update_data, writes=("history",))
