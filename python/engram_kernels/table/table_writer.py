"""Writes the rows of a table file, piece by piece."""
from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram_kernels._checks import expect_tensor
from engram_kernels._files import naming_path
from engram_kernels.row_format import (
    RowFormat,
    check_shape,
    check_table_scale,
    check_tensors,
    row_format_of,
    rows_as_stored,
    scales_as_stored,
    scales_as_wanted,
)
from engram_kernels.table.safetensors_file import Writer, atomic_writer

Chunk = Tensor | tuple[Tensor, Tensor | None]
_OP = "RowTable.create"


def create_table(path: Path, rows: Tensor | Iterable[Chunk], scales: Tensor | None, row_format: str,
                 shape: tuple[int | None, int | None], zero_scale_is_zero: bool, table_scale: float | Tensor | None) -> None:
    """Writes a table file of all rows or of pieces. Arguments and errors: `RowTable.create`; `shape`: num_rows, row_dim."""
    num_rows, row_dim = shape
    if isinstance(rows, Tensor):
        weight, scales, row_dim = check_tensors("RowTable.from_tensor", rows, scales, row_format, row_dim)
        if num_rows not in (None, weight.shape[0]):
            raise ValueError(f"{_OP}: num_rows is {num_rows}, rows has {weight.shape[0]}")
        num_rows, rows, scales = weight.shape[0], [(weight, scales)], None
    if num_rows is None or row_dim is None:
        raise ValueError(f"{_OP}: num_rows and row_dim are needed when rows come in pieces")
    write_table(path, rows, scales, row_format, num_rows, row_dim, zero_scale_is_zero,
                check_table_scale(_OP, row_format, table_scale))


def write_table(path: Path, pieces: Iterable[Chunk], scales: Tensor | None, row_format: str, num_rows: int, row_dim: int,
                zero_scale_is_zero: bool, table_scale: float = 1.0) -> None:
    """Writes a table file whole or not at all. Arguments and errors: `RowTable.create`."""
    fmt = row_format_of(_OP, row_format)
    if not isinstance(num_rows, int) or isinstance(num_rows, bool) or num_rows < 0:
        raise ValueError(f"{_OP}: num_rows is {num_rows!r}, expected an integer of at least 0")
    if not isinstance(pieces, Iterable):
        raise TypeError(f"{_OP}: rows must be a tensor or an iterable of pieces, got {type(pieces).__name__}")
    remaining: Iterator[tuple[Any, Any]] = (_split(piece, row_format, fmt) for piece in pieces)
    first = next(remaining, None)
    width = fmt.width(row_dim) if isinstance(row_dim, int) else 0
    if first is not None:
        rows, first_scales = first
        expect_tensor(_OP, "a piece of rows", rows, (fmt.dtype,), ("rows", "width"))
        width = rows.shape[1]
        if not fmt.has_row_scales and scales is None:
            scales = first_scales
        remaining = itertools.chain([first], remaining)
    check_shape(_OP, row_format, row_dim, width)
    scale_shape = fmt.scale_shape(num_rows, row_dim)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"rows": (fmt.file_dtypes[0], (num_rows, width))}
    if scale_shape is not None:
        tensors["scales"] = (fmt.scale_file_dtypes[0], scale_shape)
    if fmt.has_row_scales and scales is not None:
        raise ValueError(f"{_OP}: scales of row_format {row_format!r} come with their piece of rows, as a pair")
    if scale_shape == (1,):
        scales = scales_as_wanted(scales, (1,))
        expect_tensor(_OP, "scales", scales, (torch.float32,), (1,), torch.device("cpu"))
    metadata = {"format": "pt", "row_format": row_format, "row_dim": str(row_dim),
                "zero_scale_is_zero": "true" if zero_scale_is_zero else "false"}
    if fmt.has_table_scale:
        metadata["table_scale"] = repr(table_scale)
    with atomic_writer(path, tensors, metadata) as writer:
        if scale_shape == (1,) and scales is not None:
            with naming_path(_OP, path, "the scale cannot be written"):
                writer.write("scales", 0, _bytes(scales))
        _write_pieces(writer, path, remaining, fmt, (num_rows, width, row_dim), scales)


def _write_pieces(writer: Writer, path: Path, pieces: Iterable[tuple[Any, Any]], fmt: RowFormat, shape: tuple[int, int, int],
                  table_scale: Tensor | None) -> None:
    num_rows, width, row_dim = shape
    cpu, done = torch.device("cpu"), 0
    for number, (rows, scales) in enumerate(pieces):
        expect_tensor(_OP, f"rows of piece {number}", rows, (fmt.dtype,), ("rows", width), cpu)
        count = rows.shape[0]
        if done + count > num_rows:
            raise ValueError(f"{_OP}: pieces 0..{number} have {done + count} rows, expected {num_rows} in all")
        wanted = fmt.scale_shape(count, row_dim)
        if fmt.has_row_scale and wanted is not None:
            scales = scales_as_wanted(scales, wanted)
        if wanted is None and scales is not None:
            raise ValueError(f"{_OP}: piece {number} brings scales, but its row format has none")
        if fmt.has_row_scales and wanted is not None:
            assert fmt.scale_dtype is not None
            if scales is None:
                raise ValueError(f"{_OP}: piece {number} brings no scales, expected {fmt.scale_dtype} {list(wanted)}")
            expect_tensor(_OP, f"scales of piece {number}", scales, (fmt.scale_dtype,), wanted, cpu)
        elif scales is not None and table_scale is not None and not torch.equal(scales.reshape(-1), table_scale):
            raise ValueError(f"{_OP}: piece {number} has scale {scales.reshape(-1).tolist()}, the table has "
                             f"{table_scale.tolist()}; fp8_e4m3_tensor has one for all")
        try:
            writer.write("rows", done * width * fmt.dtype.itemsize, _bytes(rows))
            if fmt.has_row_scales and scales is not None:
                writer.write("scales", done * scales.shape[1] * scales.element_size(), _bytes(scales))
        except OSError as err:
            raise OSError(err.errno, f"{_OP}: rows {done}..{done + count} cannot be written: {err.strerror}", str(path)) from err
        done += count
    if done != num_rows:
        raise ValueError(f"{_OP}: the pieces have {done} rows, expected {num_rows}")


def _split(piece: Any, row_format: str, fmt: RowFormat) -> tuple[Any, Any]:
    rows, scales = piece if isinstance(piece, tuple) and len(piece) == 2 else (piece, None)
    return rows_as_stored(_OP, "a piece of rows", rows, row_format, fmt), scales_as_stored(scales, fmt)


def _bytes(x: Tensor) -> Any:
    return x.detach().contiguous().view(-1).view(torch.uint8).numpy()
