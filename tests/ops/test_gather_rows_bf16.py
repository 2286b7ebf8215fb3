"""Rows of few bits to bf16 in integer arithmetic: every stored value under many scales, on every instruction set, bit for bit as
over float. Random scales and all byte values together take both ways, that of tables and that of rows they do not suit."""
import pytest
import torch
from test_gather_rows import assert_same_values, of_reference

from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.table.row_table import RowTable

EVERY = torch.arange(256, dtype=torch.uint8)
STREAMED = 16_384  # rows of 256: 8 MiB, whose stores go past the cache
# where products become subnormal or infinite, and on both sides of where tables of products hold
EDGES = (0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-38, 1e-45, float("inf"), float("nan"), 2.0**-118, 2.0**-117, 1.9 * 2.0**-118,
         2.0**118, 2.0**119, 1.9999 * 2.0**118, 0.37, -0.37, 1 / 3)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def float_scales(generator):
    """[700] of all kinds: edges, ordinary ones over all exponents, any bits, and few bits, whose products lie on ties."""
    exponents = torch.exp2(torch.randint(-130, 120, (281,), generator=generator).float())
    any_bits = torch.randint(-2**31, 2**31 - 1, (200,), generator=generator).int().view(torch.float32)
    few_bits = torch.randint(1, 256, (200,), generator=generator).float() * exponents[:200]
    return torch.cat([torch.tensor(EDGES), torch.randn(281, generator=generator) * exponents, any_bits, few_bits])


def check(table):
    """All rows once, and again and again until the output is streamed."""
    ids = torch.arange(table.num_rows)
    want = of_reference(table, ids, torch.bfloat16)
    got = gather_rows(table, ids)
    assert_same_values(got, want)
    assert not got.isnan().any() or (got.view(torch.int16)[got.isnan()] == 0x7FC0).all()
    repeats = STREAMED * 256 // table.row_dim // table.num_rows + 1
    assert_same_values(gather_rows(table, ids.repeat(repeats)), want.repeat(repeats, 1))


@pytest.mark.parametrize("with_nan", [True, False])
@pytest.mark.parametrize("row_dim", [256, 250])
def test_fp8_times_a_float(row_dim, with_nan, generator, isa):
    scales, values = float_scales(generator), EVERY[:row_dim].clone()
    if not with_nan:
        values[(values & 127) == 127] = 3
    check(RowTable.from_tensor(values.repeat(len(scales), 1), scales, "fp8_e4m3_row"))
    for scale in scales[:30]:
        check(RowTable.from_tensor(values.repeat(2, 1), scale.clone(), "fp8_e4m3_tensor"))


@pytest.mark.parametrize("row_format", ["fp8_e4m3_block32", "fp8_e4m3_block32_packed"])
@pytest.mark.parametrize("ordinary", [True, False])
def test_fp8_times_a_power_of_two(ordinary, row_format, generator, isa):
    rows = EVERY.repeat(512, 1)
    scales = torch.randint(10, 247, (512, 8), generator=generator, dtype=torch.uint8) if ordinary else \
        torch.cat([EVERY[:, None].repeat(1, 8), torch.randint(0, 256, (256, 8), generator=generator, dtype=torch.uint8)])
    if row_format == "fp8_e4m3_block32":
        check(RowTable.from_tensor(rows, scales, row_format, zero_scale_is_zero=True))
    else:
        check(RowTable.from_tensor(torch.cat([rows, scales], 1), row_format=row_format, row_dim=256))


def test_int8_times_a_float(generator, isa):
    scales = float_scales(generator)
    mixed = torch.stack([scales[torch.randperm(len(scales), generator=generator)] for _ in range(8)], 1)
    few_bits = torch.randint(1, 256, (500, 8), generator=generator).float()
    for of_row in (scales[:, None].repeat(1, 8), mixed, few_bits):
        check(RowTable.from_tensor(EVERY.view(torch.int8).repeat(len(of_row), 1), of_row.contiguous(), "int8_group32"))


@pytest.mark.parametrize("row_dim", [256, 48, 32])
@pytest.mark.parametrize("row_format, block", [("nvfp4", 16), ("mxfp4", 32)])
def test_four_bits(row_format, block, row_dim, generator, isa):
    if row_dim % block:
        row_dim = 2 * block
    rows = torch.randint(0, 256, (256, row_dim // 2), generator=generator, dtype=torch.uint8)
    scales = torch.stack([torch.randperm(256, generator=generator) for _ in range(row_dim // block)], 1).to(torch.uint8)
    if row_format == "mxfp4":
        for zero_scale_is_zero in (False, True):
            check(RowTable.from_tensor(rows, scales, row_format, zero_scale_is_zero=zero_scale_is_zero))
    else:
        for scale in (1.0, -0.37, 1e-38, 3e38, 1e-45):
            check(RowTable.from_tensor(rows, scales, row_format, table_scale=scale))
