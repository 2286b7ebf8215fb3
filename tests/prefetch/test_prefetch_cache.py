"""The prefetcher's cache of hot rows on a device: exact under faults, bounded, counted; refused where it could save nothing."""
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from io_faults import inject_faults
from prefetch_cases import NUM_ROWS, ROW_DIM, TIMEOUT_S, WAYS, Tables, make_ids, prefetcher

from engram_kernels import EngramSpec, RowPrefetcher, RowTable, capacity, gather_rows, ngram_hash
from engram_kernels._library import COMPILE_ERROR
from engram_kernels.capacity import CapacityError
from engram_kernels.prefetch.policy import choose_policy
from engram_kernels.prefetch.runtime import RuntimeOptions, check_room_of_cache
from engram_kernels.row_format import ROW_FORMATS

if not COMPILE_ERROR:
    from engram_kernels import _C

pytestmark = pytest.mark.usefixtures("compiled")
ROW_BYTES = ROW_DIM + ROW_DIM // 32
CACHED_WAYS = [way for way in WAYS if "cached" in way]
README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture
def tables(tmp_path, monkeypatch):
    return Tables(tmp_path, monkeypatch)


@pytest.fixture(params=CACHED_WAYS)
def way(request):
    return request.param


def hot_ids(rng, count):
    """Few rows often, many seldom: some of every request are in a cache, and others go."""
    skewed = [min(int(rng.paretovariate(0.6)) - 1, NUM_ROWS - 1) for _ in range(count)]
    return torch.tensor([-1 if rng.random() < 0.05 else row for row in skewed], dtype=torch.int32)


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_cache_rows_are_those_of_the_table(row_format, way, tables):
    truth, table = tables.make("host", row_format), tables.make(WAYS[way][0], row_format)
    rng = random.Random(0)
    with prefetcher(table, way, ring_bytes=4 << 20, cache_bytes=100 * table.row_bytes) as pf:  # less than a block asks for
        for count in (1, 30, 700, 0, 1, 300, 300, 2000):
            ids = hot_ids(rng, count)
            rows = pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
            torch.testing.assert_close(rows, gather_rows(truth, ids), rtol=0, atol=0, equal_nan=True)
        assert 90 < pf.stats()["device_cache_slots"] <= 100
        assert pf.stats()["hits"]["device_cache"] > 50


@pytest.mark.parametrize("seed", range(6))
def test_cache_is_exact_under_faults(seed, way, tables):
    """Launches that fail, late and out of order, requests that are cancelled, reads that fail: what is delivered is right."""
    tier = WAYS[way][0]
    truth, table = tables.make("host"), tables.make(tier)
    if tier == "file":
        inject_faults(tables.reader, seed=seed, eio=0.002, shorter=0.1, reorder=True, max_delay_us=20)
    rng = random.Random(seed)
    engine = dict(seed=seed, error=0.15, max_delay_us=rng.choice((0, 300)), reorder=seed % 2 == 1)
    outcomes = dict.fromkeys(("right", "failed", "cancelled"), 0)
    with prefetcher(table, way, engine, depth=4, cache_bytes=rng.choice((40, 400, 4000)) * ROW_BYTES) as pf:
        pending = []
        for i in range(250):
            ids = hot_ids(rng, rng.choice((1, 24, 24, 500)))
            pending.append((pf.submit(ids, timeout_s=TIMEOUT_S), ids))
            if rng.random() < 0.1:
                outcomes["cancelled"] += pf.cancel(pending.pop(rng.randrange(len(pending)))[0])
            while len(pending) == 4 or (pending and i == 249):
                ticket, wanted = pending.pop(rng.randrange(len(pending)))
                try:
                    rows = pf.wait(ticket, timeout_s=TIMEOUT_S)
                except (RuntimeError, OSError) as err:
                    assert "injected" in str(err) or "tier file" in str(err)
                    outcomes["failed"] += 1
                    continue
                outcomes["right"] += 1
                torch.testing.assert_close(rows, gather_rows(truth, wanted), rtol=0, atol=0)
        hits = pf.stats()["hits"]
    assert min(outcomes.values()) > 5 and hits["device_cache"] > 100, (outcomes, hits)


def text_rows():
    """[batches of ids] of a small real text, 24 rows per byte, renamed to [0, rows)."""
    tokens = torch.tensor(list(README.read_bytes()[:20_000]), dtype=torch.int32)
    spec = EngramSpec.deepseek_v41()
    ids = ngram_hash(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32), spec.layout())[0]
    rows, ids = ids.unique(return_inverse=True)
    return len(rows), ids.int().split(64)


