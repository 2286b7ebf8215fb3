"""Which parts of safetensors files are a table, and reading its rows."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram_kernels import _modes
from engram_kernels._files import shorten
from engram_kernels._library import IO_NOTE
from engram_kernels.row_format import ROW_FORMATS, RowFormat, check_shape, row_format_of
from engram_kernels.table.file_reader import FileExtent
from engram_kernels.table.safetensors_file import Extent

_SCALE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # each a float32 without rounding


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor in one of the files of a table."""

    name: str
    path: Path
    file: int  # its number
    extent: Extent

    @property
    def is_one_value(self) -> bool:
        """Whether it has one element and no rows: a scale of a whole table."""
        return self.extent.shape in ((), (1,))

    def __str__(self) -> str:
        return f"{shorten(self.name)!r} in {self.path.name} is {self.extent.dtype} {list(self.extent.shape)}"


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of rows in one part, or in several that follow one another."""

    extent: Extent  # of all parts as one tensor; its offset is that of the first
    parts: tuple[Part, ...]

    @classmethod
    def joined(cls, parts: list[Part]) -> Array:
        """The parts as one array. ValueError names the first that is of another dtype or width."""
        first = parts[0].extent
        if len(parts) == 1 or all(part.is_one_value for part in parts):
            return cls(first, tuple(parts))
        for number, part in enumerate(parts):
            if part.extent.dtype != first.dtype or len(part.extent.shape) < 1 or part.extent.shape[1:] != first.shape[1:]:
                wanted = ", ".join(["rows", *map(str, first.shape[1:])])
                raise ValueError(f"part {number}, {part}, expected {first.dtype} [{wanted}] like part 0, "
                                 f"{shorten(parts[0].name)!r}")
        num_rows = sum(part.extent.shape[0] for part in parts)
        return cls(Extent(first.dtype, (num_rows, *first.shape[1:]), first.offset, sum(p.extent.num_bytes for p in parts)),
                   tuple(parts))

    @property
    def row_bytes(self) -> int:
        """Bytes from a row to the next."""
        return self.extent.num_bytes // self.extent.shape[0] if self.extent.shape and self.extent.shape[0] else 0

    def file_extent(self) -> FileExtent:
        """Where the rows lie, as a reader takes it; nothing where there is no row of several elements."""
        if len(self.extent.shape) != 2:
            return (0, 0, [])
        places = [(part.file, part.extent.offset, part.extent.shape[0]) for part in self.parts]
        return (self.row_bytes, self.row_bytes, places)

    def read_span(self, reader: Any, begin: int, out: Any) -> None:
        """Fills a vector of bytes with the rows from `begin` on: a few large reads."""
        first = done = 0
        for part in self.parts:
            end = first + part.extent.shape[0]
            at = begin + done // self.row_bytes  # the next row
            if first <= at < end and done < out.size:
                taken = min((end - at) * self.row_bytes, out.size - done)
                reader.read_range(part.extent.offset + (at - first) * self.row_bytes, out[done:done + taken], part.file)
                done += taken
            first = end


def expect_same_heights(rows: Array, scales: Array | None) -> None:
    """Raises ValueError where rows and scales lie in equally many parts that do not have the same rows."""
    if scales is None or len(scales.parts) < 2 or len(scales.parts) != len(rows.parts):
        return
    for number, (part, of_part) in enumerate(zip(rows.parts, scales.parts, strict=True)):
        if not of_part.is_one_value and part.extent.shape[:1] != of_part.extent.shape[:1]:
            raise ValueError(f"part {number} of the scales, {of_part}, expected as many rows as part {number} of the rows, "
                             f"{part}")


@dataclasses.dataclass
class TableFile:
    """The parts of open files that are a table."""

    rows: Extent
    scales: Extent | None
    row_format: str
    row_dim: int
    # when it was opened: path, device and inode, time of change in nanoseconds. Of several files: the first and how many others,
    # a digest of all of them, the latest time
    source: tuple[str, str, int] = ("", "", 0)
    rows_in: Array | None = None
    scales_in: Array | None = None
    tier: Any = None  # a RowTier
    reader: Any = None  # its FileReader
    opened: dict[str, Any] = dataclasses.field(default_factory=dict)  # the arguments of `RowTable.open` that open it again
    name: str = ""  # those as JSON: what a graph calls the table, so that a saved one finds it again

    @classmethod
    def described(cls, rows: Extent, scales: Extent | None, row_format: str | None, row_dim: int | None) -> TableFile:
        """Checks extents against the format, or finds the format that they have."""
        if len(rows.shape) != 2:
            raise ValueError(f"the rows have shape {list(rows.shape)}, expected [num_rows, width]")
        if row_format is None:
            row_format = _format_of(rows, scales)
        fmt = row_format_of("rows", row_format)
        if rows.dtype not in fmt.file_dtypes:
            raise ValueError(f"the rows are {rows.dtype}, expected {' or '.join(fmt.file_dtypes)} for row_format {row_format!r}")
        if row_dim is None:
            if fmt.is_packed:
                raise ValueError(f"row_dim is needed for row_format {row_format!r}: rows may be padded")
            row_dim = rows.shape[1] * fmt.per_stored
        check_shape("rows", row_format, row_dim, rows.shape[1])
        wanted = fmt.scale_shape(rows.shape[0], row_dim)
        if wanted is None:
            if scales is not None:
                raise ValueError(f"row_format {row_format!r} has no scales, but scales {list(scales.shape)} are named")
            return cls(rows, None, row_format, row_dim)
        if scales is None:
            raise ValueError(f"row_format {row_format!r} needs scales {list(wanted)}, name their tensor")
        if fmt.has_row_scale and scales.shape == wanted[:1]:
            scales = dataclasses.replace(scales, shape=wanted)
        if scales.dtype not in fmt.scale_file_dtypes or (scales.shape != wanted and (wanted != (1,) or scales.shape != ())):
            raise ValueError(f"the scales are {scales.dtype} {list(scales.shape)}, expected "
                             f"{' or '.join(fmt.scale_file_dtypes)} {list(wanted)} for rows {list(rows.shape)}")
        return cls(rows, scales, row_format, row_dim)

    def attach(self, reader: Any, cache_bytes: int, rows: Array, scales: Array | None) -> None:
        """Makes the tier that `read` reads from."""
        self.reader, self.rows_in, self.scales_in = reader, rows, scales
        nothing: FileExtent = (0, 0, [])
        halves = {"BF16": "bf16", "F16": "f16"} if ROW_FORMATS[self.row_format].has_row_scale else {}
        stored = "" if scales is None else halves.get(scales.extent.dtype, "")
        self.tier = reader.tier(rows.file_extent(), nothing if scales is None else scales.file_extent(), cache_bytes, stored)

    def opened_as(self, **options: Any) -> None:
        """Notes the arguments of `RowTable.open` that open it again."""
        self.opened, self.name = options, json.dumps(options, sort_keys=True)

    def places(self) -> list[list[int]]:
        """Where every part lies: the number of its file, its offset and its bytes; rows first, then scales."""
        return [[part.file, part.extent.offset, part.extent.num_bytes] for array in (self.rows_in, self.scales_in)
                if array is not None for part in array.parts]

    def stand_ins(self) -> tuple[Tensor, Tensor | None]:
        """Rows and scales on the meta device, for their shape and dtype; a scale of the whole table as it is."""
        fmt, scales = ROW_FORMATS[self.row_format], None
        with _modes.plain_tensors():
            rows = torch.empty(self.rows.shape, dtype=fmt.dtype, device="meta")
            if self.scales is not None and fmt.scale_dtype is not None:
                scales = torch.empty(self.scales.shape, dtype=fmt.scale_dtype, device="meta")
                if not fmt.has_row_scales:
                    assert self.scales_in is not None
                    scales = self.one_value(self.scales_in)
        return rows, scales

    def one_value(self, scale: Array) -> Tensor:
        """A scale of the whole table, as float32 [1]: exactly what the file says. ValueError where the files of ranks differ."""
        values = []
        for part in scale.parts:
            if not part.is_one_value or part.extent.dtype not in _SCALE_DTYPES:
                raise ValueError(f"RowTable.open: {part.path}: {part}, expected one value of {', '.join(_SCALE_DTYPES)}")
            value = torch.empty(1, dtype=_SCALE_DTYPES[part.extent.dtype], device="cpu")
            self.reader.read_range(part.extent.offset, value.view(torch.uint8).numpy(), part.file)
            values.append(value.float())
            if values[-1].view(torch.int32).item() != values[0].view(torch.int32).item():
                raise ValueError(f"RowTable.open: {part.path}: the scale {shorten(part.name)!r} is {value.item()!r}, but "
                                 f"{values[0].item()!r} in {scale.parts[0].path}: one scale is needed for all rows")
        return values[0]

    def read_span(self, begin: int, out_rows: Tensor, out_scales: Tensor | None) -> None:
        """Fills the outputs with the rows from `begin` on and their scales: a few large reads."""
        for array, out in ((self.rows_in, out_rows), (self.scales_in, out_scales)):
            if array is None or out is None or not out.numel():
                continue
            is_wider = out.dtype == torch.float32 and array.extent.dtype in ("BF16", "F16")  # scales that are halves there
            stored = torch.empty(out.shape, dtype=_SCALE_DTYPES[array.extent.dtype], device="cpu") if is_wider else out
            array.read_span(self.reader, begin, stored.view(torch.uint8).view(-1).numpy())
            if is_wider:
                out.copy_(stored)

    def stats(self) -> dict[str, Any]:
        """`RowTable.io_stats`."""
        return dict(self.tier.stats(), **({"io_note": IO_NOTE} if IO_NOTE else {}))

    def read(self, ids: Tensor, out_rows: Tensor, out_scales: Tensor | None) -> None:
        """Fills the outputs with the rows at `ids` (int64, distinct, in range) and their scales."""
        scales = None if out_scales is None else out_scales.view(torch.uint8).numpy()
        self.tier.fetch(ids.numpy(), out_rows.view(torch.uint8).numpy(), scales)


def find_tensor(extents: dict[str, Extent], name: str) -> Extent:
    """The extent called `name`. ValueError names what there is."""
    if name not in extents:
        names = sorted(extents)
        raise ValueError(f"it has no tensor {name!r}; it has {', '.join(names[:8]) or 'none'}" + (", .." if names[8:] else ""))
    return extents[name]


def metadata_int(metadata: dict[str, str], name: str) -> int | None:
    """A number of the metadata; None: it is not there."""
    text = metadata.get(name)
    if text is not None and not (text.isascii() and text.isdigit()):
        raise ValueError(f"its metadata says {name} {text!r}, expected a number")
    return None if text is None else int(text)


def metadata_table_scale(metadata: dict[str, str]) -> float | None:
    """The table_scale of the metadata; None: it is not there."""
    text = metadata.get("table_scale")
    try:
        return None if text is None else float(text)
    except ValueError:
        raise ValueError(f"its metadata says table_scale {text!r}, expected a number") from None


def _has_shape(fmt: RowFormat, scales: Extent, rows: Extent) -> bool:
    wanted = fmt.scale_shape(rows.shape[0], rows.shape[1] * fmt.per_stored)
    return wanted is not None and scales.shape in (wanted, () if wanted == (1,) else wanted[:1] if fmt.has_row_scale else wanted)


def _format_of(rows: Extent, scales: Extent | None) -> str:
    found = [name for name, fmt in ROW_FORMATS.items()
             if rows.dtype == fmt.file_dtypes[0] and not fmt.is_packed
             and (fmt.scale_dtype is not None) == (scales is not None)
             and (scales is None or scales.dtype in fmt.scale_file_dtypes)]
    if len(found) > 1 and scales is not None:
        found = [name for name in found if _has_shape(ROW_FORMATS[name], scales, rows)] or found
    if len(found) != 1:
        raise ValueError(f"row_format is needed: rows of {rows.dtype} with "
                         f"{'no scales' if scales is None else 'scales of ' + scales.dtype} are no format's own")
    return found[0]
