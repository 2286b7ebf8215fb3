"""Triton kernels of gather_rows. Contract: `engram_kernels.gather_rows`, csrc/kernels/gather_rows/gather_rows.h.

Mapping  a program takes a tile of rows, all elements of each (wide rows in chunks); blocks of 32 elements are a dimension of the
         tile, so that a scale is loaded once. The backward has a program for each sorted position: that of a row's first position
         sums the row, the others leave.
Traffic  every byte of a row once, the output once, 4 or 8 B per id.
Limits   byte strides of rows are 64-bit; D is a constant, so a table's width compiles once.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_kernels.triton_kernels.decode import BLOCK, FLOAT, decode_rows, round_to, row_args, to_float
from engram_kernels.triton_runtime.launch import ceil_div, error_counter, launch, power_of_two_from
from engram_kernels.triton_runtime.tuning import parameters, shape_class

MAX_CHUNK = 2048  # elements of a row at a time
BWD_CHUNK = 256


@triton.jit
def gather_rows_kernel(row_ids, rows, scales, out, errors, count, num_rows, row_units, scale_stride, table_scale,
                       CODE: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
                       ZERO_SCALE_IS_ZERO: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * ROWS
    slot = tl.arange(0, ROWS)
    inside = slot < count - first
    ids = tl.load(row_ids + first + slot, mask=inside, other=-1).to(tl.int64)
    present = (ids >= 0) & (ids < num_rows)
    tl.atomic_add(errors + tl.zeros([ROWS], tl.int32), 1, mask=inside & (ids != -1) & ~present, sem="relaxed")
    ids = tl.where(present, ids, 0)
    to = out + (first + slot)[:, None] * D
    for start in tl.range(0, D, CHUNK):
        element = start + tl.arange(0, CHUNK)[None, :]
        if CODE == FLOAT and out.dtype.element_ty == rows.dtype.element_ty:  # bit for bit
            at = rows + ids[:, None] * (row_units.to(tl.int64) * UNIT) + element
            values = tl.load(at, mask=present[:, None] & (element < D), other=0.0)
        else:
            values = round_to(decode_rows(rows, scales, ids, present, row_units, scale_stride, table_scale, start, CODE, D,
                                          UNIT, ROWS, CHUNK, ZERO_SCALE_IS_ZERO), out.dtype.element_ty)
        tl.store(to + element, values, mask=inside[:, None] & (element < D))


@triton.jit
def gather_rows_bwd_kernel(grad, sorted_ids, positions, grad_rows, count, num_rows, D: tl.constexpr, CHUNK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    row = tl.load(sorted_ids + place).to(tl.int64)
    before = tl.load(sorted_ids + place - 1, mask=place > 0, other=-1).to(tl.int64)
    if (row >= 0) & (row < num_rows) & (row != before):
        total = tl.zeros([CHUNK], tl.float32)
        same = row
        while same == row:
            position = tl.load(positions + place)
            total += to_float(tl.load(grad + position * D + element, mask=element < D, other=0.0))
            place += 1
            same = tl.load(sorted_ids + place, mask=place < count, other=-1).to(tl.int64)
        tl.store(grad_rows + row * D + element, round_to(total, grad_rows.dtype.element_ty), mask=element < D)


def gather_rows(rows: Tensor, scales: Tensor | None, row_ids: Tensor, row_format: str, row_dim: int, zero_scale_is_zero: bool,
                out_dtype: torch.dtype, table_scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """Rows [*row_ids.shape, row_dim]; see `engram_kernels.gather_rows`. Ids that are out of range give zeros and are counted."""
    if out is None:
        out = torch.empty((*row_ids.shape, row_dim), dtype=out_dtype, device=row_ids.device)
    count = row_ids.numel()
    if count == 0:
        return out
    chunk = min(max(power_of_two_from(row_dim), BLOCK.value), MAX_CHUNK)
    size = shape_class(count)
    tuned = parameters("gather_rows", row_ids.device, size)
    tile_rows = max(1, tuned["tile"] // chunk)
    table = row_args(rows, scales, row_format, row_dim, table_scale)
    launch(gather_rows_kernel, (ceil_div(count, tile_rows), 1, 1),
           (row_ids, table.rows, table.scales, out, error_counter("gather_rows", row_ids.device)),
           (count, table.num_rows, table.row_units, table.scale_stride, table.table_scale),
           (table.code, row_dim, table.unit, chunk, tile_rows, zero_scale_is_zero), tuned["num_warps"])
    return out


def gather_rows_bwd(grad: Tensor, row_ids: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """grad_rows [num_rows, D]: sums in float32 in the order of the positions, rounded once."""
    row_dim = grad.shape[-1]
    grad_rows = torch.zeros((num_rows, row_dim), dtype=dtype, device=grad.device)
    if row_ids.numel() == 0 or num_rows == 0:
        return grad_rows
    ids, positions = torch.sort(row_ids.flatten(), stable=True)
    chunk = min(power_of_two_from(row_dim), BWD_CHUNK)
    launch(gather_rows_bwd_kernel, (row_ids.numel(), ceil_div(row_dim, chunk), 1),
           (grad.contiguous(), ids, positions, grad_rows), (row_ids.numel(), num_rows), (row_dim, chunk), 1)
    return grad_rows
