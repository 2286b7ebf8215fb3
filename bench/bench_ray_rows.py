"""Rows of one Ray actor through the tier of a remote table, beside the same actor called by hand; and hidden behind compute.

Packed rows of 264 bytes of a table of 1,000,000 rows in the actor's memory, 4,096 and 65,536 distinct ids in ascending order.

    by hand      ray.get(actor.read.remote(ids)): one call, the rows where Ray has put them, unread
    copied       the same, and the rows copied into memory of the caller
    tier         the remote tier's fetch of the same ids into memory of the caller
    exposed      what a wait for the same rows, as bf16, still takes behind EK_BENCH_STEP_MS (default 50) of compute

    python bench/bench_ray_rows.py [ROUNDS]      all in turn, round by round, each ratio of one run; starts a Ray runtime
"""
import os
import statistics
import sys
import tempfile
import time

import numpy as np
import pytest
import torch

import engram_kernels as ek
from engram_kernels._library import COMPILE_ERROR

pytestmark = pytest.mark.skipif(bool(COMPILE_ERROR), reason=COMPILE_ERROR or "")
NUM_ROWS, ROW_DIM, ROW_BYTES = 1_000_000, 256, 264
STEP_MS = float(os.environ.get("EK_BENCH_STEP_MS", "50"))
COUNTS = (4_096, 65_536)


def timed(call):
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def compute(milliseconds, x, w):
    until = time.perf_counter() + milliseconds * 1e-3
    while time.perf_counter() < until:
        x @ w


def run(rounds):
    """Prints a line per count of ids: medians in ms, and the median of the rounds' ratios."""
    import ray
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=256 << 20, log_to_driver=False,
             configure_logging=False)
    try:
        rows = torch.randint(0, 120, (NUM_ROWS, ROW_BYTES), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        with tempfile.TemporaryDirectory() as folder:  # a table in memory would fill Ray's object store
            table = ek.RowTable.create(f"{folder}/rows", rows, row_format="fp8_e4m3_block32_packed", row_dim=ROW_DIM)
            server = ek.serve_rows(table, name="bench", in_memory=True, timeout_s=600)
        with server:
            remote = ek.RowTable.connect(server.address, timeout_s=600)
            with ek.RowPrefetcher(remote, depth=2, background=True) as pf:
                for count in COUNTS:
                    print(line(ray, server.actors[0], remote, pf, count, rounds), flush=True)
    finally:
        ray.shutdown()


def line(ray, actor, remote, pf, count, rounds):
    rng, times = np.random.default_rng(count), []
    out, x, w = np.empty((count, ROW_BYTES), np.uint8), torch.randn(64, 512), torch.randn(512, 512)
    torch.set_num_threads(1)
    for _ in range(rounds + 2):
        ids = np.sort(rng.choice(NUM_ROWS, count, replace=False))
        by_hand = timed(lambda ids=ids: ray.get(actor.read.remote(ids)))
        copied = timed(lambda ids=ids: np.copyto(out, ray.get(actor.read.remote(ids))[0]))
        tier = timed(lambda ids=ids: remote._file.tier.fetch(ids, out))
        ticket = pf.submit(torch.from_numpy(ids))
        compute(STEP_MS, x, w)
        exposed = timed(lambda ticket=ticket: pf.wait(ticket, timeout_s=600))
        times.append((by_hand, copied, tier, exposed))
    times = times[2:]  # two rounds warm it up
    by_hand, copied, tier, exposed = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [statistics.median(row[2] / row[peer] for row in times) for peer in (0, 1)]
    return (f"{count:>6} ids: by hand {by_hand:.2f} ms, copied {copied:.2f}, tier {tier:.2f}: {ratios[0]:.2f} and "
            f"{ratios[1]:.2f} times; exposed behind {STEP_MS:g} ms of compute {exposed:.2f} ms")


def test_ray_rows_bench_runs():
    pytest.importorskip("ray", reason="ray is not installed: pip install 'engram-kernels[ray]'")
    run(1)


if __name__ == "__main__":
    run(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
