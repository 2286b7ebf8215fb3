"""One copy of a table for all processes of a machine: the work behind `RowTable.share`, `attach` and `unlink_stale`."""
from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram_kernels.memory import capacity, shared_segment
from engram_kernels.memory.host_table import TableLayout, make_host_table
from engram_kernels.memory.shared_segment import DATA_OFFSET, Manifest

if TYPE_CHECKING:
    from engram_kernels.memory.row_table import RowTable

DIRECTORY = "/dev/shm"
_FILL_BYTES = 32 << 20  # copied at a time
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


def fingerprint(table: RowTable) -> str:
    """What tells one table from another: a hash of shape, format and 1,024 rows spread evenly, first and last among them."""
    num_rows, count = table.num_rows, min(table.num_rows, _SAMPLE_ROWS)
    ids = torch.arange(count, dtype=torch.int64)
    ids = ids if count < 2 else ids * (num_rows - 1) // (count - 1)
    described = [table.row_format, table.row_dim, num_rows, table.rows.shape[1], bool(table.zero_scale_is_zero)]
    digest = hashlib.blake2b(json.dumps(described).encode(), digest_size=16)
    for stored in table.read_rows(ids.to(table.device)):
        if stored is not None:
            digest.update(stored.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(table: RowTable) -> Manifest:
    """The manifest of a table."""
    layout = TableLayout.of(table.row_format, table.num_rows, table.rows.shape[1], table.row_dim)
    return Manifest(table.row_format, table.row_dim, table.num_rows, table.rows.shape[1], bool(table.zero_scale_is_zero),
                    layout.num_bytes, fingerprint(table))


def share(table: RowTable, name: str, timeout_s: float, numa: int | None, directory: str) -> RowTable:
    """Fills a segment with the rows of `table`, or joins the one that holds them already. Arguments: `RowTable.share`."""
    op = "RowTable.share"
    path = shared_segment.segment_path(op, name, directory)
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
            _fill(op, table, fd, path, numa)
            shared_segment.write_manifest(fd, wanted, ready=True)
        except BaseException:
            shared_segment.release(fd, path)
            raise
        # exclusive to shared; where that is not one step, someone may have taken it for a dead one's
        if shared_segment.downgrade(fd, path):
            return _map(op, type(table), fd, path, wanted)


def _fill(op: str, table: RowTable, fd: int, path: Path, numa: int | None) -> None:
    layout = TableLayout.of(table.row_format, table.num_rows, table.rows.shape[1], table.row_dim)
    what, num_bytes = f"a table of {table.num_rows} rows of {table.row_bytes} bytes", layout.num_bytes
    capacity.check_directory(op, what, num_bytes + shared_segment.HEADER_BYTES, path.parent, _REMEDY)
    capacity.check_memory(op, what, num_bytes)
    os.ftruncate(fd, DATA_OFFSET + num_bytes)
    host = make_host_table(num_bytes, numa, fd, DATA_OFFSET)  # placed before there is a page
    try:
        os.posix_fallocate(fd, DATA_OFFSET, num_bytes)  # a page that is missing later would be a signal
    except OSError as err:
        raise OSError(err.errno, f"{op}: {num_bytes} bytes cannot be reserved: {err.strerror}", str(path)) from None
    rows, scales = layout.views(host)
    if scales is not None and scales.dim() == 1 and table.scales is not None:
        scales.copy_(table.scales.detach())
    step = max(_FILL_BYTES // max(table.row_bytes, 1), 1)
    for begin in range(0, table.num_rows, step):
        end = min(begin + step, table.num_rows)
        _copy_rows(table, begin, end, rows[begin:end], None if scales is None or scales.dim() == 1 else scales[begin:end])


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
    """`wait`: the last two arguments of `shared_segment.join`."""
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
            for name in ("row_format", "row_dim", "num_rows", "width", "zero_scale_is_zero", "fingerprint")
            if getattr(manifest, name) != getattr(wanted, name)}
    if different:
        if len(different) > 1:
            different.pop("fingerprint", None)  # follows from the others
        raise ValueError(f"{op}: {path} holds another table: "
                         + ", ".join(f"{name} is {got}, expected {want}" for name, (got, want) in different.items())
                         + f" (shared by {manifest.owner()})")


def _map(op: str, cls: type[RowTable], fd: int, path: Path, manifest: Manifest) -> RowTable:
    """Maps a segment for reading. From here on its lock lives as long as the memory."""
    try:
        host = make_host_table(manifest.num_bytes, None, fd, DATA_OFFSET, read_only=True)
    except BaseException:
        shared_segment.release(fd, path)
        raise
    weakref.finalize(host, shared_segment.release, fd, path, os.getpid())
    rows, scales = TableLayout.of(manifest.row_format, manifest.num_rows, manifest.width, manifest.row_dim).views(host)
    table = cls(rows, scales, manifest.row_format, manifest.row_dim, manifest.zero_scale_is_zero,
                _memory=SharedMemory(host, fd, path))
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
