"""What the tests of all row formats need to know of one: the scale of its table, and tables of every stored value."""
import numpy as np
import torch

from engram_kernels.row_format import ROW_FORMATS

TABLE_SCALE = float(np.float32(-0.37))  # below zero, so that it shows where it touches the zeros of a row that is not there
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])  # by the 4 bits
FLOAT_SCALES = (1.0, -0.37, 3e38, 1e-40, 0.0, float("inf"), float("nan"))


def table_scale_of(row_format):
    """What ops get as `table_scale`."""
    return TABLE_SCALE if ROW_FORMATS[row_format].has_table_scale else 1.0


def table_options(row_format):
    """What `RowTable.from_tensor` and `create` need besides rows and scales."""
    return {"table_scale": TABLE_SCALE} if ROW_FORMATS[row_format].has_table_scale else {}


def every_byte(row_format, row_dim):
    """(rows, scales): every byte value as stored values under every scale byte, or a few scales where they are floats."""
    fmt = ROW_FORMATS[row_format]
    every = torch.arange(256, dtype=torch.uint8)
    if row_format == "fp8_e4m3_tensor":
        return every.reshape(-1, row_dim), torch.tensor([0.3])
    is_float = row_format in ("int8_group32", "fp8_e4m3_row")
    scales = torch.tensor(FLOAT_SCALES) if is_float else every
    width = row_dim if fmt.has_row_scale else fmt.block // fmt.per_stored  # bytes that share a scale
    blocks = every.reshape(-1, width).repeat(len(scales), 1).view(fmt.dtype)
    scales = scales.repeat_interleave(256 // width)
    rows = blocks.reshape(-1, row_dim // fmt.per_stored)
    scales = scales.reshape(len(rows), -1)
    return (torch.cat([rows.view(torch.uint8), scales], dim=1), None) if fmt.is_packed else (rows, scales)


def e4m3_values(stored):
    """Of bytes, in float64: 1 sign, 4 exponent and 3 mantissa bits."""
    stored = stored.astype(np.int64)
    exponent, mantissa = stored >> 3 & 15, stored & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0**(exponent - 10.0))
    return np.where(stored & 127 == 127, np.nan, np.where(stored & 128, -size, size))


def exact_values(row_format, rows, scales, zero_scale_is_zero=False):
    """float64 values of stored rows, by the formats' definitions; products so far are exact, so one rounding is left."""
    stored, fmt = rows.numpy().view(np.uint8), ROW_FORMATS[row_format]
    if fmt.per_stored == 2:
        values = E2M1[np.stack([stored & 15, stored >> 4], -1).reshape(len(stored), -1)]
    else:
        values = e4m3_values(stored)
    if row_format == "fp8_e4m3_row":
        return values * scales.numpy().astype(np.float64).reshape(-1, 1)
    scales = scales.numpy()
    if row_format == "nvfp4":
        factors = e4m3_values(scales) * np.float64(TABLE_SCALE)
    else:
        factors = np.where(scales == 255, np.nan, 2.0**(scales.astype(np.float64) - 127))
        factors = np.where((scales == 0) & zero_scale_is_zero, 0.0, factors)
    return values * factors.repeat(fmt.block, 1)
