"""gather_rows: every row format over all its byte values, special values, gradients, threads, bad input."""
import mmap

import numpy as np
import pytest
import torch
from format_cases import every_byte, exact_values, table_options
from on_device import on_device, raises_bad_ids
from op_cases import make_table

from engram_kernels.ops.gather_rows import gather_rows as gather_rows_op
from engram_kernels.reference.gather_rows import gather_rows as reference
from engram_kernels.table.row_table import FLOAT_FORMATS, ROW_FORMATS, RowTable
from engram_kernels.testing import random_rows

gather_rows = on_device(gather_rows_op)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT_OF = {4: torch.int32, 2: torch.int16}


def bits(x):
    return x.contiguous().view(INT_OF[x.element_size()])


def assert_same_values(got, want):
    """Bit for bit, 0 and -0 told apart; a NaN may be any NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape
    different = (bits(got) != bits(want)) & ~(got.isnan() & want.isnan())
    if different.any():
        where = different.nonzero()[0].tolist()
        raise AssertionError(f"{int(different.sum())} values differ; at {where}: {got[tuple(where)]}, want {want[tuple(where)]}")


def make_ids(*shape, num_rows, seed=0, dtype=torch.int64):
    return torch.randint(-1, num_rows, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of_reference(table, ids, dtype):
    return reference(table.rows, table.scales, ids, table.row_format, table.row_dim, table.zero_scale_is_zero, dtype,
                     table.table_scale)


@pytest.mark.parametrize("row_dim", [32, 256, 320], ids=["one_block", "usual", "long"])
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_gather_rows_matches_reference(row_format, row_dim, backend):
    table = make_table(row_format, 77, row_dim)
    for number, dtype in enumerate(DTYPES):
        ids = make_ids(9, 7, num_rows=77, seed=number, dtype=(torch.int32, torch.int64)[number % 2])
        assert_same_values(gather_rows(table, ids, dtype, backend=backend), of_reference(table, ids, dtype))


@pytest.mark.parametrize("row_dim", [1, 5, 17, 257])
@pytest.mark.parametrize("row_format", [*FLOAT_FORMATS, "fp8_e4m3_tensor", "fp8_e4m3_row"])
def test_gather_rows_odd_row_dim(row_format, row_dim, backend):
    table, ids = make_table(row_format, 20, row_dim), make_ids(41, num_rows=20)
    for dtype in DTYPES:
        assert_same_values(gather_rows(table, ids, dtype, backend=backend), of_reference(table, ids, dtype))


@pytest.mark.parametrize("zero_scale_is_zero", [False, True], ids=["zero_is_2^-127", "zero_is_zero"])
@pytest.mark.parametrize("row_format", ["fp8_e4m3_block32", "fp8_e4m3_block32_packed"])
def test_gather_rows_fp8_every_byte_with_every_scale(row_format, zero_scale_is_zero, backend):
    rows = torch.arange(256, dtype=torch.uint8).repeat(256, 1)  # row s: every value with scale byte s
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 8)
    if row_format.endswith("packed"):
        table = RowTable.from_tensor(torch.cat([rows, scales], 1), row_format=row_format, row_dim=256,
                                     zero_scale_is_zero=zero_scale_is_zero)
    else:
        table = RowTable.from_tensor(rows, scales, row_format, zero_scale_is_zero=zero_scale_is_zero)
    ids = torch.arange(256)
    exact = rows.view(torch.float8_e4m3fn).float() * scales[:, :1].view(torch.float8_e8m0fnu).float()  # by torch itself
    if zero_scale_is_zero:
        exact[0] = torch.where(exact[0].isnan(), exact[0], exact[0] * 0)
    for dtype in DTYPES:
        assert_same_values(gather_rows(table, ids, dtype, backend=backend), exact.to(dtype))


@pytest.mark.parametrize("row_format", ["nvfp4", "mxfp4", "fp8_e4m3_row"])
def test_gather_rows_every_stored_value_with_every_scale(row_format, backend):
    rows, scales = every_byte(row_format, 256)
    ids = torch.arange(len(rows))
    ids[::9] = -1
    for zero_is_zero in (False, True):
        table = RowTable.from_tensor(rows, scales, row_format, zero_scale_is_zero=zero_is_zero, **table_options(row_format))
        with np.errstate(all="ignore"):
            exact = exact_values(row_format, rows, scales, zero_is_zero)
            exact[::9] = 0
            once = torch.from_numpy(exact.astype(np.float32))
        for dtype in DTYPES:
            assert_same_values(gather_rows(table, ids, dtype, backend=backend), once.to(dtype))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gather_rows_scales_as_published(shape, dtype, backend):
    rows, _ = random_rows("fp8_e4m3_tensor", 20, 64, torch.Generator().manual_seed(0))
    scale = torch.tensor(0.3).to(dtype).reshape(shape)
    table, ids = RowTable.from_tensor(rows, scale, "fp8_e4m3_tensor"), torch.arange(-1, 20)
    want = RowTable.from_tensor(rows, scale.float().reshape(1), "fp8_e4m3_tensor")
    assert table.scales.shape == (1,) and table.scales.dtype == torch.float32
    assert_same_values(gather_rows(table, ids, backend=backend), of_reference(want, ids, torch.bfloat16))
    scales = torch.linspace(-1, 2, 20).to(dtype)
    table = RowTable.from_tensor(rows, scales.reshape(20, *shape), "fp8_e4m3_row")
    want = torch.cat([torch.zeros(1, 64), rows.view(torch.float8_e4m3fn).float() * scales.float()[:, None]])
    assert_same_values(gather_rows(table, ids, torch.float32, backend=backend), want)


def test_gather_rows_fp8_mixed_scales_in_a_row(backend):
    # an extreme scale sends the whole row over float; the others of the row must not notice
    rows = torch.randint(0, 256, (64, 256), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scales = torch.tensor([9, 10, 246, 247, 0, 255, 127, 1], dtype=torch.uint8).repeat(64, 1)
    scales[1::2] = torch.tensor([10, 246, 127, 100, 140, 11, 245, 64], dtype=torch.uint8)
    table, ids = RowTable.from_tensor(rows, scales, "fp8_e4m3_block32"), torch.arange(64)
    for dtype in DTYPES:
        assert_same_values(gather_rows(table, ids, dtype, backend=backend), of_reference(table, ids, dtype))


@pytest.mark.parametrize("scale", [1.0, 0.0, -2.5, 3e-39, 1.7e38, float("inf"), float("nan"), 0.1])
def test_gather_rows_every_byte_with_float_scales(scale, backend):
    every = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    tables = (RowTable.from_tensor(every, torch.tensor([scale]), "fp8_e4m3_tensor"),
              RowTable.from_tensor(every.view(torch.int8), torch.full((2, 8), scale), "int8_group32"))
    for table in tables:
        for dtype in DTYPES:
            ids = torch.tensor([1, -1, 0])
            assert_same_values(gather_rows(table, ids, dtype, backend=backend), of_reference(table, ids, dtype))


def edge_floats():
    """Every upper half of a float32 with the lower halves where rounding to bf16 and f16 turns."""
    upper = torch.arange(-2**15, 2**15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xEFFF, 0xF000, 0xFFFF],
                         dtype=torch.int32)
    return (upper[:, None] | lower).view(torch.float32)


@pytest.mark.parametrize("row_format", FLOAT_FORMATS)
def test_gather_rows_rounds_every_edge(row_format, backend):
    halves = torch.arange(-2**15, 2**15, dtype=torch.int16).view(-1, 64)
    rows = edge_floats() if row_format == "f32" else halves.view(FLOAT_FORMATS[row_format])
    table, ids = RowTable.from_tensor(rows, row_format=row_format), torch.arange(rows.shape[0])
    for dtype in DTYPES:
        got = gather_rows(table, ids, dtype, backend=backend)
        if dtype == rows.dtype:
            assert torch.equal(bits(got), bits(rows))  # a copy: NaN payloads too
        else:
            assert_same_values(got, rows.to(dtype))


def test_gather_rows_nan_bits_do_not_depend_on_the_instruction_set(compiled):
    from engram_kernels import _C
    rows, scales = torch.arange(256, dtype=torch.uint8).repeat(256, 1), torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 8)
    halves = torch.arange(-2**15, 2**15, dtype=torch.int16).view(-1, 64)
    tables = [RowTable.from_tensor(rows, scales, "fp8_e4m3_block32"), RowTable.from_tensor(edge_floats(), row_format="f32"),
              RowTable.from_tensor(halves.view(torch.float16), row_format="f16")]
    results = []
    for isa in ("portable", "avx2", "avx512"):
        try:
            _C.set_cpu_isa(isa)
        except ValueError:
            continue
        results.append([bits(gather_rows(t, torch.arange(t.num_rows), d, backend="cpu")) for t in tables for d in DTYPES])
    _C.set_cpu_isa(_C.best_cpu_isa())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("row_format", ["bf16", "f32", "fp8_e4m3_block32", "fp8_e4m3_tensor", "int8_group32"])
@pytest.mark.parametrize("misaligned", [0, 3], ids=["aligned", "misaligned"])
def test_gather_rows_large_output_on_one_and_many_threads(row_format, misaligned, backend):
    table, ids = make_table(row_format, 500, 96), make_ids(50_001, num_rows=500, dtype=torch.int32)
    storage = torch.full((50_001 * 96 + 64,), -7.0, dtype=torch.bfloat16)
    out = storage[misaligned:misaligned + 50_001 * 96].view(50_001, 96)
    assert gather_rows(table, ids, out=out, backend=backend) is out
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = gather_rows(table, ids, backend=backend)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(bits(out), bits(single))
    assert_same_values(out, of_reference(table, ids, torch.bfloat16))
    assert (storage[:misaligned] == -7).all() and (storage[misaligned + 50_001 * 96:] == -7).all()  # nothing beyond out


@pytest.mark.parametrize("row_format", ["bf16", "fp8_e4m3_block32_packed"])
@pytest.mark.parametrize("stride", [288, 320])
def test_gather_rows_padded_and_sliced_rows(row_format, stride, backend):
    rows, _ = random_rows(row_format, 30, 256, torch.Generator().manual_seed(0))
    wide = torch.zeros(30, stride, dtype=rows.dtype)
    wide[:, :rows.shape[1]] = rows
    tables = [RowTable.from_tensor(wide[:, :rows.shape[1]], row_format=row_format, row_dim=256),
              RowTable.from_tensor(wide[::3, :rows.shape[1]], row_format=row_format, row_dim=256)]
    if row_format != "bf16":
        tables.append(RowTable.from_tensor(wide, row_format=row_format, row_dim=256))
    for table in tables:
        ids = make_ids(40, num_rows=table.num_rows)
        assert_same_values(gather_rows(table, ids, backend=backend), of_reference(table, ids, torch.bfloat16))


def test_gather_rows_strided_scales(backend):
    rows, scales = random_rows("fp8_e4m3_block32", 30, 64, torch.Generator().manual_seed(0))
    wide = torch.cat([scales, scales * 0 + 255], dim=1)
    table, ids = RowTable.from_tensor(rows, wide[:, :2], "fp8_e4m3_block32"), make_ids(40, num_rows=30)
    want = reference(rows, scales, ids, "fp8_e4m3_block32", 64, False, torch.bfloat16)
    assert_same_values(gather_rows(table, ids, backend=backend), want)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (2, 3, 4)], ids=["no_ids", "no_columns", "scalar", "three_dims"])
def test_gather_rows_shapes_and_empty_input(shape, backend):
    table = make_table("bf16", 10, 8)
    ids = make_ids(*shape, num_rows=10)
    got = gather_rows(table, ids, torch.float32, backend=backend)
    assert got.shape == (*shape, 8)
    assert_same_values(got, of_reference(table, ids, torch.float32))


def test_gather_rows_no_row_reads_nothing(backend):
    empty = RowTable.from_tensor(torch.empty(0, 64), row_format="f32")  # there is nothing to read
    got = gather_rows(empty, torch.full((3,), -1), torch.float32, backend=backend)
    assert torch.equal(bits(got), torch.zeros(3, 64, dtype=torch.int32))
    nan = RowTable.from_tensor(torch.full((4, 64), float("nan")), row_format="f32")
    got = gather_rows(nan, torch.tensor([-1, 0, -1], dtype=torch.int32), backend=backend)
    assert torch.equal(bits(got[::2]), torch.zeros(2, 64, dtype=torch.int16)) and got[1].isnan().all()


def test_gather_rows_large_offsets(compiled):
    """Byte offsets beyond 2^32 in a table of which two rows are ever touched."""
    num_rows = (5 << 30) // 64
    memory = mmap.mmap(-1, num_rows * 64, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    rows = torch.frombuffer(memory, dtype=torch.uint8).view(num_rows, 64)
    rows[num_rows - 1] = torch.arange(64, dtype=torch.uint8)
    table = RowTable.from_tensor(rows, torch.ones(1), "fp8_e4m3_tensor")
    got = gather_rows(table, torch.tensor([num_rows - 1, 0], dtype=torch.int32), torch.float32, backend="cpu")
    assert torch.equal(got[0], torch.arange(64, dtype=torch.uint8).view(torch.float8_e4m3fn).float()) and (got[1] == 0).all()
    with pytest.raises(IndexError, match=rf"row_ids\[0\] is {num_rows}"):
        gather_rows(table, torch.tensor([num_rows], dtype=torch.int32), backend="cpu")


@pytest.mark.parametrize("bad", [-2, 10, 2**31 - 1, -2**31], ids=["below", "above", "largest", "smallest"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gather_rows_rejects_ids_before_writing(bad, dtype, backend):
    table, ids = make_table("bf16", 10, 8), make_ids(3, 1000, 5, num_rows=10, dtype=dtype)
    ids[1, 700, 4] = bad
    out = torch.full((3, 1000, 5, 8), -7.0, dtype=torch.bfloat16)
    message = rf"row_ids\[1, 700, 4\] is {bad}, expected \[0, 10\) or -1 \(no row\)"
    with raises_bad_ids("gather_rows", backend, message):
        gather_rows(table, ids, out=out, backend=backend)
    assert (out == -7).all()


@pytest.mark.parametrize("bad", [2**62, -2**63, 2**63 - 1, 2**32])
def test_gather_rows_rejects_ids_beyond_32_bits(bad, backend):
    with raises_bad_ids("gather_rows", backend, rf"row_ids\[1\] is {bad}"):
        gather_rows(make_table("bf16", 10, 8), torch.tensor([0, bad]), backend=backend)


BAD = {
    "table_is_a_tensor": ({"table": torch.zeros(3, 4)}, TypeError, "table must be a RowTable, got Tensor"),
    "ids_are_a_list": ({"row_ids": [1, 2]}, TypeError, "row_ids must be a tensor, got list"),
    "ids_dtype": ({"row_ids": torch.zeros(3)}, ValueError, "row_ids must be torch.int32 or torch.int64, got torch.float32"),
    "ids_stride": ({"row_ids": torch.zeros(4, 4, dtype=torch.int64).t()[:, :3]}, ValueError, "row_ids must be contiguous"),
    "ids_device": ({"row_ids": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "row_ids must be on cpu, got meta"),
    "out_dtype": ({"out_dtype": torch.float64}, ValueError, "out_dtype is torch.float64"),
    "out_shape": ({"out": torch.zeros(3, 9, dtype=torch.bfloat16)}, ValueError, r"out must have shape \[3, 8\], got \[3, 9\]"),
    "out_has_other_dtype": ({"out": torch.zeros(3, 8)}, ValueError, "out must be torch.bfloat16, got torch.float32"),
    "out_stride": ({"out": torch.zeros(8, 3, dtype=torch.bfloat16).t()}, ValueError, "out must be contiguous"),
    "backend": ({"backend": "gpu"}, ValueError, "backend is 'gpu'"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD.keys())
def test_gather_rows_rejects(change, error, message):
    args = {"table": make_table("bf16", 10, 8), "row_ids": torch.tensor([1, -1, 9]), **change}
    with pytest.raises(error, match=message):
        gather_rows(**args)
