"""Opens the files of a table: the work behind `RowTable.open`.

1. The names are looked up in the source (checkpoint_files.py): which tensors, in which files, in the order of the rows.
2. Those files are opened, once each, and a reader notes their sizes and times: a change from here on is seen.
3. Their headers are read; parts are joined to one array of rows and one of scales.
"""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from engram_kernels._checks import expect_choice, expect_int
from engram_kernels._files import shorten
from engram_kernels.row_format import ROW_FORMATS, check_table_scale
from engram_kernels.table import staging
from engram_kernels.table.checkpoint_files import Files, Finder, Located, Names, Source, files_of, matching
from engram_kernels.table.file_reader import make_files_reader
from engram_kernels.table.safetensors_file import Header, open_regular, read_header
from engram_kernels.table.table_file import (
    Array,
    Part,
    TableFile,
    expect_same_heights,
    find_tensor,
    metadata_int,
    metadata_table_scale,
)

if TYPE_CHECKING:
    from engram_kernels.table.row_table import RowTable

_OP = "RowTable.open"
_IO = ("auto", "io_uring", "preadv", "io_uring_buffered", "preadv_buffered")


class _OpenFiles:
    """The files of a table, by number, while it is opened."""

    def __init__(self, paths: list[Path], label: str):
        self.paths, self.label = paths, label
        self.fds: list[int] = []
        self.headers: list[Header] = []

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        try:
            for path in self.paths:
                self.fds.append(open_regular(path))
            yield
        finally:
            for fd in self.fds:
                os.close(fd)

    def read_headers(self) -> None:
        self.headers = [read_header(fd, path) for fd, path in zip(self.fds, self.paths, strict=True)]

    def array(self, located: Located) -> Array:
        """The parts at these places, joined. ValueError names the one that does not fit."""
        parts: list[Part] = []
        at: dict[tuple[int, int, int], str] = {}
        for name, path in located:
            file = self.paths.index(path)
            try:
                extent = find_tensor(self.headers[file].extents, name)
            except ValueError as err:
                raise ValueError(f"{path}: {err}") from None
            parts.append(Part(name, path, file, extent))
            info = os.fstat(self.fds[file])
            key = (info.st_dev, info.st_ino, extent.offset)
            if extent.num_bytes and at.setdefault(key, f"{shorten(name)!r} of {path}") != f"{shorten(name)!r} of {path}":
                raise ValueError(f"{shorten(name)!r} of {path} lies at the same bytes as {at[key]}: one part, twice")
        return Array.joined(parts)

    def expect_no_others(self, pattern: Names | None, located: Located) -> None:
        """Raises ValueError where a file holds a part that the index does not name, or names in another file."""
        places = {(name, self.paths.index(path)) for name, path in located}
        names = {name for name, _ in located}
        for file, header in enumerate(self.headers):
            for name in names & header.extents.keys():
                if (name, file) not in places:
                    raise ValueError(f"{self.paths[file]} holds {shorten(name)!r}, which the index names in another file")
            if isinstance(pattern, str) and "{}" in pattern:
                for _, name in matching(pattern, header.extents):
                    if name not in names:
                        raise ValueError(f"{self.paths[file]} holds {shorten(name)!r}, which the index does not name")

    def source(self) -> tuple[str, str, int]:
        """What tells this state of the files from another: `TableFile.source`."""
        noted = [(str(path.resolve()), os.fstat(fd)) for path, fd in zip(self.paths, self.fds, strict=True)]
        changed = max(info.st_mtime_ns for _, info in noted)
        if len(noted) == 1:
            (path, info), = noted
            return path, f"{info.st_dev}:{info.st_ino}", changed
        digest = hashlib.blake2b(digest_size=16)
        for path, info in noted:
            digest.update(f"{path}\0{info.st_dev}:{info.st_ino}:{info.st_mtime_ns}\0".encode(errors="surrogateescape"))
        return f"{noted[0][0]} and {len(noted) - 1} more files", digest.hexdigest(), changed


