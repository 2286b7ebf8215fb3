"""The prefetcher: what hiding the file tier behind compute costs, its rate in memory beside gather_rows, and the call itself.

Overlap: steps of a backbone stand-in (matrix products on one thread, EK_BENCH_STEP_MS of them, default 400; the other core is the
host's, as beside a GPU) that each need the rows of EK_BENCH_STEP_TOKENS tokens (default 64; 24 packed rows of 264 bytes a token),
with the rows already in memory, fetched from a file during the step before, or read when they are needed.

    python bench/bench_prefetch.py      all contenders in turn, round by round: what a machine that drifts does not tilt
"""
import os
import tempfile
import time
from pathlib import Path

import pytest
import torch

from engram_kernels import RowPrefetcher, RowTable, gather_rows
from engram_kernels._library import COMPILE_ERROR
from harness import measure

pytestmark = pytest.mark.skipif(bool(COMPILE_ERROR), reason=COMPILE_ERROR or "")
MIB = int(os.environ.get("EK_BENCH_FILE_MIB", "512"))
STEP_MS = float(os.environ.get("EK_BENCH_STEP_MS", "400"))
STEP_TOKENS = int(os.environ.get("EK_BENCH_STEP_TOKENS", "64"))
COLUMNS, ROW_DIM, ROW_BYTES = 24, 256, 264
NUM_ROWS = (MIB << 20) // ROW_BYTES
NUM_MEMORY_ROWS, TOKENS = 1 << 21, 4096  # 1 GiB of bf16 rows
STEPS, ROUNDS = 5, 15
OVERLAP = f"step of {STEP_MS:g} ms on one thread with the rows of {STEP_TOKENS} tokens from a file of {MIB} MiB, O_DIRECT"
IN_MEMORY = f"prefetch in memory, {TOKENS} tokens of {COLUMNS} rows of {ROW_DIM} to bf16, two in flight"
CALL = "prefetch of 1 token, table in memory"


class Steps:
    """Backbone steps and the ways to have their rows."""

    def __init__(self, folder):
        path = Path(folder) / "prefetch.safetensors"
        generator = torch.Generator().manual_seed(0)
        pieces = (torch.randint(0, 120, (min(1 << 17, NUM_ROWS - begin), ROW_BYTES), dtype=torch.uint8, generator=generator)
                  for begin in range(0, NUM_ROWS, 1 << 17))
        RowTable.create(path, pieces, num_rows=NUM_ROWS, row_dim=ROW_DIM, row_format="fp8_e4m3_block32_packed")
        self.table = RowTable.open(path, io="io_uring" if _has_io_uring(path) else "preadv")
        self.pf = RowPrefetcher(self.table, depth=2, background=True)
        self.x = torch.randn(256, 1024)
        self.w = torch.randn(1024, 1024) / 32
        self.rows = torch.empty(STEP_TOKENS, COLUMNS, ROW_DIM, dtype=torch.bfloat16)
        torch.set_num_threads(1)
        of_twenty = min(timed(lambda: [self.x @ self.w for _ in range(20)])[0] for _ in range(9))
        self.products = max(1, round(STEP_MS * 1e-3 * 20 / of_twenty))

    def close(self):
        self.pf.close()
        torch.set_num_threads(os.cpu_count() or 1)

    def ids(self):
        return torch.randint(0, NUM_ROWS, (STEP_TOKENS, COLUMNS))  # fresh: nothing caches them

    def compute(self, rows):
        x = self.x
        for _ in range(self.products):
            x = x @ self.w
        return x.sum() + rows.float().sum()

    def in_memory(self):
        for _ in range(STEPS):
            self.ids()
            self.compute(self.rows)

    def prefetched(self):
        ticket = self.pf.submit(self.ids())
        self.pf.drain()  # the first step's rows come before the first step, as in a running server
        for _ in range(STEPS):
            rows = self.pf.wait(ticket)
            ticket = self.pf.submit(self.ids())
            self.compute(rows)
        self.pf.cancel(ticket)

    def synchronous(self):
        for _ in range(STEPS):
            gather_rows(self.table, self.ids(), out=self.rows)
            self.compute(self.rows)


def _has_io_uring(path):
    try:
        RowTable.open(path, io="io_uring")
    except ValueError:
        return False
    return True


class InMemory:
    """A table in huge pages, ids, and both ways to have its rows."""

    def __init__(self):
        rows = torch.randint(0, 1 << 15, (NUM_MEMORY_ROWS, ROW_DIM), dtype=torch.int16).view(torch.bfloat16)
        self.table = RowTable.from_tensor(rows, copy=True)
        self.ids = [torch.randint(0, NUM_MEMORY_ROWS, (TOKENS, COLUMNS), dtype=torch.int32) for _ in range(4)]
        self.outs = [torch.empty(TOKENS, COLUMNS, ROW_DIM, dtype=torch.bfloat16) for _ in range(3)]
        self.pf = RowPrefetcher(self.table, depth=2)
        self.one = self.ids[0][:1].contiguous()
        for _ in range(3):  # every slot has been written
            self.staged()

    def gathered(self, count=4):
        for i in range(count):
            gather_rows(self.table, self.ids[i % 4], out=self.outs[i % 3])

    def staged(self, count=4):
        tickets = [self.pf.submit(self.ids[0])]
        for i in range(1, count + 1):
            if i < count:
                tickets.append(self.pf.submit(self.ids[i % 4]))
            self.pf.wait(tickets.pop(0))