def replayed(batches, slots):
    """(hits, distinct rows) of the directory alone: it sees the rows of a batch, then admits those that it lacks."""
    directory, hits, unique = _C.RowCacheDirectory(slots), 0, 0
    for ids in batches:
        directory.begin_batch()
        rows = np.unique(ids.numpy()).tolist()
        missed = [row for row in rows if directory.find(row) < 0]
        unique, hits = unique + len(rows), hits + len(rows) - len(missed)
        for row in missed:
            directory.admit(row)
    return hits, unique


@pytest.mark.parametrize("slots", [512, 8192])
def test_cache_hit_rate_is_that_of_the_directory(slots):
    """docs/dedup_and_cache.md's curve is what a prefetcher counts, and what does not cross the link is what it found."""
    num_rows, batches = text_rows()
    table = RowTable.from_tensor(torch.zeros(num_rows, 8), row_format="f32")
    hits, unique = replayed(batches, slots)
    assert 0.05 < hits / unique < 0.95
    moved = {}
    for cache_bytes in (0, slots * 32):
        with RowPrefetcher(table, cache_bytes=cache_bytes, _engine=_C.host_engine(1, has_device_memory=True)) as pf:
            for ids in batches:
                pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
            stats = pf.stats()
        moved[cache_bytes] = stats["moved_bytes"]
        assert stats["unique"] == unique
        assert stats["hits"]["device_cache"] == (hits if cache_bytes else 0)
        assert stats["hits"]["host"] == stats["unique"] - stats["hits"]["device_cache"]
        assert stats["device_cache_slots"] == (slots if cache_bytes else 0)
    saved = moved[0] - moved[slots * 32]
    # eight bytes for each row that goes into the cache, and the parts of a slot are aligned
    assert hits * 32 - (unique - hits) * 8 - len(batches) * 1024 <= saved <= hits * 32 + len(batches) * 1024


def test_cache_is_trimmed_to_the_table(way, tables):
    table = tables.make(WAYS[way][0])
    with prefetcher(table, way, cache_bytes=1 << 30, ring_bytes=4 << 20, staging_bytes=1 << 20) as pf:
        slots = -(-NUM_ROWS // 16) * 16
        assert pf.stats()["device_cache_slots"] == slots
        assert pf.stats()["memory_bytes"] <= (4 << 20) + 2 * (1 << 20) + slots * (ROW_BYTES + 29)
        ids = torch.arange(NUM_ROWS)
        for _ in range(3):
            pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
        # buckets overflow where others have room: not every row is there, but most
        assert pf.stats()["hits"]["device_cache"] > 0.85 * 2 * NUM_ROWS


@pytest.mark.parametrize("cache_bytes", [1 << 62, 1 << 70])
def test_cache_of_more_bytes_than_there_are(cache_bytes, tables):
    table, ids = tables.make("host"), make_ids(50)
    with prefetcher(table, "host_cached_on_a_device", cache_bytes=cache_bytes) as pf:
        assert pf.stats()["device_cache_slots"] == 3008
        torch.testing.assert_close(pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S), gather_rows(table, ids), rtol=0, atol=0)


def test_cache_cleared_reads_the_table_again(tables):
    table, ids = tables.make("host"), make_ids(50)
    with prefetcher(table, "host_cached_on_a_device") as pf:
        before = pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S).clone()
        table.rows.bitwise_xor_(torch.tensor(1, dtype=torch.uint8))
        torch.testing.assert_close(pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S), before, rtol=0, atol=0)  # as documented
        for _ in range(2):
            pf.clear_cache()
            rows = pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
            torch.testing.assert_close(rows, gather_rows(table, ids), rtol=0, atol=0)
        assert not torch.equal(rows, before)
        assert pf.stats()["hits"]["device_cache"] == len(ids[ids >= 0].unique())
    with prefetcher(table, "host_staged") as pf:
        pf.clear_cache()  # nothing to do


def test_cache_is_verified(tables):
    table, ids = tables.make("host"), make_ids(50)
    with prefetcher(table, "host_cached_on_a_device", verify_rows=2000) as pf:
        pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
        pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
        table.rows[ids[5]] ^= 1
        ticket = pf.submit(ids)  # found in the cache, whenever it is looked for
        with pytest.raises(RuntimeError, match=rf"verify: tier host: row {ids[5]} of position \d+ is not what gather_rows reads"):
            pf.wait(ticket, timeout_s=TIMEOUT_S)
        assert pf.stats()["hits"]["host"] == len(ids[ids >= 0].unique())


def test_cache_of_a_file_that_changed(tables):
    """Rows that are all cached fail like those that would be read."""
    table, ids = tables.make("file"), make_ids(40)
    with prefetcher(table, "file_cached_on_a_device") as pf:
        for _ in range(2):
            pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
        read = table.io_stats()["rows"]
        os.truncate(tables.path, os.path.getsize(tables.path) - 100)
        with pytest.raises(OSError, match=r"tier file: \S*/table.safetensors: .*row \d+"):
            pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
        assert table.io_stats()["rows"] == read == len(ids[ids >= 0].unique())


