"""How rows are stored (docs/ops.md, Row formats): what tables and files need. The kernels' copy is csrc/common/row_format.h."""
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from engram_kernels._checks import expect_tensor


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """One row format: dtypes in memory, and the names that the safetensors format has for them."""

    dtype: torch.dtype
    file_dtypes: tuple[str, ...]  # the first is written, each is read
    scale_dtype: torch.dtype | None = None  # None: no scales, or packed behind the values
    scale_file_dtypes: tuple[str, ...] = ()
    is_float: bool = False
    block: int = 0  # elements that share a scale; 0: all of a row or table
    has_row_scale: bool = False  # one for all of a row
    per_stored: int = 1  # values of one element of the row array
    has_table_scale: bool = False  # a float32 that every value is multiplied by last

    def width(self, row_dim: int) -> int:
        """Elements of a row in the row array, at least; more where packed rows are padded."""
        return row_dim // self.per_stored + (row_dim // self.block if self.is_packed else 0)

    def scale_shape(self, num_rows: int, row_dim: int) -> tuple[int, ...] | None:
        """Shape of the scale array; None: there is none."""
        if self.scale_dtype is None:
            return None
        return (num_rows, row_dim // self.block if self.block else 1) if self.has_row_scales else (1,)

    def row_bytes(self, row_dim: int) -> int:
        """Bytes of a row, its scales included and padding not."""
        shape = self.scale_shape(1, row_dim) if self.has_row_scales else None
        scale_bytes = 0 if shape is None or self.scale_dtype is None else shape[1] * self.scale_dtype.itemsize
        return self.width(row_dim) * self.dtype.itemsize + scale_bytes

    @property
    def is_packed(self) -> bool:
        """Whether the scales stand behind the values of each row."""
        return self.has_blocks and self.scale_dtype is None

    @property
    def has_blocks(self) -> bool:
        """Whether so many elements share a scale that a row has several."""
        return self.block > 0

    @property
    def has_row_scales(self) -> bool:
        """Whether each row has scales of its own, one or more."""
        return self.has_blocks or self.has_row_scale

    @property
    def multiple(self) -> int:
        """What row_dim must be a multiple of."""
        return self.block or self.per_stored


ROW_FORMATS = {
    "f32": RowFormat(torch.float32, ("F32",), is_float=True),
    "bf16": RowFormat(torch.bfloat16, ("BF16",), is_float=True),
    "f16": RowFormat(torch.float16, ("F16",), is_float=True),
    "fp8_e4m3_block32": RowFormat(torch.uint8, ("F8_E4M3", "U8"), torch.uint8, ("F8_E8M0", "U8"), block=32),
    "fp8_e4m3_block32_packed": RowFormat(torch.uint8, ("U8",), block=32),
    "fp8_e4m3_tensor": RowFormat(torch.uint8, ("F8_E4M3", "U8"), torch.float32, ("F32", "BF16", "F16")),
    "int8_group32": RowFormat(torch.int8, ("I8",), torch.float32, ("F32",), block=32),
    "fp8_e4m3_row": RowFormat(torch.uint8, ("F8_E4M3", "U8"), torch.float32, ("F32", "BF16", "F16"), has_row_scale=True),
    "nvfp4": RowFormat(torch.uint8, ("U8",), torch.uint8, ("F8_E4M3", "U8"), block=16, per_stored=2, has_table_scale=True),
    "mxfp4": RowFormat(torch.uint8, ("U8",), torch.uint8, ("F8_E8M0", "U8"), block=32, per_stored=2),
}
# dtypes of which several values, or a part of one, lie in a byte; which ones there are depends on torch's version
_PACKED_NAMES = (*(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)), "quint2x4", "quint4x2", "bits1x8",
                 "bits2x4", "bits4x2", "bits8", "bits16")
_PACKED_DTYPES = {getattr(torch, name) for name in _PACKED_NAMES if hasattr(torch, name)}
_PACKED = "packed"
_HOW_TO_PASS: dict[Any, str] = {
    torch.float4_e2m1fn_x2: "pass row_format='nvfp4' with e4m3 scales [R, D/16] and a table_scale, or row_format='mxfp4' with "
                            "e8m0 scales [R, D/32]",
    torch.float8_e4m3fn: "pass row_format='fp8_e4m3_block32', 'fp8_e4m3_row' or 'fp8_e4m3_tensor' with its scales, or "
                         "'fp8_e4m3_block32_packed'",
    torch.float8_e5m2: "no row format has e5m2 values: pass them as float32, and RowTable.quantize makes e4m3 of them",
    torch.float8_e4m3fnuz: "no row format has the values of fnuz dtypes: pass weight.to(torch.float8_e4m3fn)",
    torch.float8_e5m2fnuz: "no row format has the values of fnuz dtypes: pass them as float32",
    _PACKED: "no row format has such integers: pass int8 values with row_format='int8_group32', or the bytes of e2m1 pairs as "
              "torch.uint8 with row_format='nvfp4' or 'mxfp4'",
}
FLOAT_FORMATS = {name: f.dtype for name, f in ROW_FORMATS.items() if f.is_float}
# rows that can be updated in place: floats, and eight bits with scales of each row, which are encoded again
TRAINED_FORMATS = tuple(name for name, f in ROW_FORMATS.items() if f.is_float or (f.per_stored == 1 and f.has_row_scales))


def row_format_of(op: str, name: object) -> RowFormat:
    """The format called `name`. ValueError when there is none."""
    if not isinstance(name, str) or name not in ROW_FORMATS:
        raise ValueError(f"{op}: row_format is {name!r}, expected one of {', '.join(ROW_FORMATS)}")
    return ROW_FORMATS[name]


