"""Policy staged with as many ids as threads share: the order of ids, what is distinct, and the time it takes is counted."""
import pytest
import torch
from prefetch_cases import NUM_ROWS, TIMEOUT_S, Tables, make_ids, prefetcher

from engram_kernels import RowTable, gather_rows

MANY = 200_000  # several ranges for the threads, in several blocks


@pytest.fixture
def tables(tmp_path, monkeypatch, compiled):
    return Tables(tmp_path, monkeypatch)


@pytest.mark.parametrize("ids", ["random", "one_row", "none", "descending"])
@pytest.mark.parametrize("threads", [1, 3])
def test_staged_orders_many_ids(ids, threads, tables):
    table = tables.make("host")
    ids = {"random": make_ids(MANY), "one_row": torch.full((MANY,), 7), "none": torch.full((MANY,), -1),
           "descending": torch.arange(MANY).flip(0) % NUM_ROWS}[ids]
    sizes = {"ring_bytes": 64 << 20, "staging_bytes": 16 << 20}
    with prefetcher(table, "host_staged_to_a_device", threads=threads, depth=1, **sizes) as pf:
        rows = pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S)
        stats = pf.stats()
    assert torch.equal(rows.view(torch.int16), gather_rows(table, ids).view(torch.int16))
    blocks = ids.view(2, -1)  # of one size
    assert stats["unique"] == sum(len(b[b != -1].unique()) for b in blocks)
    assert 0 < stats["id_s"] < stats["fetch_s"]


def test_staged_ids_take_no_time_where_none_are_sorted(tables):
    table = tables.make("host")
    with prefetcher(table, "host_staged") as pf:
        pf.wait(pf.submit(make_ids(100)), timeout_s=TIMEOUT_S)
        assert pf.stats()["id_s"] == 0


@pytest.mark.parametrize("num_rows", [1, 3, 1000, 1 << 22])
def test_gradients_of_many_positions_do_not_depend_on_threads(num_rows, compiled):
    """Which are summed in the order of RowOrder."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, num_rows, (MANY,), generator=generator)
    ids[:1000] = 0
    weight = torch.zeros(num_rows, 1, requires_grad=True)
    grad, before, found = torch.randn(MANY, 1, generator=generator), torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            out = gather_rows(RowTable.from_tensor(weight, row_format="f32"), ids, torch.float32)
            found.append(torch.autograd.grad(out, weight, grad)[0])
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*found)
    wanted = torch.zeros(num_rows, 1, dtype=torch.float64).index_add_(0, ids[ids >= 0], grad[ids >= 0].double())
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-4, atol=1e-2 if num_rows < 10 else 1e-4)
