"""Triton kernels of short_conv, forward, decode step and backward. Contract and formula: csrc/kernels/short_conv/short_conv.h.

Mapping  a program has a branch and every dilation-th token of a stretch: the rows that its taps reach are the last ones that it
         walked over, and stay in registers, normalized. It walks from sequence to sequence; where it enters one, or a stretch,
         it loads what the taps reach, from the state where the chunk does not go back so far.
Traffic  of L tokens walked, L + width - 1 rows read and L written; a decode step reads width rows and writes two. The state and
         its ends are written by launches of their own, since a program would overwrite what another still has to read.
         Backward: x and grad_out a few times (taps from L2), the gradient of the convolution written and read as float32.
Bits     a row is summed in one order, whoever walks over it: warps and tiles depend on H alone. So any chunking gives the same.
Limits   H, M and width are constants, so a model compiles once.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_kernels.triton_kernels.decode import round_to, to_float
from engram_kernels.triton_kernels.gate import ELEMENTS_A_THREAD, MAX_HELD, SUM_CHUNK, chunk_of, row_of
from engram_kernels.triton_kernels.rings import COUNT_CHUNK, count_refused, ring_of
from engram_kernels.triton_kernels.sequences import count_bad_sequences, sequence_of
from engram_kernels.triton_runtime.launch import ceil_div, empty_like, error_counter, launch, power_of_two_from
from engram_kernels.triton_runtime.tuning import parameters, shape_class

COPY_CHUNK = 1024


@triton.jit
def load_constants(weight, norm_weight, m, c, SIZE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Tile c of the norm weight and of each tap."""
    element = c * CHUNK + tl.arange(0, CHUNK)
    at = m * SIZE + element
    found = (to_float(tl.load(norm_weight + at, mask=element < SIZE, other=0.0)),)
    for j in tl.static_range(WIDTH):
        found = found + (to_float(tl.load(weight + at * WIDTH + j, mask=element < SIZE, other=0.0)),)
    return found


@triton.jit
def constants_of(held, weight, norm_weight, m, c, SIZE: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
                 HOLD: tl.constexpr):
    """Weights and norm weight of tile c, from registers or from memory."""
    if HOLD:
        found = ()
        for j in tl.static_range(WIDTH + 1):
            found = found + (held[c * (WIDTH + 1) + j],)
        return found
    else:
        return load_constants(weight, norm_weight, m, c, SIZE, WIDTH, CHUNK)


