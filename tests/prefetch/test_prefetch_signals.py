"""Signals in the middle of a submit or a wait, and the end of the interpreter: no ticket, slot or process is lost."""
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from prefetch_cases import ROW_DIM, TIMEOUT_S, Tables, check, make_ids, prefetcher

from engram_kernels import gather_rows
from engram_kernels.prefetch.errors import PrefetchCancelled

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture
def tables(tmp_path, monkeypatch):
    return Tables(tmp_path, monkeypatch)


SOAK = """
import os, signal, sys, threading, time
sys.path[:0] = [sys.argv[1]]
import torch
from prefetch_cases import TIMEOUT_S, make_ids
from engram_kernels import RowPrefetcher, RowTable, gather_rows
out = torch.empty(200, 64) if sys.argv[2] == "out" else None
table = RowTable.from_tensor(torch.randn(3000, 64), row_format="f32")
requests = [make_ids(200, seed=seed) for seed in range(5)]
want = [gather_rows(table, ids, torch.float32) for ids in requests]
pf = RowPrefetcher(table, out_dtype=torch.float32, depth=4)
sent, caught, armed, done = 0, 0, False, threading.Event()

def handle(number, frame):  # as Python's own, but not while the test itself looks at what happened
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt

def send():
    global sent
    while sent < 60:
        time.sleep(0.004 + 0.0007 * (sent % 7))
        sent += 1
        os.kill(os.getpid(), signal.SIGINT)
    done.set()

signal.signal(signal.SIGINT, handle)
tickets, i = [], 0
thread = threading.Thread(target=send)
thread.start()
while not done.is_set():
    ticket = rows = None
    submits = len(tickets) < 4 and i % 3 < 2
    try:
        armed = True
        if submits:
            ticket = pf.submit(requests[i % 5])
        elif tickets:
            rows = pf.wait(tickets[0][0], out=out, timeout_s=TIMEOUT_S)
        armed = False
    except KeyboardInterrupt:
        caught += 1
    armed = False
    if ticket is not None:
        tickets.append((ticket, i % 5))
    if rows is not None and not torch.equal(rows, want[tickets.pop(0)[1]]):
        sys.exit("wrong rows")
    i += 1
    in_flight = pf.stats()["in_flight"]
    if in_flight != len(tickets) or len(pf._submitted) != len(tickets):
        if not (out is not None and len(pf._submitted) == len(tickets)):  # the rows of one may be in `out` already
            sys.exit(f"{in_flight} in flight, {len(tickets)} tickets, {len(pf._submitted)} known")
thread.join()
for ticket, which in tickets:
    if not torch.equal(pf.wait(ticket, timeout_s=TIMEOUT_S), want[which]):
        sys.exit("wrong rows")
many = [pf.submit(requests[0]) for _ in range(4)]
print(sent, caught, len(many))
"""


