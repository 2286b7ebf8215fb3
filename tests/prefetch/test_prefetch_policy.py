"""Ways that rows take: each equals gather_rows bit for bit; which one "auto" takes; counters, trace, memory."""
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from prefetch_cases import NUM_ROWS, ROW_DIM, TIMEOUT_S, WAYS, Tables, make_ids, prefetcher

from engram_kernels import RowPrefetcher, RowTable, gather_rows
from engram_kernels.prefetch import runtime as prefetch_runtime
from engram_kernels.prefetch.policy import choose_policy, read_surface
from engram_kernels.row_format import ROW_FORMATS


def cell(placement, row_bytes, rows_per_s, **more):
    return {"probe": "gpu_gather", "placement": placement, "row_bytes": row_bytes, "rows_per_s": rows_per_s, "status": "ok",
            "beside": "nothing", "cold": True, **more}


SURFACE = {"schema_version": 1, "cells": [  # as engram-kernels profile writes them
    cell("staged", 256, 3e7, rows=4096), cell("staged", 256, 1e7, rows=1), cell("uva", 256, 2e7), cell("uva", 4096, 9e7),
    cell("staged", 4096, 1e6), cell("uva", 256, 8e9, status="invalid"), cell("uva", 256, 8e9, cold=False),
    cell("uva", 256, 8e9, beside="gemm"), {"probe": "host_limits", "status": "ok"}]}


@pytest.fixture
def tables(tmp_path, monkeypatch, compiled):
    return Tables(tmp_path, monkeypatch)


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


