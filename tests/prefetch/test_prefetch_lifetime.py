"""The prefetcher's life: closed, forked, used by many threads, for long. Nothing hangs, nothing grows, no thread is left."""
import ctypes
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from io_faults import inject_faults
from prefetch_cases import (
    NUM_ROWS,
    ROW_DIM,
    TIMEOUT_S,
    WAYS,
    Tables,
    check,
    exit_status,
    in_thread,
    make_ids,
    num_threads,
    prefetcher,
)

from engram_kernels import RowPrefetcher, gather_rows
from engram_kernels.prefetch.row_prefetcher import PrefetchCancelled, PrefetchQueueFull

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture
def tables(tmp_path, monkeypatch):
    return Tables(tmp_path, monkeypatch)


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


@pytest.mark.parametrize("tier", ["host", "file"])
def test_prefetch_close_in_flight(tier, tables):
    table = tables.make(tier, **(dict(io="preadv_buffered", queue_depth=1) if tier == "file" else {}))
    if tier == "file":
        inject_faults(tables.reader, max_delay_us=500_000)  # some ten reads per request: 10 s for all
    pf = prefetcher(table, "file" if tier == "file" else "host_staged", dict(max_delay_us=300_000), ring_bytes=4 << 20)
    ids = torch.arange(0, NUM_ROWS, 3)
    tickets = [pf.submit(ids) for _ in range(4)]
    waiting = [in_thread(lambda t=t: pf.wait(t, timeout_s=TIMEOUT_S)) for t in tickets]
    blocked = in_thread(lambda: pf.submit(ids, timeout_s=TIMEOUT_S))
    time.sleep(0.02)
    start = time.perf_counter()
    pf.close()
    assert time.perf_counter() - start < 5
    for thread, results in (*waiting, blocked):
        thread.join(TIMEOUT_S)
        assert isinstance(results[0], torch.Tensor | RuntimeError | int), results  # int: a place came free before
    assert any(isinstance(results[0], PrefetchCancelled) for _, results in waiting)
    pf.close()
    with pytest.raises(RuntimeError, match="submit after close"):
        pf.submit(ids)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_prefetch_close_while_a_caller_has_rows(keep, released, tables):
    """A wait that copies its rows while another thread closes: its slot stayed counted as in flight."""
    pf = prefetcher(tables.make("host"), "host_staged_to_a_device")
    tickets = [pf.submit(make_ids(20)) for _ in range(2)]
    slot = pf._runtime.wait(tickets[0], TIMEOUT_S, keep)  # what `wait` does before it copies
    if released:
        pf._runtime.release(slot)
    pf.close()
    pf._runtime.release(slot)  # and after
    assert pf.stats()["in_flight"] == 0


def test_prefetch_rows_outlive_close(tables):
    table, ids = tables.make("host"), make_ids(9)
    with prefetcher(table, "host_staged") as pf:
        rows = pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
    del pf
    torch.testing.assert_close(rows, gather_rows(table, ids), rtol=0, atol=0)


def test_prefetch_dropped_in_flight(way, tables):
    """Nobody calls `close`: what still writes to the ring ends before its memory goes."""
    table = tables.make(WAYS[way][0])

    def drop():
        for seed in range(5):
            pf = prefetcher(table, way, dict(max_delay_us=20_000, seed=seed), ring_bytes=40 << 20)
            for _ in range(4):
                pf.submit(make_ids(4000))
            del pf
    assert exit_status(drop) == 0


def test_prefetch_exception_in_the_consumer(way, tables):
    table = tables.make(WAYS[way][0])
    for i in range(30):
        if i == 10:
            before = num_threads()
        with pytest.raises(ZeroDivisionError), prefetcher(table, way, depth=3) as pf:
            pf.submit(make_ids(300))
            pf.wait(pf.submit(make_ids(10)), timeout_s=TIMEOUT_S)
            raise ZeroDivisionError
    assert num_threads() <= before


