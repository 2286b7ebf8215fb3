"""Rows that a client in Python brings: exact behind a cache and a prefetcher; its errors, its end and the interpreter's."""
import os
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from prefetch_cases import exit_status, in_thread
from remote_cases import NUM_ROWS, ROW_DIM, TIMEOUT_S, Client, connected, make_table

import engram_kernels as ek
from engram_kernels._library import COMPILE_ERROR
from engram_kernels.prefetch.errors import PrefetchCancelled
from engram_kernels.table import ray_rows

if not COMPILE_ERROR:
    from engine_faults import faulty_engine

    from engram_kernels import _C

pytestmark = pytest.mark.usefixtures("compiled")
FORMATS = ("bf16", "fp8_e4m3_block32", "fp8_e4m3_block32_packed", "fp8_e4m3_row", "fp8_e4m3_tensor", "int8_group32", "nvfp4")


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("cache_bytes", [0, 10_000])
def test_remote_rows_equal_those_of_the_table(row_format, cache_bytes):
    table = make_table(row_format)
    remote = connected(Client(table), cache_bytes)
    assert remote.fingerprint() == table.fingerprint() and (remote.tier, remote.in_memory) == ("remote", False)
    for seed in range(4):
        ids = torch.randint(-1, NUM_ROWS, (40, 9), generator=torch.Generator().manual_seed(seed))
        want = ek.gather_rows(table, ids)
        assert torch.equal(ek.gather_rows(remote, ids).view(torch.int16), want.view(torch.int16))
        with ek.RowPrefetcher(remote) as pf:
            assert torch.equal(pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S).view(torch.int16), want.view(torch.int16))
    stats = remote.io_stats()
    assert stats["rows"] == stats["cache_hits"] + stats["remote_rows"] and (stats["cache_hits"] > 0) == (cache_bytes > 0)


def test_remote_rows_reach_a_device_and_its_cache():
    table = make_table("int8_group32")
    remote = connected(Client(table))
    with ek.RowPrefetcher(remote, cache_bytes=1 << 14, _engine=faulty_engine(1, True)) as pf:
        for seed in range(6):
            ids = torch.randint(-1, NUM_ROWS, (300,), generator=torch.Generator().manual_seed(seed)) % 50
            assert torch.equal(pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S).view(torch.int16),
                               ek.gather_rows(table, ids).view(torch.int16))
        stats = pf.stats()
        assert stats["hits"]["device_cache"] > 0 and stats["hits"]["remote"] > 0 and stats["hits"]["file"] == 0
        assert stats["tier"] == stats["policy"] == "remote"


def test_remote_rows_an_error_is_that_of_its_own_ticket():
    table = make_table("bf16")
    client = Client(table, before=lambda ids: (_ for _ in ()).throw(ConnectionError("actor 7 died")) if ids[0] == 5 else None)
    with ek.RowPrefetcher(connected(client), depth=3) as pf:
        tickets = [pf.submit(torch.tensor(ids)) for ids in ([1, 2], [5, 9], [3])]
        for ticket, ids in ((tickets[0], [1, 2]), (tickets[2], [3])):
            assert torch.equal(pf.wait(ticket, timeout_s=TIMEOUT_S), ek.gather_rows(table, torch.tensor(ids)))
        with pytest.raises(ConnectionError, match="actor 7 died"):
            pf.wait(tickets[1], timeout_s=TIMEOUT_S)
        assert pf.stats()["failed"] == 1
    with pytest.raises(ConnectionError, match="actor 7 died"):
        connected(client).read_rows(torch.tensor([5]))