@pytest.fixture(scope="module")
def steps():
    with tempfile.TemporaryDirectory(dir=os.environ.get("EK_BENCH_DIR")) as folder:
        made = Steps(folder)
        yield made
        made.close()


@pytest.fixture(scope="module")
def in_memory():
    made = InMemory()
    yield made
    made.pf.close()


@pytest.mark.parametrize(("way", "role"), [("prefetched", "ours"), ("in_memory", "bound"), ("synchronous", "peer")])
def test_overlap(benchmark, steps, way, role):
    names = {"prefetched": "fetched during the step before", "in_memory": "rows already in memory",
             "synchronous": "read when needed"}
    measure(benchmark, getattr(steps, way), group=OVERLAP, contender=names[way], role=role, units=STEPS, unit="step", rounds=7)


@pytest.mark.parametrize(("way", "role"), [("staged", "ours"), ("gathered", "peer")])
def test_in_memory(benchmark, in_memory, way, role):
    units, names = 4 * TOKENS * COLUMNS, {"staged": "prefetcher", "gathered": "gather_rows"}
    measure(benchmark, getattr(in_memory, way), group=IN_MEMORY, contender=names[way], role=role, units=units, unit="row",
            num_bytes=units * ROW_DIM * 4)


def test_submit_one_token(benchmark, in_memory):
    def submit_and_wait():
        in_memory.pf.wait(in_memory.pf.submit(in_memory.one))
    measure(benchmark, lambda: [submit_and_wait() for _ in range(100)], group=CALL, contender="submit and wait, 100 times",
            role="ours", units=100, unit="call")


def quantiles(values):
    at = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75, 0.99], dtype=torch.float64)).tolist()
    return dict(zip(("q1", "median", "q3", "p99"), at, strict=True))


def timed(run):
    """(seconds, CPU seconds of this thread)"""
    start, cpu = time.perf_counter(), time.thread_time()
    run()
    return time.perf_counter() - start, time.thread_time() - cpu


def ratio(name, values):
    q = quantiles(values)
    print(f"{name}: {q['median']:.3f} (quartiles {q['q1']:.3f} to {q['q3']:.3f})")


def main():
    """Rounds of all contenders in turn; medians of the ratios and their quartiles."""
    memory = InMemory()
    pairs = [(timed(memory.gathered), timed(memory.staged)) for _ in range(25)]
    ratio(f"{IN_MEMORY}: rows/s over those of gather_rows", [gathered[0] / staged[0] for gathered, staged in pairs])
    times = []
    for _ in range(3000):
        start = time.perf_counter()
        ticket = memory.pf.submit(memory.one)
        times.append((time.perf_counter() - start) * 1e6)
        memory.pf.wait(ticket)
    q = quantiles(times)
    print(f"submit of 1 token: median {q['median']:.1f} us, 99 % below {q['p99']:.1f} us")
    memory.pf.close()
    del memory
    with tempfile.TemporaryDirectory(dir=os.environ.get("EK_BENCH_DIR")) as folder:
        steps = Steps(folder)
        steps.prefetched()
        before = steps.pf.stats()
        rounds = [[timed(run) for run in (steps.in_memory, steps.prefetched, steps.synchronous)] for _ in range(ROUNDS)]
        after = steps.pf.stats()
        direct = steps.table.io_stats()["direct"]
        steps.close()
    spent = {name: after[name] - before[name] for name in ("requests", "fetch_s", "exposed_wait_s")}
    step_ms = quantiles([wall / STEPS * 1e3 for (wall, _), *_ in rounds])["median"]
    fetch_ms = spent["fetch_s"] / spent["requests"] * 1e3
    print(f"{OVERLAP}; a step took {step_ms:.1f} ms, fetching {fetch_ms:.1f} ms; direct: {direct}")
    ratio("prefetched over in memory, time", [ours[0] / bound[0] for bound, ours, _ in rounds])
    ratio("synchronous over in memory, time", [peer[0] / bound[0] for bound, _, peer in rounds])
    # what other processes on the machine do not change: the caller's own CPU time, and how long it waited
    ratio("prefetched over in memory, CPU time of the calling thread", [ours[1] / bound[1] for bound, ours, _ in rounds])
    print(f"exposed wait: {spent['exposed_wait_s'] / sum(ours[0] for _, ours, _ in rounds):.2%} of the prefetched steps")


if __name__ == "__main__":
    main()
