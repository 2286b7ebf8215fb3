"""Which tables are held for training: any other write to them is refused, in this process and in others."""
from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

try:
    import fcntl
except ImportError:  # not on Windows, where the references run
    fcntl = None  # type: ignore[assignment]

_LOCKED_BYTE = 2**62  # of a lock that belongs to an open file, far behind its data
# writes of a killed process that the system still does keep the lock; they must not land behind those of the next one
_DYING_S = 2.0
_inside = threading.local()
_held: list[HeldTable] = []
_lock = threading.RLock()  # a table that is collected as garbage while it is held releases itself in the same thread


class HeldTable:
    """A table that one owner alone may write to, from `writing`.

    Ownership: memory is known by its address, a file by a lock of the system that goes with the process. Threads: any.

    Args:
        op: names the owner in errors.
        rows: the table's rows, where they are in memory; None: they are in a file.
        path: the file, which is locked for writing, or None.

    Raises:
        ValueError: another owner in this process holds rows of the same memory.
        OSError: another process, or owner, holds the file, or it cannot be opened for writing; names the path.
    """

    def __init__(self, op: str, rows: Tensor | None, path: Path | None = None):
        self.op, self.fd = op, -1
        self._span = (0, 0) if rows is None else _span_of(rows)
        self._is_shared = rows is not None and rows.is_cpu and rows.is_shared()
        if path is not None:
            self.fd = _lock_file(op, path)
        with _lock:
            if any(_meet(self._span, other._span) for other in _held):
                raise ValueError(f"{op}: table is held by a TrainableRows already, which alone writes to it; close that one "
                                 "first")
            _held.append(self)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """In the block this thread may write to the table."""
        before, _inside.table = getattr(_inside, "table", None), self
        try:
            yield
        finally:
            _inside.table = before

    def release(self) -> None:
        """Lets others write again. May be called again."""
        with _lock:
            if self in _held:
                _held.remove(self)
            fd, self.fd = self.fd, -1
        if fd >= 0:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock_of(fcntl.F_UNLCK))  # copies of the descriptor hold it, too
            os.close(fd)


def _leave_to_parent() -> None:
    """In the child of a fork: the parent goes on with its files and shared memory. The child's copies of descriptors would keep
    the locks when the parent has ended; its private memory is nobody else's."""
    global _lock
    _lock = threading.RLock()
    for table in list(_held):
        if table.fd >= 0:
            os.close(table.fd)
            table.fd = -1
        if not table._is_shared:
            _held.remove(table)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def expect_not_held(op: str, rows: Tensor) -> None:
    """Raises ValueError where `rows` are held for training and this thread is not their owner's."""
    if not _held or rows.numel() == 0:
        return
    span = _span_of(rows)
    with _lock:
        found = [table for table in _held if _meet(span, table._span)]
    if found and getattr(_inside, "table", None) is not found[0]:
        raise ValueError(f"{op}: table is held by a {found[0].op}, which alone writes to it: rows in flight would be torn or "
                         "stale; use its step, or close it first")


def _span_of(rows: Tensor) -> tuple[int, int]:
    begin = rows.data_ptr()
    extent = 1 + sum((n - 1) * stride for n, stride in zip(rows.shape, rows.stride(), strict=True)) if rows.numel() else 0
    return (begin, begin + extent * rows.element_size())


def _meet(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _lock_of(kind: int) -> bytes:
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, _LOCKED_BYTE, 1, 0)


def _lock_file(op: str, path: Path) -> int:
    """A descriptor for reading and writing that holds the lock of the file while it is open."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as err:
        raise OSError(err.errno, f"{op}: it cannot be opened for writing: {err.strerror}", str(path)) from None
    deadline = time.monotonic() + _DYING_S
    while True:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock_of(fcntl.F_WRLCK))
            return fd
        except OSError as err:
            if time.monotonic() < deadline:
                time.sleep(0.01)
                continue
            os.close(fd)
            raise OSError(err.errno, f"{op}: another process, or this one, has it open for training", str(path)) from None
