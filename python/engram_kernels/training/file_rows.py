"""A table in a file that is trained, its moments in a file beside it, and a journal of steps in front of both."""
from __future__ import annotations

import atexit
import contextlib
import errno
import os
import secrets
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram_kernels._files import naming_path, write_all
from engram_kernels._library import need_compiled
from engram_kernels.ops.row_update import update_named
from engram_kernels.table.file_reader import make_reader
from engram_kernels.table.held_tables import HeldTable
from engram_kernels.table.row_ids import check_row_ids, expect_row_ids
from engram_kernels.table.row_table import RowTable
from engram_kernels.table.safetensors_file import Extent, atomic_writer, open_regular, read_bytes
from engram_kernels.table.shared_table import fingerprint
from engram_kernels.table.table_file import TableFile
from engram_kernels.training.optimizer_state import (
    PROGRESS,
    PROGRESS_BYTES,
    bytes_of,
    checked_progress,
    described,
    encode_progress,
    expect_same_table,
    read_state,
    take_over,
)
from engram_kernels.training.step_journal import HEADER_BYTES, StepJournal, journal_path

if TYPE_CHECKING:
    from engram_kernels.training.row_optimizer import RowOptimizer

_PIECE_BYTES = 64 << 20
_open: weakref.WeakSet[FileRows] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:  # later, when modules are gone, torch aborts the process
    with contextlib.ExitStack() as stack:
        for file in list(_open):
            stack.callback(file.close)


def _leave_all_to_parent() -> None:
    for file in list(_open):
        file.leave_to_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_all_to_parent)


class _Array:
    """Rows, or one moment of each row, in one of the files."""

    def __init__(self, extent: Extent, dtype: torch.dtype, reader: Any, writer: Any):
        self.dtype, self.shape, self.offset, self.reader, self.writer = dtype, extent.shape, extent.offset, reader, writer
        self.row_bytes = extent.num_bytes // extent.shape[0]

    def read(self, row_ids: Tensor) -> Tensor:
        """The entries of distinct rows, in the order of the ids."""
        out = torch.empty(row_ids.numel(), *self.shape[1:], dtype=self.dtype, device="cpu")
        self.reader.read_rows(self.offset, self.row_bytes, self.row_bytes, self.shape[0], row_ids.numpy(), bytes_of(out))
        return out

    def write(self, row_ids: Tensor, data: Any) -> None:
        """Writes the entries of distinct rows, in the order of the ids."""
        self.writer.write(self.offset, self.row_bytes, self.shape[0], row_ids.numpy(), data)


