"""Rows of an open file by index: the compiled reader, or its stand-in where the compiled module is missing."""
import errno
import os
from typing import Any

import numpy as np

from engram_kernels._library import COMPILE_ERROR


class PythonFileReader:
    """The contract of csrc/memory/file_reader.h on one thread: pread, never a memory map; a file that changed is an error.

    Args:
        fd: descriptor of the file; duplicated.
        path: for messages.
        max_threads: not used.
    """

    def __init__(self, fd: int, path: str, max_threads: int = 1):
        info = os.fstat(fd)
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
        self._check_unchanged()

    def _read_exactly(self, view: memoryview, at: int, row: int) -> None:
        end = at + len(view)
        while len(view) > 0:
            try:
                got = os.preadv(self._fd, [view], at)
            except OSError as err:
                raise OSError(err.errno, f"{self._path}: row {row} at byte {at} cannot be read: {err.strerror}") from None
            if got == 0:
                raise OSError(errno.EIO, f"{self._path}: row {row} ends at byte {end}, but the file has "
                                         f"{os.fstat(self._fd).st_size} bytes; it had {self._size} when it was opened")
            at, view = at + got, view[got:]

    def _check_unchanged(self) -> None:
        info = os.fstat(self._fd)
        if info.st_size != self._size:
            raise OSError(errno.EIO, f"{self._path}: the file has {info.st_size} bytes; it had {self._size} when it was opened")
        if info.st_mtime_ns != self._changed_ns:
            raise OSError(errno.EIO, f"{self._path}: the file was written to after it was opened")


def make_reader(fd: int, path: str) -> Any:
    """A reader of the file behind `fd`, which may be closed afterwards."""
    if COMPILE_ERROR:
        return PythonFileReader(fd, path)
    from engram_kernels import _C
    return _C.FileReader(fd, path)