@pytest.mark.parametrize("out", ["slot", "out"])
def test_prefetch_sixty_signals_lose_nothing(out, tmp_path):
    support = os.path.join(os.path.dirname(__file__), "../support")
    run = subprocess.run([sys.executable, "-c", SOAK, support, out], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    sent, caught, many = map(int, run.stdout.split())
    assert sent == 60 and caught > 20 and many == 4


@pytest.mark.parametrize("call", ["release", "rows", "submitted", "runtime.wait"])
def test_prefetch_interrupted_between_two_steps_of_a_wait(call, tables, monkeypatch):
    """A signal is heeded when a call into C comes back: what each one did is undone, or kept for the next wait."""
    table, ids = tables.make("host"), make_ids(20)
    want = gather_rows(table, ids)

    def interrupted(method):
        def run(*args):
            method(*args)
            raise KeyboardInterrupt
        return run

    class Submitted(dict):
        def __delitem__(self, ticket):
            super().__delitem__(ticket)
            raise KeyboardInterrupt

    for out in (None, torch.empty(20, ROW_DIM, dtype=torch.bfloat16)):
        with prefetcher(table, "host_staged", depth=2) as pf:
            check(pf, make_ids(7), table)
            ticket = pf.submit(ids)
            with monkeypatch.context() as patch:
                if call == "submitted":
                    patch.setattr(pf, "_submitted", Submitted(pf._submitted))
                else:
                    name = call.removeprefix("runtime.")
                    patch.setattr(pf._runtime, name, interrupted(getattr(pf._runtime, name)))
                if call == "release" and out is None:
                    continue
                with pytest.raises(KeyboardInterrupt):
                    pf.wait(ticket, out=out, timeout_s=TIMEOUT_S)
                pf.__dict__["_submitted"] = dict(pf._submitted)
            torch.testing.assert_close(pf.wait(ticket, timeout_s=TIMEOUT_S), want, rtol=0, atol=0)
            assert pf.stats()["in_flight"] == 0
            tickets = [pf.submit(ids) for _ in range(2)]
            for again in tickets:
                torch.testing.assert_close(pf.wait(again, timeout_s=TIMEOUT_S), want, rtol=0, atol=0)


@pytest.mark.parametrize("step", ["before", "after"])
def test_prefetch_interrupted_submit_leaves_no_slot_taken(step, tables, monkeypatch):
    with prefetcher(tables.make("host"), "host_staged", depth=1) as pf:
        submit = pf._runtime.submit

        def interrupted(*args):
            if step == "after":
                submit(*args)
            raise KeyboardInterrupt
        for _ in range(3):
            monkeypatch.setattr(pf._runtime, "submit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                pf.submit(make_ids(5))
            assert pf._submitted == {}
            monkeypatch.setattr(pf._runtime, "submit", submit)
            check(pf, make_ids(5), tables.make("host"))


AT_EXIT = """
import sys, threading, time
sys.path[:0] = [sys.argv[1]]
import torch
from engine_faults import faulty_engine
from prefetch_cases import make_ids
from engram_kernels import RowPrefetcher, RowTable
table = RowTable.from_tensor(torch.randn(3000, 64), row_format="f32")
pf = RowPrefetcher(table, depth=2, _engine=faulty_engine(1, max_delay_us=2_000_000, seed=int(sys.argv[2])))
tickets = [pf.submit(make_ids(10)) for _ in range(2)]
for call in (lambda: pf.wait(tickets[0]), lambda: pf.wait(tickets[1]), lambda: pf.submit(make_ids(10), timeout_s=None), pf.drain):
    threading.Thread(target=call, daemon=True).start()
time.sleep(0.05)
"""


@pytest.mark.parametrize("seed", range(3))
def test_prefetch_daemon_threads_in_a_wait_at_exit(seed):
    support = os.path.join(os.path.dirname(__file__), "../support")
    run = subprocess.run([sys.executable, "-c", AT_EXIT, support, str(seed)], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0 and "Fatal" not in run.stderr and "terminate" not in run.stderr, (run.returncode, run.stderr)


def test_prefetch_signal_handler_that_raises_nothing(tables):
    """A wait goes on after a handler that returns."""
    seen, table = [], tables.make("host")
    old = signal.signal(signal.SIGUSR1, lambda *args: seen.append(args))
    try:
        with prefetcher(table, "host_staged", dict(max_delay_us=400_000, seed=3)) as pf:
            ticket = pf.submit(make_ids(9))
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            torch.testing.assert_close(pf.wait(ticket, timeout_s=TIMEOUT_S), gather_rows(table, make_ids(9)), rtol=0, atol=0)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert seen


def test_prefetch_closed_by_a_signal_handler_in_a_wait(tables):
    pf = prefetcher(tables.make("host"), "host_staged", dict(max_delay_us=400_000, seed=3))
    old = signal.signal(signal.SIGUSR1, lambda *_: pf.close())
    try:
        ticket = pf.submit(make_ids(9))
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(PrefetchCancelled, match="closed"):
            pf.wait(ticket, timeout_s=TIMEOUT_S)
    finally:
        signal.signal(signal.SIGUSR1, old)
