"""The prefetcher: what hiding the file tier behind compute costs, its rate in memory beside gather_rows, and the call itself.

Overlap: steps of a backbone stand-in (matrix products on one thread, EK_BENCH_STEP_MS of them, default 50; the other core is the
host's, as beside a GPU) that each need the rows of EK_BENCH_STEP_TOKENS tokens (default 48: reading them takes about a third of a
step; 24 packed rows of 264 bytes per token), with the rows already in memory, fetched from a file during the step before, or read
when they are needed.

    python bench/bench_prefetch.py      all contenders in turn, round by round: what a machine that drifts does not tilt
    chrt -f 10 python bench/bench_prefetch.py       before all else that wants to run on a machine that is not idle
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
STEP_MS = float(os.environ.get("EK_BENCH_STEP_MS", "50"))
STEP_TOKENS = int(os.environ.get("EK_BENCH_STEP_TOKENS", "48"))
COLUMNS, ROW_DIM, ROW_BYTES = 24, 256, 264
NUM_ROWS = (MIB << 20) // ROW_BYTES
NUM_MEMORY_ROWS, TOKENS = 1 << 21, 4096  # 1 GiB of bf16 rows
STEPS, ROUNDS = 5, 60
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
        self.ticket = self.pf.submit(self.ids())
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
        for _ in range(STEPS):  # as many fetches as steps: the first step's rows came during the last step of the call before
            rows = self.pf.wait(self.ticket)
            self.ticket = self.pf.submit(self.ids())
            self.compute(rows)

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
    """(seconds, CPU seconds of this thread, CPU seconds of the others)"""
    start, process, cpu = time.perf_counter(), time.process_time(), time.thread_time()
    run()
    cpu = time.thread_time() - cpu
    return time.perf_counter() - start, cpu, time.process_time() - process - cpu


def in_turn(contenders, rounds):
    """Name -> what `timed` gave, round by round; who goes first changes, so that nobody always follows the same one."""
    names = list(contenders)
    times = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names):] + names[:number % len(names)]:
            times[name].append(timed(contenders[name]))
    return times


def ratio(name, ours, theirs, column=0):
    q = quantiles([a[column] / b[column] for a, b in zip(ours, theirs, strict=True)])
    least = min(a[column] for a in ours) / min(b[column] for b in theirs)
    print(f"{name}: {q['median']:.3f} (quartiles {q['q1']:.3f} to {q['q3']:.3f}); least over least {least:.3f}")


def in_memory_figures():
    memory = InMemory()
    times = in_turn({"gathered": memory.gathered, "staged": memory.staged}, 24)
    ratio(f"{IN_MEMORY}: rows/s over those of gather_rows", times["gathered"], times["staged"])
    calls = []
    for _ in range(3000):
        start = time.perf_counter()
        ticket = memory.pf.submit(memory.one)
        calls.append((time.perf_counter() - start) * 1e6)
        memory.pf.wait(ticket)
    q = quantiles(calls)
    print(f"submit of 1 token: median {q['median']:.1f} us, 99 % below {q['p99']:.1f} us")
    memory.pf.close()


def device_interrupts():
    """CPU -> interrupts of devices that it has served."""
    lines = Path("/proc/interrupts").read_text().splitlines()
    counts = [line.split()[1:1 + len(lines[0].split())] for line in lines[1:] if line.split()[0][:-1].isdigit()]
    return {int(name.removeprefix("CPU")): sum(int(row[i]) for row in counts) for i, name in enumerate(lines[0].split())}


def overlap_figures(steps, cpu):
    """Figures of steps with the calling thread, which computes, on one CPU; the system places the threads that fetch."""
    os.sched_setaffinity(0, {cpu})
    steps.prefetched()
    before, interrupts = steps.pf.stats(), device_interrupts()[cpu]
    times = in_turn({way: getattr(steps, way) for way in ("in_memory", "prefetched", "synchronous")}, ROUNDS)
    after, interrupts = steps.pf.stats(), device_interrupts()[cpu] - interrupts
    bound, ours, peer = times["in_memory"], times["prefetched"], times["synchronous"]
    spent = {name: after[name] - before[name] for name in ("requests", "fetch_s", "exposed_wait_s")}
    step_ms = quantiles([wall / STEPS * 1e3 for wall, *_ in bound])["median"]
    beside_ms = quantiles([others / STEPS * 1e3 for *_, others in ours])["median"]
    per_fetch = interrupts / ROUNDS / STEPS / 2  # of the three contenders two fetch
    print(f"computing on CPU {cpu}, which served {per_fetch:.1f} interrupts of devices for each fetch: a step took "
          f"{step_ms:.1f} ms, fetching {spent['fetch_s'] / spent['requests'] * 1e3:.1f} ms, of these {beside_ms:.1f} ms on a CPU")
    ratio("  prefetched over in memory, time", ours, bound)
    ratio("  synchronous over in memory, time", peer, bound)
    ratio("  prefetched over in memory, CPU time of the calling thread", ours, bound, column=1)
    print(f"  exposed wait: {spent['exposed_wait_s'] / sum(wall for wall, *_ in ours):.2%} of the prefetched steps")


def main():
    """Rounds of all contenders in turn; medians and quartiles of the rounds' ratios."""
    print("load average:", Path("/proc/loadavg").read_text().split()[0])
    in_memory_figures()
    with tempfile.TemporaryDirectory(dir=os.environ.get("EK_BENCH_DIR")) as folder:
        steps = Steps(folder)
        print(f"{OVERLAP}; direct: {steps.table.io_stats()['direct']}")
        for cpu in sorted(os.sched_getaffinity(0))[:2]:
            overlap_figures(steps, cpu)
        steps.close()
    print("load average:", Path("/proc/loadavg").read_text().split()[0])


if __name__ == "__main__":
    main()
