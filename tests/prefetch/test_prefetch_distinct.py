"""Policy uva_distinct: ids that a device has made distinct, and when "auto" takes it. CPU threads stand for the device."""
import json

import pytest
import torch
from prefetch_cases import ROW_DIM, TIMEOUT_S, Tables, check, in_thread, make_ids, prefetcher

from engram_kernels import RowPrefetcher, RowTable, gather_rows
from engram_kernels.prefetch.distinct import distinct_ids
from engram_kernels.prefetch.policy import Policy, choose_policy

WAY = "host_uva_distinct_from_a_device"


@pytest.fixture
def tables(tmp_path, monkeypatch, compiled):
    return Tables(tmp_path, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("ids", [[-1], [7], [-1, -1, -1], [5, 5, -1, 3, 5], [9, 8, 7, 6], [0, -1, 0, -1, 2]])
def test_distinct_ids_name_the_row_of_each_position(ids, dtype):
    asked = torch.tensor(ids, dtype=dtype)
    distinct, places, count = distinct_ids(asked)
    wanted = sorted({i for i in ids if i != -1})
    assert distinct.tolist() == wanted + [-1] * (len(ids) - len(wanted)) and distinct.dtype == dtype
    assert int(count) == len(wanted) and places.dtype == torch.int32
    assert [-1 if p < 0 else int(distinct[p]) for p in places.tolist()] == ids


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row_format", ["bf16", "f32", "fp8_e4m3_block32", "fp8_e4m3_tensor", "int8_group32"])
def test_distinct_rows_have_the_bits_of_direct_ones(row_format, out_dtype, tables):
    table = tables.make("host", row_format)
    with prefetcher(table, WAY, depth=3, out_dtype=out_dtype) as pf:
        for seed, shape in enumerate([(1,), (40, 3), (700,), (700,)]):
            ids = make_ids(*shape, seed=seed)
            got, want = pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S), gather_rows(table, ids, out_dtype)
            integers = torch.int32 if out_dtype == torch.float32 else torch.int16
            assert torch.equal(got.view(integers), want.view(integers))


def test_distinct_counts_rows_asked_for_and_fetched(tables):
    with prefetcher(tables.make("host"), WAY) as pf:
        for _ in range(2):
            pf.wait(pf.submit(torch.tensor([[4, 4, -1], [9, 4, 7]])), timeout_s=TIMEOUT_S)
        stats = pf.stats()
    assert stats["distinct"] == {"requests": 2, "asked": 12, "fetched": 6}
    with prefetcher(tables.make("host"), "host_uva_from_a_device") as pf:
        pf.wait(pf.submit(torch.tensor([4, 4])), timeout_s=TIMEOUT_S)
        assert pf.stats()["distinct"] == {"requests": 0, "asked": 0, "fetched": 0}


def test_distinct_requests_of_several_threads_keep_apart(tables):
    """All of them go through one piece of memory between their two gathers."""
    table = tables.make("host")
    with prefetcher(table, WAY, dict(seed=3, max_delay_us=200), depth=6) as pf:
        def run(seed):
            for i in range(30):
                ids = make_ids(50, seed=seed * 1000 + i)
                out = torch.empty(50, ROW_DIM, dtype=torch.bfloat16)
                pf.wait(pf.submit(ids, timeout_s=TIMEOUT_S), out=out, timeout_s=TIMEOUT_S)
                assert torch.equal(out, gather_rows(table, ids))
            return "right"
        threads = [in_thread(lambda seed=seed: run(seed)) for seed in range(4)]
        for thread, results in threads:
            thread.join(TIMEOUT_S)
            assert results == ["right"]


