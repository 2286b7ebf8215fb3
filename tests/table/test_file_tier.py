"""Rows of a file by every backend: equal to those in memory, each page read once, cached rows exact."""
import numpy as np
import pytest
import torch
from row_files import PAGE, SHAPES, File, open_reader
from safetensors.torch import save_file

from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.table.row_table import RowTable
from engram_kernels.testing import random_rows

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_file_tier_equals_memory(shape, io, tmp_path):
    file = File(tmp_path / "t", **shape)
    rng = np.random.default_rng(1)
    tiers = [file.tier(io, queue_depth) for queue_depth in (1, 3, 64)]
    for tier in tiers:
        for count in (0, 1, 2, 3, 64, 65, 501, file.num_rows):
            ids = rng.permutation(file.num_rows)[:count]
            file.check(tier, ids)
            file.check(tier, np.sort(ids))
        file.check(tier, np.arange(file.num_rows)[-1:])  # the page at the end of the file is not whole
        assert tier.stats()["io"] + ("" if tier.stats()["direct"] else "_buffered") == io


@pytest.mark.parametrize("row_format", ["bf16", "fp8_e4m3_block32", "fp8_e4m3_block32_packed", "int8_group32"])
def test_file_tier_gather_equals_memory(row_format, io, tmp_path):
    rows, scales = random_rows(row_format, 2000, 64, torch.Generator().manual_seed(0))
    RowTable.create(tmp_path / "t", rows, scales, row_format, row_dim=64)
    table = RowTable.open(tmp_path / "t", io=io, queue_depth=7, cache_bytes=20_000)
    memory = RowTable.from_tensor(rows, scales, row_format, row_dim=64)
    for seed in range(4):
        ids = torch.randint(-1, 2000, (50, 9), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(gather_rows(table, ids).view(torch.int16), gather_rows(memory, ids).view(torch.int16))
    assert table.io_stats()["cache_hits"] > 0 and memory.io_stats() == {}


def test_file_tier_reads_a_page_once(io, tmp_path):
    """Rows of 512 bytes from byte 4096: eight per page. Neighbouring pages are one read, of 32 KiB at most."""
    file = File(tmp_path / "t", num_rows=8 * 40, row_bytes=512, offset=PAGE)

    def reads(ids):
        tier = file.tier(io)
        file.check(tier, np.array(ids))
        return tier.stats()["reads"], tier.stats()["moved_bytes"], tier.stats()["direct"]

    for ids, wanted, pages, exact_bytes in (
            ([3], 1, 1, 512),
            ([0, 3, 7], 1, 1, PAGE),
            ([7, 0, 3], 1, 1, PAGE),  # in any order
            ([0, 8], 1, 2, PAGE + 512),  # neighbours
            ([0, 16], 2, 2, 1024),  # a page lies between
            (range(8 * 40), 5, 40, 40 * PAGE)):
        got, moved, direct = reads(list(ids))
        assert (got, moved) == (wanted, pages * PAGE if direct else exact_bytes)


def test_file_tier_pages_of_rows_and_scales_are_shared(io, tmp_path):
    """The scales begin in the page that the values end in."""
    file = File(tmp_path / "t", num_rows=8, row_bytes=256, scale_bytes=8, offset=1000)
    tier = file.tier(io)
    file.check(tier, np.arange(8))
    assert tier.stats()["reads"] == 1 and tier.stats()["rows"] == 8 and tier.stats()["payload_bytes"] == 8 * 264


def test_file_tier_cache_is_exact_and_bounded(io, tmp_path):
    file = File(tmp_path / "t", row_bytes=256, scale_bytes=8)
    cache_bytes = 100_000
    tier = file.tier(io, cache_bytes=cache_bytes)
    rng = np.random.default_rng(0)
    for _ in range(300):
        ids = np.unique((rng.zipf(1.3, 60) - 1) % 3000)
        file.check(tier, rng.permutation(ids))
    stats = tier.stats()
    assert 0 < stats["cached_rows"] <= stats["cache_slots"] and stats["cache_slots"] * 264 <= cache_bytes
    assert stats["cache_slots"] * 264 > 0.85 * cache_bytes  # the directory takes 25 of 289 bytes, and buckets are whole
    assert stats["cache_hits"] > 0.5 * stats["rows"] and stats["cache_hits"] + stats["file_rows"] == stats["rows"]
    before = tier.stats()["moved_bytes"]
    file.check(tier, [0])  # the hottest row
    assert tier.stats()["moved_bytes"] == before


def test_file_tier_options(tmp_path, monkeypatch):
    RowTable.create(tmp_path / "t", torch.zeros(100, 8), row_format="f32")
    for options, message in (({"queue_depth": 0}, "queue_depth is 0, expected"), ({"queue_depth": 5000}, "queue_depth is 5000"),
                             ({"io": "mmap"}, "io is 'mmap', expected 'auto'"), ({"cache_bytes": -1}, "cache_bytes is -1")):
        with pytest.raises(ValueError, match=message):
            RowTable.open(tmp_path / "t", **options)
    monkeypatch.setenv("EK_FILE_IO", "preadv_buffered")
    stats = RowTable.open(tmp_path / "t").io_stats()
    assert (stats["io"], stats["direct"], stats["queue_depth"], stats["cache_slots"]) == ("preadv", False, 64, 0)
    monkeypatch.setenv("EK_FILE_IO", "nonsense")
    with pytest.raises(ValueError, match="io is 'nonsense'"):
        RowTable.open(tmp_path / "t")
    assert RowTable.open(tmp_path / "t", io="preadv").io_stats()["io"] == "preadv"


def test_file_tier_bad_ids(tmp_path):
    file = File(tmp_path / "t", num_rows=10)
    for cache_bytes in (0, 10_000):
        tier = file.tier("auto", cache_bytes=cache_bytes)
        for bad in (-1, 10, 2**62):
            with pytest.raises(IndexError, match=rf"row_ids\[1\] is {bad}, expected \[0, 10\)"):
                file.fetch(tier, [0, bad])
    with pytest.raises(ValueError, match="scales for 9 rows, expected 10"):
        open_reader(file.path).tier(file.extent, (0, 1, 1, 9), 0)


def test_file_tier_of_a_checkpoint_shard(io, tmp_path):
    """Extents that begin anywhere."""
    rows, scales = random_rows("fp8_e4m3_block32", 777, 96, torch.Generator().manual_seed(0))
    save_file({"a": torch.randn(3, 5), "w": rows, "s": scales, "z": torch.ones(7)}, tmp_path / "shard")
    table = RowTable.open(tmp_path / "shard", "w", "s", "fp8_e4m3_block32", io=io)
    got = table.read_rows(torch.arange(777).flip(0))
    assert torch.equal(got[0], rows.flip(0)) and torch.equal(got[1], scales.flip(0))
