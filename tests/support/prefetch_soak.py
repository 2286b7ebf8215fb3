"""A process of its own that does nothing but submit and wait, and prints what it holds meanwhile: `prefetch_soak.py WAY COUNT`.

One line of JSON: samples of [bytes in use, resident bytes, descriptors, threads], and what the prefetcher counted. Bytes in use
are those of glibc, exact, whatever other parts of the process are resident; PYTHONMALLOC=malloc makes Python's objects count.
"""
import ctypes
import gc
import json
import os
import sys
import tempfile
from pathlib import Path

from prefetch_cases import TIMEOUT_S, WAYS, make_ids, make_rows, num_threads, prefetcher

from engram_kernels import RowTable

ROW_FORMAT, SAMPLES, DEPTH = "fp8_e4m3_block32", 10, 8


class MallInfo2(ctypes.Structure):
    """struct mallinfo2 of glibc's malloc.h."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def sample(libc):
    gc.collect()
    info = libc.mallinfo2()
    with open("/proc/self/statm") as f:
        resident = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return info.uordblks + info.hblkhd, resident, len(os.listdir("/proc/self/fd")), num_threads()


def make_table(tier, folder):
    rows, scales = make_rows(ROW_FORMAT)
    if tier == "host":
        return RowTable.from_tensor(rows, scales, row_format=ROW_FORMAT)
    RowTable.create(Path(folder) / "table.safetensors", rows, scales, ROW_FORMAT)
    return RowTable.open(Path(folder) / "table.safetensors", cache_bytes=1 << 15)


def main(way, count):
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallInfo2
    with tempfile.TemporaryDirectory() as folder, prefetcher(make_table(WAYS[way][0], folder), way, depth=DEPTH) as pf:
        ids, samples = make_ids(24), []
        for _ in range(SAMPLES):
            for _ in range(count // SAMPLES // DEPTH):  # as many in flight as may be
                tickets = [pf.submit(ids) for _ in range(DEPTH)]
                for ticket in tickets:
                    pf.wait(ticket, timeout_s=TIMEOUT_S)
            samples.append(sample(libc))
        print(json.dumps(dict(samples=samples, requests=pf.stats()["requests"], left=len(pf._submitted))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
