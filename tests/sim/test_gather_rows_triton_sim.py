"""gather_rows in Triton: the compiled PTX on the simulator, against the reference, and what it costs beside the CUDA kernel."""
import pytest
import torch
from cuda_sim import MISSING_NVCC
from cuda_sim.params import DTYPES, ROW_FORMATS
from format_cases import every_byte, table_scale_of
from triton_sim import MISSING_TRITON, simulate, total

from engram_kernels.reference.gather_rows import gather_rows as reference
from engram_kernels.testing.inputs import random_rows

pytestmark = pytest.mark.skipif(bool(MISSING_TRITON), reason=MISSING_TRITON)


def run(rows, scales, ids, row_format, row_dim, out_dtype=torch.bfloat16, zero_scale=False, out=None, **options):
    from engram_kernels.triton_kernels.gather_rows import gather_rows
    return simulate(lambda: gather_rows(rows, scales, ids, row_format, row_dim, zero_scale, out_dtype,
                                        table_scale_of(row_format), out), **options)


def check(rows, scales, ids, row_format, row_dim, out_dtype=torch.bfloat16, zero_scale=False, **options):
    got, launches = run(rows, scales, ids, row_format, row_dim, out_dtype, zero_scale, **options)
    want = reference(rows, scales, ids, row_format, row_dim, zero_scale, out_dtype, table_scale_of(row_format))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(got) & ~got.isnan(), torch.signbit(want) & ~want.isnan())  # -0 is not 0
    return launches


def random_ids(count, num_rows, seed=0, dtype=torch.int32):
    return torch.randint(-1, num_rows, (count,), generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("row_format", ROW_FORMATS)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_gather_rows_matches_reference(row_format, out_dtype):
    rows, scales = random_rows(row_format, 50, 256, torch.Generator().manual_seed(1))
    check(rows, scales, random_ids(67, 50), row_format, 256, out_dtype, cta_order="random")


@pytest.mark.parametrize("row_format, row_dim", [("bf16", 33), ("f32", 1), ("fp8_e4m3_tensor", 65), ("int8_group32", 160),
                                                 ("fp8_e4m3_block32_packed", 4096), ("nvfp4", 16), ("nvfp4", 4112),
                                                 ("mxfp4", 160)])
def test_gather_rows_any_shape(row_format, row_dim):
    rows, scales = random_rows(row_format, 20, row_dim, torch.Generator().manual_seed(4))
    check(rows, scales, random_ids(21, 20, dtype=torch.int64), row_format, row_dim)


@pytest.mark.parametrize("row_format", ["fp8_e4m3_block32", "fp8_e4m3_tensor", "int8_group32", "fp8_e4m3_row", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("zero_scale", [False, True])
def test_gather_rows_every_byte(row_format, zero_scale):
    rows, scales = every_byte(row_format, 256)
    check(rows, scales, torch.arange(len(rows)), row_format, 256, torch.float32, zero_scale)


def test_gather_rows_bad_ids_give_zeros_and_are_counted():
    rows, scales = random_rows("fp8_e4m3_tensor", 3, 64, torch.Generator().manual_seed(6))
    scales = torch.tensor([float("nan")])  # must not reach the zeros
    ids = torch.tensor([-1, 3, -2, 2, 2**62, -2**63, 2**40 + 1])
    from engram_kernels.triton_kernels import gather_rows as module
    errors = torch.zeros(1, dtype=torch.int32)
    original, module.error_counter = module.error_counter, lambda op, device: errors
    try:
        got, _ = run(rows, scales, ids, "fp8_e4m3_tensor", 64)
    finally:
        module.error_counter = original
    assert (got[[0, 1, 2, 4, 5, 6]] == 0).all() and got[3].isnan().all() and errors.item() == 5


def test_gather_rows_unaligned_out_takes_narrow_stores():
    rows, _ = random_rows("bf16", 9, 64, torch.Generator().manual_seed(0))
    out = torch.zeros(5 * 64 + 3, dtype=torch.bfloat16)[3:].view(5, 64)
    ids = random_ids(5, 9)
    run(rows, None, ids, "bf16", 64, out=out)
    assert torch.equal(out, reference(rows, None, ids, "bf16", 64, False, torch.bfloat16))


COSTS = {"256_bytes": "fp8_e4m3_tensor", "512_bytes": "bf16", "264_bytes": "fp8_e4m3_block32_packed",
         "256_and_8_bytes": "fp8_e4m3_block32"}
NUM_ROWS = 960


@pytest.mark.skipif(bool(MISSING_NVCC), reason=MISSING_NVCC)
@pytest.mark.parametrize("row_format", COSTS.values(), ids=COSTS.keys())
def test_gather_rows_moves_no_more_than_cuda(row_format):
    from test_gather_rows_cuda_sim import simulate as simulate_cuda
    rows, scales = random_rows(row_format, NUM_ROWS, 256, torch.Generator().manual_seed(11))
    ids = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(12)).to(torch.int32)
    cuda = simulate_cuda(rows, scales, ids, row_format, 256)[2]
    triton = check(rows, scales, ids, row_format, 256)
    # what every warp reads of the same 4 bytes (ids, the scale of a tensor) counts as sectors that were touched, not as bytes
    data = ("rows",) if row_format == "fp8_e4m3_tensor" else ("rows", "scales")
    for figure, names in (("load_bytes", data), ("store_bytes", ("out",)), ("store_sectors", ("out",)),
                          ("unique_sectors_read", None), ("unique_sectors_written", None)):
        ratio = total(triton, figure, names) / total(cuda, figure, names)
        assert ratio <= 1.05, f"{figure}: {ratio:.3f} of the CUDA kernel's"
    assert triton[0].result.memory["global.store"]["bytes"] == NUM_ROWS * 512


def test_gather_rows_backward_on_the_simulator():
    from engram_kernels.triton_kernels.gather_rows import gather_rows_bwd
    grad, ids = torch.randn(60, 130, generator=torch.Generator().manual_seed(1)), random_ids(60, 7)
    got, _ = simulate(lambda: gather_rows_bwd(grad, ids, 9, torch.float32), cta_order="random")
    want = torch.zeros(9, 130)
    for i, row in enumerate(ids.tolist()):
        if row >= 0:
            want[row] += grad[i]
    assert torch.equal(got, want)