@pytest.mark.parametrize("row_format", ROW_FORMATS)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_prefetch_way_equals_gather_rows(row_format, out_dtype, way, tables):
    truth, table = tables.make("host", row_format), tables.make(WAYS[way][0], row_format)
    with prefetcher(table, way, out_dtype=out_dtype) as pf:
        for shape in ((5, 4), (0,), (1,), (700,), (3, 0, 2)):  # 700: several blocks of the staging ring
            ids = make_ids(*shape)
            for wanted in (ids, ids.long(), torch.full_like(ids, -1)):
                rows = pf.wait(pf.submit(wanted), timeout_s=TIMEOUT_S)
                assert rows.shape == (*shape, ROW_DIM) and rows.dtype == out_dtype
                torch.testing.assert_close(rows, gather_rows(truth, wanted, out_dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tier", ["host", "file"])
def test_prefetch_padded_strided_and_single_rows(tier, tables):
    padded = torch.zeros(NUM_ROWS, 96, dtype=torch.uint8)
    padded[:, :66] = torch.randint(0, 120, (NUM_ROWS, 66), dtype=torch.uint8)
    sliced = torch.randn(200, 80)[:, 3:43]
    for weight, fmt, dim, ids in ((padded, "fp8_e4m3_block32_packed", 64, make_ids(300)), (sliced, "f32", 40, make_ids(50) % 200),
                                  (torch.randn(1, 8), "f32", 8, torch.tensor([0, -1, 0]))):
        truth = table = RowTable.from_tensor(weight, row_format=fmt, row_dim=dim)
        if tier == "file":
            table = RowTable.create(tables.path, weight, row_format=fmt, row_dim=dim)
        for way in (w for w in WAYS if WAYS[w][0] == tier):
            with prefetcher(table, way) as pf:
                torch.testing.assert_close(pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S), gather_rows(truth, ids), rtol=0, atol=0)


def test_prefetch_ids_are_copied_by_submit(way, tables):
    table = tables.make(WAYS[way][0])
    ids = make_ids(100)
    want = gather_rows(table, ids)
    with prefetcher(table, way, dict(seed=0, max_delay_us=5000)) as pf:
        ticket = pf.submit(ids)
        ids.fill_(1)
        torch.testing.assert_close(pf.wait(ticket, timeout_s=TIMEOUT_S), want, rtol=0, atol=0)


def test_prefetch_counters(way, tables):
    tier, policy, has_device_memory = WAYS[way]
    table = tables.make(tier, **(dict(cache_bytes=1 << 20) if tier == "file" else {}))
    ids = torch.tensor([[4, 4, -1], [9, 4, 7]])
    with prefetcher(table, way) as pf:
        for _ in range(2):
            pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
        stats = pf.stats()
    unique = 3 if policy == "file" or (policy == "staged" and has_device_memory) else 6  # gathers read duplicates from a cache
    assert (stats["requests"], stats["requested"], stats["unique"]) == (2, 12, 2 * unique)
    wanted = {"device": 0, "host": 0, "device_cache": 0, "cache": 0, "file": 0, "remote": 0}
    if "cached" in way:  # nothing is left to look up in the file tier's own cache
        wanted.update({"device_cache": 3, tier: 3})
    else:
        wanted.update({"cache": 3, "file": 3} if tier == "file" else {"host": 12 if unique == 6 else 6})
    assert stats["hits"] == wanted and stats["payload_bytes"] == 12 * table.row_bytes
    assert (stats["moved_bytes"] > 0) == (tier == "file" or has_device_memory)
    assert stats["policy"] == policy and stats["provenance"] == "measured" and stats["tier"] == tier
    assert stats["fetch_s"] > 0 and stats["max_in_flight"] == 1 and stats["failed"] == stats["cancelled"] == 0


def test_prefetch_trace(way, tables, tmp_path):
    with prefetcher(tables.make(WAYS[way][0]), way, trace_spans=8) as pf:
        for seed in range(9):
            pf.wait(pf.submit(make_ids(5, seed=seed)), timeout_s=TIMEOUT_S)
        pf.trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    tracks = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert sorted(tracks.values()) == ["caller", "tier device", "tier file", "tier host", "tier remote"]
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    tickets = [e["args"]["ticket"] for e in spans]
    assert len(spans) == 8 and tickets[-1] == max(tickets) > min(tickets) and all(e["dur"] >= 0 for e in spans)
    fetches = {tracks[e["tid"]] for e in spans if e["name"] != "wait"}
    assert WAYS[way][0] == "host" or "tier file" in fetches
    assert trace["otherData"]["provenance"] == "measured"


def test_prefetch_in_a_compiled_graph(way, tables):
    table, ids = tables.make(WAYS[way][0]), make_ids(6, 2)

    def step(x, ids, handle):
        ticket = torch.ops.engram_kernels.prefetch_submit(ids, handle)
        x = x @ x  # what the fetch hides behind
        rows = torch.ops.engram_kernels.prefetch_wait(ticket, ids, handle, *made_for)
        return rows.float().sum(-1) + x.sum()

    with prefetcher(table, way) as pf:
        made_for = (pf.row_dim, pf.out_dtype, pf.device)
        x = torch.randn(4, 4)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for seed in range(3):
            ids = make_ids(6, 2, seed=seed)
            want = gather_rows(table, ids).float().sum(-1) + (x @ x).sum()
            for run in (compiled, step):
                torch.testing.assert_close(run(x, ids, pf.handle), want, equal_nan=True)
        torch.library.opcheck(torch.ops.engram_kernels.prefetch_wait,
                              (torch.ops.engram_kernels.prefetch_submit(ids, pf.handle), ids, pf.handle, *made_for),
                              test_utils="test_schema")
        handle = pf.handle
    del pf, compiled
    with pytest.raises(ValueError, match=f"there is no prefetcher {handle.item()}"):
        torch.ops.engram_kernels.prefetch_submit(ids, handle)


def test_prefetch_policy_of_a_tier(tables):
    host, file, cpu = tables.make("host"), tables.make("file"), torch.device("cpu")
    assert choose_policy("auto", host, cpu, None).name == "staged"
    assert choose_policy("auto", file, cpu, None).name == "file"
    assert choose_policy("uva", host, cpu, None) == choose_policy("uva", host, torch.device("cuda"), None)
    for policy, table in (("staged", file), ("uva", file), ("device", file), ("file", host)):
        with pytest.raises(ValueError, match=f"policy '{policy}' cannot read a table of tier"):
            RowPrefetcher(table, policy=policy)
    with pytest.raises(ValueError, match="policy 'device' cannot read a table of tier 'host' for cuda"):
        choose_policy("device", host, torch.device("cuda"), None)
    meta = RowTable.from_tensor(torch.empty(4, 8, device="meta"), row_format="f32")
    assert choose_policy("auto", meta, meta.device, None).name == "device"
    with pytest.raises(ValueError, match="the table is on meta, expected the host or cpu"):
        choose_policy("auto", meta, cpu, None)


def test_prefetch_auto_takes_the_measured_surface(tmp_path):
    path, cuda = tmp_path / "surface.json", torch.device("cuda")
    path.write_text(json.dumps(SURFACE))
    assert read_surface(path, 264) == {"staged": 3e7, "uva": 2e7}
    assert read_surface(path, 3000) == {"staged": 1e6, "uva": 9e7}
    small, large = (RowTable.from_tensor(torch.zeros(3, n), row_format="f32") for n in (66, 1000))
    assert choose_policy("auto", small, cuda, path).name == "staged"
    assert choose_policy("auto", large, cuda, path).name == "uva"
    assert "measured: staged 1e+06 rows/s, uva 9e+07 rows/s" in choose_policy("auto", large, cuda, path).reason
    assert choose_policy("auto", small, cuda, None) == choose_policy("auto", large, cuda, None)  # pageable, nothing measured
    assert choose_policy("auto", small, cuda, None).name == "staged"
    for text, why in (("{", "JSONDecodeError"), ('{"schema_version": 9, "cells": []}', "schema_version is 9, expected 1"),
                      ("[]", "TypeError"), ('{"schema_version": 1}', "KeyError")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"{path} is no report of engram-kernels profile: .*{why}"):
            choose_policy("auto", small, cuda, path)
    path.write_text('{"schema_version": 1, "cells": [{"placement": "uva", "row_bytes": 8, "rows_per_s": 1}]}')
    with pytest.raises(ValueError, match="has no rows_per_s of both staged and uva; it has uva"):
        choose_policy("auto", small, cuda, path)


MEMORY = """
import re, sys, torch, engram_kernels as ek
way, path = sys.argv[1:]
def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
if way == "file":
    table = ek.RowTable.open(path, cache_bytes=4 << 20, io="preadv")
else:
    table = ek.RowTable.from_tensor(torch.zeros(1 << 20, 64), row_format="f32")  # read, its pages take no memory; copied, they do
options = {} if way in ("direct", "file") else {"_engine": ek._C.host_engine(2, has_device_memory=True)}
if way == "cached":
    options["cache_bytes"] = 6 << 20
ids = torch.randint(0, table.num_rows, (40_000,), generator=torch.Generator().manual_seed(0))
ek.gather_rows(table, ids[:10]), torch.arange(10).sum()
before = memory('VmRSS')
with ek.RowPrefetcher(table, out_dtype=torch.float32, depth=3, ring_bytes=4 * 11 << 20, staging_bytes=4 << 20, threads=2,
                      **options) as pf:
    for _ in range(2):
        tickets = [pf.submit(ids) for _ in range(3)]
        for ticket in tickets:
            pf.wait(ticket)
    print(memory('VmHWM') - before, pf.stats()["memory_bytes"], ids.numel())
"""
SLACK_BYTES = 8 << 20  # threads, the allocator; the queue's buffers of the file reader: 64 of 32 KiB


@pytest.mark.parametrize("way", ["direct", "staged", "cached", "file"])
def test_prefetch_memory_is_ring_cache_and_ids(way, tables):
    """docs/prefetch.md: rings + caches + 40 bytes per id in flight + a constant. The table: 256 MiB, 64 in the file."""
    if way == "file":
        RowTable.create(tables.path, torch.zeros(1 << 18, 64), row_format="f32")
    run = subprocess.run([sys.executable, "-c", MEMORY, way, str(tables.path)], capture_output=True, text=True, check=True)
    grown, rings, num_ids = map(int, run.stdout.split())
    cache = 4 << 20 if way == "file" else 0
    on_device = (6 << 20) // 256 * (256 + 29) if way == "cached" else 0
    assert on_device <= rings <= (4 * 11 << 20) + 2 * (4 << 20) + on_device
    if way == "cached":
        assert rings > (4 * 11 << 20) + 0.95 * on_device
    assert grown <= rings + cache + 3 * 40 * num_ids + SLACK_BYTES


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_prefetch_for_a_device_that_is_not_there(device):
    with pytest.raises(RuntimeError, match=f"RowPrefetcher: device {device} is not available: .+"):
        RowPrefetcher(RowTable.from_tensor(torch.ones(3, 8), row_format="f32"), device=device)


def test_prefetch_ring_on_a_gpu_is_free_of_its_former_use(monkeypatch):
    """Torch gives out memory that kernels of the current stream have yet to read; the engine writes to it on its own stream."""
    device, calls, on_cpu = torch.device("cuda:1"), [], torch.empty(1 << 19, dtype=torch.uint8)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: calls.append(("empty", device)) or on_cpu)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(
        synchronize=lambda: calls.append(("synchronize", device))))
    options = prefetch_runtime.RuntimeOptions(
        table=RowTable.from_tensor(torch.zeros(3, 8), row_format="f32"), policy="uva", device=device, out_dtype=torch.bfloat16,
        depth=1, threads=1, ring_bytes=1 << 19, staging_bytes=1 << 18, max_blocks=0, trace_spans=0)
    assert prefetch_runtime._device_memory(options, 2).nbytes == 1 << 19
    assert calls == [("empty", device), ("synchronize", device)]
