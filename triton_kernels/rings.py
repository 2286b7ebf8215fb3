"""Rings of inputs that `short_conv` keeps between chunks of a sequence: which one a sequence has, and whether it can follow."""
import triton
import triton.language as tl

COUNT_CHUNK = tl.constexpr(128)  # sequences at a time
OTHERS_CHUNK = tl.constexpr(32)  # sequences that a chunk is compared with at a time
SKIPPED, REFUSED = tl.constexpr(-1), tl.constexpr(-2)  # in place of a ring


@triton.jit
def ring_of(b, there, tokens, positions, state_indices, state_ends, position_stride, index_stride, num_rings, spare):
    """(ring, position) of sequences b where `there`; the ring is SKIPPED, or REFUSED where the op's data checks raise."""
    position = tl.load(positions + b.to(tl.int64) * position_stride, mask=there, other=0).to(tl.int64)
    refused = (position < 0) | (position + tokens < 0)  # the sum wraps
    ring = b.to(tl.int64)
    skipped = ring < 0
    if state_indices is not None:
        ring = tl.load(state_indices + b.to(tl.int64) * index_stride, mask=there, other=-1).to(tl.int64)
        skipped = ring == SKIPPED
        refused = refused | (ring < 0) | (ring >= num_rings)
    if state_ends is not None:
        known = there & (ring >= 0) & (ring < num_rings)
        end = tl.load(state_ends + ring * 2, mask=known, other=0)
        furthest = tl.load(state_ends + ring * 2 + 1, mask=known, other=0)
        follows = (position <= end) & (end <= furthest) & (furthest - position <= spare)
        refused = refused | ((position > 0) & (tokens > 0) & ~follows)
    return tl.where(skipped, SKIPPED, tl.where(refused, REFUSED, ring)), position


@triton.jit
def count_refused(cu_seqlens, positions, state_indices, state_ends, errors, position_stride, index_stride, num_rings, spare,
                  num_sequences):
    """Counts sequences that the op's data checks refuse, and pairs that share a ring."""
    for first in tl.range(tl.program_id(0) * COUNT_CHUNK, num_sequences.to(tl.int32), tl.num_programs(0) * COUNT_CHUNK):
        b = first + tl.arange(0, COUNT_CHUNK)
        there = b < num_sequences
        tokens = tl.load(cu_seqlens + b + 1, mask=there, other=0) - tl.load(cu_seqlens + b, mask=there, other=0)
        ring, _position = ring_of(b, there, tl.maximum(tokens, 0).to(tl.int64), positions, state_indices, state_ends,
                                  position_stride, index_stride, num_rings, spare)
        tl.atomic_add(errors + b * 0, 1, mask=there & (ring == REFUSED), sem="relaxed")
        if state_indices is not None:
            for first_other in tl.range(0, tl.minimum(first + COUNT_CHUNK, num_sequences.to(tl.int32)), OTHERS_CHUNK):
                other = first_other + tl.arange(0, OTHERS_CHUNK)
                is_other = other < num_sequences
                other_ring = tl.load(state_indices + other.to(tl.int64) * index_stride, mask=is_other, other=-1).to(tl.int64)
                other_tokens = (tl.load(cu_seqlens + other + 1, mask=is_other, other=0) -
                                tl.load(cu_seqlens + other, mask=is_other, other=0))
                same = (ring[:, None] == other_ring[None, :]) & (other[None, :] < b[:, None]) & (other_tokens > 0)[None, :]
                twins = tl.sum(same.to(tl.int32), 1)
                tl.atomic_add(errors + b * 0, twins, mask=there & (ring >= 0) & (tokens > 0) & (twins > 0), sem="relaxed")
