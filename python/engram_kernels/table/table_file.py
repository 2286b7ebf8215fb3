"""Which parts of a safetensors file are a table, and reading its rows."""
from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_kernels import _modes
from engram_kernels.row_format import ROW_FORMATS, check_shape, row_format_of
from engram_kernels.table.file_reader import FileExtent
from engram_kernels.table.safetensors_file import Extent


@dataclasses.dataclass
class TableFile:
    """The part of an open file that is a table."""

    rows: Extent
    scales: Extent | None
    row_format: str
    row_dim: int
    source: tuple[str, str, int] = ("", "", 0)  # when it was opened: path, device and inode, time of change in nanoseconds
    tier: Any = None  # a FileTier
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
            row_dim = rows.shape[1]
        check_shape("rows", row_format, row_dim, rows.shape[1])
        wanted = fmt.scale_shape(rows.shape[0], row_dim)
        if wanted is None:
            if scales is not None:
                raise ValueError(f"row_format {row_format!r} has no scales, but scales {list(scales.shape)} are named")
            return cls(rows, None, row_format, row_dim)
        if scales is None:
            raise ValueError(f"row_format {row_format!r} needs scales {list(wanted)}, name their tensor")
        if scales.dtype not in fmt.scale_file_dtypes or (scales.shape != wanted and (wanted != (1,) or scales.shape != ())):
            raise ValueError(f"the scales are {scales.dtype} {list(scales.shape)}, expected "
                             f"{' or '.join(fmt.scale_file_dtypes)} {list(wanted)} for rows {list(rows.shape)}")
        return cls(rows, scales, row_format, row_dim)

    def attach(self, reader: Any, cache_bytes: int) -> None:
        """Makes the tier that `read` reads from."""
        self.reader = reader
        self.tier = reader.tier(_file_extent(self.rows), _file_extent(self.scales), cache_bytes)

    def opened_as(self, **options: Any) -> None:
        """Notes the arguments of `RowTable.open` that open it again."""
        self.opened, self.name = options, json.dumps(options, sort_keys=True)

    def stand_ins(self) -> tuple[Tensor, Tensor | None]:
        """Rows and scales on the meta device, for their shape and dtype; a scale of the whole table as it is."""
        fmt, scales = ROW_FORMATS[self.row_format], None
        with _modes.plain_tensors():
            rows = torch.empty(self.rows.shape, dtype=fmt.dtype, device="meta")
            if self.scales is not None and fmt.scale_dtype is not None:
                scales = torch.empty(self.scales.shape, dtype=fmt.scale_dtype, device="meta")
                if not fmt.has_blocks:
                    scales = torch.empty(1, dtype=torch.float32, device="cpu")
                    self.reader.read_rows(self.scales.offset, 4, 4, 1, np.zeros(1, dtype=np.int64), scales.numpy())
        return rows, scales

    def read_span(self, begin: int, out_rows: Tensor, out_scales: Tensor | None) -> None:
        """Fills the outputs with the rows from `begin` on and their scales, as they lie in the file: a few large reads."""
        for extent, out in ((self.rows, out_rows), (self.scales, out_scales)):
            if extent is not None and out is not None and out.numel():
                row_bytes = extent.num_bytes // extent.shape[0]
                self.reader.read_range(extent.offset + begin * row_bytes, out.view(torch.uint8).numpy())

    def read(self, ids: Tensor, out_rows: Tensor, out_scales: Tensor | None) -> None:
        """Fills the outputs with the rows at `ids` (int64, distinct, in range) and their scales."""
        scales = None if out_scales is None else out_scales.view(torch.uint8).numpy()
        self.tier.fetch(ids.numpy(), out_rows.view(torch.uint8).numpy(), scales)


def _file_extent(extent: Extent | None) -> FileExtent:
    if extent is None or len(extent.shape) != 2 or extent.shape[0] == 0:
        return (0, 0, 0, 0 if extent is None else extent.shape[0] if extent.shape else 1)
    row_bytes = extent.num_bytes // extent.shape[0]
    return (extent.offset, row_bytes, row_bytes, extent.shape[0])


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


def _format_of(rows: Extent, scales: Extent | None) -> str:
    found = [name for name, fmt in ROW_FORMATS.items()
             if rows.dtype == fmt.file_dtypes[0] and not fmt.is_packed
             and (fmt.scale_dtype is not None) == (scales is not None)
             and (scales is None or scales.dtype in fmt.scale_file_dtypes)]
    if len(found) != 1:
        raise ValueError(f"row_format is needed: rows of {rows.dtype} with "
                         f"{'no scales' if scales is None else 'scales of ' + scales.dtype} are no format's own")
    return found[0]
