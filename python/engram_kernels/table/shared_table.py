"""One copy of a table for all processes of a machine: the work behind `RowTable.share`, `attach` and `unlink_stale`."""
from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram_kernels import capacity
from engram_kernels._files import write_all
from engram_kernels._terminal import Progress, no_progress
from engram_kernels.row_format import ROW_FORMATS, check_tensors
from engram_kernels.table import shared_segment
from engram_kernels.table.host_memory import TableLayout, make_host_memory, memory_stats
from engram_kernels.table.shared_segment import DATA_OFFSET, Manifest
from engram_kernels.table.staging import where_stored

if TYPE_CHECKING:
    from engram_kernels.table.row_table import RowTable

DIRECTORY = "/dev/shm"
_FILL_BYTES = 1 << 20  # copied at a time by a thread: from a cache
_MAX_FILL_THREADS = 4
_SAMPLE_ROWS = 1024
_REMEDY = ("enlarge it (mount -o remount,size=.. /dev/shm; docker run --shm-size=..), remove what nobody uses "
           "(RowTable.unlink_stale()), or name another directory of tmpfs (directory=)")


@dataclasses.dataclass(frozen=True)
class SharedMemory:
    """Where the rows of a shared table are."""

    host: Any
    fd: int
    path: Path

    @property
    def name(self) -> str:
        """The name that it is shared by."""
        return self.path.name.removeprefix(shared_segment.PREFIX)

    def num_users(self) -> int | None:
        """Processes, and tables within one, that use it."""
        return shared_segment.num_users(self.fd)


def stats_of(memory: Any) -> dict[str, Any]:
    """`RowTable.memory_stats`."""
    if not isinstance(memory, SharedMemory):
        return {} if memory is None else memory_stats(memory)
    return dict(memory_stats(memory.host), name=memory.name, users=memory.num_users())


