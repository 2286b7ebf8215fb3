"""The way back: float rows encoded as a stored format, in pieces, and what that loses per row."""
from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engram_kernels._modes import plain_tensors
from engram_kernels.reference.gather_rows import decode
from engram_kernels.reference.row_update import encode as encode_rows
from engram_kernels.reference.row_update import float_scales
from engram_kernels.row_format import ROW_FORMATS, TRAINED_FORMATS, check_shape, row_format_of
from engram_kernels.table.table_writer import Chunk

if TYPE_CHECKING:
    from engram_kernels.table.row_table import RowTable

FORMATS = tuple(name for name, fmt in ROW_FORMATS.items() if not fmt.is_float)  # that rows can be encoded as
_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
_PIECE_VALUES = 1 << 22  # decoded at a time
_SAMPLE_ROWS = 1 << 20  # of the medians
_OP = "RowTable.quantize"


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """What the encoding of a table lost. Of a row: rms is |decoded - row| / |row| (Euclidean norms), max is the largest
    difference over the largest value; a row of zeros has neither.

    Attributes:
        row_format: of the new table.
        num_rows: R.
        row_bytes: bytes of a row, its scales included.
        rms_median: median over the rows; of 2^20 rows spread evenly, where there are more.
        rms_worst: the largest.
        rms_worst_row: the row that has it; -1 where there is no row.
        max_median: as `rms_median`.
        max_worst: as `rms_worst`.
        max_worst_row: as `rms_worst_row`.
    """

    row_format: str
    num_rows: int
    row_bytes: int
    rms_median: float = 0.0
    rms_worst: float = 0.0
    rms_worst_row: int = -1
    max_median: float = 0.0
    max_worst: float = 0.0
    max_worst_row: int = -1

    def __str__(self) -> str:
        return (f"{self.num_rows:,} rows of {self.row_bytes} bytes as {self.row_format}; relative error of a row: "
                f"rms {self.rms_median:.2e} (median), {self.rms_worst:.2e} (worst, row {self.rms_worst_row}); "
                f"max {self.max_median:.2e} (median), {self.max_worst:.2e} (worst, row {self.max_worst_row})")


def quantize(table: RowTable, row_format: str, path: str | os.PathLike[str] | None) -> tuple[RowTable, QuantizeReport]:
    """`RowTable.quantize`."""
    fmt = row_format_of(_OP, row_format)
    if fmt.is_float:
        raise ValueError(f"{_OP}: row_format is {row_format!r}, expected one of {', '.join(FORMATS)}")
    if not ROW_FORMATS[table.row_format].is_float:
        raise ValueError(f"{_OP}: the table is {table.row_format!r}; only f32, bf16 and f16 rows are quantized")
    check_shape(_OP, row_format, table.row_dim, fmt.width(table.row_dim))
    if path is not None and table.path is not None and os.path.exists(path) and os.path.samefile(path, table.path):
        raise ValueError(f"{_OP}: path is {str(path)!r}, the file of the table itself; expected another")
    whole = None
    if fmt.has_table_scale or not (fmt.has_row_scales or fmt.is_packed):
        with plain_tensors():
            whole = _scale_of_table(row_format, _largest(table))
    errors = _Errors(row_format, table)
    table_scale = whole if fmt.has_table_scale else None
    of_table = torch.tensor([whole], dtype=torch.float32, device="cpu") if whole is not None and not fmt.has_row_scales else None
    if path is not None:
        made = type(table).create(path, _pieces(table, row_format, whole, errors), of_table, row_format, num_rows=table.num_rows,
                                  row_dim=table.row_dim, table_scale=table_scale)
        return made, errors.report()
    rows = torch.empty(table.num_rows, fmt.width(table.row_dim), dtype=fmt.dtype, device="cpu")
    shape = fmt.scale_shape(table.num_rows, table.row_dim)
    scales = of_table if shape is None or of_table is not None else torch.empty(shape, dtype=fmt.scale_dtype, device="cpu")
    done = 0
    for piece_rows, piece_scales in _pieces(table, row_format, whole, errors):
        rows[done:done + len(piece_rows)] = piece_rows
        if scales is not None and piece_scales is not None:
            scales[done:done + len(piece_rows)] = piece_scales
        done += len(piece_rows)
    return type(table).from_tensor(rows, scales, row_format, row_dim=table.row_dim,
                                   table_scale=table_scale), errors.report()