@triton.jit
def load_row(row, other_row, in_x, in_state, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Tiles of a row of x, or of the state where that is given, as they are stored; zeros where neither has it."""
    raws = ()
    for c in tl.static_range((SIZE + CHUNK - 1) // CHUNK):
        element = c * CHUNK + tl.arange(0, CHUNK)
        raw = tl.load(row + element, mask=(element < SIZE) & in_x, other=0.0)
        if other_row is not None:
            raw = tl.where(in_x, raw, tl.load(other_row + element, mask=(element < SIZE) & in_state, other=0.0))
        raws = raws + (raw,)
    return raws


@triton.jit
def inverse_rms(raws, eps, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    squares = tl.zeros([CHUNK], tl.float32)
    for c in tl.static_range((SIZE + CHUNK - 1) // CHUNK):
        squares += to_float(raws[c]) * to_float(raws[c])
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(squares, 0), SIZE * 1.0) + eps))


@triton.jit
def walk_of(program, steps, dilation, num_tokens):
    """(first, end) of the tokens that a program walks over, in steps of `dilation`."""
    p = program.to(tl.int64)
    first = (p // dilation) * steps * dilation + p % dilation
    return first, tl.minimum(first + steps * dilation, num_tokens)


@triton.jit
def short_conv_kernel(x, weight, norm_weight, cu_seqlens, positions, state, state_indices, state_ends, out, errors, num_tokens,
                      x_token, x_branch, position_stride, index_stride, state_ring, num_rings, slots, num_sequences, search_steps,
                      steps, dilation, eps, SIZE: tl.constexpr, BRANCHES: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
                      CHUNK: tl.constexpr, HOLD: tl.constexpr):
    CHUNKS: tl.constexpr = (SIZE + CHUNK - 1) // CHUNK
    m = tl.program_id(1)
    spare = slots - (WIDTH - 1) * dilation
    if m == 0:
        count_bad_sequences(cu_seqlens, errors, num_tokens, num_sequences, COUNT_CHUNK)
        if state is not None:
            count_refused(cu_seqlens, positions, state_indices, state_ends, errors, position_stride, index_stride, num_rings,
                          spare, num_sequences)
    held = ()
    if HOLD:
        for c in tl.static_range(CHUNKS):
            held = held + load_constants(weight, norm_weight, m, c, SIZE, WIDTH, CHUNK)
    t, last = walk_of(tl.program_id(0), steps, dilation, num_tokens)
    while t < last:
        sequence = sequence_of(cu_seqlens, t.to(tl.int32), num_sequences, search_steps)
        begin = tl.maximum(tl.load(cu_seqlens + sequence).to(tl.int64), 0)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
        oldest = begin  # that a tap can reach
        place = t * 0  # the ring in the state
        if state is not None:
            place, position = ring_of(sequence, True, tl.maximum(end - begin, 1), positions, state_indices, state_ends,
                                      position_stride, index_stride, num_rings, spare)
            oldest = begin - tl.maximum(position, 0)
        end = tl.minimum(end, last)
        ring = ()
        for j in tl.static_range(WIDTH - 1):
            earlier = t - (WIDTH - 1 - j) * dilation
            stored = None
            if state is not None:
                slot = tl.maximum(earlier - oldest, 0) % slots
                stored = state + tl.maximum(place, 0) * state_ring + (slot * BRANCHES + m) * SIZE
            raws = load_row(row_of(x, tl.maximum(earlier, 0), m, x_token, x_branch, UNIT), stored, earlier >= begin,
                            (earlier >= oldest) & (place >= 0), SIZE, CHUNK)
            scale = inverse_rms(raws, eps, SIZE, CHUNK)
            for c in tl.static_range(CHUNKS):
                constants = (held[c * (WIDTH + 1)],) if HOLD else load_constants(weight, norm_weight, m, c, SIZE, 0, CHUNK)
                ring = ring + (to_float(raws[c]) * scale * constants[0],)
        for _ in tl.range(0, tl.maximum((end - t + dilation - 1) // dilation, 1).to(tl.int32)):
            raws = load_row(row_of(x, t, m, x_token, x_branch, UNIT), None, True, False, SIZE, CHUNK)
            scale = inverse_rms(raws, eps, SIZE, CHUNK)
            normed, new_ring = (), ()
            for c in tl.static_range(CHUNKS):
                taps = constants_of(held, weight, norm_weight, m, c, SIZE, WIDTH, CHUNK, HOLD)
                here = to_float(raws[c])
                normed = normed + (here * scale * taps[0],)
                z = tl.zeros([CHUNK], tl.float32)
                for j in tl.static_range(WIDTH - 1):  # not a zero: the weight may be Inf
                    z += tl.where(t - (WIDTH - 1 - j) * dilation >= oldest, taps[1 + j] * ring[j * CHUNKS + c], 0.0)
                z += taps[WIDTH] * normed[c]
                result = here + tl.div_rn(z, 1.0 + tl.exp(-z))
                if state is not None:
                    result = tl.where(place >= 0, result, 0.0)
                result = round_to(result, out.dtype.element_ty)
                element = c * CHUNK + tl.arange(0, CHUNK)
                tl.store(out + (t * BRANCHES + m) * SIZE + element, result, mask=element < SIZE)
            for i in tl.static_range((WIDTH - 1) * CHUNKS):
                new_ring = new_ring + ((ring + normed)[i + CHUNKS],)
            ring = new_ring
            t += dilation


@triton.jit
def short_conv_state_kernel(x, cu_seqlens, positions, state, state_indices, state_ends, num_tokens, x_token, x_branch,
                            position_stride, index_stride, state_ring, num_rings, slots, reach, SIZE: tl.constexpr,
                            BRANCHES: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr):
    p, m = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence, back = p // slots, p % slots
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    place, position = ring_of(sequence, True, tl.maximum(end - begin, 0), positions, state_indices, state_ends, position_stride,
                              index_stride, num_rings, slots - reach)
    t = end - 1 - back
    if (place >= 0) & (t >= tl.maximum(begin, 0)) & (t < num_tokens):
        slot = (position + t - begin) % slots
        to = state + place * state_ring + (slot * BRANCHES + m) * SIZE
        for start in tl.range(0, SIZE, CHUNK):
            element = start + tl.arange(0, CHUNK)
            inside = element < SIZE
            tl.store(to + element, tl.load(row_of(x, t, m, x_token, x_branch, UNIT) + element, mask=inside), mask=inside)


@triton.jit
def short_conv_ends_kernel(cu_seqlens, positions, state_indices, state_ends, position_stride, index_stride, num_rings, spare,
                           num_sequences):
    b = tl.program_id(0) * COUNT_CHUNK + tl.arange(0, COUNT_CHUNK)
    there = b < num_sequences
    tokens = (tl.load(cu_seqlens + b + 1, mask=there, other=0) - tl.load(cu_seqlens + b, mask=there, other=0)).to(tl.int64)
    ring, position = ring_of(b, there, tl.maximum(tokens, 0), positions, state_indices, state_ends, position_stride, index_stride,
                             num_rings, spare)
    moves = there & (ring >= 0) & (tokens > 0)
    before = tl.load(state_ends + ring * 2 + 1, mask=moves & (position > 0), other=0)
    tl.store(state_ends + ring * 2, position + tokens, mask=moves)
    tl.store(state_ends + ring * 2 + 1, tl.maximum(position + tokens, before), mask=moves)


@triton.jit
def short_conv_bwd_scales_kernel(x, cu_seqlens, scales, bounds, x_token, x_branch, num_sequences, search_steps, eps,
                                 SIZE: tl.constexpr, BRANCHES: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr):
    t, m = tl.program_id(0).to(tl.int64), tl.program_id(1)
    raws = load_row(row_of(x, t, m, x_token, x_branch, UNIT), None, True, False, SIZE, CHUNK)
    tl.store(scales + t * BRANCHES + m, inverse_rms(raws, eps, SIZE, CHUNK))
    if m == 0:
        sequence = sequence_of(cu_seqlens, t.to(tl.int32), num_sequences, search_steps)
        tl.store(bounds + t * 2, tl.maximum(tl.load(cu_seqlens + sequence), 0))
        tl.store(bounds + t * 2 + 1, tl.load(cu_seqlens + sequence + 1))


@triton.jit
def normed_before(x, scales, t, m, back, begin, element, x_token, x_branch, SIZE: tl.constexpr, BRANCHES: tl.constexpr,
                  UNIT: tl.constexpr):
    """x / rms of the token `back` before t, 0 where its sequence does not reach so far."""
    earlier = t - back
    reached = earlier >= begin
    scale = tl.load(scales + earlier * BRANCHES + m, mask=reached, other=0.0)
    at = row_of(x, earlier, m, x_token, x_branch, UNIT) + element
    return tl.where(reached, to_float(tl.load(at, mask=(element < SIZE) & reached, other=0.0)) * scale, 0.0)


@triton.jit
def short_conv_bwd_conv_kernel(grad_out, x, weight, norm_weight, scales, bounds, grad_z, grad_token, grad_branch, x_token,
                               x_branch, dilation, SIZE: tl.constexpr, BRANCHES: tl.constexpr, UNIT: tl.constexpr,
                               WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    t, m = tl.program_id(0).to(tl.int64), tl.program_id(1)
    element = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    taps = load_constants(weight, norm_weight, m, tl.program_id(2), SIZE, WIDTH, CHUNK)
    begin = tl.load(bounds + t * 2).to(tl.int64)
    z = tl.zeros([CHUNK], tl.float32)
    for j in tl.static_range(WIDTH):
        back = (WIDTH - 1 - j) * dilation
        normed = normed_before(x, scales, t, m, back, begin, element, x_token, x_branch, SIZE, BRANCHES, UNIT)
        z += tl.where(t - back >= begin, taps[1 + j] * (normed * taps[0]), 0.0)
    share = tl.div_rn(1.0, 1.0 + tl.exp(-z))
    grad = to_float(tl.load(row_of(grad_out, t, m, grad_token, grad_branch, UNIT) + element, mask=element < SIZE, other=0.0))
    tl.store(grad_z + (t * BRANCHES + m) * SIZE + element, grad * share * (1.0 + z * (1.0 - share)), mask=element < SIZE)


@triton.jit
def short_conv_bwd_rows_kernel(grad_out, x, weight, norm_weight, scales, bounds, grad_z, grad_x, grad_token, grad_branch, x_token,
                               x_branch, dilation, num_tokens, SIZE: tl.constexpr, BRANCHES: tl.constexpr, UNIT: tl.constexpr,
                               WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    t, m = tl.program_id(0).to(tl.int64), tl.program_id(1)
    end = tl.minimum(tl.load(bounds + t * 2 + 1).to(tl.int64), num_tokens)
    scale = tl.load(scales + t * BRANCHES + m)
    raws = load_row(row_of(x, t, m, x_token, x_branch, UNIT), None, True, False, SIZE, CHUNK)
    along = tl.zeros([CHUNK], tl.float32)
    grads = ()
    for c in tl.static_range((SIZE + CHUNK - 1) // CHUNK):
        element = c * CHUNK + tl.arange(0, CHUNK)
        taps = load_constants(weight, norm_weight, m, c, SIZE, WIDTH, CHUNK)
        grad = tl.zeros([CHUNK], tl.float32)
        for j in tl.static_range(WIDTH):
            later = t + (WIDTH - 1 - j) * dilation
            at = grad_z + (later * BRANCHES + m) * SIZE + element
            grad += tl.where(later < end, taps[1 + j] * tl.load(at, mask=(element < SIZE) & (later < end), other=0.0), 0.0)
        grad *= taps[0]
        along += grad * to_float(raws[c]) * scale
        grads = grads + (grad,)
    mean = tl.sum(along, 0) * (1.0 / SIZE)
    for c in tl.static_range((SIZE + CHUNK - 1) // CHUNK):
        element = c * CHUNK + tl.arange(0, CHUNK)
        above = tl.load(row_of(grad_out, t, m, grad_token, grad_branch, UNIT) + element, mask=element < SIZE, other=0.0)
        result = to_float(above) + scale * (grads[c] - to_float(raws[c]) * scale * mean)
        tl.store(grad_x + (t * BRANCHES + m) * SIZE + element, round_to(result, grad_x.dtype.element_ty), mask=element < SIZE)


@triton.jit
def short_conv_bwd_products_kernel(x, scales, bounds, grad_z, partial, num_tokens, x_token, x_branch, dilation,
                                   SIZE: tl.constexpr, BRANCHES: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
                                   CHUNK: tl.constexpr):
    m, part = tl.program_id(1), tl.program_id(2)
    element = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    sums = ()
    for _zeroed in tl.static_range(WIDTH):
        sums = sums + (tl.zeros([CHUNK], tl.float32),)
    for token in tl.range(part, num_tokens.to(tl.int32), tl.num_programs(2)):
        t = tl.cast(token, tl.int64)
        begin = tl.load(bounds + t * 2).to(tl.int64)
        grad = tl.load(grad_z + (t * BRANCHES + m) * SIZE + element, mask=element < SIZE, other=0.0)
        new_sums = ()
        for j in tl.static_range(WIDTH):
            back = (WIDTH - 1 - j) * dilation
            normed = normed_before(x, scales, t, m, back, begin, element, x_token, x_branch, SIZE, BRANCHES, UNIT)
            new_sums = new_sums + (sums[j] + tl.where(t - back >= begin, grad * normed, 0.0),)
        sums = new_sums
    for j in tl.static_range(WIDTH):
        at = ((part * BRANCHES + m) * WIDTH + j).to(tl.int64) * SIZE + element
        tl.store(partial + at, sums[j], mask=element < SIZE)


@triton.jit
def short_conv_bwd_weights_kernel(partial, weight, norm_weight, grad_weight, grad_norm_weight, num_parts, SIZE: tl.constexpr,
                                  BRANCHES: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    m = tl.program_id(1)
    element = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    taps = load_constants(weight, norm_weight, m, tl.program_id(0), SIZE, WIDTH, CHUNK)
    dtype: tl.constexpr = grad_weight.dtype.element_ty
    at = m * SIZE + element
    norm_total = tl.zeros([CHUNK], tl.float32)
    for j in tl.static_range(WIDTH):
        total = tl.zeros([CHUNK], tl.float32)
        for part in tl.range(0, num_parts.to(tl.int32)):
            row = (tl.cast(part, tl.int64) * BRANCHES + m) * WIDTH + j
            total += tl.load(partial + row * SIZE + element, mask=element < SIZE, other=0.0)
        tl.store(grad_weight + at * WIDTH + j, round_to(total * taps[0], dtype), mask=element < SIZE)
        norm_total += total * taps[1 + j]
    tl.store(grad_norm_weight + at, round_to(norm_total, dtype), mask=element < SIZE)


def short_conv(x: Tensor, weight: Tensor, norm_weight: Tensor, cu_seqlens: Tensor, dilation: int, eps: float,
               positions: Tensor | None = None, state: Tensor | None = None, state_indices: Tensor | None = None,
               state_ends: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x + silu(conv(norm(x))) [T, M, H], and the state updated; see `engram_kernels.short_conv`. Bad data are counted."""
    if out is None:
        out = empty_like(x)
    num_tokens, branches, size = x.shape
    num_sequences, width = cu_seqlens.shape[0] - 1, weight.shape[2]
    if num_tokens == 0 or num_sequences == 0:
        return out
    steps = steps_of(num_tokens, branches, parameters("short_conv", x.device, shape_class(num_tokens))["programs"])
    num_warps = warps_of(size)
    chunk = chunk_of(size, num_warps)
    strides, errors = x.stride()[:2], error_counter("short_conv", x.device)
    unit = math.gcd(ELEMENTS_A_THREAD, *strides)
    units = tuple(s // unit for s in strides)
    rings, slots, ring_stride = (0, 0, 0) if state is None else (*state.shape[:2], state.stride(0))
    where = tuple(0 if a is None else a.stride(0) for a in (positions, state_indices))
    launch(short_conv_kernel, (walks_of(num_tokens, dilation, steps), branches, 1),
           (x, weight, norm_weight, cu_seqlens, positions, state, state_indices, state_ends, out, errors),
           (num_tokens, *units, *where, ring_stride, rings, slots, num_sequences, (num_sequences - 1).bit_length(), steps,
            int(dilation), float(eps)),
           (size, branches, unit, width, chunk, (width + 1) * ceil_div(size, chunk) * ELEMENTS_A_THREAD <= MAX_HELD),
           num_warps)
    reach = (width - 1) * dilation
    if slots > 0:
        launch(short_conv_state_kernel, (num_sequences * slots, branches, 1),
               (x, cu_seqlens, positions, state, state_indices, state_ends),
               (num_tokens, *units, *where, ring_stride, rings, slots, reach),
               (size, branches, unit, min(power_of_two_from(size), COPY_CHUNK)), 4)
    if state_ends is not None:
        launch(short_conv_ends_kernel, (ceil_div(num_sequences, COUNT_CHUNK.value), 1, 1),
               (cu_seqlens, positions, state_indices, state_ends), (*where, rings, slots - reach, num_sequences), (), 4)
    return out


def short_conv_update(x: Tensor, weight: Tensor, norm_weight: Tensor, cu_seqlens: Tensor, positions: Tensor, dilation: int,
                      eps: float, state: Tensor, state_indices: Tensor | None = None, state_ends: Tensor | None = None,
                      out: Tensor | None = None) -> Tensor:
    """`short_conv` with a state, its arguments in the order of the op of this name."""
    return short_conv(x, weight, norm_weight, cu_seqlens, dilation, eps, positions, state, state_indices, state_ends, out)


def short_conv_bwd(grad_out: Tensor, x: Tensor, weight: Tensor, norm_weight: Tensor, cu_seqlens: Tensor, dilation: int,
                   eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and norm_weight; the same bits every run. Scratch: a float32 per element of x."""
    num_tokens, branches, size = x.shape
    num_sequences, width = cu_seqlens.shape[0] - 1, weight.shape[2]
    grad_x, grad_weight, grad_norm_weight = (empty_like(a) for a in (x, weight, norm_weight))
    parts = min(num_tokens, parameters("short_conv_bwd", x.device, shape_class(num_tokens))["parts"]) if num_sequences > 0 else 0
    partial = torch.empty((parts, branches, width, size), dtype=torch.float32, device=x.device)
    if parts > 0:
        scales = torch.empty((num_tokens, branches), dtype=torch.float32, device=x.device)
        bounds = torch.empty((num_tokens, 2), dtype=torch.int32, device=x.device)
        grad_z = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        strides = (*grad_out.stride()[:2], *x.stride()[:2])
        unit, num_warps = math.gcd(ELEMENTS_A_THREAD, *strides), warps_of(size)
        units, chunk = tuple(s // unit for s in strides), chunk_of(size, num_warps)
        shape, small = (size, branches, unit), min(chunk, SUM_CHUNK)
        launch(short_conv_bwd_scales_kernel, (num_tokens, branches, 1),
               (x, cu_seqlens, scales, bounds), (*units[2:], num_sequences, (num_sequences - 1).bit_length(), float(eps)),
               (*shape, chunk), num_warps)
        launch(short_conv_bwd_conv_kernel, (num_tokens, branches, ceil_div(size, chunk)),
               (grad_out, x, weight, norm_weight, scales, bounds, grad_z), (*units, dilation), (*shape, width, chunk), num_warps)
        launch(short_conv_bwd_rows_kernel, (num_tokens, branches, 1),
               (grad_out, x, weight, norm_weight, scales, bounds, grad_z, grad_x), (*units, dilation, num_tokens),
               (*shape, width, chunk), num_warps)
        launch(short_conv_bwd_products_kernel, (ceil_div(size, small), branches, parts),
               (x, scales, bounds, grad_z, partial), (num_tokens, *units[2:], dilation), (*shape, width, small), 1)
    chunk = min(power_of_two_from(size), SUM_CHUNK)
    launch(short_conv_bwd_weights_kernel, (ceil_div(size, chunk), branches, 1),
           (partial, weight, norm_weight, grad_weight, grad_norm_weight), (parts,), (size, branches, width, chunk), 1)
    return grad_x, grad_weight, grad_norm_weight


def warps_of(size: int) -> int:
    """Warps of a program. The row alone decides, so that every launch sums a row in the same order."""
    return 4 if size <= 4 * 32 * ELEMENTS_A_THREAD else 8


def steps_of(num_tokens: int, branches: int, programs: int) -> int:
    """Tokens that a program walks over: few enough for `programs` of them."""
    return max(1, num_tokens * branches // programs)


def walks_of(num_tokens: int, dilation: int, steps: int) -> int:
    """How many walks of `steps` tokens there are; in the last stretch some may be empty."""
    return min(dilation, num_tokens) if steps * dilation >= num_tokens else dilation * ceil_div(num_tokens, steps * dilation)