def test_cache_hits_are_in_the_trace(way, tables, tmp_path):
    ids = torch.tensor([4, 9, 4, -1, 7])
    with prefetcher(tables.make(WAYS[way][0]), way) as pf:
        for _ in range(2):
            pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
        pf.trace(tmp_path / "trace.json")
    fetches = [e["args"] for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["name"] == "fetch"]
    assert [(args["rows"], args["cached"]) for args in fetches] == [(3, 0), (3, 3)]


def test_cache_is_refused_where_no_link_is_crossed(tables):
    for table in (tables.make("host"), tables.make("file")):
        for cache_bytes, message in ((4096, "cache_bytes is 4096, expected 0: the CPU reads rows"),
                                     (-1, "cache_bytes is -1, expected at least 0")):
            with pytest.raises(ValueError, match=message):
                RowPrefetcher(table, cache_bytes=cache_bytes)


def test_cache_is_refused_where_ids_are_the_devices(tables):
    table, engine = tables.make("host"), _C.host_engine(1, has_device_memory=True)
    for policy, why in (("uva", "its kernel reads rows over the bus"), ("device", "the table is on the device itself")):
        with pytest.raises(ValueError, match=f"cache_bytes is 4096, expected 0 with policy '{policy}': {why}"):
            RowPrefetcher(table, policy=policy, cache_bytes=4096, _engine=engine)
    with pytest.raises(ValueError, match=f"cache_bytes is 65, expected at least a row, {ROW_BYTES} bytes"):
        RowPrefetcher(table, cache_bytes=65, _engine=engine)
    with pytest.raises(ValueError, match=r"staging_bytes is 1000, expected at least \d+ for rows of 66 bytes"):
        RowPrefetcher(table, cache_bytes=4096, staging_bytes=1000, _engine=engine)


def test_cache_least_staging_bytes_is_enough(tables):
    table, engine = tables.make("host"), _C.host_engine(1, has_device_memory=True)
    with pytest.raises(ValueError, match="staging_bytes is 1") as caught:
        RowPrefetcher(table, cache_bytes=4096, staging_bytes=1, _engine=engine)
    least = int(str(caught.value).split("at least ")[1].split(" ")[0])
    ids = make_ids(40)
    with RowPrefetcher(table, cache_bytes=4096, staging_bytes=least, _engine=engine) as pf:
        for _ in range(3):
            torch.testing.assert_close(pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S), gather_rows(table, ids), rtol=0, atol=0)


def test_cache_makes_auto_choose_staged(tables):
    table, cuda = tables.make("host"), torch.device("cuda")
    chosen = choose_policy("auto", table, cuda, None, caches=True)
    assert (chosen.name, chosen.reason) == ("staged", "rows are cached on the device")
    assert choose_policy("uva", table, cuda, None, caches=True).name == "uva"  # named: taken, and then refused
    assert choose_policy("auto", tables.make("file"), cuda, None, caches=True).name == "file"


def test_cache_too_large_for_the_device(tables, monkeypatch):
    table, engine = tables.make("host"), _C.host_engine(1, has_device_memory=True)
    monkeypatch.setattr(capacity, "memory_room", lambda: [capacity.Room("the test", 100_000, "nothing")])
    with pytest.raises(CapacityError, match=r"a cache of 3008 rows needs 193.* the test leaves 97.7 KiB"):
        RowPrefetcher(table, cache_bytes=1 << 40, _engine=engine)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 30))
    options = dict(table=table, policy="staged", device=torch.device("cuda:1"), out_dtype=torch.bfloat16, depth=1, threads=1,
                   ring_bytes=1 << 19, staging_bytes=1 << 18, max_blocks=0, trace_spans=0, cache_bytes=1 << 40)
    check_room_of_cache(RuntimeOptions(**options))
    with pytest.raises(CapacityError, match=r"a cache of 3008 rows, with ring and staging buffer needs 1.4.*\(1509248 bytes\), "
                                            r"the memory of cuda:1 leaves 1.0 MiB .*torch.cuda.empty"):
        check_room_of_cache(RuntimeOptions(**{**options, "ring_bytes": 1 << 20}))
    monkeypatch.setattr(capacity, "memory_room", lambda: [capacity.Room("the host", 80_000, "nothing")])
    with pytest.raises(CapacityError, match=r"the directory of a cache of 3008 rows needs 85.2 KiB .*the host leaves 78.1 KiB"):
        check_room_of_cache(RuntimeOptions(**options))