@pytest.mark.parametrize("has_threads", [False, True])
def test_prefetch_after_a_fork(has_threads, way, tables):
    truth, table = tables.make("host"), tables.make(WAYS[way][0])
    ids = make_ids(100)
    pf = prefetcher(table, way, depth=3)
    if has_threads:
        pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
        ticket = pf.submit(ids)

    def use():  # any lock may have been held by another thread when the child was made
        nonlocal pf
        calls = [lambda: pf.submit(ids), lambda: pf.drain(1), lambda: pf.stats(), lambda: pf.clear_cache(),
                 lambda: pf.trace(os.devnull)]
        for call in calls + [lambda: pf.wait(ticket), lambda: pf.cancel(ticket)] * has_threads:
            with pytest.raises(RuntimeError, match="made before a fork"):
                call()
        pf.close()
        own = RowPrefetcher(table)
        check(own, ids, truth)
        own.close()
        pf = None  # dropped
    assert exit_status(use) == 0
    if has_threads:
        torch.testing.assert_close(pf.wait(ticket, timeout_s=TIMEOUT_S), gather_rows(truth, ids), rtol=0, atol=0)
    check(pf, ids, truth)
    pf.close()


def test_prefetch_many_threads(way, tables):
    """16 callers of one prefetcher, with faults; the C++ twin of this runs under ThreadSanitizer (tests/stress)."""
    tier = WAYS[way][0]
    truth, table = tables.make("host"), tables.make(tier, **(dict(cache_bytes=1 << 15) if tier == "file" else {}))
    if tier == "file":
        inject_faults(tables.reader, seed=5, eio=0.001, shorter=0.1, reorder=True, max_delay_us=50)
    wrong, outcomes, until = [], set(), time.monotonic() + 2

    def run(seed, pf):
        rng = random.Random(seed)
        while time.monotonic() < until:
            ids = make_ids(rng.randrange(60), seed=rng.randrange(1 << 30))
            out = torch.empty(*ids.shape, ROW_DIM, dtype=torch.bfloat16)
            try:
                ticket = pf.submit(ids, timeout_s=rng.choice((0.0, 0.01, None)))
                if rng.random() < 0.1:
                    pf.cancel(ticket)
                    continue
                pf.wait(ticket, out=out, timeout_s=TIMEOUT_S)
                outcomes.add("right")
                if not torch.equal(out.view(torch.int16), gather_rows(truth, ids).view(torch.int16)):
                    wrong.append(ids)
            except PrefetchQueueFull:
                outcomes.add("full")
            except (OSError, RuntimeError) as err:
                outcomes.add("failed")
                if "tier" not in str(err):
                    wrong.append(err)
            except BaseException as err:
                wrong.append(err)

    with prefetcher(table, way, dict(seed=2, error=0.01, max_delay_us=50, reorder=True), depth=6) as pf:
        threads = [threading.Thread(target=run, args=(seed, pf), daemon=True) for seed in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert not any(thread.is_alive() for thread in threads) and wrong == []
        assert pf.stats()["in_flight"] == 0
    assert "right" in outcomes


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="bytes in use are asked of glibc 2.33 or later")
@pytest.mark.parametrize("million", [pytest.param(1, marks=pytest.mark.slow), 1 / 8])
def test_prefetch_a_million_submits_do_not_grow(million):
    """In processes of their own: in this one the threads and allocators of other tests come and go by megabytes."""
    ways = {"host_staged": 800_000, "host_staged_to_a_device": 160_000, "file": 51_200}  # an eighth is whole rounds of the worker
    counts = {way: int(count * million) for way, count in ways.items()}
    worker = Path(__file__).parents[1] / "support/prefetch_soak.py"
    # glibc counts what a thread keeps for its next calls as in use: without that the bytes are those that somebody holds
    environment = {**os.environ, "PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    running = {way: subprocess.Popen([sys.executable, worker, way, str(count)], stdout=subprocess.PIPE, env=environment)
               for way, count in counts.items()}
    try:
        printed = {way: json.loads(process.communicate(timeout=600)[0]) for way, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    for way, count in counts.items():
        got = printed[way]
        assert got["requests"] == count and got["left"] == 0
        (_, warm, *between), last = got["samples"][:-1], got["samples"][-1]
        # of a million, a leak of a byte per submit is more, and of an eighth of them the smallest block of malloc;
        # at rest it is some KiB, the samples themselves
        assert last[0] - warm[0] < 24 << 10, (way, got)
        assert min(resident for _, resident, *_ in (*between[-3:], last)) - warm[1] < 512 << 10, (way, got)
        assert all(counted[2:] == warm[2:] for counted in (*between, last)), (way, got)
