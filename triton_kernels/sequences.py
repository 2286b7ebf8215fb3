"""Packed sequences in kernels, shared by those that take `cu_seqlens`."""
import triton
import triton.language as tl


@triton.jit
def sequence_of(cu_seqlens, t, num_sequences, search_steps):
    """The last sequence that begins at or before `t`."""
    low = tl.zeros_like(t)
    high = low + (num_sequences - 1).to(tl.int32)
    for _ in tl.range(0, search_steps.to(tl.int32)):
        middle = (low + high + 1) >> 1
        reached = tl.load(cu_seqlens + middle) <= t
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return low


@triton.jit
def count_bad_sequences(cu_seqlens, errors, num_tokens, num_sequences, CHUNK: tl.constexpr):
    for first in tl.range(tl.program_id(0) * CHUNK, num_sequences.to(tl.int32), tl.num_programs(0) * CHUNK):
        b = first + tl.arange(0, CHUNK)
        begin = tl.load(cu_seqlens + b, mask=b < num_sequences, other=0)
        end = tl.load(cu_seqlens + b + 1, mask=b < num_sequences, other=0)
        wrong = (begin > end) | ((b == 0) & (begin != 0)) | ((b == num_sequences - 1) & (end != num_tokens))
        tl.atomic_add(errors + b * 0, 1, mask=wrong & (b < num_sequences), sem="relaxed")
