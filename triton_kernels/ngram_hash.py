"""Triton kernel of ngram_hash. Contract and formula: `engram_kernels.ngram_hash`, csrc/kernels/ngram_hash/ngram_hash.h.

Mapping  a program takes up to LAYERS layers and walks chunks of CHUNK tokens. Constants of its columns stay in registers; the
         window of a token is read and mixed once for all of them.
Modulus  no division: a reciprocal of each modulus, once per program, then one multiply-high per id.
Traffic  4 or 8 B per token (and 4 B of token map) once per LAYERS layers, lookbacks from L1; writes 4 B * columns * layers.
Limits   fewer than 2^31 tokens; orders up to 8.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_kernels.triton_kernels.sequences import count_bad_sequences, sequence_of
from engram_kernels.triton_runtime.launch import ceil_div, error_counter, launch, power_of_two_from
from engram_kernels.triton_runtime.tuning import parameters, shape_class

TARGET_PROGRAMS = 264  # two for each multiprocessor of a large GPU, before programs take more tokens
MAX_CHUNKS = 16
BEFORE_START, DEAD = tl.constexpr(-1), tl.constexpr(-2)  # history values


@triton.jit
def reciprocal_of(modulus):
    """floor((2^64 - 1) / modulus) of 1 <= modulus < 2^31, by underestimates: a step leaves less than 2^-19 of the rest."""
    # a little less than 1 / modulus: all roundings here and below come to 2^-21 at most, what is taken off is twice that
    inverse = (1.0 / modulus.to(tl.float32)) * 0.999999
    left = tl.zeros_like(modulus).to(tl.uint64) - 1
    reciprocal = tl.zeros_like(left)
    wide = modulus.to(tl.uint64)
    for _ in tl.static_range(4):
        part = (left.to(tl.float32) * inverse).to(tl.uint64)
        reciprocal += part
        left -= part * wide
    for _ in tl.static_range(2):
        more = left >= wide
        reciprocal += more.to(tl.uint64)
        left -= tl.where(more, wide, 0)
    return reciprocal


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
def ngram_hash_kernel(token_ids, cu_seqlens, moduli, offsets, multipliers, token_map, history, dead_mask, out, errors,
                      num_tokens, token_stride, num_sequences, search_steps, vocab_size, boundary_id, eos_id, num_layers, chunks,
                      MAX_ORDER: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, PER_COLUMN: tl.constexpr,
                      LAYERS: tl.constexpr, CHUNK: tl.constexpr):
    COLUMNS: tl.constexpr = (MAX_ORDER - 1) * HEADS
    head = tl.arange(0, HEADS_PADDED)
    first_layer = tl.program_id(1) * LAYERS
    if tl.program_id(1) == 0:
        count_bad_sequences(cu_seqlens, errors, num_tokens, num_sequences, CHUNK)
    modulus_of, reciprocals, offset_of = (), (), ()
    for i in tl.static_range(LAYERS * (MAX_ORDER - 1)):
        # the last program may have a layer too many, which repeats the last
        layer = tl.minimum(first_layer + i // (MAX_ORDER - 1), num_layers.to(tl.int32) - 1)
        column = layer * COLUMNS + (i % (MAX_ORDER - 1)) * HEADS + head
        modulus = tl.load(moduli + column, mask=head < HEADS, other=1).to(tl.uint32)
        modulus_of = modulus_of + (modulus,)
        reciprocals = reciprocals + (reciprocal_of(modulus),)
        offset_of = offset_of + (tl.load(offsets + column, mask=head < HEADS, other=0).to(tl.uint32),)
    for chunk in tl.range(0, chunks.to(tl.int32)):
        first = (tl.program_id(0).to(tl.int64) * chunks + chunk) * CHUNK
        slot = tl.arange(0, CHUNK)
        inside = slot < num_tokens - first
        t = first.to(tl.int32) + slot
        sequence = sequence_of(cu_seqlens, t, num_sequences, search_steps)
        position = tl.maximum(t - tl.load(cu_seqlens + sequence), 0)
        own = token_ids + (first + slot) * token_stride
        blocked = slot < 0
        before_start = slot < 0  # the history has said that there is nothing older
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
                at = history + sequence.to(tl.int64) * (MAX_ORDER - 1) + (back - 1 - position)
                before = tl.load(at, mask=inside & (position < back), other=-1)
                wrong = (before < DEAD) | (before >= vocab_size) | (before_start & (before != BEFORE_START))
                wrong = wrong & (position == 0) & inside
                before_start = before_start | (before == BEFORE_START)
                tl.atomic_add(errors + slot * 0, 1, mask=wrong & (tl.program_id(1) == 0), sem="relaxed")
                raw = tl.where(position < back, before, raw)
            known = (raw >= 0) & (raw < vocab_size)
            if back == 0:
                tl.atomic_add(errors + slot * 0, 1, mask=inside & ~known & ~dead & (tl.program_id(1) == 0), sem="relaxed")
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
                rest = remainder(mixes, reciprocals[i * (MAX_ORDER - 1) + order - 2][None, :],
                                 modulus_of[i * (MAX_ORDER - 1) + order - 2][None, :])
                row = (rest + offset_of[i * (MAX_ORDER - 1) + order - 2][None, :]).to(tl.int32, bitcast=True)
                at = slot[:, None] * COLUMNS + (order - 2) * HEADS + head[None, :]
                tl.store(to + at, row, mask=inside[:, None] & (head < HEADS)[None, :])


def ngram_hash(token_ids: Tensor, cu_seqlens: Tensor, moduli: Tensor, offsets: Tensor, multipliers: Tensor,
               token_map: Tensor | None, history: Tensor | None, dead_mask: Tensor | None, num_ids: int, boundary_id: int,
               eos_id: int, out: Tensor | None = None) -> Tensor:
    """Row ids [L, T, C]; see `engram_kernels.ngram_hash`. Ids that are out of range hash as dead tokens and are counted."""
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
    tensors = (token_ids, cu_seqlens, moduli, offsets, multipliers, token_map, history, dead_mask, out,
               error_counter("ngram_hash", token_ids.device))
    numbers = (num_tokens, token_ids.stride(0), num_sequences, (num_sequences - 1).bit_length(),
               num_ids if token_map is None else token_map.shape[0], boundary_id, eos_id, num_layers, chunks)
    launch(ngram_hash_kernel, (ceil_div(num_tokens, chunk * chunks), ceil_div(num_layers, layers), 1), tensors, numbers,
           (max_order, heads, padded, multipliers.dim() == 3, layers, chunk), tuned["num_warps"])
    return out
