"""Triton implementation of row_update. Contract: `engram_kernels.row_update`; the rules: docs/ops.md, row_update.

Mapping  A program takes a tile of the sorted ids, 16 elements of each row at a time. Where a row begins it has the row to itself.
         The first kernel sums gradients and squares, in the reference's 16 parts, and works out the size of each row's step; what
         must be refused is counted and leaves a mark. The second sums the gradients again and updates, unless there is a mark.
Bits     The reference's: nothing is contracted (`is_exact`), roots and quotients are rounded to nearest.
Traffic  The gradients twice, rows and moments once each way.
Limits   A program sums a row, even one that thousands of positions name.
"""
import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_kernels.reference.row_update import step_size
from engram_kernels.triton_kernels.decode import round_to, to_float
from engram_kernels.triton_runtime.launch import ceil_div, error_counter, launch
from engram_kernels.triton_runtime.tuning import parameters, shape_class

PARTS = tl.constexpr(16)  # of a sum of squares
RULES = {"none": 0, "sgd": 1, "adagrad": 2, "adam": 3}
NONE, ADAM = tl.constexpr(RULES["none"]), tl.constexpr(RULES["adam"])
ABSENT, BY_ROW, BY_ELEMENT = (tl.constexpr(i) for i in range(3))  # kinds of second moments


@triton.jit
def rows_that_begin(sorted_ids, count, num_rows, ROWS: tl.constexpr):
    """Places of a tile, whether they are inside, their rows (0 where none begins), whether one begins, whether the id is bad."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = place < count
    row = tl.load(sorted_ids + place, mask=inside, other=-1).to(tl.int64)
    before = tl.load(sorted_ids + place - 1, mask=inside & (place > 0), other=-1).to(tl.int64)
    exists = (row >= 0) & (row < num_rows)
    begins = exists & (row != before)
    return place, inside, tl.where(begins, row, 0), begins, inside & ~exists & (row != -1)


@triton.jit
def sum_gradient(grad, sorted_ids, positions, place, row, begins, element, count, grad_scale, D: tl.constexpr,
                 ROWS: tl.constexpr):
    """[ROWS, 16]: summed in the order of the positions, then scaled; zeros where no row begins."""
    total = tl.zeros([ROWS, PARTS], tl.float32)
    same = begins
    while tl.max(same.to(tl.int32), axis=0) > 0:
        position = tl.load(positions + place, mask=same, other=0)
        total += to_float(tl.load(grad + position[:, None] * D + element, mask=same[:, None] & (element < D), other=0.0))
        place += 1
        same = same & (place < count) & (tl.load(sorted_ids + place, mask=place < count, other=-1).to(tl.int64) == row)
    return total * grad_scale


@triton.jit
def of_bits(bits):
    """A float64 that came as an integer, since a launch takes no other float64."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)  # the interpreter takes a small one for an int32


@triton.jit
def power(base, n):
    """base**n in float64, by squaring."""
    result = tl.full(n.shape, 1.0, tl.float64)
    base = base + tl.zeros(n.shape, tl.float64)
    while tl.max(n, axis=0) > 0:
        result = tl.where((n & 1) == 1, result * base, result)
        base = base * base
        n = n >> 1
    return result


