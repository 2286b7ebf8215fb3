"""A training step whose table is in host memory (TrainableRows) against the same step with its rows there already, in turn.

    python bench/paired_trainable_rows.py      a Markdown table of the medians of the per-pair ratios, with their quartiles

The backbone takes 50 ms per step, of which the host computes nothing, as where a device does; or a product on one thread. Rows
are 256 bf16 of 1M, Adam with one second moment per row; a fifth of each step's ids are those of the step before. The peer is
the same loop with its rows in memory of their own, neither gathered nor updated: rows in device memory cost at least that.
Which goes first alternates. EK_BENCH_ROWS=10000 takes a small table.
"""
import os
import statistics
import sys
import time

import torch

import engram_kernels as ek

PAIRS, STEP_S, ROW_DIM = 41, 0.05, 256
NUM_ROWS = int(os.environ.get("EK_BENCH_ROWS", 1 << 20))


def sleep_until(end):
    time.sleep(max(end - time.perf_counter(), 0))


def compute_until(end):
    matrix = torch.ones(192, 192)
    while time.perf_counter() < end:
        torch.mm(matrix, matrix)


class Behind:
    """The step with a host table; the ids of the next step are submitted before the backbone runs."""

    def __init__(self, num_ids):
        weight = torch.randn(NUM_ROWS, ROW_DIM).bfloat16()
        table = ek.RowTable.from_tensor(weight, row_format="bf16", copy=True)
        self.mem = ek.TrainableRows(table, ek.RowOptimizer(table, "adam", lr=1e-3, first_moment="bf16"))
        self.generator, self.num_ids = torch.Generator().manual_seed(0), num_ids
        self.ids = torch.randint(0, NUM_ROWS, (num_ids,), generator=self.generator)
        self.ticket = self.mem.submit(self.ids)
        self.grad = torch.randn(num_ids, ROW_DIM).bfloat16()

    def make_ids(self):
        following = torch.randint(0, NUM_ROWS, (self.num_ids,), generator=self.generator)
        following[:self.num_ids // 5] = self.ids[:self.num_ids // 5]
        self.ids = following

    def step(self, backbone):
        begin = time.perf_counter()
        following = self.mem.submit(self.ids)
        backbone(begin + STEP_S / 4)  # the layers before the memory's
        rows = self.mem.wait(self.ticket)
        backbone(time.perf_counter() + STEP_S * 3 / 4)
        rows.backward(self.grad)
        self.mem.step()
        self.ticket = following
        return time.perf_counter() - begin


class There:
    """The step with its rows there already."""

    def __init__(self, num_ids):
        self.rows = torch.randn(num_ids, ROW_DIM).bfloat16().requires_grad_()
        self.grad = torch.randn(num_ids, ROW_DIM).bfloat16()

    def step(self, backbone):
        begin = time.perf_counter()
        backbone(begin + STEP_S / 4)
        backbone(time.perf_counter() + STEP_S * 3 / 4)
        self.rows.grad = None
        self.rows.backward(self.grad)
        return time.perf_counter() - begin


def ratios(num_ids, backbone, pairs=PAIRS):
    """Our time over the peer's, in blocks of four steps, so that a step's update falls into the next one of its own kind."""
    ours, peer, result = Behind(num_ids), There(num_ids), []
    try:
        for pair in range(-2, pairs):
            seconds = {}
            for kind in ((ours, peer) if pair % 2 else (peer, ours)):
                seconds[kind] = 0.0
                for _ in range(4):
                    if kind is ours:
                        ours.make_ids()
                    seconds[kind] += kind.step(backbone)
                ours.mem.flush()
            result.append(seconds[ours] / seconds[peer])
        return result[2:], ours.mem.stats()
    finally:
        ours.mem.close()


def main():
    torch.set_num_threads(2)
    print("| ids per step | backbone | our step over its step (quartiles) | update, of the thread | rows gathered again |")
    print("|---|---|---|---|---|")
    for num_ids in (4096, 8192, 16384, 65536):
        for name, backbone in (("a device's", sleep_until), ("one thread's", compute_until)):
            found, stats = ratios(num_ids, backbone, int(sys.argv[1]) if len(sys.argv) > 1 else PAIRS)
            low, middle, high = statistics.quantiles(found, n=4)
            steps = stats["steps"]
            print(f"| {num_ids} | {name} | {middle:.3f}x ({low:.3f} to {high:.3f}) | {stats['update_s'] / steps * 1e3:.1f} ms | "
                  f"{stats['rows_regathered'] / steps:.0f} |", flush=True)


if __name__ == "__main__":
    main()
