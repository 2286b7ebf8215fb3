"""Memory to measure: anonymous, touched, with or without huge pages, and what the kernel really gave."""
from __future__ import annotations

import contextlib
import mmap
import re
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engram_kernels._library import COMPILE_ERROR
from engram_kernels.profile.cells import Skip

_HUGE_BYTES = 2 << 20
_PIECE_BYTES = 64 << 20
_SMAPS = Path("/proc/self/smaps")
_KEEP_BYTES = 512 << 20  # for everything that is no table


class Arena:
    """Anonymous memory that is all there.

    Attributes:
        data: uint8 vector, aligned to a huge page. The memory goes with the last view of it.
        huge_pages: whether the kernel gave huge pages for nearly all of it.

    Args:
        num_bytes: how much.
        huge_pages: whether they are asked for.
        cpus: whose threads touch it first; -1: any.
        node: the NUMA node that it comes from; None: that of the threads.
        fill: every byte; None: one byte per page is 1, the others 0.
        max_seconds: when touching takes longer, `data` ends where it had come to: a virtual machine may get its memory slowly.
    """

    def __init__(self, num_bytes: int, huge_pages: bool, cpus: list[int], node: int | None = None, *,
                 fill: int | None = None, max_seconds: float = 60.0):
        try:
            mapping = mmap.mmap(-1, num_bytes + _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as err:
            raise Skip("NO_MEMORY", f"{num_bytes >> 20} MiB cannot be mapped: {err}") from None
        with contextlib.suppress(OSError):  # a kernel without them: `huge_pages` tells
            mapping.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
        whole = np.frombuffer(mapping, dtype=np.uint8)
        start = -whole.ctypes.data % _HUGE_BYTES
        self.data = whole[start:start + num_bytes]
        if node is not None and not COMPILE_ERROR:
            from engram_kernels import _C
            _C.probe_bind(self.data, node)
        begin, there = time.monotonic(), 0
        while there < num_bytes and (there == 0 or time.monotonic() - begin < max_seconds):
            piece = self.data[there:there + _PIECE_BYTES]
            _touch(piece, cpus)
            if fill is not None:
                torch.from_numpy(piece).fill_(fill)  # by all threads; the pages stay where the first touch put them
            there += _PIECE_BYTES
        self.data = self.data[:min(there, num_bytes)]
        self.huge_pages = huge_page_bytes(self.data.ctypes.data) >= 0.9 * self.data.size


def _touch(piece: NDArray[np.uint8], cpus: list[int]) -> None:
    if COMPILE_ERROR:
        piece[::mmap.PAGESIZE] = 1
        return
    from engram_kernels import _C
    _C.probe_touch(piece, cpus)


def huge_page_bytes(address: int) -> int:
    """Bytes of the mapping around `address` that lie in huge pages; 0 where the system does not tell."""
    try:
        lines = _SMAPS.read_text().splitlines()
    except OSError:
        return 0
    inside = False
    for line in lines:
        if mapped := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(mapped[1], 16) <= address < int(mapped[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


def table_limit(free_bytes: int | None, wanted_max: int | None) -> int:
    """Bytes that a table may have: 80 % of what is free, less what else is needed, and no more than the user allows."""
    limit = 1 << 30 if free_bytes is None else max(int(0.8 * free_bytes) - _KEEP_BYTES, 0)
    return limit if wanted_max is None else min(limit, wanted_max)
