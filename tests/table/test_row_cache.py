"""The cache directory: consistent under any sequence of calls, bounded, and not washed out by a scan."""
from collections import OrderedDict

import numpy as np
import pytest

from engram_kernels._library import COMPILE_ERROR

if not COMPILE_ERROR:
    from engram_kernels import _C

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.mark.parametrize("max_slots", [0, 1, 2, 15, 16, 17, 64, 1000])
def test_row_cache_is_consistent(max_slots):
    """Against a map of what must be cached: no slot twice, no row twice, evictions told."""
    directory, slots = _C.RowCacheDirectory(max_slots), {}
    assert max_slots - 16 < directory.num_slots <= max_slots
    rng = np.random.default_rng(max_slots)
    for step in range(20_000):
        row = int(rng.zipf(1.2) % 5000) + (1 << 40) * int(rng.integers(0, 2))
        slot = directory.find(row)
        assert slot == slots.get(row, -1)
        if slot < 0:
            slot, evicted = directory.admit(row)
            assert -1 <= slot < max_slots and (evicted == -1 or slot >= 0)
            if evicted >= 0:
                assert slots.pop(evicted) == slot
            if slot >= 0:
                assert slot not in slots.values() or len(slots) > 300  # the check is slow in a large cache
                slots[row] = slot
        elif step % 7 == 0:
            directory.forget(row)
            del slots[row]
        assert directory.num_rows == len(slots) <= directory.num_slots
    assert len(set(slots.values())) == len(slots)
    assert max_slots == 0 or len(slots) > directory.num_slots // 2
    directory.clear()
    assert directory.num_rows == 0 and all(directory.find(row) == -1 for row in slots)


def test_row_cache_admits_a_cached_row_only_once():
    directory = _C.RowCacheDirectory(16)
    slot, _ = directory.admit(5)
    assert slot >= 0 and directory.admit(5) == (-1, -1) and directory.num_rows == 1


def test_row_cache_refuses_a_bad_size():
    for max_slots in (-1, 1 << 40):
        with pytest.raises(ValueError, match=f"max_slots is {max_slots}"):
            _C.RowCacheDirectory(max_slots)


def test_row_cache_keeps_hot_rows_through_a_scan():
    directory = _C.RowCacheDirectory(1024)
    hot = np.arange(300)
    for _ in range(6):
        directory.replay(hot)
    directory.replay(np.arange(10_000, 20_000))  # each once: ten times the cache
    assert directory.replay(hot) > 0.9 * 300


def test_row_cache_follows_a_change_of_the_hot_rows():
    directory = _C.RowCacheDirectory(1024)
    for begin in (0, 5000, 10_000):
        hot = np.arange(begin, begin + 500)
        for _ in range(40):
            directory.replay(hot)
        assert directory.replay(hot) > 0.9 * 500


def test_row_cache_does_not_evict_what_its_batch_uses():
    directory = _C.RowCacheDirectory(64)
    rng = np.random.default_rng(0)
    for _ in range(200):
        directory.begin_batch()
        used = {}
        for row in rng.permutation(400)[:100].tolist():
            slot = directory.find(row)
            if slot < 0:
                slot, evicted = directory.admit(row)
                assert evicted not in used
            if slot >= 0:
                used[row] = slot
        assert len(set(used.values())) == len(used) and all(directory.find(row) == slot for row, slot in used.items())


def lru_hits(trace, slots):
    cache, hits = OrderedDict(), 0
    for row in trace.tolist():
        if row in cache:
            hits += 1
            cache.move_to_end(row)
        else:
            cache[row] = None
            if len(cache) > slots:
                cache.popitem(last=False)
    return hits


@pytest.mark.parametrize("skew", [1.05, 1.2, 1.5])
@pytest.mark.parametrize("slots", [256, 4096])
def test_row_cache_hits_as_often_as_lru(skew, slots):
    trace = np.random.default_rng(0).zipf(skew, 200_000).astype(np.int64) % 1_000_000
    # buckets may be full where a fully associative cache of all rows is not: 0.1 %
    assert _C.RowCacheDirectory(slots).replay(trace) >= 0.999 * lru_hits(trace, slots)


def test_row_cache_is_deterministic():
    trace = np.random.default_rng(0).zipf(1.2, 50_000).astype(np.int64) % 100_000
    assert len({_C.RowCacheDirectory(500).replay(trace) for _ in range(3)}) == 1