def test_distinct_bad_id_fails_its_own_ticket(tables):
    table = tables.make("host")
    with prefetcher(table, WAY, depth=2) as pf:
        bad, good = pf.submit(torch.tensor([1, table.num_rows, 1])), pf.submit(torch.tensor([2, 2]))
        with pytest.raises(IndexError, match=rf"is {table.num_rows}, expected \[0, {table.num_rows}\)"):
            pf.wait(bad, timeout_s=TIMEOUT_S)
        assert torch.equal(pf.wait(good, timeout_s=TIMEOUT_S), gather_rows(table, torch.tensor([2, 2])))


def test_distinct_failing_launches_reach_their_own_tickets(tables):
    """Whichever of the two gathers fails; the ids are read until both have ended."""
    table, outcomes = tables.make("host"), set()
    with prefetcher(table, WAY, dict(seed=1, error=0.2, reorder=True), depth=3) as pf:
        for i in range(40):
            batch = [make_ids(50, seed=i * 3 + j) for j in range(3)]
            for ticket, ids in [(pf.submit(ids), ids) for ids in batch]:
                try:
                    assert torch.equal(pf.wait(ticket, timeout_s=TIMEOUT_S), gather_rows(table, ids))
                    outcomes.add("right")
                except RuntimeError as err:
                    assert f"ticket {ticket} of 50 ids" in str(err) and "injected failure of a launch" in str(err)
                    outcomes.add("failed")
    assert outcomes == {"right", "failed"}


def test_distinct_takes_a_slot_more(tables):
    table = tables.make("host")
    sizes = []
    for way in ("host_uva_from_a_device", WAY):
        with prefetcher(table, way, depth=3) as pf:
            sizes.append(pf.stats()["memory_bytes"])
            slot_bytes = pf._options.slot_bytes
    assert sizes[1] - sizes[0] == slot_bytes


def surface(path, **rates):
    path.write_text(json.dumps({"schema_version": 1, "cells": [{"placement": name, "row_bytes": 264, "rows_per_s": rate}
                                                               for name, rate in rates.items()]}))
    return path


def test_auto_takes_distinct_rows_where_they_repay_the_sort(tmp_path, tables):
    table, cuda = RowTable.from_tensor(torch.zeros(3, 66), row_format="f32"), torch.device("cuda")
    fast = choose_policy("auto", table, cuda, surface(tmp_path / "a", staged=3e7, uva=1e8, device=1e9))
    slow = choose_policy("auto", table, cuda, surface(tmp_path / "b", staged=3e7, uva=5e7, device=1e9))
    assert fast.name == slow.name == "uva" and fast.distinct_from == 44118 and slow.distinct_from == 16130
    assert "uva 1e+08 rows/s; distinct rows alone from 44118 ids on" in fast.reason
    never = choose_policy("auto", table, cuda, surface(tmp_path / "c", staged=3e7, uva=1e9, device=1e9))
    assert never.distinct_from is None and never.reason.endswith("; never distinct rows alone")
    assert choose_policy("auto", table, cuda, surface(tmp_path / "d", staged=3e8, uva=1e8, device=1e9)).name == "staged"
    assert choose_policy("auto", table, cuda, surface(tmp_path / "e", staged=1e7, uva=1e8)).distinct_from == 1 << 16
    assert choose_policy("uva", table, cuda, None).distinct_from is None
    assert choose_policy("uva_distinct", table, cuda, None).distinct_from == 1


def test_small_requests_are_gathered_as_they_are(tables, monkeypatch):
    monkeypatch.setattr("engram_kernels.prefetch.row_prefetcher.choose_policy",
                        lambda *args: Policy("uva", "a test", 100))
    table = tables.make("host")
    with prefetcher(table, WAY) as pf:
        for count in (99, 100, 101):
            check(pf, make_ids(count), table)
        assert pf.stats()["distinct"]["requests"] == 2


def test_distinct_on_the_cpu_reads_rows_in_place(tables):
    table = tables.make("host")
    with RowPrefetcher(table, policy="uva_distinct") as pf:
        check(pf, make_ids(50), table)
        assert pf.stats()["distinct"]["requests"] == 0
