"""The file tier, cold, against raw reads of the same pages: io_uring at the same depth, and one after the other.

Packed rows of 264 bytes at random places of a file of EK_BENCH_FILE_MIB (default 2048), past the page cache (O_DIRECT), all
contenders; no row is asked for twice in a run. A contender of `native_peers.cpp` reads the page that each row begins in, one
page per row, so the tier does what they do and, for the rows that cross a page, more.

    python bench/bench_file_tier.py      all contenders in turn, round by round: what a disk that drifts does not tilt
"""
import contextlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_kernels._library import COMPILE_ERROR
from engram_kernels.table.row_table import RowTable
from harness import measure
from native import peers

pytestmark = pytest.mark.skipif(bool(COMPILE_ERROR), reason=COMPILE_ERROR or "")
MIB = int(os.environ.get("EK_BENCH_FILE_MIB", "2048"))
ROW_BYTES, PAGE, DEPTH = 264, 4096, 64
NUM_ROWS = (MIB << 20) // ROW_BYTES
NUM_IDS = min(20_000, NUM_ROWS // 40)
GROUP = f"file tier, cold: random rows of 264 bytes from a file of {MIB} MiB, O_DIRECT, depth {DEPTH}"


@contextlib.contextmanager
def table_file():
    """A table of random bytes in a folder that EK_BENCH_DIR names, and that stays there; else a temporary one."""
    folder = os.environ.get("EK_BENCH_DIR")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(folder or temporary) / f"file_tier_{MIB}.safetensors"
        if not path.exists():
            rng = np.random.default_rng(0)

            def pieces():
                for begin in range(0, NUM_ROWS, 1 << 17):
                    count = min(1 << 17, NUM_ROWS - begin)
                    yield torch.from_numpy(rng.integers(0, 256, (count, ROW_BYTES), dtype=np.uint8))

            RowTable.create(path, pieces(), num_rows=NUM_ROWS, row_dim=256, row_format="fp8_e4m3_block32_packed")
        yield path


@pytest.fixture(scope="module")
def path():
    with table_file() as path:
        yield path


class Ids:
    """Fresh ids for each round, so that no round reads what another brought into a cache of the disk."""

    def __init__(self, seed):
        self._rng = np.random.default_rng([seed, time.time_ns()])

    def draw(self, count):
        return np.unique(self._rng.integers(0, NUM_ROWS - PAGE // ROW_BYTES - 1, count))  # the last page may not be whole

    def pages(self, count):
        return self._rng.permutation(PAGE + self.draw(count) * ROW_BYTES) // PAGE


def tier_rows(path, io, benchmark, role, depth=DEPTH):
    table = RowTable.open(path, io=io, queue_depth=depth)
    if not table.io_stats()["direct"]:
        pytest.skip("the file system refuses O_DIRECT here")
    ids, out = Ids(1), torch.empty(NUM_IDS, ROW_BYTES, dtype=torch.uint8)

    def run():
        wanted = torch.from_numpy(ids.draw(NUM_IDS))
        table.read_rows(wanted, out[:wanted.numel()])

    measure(benchmark, run, group=GROUP, contender=f"file tier, {io}", role=role, units=NUM_IDS, unit="row", rounds=7,
            num_bytes=NUM_IDS * ROW_BYTES)
    stats = table.io_stats()
    benchmark.extra_info.update(reads_a_row=stats["reads"] / stats["rows"], moved_a_row=stats["moved_bytes"] / stats["rows"])


def test_ours_io_uring(benchmark, path):
    tier_rows(path, "io_uring", benchmark, "ours")


def test_ours_preadv(benchmark, path):
    tier_rows(path, "preadv", benchmark, "peer")


def raw(benchmark, path, contender, role, read, rounds=7):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    ids = Ids(2)
    try:
        def run():
            pages = ids.pages(NUM_IDS)
            assert read(fd, pages) > 0
        measure(benchmark, run, group=GROUP, contender=contender, role=role, units=NUM_IDS, unit="row",
                rounds=rounds, num_bytes=NUM_IDS * ROW_BYTES)
    finally:
        os.close(fd)


def test_raw_io_uring(benchmark, path):
    library = peers()
    raw(benchmark, path, "raw io_uring, a page per row", "bound",
        lambda fd, pages: library.raw_io_uring(fd, pages, pages.size, DEPTH))


def test_synchronous_loop(benchmark, path):
    library = peers()
    raw(benchmark, path, "one pread after the other", "peer",
        lambda fd, pages: library.raw_synchronous(fd, pages, pages.size), rounds=3)


def main():
    """Rounds of all contenders in turn; medians, of the ratios too."""
    library, ids = peers(), Ids(3)
    with table_file() as file:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
        tables = {io: RowTable.open(file, io=io) for io in ("io_uring", "preadv")}
        rates = {name: [] for name in (*tables, "raw", "synchronous")}
        for _ in range(9):
            for io, table in tables.items():
                wanted = torch.from_numpy(ids.draw(NUM_IDS))
                out = torch.empty(wanted.numel(), ROW_BYTES, dtype=torch.uint8)
                before, start = table.io_stats()["reads"], time.perf_counter()
                table.read_rows(wanted, out)
                seconds = time.perf_counter() - start
                rates[io].append((wanted.numel() / seconds, (table.io_stats()["reads"] - before) / seconds))
            pages = ids.pages(NUM_IDS)
            rates["raw"].append((pages.size / library.raw_io_uring(fd, pages, pages.size, DEPTH),) * 2)
            pages = ids.pages(2000)
            rates["synchronous"].append((pages.size / library.raw_synchronous(fd, pages, pages.size),) * 2)
        os.close(fd)
    print(f"{GROUP}; medians of 9 rounds in turn")
    for name, of_rounds in rates.items():
        rows, reads = np.median(np.array(of_rounds), axis=0)
        print(f"{name:12s} {rows:9,.0f} rows/s {reads:9,.0f} reads/s")
    for name in tables:
        ours = np.array(rates[name])
        print(f"{name}: {np.median(ours[:, 1] / np.array(rates['raw'])[:, 1]):.0%} of the raw reads/s, "
              f"{np.median(ours[:, 0] / np.array(rates['synchronous'])[:, 0]):.1f}x the rows/s of the synchronous loop")


if __name__ == "__main__":
    main()
