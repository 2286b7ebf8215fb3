"""Random reads of a file past the page cache, by size and queue depth: what a table on disk costs."""
from __future__ import annotations

import errno
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from engram_kernels._library import COMPILE_ERROR
from engram_kernels.profile.cells import JsonCell, Skip
from engram_kernels.profile.session import Session
from engram_kernels.table.file_reader import make_reader

KIB, MIB = 1 << 10, 1 << 20
SECONDS = {"quick": 7, "full": 90}
_FILE_BYTES = {"quick": 256 * MIB, "full": 4096 * MIB}
_WRITE_SECONDS = {"quick": 2.0, "full": 30.0}
_CONTROL_BYTES, _CONTROL_READS = 4 * KIB, 4
_LEAST_BYTES = 32 * MIB
_FREE_SHARE = 8  # the file takes at most this part of the free space
_PIECE_BYTES = 8 * MIB
_IN_MEMORY = ("tmpfs", "ramfs")
_SIZES, _DEPTHS = (4 * KIB, 16 * KIB, 64 * KIB), (1, 8, 64)
_FULL_SIZES, _FULL_DEPTHS = (4 * KIB, 8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB), (1, 4, 16, 64, 256)


def run_disk_probes(session: Session) -> None:
    """The one probe of the disk."""
    mode = session.options.mode
    points = (_SIZES, _DEPTHS) if session.quick else (_FULL_SIZES, _FULL_DEPTHS)
    with session.probe("disk_read", SECONDS[mode]), scratch_file(session, _FILE_BYTES[mode], _WRITE_SECONDS[mode]) as file:
        read(session, *file, *points)


@contextmanager
def scratch_file(session: Session, most_bytes: int, most_seconds: float) -> Iterator[tuple[int, int]]:
    """A file without a name, full of noise; (descriptor, bytes). Its size and the time to write it are bounded.

    Raises:
        Skip: it cannot be written here.
    """
    folder = session.options.disk_folder
    kind = session.machine["disk"]["file_system"]
    if kind in _IN_MEMORY:
        raise Skip("NOT_SUPPORTED", f"the folder is a {kind}, which is memory and not a disk: name another with --disk-dir")
    try:
        free = shutil.disk_usage(folder).free
        wanted = min(most_bytes, free // _FREE_SHARE) // _PIECE_BYTES * _PIECE_BYTES
        if wanted < _LEAST_BYTES:
            raise Skip("NO_DISK_SPACE", f"{free // MIB} MiB are free; a file of an eighth of that is too small to measure")
        with tempfile.TemporaryFile(dir=folder) as file:  # unlinked at once
            yield file.fileno(), _fill(file.fileno(), wanted, most_seconds)
    except OSError as err:
        reason = {errno.EROFS: "READ_ONLY", errno.EACCES: "READ_ONLY", errno.EPERM: "READ_ONLY", errno.ENOSPC: "NO_DISK_SPACE",
                errno.EDQUOT: "NO_DISK_SPACE"}.get(err.errno or 0)
        if reason is None:
            raise
        raise Skip(reason, f"the disk probe cannot write its file: {err.strerror}") from None


def _fill(fd: int, wanted: int, max_seconds: float) -> int:
    """Writes noise until the file is large enough or the time is up; bytes written."""
    noise = np.random.default_rng(0).integers(0, 256, _PIECE_BYTES, dtype=np.uint8)
    begin, written = time.monotonic(), 0
    while written < wanted and (written < _LEAST_BYTES or time.monotonic() - begin < max_seconds):
        noise = np.roll(noise, 4099)  # no two blocks are the same
        written += os.write(fd, noise.data)
        os.fdatasync(fd)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return written // _PIECE_BYTES * _PIECE_BYTES


def read(session: Session, fd: int, num_bytes: int, sizes: Sequence[int], depths: Sequence[int]) -> None:
    """Cells by size of a read, in bytes, and queue depth; sets the peak "disk"."""
    if COMPILE_ERROR:
        raise Skip("NO_COMPILED_MODULE", COMPILE_ERROR)
    rng = np.random.default_rng(1)
    session.control = _single_reads(fd, num_bytes, np.random.default_rng(2))
    for depth in reversed(depths):
        reader, io = _direct_reader(fd, depth)
        for size in sizes:
            _measure_reads(session, reader, io, (size, depth, num_bytes), rng)


def _direct_reader(fd: int, depth: int) -> tuple[Any, str]:
    """A reader past the page cache, which "auto" does not choose for a small file, and how it reads.

    Raises:
        Skip: the file system has none.
    """
    why = ""
    for io in ("io_uring", "preadv"):
        try:
            reader = make_reader(fd, "profile", depth, io)
        except ValueError as err:
            why = str(err)
            continue
        if reader.tier((0, 4096, 4096, 1), (0, 0, 0, 0), 0).stats()["direct"]:
            return reader, io
        why = "the file system does not read past the page cache"
    raise Skip("NO_DIRECT_IO", why)


def _single_reads(fd: int, num_bytes: int, rng: np.random.Generator) -> Callable[[], float]:
    """Seconds of a few reads, one after the other: the piece of work that tells a slow disk from a slow kind of read."""
    reader, _ = _direct_reader(fd, 1)
    num_rows, out = num_bytes // _CONTROL_BYTES, np.ones(_CONTROL_READS * _CONTROL_BYTES, np.uint8)

    def seconds() -> float:
        ids = rng.choice(num_rows, _CONTROL_READS, replace=False)
        begin = time.perf_counter()
        reader.read_rows(0, _CONTROL_BYTES, _CONTROL_BYTES, num_rows, ids, out)
        return time.perf_counter() - begin

    return seconds


def _measure_reads(session: Session, reader: Any, io: str, point: tuple[int, int, int],
                   rng: np.random.Generator) -> None:
    size, depth, num_bytes = point
    num_rows = num_bytes // size
    reads = min(max(8 * depth, 32), 1024, num_rows // 2)
    out = np.ones(reads * size, np.uint8)
    # more sets than a round takes, so that none is read twice in a row
    turn = itertools.cycle([rng.choice(num_rows, reads, replace=False) for _ in range(16)])
    cell: JsonCell = {"probe": "disk_read", "op": io, "tier": "file", "placement": "file", "row_bytes": size,
                      "table_bytes": num_bytes, "rows": reads, "bytes": reads * size, "order": "uniform", "threads": 1,
                      "queue_depth": depth, "cold": True}

    def sample() -> float:
        ids = next(turn)
        begin = time.perf_counter()
        reader.read_rows(0, size, size, num_rows, ids, out)
        return time.perf_counter() - begin

    result = session.measure(cell, sample, min_rounds=5)
    if result["status"] == "ok":
        session.set_peak("file", result["bytes_per_s"], f"random reads of {size} bytes, {depth} in flight, in this run")
