"""Tables in memory that is pinned where it is: a GPU reads them, private or shared. `make test-gpu`."""
import pytest
import torch

import engram_kernels as ek

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
R, D = 9 << 12, 256  # 18 MiB


def stored():
    return torch.randn(R, D, generator=torch.Generator().manual_seed(0)).bfloat16()


def on_gpu(table):
    ids = torch.randint(-1, R, (500, 8), generator=torch.Generator().manual_seed(1))
    got = ek.gather_rows(table, ids.cuda(), backend="cuda")
    assert got.is_cuda and torch.equal(got.cpu(), ek.gather_rows(ek.RowTable.from_tensor(stored()), ids))


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_pinned_table_is_read_by_the_gpu(kind, tmp_path):
    table = ek.RowTable.from_tensor(stored(), copy=True)
    if kind == "shared":
        table = table.share("t", directory=str(tmp_path))
    assert not table.rows.is_pinned()
    table.pin()
    stats = table.memory_stats()
    assert table.rows.is_pinned() and stats["pinned_bytes"] == stats["mapped_bytes"] == R * D * 2  # not 32 MiB
    on_gpu(table)
    getattr(table._memory, "host", table._memory).unpin()
    assert not table.rows.is_pinned() and torch.equal(table.rows, stored())


def test_pinning_does_not_count_against_memlock():
    """What `HostRegistrar.counts_memlock` says of CUDA."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, hard))
    try:
        table = ek.RowTable.from_tensor(stored(), copy=True)
        table.pin()
        on_gpu(table)
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def test_pinned_in_chunks_is_one_table():
    """Rows that lie across the border of two registrations are whole."""
    from engram_kernels import _C, _C_cuda
    rows = torch.arange(2 * 1200 * 1000, dtype=torch.float32).view(2000, 1200)  # 9.2 MiB, no row ends at 2 MiB
    table = ek.RowTable.from_tensor(rows, row_format="f32", copy=True)
    table._memory.pin(_C.HostRegistrar(*_C_cuda.host_registrar()), 2 << 20)
    got = ek.gather_rows(table, torch.arange(2000, device="cuda"), torch.float32, backend="cuda")
    assert torch.equal(got.cpu(), rows)


@pytest.mark.parametrize("row_format", ["fp8_e4m3_block32", "int8_group32", "nvfp4"])
def test_scales_on_the_gpu(row_format):
    """Rows are read over the link, their scales in the GPU's memory, by an op and by a prefetcher."""
    from engram_kernels.testing.inputs import random_rows
    rows, scales = random_rows(row_format, 5000, D, torch.Generator().manual_seed(0))
    table = ek.RowTable.from_tensor(rows, scales, row_format, copy=True, table_scale=0.5 if row_format == "nvfp4" else None)
    table.pin()
    split = table.with_scales_on("cuda")
    assert split.fingerprint() == table.fingerprint() and split.device.type == "cuda" and split.rows.device.type == "cpu"
    ids = torch.randint(-1, 5000, (500, 8), generator=torch.Generator().manual_seed(1))
    want = ek.gather_rows(table, ids)
    for backend in ("cuda", "triton"):
        assert torch.equal(ek.gather_rows(split, ids.cuda(), backend=backend).cpu(), want)
    for policy in ("auto", "uva", "uva_distinct"):
        with ek.RowPrefetcher(split, "cuda", policy=policy) as prefetcher:
            assert torch.equal(prefetcher.wait(prefetcher.submit(ids.cuda())).cpu(), want)


def test_distinct_rows_over_the_link():
    """Same bits, each distinct row once; under graph capture as they are."""
    table = ek.RowTable.from_tensor(stored(), copy=True)
    table.pin()
    ids = [torch.randint(-1, 200, (700, 8), device="cuda", dtype=torch.int32) for _ in range(6)]
    with ek.RowPrefetcher(table, "cuda", depth=3, policy="uva_distinct") as prefetcher:
        for first in range(0, 6, 3):
            tickets = [prefetcher.submit(i) for i in ids[first:first + 3]]
            for i, ticket in zip(ids[first:first + 3], tickets, strict=True):
                assert torch.equal(prefetcher.wait(ticket), ek.gather_rows(table, i))
        found = prefetcher.stats()["distinct"]
        assert (found["requests"], found["asked"]) == (6, 6 * 5600) and found["fetched"] == sum(
            len(i[i >= 0].unique()) for i in ids)
    with ek.RowPrefetcher(table, "cuda", depth=1, policy="uva_distinct") as prefetcher:
        prefetcher.wait(prefetcher.submit(ids[0]))
        graph, held = torch.cuda.CUDAGraph(), ids[1].clone()
        with torch.cuda.graph(graph):
            out = prefetcher.wait(prefetcher.submit(held))
        held.copy_(ids[2])
        graph.replay()
        assert torch.equal(out, ek.gather_rows(table, ids[2])) and prefetcher.stats()["distinct"]["requests"] == 1
