"""The backward pass of gather_rows on the PTX simulator: the launcher and its kernel against a sum in order, and its cost."""
import pytest
import torch
from cuda_sim import MISSING_NVCC, Device, build
from cuda_sim.params import DTYPES, GatherRowsBwdParams, RowIds

pytestmark = pytest.mark.skipif(bool(MISSING_NVCC), reason=MISSING_NVCC)
OP = "gather_rows_bwd_cuda"


def simulate(grad, ids, num_rows, out_dtype, lead=0, **options):
    """(grad_rows, launches). lead: elements before the output, which break its alignment."""
    device = Device(options=options)
    order, positions = ids.sort(stable=True)
    whole = torch.zeros(lead + num_rows * grad.shape[1], dtype=out_dtype)
    at = device.address
    params = GatherRowsBwdParams(
        grad=at(grad, "grad", readonly=True), row_ids=RowIds(at(order, "ids", readonly=True), len(ids), ids.dtype == torch.int64),
        grad_rows=at(whole, "grad_rows") + lead * whole.element_size(), num_rows=num_rows, row_dim=grad.shape[1],
        grad_dtype=DTYPES[grad.dtype], out_dtype=DTYPES[out_dtype], positions=at(positions, "positions", readonly=True))
    launches = device.run(OP, params)
    return whole[lead:].view(num_rows, -1), launches


def expected(grad, ids, num_rows, out_dtype):
    """Summed in fp32, one position after the other: the bits do not depend on who does it."""
    sums = torch.zeros(num_rows, grad.shape[1])
    for i, row in enumerate(ids.tolist()):
        if 0 <= row < num_rows:
            sums[row] += grad[i].float()
    return sums.to(out_dtype)


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_gather_rows_bwd_sums_in_order(grad_dtype, out_dtype):
    generator = torch.Generator().manual_seed(0)
    for row_dim, count, num_rows, id_dtype in ((256, 61, 9, torch.int32), (7, 5, 3, torch.int64), (264, 1, 1, torch.int32)):
        grad = torch.randn(count, row_dim, generator=generator).to(grad_dtype)
        ids = torch.randint(-1, num_rows, (count,), generator=generator).to(id_dtype)
        got, _ = simulate(grad, ids, num_rows, out_dtype, cta_order="random")
        torch.testing.assert_close(got, expected(grad, ids, num_rows, out_dtype), rtol=0, atol=0)


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_gather_rows_bwd_of_rows_with_many_positions(grad_dtype):
    """Blocks take parts of the columns; the order of the positions, and so the bits, are those of any other row."""
    generator = torch.Generator().manual_seed(0)
    for named, row_dim in (((3, 255, 256, 257, 511, 512, 1), 40), ((600, 0, 513), 33), ((0, 0, 900), 8)):
        ids = torch.repeat_interleave(torch.arange(-1, len(named)), torch.tensor((5, *named)))
        ids = ids[torch.randperm(len(ids), generator=generator)]
        grad = torch.randn(len(ids), row_dim, generator=generator).to(grad_dtype)
        got, launches = simulate(grad, ids, len(named), torch.float32, cta_order="random")
        torch.testing.assert_close(got, expected(grad, ids, len(named), torch.float32), rtol=0, atol=0)
        assert [launch.grid[1:] for launch in launches] == [(1, 1), (-(-row_dim // 32), 1)]


def test_gather_rows_bwd_of_one_row_is_not_one_warps_work():
    """No warp reads more than its share: of 4,096 positions of a row of 64 columns, an eighth of one of two slices."""
    grad, ids = torch.randn(4096, 64).bfloat16(), torch.zeros(4096, dtype=torch.int64)
    rows, long_rows = simulate(grad, ids, 1, torch.bfloat16)[1]
    assert "grad" not in rows.result.buffers or not rows.result.buffers["grad"].get("load_bytes")
    assert long_rows.result.buffers["grad"]["load_bytes"] == grad.nbytes
    took = long_rows.result.warp_instructions / (2 * long_rows.block[0] // 32)  # two blocks have work
    print(f"{took:.0f} PTX instructions per warp that has work")
    assert took < 4096 / 8 * 24


def test_gather_rows_bwd_of_a_table_that_is_not_aligned():
    grad = torch.randn(9, 16).bfloat16()
    ids = torch.tensor([2, 0, 2, 2, 1, 0, 2, -1, 2])
    got, _ = simulate(grad, ids, 3, torch.bfloat16, lead=1)
    torch.testing.assert_close(got, expected(grad, ids, 3, torch.bfloat16), rtol=0, atol=0)


def test_gather_rows_bwd_leaves_bad_ids_out():
    grad, ids = torch.ones(6, 8), torch.tensor([-1, 5, -2, 2**40, 4, -2**62])
    got, _ = simulate(grad, ids, 5, torch.float32)
    assert got.sum() == 8 and (got[4] == 1).all()


def test_gather_rows_bwd_of_nothing_launches_nothing():
    assert simulate(torch.ones(0, 8), torch.zeros(0, dtype=torch.int64), 3, torch.float32)[1] == []


def test_gather_rows_bwd_reads_the_gradient_once():
    grad, ids = torch.randn(400, 256).bfloat16(), torch.randint(0, 90, (400,))
    _, launches = simulate(grad, ids, 90, torch.bfloat16)
    buffers = launches[0].result.buffers
    assert buffers["grad"]["load_bytes"] == grad.nbytes and buffers["grad"]["load_sectors"] == grad.nbytes // 32
    written = buffers["grad_rows"]
    assert written["store_bytes"] == written["unique_bytes_written"] == len(ids.unique()) * 512
    wide = [line for line in launches[0].result.lines if line["space"] == "global" and line["bytes"] == 16 * line["threads"]]
    assert sum(line["bytes"] for line in wide) == grad.nbytes + written["store_bytes"]


def test_gather_rows_bwd_uses_no_local_memory():
    for usage in build().usage(OP).values():
        assert (usage.stack_bytes, usage.spill_bytes) == (0, 0) and usage.registers <= 128
