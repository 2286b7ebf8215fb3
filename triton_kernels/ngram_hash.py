"""Triton kernel of ngram_hash. Contract and formula: `engram_kernels.ngram_hash`, csrc/kernels/ngram_hash/ngram_hash.h.

Mapping  a program takes up to LAYERS layers and walks chunks of CHUNK tokens. Constants of its columns stay in registers; the
         window of a token is read and mixed once for all of them.
Modulus  no division: one multiply-high per id, with the reciprocals of the moduli from the host.
Traffic  4 or 8 B per token (and 4 B of token map) once per LAYERS layers, lookbacks from L1; writes 4 B * columns * layers.
Commit   a second kernel: programs of the first may still read the histories that it updates.
Limits   fewer than 2^31 tokens; orders up to 8.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_kernels.triton_kernels.rings import REFUSED, SKIPPED
from engram_kernels.triton_kernels.sequences import count_bad_sequences, sequence_of
from engram_kernels.triton_runtime.launch import ceil_div, error_counter, launch, power_of_two_from
from engram_kernels.triton_runtime.tuning import parameters, shape_class

TARGET_PROGRAMS = 264  # two for each multiprocessor of a large GPU, before programs take more tokens
MAX_CHUNKS = 16
BEFORE_START, DEAD, FORGOTTEN = tl.constexpr(-1), tl.constexpr(-2), tl.constexpr(-3)  # history values
NO_ROW = tl.constexpr(-1)  # row ids of a skipped sequence
COUNT_CHUNK = tl.constexpr(64)  # sequences that are compared at a time
COMMIT_IDS = 128  # history entries of a program of the commit


@triton.jit
def remainder(mix, reciprocal, modulus):
    """mix mod modulus, never negative, for an int64 mix: of -(n + 1) it is modulus - 1 - (n mod modulus)."""
    negative = mix < 0
    magnitude = tl.where(negative, ~mix, mix).to(tl.uint64, bitcast=True)
    quotient = tl.umulhi(magnitude, reciprocal)  # at most one low
    rest = magnitude.to(tl.uint32) - quotient.to(tl.uint32) * modulus
    rest = tl.minimum(rest, rest - modulus)  # unsigned
    return tl.where(negative, modulus - 1 - rest, rest)


@triton.jit
def canonical_id(raw, token_map, known):
    if token_map is None:
        return raw.to(tl.int32)
    else:
        return tl.load(token_map + raw, mask=known, other=0)


@triton.jit
def history_row(b, there, state_indices, rejected, index_stride, rejected_stride, num_histories, spare):
    """(row of history, entries of it to drop) of sequences b where `there`; the row is SKIPPED, or REFUSED, below 0."""
    row = b.to(tl.int64)
    dropped = row * 0
    skipped = row < 0
    refused = row < 0
    if rejected is not None:
        dropped = tl.load(rejected + b.to(tl.int64) * rejected_stride, mask=there, other=0).to(tl.int64)
        refused = (dropped < 0) | (dropped > spare)
    if state_indices is not None:
        row = tl.load(state_indices + b.to(tl.int64) * index_stride, mask=there, other=-1).to(tl.int64)
        skipped = row == SKIPPED
        refused = refused | (row < 0) | (row >= num_histories)
    return tl.where(skipped, SKIPPED, tl.where(refused, REFUSED, row)), dropped


@triton.jit
def entry_before(at, needed, before_start, vocab_size, errors, counts):
    """Entries of history where `needed`, and whether the history has said that there is nothing older; counts the wrong ones."""
    before = tl.load(at, mask=needed, other=-1)
    wrong = (before < DEAD) | (before >= vocab_size) | (before_start & (before != BEFORE_START))
    tl.atomic_add(errors, 1, mask=wrong & counts, sem="relaxed")
    return before, before_start | (before == BEFORE_START)


@triton.jit
def count_refused_rows(state_indices, rejected, errors, index_stride, rejected_stride, num_histories, spare, num_sequences):
    """Counts sequences whose row or number of rejected entries is out of range, and pairs that share a row."""
    for first in tl.range(tl.program_id(0) * COUNT_CHUNK, num_sequences.to(tl.int32), tl.num_programs(0) * COUNT_CHUNK):
        b = first + tl.arange(0, COUNT_CHUNK)
        there = b < num_sequences
        row, _dropped = history_row(b, there, state_indices, rejected, index_stride, rejected_stride, num_histories, spare)
        tl.atomic_add(errors + b * 0, 1, mask=there & (row == REFUSED), sem="relaxed")
        if state_indices is not None:
            for first_other in tl.range(0, tl.minimum(first + COUNT_CHUNK, num_sequences.to(tl.int32)), COUNT_CHUNK):
                other = first_other + tl.arange(0, COUNT_CHUNK)
                other_row = tl.load(state_indices + other.to(tl.int64) * index_stride, mask=other < num_sequences, other=-1)
                same = (row[:, None] == other_row.to(tl.int64)[None, :]) & (other[None, :] < b[:, None])
                twins = tl.sum(same.to(tl.int32), 1)
                tl.atomic_add(errors + b * 0, twins, mask=there & (row >= 0) & (twins > 0), sem="relaxed")


@triton.jit
def ngram_hash_kernel(token_ids, cu_seqlens, moduli, offsets, multipliers, reciprocals, token_map, history, dead_mask,
                      state_indices, rejected, out, errors, num_tokens, token_stride, num_sequences, search_steps, vocab_size,
                      boundary_id, eos_id, num_layers, chunks, num_histories, history_stride, spare, index_stride,
                      rejected_stride, MAX_ORDER: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr,
                      PER_COLUMN: tl.constexpr, LAYERS: tl.constexpr, CHUNK: tl.constexpr):
    COLUMNS: tl.constexpr = (MAX_ORDER - 1) * HEADS
    head = tl.arange(0, HEADS_PADDED)
    first_layer = tl.program_id(1) * LAYERS
    if tl.program_id(1) == 0:
        count_bad_sequences(cu_seqlens, errors, num_tokens, num_sequences, CHUNK)
        if state_indices is not None or rejected is not None:
            count_refused_rows(state_indices, rejected, errors, index_stride, rejected_stride, num_histories, spare,
                               num_sequences)
    modulus_of, reciprocal_of, offset_of = (), (), ()
    for i in tl.static_range(LAYERS * (MAX_ORDER - 1)):
        # the last program may have a layer too many, which repeats the last
        layer = tl.minimum(first_layer + i // (MAX_ORDER - 1), num_layers.to(tl.int32) - 1)
        column = layer * COLUMNS + (i % (MAX_ORDER - 1)) * HEADS + head
        modulus = tl.load(moduli + column, mask=head < HEADS, other=1).to(tl.uint32)
        modulus_of = modulus_of + (modulus,)
        reciprocal_of = reciprocal_of + (tl.load(reciprocals + column, mask=head < HEADS, other=0).to(tl.uint64, bitcast=True),)
        offset_of = offset_of + (tl.load(offsets + column, mask=head < HEADS, other=0).to(tl.uint32),)
    for chunk in tl.range(0, chunks.to(tl.int32)):
        first = (tl.program_id(0).to(tl.int64) * chunks + chunk) * CHUNK
        slot = tl.arange(0, CHUNK)
        inside = slot < num_tokens - first
        t = first.to(tl.int32) + slot
        sequence = sequence_of(cu_seqlens, t, num_sequences, search_steps)
        position = tl.maximum(t - tl.load(cu_seqlens + sequence), 0)
        own = token_ids + (first + slot) * token_stride
        row_of_history, dropped = history_row(sequence, inside, state_indices, rejected, index_stride, rejected_stride,
                                              num_histories, spare)
        hashed = inside & (row_of_history >= 0)
        blocked, before_start = slot < 0, slot < 0
        window = ()
        for back in tl.static_range(MAX_ORDER):
            in_chunk = inside & (position >= back) & (t >= back)
            raw = tl.load(own - back * token_stride, mask=in_chunk, other=-1)
            if dead_mask is not None:
                raw = tl.where(tl.load(dead_mask + first + slot - back, mask=in_chunk, other=1) != 0, -2, raw)
                dead = raw == -2
                if back == 0:
                    dead = tl.load(dead_mask + first + slot, mask=inside, other=1) != 0
            else:
                dead = ~inside
            if history is not None and back > 0:
                at = row_of_history * history_stride + (dropped + back - 1 - position)
                before, before_start = entry_before(history + at, hashed & (position < back), before_start, vocab_size,
                                                    errors + slot * 0, hashed & (position == 0) & (tl.program_id(1) == 0))
                raw = tl.where(position < back, before, raw)
            known = (raw >= 0) & (raw < vocab_size)
            if back == 0:
                tl.atomic_add(errors + slot * 0, 1, mask=hashed & ~known & ~dead & (tl.program_id(1) == 0), sem="relaxed")
            canonical = canonical_id(raw, token_map, known)
            blocked = blocked | ~known
            if back > 0:
                blocked = blocked | (canonical == eos_id)
            window = window + (tl.where(blocked, boundary_id.to(tl.int32), canonical).to(tl.int64),)
        for i in tl.static_range(LAYERS):
            layer = tl.minimum(first_layer + i, num_layers.to(tl.int32) - 1)
            to = out + (layer.to(tl.int64) * num_tokens + first) * COLUMNS
            if not PER_COLUMN:
                mix = window[0] * tl.load(multipliers + layer * MAX_ORDER)
            for order in tl.static_range(2, MAX_ORDER + 1):
                if PER_COLUMN:
                    column = layer * COLUMNS + (order - 2) * HEADS + head
                    mixes = tl.zeros([CHUNK, HEADS_PADDED], tl.int64)
                    for back in tl.static_range(order):
                        factor = tl.load(multipliers + column * MAX_ORDER + back, mask=head < HEADS, other=0)
                        mixes += window[back][:, None] * factor[None, :]
                else:
                    mix = mix ^ (window[order - 1] * tl.load(multipliers + layer * MAX_ORDER + order - 1))
                    mixes = mix[:, None]
                rest = remainder(mixes, reciprocal_of[i * (MAX_ORDER - 1) + order - 2][None, :],
                                 modulus_of[i * (MAX_ORDER - 1) + order - 2][None, :])
                row = (rest + offset_of[i * (MAX_ORDER - 1) + order - 2][None, :]).to(tl.int32, bitcast=True)
                if state_indices is not None or rejected is not None:
                    row = tl.where(hashed[:, None], row, NO_ROW)
                at = slot[:, None] * COLUMNS + (order - 2) * HEADS + head[None, :]
                tl.store(to + at, row, mask=inside[:, None] & (head < HEADS)[None, :])


@triton.jit
def ngram_hash_commit_kernel(token_ids, cu_seqlens, history, dead_mask, state_indices, rejected, num_tokens, token_stride,
                             num_sequences, vocab_size, num_histories, history_width, history_stride, spare, index_stride,
                             rejected_stride, SEQUENCES: tl.constexpr, WIDTH_PADDED: tl.constexpr):
    b = tl.program_id(0).to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)
    there = b < num_sequences
    begin = tl.load(cu_seqlens + b, mask=there, other=0).to(tl.int64)
    end = tl.load(cu_seqlens + b + 1, mask=there, other=0).to(tl.int64)
    row, dropped = history_row(b, there, state_indices, rejected, index_stride, rejected_stride, num_histories, spare)
    there = there & (row >= 0) & (begin >= 0) & (begin <= end) & (end <= num_tokens)
    column = tl.arange(0, WIDTH_PADDED)[None, :]
    inside = there[:, None] & (column < history_width)
    in_chunk = column < (end - begin)[:, None]
    t = end[:, None] - 1 - column
    ids = tl.load(token_ids + t * token_stride, mask=inside & in_chunk, other=0)
    ids = tl.where((ids < 0) | (ids >= vocab_size), DEAD, ids)  # bad ones have been counted
    if dead_mask is not None:
        ids = tl.where(tl.load(dead_mask + t, mask=inside & in_chunk, other=0) != 0, DEAD, ids)
    line = history + row[:, None] * history_stride
    source = column - (end - begin - dropped)[:, None]
    kept = tl.load(line + source, mask=inside & ~in_chunk & (source < history_width), other=FORGOTTEN)
    oldest = tl.load(history + row * history_stride + history_width - 1, mask=there, other=0)
    lost = tl.where(oldest == BEFORE_START, BEFORE_START, FORGOTTEN)
    kept = tl.where(source < history_width, kept, lost[:, None])
    tl.debug_barrier()  # a row is read before any of it is written
    tl.store(line + column, tl.where(in_chunk, ids, kept).to(history.dtype.element_ty), mask=inside)


def ngram_hash(token_ids: Tensor, cu_seqlens: Tensor, moduli: Tensor, offsets: Tensor, multipliers: Tensor, reciprocals: Tensor,
               token_map: Tensor | None, history: Tensor | None, dead_mask: Tensor | None, num_ids: int, boundary_id: int,
               eos_id: int, out: Tensor | None = None) -> Tensor:
    """Row ids [L, T, C]; see `engram_kernels.ngram_hash`. Ids that are out of range hash as dead tokens and are counted."""
    return _hash(token_ids, cu_seqlens, moduli, offsets, multipliers, reciprocals, token_map, history, dead_mask, None, None,
                 num_ids, boundary_id, eos_id, out)


def ngram_hash_update(token_ids: Tensor, cu_seqlens: Tensor, moduli: Tensor, offsets: Tensor, multipliers: Tensor,
                      reciprocals: Tensor, history: Tensor, token_map: Tensor | None, dead_mask: Tensor | None,
                      state_indices: Tensor | None, rejected: Tensor | None, num_ids: int, boundary_id: int, eos_id: int,
                      out: Tensor | None = None) -> Tensor:
    """Row ids [L, T, C], and `history` as the next chunks need it; see `engram_kernels.ngram_hash_and_commit`."""
    out = _hash(token_ids, cu_seqlens, moduli, offsets, multipliers, reciprocals, token_map, history, dead_mask, state_indices,
                rejected, num_ids, boundary_id, eos_id, out)
    num_sequences, width = cu_seqlens.shape[0] - 1, history.shape[1]
    if num_sequences > 0 and history.shape[0] > 0:
        padded = power_of_two_from(width)
        sequences = max(COMMIT_IDS // padded, 1)
        numbers = (token_ids.shape[0], token_ids.stride(0), num_sequences, num_ids if token_map is None else token_map.shape[0],
                   history.shape[0], width, history.stride(0), width - multipliers.shape[-1] + 1, _stride(state_indices),
                   _stride(rejected))
        launch(ngram_hash_commit_kernel, (ceil_div(num_sequences, sequences), 1, 1),
               (token_ids, cu_seqlens, history, dead_mask, state_indices, rejected), numbers, (sequences, padded), 4)
    return out


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _hash(token_ids, cu_seqlens, moduli, offsets, multipliers, reciprocals, token_map, history, dead_mask, state_indices,
          rejected, num_ids, boundary_id, eos_id, out):
    num_tokens, (num_layers, columns) = token_ids.shape[0], moduli.shape
    if out is None:
        out = torch.empty((num_layers, num_tokens, columns), dtype=torch.int32, device=token_ids.device)
    num_sequences = cu_seqlens.shape[0] - 1
    if num_tokens == 0 or num_sequences == 0:
        return out
    max_order = multipliers.shape[-1]
    heads = columns // (max_order - 1)
    padded = power_of_two_from(heads)
    tuned = parameters("ngram_hash", token_ids.device, shape_class(num_tokens))
    chunk = max(tuned["ids"] // padded, 16)
    layers = min(tuned["layers"], num_layers)
    chunks = min(max(num_tokens // (chunk * TARGET_PROGRAMS), 1), MAX_CHUNKS)
    tensors = (token_ids, cu_seqlens, moduli, offsets, multipliers, reciprocals, token_map, history, dead_mask, state_indices,
               rejected, out, error_counter("ngram_hash", token_ids.device))
    numbers = (num_tokens, token_ids.stride(0), num_sequences, (num_sequences - 1).bit_length(),
               num_ids if token_map is None else token_map.shape[0], boundary_id, eos_id, num_layers, chunks,
               0 if history is None else history.shape[0], 0 if history is None else history.stride(0),
               0 if history is None else history.shape[1] - max_order + 1, _stride(state_indices), _stride(rejected))
    launch(ngram_hash_kernel, (ceil_div(num_tokens, chunk * chunks), ceil_div(num_layers, layers), 1), tensors, numbers,
           (max_order, heads, padded, multipliers.dim() == 3, layers, chunk), tuned["num_warps"])
    return out
