"""A table of 131 parts: how long a folder takes to open, and what rows cost from 128 files against one.

The folder has the size of a published table, 95 GiB in sparse files. Rows come from files of EK_BENCH_FILE_MIB (default 2048) in
all, random bytes, once as 128 files and once as one; both are read past the page cache.

    python bench/bench_checkpoint_tables.py    rows of both, round by round: what a disk that drifts does not tilt; the opening
"""
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_kernels._library import COMPILE_ERROR
from engram_kernels.table.row_table import RowTable
from engram_kernels.table.safetensors_file import lay_out
from harness import measure

pytestmark = pytest.mark.skipif(bool(COMPILE_ERROR), reason=COMPILE_ERROR or "")
MIB = int(os.environ.get("EK_BENCH_FILE_MIB", "2048"))
NUM_PARTS, HEIGHT, WIDTH = 131, 2_500_012, 160  # of the folder: 95 GiB and three parts more
NAME = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding.shard_{}.weight"
NUM_FILES = 128
ROWS_PER_FILE = (MIB << 20) // NUM_FILES // (WIDTH * 2)
NUM_ROWS = NUM_FILES * ROWS_PER_FILE
NUM_IDS = min(20_000, NUM_ROWS // 40)
OPENING = f"opening a table of {NUM_PARTS * HEIGHT * WIDTH * 2 / 2**30:.0f} GiB, sparse files"
ROWS = f"random rows of 320 bytes from {MIB} MiB, O_DIRECT, depth 64"


def sparse(folder, num_files, height):
    """Files of one part each, all holes, as a checkpoint without an index: every header is read."""
    for n in range(num_files):
        header, _, num_bytes = lay_out({NAME.format(n): ("BF16", (height, WIDTH))}, {"format": "pt"})
        path = folder / f"model-{n + 1:05d}-of-{num_files:05d}.safetensors"
        path.write_bytes(header)
        os.truncate(path, num_bytes)


@contextlib.contextmanager
def rows_in_files():
    """A folder of 128 files and a file, with the same rows."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("EK_BENCH_DIR")) as folder:
        parts, rng = Path(folder) / "parts", np.random.default_rng(0)
        parts.mkdir()
        piece = torch.from_numpy(rng.integers(0, 256, (ROWS_PER_FILE, WIDTH * 2), dtype=np.uint8))
        for n in range(NUM_FILES):
            header, _, _ = lay_out({NAME.format(n): ("BF16", (ROWS_PER_FILE, WIDTH))}, {"format": "pt"})
            with (parts / f"{n}.safetensors").open("wb") as file:
                file.write(header)
                file.write(piece.numpy().data)
        pieces = (piece.view(torch.bfloat16) for _ in range(NUM_FILES))
        RowTable.create(Path(folder) / "one", pieces, num_rows=NUM_ROWS, row_dim=WIDTH)
        os.sync()
        yield lambda io: {"one file": RowTable.open(Path(folder) / "one", io=io), "128 files": RowTable.open(parts, NAME, io=io)}


@pytest.fixture(scope="module")
def tables():
    with rows_in_files() as opened:
        tables = opened("io_uring")
        if not all(table.io_stats()["direct"] for table in tables.values()):
            pytest.skip("the file system refuses O_DIRECT here")
        yield tables


@pytest.mark.parametrize("contender, role", [("128 files", "ours"), ("one file", "peer")])
def test_rows(benchmark, tables, contender, role):
    table, rng, out = tables[contender], np.random.default_rng(time.time_ns()), torch.empty(NUM_IDS, WIDTH, dtype=torch.bfloat16)

    def run():
        wanted = torch.from_numpy(np.unique(rng.integers(0, NUM_ROWS, NUM_IDS)))
        table.read_rows(wanted, out[:wanted.numel()])

    measure(benchmark, run, group=ROWS, contender=contender, role=role, units=NUM_IDS, unit="row", rounds=7,
            num_bytes=NUM_IDS * WIDTH * 2)


@pytest.mark.parametrize("num_files, role", [(NUM_PARTS, "ours"), (1, "peer")])
def test_open(benchmark, tmp_path, num_files, role):
    sparse(tmp_path, num_files, NUM_PARTS * HEIGHT // num_files)
    tables = []  # of the last call: the next one does not wait until it is closed
    measure(benchmark, lambda: tables.append(RowTable.open(tmp_path, NAME)), group=OPENING, contender=f"files: {num_files}",
            role=role, rounds=5)
    assert tables[-1].num_rows == NUM_PARTS * HEIGHT
    benchmark.extra_info["peak_mib"] = opening_mib(tmp_path)


def opening_mib(folder):
    """What the opening adds to the largest size of a fresh process, in MiB."""
    program = f"import bench_checkpoint_tables; bench_checkpoint_tables.print_opening({str(folder)!r})"
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    return float(subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout)


def print_opening(folder):
    small = Path(folder) / "small"
    small.mkdir(exist_ok=True)
    sparse(small, 1, 10)
    RowTable.open(small, NAME)  # what is loaded at the first opening of any table
    before = memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the largest size is that of now
    table = RowTable.open(folder, NAME)
    print((memory_kib("VmHWM") - before) / 1024)
    assert table.num_rows == NUM_PARTS * HEIGHT


def memory_kib(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])


def main():
    """Rounds of both in turn, medians; then the opening."""
    rng = np.random.default_rng(1)
    with rows_in_files() as opened:
        for io, count in (("io_uring", NUM_IDS), ("io_uring", 24), ("io_uring_buffered", NUM_IDS), ("io_uring_buffered", 24)):
            tables = opened(io)
            rounds = {name: [] for name in tables}
            for _ in range(21):
                for name, table in tables.items():
                    sets = [torch.from_numpy(np.unique(rng.integers(0, NUM_ROWS, count))) for _ in range(1 if count > 24 else 50)]
                    begin, cpu = time.perf_counter(), time.process_time()
                    for wanted in sets:
                        table.read_rows(wanted)
                    num_rows = sum(x.numel() for x in sets)
                    rounds[name].append((num_rows / (time.perf_counter() - begin), (time.process_time() - cpu) / num_rows))
            rates = {name: np.median(np.array(of_name), axis=0) for name, of_name in rounds.items()}
            text = ", ".join(f"{name} {rate:,.0f} rows/s, {cpu * 1e6:.2f} us CPU per row" for name, (rate, cpu) in rates.items())
            ratio = rates["128 files"][0] / rates["one file"][0]
            print(f"{io}, {count} ids per request: {text}; from 128 files {ratio:.1%} of one")
    with tempfile.TemporaryDirectory() as folder:
        sparse(Path(folder), NUM_PARTS, HEIGHT)
        mib, begin = opening_mib(folder), time.perf_counter()
        table = RowTable.open(folder, NAME)
        print(f"{OPENING}, {NUM_PARTS} files: {time.perf_counter() - begin:.3f} s, {mib:.1f} MiB; {table}")


if __name__ == "__main__":
    main()