class FileRows:
    """Steps of an optimizer on a table file.

    A step reads the rows and moments that it updates, computes them, appends them to the journal, and only then writes them to
    the two files. A process that is killed at any moment leaves files that the next one brings to the end of the last step
    whose record is whole.

    What is synced: with `durable` each record before the files are touched, so that a loss of power costs no step that was begun
    on them; the files themselves when the journal is longer than `journal_bytes`, and at the end, before it is shortened. Without
    `durable` the system decides when: then a process may die at any moment, the machine may not.

    Ownership: the lock of the table file, two descriptors, the journal. Threads: one at a time. Failure: OSError names the file.
    A step that could not be journaled was not taken; one that could not be written to the files was, and `make_whole` writes it.
    """

    def __init__(self, op: str, optimizer: RowOptimizer, state: Path, journal_bytes: int, durable: bool):
        need_compiled("training a table in a file")
        from engram_kernels import _C
        self.op, self.optimizer, self.table, self.state, self.journal_bytes, self.durable = (
            op, optimizer, optimizer.table, Path(os.path.abspath(state)), journal_bytes, durable)
        state = self.state
        path = _single_file(op, self.table)
        self._held = HeldTable(op, None, path)
        self._state_fd, self._unwritten, self.syncs = -1, False, 0
        self._writers: list[Any] = []
        self._readers: tuple[Any, ...] = ()
        self._process, self._last = os.getpid(), {"writes": 0, "bytes": 0}
        try:
            _expect_same_file(op, self.table, self._held.fd, path)
            _expect_one_name(op, self._held.fd, path)
            if not state.exists():
                self._make_state()
            os.close(open_regular(state, op))  # refuses what is no file, and does not wait for a pipe
            self._state_held = HeldTable(op, None, state)
            self._state_fd = self._state_held.fd
            _expect_one_name(op, self._state_fd, state)
            header, progress = read_state(op, self._state_fd, state, optimizer)
            io = self.table.io_stats()["io"]
            writers = [_C.RowWriter(fd, str(where), io) for fd, where in ((self._held.fd, path), (self._state_fd, state))]
            reader = make_reader(self._state_fd, str(state), io=f"{io}_buffered")
            file = _file_of(self.table)
            stored = zip((file.rows, file.scales), (self.table.rows, self.table.scales), strict=True)
            self.stored = [_Array(extent, like.dtype, file.reader, writers[0])  # rows, and scales where there are any
                           for extent, like in stored if extent is not None and like is not None]
            self.moments = {name: _Array(header.extents[name], dtype, reader, writers[1])
                            for name, (dtype, _) in optimizer.moment_shapes().items()}
            self._progress_at, self._readers, self._writers = header.extents[PROGRESS].offset, (file.reader, reader), writers
            self.journal = StepJournal(op, journal_path(path), header.metadata.get("id", ""))
            self.io = str(writers[0].io)  # how rows are written back: "io_uring" or "pwrite"
            self._recover(progress)
            _open.add(self)
        except BaseException:
            self.abandon()
            raise

    def stats(self) -> dict[str, Any]:
        """How rows are written back, and how much was."""
        if not self._writers:
            return {"io": self.io, **self._last, "syncs": self.syncs, "durable": self.durable, "journal_bytes": 0}
        return {"io": self.io, "writes": sum(w.writes for w in self._writers), "bytes": sum(w.bytes for w in self._writers),
                "syncs": self.syncs, "durable": self.durable, "journal_bytes": self.journal.end}

    def _make_state(self) -> None:
        """A state file of an optimizer that has taken no step: zeros."""
        optimizer = self.optimizer
        tensors, metadata = described(optimizer.settings, optimizer.moment_shapes())
        with atomic_writer(self.state, tensors, {**metadata, "id": secrets.token_hex(16)}, op=self.op) as writer:
            writer.write(PROGRESS, 0, self._progress(0, optimizer.param_groups[0]))

    def _progress(self, num_steps: int, group: Mapping[str, Any]) -> bytes:
        return encode_progress(self.op, num_steps, group, {"fingerprint": fingerprint(self.table)})

    def _recover(self, progress: dict[str, Any]) -> None:
        """Writes what the journal has; the files are those of a step then."""
        if self.journal.is_new:
            expect_same_table(self.op, self.state, progress, self.table, thorough=False)
        for _step, count, body in self.journal.records():
            progress = self._write_record(count, body)
        self._accept_changes()
        self.checkpoint()
        take_over(self.optimizer, progress)

    def _write_record(self, count: int, body: bytes) -> dict[str, Any]:
        """Writes a record's rows, moments and progress to their files; its progress."""
        view = memoryview(bytearray(body))
        ids = torch.frombuffer(view[:count * 8], dtype=torch.int64) if count else torch.empty(0, dtype=torch.int64, device="cpu")
        at = count * 8
        for array in (*self.stored, *self.moments.values()):
            if count:
                array.write(ids, view[at:at + count * array.row_bytes])
            at += count * array.row_bytes
        text = bytes(view[at:at + PROGRESS_BYTES])
        write_all(self._state_fd, text, self._progress_at)
        return checked_progress(self.op, self.journal.path, text)

    def step(self, row_ids: Tensor, grad_rows: Tensor, rates: Mapping[str, Any], grad_scale: float | Tensor, num_steps: int,
             **options: Any) -> None:
        """Step `num_steps`; `options`: rule, step, rounding and seed as `row_update` takes them, and first_row."""
        self._expect_open()
        self.make_whole()
        distinct, local = _distinct_of(self.op, row_ids, self.table.num_rows)
        stored = [array.read(distinct) for array in self.stored]
        moments = {name: array.read(distinct) for name, array in self.moments.items()}
        first_row = options.pop("first_row")
        table = RowTable(stored[0], stored[1] if len(stored) > 1 else None, self.table.row_format, self.table.row_dim,
                         self.table.zero_scale_is_zero)
        update_named(table, local, grad_rows.detach().reshape(local.numel(), self.table.row_dim), distinct + first_row, **rates,
                     **options, grad_scale=grad_scale, second=moments.get("second"), first=moments.get("first"),
                     steps=moments.get("steps"))
        group = {**self.optimizer.param_groups[0], **rates}
        progress = encode_progress(self.op, num_steps, group, {})
        parts = [bytes_of(distinct), *(bytes_of(x) for x in (*stored, *moments.values())), progress]
        if self.journal.end > self.journal_bytes:
            self.checkpoint()
        try:
            self.journal.append(num_steps, distinct.numel(), parts, self.durable)
        except OSError as err:
            if err.errno not in (errno.ENOSPC, errno.EDQUOT) or self.journal.end == HEADER_BYTES:
                raise
            self.checkpoint()  # it may be the journal that fills the disk
            self.journal.append(num_steps, distinct.numel(), parts, self.durable)
        self.optimizer.num_steps = num_steps
        self._unwritten = True
        with naming_path(self.op, self.state, f"step {num_steps} is in the journal, but could not be written to its files"):
            self._write_parts(distinct, parts)

    def _write_parts(self, distinct: Tensor, parts: list[Any]) -> None:
        try:
            if distinct.numel():
                for array, part in zip((*self.stored, *self.moments.values()), parts[1:-1], strict=True):
                    array.write(distinct, part)
            write_all(self._state_fd, parts[-1], self._progress_at)
        finally:
            self._accept_changes()
        self._unwritten = False

    def make_whole(self) -> None:
        """Writes the journal's steps again where the last one could not be written. OSError: it still cannot."""
        if not self._unwritten:
            return
        try:
            for _step, count, body in list(self.journal.records()):
                self._write_record(count, body)
        finally:
            self._accept_changes()
        self._unwritten = False

    def checkpoint(self) -> None:
        """Brings both files to the disk and empties the journal."""
        self.make_whole()
        for writer in self._writers:
            writer.sync()
        self.syncs += 1
        self.journal.clear()

    def pieces(self, name: str) -> Iterator[Tensor]:
        """One moment of all rows, piece by piece."""
        self._expect_open()
        array = self.moments[name]
        count = max(_PIECE_BYTES // array.row_bytes, 1)
        for begin in range(0, array.shape[0], count):
            end = min(begin + count, array.shape[0])
            data = read_bytes(self._state_fd, array.offset + begin * array.row_bytes, (end - begin) * array.row_bytes)
            yield torch.frombuffer(bytearray(data), dtype=array.dtype).view(end - begin, *array.shape[1:])

    def close(self) -> None:
        """Ends training: both files are on disk, the state knows the table, the journal is gone. May be called again."""
        if self._state_fd < 0:
            return
        try:
            self.checkpoint()
            write_all(self._state_fd, self._progress(self.optimizer.num_steps, self.optimizer.param_groups[0]), self._progress_at)
            os.fsync(self._state_fd)
            self._accept_changes()
            self.journal.close(remove=True)
            del self.journal
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Closes what is open and leaves the journal for the next process."""
        if hasattr(self, "journal"):
            self.journal.close(remove=False)
            del self.journal
        if self._state_fd >= 0:
            self._state_held.release()
            self._state_fd = -1
        self._held.release()
        self._forget()

    def leave_to_parent(self) -> None:
        """In the child of a fork: forgets the files, whose locks the copies of their descriptors would keep."""
        if hasattr(self, "journal"):
            os.close(self.journal.fd)
            del self.journal
        self._state_fd = -1
        self._forget()

    def _forget(self) -> None:
        if self._writers:
            self._last = {"writes": sum(w.writes for w in self._writers), "bytes": sum(w.bytes for w in self._writers)}
        self._writers, self._readers, self.moments = [], (), {}
        self.stored = []

    def _expect_open(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(f"{self.op}: it was made before a fork, and the parent trains {self.state}; make one here when "
                               "that is closed")
        if self._state_fd < 0:
            raise RuntimeError(f"{self.op}: it is closed; make another one, which goes on from {self.state}")

    def _accept_changes(self) -> None:
        for reader in self._readers:
            reader.accept_changes()


def _distinct_of(op: str, row_ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Distinct rows, ascending, and the place of each id [n] among them, or -1. IndexError: an id is out of range."""
    expect_row_ids(op, row_ids, torch.device("cpu"))
    check_row_ids(op, row_ids, num_rows)
    ids = row_ids.reshape(-1).to(torch.int64)
    present = ids != -1
    distinct, places = torch.unique(ids[present], return_inverse=True)
    return distinct, torch.full_like(ids, -1).masked_scatter_(present, places)


def _file_of(table: RowTable) -> TableFile:
    assert isinstance(table._file, TableFile)  # its tier says so
    return table._file


def _single_file(op: str, table: RowTable) -> Path:
    """The file of a table that can be trained in it."""
    file = _file_of(table)
    assert file.rows_in is not None
    if len(file.rows_in.parts) != 1:
        raise ValueError(f"{op}: table lies in {len(file.rows_in.parts)} parts, expected one file, as RowTable.create writes it")
    scales = file.scales_in
    if scales is not None and (len(scales.parts) != 1 or scales.parts[0].path != file.rows_in.parts[0].path):
        raise ValueError(f"{op}: the scales of table lie in another file than its rows; expected one file, as of RowTable.create")
    if scales is not None and scales.extent.dtype in ("BF16", "F16"):
        raise ValueError(f"{op}: the scales of table are {scales.extent.dtype}, expected F32, which new scales are")
    if table.io_stats()["cache_slots"]:
        raise ValueError(f"{op}: table was opened with cache_bytes, whose rows would be of before a step; open it without")
    return Path(file.source[0])  # the file itself: its journal is found by whatever name the next process opens it


def _expect_same_file(op: str, table: RowTable, fd: int, path: Path) -> None:
    info = os.fstat(fd)
    if _file_of(table).source[1] != f"{info.st_dev}:{info.st_ino}":
        raise ValueError(f"{op}: {path} is another file than when the table was opened; open it again")


def _expect_one_name(op: str, fd: int, path: Path) -> None:
    names = os.fstat(fd).st_nlink
    if names > 1:
        raise ValueError(f"{op}: {path} has {names} names (hard links). Its journal is found by its name, and what is under the "
                         "others would change with it; expected a file of one name: copy it")