@triton.jit
def row_update_sums_kernel(grad, sorted_ids, positions, steps, squares, sizes, refused, errors, count, num_rows, rate_bits,
                           beta1_bits, beta2_bits, grad_scale, WRITES: tl.constexpr, OWN_SIZES: tl.constexpr,
                           HAS_FIRST: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    place, inside, row, begins, bad = rows_that_begin(sorted_ids, count, num_rows, ROWS)
    if WRITES and steps is not None:
        own = tl.load(steps + row, mask=begins, other=0)
        bad = bad | (begins & ((own < 0) | (own == 0x7FFFFFFF)))
        if OWN_SIZES:
            n = tl.where(bad, 1, own.to(tl.int64) + 1)
            size = of_bits(rate_bits) * tl.sqrt(1.0 - power(of_bits(beta2_bits), n))
            if HAS_FIRST:
                size = size / (1.0 - power(of_bits(beta1_bits), n))
            tl.store(sizes + place, size.to(tl.float32), mask=begins)
    parts = tl.zeros([ROWS, PARTS], tl.float32)
    for start in tl.range(0, D, PARTS):
        element = start + tl.arange(0, PARTS)[None, :]
        g = sum_gradient(grad, sorted_ids, positions, place, row, begins, element, count, grad_scale, D, ROWS)
        infinite = (g.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000
        bad = bad | (begins & (tl.max(infinite.to(tl.int32), axis=1) > 0))
        parts += g * g
    total = tl.sum(tl.reshape(parts, [ROWS, 2, 8]), axis=1)  # sums of two, in which no order is left open
    total = tl.sum(tl.reshape(total, [ROWS, 2, 4]), axis=1)
    total = tl.sum(tl.reshape(total, [ROWS, 2, 2]), axis=1)
    total = tl.sum(total, axis=1)
    position = tl.load(positions + place, mask=inside, other=0)
    tl.store(squares + position, tl.where(begins, total, 0.0), mask=inside)
    zeros = tl.zeros([ROWS], tl.int32)
    tl.atomic_add(errors + zeros, 1, mask=bad, sem="relaxed")
    tl.atomic_max(refused + zeros, 1, mask=bad, sem="relaxed")


# ---- random bits ----------------------------------------------------------------------------------------------------------


@triton.jit
def splitmix(x):
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def rounded(x, key, element, dtype: tl.constexpr, STOCHASTIC: tl.constexpr):
    """float32 [ROWS, 16] as `dtype`: to nearest, or by the bits of each row's key and each element."""
    if dtype == tl.float32 or not STOCHASTIC:
        result = round_to(x, dtype)
    else:
        random = element.to(tl.uint32) * 0x9E3779B9 + key[:, None]
        random = (random ^ (random >> 16)) * 0x7FEB352D
        random = (random ^ (random >> 15)) * 0x846CA68B
        random = random ^ (random >> 16)
        result = round_by(x, random, dtype).to(tl.uint16).to(dtype, bitcast=True)
    return result


@triton.jit
def round_by(x, random, dtype: tl.constexpr):
    """The bits of float32 `x` as `dtype`, as uint32: up in magnitude with the probability of what is cut off."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if dtype == tl.bfloat16:
        result = tl.where(magnitude > 0x7F800000, 0x7FC0, (bits + (random >> 16)) >> 16)
    else:
        scaled = tl.where(magnitude < 0x38800000, magnitude.to(tl.float32, bitcast=True) * 16777216.0, 0.0)
        whole = scaled.to(tl.int32)
        draw = (random >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
        small = (whole + (draw < scaled - whole.to(tl.float32)).to(tl.int32)).to(tl.uint32)
        large = tl.where(magnitude >= 0x47800000, 0x7C00, (magnitude + (random >> 19) - 0x38000000) >> 13)
        large = tl.where(magnitude > 0x7F800000, 0x7E00, large)
        result = ((bits >> 16) & 0x8000) | tl.where(magnitude < 0x38800000, small, large)
    return result


# ---- the update -----------------------------------------------------------------------------------------------------------


@triton.jit
def row_update_kernel(grad, sorted_ids, positions, rows, second, first, steps, squares, sizes, refused, count, num_rows,
                      row_stride, seed, first_row, size, beta1, rest1, rest2, eps, grad_scale, RULE: tl.constexpr,
                      SECOND: tl.constexpr, OWN_SIZES: tl.constexpr, STOCHASTIC: tl.constexpr, D: tl.constexpr,
                      ROWS: tl.constexpr):
    place, inside, row, begins, _ = rows_that_begin(sorted_ids, count, num_rows, ROWS)
    if tl.load(refused) != 0:
        tl.store(squares + place, float("nan"), mask=inside)
    elif RULE != NONE:
        factor = size + tl.zeros([ROWS], tl.float32)
        if OWN_SIZES:
            factor = tl.load(sizes + place, mask=begins, other=0.0)
        key = tl.zeros([ROWS], tl.uint64)
        if steps is not None:
            own = tl.load(steps + row, mask=begins, other=0) + 1
            tl.store(steps + row, own, mask=begins)
            key = splitmix(splitmix(seed.to(tl.uint64)) ^ (first_row + row).to(tl.uint64))
            key = splitmix(key ^ own.to(tl.uint64))
        if SECOND == BY_ROW:
            position = tl.load(positions + place, mask=begins, other=0)
            mean = tl.div_rn(tl.load(squares + position, mask=begins, other=0.0), tl.full([ROWS], D, tl.float32))
            v = tl.load(second + row, mask=begins, other=0.0)
            v = v + ((mean - v) * rest2 if RULE == ADAM else mean)
            tl.store(second + row, v, mask=begins)
            factor = tl.div_rn(factor, tl.sqrt_rn(v) + eps)
        for start in tl.range(0, D, PARTS):
            element = start + tl.arange(0, PARTS)[None, :]
            there = begins[:, None] & (element < D)
            g = sum_gradient(grad, sorted_ids, positions, place, row, begins, element, count, grad_scale, D, ROWS)
            at = row[:, None] * D + element
            m = g
            if first is not None:
                m = to_float(tl.load(first + at, mask=there, other=0.0))
                m = m + (g - m) * rest1 if RULE == ADAM else m * beta1 + g
                upper = (key >> 32).to(tl.uint32)
                tl.store(first + at, rounded(m, upper, element, first.dtype.element_ty, STOCHASTIC), mask=there)
            if SECOND == BY_ELEMENT:
                v = tl.load(second + at, mask=there, other=0.0)
                v = v + ((g * g - v) * rest2 if RULE == ADAM else g * g)
                tl.store(second + at, v, mask=there)
                m = tl.div_rn(m, tl.sqrt_rn(v) + eps)
            stored = rows + row[:, None] * row_stride + element
            values = to_float(tl.load(stored, mask=there, other=0.0)) - factor[:, None] * m
            tl.store(stored, rounded(values, key.to(tl.uint32), element, rows.dtype.element_ty, STOCHASTIC), mask=there)


row_update_sums_kernel.is_exact = row_update_kernel.is_exact = True


def row_update(weight: Tensor, scales: Tensor | None, row_ids: Tensor, grad_rows: Tensor, second: Tensor | None,
               first: Tensor | None, steps: Tensor | None, row_format: str, row_dim: int, zero_scale_is_zero: bool, rule: str,
               lr: float, beta1: float, beta2: float, eps: float, grad_scale: float, step: int, stochastic: bool, seed: int,
               first_row: int, out: Tensor | None = None) -> Tensor:
    """Sums of squares [n], float32; see `engram_kernels.row_update`. What is wrong with the data is counted: then no row and no
    moment is written, and every sum is NaN. ValueError: rows of eight bits."""
    if not weight.is_floating_point():
        raise ValueError(f"row_update: table has row_format {row_format!r}, which Triton does not encode; expected 'f32', 'bf16' "
                         "or 'f16', or backend 'cuda'")
    count, num_rows = row_ids.numel(), weight.shape[0]
    squares = torch.empty(count, dtype=torch.float32, device=weight.device) if out is None else out
    if count == 0:
        return squares
    ids, positions = torch.sort(row_ids.flatten(), stable=True)
    own_sizes, device = rule == "adam" and step == 0, weight.device
    sizes = torch.empty(count if own_sizes else 0, dtype=torch.float32, device=device)
    refused = torch.zeros(1, dtype=torch.int32, device=device)
    tuned = parameters("row_update", device, shape_class(count))
    tile, warps = tuned["rows"], tuned["num_warps"]
    grid = (ceil_div(count, tile), 1, 1)
    rate, *betas = np.array([lr, beta1, beta2]).view(np.int64).tolist()
    launch(row_update_sums_kernel, grid,
           (grad_rows, ids, positions, steps, squares, sizes, refused, error_counter("row_update", device)),
           (count, num_rows, rate, *betas, float(grad_scale)),
           (rule != "none", own_sizes, first is not None, row_dim, tile), warps)
    size = 0.0 if own_sizes else step_size(rule, step, lr, beta1, beta2, first is not None)
    kind = (ABSENT if second is None else BY_ROW if second.dim() == 1 else BY_ELEMENT).value
    launch(row_update_kernel, grid, (grad_rows, ids, positions, weight, second, first, steps, squares, sizes, refused),
           (count, num_rows, weight.stride(0), seed, first_row, float(size), float(beta1), 1.0 - beta1, 1.0 - beta2, float(eps),
            float(grad_scale)),
           (RULES[rule], kind, own_sizes, stochastic, row_dim, tile), warps)
    return squares
