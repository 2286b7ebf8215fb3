"""Stored rows to float32 and float32 to outputs, shared by the kernels that read rows. Formats: docs/ops.md, Row formats."""
import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from engram_kernels.triton_runtime import dispatch

BLOCK = tl.constexpr(32)  # elements that share a scale, or a multiple of them
FLOAT, FP8_TENSOR, FP8_BLOCK, INT8_GROUP, FP8_ROW, NVFP4, MXFP4 = (tl.constexpr(i) for i in range(7))  # four bits last
CODES = {"f32": FLOAT, "bf16": FLOAT, "f16": FLOAT, "fp8_e4m3_tensor": FP8_TENSOR, "fp8_e4m3_block32": FP8_BLOCK,
         "fp8_e4m3_block32_packed": FP8_BLOCK, "int8_group32": INT8_GROUP, "fp8_e4m3_row": FP8_ROW, "nvfp4": NVFP4,
         "mxfp4": MXFP4}
# the interpreter truncates where a GPU rounds to nearest even, and is wrong about subnormals
_EMULATE_BF16 = tl.constexpr(dispatch.INTERPRETED)


@triton.jit
def fp8_e4m3_to_float(byte):
    """By bit manipulation, the same on every target: exponent and mantissa move into float32's, 2^120 mends the bias."""
    bits = byte.to(tl.uint32)
    magnitude = bits & 0x7F
    value = (((bits & 0x80) << 24) | (magnitude << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(magnitude == 0x7F, float("nan"), value)


@triton.jit
def e2m1_to_float(nibble):
    """Exponent and mantissa move into float32's, 2^126 mends the bias; the sign stays on a zero too."""
    bits = nibble.to(tl.uint32)
    return (((bits & 8) << 28) | ((bits & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def ue8m0_to_float(byte, ZERO_IS_ZERO: tl.constexpr):
    """2^(byte - 127): 0 is 2^-127, a subnormal, or 0.0; 255 is NaN."""
    bits = byte.to(tl.uint32)
    low = 0 if ZERO_IS_ZERO else 0x00400000
    return tl.where(bits == 0, low, tl.where(bits == 255, 0x7FC00000, bits << 23)).to(tl.float32, bitcast=True)


@triton.jit
def to_float(x):
    if x.dtype == tl.bfloat16 and _EMULATE_BF16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 to `dtype`, to nearest even."""
    if dtype == tl.bfloat16 and _EMULATE_BF16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x != x, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def decode_rows(rows, scales, ids, present, row_units, scale_stride, table_scale, start, CODE: tl.constexpr, D: tl.constexpr,
                UNIT: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, ZERO_SCALE_IS_ZERO: tl.constexpr):
    """float32 [COUNT, WIDTH]: elements start.. of the rows `ids`, int64 in range; 0 where not `present` and past D."""
    element = start + tl.arange(0, WIDTH)[None, :]
    inside = present[:, None] & (element < D)
    # a whole number of units, so that the compiler knows how rows are aligned
    at = rows + ids[:, None] * (row_units.to(tl.int64) * UNIT)
    if CODE >= NVFP4:  # two values in a byte, that in the lower bits first
        byte = start // 2 + tl.arange(0, WIDTH // 2)[None, :]
        pair = tl.load(at + byte, mask=present[:, None] & (byte < D // 2), other=0)
        stored = tl.interleave(pair & 15, pair >> 4)
    else:
        stored = tl.load(at + element, mask=inside, other=0)
    if CODE == FLOAT:
        return to_float(stored)
    elif CODE == FP8_TENSOR:
        # a scale below zero, or NaN, must not touch the zeros of a row that is not there
        return tl.where(inside, fp8_e4m3_to_float(stored) * tl.load(scales), 0.0)
    elif CODE == FP8_ROW:
        factor = tl.load(scales + ids * scale_stride.to(tl.int64), mask=present, other=0)
        return fp8_e4m3_to_float(stored) * factor[:, None]
    else:
        EACH: tl.constexpr = 16 if CODE == NVFP4 else 32
        block = start // EACH + tl.arange(0, WIDTH // EACH)[None, :]
        scale = tl.load(scales + ids[:, None] * scale_stride.to(tl.int64) + block, mask=present[:, None] & (block < D // EACH),
                        other=0)
        if CODE == FP8_BLOCK:
            values, factor = fp8_e4m3_to_float(stored), ue8m0_to_float(scale, ZERO_SCALE_IS_ZERO)
        elif CODE == NVFP4:
            values, factor = e2m1_to_float(stored), fp8_e4m3_to_float(scale)
        elif CODE == MXFP4:
            values, factor = e2m1_to_float(stored), ue8m0_to_float(scale, ZERO_SCALE_IS_ZERO)
        else:
            values, factor = stored.to(tl.float32), scale
        values = tl.reshape(tl.reshape(values, [COUNT, WIDTH // EACH, EACH]) * factor[:, :, None], [COUNT, WIDTH])
        if CODE == NVFP4:  # the product so far is exact; a table's scale below zero must not touch the zeros of an absent row
            values = tl.where(inside, values * table_scale, 0.0)
        return values


class RowArgs(NamedTuple):
    """Stored rows as the kernels take them: tensors and strides, then constants."""
    rows: Tensor
    scales: Tensor | None
    num_rows: int
    row_units: int  # elements from row to row, in units of `unit`
    scale_stride: int  # elements
    table_scale: float
    code: int
    unit: int


def row_args(rows: Tensor, scales: Tensor | None, row_format: str, row_dim: int, table_scale: float = 1.0) -> RowArgs:
    """`rows` and `scales` of a table as its kernels take them."""
    code = CODES[row_format].value
    if row_format == "fp8_e4m3_block32_packed":
        scales = rows[:, row_dim:]
    stride = rows.stride(0)
    # 8 stored bytes per thread make 16 bytes of bfloat16 output
    unit = math.gcd(stride, 16 // rows.element_size() if code == FLOAT.value else 8)
    return RowArgs(rows, scales, rows.shape[0], stride // unit, 0 if scales is None or scales.dim() == 1 else scales.stride(0),
                   float(table_scale), code, unit)