def open_table(cls: type[RowTable], source: Source, tensor: Names | None, scales: Names | None, row_format: str | None,
               described_as: tuple[int | None, bool | None, float | Tensor | Names | None],
               reading: tuple[int, int, str]) -> RowTable:
    """A table of files. Arguments and errors: `RowTable.open`; `described_as`: its `row_dim`, `zero_scale_is_zero`
    and `table_scale`; `reading`: its `queue_depth`, `cache_bytes` and `io`."""
    (row_dim, zero_scale_is_zero, table_scale), (queue_depth, cache_bytes, io) = described_as, reading
    queue_depth = expect_int(_OP, "queue_depth", queue_depth, 1, 4096)
    cache_bytes = expect_int(_OP, "cache_bytes", cache_bytes, 0, 2**63 - 1)
    expect_choice(_OP, "io", io, _IO)
    if row_dim is not None:
        row_dim = expect_int(_OP, "row_dim", row_dim, 1, 2**31 - 1)
    files = files_of(source)
    finder = Finder(files)
    if tensor is None and not files.is_one_file:
        raise ValueError(f"{_OP}: {files.label}: tensor should name the rows; there are {finder.candidates()}")
    located = finder.locate("rows" if tensor is None else tensor, "tensor")
    located_scales = None if scales is None else finder.locate(scales, "scales")
    named = None
    if table_scale is not None and not isinstance(table_scale, int | float | Tensor):
        named = finder.locate(table_scale, "table_scale")
    everywhere = [*located, *(located_scales or []), *(named or [])]
    opened = _OpenFiles(list(dict.fromkeys(path for _, path in everywhere)), files.label)
    with opened.opened():
        # first the reader, which notes the files' sizes and times: a change while a header is read is seen later
        reader = make_files_reader(list(zip(opened.fds, map(str, opened.paths), strict=True)), queue_depth, io)
        opened.read_headers()
        described = opened.headers[0].metadata if tensor is None else {}
        if scales is None and tensor is None and "scales" in opened.headers[0].extents:
            scales, located_scales = "scales", [("scales", opened.paths[0])]
        try:
            if files.index is not None:
                opened.expect_no_others(tensor, located)
                opened.expect_no_others(scales, located_scales or [])
            rows = opened.array(located)
            of_rows = None if located_scales is None else opened.array(located_scales)
            of_table = None if named is None else opened.array(named)
            expect_same_heights(rows, of_rows)
            file = TableFile.described(rows.extent, None if of_rows is None else of_rows.extent,
                                       row_format or described.get("row_format"), row_dim or metadata_int(described, "row_dim"))
            given = metadata_table_scale(described) if table_scale is None else table_scale
            scale = 1.0 if of_table is not None else check_table_scale("the table", file.row_format, given)
        except ValueError as err:
            raise ValueError(f"{_OP}: {_prefix(files, err)}{err}") from None
        file.source = opened.source()
        if of_rows is not None and file.scales is not None:
            of_rows = dataclasses.replace(of_rows, extent=file.scales)  # [R, 1] where the file has [R]
        file.attach(reader, cache_bytes, rows, of_rows)
        if of_table is not None:
            scale = check_table_scale(f"{_OP}: {files.label}", file.row_format, file.one_value(of_table))
    if zero_scale_is_zero is None:
        zero_scale_is_zero = described.get("zero_scale_is_zero") == "true"
    file.opened_as(source=_absolute(source), tensor=_listed(tensor), scales=_listed(scales), row_format=file.row_format,
                   row_dim=file.row_dim, zero_scale_is_zero=zero_scale_is_zero, queue_depth=queue_depth, cache_bytes=cache_bytes,
                   io=io, **({"table_scale": scale} if ROW_FORMATS[file.row_format].has_table_scale else {}))
    path = Path(source) if isinstance(source, str | os.PathLike) else opened.paths[0].parent
    table = cls(*file.stand_ins(), file.row_format, file.row_dim, zero_scale_is_zero, path, "file", file,
                table_scale=scale)
    staging.remember(file.name, table)
    if files.is_one_file and _has_journal(opened.paths[0].resolve()):
        warnings.warn(f"{_OP}: {opened.paths[0]} is being trained, or was when its process ended: beside it is a journal of "
                      "steps. Its rows may be between two steps until a RowOptimizer of the table and its state has opened it",
                      stacklevel=3)
    return table


def _has_journal(path: Path) -> bool:
    return path.with_name(f"{path.name}.journal").exists()


def _prefix(files: Files, err: ValueError) -> str:
    return "" if str(err).startswith(files.label) else f"{files.label}: "


def _absolute(source: Source) -> Any:
    return os.path.abspath(source) if isinstance(source, str | os.PathLike) else [os.path.abspath(x) for x in source]


def _listed(names: Names | None) -> Any:
    return names if names is None or isinstance(names, str) else list(names)
