"""Rows of an open file by index: the compiled reader, or its stand-in where the compiled module is missing."""
import errno
import os
import time
from typing import Any

import numpy as np

from engram_kernels._library import COMPILE_ERROR

# offset, stride_bytes, row_bytes, num_rows of the rows of one array
FileExtent = tuple[int, int, int, int]
_CLOCK_REALTIME_COARSE = 5  # of Linux; the time module has no name for it
IO_BACKENDS = ("auto", "io_uring", "preadv", "io_uring_buffered", "preadv_buffered")


class PythonFileReader:
    """The contract of csrc/table/file_reader.h on one thread: pread, never a memory map; a file that changed is an error.

    Args:
        fd: descriptor of the file; duplicated.
        path: for messages.
        queue_depth: checked; reads go one by one.
        io: checked; reads go through the page cache.
    """

    def __init__(self, fd: int, path: str, queue_depth: int = 64, io: str = "auto"):
        if not 1 <= queue_depth <= 4096:
            raise ValueError(f"FileReader: queue_depth is {queue_depth}, expected [1, 4096]")
        if io not in IO_BACKENDS:
            raise ValueError(f"FileReader: io is {io!r}, expected one of {', '.join(IO_BACKENDS)}")
        info = _settled_stat(fd)
        self._path, self._size, self._changed_ns = path, info.st_size, info.st_mtime_ns
        self._fd = os.dup(fd)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def read_rows(self, offset: int, stride_bytes: int, row_bytes: int, num_rows: int, row_ids: Any, out: Any) -> None:
        """Fills `out` with the rows at `row_ids` (int64). OSError names the path and the row; IndexError a bad id."""
        ids = np.asarray(row_ids)
        if offset < 0 or row_bytes > stride_bytes or offset + num_rows * stride_bytes > self._size:
            raise ValueError(f"FileReader: {num_rows} rows of {stride_bytes} bytes from byte {offset} are not inside "
                             f"{self._path} of {self._size} bytes")
        view = np.asarray(out).reshape(-1).view(np.uint8).data  # a memoryview of no bytes cannot be cast
        if len(view) != ids.size * row_bytes:
            raise ValueError(f"FileReader: out has {len(view)} bytes, expected {ids.size * row_bytes}")
        wrong = np.flatnonzero((ids < 0) | (ids >= num_rows))
        if wrong.size:
            raise IndexError(f"FileReader: row_ids[{wrong[0]}] is {ids[wrong[0]]}, expected [0, {num_rows})")
        for i, row in enumerate(ids.tolist()):
            self._read_exactly(view[i * row_bytes:(i + 1) * row_bytes], offset + row * stride_bytes, row)
        self._check_unchanged(int(ids[0]) if ids.size else 0)

    def read_range(self, offset: int, out: Any) -> None:
        """Fills `out` with the bytes from `offset` on."""
        self._read_exactly(np.asarray(out).reshape(-1).view(np.uint8).data, offset, 0)
        self._check_unchanged(0)

    def tier(self, rows: FileExtent, scales: FileExtent, cache_bytes: int) -> "PythonFileTier":
        """The rows of a table; `scales` of row_bytes 0: none. There is no cache."""
        if cache_bytes < 0:
            raise ValueError(f"FileTier: cache_bytes is {cache_bytes}, expected at least 0")
        return PythonFileTier(self, rows, scales)

    def _read_exactly(self, view: memoryview, at: int, row: int) -> None:
        end = at + len(view)
        while len(view) > 0:
            try:
                got = os.preadv(self._fd, [view], at)
            except OSError as err:
                raise OSError(err.errno, f"tier file: {self._path}: row {row} at byte {at} cannot be read: "
                                         f"{err.strerror}") from None
            if got == 0:
                raise OSError(errno.EIO, f"tier file: {self._path}: row {row} ends at byte {end}, but the file has "
                                         f"{os.fstat(self._fd).st_size} bytes; it had {self._size} when it was opened")
            at, view = at + got, view[got:]

    def _check_unchanged(self, row: int) -> None:
        info = os.fstat(self._fd)
        if info.st_size != self._size:
            raise OSError(errno.EIO, f"tier file: {self._path}: the file has {info.st_size} bytes; it had {self._size} when it "
                                     f"was opened; row {row} is not what it was")
        if info.st_mtime_ns != self._changed_ns:
            raise OSError(errno.EIO, f"tier file: {self._path}: the file was written to after it was opened; row {row} may not "
                                     "be what it was")


def _settled_stat(fd: int) -> os.stat_result:
    """The state of a file from which every later write differs: see csrc/table/file_state.h."""
    for _ in range(50):
        info, tick_ns = os.fstat(fd), time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
        if not tick_ns <= info.st_mtime_ns <= tick_ns + 10**9:
            break
        time.sleep(1e-3)
    return info


class PythonFileTier:
    """The contract of csrc/table/file_tier.h without a cache: each row is one read."""

    def __init__(self, reader: PythonFileReader, rows: FileExtent, scales: FileExtent):
        self._reader, self._extents = reader, [e for e in (rows, scales) if e[2] > 0]
        self._rows = 0

    def fetch(self, row_ids: Any, rows_out: Any, scales_out: Any = None) -> None:
        """Fills the outputs with the rows at distinct `row_ids` (int64)."""
        for extent, out in zip(self._extents, (rows_out, scales_out), strict=False):
            self._reader.read_rows(*extent, row_ids, out)
        self._rows += np.asarray(row_ids).size

    def stats(self) -> dict[str, Any]:
        """Counters of all fetches that succeeded, and how the file is read."""
        payload = self._rows * sum(e[2] for e in self._extents)
        return {"rows": self._rows, "cache_hits": 0, "file_rows": self._rows, "payload_bytes": payload, "moved_bytes": payload,
                "reads": self._rows * len(self._extents), "cache_slots": 0, "cached_rows": 0, "io": "python", "direct": False,
                "queue_depth": 1}


def make_reader(fd: int, path: str, queue_depth: int = 64, io: str = "auto") -> Any:
    """A reader of the file behind `fd`, which may be closed afterwards."""
    if COMPILE_ERROR:
        return PythonFileReader(fd, path, queue_depth, io)
    from engram_kernels import _C
    return _C.FileReader(fd, path, queue_depth, io)
