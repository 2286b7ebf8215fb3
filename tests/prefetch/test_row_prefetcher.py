"""RowPrefetcher: rows equal gather_rows bit for bit, errors reach their own ticket, nothing hangs. More
in test_prefetch_{policy,faults,lifetime,ownership}.py."""
import threading

import pytest
import torch
from prefetch_cases import exit_status, num_threads

from engram_kernels import RowPrefetcher, RowTable, gather_rows
from engram_kernels.capacity import CapacityError
from engram_kernels.prefetch.row_prefetcher import PrefetchCancelled, PrefetchQueueFull
from engram_kernels.testing import random_rows

TIMEOUT_S = 30


pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(params=["memory", "file"])
def table(request, tmp_path):
    rows, scales = random_rows("fp8_e4m3_block32", 500, 64, torch.Generator().manual_seed(0))
    if request.param == "memory":
        return RowTable.from_tensor(rows, scales, row_format="fp8_e4m3_block32")
    return RowTable.create(tmp_path / "table.safetensors", [(rows, scales)], num_rows=500, row_dim=64,
                           row_format="fp8_e4m3_block32")


def make_ids(*shape, seed=0):
    ids = torch.randint(0, 500, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    ids.view(-1)[::7] = -1
    return ids


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_row_prefetcher_equals_gather_rows(table, depth):
    requests = [make_ids(n, 3, seed=n) for n in (4, 1, 9, 0, 30, 2, 7)]
    with RowPrefetcher(table, depth=depth) as prefetcher:
        tickets, got = [], []
        for ids in requests:
            if len(tickets) == depth:
                got.append(prefetcher.wait(tickets.pop(0), timeout_s=TIMEOUT_S).clone())
            tickets.append(prefetcher.submit(ids))
        got += [prefetcher.wait(t, timeout_s=TIMEOUT_S).clone() for t in tickets]
        stats = prefetcher.stats()
    for ids, rows in zip(requests, got, strict=True):
        torch.testing.assert_close(rows, gather_rows(table, ids), rtol=0, atol=0)
    assert stats["requests"] == len(requests) and stats["requested"] == sum(ids.numel() for ids in requests)
    assert stats["payload_bytes"] == stats["requested"] * table.row_bytes
    assert stats["in_flight"] == 0 and stats["fetch_s"] > 0


def test_row_prefetcher_waits_in_any_order_and_into_out(table):
    first, second = make_ids(5, 2, seed=1), make_ids(8, 2, seed=2)
    with RowPrefetcher(table, depth=2, out_dtype=torch.float32) as prefetcher:
        a, b = prefetcher.submit(first), prefetcher.submit(second)
        out = torch.empty(8, 2, 64)
        assert prefetcher.wait(b, out=out, timeout_s=TIMEOUT_S) is out
        rows = prefetcher.wait(a, timeout_s=TIMEOUT_S)
        torch.testing.assert_close(rows, gather_rows(table, first, torch.float32), rtol=0, atol=0)
        torch.testing.assert_close(out, gather_rows(table, second, torch.float32), rtol=0, atol=0)


def test_row_prefetcher_rows_stay_until_the_next_wait(table):
    ids = [make_ids(50, seed=s) for s in range(4)]
    with RowPrefetcher(table, depth=1) as prefetcher:
        rows = prefetcher.wait(prefetcher.submit(ids[0]), timeout_s=TIMEOUT_S)
        ticket = prefetcher.submit(ids[1])  # fetched while `rows` is being read
        prefetcher.drain(TIMEOUT_S)
        torch.testing.assert_close(rows, gather_rows(table, ids[0]), rtol=0, atol=0)
        torch.testing.assert_close(prefetcher.wait(ticket, timeout_s=TIMEOUT_S), gather_rows(table, ids[1]), rtol=0, atol=0)


def test_row_prefetcher_error_reaches_its_own_ticket(table):
    good, bad = make_ids(5), torch.tensor([3, 500])
    with RowPrefetcher(table, depth=3) as prefetcher:
        tickets = [prefetcher.submit(ids) for ids in (good, bad, good)]
        prefetcher.wait(tickets[0], timeout_s=TIMEOUT_S)
        with pytest.raises(IndexError, match="500"):
            prefetcher.wait(tickets[1], timeout_s=TIMEOUT_S)
        rows = prefetcher.wait(tickets[2], timeout_s=TIMEOUT_S)
        torch.testing.assert_close(rows, gather_rows(table, good), rtol=0, atol=0)


def test_row_prefetcher_full_ring_closed_and_unknown_tickets(table):
    prefetcher = RowPrefetcher(table, depth=1)
    ticket = prefetcher.submit(make_ids(3))
    with pytest.raises(PrefetchQueueFull, match="1 requests are in flight, as many as depth allows"):
        prefetcher.submit(make_ids(3))
    prefetcher.wait(ticket, timeout_s=TIMEOUT_S)
    with pytest.raises(KeyError, match="was waited for before"):
        prefetcher.wait(ticket, timeout_s=TIMEOUT_S)
    with pytest.raises(KeyError, match="unknown"):
        prefetcher.wait(99, timeout_s=TIMEOUT_S)
    prefetcher.close()
    prefetcher.close()
    with pytest.raises(RuntimeError, match="submit after close"):
        prefetcher.submit(make_ids(3))
    with pytest.raises(PrefetchCancelled, match=f"it is closed, so ticket {ticket} has no rows any more"):
        prefetcher.wait(ticket)


def test_row_prefetcher_refuses_what_is_no_number_or_no_time():
    table = RowTable.from_tensor(torch.randn(20, 32), row_format="f32")
    with RowPrefetcher(table, out_dtype=torch.float32) as pf:
        ticket = pf.submit(torch.tensor([1, 2]))
        for wrong in (float(ticket), torch.tensor(ticket), str(ticket), None, [ticket]):
            with pytest.raises(TypeError, match="RowPrefetcher.wait: ticket is .*, expected the number that submit returned"):
                pf.wait(wrong)
        for call in (lambda t: pf.wait(ticket, timeout_s=t), pf.drain, lambda t: pf.submit(torch.tensor([1]), t)):
            with pytest.raises(TypeError, match="timeout_s is '1', expected seconds, or None for no limit"):
                call("1")
        pf.drain(10**400)
        assert torch.equal(pf.wait(ticket, timeout_s=10**400), table.rows[1:3]) and pf.stats()["in_flight"] == 0


def test_row_prefetcher_refuses_the_ticket_of_another(table):
    """Both had the number 0, and the rows of the wrong request were returned."""
    with RowPrefetcher(table) as one, RowPrefetcher(table) as other:
        tickets = one.submit(make_ids(3)), other.submit(make_ids(4))
        with pytest.raises(KeyError, match="unknown"):
            other.wait(tickets[0], timeout_s=TIMEOUT_S)
        assert len(other.wait(tickets[1], timeout_s=TIMEOUT_S)) == 4


def test_row_prefetcher_rejects_bad_arguments(table):
    with pytest.raises(TypeError, match="table must be a RowTable, got Tensor"):
        RowPrefetcher(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="depth is 0, expected at least 1"):
        RowPrefetcher(table, depth=0)
    for wrong in ("a", 2.5, True):
        with pytest.raises(TypeError, match=f"depth is {wrong!r}, expected an integer"):
            RowPrefetcher(table, depth=wrong)
    with pytest.raises(ValueError, match="depth is 1000000000, expected at most 1048576"):
        RowPrefetcher(table, depth=10**9)
    with pytest.raises(CapacityError, match=r"no address space for a ring of \d+ bytes, 5 slots"):
        RowPrefetcher(table, ring_bytes=10**15)
    with pytest.raises(ValueError, match="nothing.json is no report of engram-kernels profile"):
        RowPrefetcher(table, surface="nothing.json")  # also where no policy is chosen by it
    with pytest.raises(ValueError, match="device is meta, expected cpu or cuda"):
        RowPrefetcher(table, device="meta")
    if not torch.cuda.is_available():
        for device in ("cuda", "cuda:0"):
            with pytest.raises(RuntimeError, match=f"device {device} is not available"):
                RowPrefetcher(table, device=device)
    with pytest.raises(ValueError, match="ring_bytes is -1"):
        RowPrefetcher(table, ring_bytes=-1)
    with pytest.raises(ValueError, match="out_dtype is torch.int8"):
        RowPrefetcher(table, out_dtype=torch.int8)
    with pytest.raises(ValueError, match="policy is 'fastest', expected one of auto"):
        RowPrefetcher(table, policy="fastest")


def test_row_prefetcher_wait_into_out_from_many_threads(table):
    wrong = []

    def work(seed, prefetcher):
        out = torch.empty(17, 64, dtype=torch.bfloat16)
        for i in range(100):
            ids = make_ids(17, seed=100 * seed + i)
            prefetcher.wait(prefetcher.submit(ids), out=out, timeout_s=TIMEOUT_S)
            if not torch.equal(out, gather_rows(table, ids)):
                wrong.append((seed, i))

    with RowPrefetcher(table, depth=4) as prefetcher:
        threads = [threading.Thread(target=work, args=(seed, prefetcher)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
    assert wrong == []


def test_row_prefetcher_checks_out_and_keeps_the_ticket(table):
    with RowPrefetcher(table) as prefetcher:
        ids = make_ids(5)
        ticket = prefetcher.submit(ids)
        with pytest.raises(ValueError, match="out must have shape"):
            prefetcher.wait(ticket, out=torch.empty(3, 5, 64, dtype=torch.bfloat16))
        torch.testing.assert_close(prefetcher.wait(ticket, timeout_s=TIMEOUT_S), gather_rows(table, ids), rtol=0, atol=0)
        with pytest.raises(TypeError, match="row_ids must be a tensor, got list"):
            prefetcher.submit([1, 2])


def test_row_prefetcher_takes_a_trained_table():
    weight = torch.nn.Parameter(torch.randn(9, 8))
    with RowPrefetcher(RowTable.from_tensor(weight, row_format="f32"), out_dtype=torch.float32) as prefetcher:
        rows = prefetcher.wait(prefetcher.submit(torch.tensor([3, 3])), timeout_s=TIMEOUT_S)
    torch.testing.assert_close(rows, weight.detach()[[3, 3]])


def test_row_prefetcher_cancel_drain_and_close(table):
    ids = make_ids(6)
    prefetcher = RowPrefetcher(table, depth=2)
    doomed, kept = prefetcher.submit(ids), prefetcher.submit(ids)
    assert prefetcher.cancel(doomed) and not prefetcher.cancel(doomed)
    with pytest.raises(KeyError, match=f"ticket {doomed} is unknown, was cancelled, or was waited for before"):
        prefetcher.wait(doomed, timeout_s=TIMEOUT_S)
    prefetcher.drain(TIMEOUT_S)
    torch.testing.assert_close(prefetcher.wait(kept, timeout_s=0), gather_rows(table, ids), rtol=0, atol=0)
    tickets = [prefetcher.submit(ids, timeout_s=TIMEOUT_S) for _ in range(2)]
    with pytest.raises(PrefetchQueueFull):
        prefetcher.submit(ids, timeout_s=0.01)
    with pytest.raises(ValueError, match="raise ring_bytes or submit fewer"):
        prefetcher.submit(torch.zeros(1 << 22, dtype=torch.int32))
    prefetcher.close()
    with pytest.raises((PrefetchCancelled, KeyError)):
        prefetcher.wait(tickets[0], timeout_s=TIMEOUT_S)
    stats = prefetcher.stats()
    assert (stats["requests"], stats["cancelled"], stats["depth"]) == (1, 1, 2)


def test_row_prefetcher_verifies_rows(table):
    ids = make_ids(40)
    with RowPrefetcher(table, verify_rows=100) as prefetcher:
        prefetcher.wait(prefetcher.submit(ids), timeout_s=TIMEOUT_S)
        if table.tier == "host":
            ticket = prefetcher.submit(ids)
            prefetcher.drain(TIMEOUT_S)
            table.rows.bitwise_xor_(torch.tensor(1, dtype=torch.uint8))
            with pytest.raises(RuntimeError, match=r"verify: tier host: row \d+ of position \d+ is not what gather_rows reads"):
                prefetcher.wait(ticket, timeout_s=TIMEOUT_S)


def test_row_prefetcher_trace(table, tmp_path):
    with RowPrefetcher(table) as prefetcher:
        prefetcher.wait(prefetcher.submit(make_ids(3)), timeout_s=TIMEOUT_S)
        prefetcher.trace(tmp_path / "trace.json")
    assert "tier host" in (tmp_path / "trace.json").read_text()


def test_row_prefetcher_dropped_ends_its_threads(table):
    for i in range(8):
        if i == 3:
            before = num_threads()
        prefetcher = RowPrefetcher(table)
        prefetcher.wait(prefetcher.submit(make_ids(30)), timeout_s=TIMEOUT_S)
        prefetcher.submit(make_ids(30))
        del prefetcher
    assert num_threads() <= before


def test_row_prefetcher_dropped_after_a_fork(table):
    kept = [RowPrefetcher(table)]
    assert exit_status(kept.clear) == 0
    kept[0].close()
