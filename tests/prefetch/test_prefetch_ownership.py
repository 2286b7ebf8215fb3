"""Who owns what: tables that a framework moves, rows that go elsewhere or into autograd, signals, and the end of it all."""
import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from prefetch_cases import ROW_DIM, TIMEOUT_S, Tables, check, exit_status, in_thread, make_ids, num_threads, prefetcher

from engram_kernels import RowPrefetcher, RowTable, gather_rows
from engram_kernels._library import COMPILE_ERROR
from engram_kernels.capacity import SYSTEM

if not COMPILE_ERROR:
    from engram_kernels import _C

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture
def tables(tmp_path, monkeypatch):
    return Tables(tmp_path, monkeypatch)


class Layer(torch.nn.Module):
    def __init__(self, dtype=torch.float32, row_format="f32"):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.randn(500, 64).to(dtype))
        self.table = RowTable.from_tensor(self.rows, row_format=row_format)


def assign(layer):
    layer.rows.data = torch.randn(500, 64)


MOVES = {"bfloat16": lambda layer: layer.to(torch.bfloat16), "half": torch.nn.Module.half,
         "share_memory": torch.nn.Module.share_memory, "data": assign}


@pytest.mark.parametrize("move", MOVES)
def test_prefetch_of_a_table_that_was_moved(move):
    """In a process of its own: it died of this."""
    def run():
        layer, ids = Layer(), make_ids(40, num_rows=500)
        with RowPrefetcher(layer.table, out_dtype=torch.float32) as pf:
            in_flight = pf.submit(ids)
            pf.drain(TIMEOUT_S)
            before = gather_rows(layer.table, ids, torch.float32)
            MOVES[move](layer)
            gc.collect()
            torch.testing.assert_close(pf.wait(in_flight, timeout_s=TIMEOUT_S), before, rtol=0, atol=0)
            message = r"the table is not where it was .* its rows were torch.float32 \[500, 64\], and are .*make a new RowPref"
            with pytest.raises(RuntimeError, match=message):
                pf.submit(ids)
            assert pf.stats()["in_flight"] == 0
        if layer.rows.dtype == torch.float32:
            with RowPrefetcher(layer.table, out_dtype=torch.float32) as pf:
                check_rows = gather_rows(layer.table, ids, torch.float32)
                torch.testing.assert_close(pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S), check_rows, rtol=0, atol=0)
    assert exit_status(run) == 0


def test_prefetch_of_a_table_that_was_converted_before():
    layer = Layer(torch.bfloat16, "bf16").float()
    with pytest.raises(ValueError, match="RowPrefetcher: the table: weight must be torch.bfloat16, got torch.float32"):
        RowPrefetcher(layer.table)


def test_prefetch_holds_the_table_it_reads_until_closed():
    layer, ids = Layer(), make_ids(40, num_rows=500)
    pf = RowPrefetcher(layer.table, out_dtype=torch.float32)
    storage = torch.multiprocessing.reductions.StorageWeakRef(layer.rows.untyped_storage())
    layer.rows.data = torch.zeros(500, 64)
    assert not storage.expired()
    pf.close()
    assert storage.expired()
    with pytest.raises(RuntimeError, match="submit after close"):
        pf.submit(ids)


def test_prefetch_rows_go_to_another_process(tables):
    table, ids = tables.make("host"), make_ids(100)
    code = """
import sys; sys.path[:0] = [{support!r}]
import torch, torch.multiprocessing as mp
from prefetch_cases import make_ids, make_rows, TIMEOUT_S
from engram_kernels import RowPrefetcher, RowTable, gather_rows
def double(rows, queue):
    queue.put(rows.get() * 2)
if __name__ == "__main__":
    mp.set_sharing_strategy("file_system")
    table = RowTable.from_tensor(torch.randn(3000, 64), row_format="f32")
    ids = make_ids(100)
    with RowPrefetcher(table, out_dtype=torch.float32) as pf:
        context = mp.get_context("spawn")
        there, back = context.Queue(), context.Queue()
        process = context.Process(target=double, args=(there, back))
        process.start()
        there.put(pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S))
        assert torch.equal(back.get(timeout=100), gather_rows(table, ids, torch.float32) * 2)
        process.join()
        for seed in range(20):
            rows = pf.wait(pf.submit(make_ids(100, seed=seed)), timeout_s=TIMEOUT_S).share_memory_()
            assert torch.equal(rows, gather_rows(table, make_ids(100, seed=seed), torch.float32))
        class Rows(torch.utils.data.Dataset):
            def __len__(self): return 4
            def __getitem__(self, i): return rows[i]
        for batch in torch.utils.data.DataLoader(Rows(), num_workers=1):
            pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
    print("fine")
"""
    del table, ids
    support = os.path.join(os.path.dirname(__file__), "../support")
    path = tables.path.with_name("elsewhere.py")
    path.write_text(code.format(support=support))
    run = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stdout.strip() == "fine", run.stderr[-2000:]


def test_prefetch_rows_are_saved_alone(tables):
    with RowPrefetcher(tables.make("host")) as pf:
        rows, file = pf.wait(pf.submit(make_ids(100)), timeout_s=TIMEOUT_S), io.BytesIO()
        torch.save(rows, file)
        assert rows.untyped_storage().nbytes() == rows.nbytes == 12_800 and file.tell() < 2 * rows.nbytes
        assert pf.wait(pf.submit(make_ids(0, 3))).shape == (0, 3, ROW_DIM)


