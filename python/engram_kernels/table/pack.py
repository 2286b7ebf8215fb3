"""Rewrites a table of fp8 rows with scales apart into the packed layout, so that a row is one extent and one read.

The rows go to TARGET.part, a file whose header is zero until the end, so that it opens as no table; TARGET.part.log has a line
for each chunk that is on disk, with its checksum. A run that was killed, or met a full disk, goes on from there.
"""
from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram_kernels import capacity
from engram_kernels._files import write_all
from engram_kernels._terminal import Progress, no_progress
from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.table.checkpoint_files import Names, Source
from engram_kernels.table.row_table import RowTable
from engram_kernels.table.safetensors_file import Extent, lay_out
from engram_kernels.table.table_file import TableFile

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_CHUNK_BYTES = 64 << 20
_SAMPLE_ROWS = 1 << 16
_UNPACKED, _PACKED = "fp8_e4m3_block32", "fp8_e4m3_block32_packed"


@dataclasses.dataclass(frozen=True)
class PackResult:
    """What `pack_table` did."""

    num_rows: int
    row_bytes: int
    resumed_rows: int   # written by an earlier run, and found whole
    verified_rows: int  # compared with the source at the end


def pack_table(source: Source, target: str | os.PathLike[str], tensor: Names | None = None, scales: Names | None = None, *,
               verify_all: bool = False, progress: Progress | None = None, chunk_rows: int | None = None) -> PackResult:
    """Writes a packed copy of a table of row format fp8_e4m3_block32.

    Args:
        source: a safetensors file, the folder of a checkpoint, or whatever else `RowTable.open` takes.
        target: the new file, a table with row format fp8_e4m3_block32_packed; it must not exist. What a stopped run left is
            used where it is of the same source, unchanged since, and its checksums hold; else it is written anew.
        tensor: name of the rows in `source`, or of their parts; None: "rows".
        scales: name of the scales, or of their parts; None: "scales" where `tensor` is None.
        verify_all: compare every row with the source at the end; else 65,536 at random, and the last.
        progress: opens a progress bar and gives what advances it; None: no bar.
        chunk_rows: rows written and synced together; None: 64 MiB of them.

    Returns:
        Counts of rows.

    Raises:
        ValueError: the source is no such table.
        OSError: a file cannot be read or written, the disk is full, `target` exists, or another process packs into it; names
            the path and the step. What is on disk so far stays for the next run, beside the target, and opens as no table.
        RuntimeError: the target differs from the source; it is not put in place.

    Source: docs/ops.md, "Row formats".
    """
    capacity.expect_linux("pack")
    target = Path(target)
    table = RowTable.open(source, tensor, scales)
    if table.row_format != _UNPACKED or not isinstance(table._file, TableFile) or table._file.scales is None:
        raise ValueError(f"pack: {table.path} has row_format {table.row_format!r}, expected {_UNPACKED!r} with scales apart")
    if target.exists():
        raise FileExistsError(errno.EEXIST, "pack: the target exists already", str(target))
    width = ROW_FORMATS[_PACKED].width(table.row_dim)
    chunk_rows = chunk_rows or max(_CHUNK_BYTES // width, 1)
    metadata = {"format": "pt", "row_format": _PACKED, "row_dim": str(table.row_dim),
                "zero_scale_is_zero": "true" if table.zero_scale_is_zero else "false"}
    header, extents, file_bytes = lay_out({"rows": ("U8", (table.num_rows, width))}, metadata)
    identity = {"source": list(table._file.source), "places": table._file.places(), "num_rows": table.num_rows,
                "row_dim": table.row_dim, "chunk_rows": chunk_rows}
    with _Part(target, identity, extents["rows"], file_bytes, progress or no_progress) as part:
        resumed = part.resume()
        with part.progress("pack", table.num_rows) as advance:
            advance(resumed)
            for begin in range(resumed, table.num_rows, chunk_rows):
                chunk = _packed(table, np.arange(begin, min(begin + chunk_rows, table.num_rows)))
                part.append(chunk)
                advance(len(chunk))
        verified = _verify(table, part, verify_all, chunk_rows)
        part.put_in_place(header)
    return PackResult(table.num_rows, width, resumed, verified)


def _packed(table: RowTable, ids: Any) -> Any:
    rows, scales = table.read_rows(torch.from_numpy(ids))
    assert scales is not None
    return torch.cat([rows, scales], dim=1).numpy()


def _verify(table: RowTable, part: _Part, verify_all: bool, chunk_rows: int) -> int:
    """Compares rows of the part with the source's; how many."""
    num_rows = table.num_rows
    if verify_all or num_rows <= _SAMPLE_ROWS:
        chunks = [np.arange(begin, min(begin + chunk_rows, num_rows)) for begin in range(0, num_rows, chunk_rows)]
    else:
        picked = np.random.default_rng().integers(0, num_rows, _SAMPLE_ROWS)
        chunks = np.array_split(np.unique(np.append(picked, num_rows - 1)), 64)
    verified = 0
    part.leave_page_cache()
    with part.progress("compare with the source", sum(map(len, chunks))) as advance:
        for ids in chunks:
            different = np.flatnonzero((_packed(table, ids) != part.read(ids)).any(axis=1))
            if different.size:
                raise RuntimeError(f"pack: {part.path}: row {ids[different[0]]} differs from the source; the target is not put "
                                   "in place. Remove it and pack again")
            verified += len(ids)
            advance(len(ids))
    return verified


class _Part:
    """TARGET.part and its log, held by one process at a time."""

    def __init__(self, target: Path, identity: dict[str, Any], rows: Extent, file_bytes: int, progress: Progress):
        self.target, self.progress = target, progress
        self.path = target.with_name(target.name + ".part")
        self._log_path = target.with_name(target.name + ".part.log")
        self._identity, self._rows, self._file_bytes = identity, rows, file_bytes
        self._width = rows.shape[1]
        self._done = 0

    def __enter__(self) -> _Part:
        with self._step("cannot be created"):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as err:
                raise OSError(err.errno, "pack: another process packs into it", str(self.path)) from None
            with self._step("cannot be opened", self._log_path):
                self._log_fd = os.open(self._log_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except BaseException:
            os.close(self._fd)
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._done == 0 and not self.target.exists():  # nothing that the next run could use
            self.path.unlink(missing_ok=True)
            self._log_path.unlink(missing_ok=True)
        os.close(self._log_fd)
        os.close(self._fd)

    def resume(self) -> int:
        """Rows of an earlier run that are whole. Reserves the space for all."""
        with self._step("cannot be read"):
            logged = os.pread(self._log_fd, os.fstat(self._log_fd).st_size, 0)
            kept = self._whole_chunks(logged)
        with self._step("cannot be written", self._log_path):
            if kept == 0:
                os.ftruncate(self._log_fd, 0)
                os.ftruncate(self._fd, 0)
                kept = os.pwrite(self._log_fd, json.dumps(self._identity).encode() + b"\n", 0)
            os.ftruncate(self._log_fd, kept)  # what follows the last whole line is of a chunk that is not
            self._log_bytes = kept
        missing = max(self._file_bytes - os.fstat(self._fd).st_blocks * 512, 0)
        capacity.check_directory("pack", f"the rest of {self.target}", missing, self.target.parent, capacity.DISK_REMEDY)
        with self._step(f"{self._file_bytes} bytes cannot be reserved"):
            os.posix_fallocate(self._fd, 0, self._file_bytes)
            os.pwrite(self._fd, bytes(8), 0)  # a header length of 0: no table
        return self._done

    def _whole_chunks(self, logged: bytes) -> int:
        """Finds the chunks that are in the file as logged; bytes of the log that tell of them."""
        lines = logged.split(b"\n")[:-1]  # the last line ends with a newline, or was cut
        entries = []
        with contextlib.suppress(ValueError):
            for line in lines:
                entries.append((json.loads(line), len(line) + 1))
        if not entries or entries[0][0] != self._identity:
            return 0
        kept = entries[0][1]
        with self.progress("check what is there", self._identity["num_rows"]) as advance:
            for entry, num_bytes in entries[1:]:
                if not (isinstance(entry, dict) and entry.get("begin") == self._done):
                    break
                chunk = os.pread(self._fd, entry["rows"] * self._width, self._rows.offset + self._done * self._width)
                if len(chunk) != entry["rows"] * self._width or zlib.crc32(chunk) != entry["crc32"]:
                    break
                self._done += entry["rows"]
                kept += num_bytes
                advance(entry["rows"])
        return kept

    def append(self, chunk: Any) -> None:
        """Writes the next rows; when it returns they are on disk and logged."""
        view = memoryview(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
        line = json.dumps({"begin": self._done, "rows": len(chunk), "crc32": zlib.crc32(view)}).encode() + b"\n"
        with self._step(f"rows {self._done}..{self._done + len(chunk)} cannot be written"):
            write_all(self._fd, view, self._rows.offset + self._done * self._width)
            os.fdatasync(self._fd)
        with self._step("cannot be written", self._log_path):
            write_all(self._log_fd, memoryview(line), self._log_bytes)
            os.fdatasync(self._log_fd)
        self._log_bytes += len(line)
        self._done += len(chunk)

    def read(self, ids: Any) -> Any:
        """[n, width] uint8 rows of the part, as they are in the file."""
        with self._step("cannot be read"):
            if ids.size and int(ids[-1]) - int(ids[0]) + 1 == ids.size:
                data = os.pread(self._fd, ids.size * self._width, self._rows.offset + int(ids[0]) * self._width)
            else:
                data = b"".join(os.pread(self._fd, self._width, self._rows.offset + row * self._width) for row in ids.tolist())
        return np.frombuffer(data, np.uint8).reshape(ids.size, self._width)

    def leave_page_cache(self) -> None:
        """Drops the file from the page cache, so that `read` reads what is on disk from here on."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def put_in_place(self, header: bytes) -> None:
        """Makes the part the target: only now it is a table."""
        with self._step("cannot be put in place"):
            write_all(self._fd, memoryview(header), 0)
            os.fsync(self._fd)
            if self.target.exists():
                raise FileExistsError(errno.EEXIST, "the target came into being meanwhile")
            os.rename(self.path, self.target)
            os.unlink(self._log_path)
            folder = os.open(self.target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    @contextlib.contextmanager
    def _step(self, step: str, path: Path | None = None) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            kept = f"; {self._done} rows are kept for the next run" if self._done else ""
            raise OSError(err.errno, f"pack: {step}: {err.strerror}{kept}", str(path or self.path)) from err
