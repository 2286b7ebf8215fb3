"""Policy staged: rows of a table in memory that go to a device, which CPU threads stand for (an engine with memory of its own).

Beside it: the same in plain PyTorch (unique, index_select, a copy, gather_rows of the copy), and gather_rows of the table, which
crosses no link. What is measured is the host's part and that of the stand-in; of a link it says nothing.

    python bench/bench_staged.py                the share of the time that the ids take
    python bench/bench_staged.py OTHER/python   rows/s beside those of another checkout that is built, request by request in turn
"""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engram_kernels import RowPrefetcher, RowTable, gather_rows
from engram_kernels._library import COMPILE_ERROR

pytestmark = pytest.mark.skipif(bool(COMPILE_ERROR), reason=COMPILE_ERROR or "")
NUM_IDS, ROW_DIM, ROW_BYTES, THREADS = 65_536, 256, 264, 2
NUM_ROWS = 1 << 22  # 1.03 GiB of packed rows
REQUESTS, ROUNDS = 6, 40
GROUP = f"staged: {NUM_IDS} packed rows of {ROW_DIM} to the memory of a stand-in for a device, {THREADS} threads"


class Staged:
    """A table, ids, and the ways to have their rows as bfloat16 in other memory."""

    def __init__(self):
        from engram_kernels import _C
        torch.set_num_threads(THREADS)
        rows = torch.randint(0, 120, (NUM_ROWS, ROW_BYTES), dtype=torch.uint8)
        self.table = RowTable.from_tensor(rows, row_format="fp8_e4m3_block32_packed", row_dim=ROW_DIM, copy=True)
        self.ids = [torch.randint(0, NUM_ROWS, (NUM_IDS,), dtype=torch.int32) for _ in range(4)]
        self.out = torch.empty(NUM_IDS, ROW_DIM, dtype=torch.bfloat16)
        self.host, self.device = (torch.empty(NUM_IDS, ROW_BYTES, dtype=torch.uint8) for _ in range(2))
        self.pf = RowPrefetcher(self.table, depth=2, threads=THREADS, policy="staged",
                                _engine=_C.host_engine(THREADS, has_device_memory=True))
        for _ in range(2):  # every slot has been written
            self.staged()

    def staged(self, requests=REQUESTS):
        """Two in flight, as in a decoder that fetches a step ahead."""
        tickets = [self.pf.submit(self.ids[0])]
        for i in range(1, requests + 1):
            if i < requests:
                tickets.append(self.pf.submit(self.ids[i % 4]))
            self.pf.wait(tickets.pop(0))

    def in_torch(self, requests=REQUESTS):
        for i in range(requests):
            distinct, where = torch.unique(self.ids[i % 4], return_inverse=True)
            staging, on_device = self.host[:len(distinct)], self.device[:len(distinct)]
            torch.index_select(self.table.rows, 0, distinct, out=staging)
            on_device.copy_(staging)
            there = RowTable.from_tensor(on_device, row_format=self.table.row_format, row_dim=ROW_DIM)
            gather_rows(there, where, out=self.out)

    def in_place(self, requests=REQUESTS):
        for i in range(requests):
            gather_rows(self.table, self.ids[i % 4], out=self.out)


@pytest.fixture(scope="module")
def staged():
    made, before = None, torch.get_num_threads()
    try:
        made = Staged()
        yield made
    finally:
        torch.set_num_threads(before)
        if made is not None:
            made.pf.close()


@pytest.mark.parametrize(("way", "role", "name"), [
    ("staged", "ours", "RowPrefetcher"), ("in_torch", "peer", "torch.unique, index_select, copy, gather_rows"),
    ("in_place", "bound", "gather_rows of the table, no link")])
def test_staged(benchmark, staged, way, role, name):
    from harness import measure
    units = REQUESTS * NUM_IDS
    measure(benchmark, getattr(staged, way), group=GROUP, contender=name, role=role, units=units, unit="row",
            num_bytes=units * ROW_BYTES)


def answer():
    """A child of `beside`: a line for each request, with the seconds it took, those of ids among them, and alone."""
    made = Staged()
    for line in sys.stdin:
        requests, before, begun = int(line), made.pf.stats(), time.perf_counter()
        made.staged(requests)
        took, after = time.perf_counter() - begun, made.pf.stats()
        print(took, after.get("id_s", float("nan")) - before.get("id_s", float("nan")), flush=True)


def child(package):
    environment = {**os.environ, "PYTHONPATH": str(package)}
    return subprocess.Popen([sys.executable, __file__, "--answer"], env=environment, text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE)


def beside(packages):
    """Rounds of the checkouts in turn: one request alone, and two in flight."""
    from statistics import quantiles
    children = [child(package) for package in packages]
    for requests in (1, REQUESTS):
        rounds = []
        for number in range(ROUNDS):
            order = children if number % 2 else children[::-1]
            took = {}
            for one in order:
                print(requests, file=one.stdin, flush=True)
                took[one] = [float(x) for x in one.stdout.readline().split()]
            rounds.append([took[one] for one in children])
        name = "one request alone" if requests == 1 else f"{requests} requests, two in flight"
        for i, package in enumerate(packages):
            rows = quantiles([requests * NUM_IDS / of_round[i][0] / 1e6 for of_round in rounds], n=4)
            share = quantiles([of_round[i][1] / of_round[i][0] for of_round in rounds], n=4)
            ratio = quantiles([of_round[-1][0] / of_round[i][0] for of_round in rounds], n=4)
            print(f"{name}, {package}: {rows[1]:.2f} M rows/s ({rows[0]:.2f} to {rows[2]:.2f}), {ratio[1]:.2f}x of the last "
                  f"({ratio[0]:.2f} to {ratio[2]:.2f}); ids {share[1]:.1%} of the time ({share[0]:.1%} to {share[2]:.1%})")
    for one in children:
        one.stdin.close()
        one.wait()


if __name__ == "__main__":
    if sys.argv[1:] == ["--answer"]:
        answer()
    else:
        import engram_kernels
        beside([Path(engram_kernels.__file__).parents[1], *map(Path, sys.argv[1:])])