def check_shape(op: str, name: str, row_dim: object, width: int) -> None:
    """Raises ValueError unless rows of `width` elements can hold `row_dim` values in format `name`."""
    row_format = row_format_of(op, name)
    if not isinstance(row_dim, int) or isinstance(row_dim, bool) or not 1 <= row_dim < 2**31:
        raise ValueError(f"{op}: row_dim is {row_dim!r}, expected an integer of at least 1")
    if row_dim % row_format.multiple:
        raise ValueError(f"{op}: row_dim is {row_dim}, expected a multiple of {row_format.multiple} for row_format {name!r}")
    wanted = row_format.width(row_dim)
    if width < wanted or (width > wanted and not row_format.is_packed):
        least = "at least " if row_format.is_packed else ""
        raise ValueError(f"{op}: rows are {width} elements wide, expected {least}{wanted} for row_format {name!r} and row_dim "
                         f"{row_dim}")


def check_tensors(op: str, weight: Any, scales: Any, row_format: str, row_dim: int | None,
                  scales_on: torch.device | None = None) -> tuple[Tensor, Tensor | None, int]:
    """Raises unless tensors hold rows of a format: the rows as stored, their scales, and D. Rules: `RowTable.from_tensor`.
    `scales_on`: where the scales must be; None: where the rows are."""
    fmt = row_format_of(op, row_format)
    rows = rows_as_stored(op, "weight", weight, row_format, fmt)
    scales = scales_as_stored(scales, fmt)
    expect_tensor(op, "weight", rows, (fmt.dtype,), ("R", "stride"), None, 0)
    if rows.shape[0] > 1 and rows.shape[1] > 1 and rows.stride(1) != 1:
        raise ValueError(f"{op}: the elements of a row of weight must be contiguous, got strides {list(rows.stride())}")
    if rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]:
        raise ValueError(f"{op}: the rows of weight overlap: strides {list(rows.stride())} for shape {list(rows.shape)}")
    if row_dim is None:
        if fmt.is_packed:
            raise ValueError(f"{op}: row_dim is needed for row_format {row_format!r}: rows may be padded")
        row_dim = int(rows.shape[1]) * fmt.per_stored
    check_shape(op, row_format, row_dim, rows.shape[1])
    wanted = fmt.scale_shape(rows.shape[0], row_dim)
    if wanted is None and scales is not None:
        raise ValueError(f"{op}: row_format {row_format!r} has no scales, got {list(scales.shape)}")
    if wanted is not None:
        assert fmt.scale_dtype is not None
        if scales is None:
            raise ValueError(f"{op}: row_format {row_format!r} needs scales of shape {list(wanted)}, got none")
        scales = scales_as_wanted(scales, wanted) if fmt.scale_dtype == torch.float32 and not fmt.has_blocks else scales
        expect_tensor(op, "scales", scales, (fmt.scale_dtype,), wanted, scales_on or rows.device)
        if scales.dim() == 2 and scales.shape[0] > 1 and ((scales.shape[1] > 1 and scales.stride(1) != 1)
                                                          or scales.stride(0) < scales.shape[1]):
            raise ValueError(f"{op}: the scales of a row must be contiguous, got strides {list(scales.stride())}")
    return rows, scales, row_dim


def check_table_scale(op: str, row_format: str, value: Any) -> float:
    """The scale of a whole table as a number, 1 where the format has none. Raises unless it is given where there is one."""
    if not row_format_of(op, row_format).has_table_scale:
        if value is not None:
            raise ValueError(f"{op}: row_format {row_format!r} has no table_scale, got {value!r}")
        return 1.0
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{op}: table_scale is {value!r}, expected a number, or a float tensor of one element, for row_format "
                         f"{row_format!r}")
    rounded = torch.tensor(value, dtype=torch.float32, device="cpu").item()
    if not 0 < abs(rounded) < math.inf:  # below 0 it turns every sign, which each backend does exactly
        raise ValueError(f"{op}: table_scale is {value!r}, expected a finite float32 that is not 0: with any other every row is "
                         "zeros, NaN or Inf")
    return rounded


def rows_as_stored(op: str, name: str, rows: Any, row_format: str, fmt: RowFormat) -> Any:
    """The bytes of rows whose dtype says what they hold. ValueError where that is not what the format stores."""
    if not isinstance(rows, Tensor) or rows.dtype == fmt.dtype:
        return rows
    how = _HOW_TO_PASS.get(_PACKED if rows.dtype in _PACKED_DTYPES else rows.dtype)
    stored = torch.float4_e2m1fn_x2 if fmt.per_stored == 2 else torch.float8_e4m3fn if fmt.dtype == torch.uint8 else None
    if rows.dtype == stored:
        return rows.view(torch.uint8)
    if how is not None:
        raise ValueError(f"{op}: {name} is {rows.dtype}, expected {stored or fmt.dtype} for row_format {row_format!r}; {how}")
    return rows


def scales_as_stored(scales: Any, fmt: RowFormat) -> Any:
    """The bytes of scales whose dtype says what they hold, where the format has such."""
    dtype = torch.float8_e4m3fn if fmt.has_table_scale else torch.float8_e8m0fnu
    return scales.view(torch.uint8) if isinstance(scales, Tensor) and scales.dtype == dtype else scales


def scales_as_wanted(scales: Any, wanted: tuple[int, ...]) -> Any:
    """float32 scales as published: halves are widened, and a scale of no dimension or one per row gets its dimension."""
    if not isinstance(scales, Tensor):
        return scales
    scales = scales.float() if scales.dtype in (torch.bfloat16, torch.float16) else scales
    return scales.reshape(wanted) if scales.dim() < len(wanted) and scales.numel() == math.prod(wanted) else scales