@pytest.mark.parametrize(("pieces", "message"), [
    (lambda rows: [(rows[:-1], None)], "brought 2 rows, expected 3"),
    (lambda rows: [(rows, None), (rows[:1], None)], "bytes of rows, expected dense rows of 128 bytes, at most 0"),
    (lambda rows: [(rows.reshape(-1)[:-1], None)], "bytes of rows, expected dense rows of 128"),
    (lambda rows: [(rows[:, ::2], None)], "expected dense rows"),
    (lambda rows: [(rows,)], "brought 1 arrays"),
    (lambda rows: [5], "not a|cannot|Unable|iterable"),
    (lambda rows: 5, "not iterable"),
], ids=["few", "many", "torn", "apart", "alone", "number", "none"])
def test_remote_rows_an_answer_that_does_not_fit_is_an_error(pieces, message):
    out = np.zeros((3, 128), np.uint8)
    tier = _C.client_tier(10, 128, 0, lambda ids, watch: pieces(np.ones((len(ids) // 8, 128), np.uint8)))
    with pytest.raises((ValueError, RuntimeError, TypeError), match=message):
        tier.fetch(np.arange(3), out)
    assert tier.stats()["rows"] == 0


def test_remote_rows_what_a_client_keeps_is_harmless():
    kept = []

    def fetch(ids, watch):
        kept.append((ids, watch))
        yield np.ones((len(ids) // 8, 128), np.uint8), None
        kept.append(watch.cancelled())
    tier = _C.client_tier(10, 128, 0, fetch)
    tier.fetch(np.arange(3), np.zeros((3, 128), np.uint8))
    del tier
    assert kept[1] is False and kept[0][1].cancelled() and np.frombuffer(kept[0][0], np.int64).tolist() == [0, 1, 2]


def test_remote_rows_deadline_cancel_and_close():
    client = Client(make_table("bf16"), endless=True)
    pf = ek.RowPrefetcher(connected(client, verified=False), depth=2)
    ticket = pf.submit(torch.tensor([1]))
    with pytest.raises(TimeoutError, match=f"ticket {ticket} did not arrive in 0.1 s"):
        pf.wait(ticket, timeout_s=0.1)
    waiting, results = in_thread(lambda: pf.wait(ticket, timeout_s=TIMEOUT_S))
    time.sleep(0.05)
    assert pf.cancel(ticket)
    waiting.join(TIMEOUT_S)
    assert isinstance(results[0], PrefetchCancelled)
    pf.submit(torch.tensor([1]))
    begin = time.monotonic()
    pf.close()
    assert time.monotonic() - begin < 5


def test_remote_rows_after_a_fork():
    table = make_table("bf16")
    remote = connected(Client(table), 10_000)
    ids = torch.arange(50)
    with ek.RowPrefetcher(remote) as pf:
        pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)

        def child():
            with pytest.raises(RuntimeError, match="made before a fork"):
                pf.submit(ids)
            assert torch.equal(remote.read_rows(ids)[0], table.rows[ids])  # this client lives in both
        assert exit_status(child) == 0


def test_remote_rows_are_read_only():
    remote = connected(Client(make_table("bf16")))
    with pytest.raises(ValueError, match="table is at fake://rows, which is read-only"):
        ek.row_update(remote, torch.zeros(1, dtype=torch.int64), torch.zeros(1, ROW_DIM), "sgd", lr=0.1)
    with pytest.raises(ValueError, match="policy 'file' cannot read a table of tier 'remote'"):
        ek.RowPrefetcher(remote, policy="file")


def test_remote_rows_fill_a_shared_segment():
    table = make_table("bf16")
    remote = connected(Client(table))
    shared = remote.share(f"remote-{os.getpid()}")
    assert torch.equal(shared.rows, table.rows)


def test_remote_rows_arguments_of_ray_are_named(monkeypatch):
    """Before anything is asked of Ray, for which a stand-in serves."""
    monkeypatch.setattr(ray_rows, "_ray", lambda: None)
    table = make_table("bf16")
    for options, error, message in (
            ({"num_actors": 0}, ValueError, "num_actors is 0, expected at least 1"),
            ({"num_actors": NUM_ROWS + 1}, ValueError, f"num_actors is {NUM_ROWS + 1}, expected at most {NUM_ROWS}"),
            ({"num_actors": 2.0}, TypeError, "num_actors is 2.0, expected an integer"),
            ({"name": 5}, ValueError, "name is 5, expected a string without '/'"),
            ({"name": ""}, ValueError, "name is '', expected a string without '/'"),
            ({"name": "a/b"}, ValueError, "name is 'a/b', expected a string without '/'"),
            ({"timeout_s": -1}, ValueError, "timeout_s is -1, expected seconds, more than 0"),  # Ray takes that for none
            ({"timeout_s": None}, TypeError, "timeout_s is None, expected seconds"),
            ({"max_restarts": -2}, ValueError, "max_restarts is -2, expected at least -1"),
            ({"actor_options": {"name": "x"}}, ValueError, "actor_options has 'name', expected none of name, namespace"),
            ({"actor_options": {"namespace": "x"}}, ValueError, "actor_options has 'namespace', expected none of"),
            ({"cache_bytes": 100}, TypeError, "'cache_bytes' is an option of RowTable.open, but source is a table")):
        with pytest.raises(error, match=f"serve_rows: {message}"):
            ek.serve_rows(table, **options)
    for options, error, message in (({"protocol": "tcp"}, TypeError, "ray:// has no option 'protocol', expected none"),
                                    ({"timeout_s": "5"}, TypeError, "timeout_s is '5', expected seconds, more than 0")):
        with pytest.raises(error, match=f"RowTable.connect: {message}"):
            ek.RowTable.connect("ray://rows", **options)


def test_remote_rows_served_by_the_parent_outlive_a_fork(monkeypatch):
    """A child that leaves a `with` block does not end its parent's actors."""
    killed = []
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: True,
                                                                  kill=lambda actor, no_restart: killed.append(actor)))

    def child():
        with server:
            pass
        os._exit(len(killed))
    with ray_rows.RowServer("ray://rows", ["an actor"], []) as server:
        assert exit_status(child) == 0
    assert killed == ["an actor"]


def test_remote_rows_without_an_engine_say_what_to_install(monkeypatch):
    for module in ("ray", "mooncake", "mooncake.store"):
        monkeypatch.setitem(sys.modules, module, None)
    for call in (lambda: ek.serve_rows(make_table("bf16")), lambda: ek.RowTable.connect("ray://rows")):
        with pytest.raises(RuntimeError, match=r"pip install 'engram-kernels\[ray\]'"):
            call()
    address = "mooncake://127.0.0.1:50051/rows"
    for call in (lambda: ek.store_rows(make_table("bf16"), address), lambda: ek.RowTable.connect(address)):
        with pytest.raises(RuntimeError, match=r"pip install 'engram-kernels\[mooncake\]', and Debian's libibverbs1"):
            call()


AT_EXIT = """
import sys, threading, time
sys.path[:0] = [sys.argv[1]]
import torch
import engram_kernels as ek
from remote_cases import Client, connected, make_table
remote = connected(Client(make_table("bf16"), endless=True), verified=False)
pf = ek.RowPrefetcher(remote, depth=2)
tickets = [pf.submit(torch.tensor([1])) for _ in range(2)]
for call in (lambda: pf.wait(tickets[0]), lambda: pf.wait(tickets[1]), pf.drain, lambda: remote.read_rows(torch.tensor([1]))):
    threading.Thread(target=call, daemon=True).start()
time.sleep(0.2)
"""


def test_remote_rows_at_the_end_of_the_interpreter():
    support = os.path.join(os.path.dirname(__file__), "../support")
    run = subprocess.run([sys.executable, "-c", AT_EXIT, support], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0 and "Fatal" not in run.stderr and "terminate" not in run.stderr, (run.returncode, run.stderr)