def fingerprint(table: RowTable) -> str:
    """What tells one table from another: a hash of shape, format and 1,024 rows spread evenly, first and last among them."""
    num_rows, count = table.num_rows, min(table.num_rows, _SAMPLE_ROWS)
    ids = torch.arange(count, dtype=torch.int64, device="cpu")
    ids = ids if count < 2 else ids * (num_rows - 1) // (count - 1)
    described = [table.row_format, table.row_dim, num_rows, table.rows.shape[1], bool(table.zero_scale_is_zero)]
    if ROW_FORMATS[table.row_format].has_table_scale:
        described.append(table.table_scale)
    digest = hashlib.blake2b(json.dumps(described).encode(), digest_size=16)
    for stored in table.read_rows(ids.to(where_stored(table))):
        if stored is not None:
            digest.update(stored.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(table: RowTable) -> Manifest:
    """The manifest of a table."""
    layout = TableLayout.of(table.row_format, table.num_rows, table.rows.shape[1], table.row_dim)
    return Manifest(table.row_format, table.row_dim, table.num_rows, table.rows.shape[1], bool(table.zero_scale_is_zero),
                    layout.num_bytes, fingerprint(table), table.table_scale,
                    *(table._file.source if table._file is not None else ()))


def share(table: RowTable, name: str, timeout_s: float, placed: tuple[int | None, str], progress: Progress | None) -> RowTable:
    """Fills a segment with the rows of `table`, or joins the one that holds them already. Arguments: `RowTable.share`; `placed`:
    its `numa` and `directory`."""
    op, (numa, directory) = "RowTable.share", placed
    path = shared_segment.segment_path(op, name, directory)
    if table._file is None:  # a module may have converted them since the table was made
        check_tensors(op, table.rows, table.scales, table.row_format, table.row_dim, table.device)
    wanted = describe(table)
    unlink_stale(directory)  # what crashed processes left takes the memory that is needed now
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fd = shared_segment.create(op, path, wanted)
        except FileExistsError:
            if shared_segment.remove_stale(path):
                continue
            try:
                return _join(op, type(table), path, wanted, (max(deadline - time.monotonic(), 0), False))
            except (FileNotFoundError, shared_segment.HalfWritten) as err:
                # its last user left, or its maker died: now it is ours to fill, as soon as others have seen so too
                if time.monotonic() >= deadline + shared_segment.GRACE_S:
                    raise TimeoutError(errno.ETIMEDOUT, f"{err}; yet a process keeps it locked", str(path)) from None
                time.sleep(shared_segment.POLL_S)
                continue
            except shared_segment.NotOurs as err:
                raise FileExistsError(errno.EEXIST, f"{err}; remove it, or share by another name", str(path)) from None
            except ValueError as err:
                raise FileExistsError(errno.EEXIST, f"{err}; another table is in use by this name", str(path)) from None
        try:
            _fill(op, table, fd, path, numa, progress or no_progress)
            shared_segment.write_manifest(fd, wanted, ready=True)
        except BaseException:
            shared_segment.release(fd, path)
            raise
        # exclusive to shared; where that is not one step, someone may have taken it for a dead one's
        if shared_segment.downgrade(fd, path):
            return _map(op, type(table), fd, path, wanted)


class _Filler:
    """Copies a table into a segment, piece by piece on a few threads: by writing to the file, which takes small pages faster than
    faults do; or through the mapping, where the file system gives huge pages to faults."""

    def __init__(self, op: str, table: RowTable, fd: int, path: Path, host: Any):
        self._op, self._table, self._fd, self._path, self._host = op, table, fd, path, host
        self._layout = TableLayout.of(table.row_format, table.num_rows, table.rows.shape[1], table.row_dim)
        self._rows, self._scales = self._layout.views(host)
        if self._scales is not None and self._scales.dim() == 1:
            if table.scales is not None:
                self._scales.copy_(table.scales.detach())
            self._scales = None
        self._in_huge_pages = self._gets_huge_pages()
        self._stop = False

    def run(self, progress: Progress) -> None:
        step = max(_FILL_BYTES // max(self._table.row_bytes, 1), 1)
        begins = iter(range(0, self._table.num_rows, step))
        num_threads = min(len(os.sched_getaffinity(0)), _MAX_FILL_THREADS, -(-self._table.num_rows // step))
        with progress("share", self._table.num_rows) as advance, ThreadPoolExecutor(max(num_threads, 1)) as pool:
            running = [pool.submit(self._take_pieces, begins, step, advance) for _ in range(num_threads)]
            try:
                while running:
                    running.pop().result()  # a failure that this frame held would hold the mapping in a cycle
            finally:
                self._stop = True
                running.clear()

    def _take_pieces(self, begins: Iterator[int], step: int, advance: Callable[[int], None]) -> None:
        try:
            parts = [(x, x.new_empty(step, x.shape[1]), at) for x, at in
                     ((self._rows, 0), (self._scales, self._layout.scales_offset)) if x is not None]
            for begin in begins:
                if self._stop:
                    return
                end = min(begin + step, self._table.num_rows)
                self._copy(begin, end, parts)
                advance(end - begin)
        except BaseException:
            self._stop = True  # the others need not go on; not where no piece is left: one of them may have just taken the last
            raise

    def _copy(self, begin: int, end: int, parts: list[tuple[Tensor, Tensor, int]]) -> None:
        ranges = [(at + begin * x[0].nbytes, (end - begin) * x[0].nbytes) for x, _, at in parts]
        if self._in_huge_pages:
            for offset, num_bytes in ranges:
                self._host.populate(offset, num_bytes)  # a page that is missing is an error here, and a signal later
        outs = [x[begin:end] if self._in_huge_pages else piece[:end - begin] for x, piece, _ in parts]
        _copy_rows(self._table, begin, end, outs[0], outs[1] if len(outs) > 1 else None)
        if self._in_huge_pages:
            return
        try:
            for out, (offset, _) in zip(outs, ranges, strict=True):
                write_all(self._fd, memoryview(out.view(torch.uint8).view(-1).numpy().data), DATA_OFFSET + offset)
        except OSError as err:
            message = f"{self._op}: rows {begin}..{end} cannot be written: {err.strerror}"
            raise OSError(err.errno, message, str(self._path)) from None

    def _gets_huge_pages(self) -> bool:
        """Whether the first page that a fault brings is a huge one."""
        if self._host.pages != "transparent":
            return False
        try:
            self._host.populate(0, 1)
        except OSError:  # an old kernel; or no room at all, as the first write will say
            return False
        return os.fstat(self._fd).st_blocks * 512 >= capacity.HUGE_PAGE_BYTES


def _fill(op: str, table: RowTable, fd: int, path: Path, numa: int | None, progress: Progress) -> None:
    layout = TableLayout.of(table.row_format, table.num_rows, table.rows.shape[1], table.row_dim)
    what, num_bytes = f"a table of {table.num_rows} rows of {table.row_bytes} bytes", layout.num_bytes
    capacity.check_directory(op, what, num_bytes + shared_segment.HEADER_BYTES, path.parent, _REMEDY)
    capacity.check_memory(op, what, num_bytes)
    os.ftruncate(fd, DATA_OFFSET + num_bytes)
    _Filler(op, table, fd, path, make_host_memory(num_bytes, numa, fd, DATA_OFFSET)).run(progress)  # placed before a page is
    try:
        os.posix_fallocate(fd, DATA_OFFSET, num_bytes)  # what no row covers too: a page that is missing later would be a signal
    except OSError as err:
        raise OSError(err.errno, f"{op}: {num_bytes} bytes cannot be reserved: {err.strerror}", str(path)) from None


def _copy_rows(table: RowTable, begin: int, end: int, rows: Tensor, scales: Tensor | None) -> None:
    if table._file is not None:
        table._file.read_span(begin, rows, scales)
        return
    rows.copy_(table.rows.detach()[begin:end])
    if scales is not None and table.scales is not None:
        scales.copy_(table.scales.detach()[begin:end])


def attach(cls: type[RowTable], name: str, wanted: RowTable | str | None, timeout_s: float, directory: str) -> RowTable:
    """The table of a segment, verified. Arguments: `RowTable.attach`; `wanted` is `like`, or the fingerprint."""
    op = "RowTable.attach"
    path = shared_segment.segment_path(op, name, directory)
    expected = wanted if wanted is None or isinstance(wanted, str) else describe(wanted)
    return _join(op, cls, path, expected, (timeout_s, True))


def _join(op: str, cls: type[RowTable], path: Path, wanted: Manifest | str | None, wait: tuple[float, bool]) -> RowTable:
    """Joins the segment at `path`, checked; `wait` has the last two arguments of `shared_segment.join`."""
    fd, manifest = shared_segment.join(op, path, *wait)
    try:
        _expect_same(op, path, manifest, wanted)
    except BaseException:
        shared_segment.release(fd, path)
        raise
    return _map(op, cls, fd, path, manifest)


def _expect_same(op: str, path: Path, manifest: Manifest, wanted: Manifest | str | None) -> None:
    if isinstance(wanted, str):
        different = {} if manifest.fingerprint == wanted else {"fingerprint": (manifest.fingerprint, wanted)}
    else:
        different = {} if wanted is None else {
            name: (getattr(manifest, name), getattr(wanted, name))
            for name in ("row_format", "row_dim", "num_rows", "width", "zero_scale_is_zero", "table_scale", "fingerprint")
            if getattr(manifest, name) != getattr(wanted, name)}
        if wanted is not None and not different and _is_other_revision(manifest, wanted):
            different = {"the file": (_source_of(manifest), _source_of(wanted))}
    if different:
        if len(different) > 1:
            different.pop("fingerprint", None)  # follows from the others
        raise ValueError(f"{op}: {path} holds another table: "
                         + ", ".join(f"{name} is {got}, expected {want}" for name, (got, want) in different.items())
                         + f" (shared by {manifest.owner()})")


def _is_other_revision(a: Manifest, b: Manifest) -> bool:
    """Whether both come from one path, or one file, at different times: rows that the fingerprint does not see may differ."""
    if not (a.source_path and b.source_path):
        return False
    is_same = a.source_path == b.source_path or a.source_file == b.source_file
    return is_same and (a.source_file, a.source_changed_ns) != (b.source_file, b.source_changed_ns)


def _source_of(manifest: Manifest) -> str:
    return (f"{manifest.source_path} (device and inode {manifest.source_file}, changed at "
            f"{manifest.source_changed_ns / 1e9:.6f})")


def _map(op: str, cls: type[RowTable], fd: int, path: Path, manifest: Manifest) -> RowTable:
    """Maps a segment for reading. From here on its lock lives as long as the memory."""
    try:
        host = make_host_memory(manifest.num_bytes, None, fd, DATA_OFFSET, read_only=True)
    except BaseException:
        shared_segment.release(fd, path)
        raise
    weakref.finalize(host, shared_segment.release, fd, path, os.getpid())
    rows, scales = TableLayout.of(manifest.row_format, manifest.num_rows, manifest.width, manifest.row_dim).views(host)
    table = cls(rows, scales, manifest.row_format, manifest.row_dim, manifest.zero_scale_is_zero,
                _memory=SharedMemory(host, fd, path), table_scale=manifest.table_scale)
    found = fingerprint(table)
    if found != manifest.fingerprint:
        raise ValueError(f"{op}: {path} holds rows with fingerprint {found}, its manifest says {manifest.fingerprint}: they were "
                         "written to, or damaged")
    return table


def unlink_stale(directory: str) -> list[str]:
    """Removes the segments that no process uses; their names."""
    removed = []
    try:
        paths = sorted(Path(directory).glob(f"{shared_segment.PREFIX}*"))
    except OSError:
        return []
    for path in paths:
        if shared_segment.remove_stale(path):
            removed.append(path.name.removeprefix(shared_segment.PREFIX))
    return removed
