"""The prefetcher when things go wrong: every row delivered is right, every failure reaches its own ticket, nothing hangs."""
import errno
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from io_faults import inject_faults
from prefetch_cases import NUM_ROWS, ROW_DIM, TIMEOUT_S, WAYS, Tables, check, in_thread, make_ids, prefetcher

from engram_kernels import gather_rows
from engram_kernels._library import COMPILE_ERROR
from engram_kernels.prefetch.row_prefetcher import PrefetchCancelled, PrefetchQueueFull

if not COMPILE_ERROR:
    from engram_kernels import _C

pytestmark = pytest.mark.usefixtures("compiled")
ROW_BYTES = ROW_DIM  # of the values; the scales lie behind all of them


@pytest.fixture
def tables(tmp_path, monkeypatch):
    return Tables(tmp_path, monkeypatch)


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


@pytest.mark.parametrize("has_device_memory", [False, True])
def test_prefetch_eio_reaches_its_own_ticket(has_device_memory, tables):
    truth, table = tables.make("host"), tables.make("file")
    header = os.path.getsize(tables.path) - NUM_ROWS * (ROW_DIM + ROW_DIM // 32)
    bad_row = 1000
    inject_faults(tables.reader, bad_begin=header + bad_row * ROW_BYTES, bad_end=header + bad_row * ROW_BYTES + 1)
    good, bad = torch.tensor([[5, 7], [-1, 5]]), torch.tensor([3, bad_row, 2])
    with prefetcher(table, "file_to_a_device" if has_device_memory else "file") as pf:
        tickets = [pf.submit(ids) for ids in (good, bad, good)]
        torch.testing.assert_close(pf.wait(tickets[0], timeout_s=TIMEOUT_S), gather_rows(truth, good), rtol=0, atol=0)
        where = rf"tier file: \S*/table.safetensors: row {bad_row} at byte \d+ cannot be read"
        with pytest.raises(OSError, match=where) as caught:
            pf.wait(tickets[1], timeout_s=TIMEOUT_S)
        assert caught.value.errno == errno.EIO
        torch.testing.assert_close(pf.wait(tickets[2], timeout_s=TIMEOUT_S), gather_rows(truth, good), rtol=0, atol=0)
        with pytest.raises(KeyError):  # it failed once
            pf.wait(tickets[1], timeout_s=TIMEOUT_S)
        assert pf.stats()["failed"] == 1 and pf.stats()["in_flight"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_prefetch_short_reads_reordering_and_delays(seed, way, tables):
    tier = WAYS[way][0]
    truth, table = tables.make("host"), tables.make(tier)
    if tier == "file":
        inject_faults(tables.reader, seed=seed, shorter=0.4, reorder=True, max_delay_us=200)
    rng = random.Random(seed)
    with prefetcher(table, way, dict(seed=seed, max_delay_us=300, reorder=True), depth=3) as pf:
        pending = []
        for i in range(25):
            ids = make_ids(rng.choice((0, 1, 24, 700)), rng.choice((1, 2)), seed=seed * 100 + i)
            pending.append((pf.submit(ids), ids))
            while len(pending) == 3 or (pending and i == 24):
                ticket, wanted = pending.pop(rng.randrange(len(pending)))
                torch.testing.assert_close(pf.wait(ticket, timeout_s=TIMEOUT_S), gather_rows(truth, wanted), rtol=0, atol=0)


@pytest.mark.parametrize("change", ["truncated", "overwritten", "copied_over"])
def test_prefetch_file_changed_while_running(change, tables):
    table = tables.make("file", cache_bytes=1 << 14)
    ids = make_ids(40)
    with prefetcher(table, "file", depth=2) as pf:
        pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
        size = os.path.getsize(tables.path)
        if change == "truncated":
            os.truncate(tables.path, size - 100)
        elif change == "overwritten":
            with tables.path.open("r+b") as f:
                f.seek(size // 2)
                f.write(b"other")
        else:
            tables.path.write_bytes(bytes(size))
        if change != "truncated":
            info = tables.path.stat()
            os.utime(tables.path, ns=(info.st_atime_ns, info.st_mtime_ns + 1))  # a file system's clock may tick slowly
        for _ in range(3):
            with pytest.raises(OSError, match=r"tier file: \S*/table.safetensors: .*row \d+"):
                pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_prefetch_file_deleted_or_replaced_by_name(change, tables, tmp_path):
    """What was opened is what is read: a name says nothing."""
    truth, table = tables.make("host"), tables.make("file")
    with prefetcher(table, "file") as pf:
        if change == "deleted":
            tables.path.unlink()
        else:
            (tmp_path / "other").write_bytes(bytes(1000))
            os.replace(tmp_path / "other", tables.path)
        check(pf, make_ids(200), truth)


def test_prefetch_failing_launches_reach_their_own_tickets(way, tables):
    tier = WAYS[way][0]
    truth, table = tables.make("host"), tables.make(tier)
    outcomes = set()
    with prefetcher(table, way, dict(seed=1, error=0.3, reorder=True), depth=3) as pf:
        for i in range(40):
            batch = [make_ids(5, seed=i * 3 + j) for j in range(3)]
            for ticket, ids in [(pf.submit(ids), ids) for ids in batch]:
                try:
                    rows = pf.wait(ticket, timeout_s=TIMEOUT_S)
                    torch.testing.assert_close(rows, gather_rows(truth, ids), rtol=0, atol=0)
                    outcomes.add("right")
                except RuntimeError as err:
                    assert str(err) == (f"tier host: ticket {ticket} of 5 ids, its first row {ids[0]}, on engine cpu: "
                                        "injected failure of a launch")
                    outcomes.add("failed")
    assert outcomes == {"right", "failed"}


def test_prefetch_ids_out_of_range(way, tables):
    truth, table = tables.make("host"), tables.make(WAYS[way][0])
    good, bad = make_ids(4, 3), make_ids(4, 3)
    with prefetcher(table, way) as pf:
        for value in (NUM_ROWS, -2, 2**31 - 1):
            bad[2, 1] = value
            tickets = [pf.submit(ids) for ids in (good, bad, good)]
            torch.testing.assert_close(pf.wait(tickets[0], timeout_s=TIMEOUT_S), gather_rows(truth, good), rtol=0, atol=0)
            with pytest.raises(IndexError, match=rf"row_ids\[2, 1\] is {value}, expected \[0, {NUM_ROWS}\)"):
                pf.wait(tickets[1], timeout_s=TIMEOUT_S)
            check(pf, good, truth)
            pf.wait(tickets[2], timeout_s=TIMEOUT_S)


def test_prefetch_ring_full(tables):
    table = tables.make("host")
    with prefetcher(table, "host_staged", depth=2) as pf:
        tickets = [pf.submit(make_ids(3, seed=s)) for s in range(2)]
        with pytest.raises(PrefetchQueueFull, match=r"2 requests are in flight, as many as depth allows \(2\); wait for one"):
            pf.submit(make_ids(3))
        start = time.perf_counter()
        with pytest.raises(PrefetchQueueFull):
            pf.submit(make_ids(3), timeout_s=0.1)
        assert 0.09 < time.perf_counter() - start < 10
        thread, results = in_thread(lambda: pf.submit(make_ids(3), timeout_s=TIMEOUT_S))
        time.sleep(0.05)
        assert not results
        pf.wait(tickets[0], timeout_s=TIMEOUT_S)
        thread.join(TIMEOUT_S)
        pf.wait(results[0], timeout_s=TIMEOUT_S)
        pf.wait(tickets[1], timeout_s=TIMEOUT_S)
        with pytest.raises(ValueError, match=r"\d+ ids need \d+ bytes of rows, a slot of the ring has \d+; raise ring_bytes"):
            pf.submit(make_ids(1 << 20))
        assert pf.stats()["max_in_flight"] == 2


def test_prefetch_timeout_leaves_the_ticket_valid(way, tables):
    truth, table = tables.make("host"), tables.make(WAYS[way][0])
    ids = make_ids(6)
    with prefetcher(table, way, dict(seed=3, max_delay_us=400_000)) as pf:
        timeouts = 0
        for _ in range(6):  # some of the delays are long
            ticket = pf.submit(ids)
            try:
                rows = pf.wait(ticket, timeout_s=0.02)
            except TimeoutError as err:
                assert f"ticket {ticket} did not arrive in 0.02 s" in str(err)
                timeouts += 1
                rows = pf.wait(ticket, timeout_s=TIMEOUT_S)
            torch.testing.assert_close(rows, gather_rows(truth, ids), rtol=0, atol=0)
        assert timeouts and pf.stats()["exposed_wait_s"] >= 0.02 * timeouts


@pytest.mark.parametrize("timeout_s", [None, math.inf, 1e300, 1e10])
def test_prefetch_without_a_limit(timeout_s, way, tables):
    """No number of seconds is so large that it counts as over."""
    truth, table, ids = tables.make("host"), tables.make(WAYS[way][0]), make_ids(6)
    with prefetcher(table, way, dict(seed=1, max_delay_us=20_000), depth=1) as pf:
        ticket = pf.submit(ids)
        pf.drain(timeout_s)
        torch.testing.assert_close(pf.wait(ticket, timeout_s=timeout_s), gather_rows(truth, ids), rtol=0, atol=0)
        ticket = pf.submit(ids, timeout_s)
        torch.testing.assert_close(pf.wait(ticket, timeout_s=timeout_s), gather_rows(truth, ids), rtol=0, atol=0)
        with pytest.raises(ValueError, match="timeout_s is nan, expected seconds, or None"):
            pf.drain(math.nan)


NO_THREADS = """
import os, resource, sys, torch
from engram_kernels import RowPrefetcher, RowTable, _C
table, ids = RowTable.from_tensor(torch.ones(30, 8), row_format="f32"), torch.arange(4)
def no_more_threads():  # their stacks find no addresses
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 20), resource.RLIM_INFINITY))
prefetcher = RowPrefetcher(table, _engine=_C.host_engine(1, has_device_memory=True), ring_bytes=1 << 16, staging_bytes=1 << 14)
no_more_threads()
for call in (lambda: _C.host_engine(1), lambda: prefetcher.wait(prefetcher.submit(ids), timeout_s=60)):
    try:
        call()
    except RuntimeError as err:
        print(err)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
print(float(prefetcher.wait(prefetcher.submit(ids), timeout_s=60).sum()), prefetcher.stats()["in_flight"])
"""


def test_prefetch_without_threads(compiled):
    """Where the system has none left, that is an error of what wanted one; and the next request gets one."""
    if _C.sanitized:
        pytest.skip("the sanitizer's shadow takes more addresses than a limit could spare")
    run = subprocess.run([sys.executable, "-c", NO_THREADS], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.splitlines() == [
        f"RowPrefetcher: the thread {which} cannot be started: Resource temporarily unavailable"
        for which in ("of the stream", "that fetches")] + ["32.0 0"]


@pytest.mark.parametrize("call", ["wait", "drain", "submit"])
def test_prefetch_a_signal_is_heeded(call, tables):
    """Ctrl-C while nothing arrives: the call ends, its ticket is as it was."""
    table, slow = tables.make("file", io="preadv_buffered", queue_depth=1), torch.arange(0, NUM_ROWS, 3)
    with prefetcher(table, "file", ring_bytes=4 << 20, staging_bytes=4 << 20, depth=1) as pf:
        inject_faults(tables.reader, max_delay_us=2_000_000)  # 10 s to its end
        ticket = pf.submit(slow)
        calls = {"wait": lambda: pf.wait(ticket), "drain": pf.drain, "submit": lambda: pf.submit(slow, timeout_s=None)}

        def interrupt(*args):
            raise KeyboardInterrupt
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                calls[call]()
        finally:
            signal.signal(signal.SIGALRM, before)
        with pytest.raises(TimeoutError, match=f"ticket {ticket} did not arrive in 0.01 s"):
            pf.wait(ticket, timeout_s=0.01)
        assert pf.cancel(ticket)


def test_prefetch_cancel_in_flight(way, tables):
    """Cancelled at every point of their way; the slots come back, and the rows of the next request are its own."""
    truth, table = tables.make("host"), tables.make(WAYS[way][0])
    rng = random.Random(0)
    with prefetcher(table, way, dict(seed=0, max_delay_us=500), depth=2) as pf:
        for i in range(60):
            doomed = pf.submit(make_ids(300, seed=i), timeout_s=TIMEOUT_S)
            time.sleep(rng.choice((0, 0, 0.0003, 0.001)))
            assert pf.cancel(doomed)
            assert not pf.cancel(doomed)
            with pytest.raises(KeyError, match="was cancelled"):
                pf.wait(doomed, timeout_s=TIMEOUT_S)
            ids = make_ids(20, seed=1000 + i)
            ticket = pf.submit(ids, timeout_s=TIMEOUT_S)
            torch.testing.assert_close(pf.wait(ticket, timeout_s=TIMEOUT_S), gather_rows(truth, ids), rtol=0, atol=0)
        pf.drain(TIMEOUT_S)
        assert pf.stats()["cancelled"] == 60


def test_prefetch_cancel_ends_a_read_and_a_wait(tables):
    table = tables.make("file", io="preadv_buffered", queue_depth=1)
    inject_faults(tables.reader, max_delay_us=1_000_000)
    slow = torch.arange(0, NUM_ROWS, 3)  # some ten reads, one at a time: two of these take 10 s to their end
    with prefetcher(table, "file", ring_bytes=4 << 20, staging_bytes=4 << 20) as pf:
        ticket, queued = pf.submit(slow), pf.submit(slow)
        waiting = [in_thread(lambda t=t: pf.wait(t, timeout_s=TIMEOUT_S)) for t in (ticket, queued)]
        time.sleep(0.05)
        start = time.perf_counter()
        assert pf.cancel(queued) and pf.cancel(ticket)
        for thread, results in waiting:
            thread.join(TIMEOUT_S)
            assert isinstance(results[0], PrefetchCancelled)
        pf.drain(TIMEOUT_S)
        with pytest.raises(PrefetchQueueFull):  # until the read has ended its slot is taken
            for _ in range(6):
                pf.submit(slow[:1])
        assert time.perf_counter() - start < 4


def test_prefetch_verify_compares_the_ids_that_were_submitted(way, tables):
    ids = make_ids(50)
    with prefetcher(tables.make(WAYS[way][0]), way, verify_rows=2000) as pf:
        ticket = pf.submit(ids)
        ids.zero_()  # the caller's own again
        pf.wait(ticket, timeout_s=TIMEOUT_S)


def test_prefetch_verify_finds_a_wrong_row(way, tables):
    tier = WAYS[way][0]
    table = tables.make(tier)
    ids, state = make_ids(50), torch.get_rng_state()
    with prefetcher(table, way, verify_rows=2000) as pf:  # of 50: each is among them
        pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
        if tier == "host":
            ticket = pf.submit(ids)
            pf.drain(TIMEOUT_S)
            table.rows[ids[5]] ^= 1  # the table changes behind the prefetcher's back
            with pytest.raises(RuntimeError, match=rf"verify: tier host: row {ids[5]} of position \d+ is not what"):
                pf.wait(ticket, timeout_s=TIMEOUT_S)
    with prefetcher(table, way, verify_rows=7) as pf:
        pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
    assert torch.equal(torch.get_rng_state(), state)  # which rows are looked at is no draw of the caller's