def encode(values: Tensor, row_format: str, whole: float | None = None) -> tuple[Tensor, Tensor | None]:
    """Rows as a format stores them, each value the nearest one, ties to even.

    Args:
        values: float32 [n, D], finite, on the CPU.
        row_format: one of `FORMATS`.
        whole: the scale of the table, for fp8_e4m3_tensor and nvfp4.

    Returns:
        rows and scales, as `RowTable.create` takes a piece; no scales where they are packed or of the whole table.
    """
    fmt = ROW_FORMATS[row_format]
    if row_format in TRAINED_FORMATS:
        block = fmt.block or values.shape[1]
        none = values.new_zeros(len(values), values.shape[1] // block) if fmt.scale_dtype == torch.float32 else None
        rows, scales = encode_rows(values, fmt.dtype, block, none, None)
        return (torch.cat([rows, scales], 1), None) if fmt.is_packed else (rows, scales)
    exact = values.double()
    if row_format == "fp8_e4m3_tensor":
        assert whole is not None
        return (exact / whole).float().clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8), None
    blocks = exact.unflatten(1, (-1, fmt.block))
    largest = blocks.abs().amax(-1)
    if row_format == "nvfp4":
        assert whole is not None
        scales = (largest / (_E2M1_MAX * whole)).to(torch.float8_e4m3fn).view(torch.uint8)
        scales[(scales == 0) & (largest > 0)] = 1  # the least that is not zero
        factors = scales.view(torch.float8_e4m3fn).double() * whole
        return _to_e2m1(blocks / torch.where(factors == 0, 1.0, factors).unsqueeze(-1)), scales
    exponents = _exponents(largest, _E2M1_MAX)
    # a value near float32's largest may be nearer to 2^128, which would be decoded as Inf: at most the level below
    most = torch.ldexp(torch.full_like(largest, 0.75), (128 - exponents).double()).unsqueeze(-1)
    scaled = torch.ldexp(blocks, -exponents.unsqueeze(-1).double()).clamp(-most, most)
    return _to_e2m1(scaled), (exponents + 127).to(torch.uint8)


def _to_e2m1(scaled: Tensor) -> Tensor:
    """Bytes of two values each. A tie goes to the code whose last bit is 0."""
    x = scaled.flatten(1).abs()
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for middle, from_even in ((0.25, True), (0.75, False), (1.25, True), (1.75, False), (2.5, True), (3.5, False), (5.0, True)):
        codes += x > middle if from_even else x >= middle
    codes |= scaled.flatten(1).signbit().to(torch.uint8) << 3
    return codes[:, ::2] | codes[:, 1::2] << 4


def _exponents(largest: Tensor, most: float) -> Tensor:
    """int32 exponents of the least powers of two that bring the largest value into the format's range; 0 for zeros."""
    mantissa, exponent = torch.frexp(largest / most)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)  # a power of two itself
    return torch.where(largest == 0, 0, exponent.clamp(-126, 127)).to(torch.int32)  # byte 0 means two things


def _scale_of_table(row_format: str, largest: float) -> float:
    most = _E4M3_MAX * (_E2M1_MAX if ROW_FORMATS[row_format].has_table_scale else 1.0)
    return float(float_scales(*torch.tensor([largest, most], dtype=torch.float32, device="cpu")))


def _float_pieces(table: RowTable) -> Iterator[tuple[int, Tensor]]:
    """(first row, float32 values) of a table in order. ValueError names the first row that is not finite."""
    step = max(_PIECE_VALUES // max(table.row_dim, 1), 1)
    for begin in range(0, table.num_rows, step):
        ids = torch.arange(begin, min(begin + step, table.num_rows), device="cpu")
        values = table.read_rows(ids.to(table.device))[0].detach().cpu().float()
        finite = values.isfinite()
        if not finite.all():
            row, element = (~finite).nonzero()[0].tolist()
            raise ValueError(f"{_OP}: element {element} of row {begin + row} is {values[row, element].item()}, expected a finite "
                             "number")
        yield begin, values


def _largest(table: RowTable) -> float:
    return max((values.abs().max().item() for _, values in _float_pieces(table)), default=0.0)


def _pieces(table: RowTable, row_format: str, whole: float | None, errors: _Errors) -> Iterator[Chunk]:
    for begin, values in _float_pieces(table):
        rows, scales = encode(values, row_format, whole)
        errors.add(begin, values, rows, scales, whole)
        yield rows, scales


class _Errors:
    """Errors of the rows so far. The medians are of the rows whose number is a multiple of `every`."""

    def __init__(self, row_format: str, table: RowTable):
        self._row_format, self._row_dim, self._num_rows = row_format, table.row_dim, table.num_rows
        self._every = max(-(-table.num_rows // _SAMPLE_ROWS), 1)
        self._sampled: list[tuple[Tensor, Tensor]] = []
        self._worst = [(0.0, -1), (0.0, -1)]

    def add(self, begin: int, values: Tensor, rows: Tensor, scales: Tensor | None, whole: float | None) -> None:
        fmt = ROW_FORMATS[self._row_format]
        if scales is None and whole is not None:
            scales = torch.tensor([whole], dtype=torch.float32, device="cpu")
        table_scale = whole if fmt.has_table_scale and whole is not None else 1.0
        exact = values.double()
        off = decode(rows, scales, self._row_format, self._row_dim, False, table_scale).double() - exact
        found = (_ratio(off.norm(dim=1), exact.norm(dim=1)), _ratio(off.abs().amax(1), exact.abs().amax(1)))
        for kind, errors in enumerate(found):
            at = int(errors.argmax())
            if errors[at] > self._worst[kind][0] or self._worst[kind][1] < 0:
                self._worst[kind] = (errors[at].item(), begin + at)
        first = -begin % self._every
        self._sampled.append((found[0][first::self._every], found[1][first::self._every]))

    def report(self) -> QuantizeReport:
        row_bytes = ROW_FORMATS[self._row_format].row_bytes(self._row_dim)
        if not self._sampled:
            return QuantizeReport(self._row_format, self._num_rows, row_bytes)
        rms, most = (torch.cat(parts).median().item() for parts in zip(*self._sampled, strict=True))
        return QuantizeReport(self._row_format, self._num_rows, row_bytes, rms, *self._worst[0], most, *self._worst[1])


def _ratio(error: Tensor, size: Tensor) -> Tensor:
    return torch.where(size == 0, 0.0, error / size)