def test_prefetch_two_forwards_before_a_backward(tables):
    """Rows that were overwritten are refused by autograd; rows in tensors of their own give the gradient."""
    table = tables.make("host")
    weight = torch.randn(ROW_DIM, ROW_DIM, requires_grad=True)
    requests = [make_ids(30, seed=seed) for seed in range(2)]
    want = sum(gather_rows(table, ids, torch.float32).sum(0) for ids in requests)
    with RowPrefetcher(table, out_dtype=torch.float32, depth=1) as pf:
        first = pf.wait(pf.submit(requests[0]), timeout_s=TIMEOUT_S) @ weight
        second = pf.wait(pf.submit(requests[1]), timeout_s=TIMEOUT_S) @ weight
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (first.sum() + second.sum()).backward()
        weight.grad = None
        outs = [pf.wait(pf.submit(ids), out=torch.empty(30, ROW_DIM), timeout_s=TIMEOUT_S) for ids in requests]
        sum((rows @ weight).sum() for rows in outs).backward()
        torch.testing.assert_close(weight.grad, want[:, None].expand(-1, ROW_DIM))
        weight.grad = None
        for ids in requests:  # one at a time is what the ring is for
            (pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S) @ weight).sum().backward()
        torch.testing.assert_close(weight.grad, want[:, None].expand(-1, ROW_DIM))


def test_prefetch_made_in_inference_mode_trains(tables):
    table, ids = tables.make("host"), make_ids(30)
    with torch.inference_mode():
        pf = RowPrefetcher(table, out_dtype=torch.float32)
        pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
    weight = torch.randn(ROW_DIM, ROW_DIM, requires_grad=True)
    for _ in range(3):
        (pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S) @ weight).sum().backward()
    torch.testing.assert_close(weight.grad, 3 * gather_rows(table, ids, torch.float32).sum(0)[:, None].expand(-1, ROW_DIM))
    with torch.inference_mode():
        check(RowPrefetcher(table), ids, table)
    pf.close()


def test_prefetch_wait_into_what_cannot_be_written_keeps_the_ticket(tables):
    table, ids = tables.make("host"), make_ids(4)
    with prefetcher(table, "host_staged", depth=1) as pf:
        ticket = pf.submit(ids)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="single memory location"):
                pf.wait(ticket, out=torch.zeros(1, ROW_DIM, dtype=torch.bfloat16).expand(4, ROW_DIM), timeout_s=TIMEOUT_S)
        assert pf.stats()["in_flight"] == 1
        torch.testing.assert_close(pf.wait(ticket, timeout_s=TIMEOUT_S), gather_rows(table, ids), rtol=0, atol=0)
        check(pf, ids, table)
        assert pf.stats()["requests"] == 2


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


def resident_bytes():
    return int(SYSTEM.read("/proc/self/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("way", ["host_staged", "host_staged_to_a_device", "file_to_a_device"])
def test_prefetch_closed_ones_hold_nothing(way, tables):
    """Though nobody drops them."""
    table, closed = tables.make("file" if way.startswith("file") else "host"), []

    def make(count):
        for _ in range(count):
            pf = prefetcher(table, way, ring_bytes=8 << 20, staging_bytes=1 << 20, threads=2)
            for seed in range(2):
                pf.wait(pf.submit(make_ids(2000, seed=seed)), timeout_s=TIMEOUT_S)
            pf.close()
            closed.append(pf)
    make(10)
    before, threads = resident_bytes(), num_threads()
    make(100)
    assert num_threads() <= threads
    assert resident_bytes() - before < 16 << 20
    assert all(pf.stats()["requests"] == 2 for pf in closed)


def longest_pause(run):
    """Seconds of the longest time that another thread did not run for, while `run` did."""
    pauses, done = [0.0], threading.Event()

    def tick():
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            pauses.append(now - last)
            last = now
    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    run()
    took = time.perf_counter() - start
    done.set()
    thread.join()
    return max(pauses), took


def test_prefetch_table_calls_do_not_hold_the_interpreter_lock(tables, monkeypatch):
    """What takes long without Python lets it run: a device runtime that pins slowly, a cache that is large."""
    import ctypes
    sleep = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)(lambda pointer, num_bytes: time.sleep(0.3) or 0)
    undo = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda pointer: time.sleep(0.3) or 0)
    registrar = _C.HostRegistrar(*(ctypes.cast(f, ctypes.c_void_p).value for f in (sleep, undo)), 0)
    host = _C.HostMemory(1 << 22)
    for call in (lambda: host.pin(registrar), host.unpin):
        done = []
        thread, _ = in_thread(lambda call=call, done=done: (call(), done.append(1)))
        time.sleep(0.05)
        assert not done and thread.is_alive()  # this thread runs meanwhile
        thread.join(TIMEOUT_S)
        assert done
    rows = torch.zeros(1 << 21, 64, dtype=torch.uint8)
    RowTable.create(tables.path, rows.view(torch.int8), torch.ones(1 << 21, 2), "int8_group32", row_dim=64)

    def open_and_drop():
        table = RowTable.open(tables.path, cache_bytes=400 << 20)
        del table
    open_and_drop()
    pause, took = longest_pause(open_and_drop)
    assert pause < max(0.25, 0.5 * took), (pause, took)


AT_EXIT = """
import sys, threading, time
sys.path[:0] = [sys.argv[1]]
import torch
from prefetch_cases import make_ids
from engram_kernels import RowPrefetcher, RowTable, _C
table = RowTable.from_tensor(torch.randn(3000, 64), row_format="f32")
pf = RowPrefetcher(table, depth=2, _engine=_C.host_engine(1, max_delay_us=2_000_000, seed=int(sys.argv[2])))
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
