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
