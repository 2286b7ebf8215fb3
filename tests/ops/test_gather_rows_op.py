"""gather_rows as a torch op: gradients, opcheck, torch.compile, and direct calls without the public function's checks."""
import pytest
import torch
from format_cases import table_scale_of

from engram_kernels._library import COMPILE_ERROR
from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.reference.gather_rows import gather_rows as reference
from engram_kernels.table.row_table import FLOAT_FORMATS, ROW_FORMATS, RowTable
from engram_kernels.testing import random_rows

pytestmark = pytest.mark.skipif(COMPILE_ERROR is not None, reason=str(COMPILE_ERROR))
OPS = torch.ops.engram_kernels


def make_ids(*shape, num_rows, seed=0):
    return torch.randint(-1, num_rows, shape, generator=torch.Generator().manual_seed(seed))


def sum_in_order(grad, ids, num_rows, dtype):
    """What gather_rows_bwd promises: fp32 sums in the order of the positions, one rounding."""
    sums = torch.zeros(num_rows, grad.shape[-1])
    for row, values in zip(ids.flatten().tolist(), grad.flatten(0, -2), strict=True):
        if row >= 0:
            sums[row] += values.float()
    return sums.to(dtype)


@pytest.mark.parametrize("row_dim", [1, 7, 64, 130, 333])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                    (torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_gather_rows_backward_sums_in_order(dtypes, row_dim, isa):
    grad_dtype, dtype = dtypes
    ids = make_ids(60, 3, num_rows=41)
    ids[:20] = 5  # one row of many positions
    grad = torch.randn(60, 3, row_dim, generator=torch.Generator().manual_seed(1)).to(grad_dtype)
    got = OPS.gather_rows_bwd(grad, ids, 41, dtype)
    assert torch.equal(got, sum_in_order(grad, ids, 41, dtype))


@pytest.mark.parametrize("num_rows", [1, 2, 3000, 70_000, 5_000_000])
def test_gather_rows_backward_is_deterministic(num_rows):
    """One and many threads, few and many rows for each, ids of more than one radix digit."""
    ids = make_ids(20_000, num_rows=num_rows).int()
    grad = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(OPS.gather_rows_bwd(grad, ids, num_rows, torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)
    present = ids >= 0
    exact = torch.zeros(num_rows, 4, dtype=torch.float64).index_add_(0, ids[present].long(), grad[present].double())
    torch.testing.assert_close(results[0].double(), exact, rtol=2**-7, atol=1e-2 if num_rows < 4 else 1e-4)


def test_gather_rows_backward_special_values():
    nan, inf = float("nan"), float("inf")
    grad = torch.tensor([[nan], [inf], [-inf], [-0.0], [5.0]])
    got = OPS.gather_rows_bwd(grad, torch.tensor([0, 1, 1, 2, -1]), 4, torch.float32)
    assert got[0].isnan() and got[1].isnan() and got[2:].flatten().tolist() == [0, 0]
    assert OPS.gather_rows_bwd(grad[:0], torch.empty(0, dtype=torch.int64), 3, torch.bfloat16).tolist() == [[0]] * 3
    assert OPS.gather_rows_bwd(grad, torch.full((5,), -1), 0, torch.float32).shape == (0, 1)


@pytest.mark.parametrize("row_format", FLOAT_FORMATS)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_gather_rows_gradient_matches_autograd_of_reference(row_format, sparse):
    rows, _ = random_rows(row_format, 17, 24, torch.Generator().manual_seed(0))
    rows.requires_grad_()
    ids, weight = make_ids(5, 6, num_rows=17), torch.randn(5, 6, 24, generator=torch.Generator().manual_seed(2))
    table = RowTable.from_tensor(rows, row_format=row_format)
    (gather_rows(table, ids, torch.float32, sparse_grad=sparse) * weight).sum().backward()
    exact = rows.detach().double().requires_grad_()
    (reference(exact, None, ids, row_format, 24, False, torch.float64) * weight).sum().backward()
    got = rows.grad.to_dense() if sparse else rows.grad
    assert rows.grad.is_sparse == sparse and rows.grad.dtype == rows.dtype and rows.grad.shape == rows.shape
    eps = torch.finfo(rows.dtype).eps
    torch.testing.assert_close(got.double(), exact.grad, rtol=0, atol=2 * eps * exact.grad.abs().max().item())


@pytest.mark.parametrize("row_format", FLOAT_FORMATS)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gather_rows_gradients_sum_duplicates_in_float32_and_round_once(row_format, out_dtype, backend):
    rows, _ = random_rows(row_format, 9, 24, torch.Generator().manual_seed(0))
    ids = make_ids(40, 6, num_rows=7)
    weight = torch.randn(40, 6, 24, generator=torch.Generator().manual_seed(2)).to(out_dtype)
    exact = torch.zeros(9, 24, dtype=torch.float64).index_add_(0, ids[ids >= 0].long(), weight[ids >= 0].double())
    rounded = exact.float().to(rows.dtype)
    for sparse in (False, True):
        table = RowTable.from_tensor(rows.clone().requires_grad_(), row_format=row_format)
        gather_rows(table, ids, out_dtype, sparse_grad=sparse, backend=backend).backward(weight)
        grad = table.rows.grad
        if sparse:
            assert grad._indices().flatten().tolist() == sorted(set(ids[ids >= 0].tolist()))
        away = (grad.to_dense().double() - rounded.double()).abs() / exact.abs().clamp(min=1)
        # a sum in float32 may fall to the other side of a boundary between two of the row's dtype, once in thousands
        bound = max(torch.finfo(rows.dtype).eps, 1e-6)
        assert away.max() <= bound and (away > 1e-5).double().mean() < 0.01, (sparse, away.max())


def test_gather_rows_sparse_gradients_without_a_kernel_are_summed_in_order(monkeypatch):
    """As on a GPU that has neither CUDA nor Triton kernels, where index_add has no order."""
    rows, ids, grad = torch.zeros(40, 24), torch.randint(-1, 30, (500,)), torch.randn(500, 24)
    found = []
    for has_kernel in (torch._C._dispatch_has_kernel_for_dispatch_key, lambda name, key: False):
        with monkeypatch.context() as patch:
            patch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", has_kernel)
            patch.setattr(torch.Tensor, "index_add", None)
            rows.grad = None
            gather_rows(RowTable.from_tensor(rows.requires_grad_(), row_format="f32"), ids, torch.float32,
                        sparse_grad=True).backward(grad)
        found.append((rows.grad._indices(), rows.grad._values()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gather_rows_sparse_gradients_are_the_dense_ones_to_the_bit():
    for row_format, num_rows in (("bf16", 7), ("f16", 3), ("f32", 5000)):
        rows, _ = random_rows(row_format, num_rows, 40, torch.Generator().manual_seed(0))
        ids, grads = make_ids(3000, num_rows=num_rows), []
        weight = torch.randn(3000, 40, generator=torch.Generator().manual_seed(2))
        for sparse in (False, True):
            table = RowTable.from_tensor(rows.clone().requires_grad_(), row_format=row_format)
            gather_rows(table, ids, torch.float32, sparse_grad=sparse).backward(weight)
            grads.append(table.rows.grad.to_dense())
        assert torch.equal(*grads)
    none = RowTable.from_tensor(torch.zeros(3, 2, requires_grad=True), row_format="f32")
    gather_rows(none, torch.tensor([-1, -1]), torch.float32, sparse_grad=True).sum().backward()
    assert none.rows.grad.is_sparse and none.rows.grad._nnz() == 0


def test_gather_rows_gradient_of_a_sliced_table_and_an_expanded_grad():
    wide = torch.randn(9, 40, requires_grad=True)
    table, ids = RowTable.from_tensor(wide[:, :33], row_format="f32"), make_ids(12, num_rows=9)
    gather_rows(table, ids, torch.float32).sum().backward()  # the incoming gradient has stride 0
    counts = torch.bincount(ids[ids >= 0], minlength=9).float()
    assert torch.equal(wide.grad, torch.cat([counts[:, None].expand(9, 33), torch.zeros(9, 7)], 1))


def test_gather_rows_reference_gradcheck():
    rows = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 5, 5], [-1, 2, 0]])
    assert torch.autograd.gradcheck(lambda r: reference(r, None, ids, "f32", 5, False, torch.float64), rows)
    assert torch.autograd.gradgradcheck(lambda r: reference(r, None, ids, "f32", 5, False, torch.float64), rows)


def test_gather_rows_double_backward():
    rows = torch.randn(6, 5, requires_grad=True)
    ids, weight = torch.tensor([[0, 5, 5], [-1, 2, 0]]), torch.randn(2, 3, 5, requires_grad=True)
    out = gather_rows(RowTable.from_tensor(rows, row_format="f32"), ids, torch.float32)
    (grad,) = torch.autograd.grad((out * weight).sum(), rows, create_graph=True)
    probe = torch.randn(6, 5)
    (got,) = torch.autograd.grad((grad * probe).sum(), weight)
    assert torch.equal(got, reference(probe, None, ids, "f32", 5, False, torch.float32))


def test_gather_rows_rejects_out_with_gradients():
    table = RowTable.from_tensor(torch.randn(4, 8, requires_grad=True), row_format="f32")
    with pytest.raises(ValueError, match="out cannot be given while an input requires grad"):
        gather_rows(table, torch.tensor([1]), torch.float32, out=torch.empty(1, 8))
    with torch.no_grad():
        gather_rows(table, torch.tensor([1]), torch.float32, out=torch.empty(1, 8))


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_gather_rows_opcheck(row_format):
    rows, scales = random_rows(row_format, 9, 32, torch.Generator().manual_seed(0))
    args = (rows, scales, make_ids(4, 3, num_rows=9), row_format, 32, False, torch.bfloat16, table_scale_of(row_format))
    torch.library.opcheck(OPS.gather_rows.default, args)
    torch.library.opcheck(OPS.gather_rows.out, args, {"out": torch.empty(4, 3, 32, dtype=torch.bfloat16)})
    if row_format in FLOAT_FORMATS:
        torch.library.opcheck(OPS.gather_rows.default, (rows.requires_grad_(), *args[1:]))
        grad = torch.randn(4, 3, 32, requires_grad=True)
        torch.library.opcheck(OPS.gather_rows_bwd.default, (grad, args[2], 9, rows.dtype))


@pytest.mark.parametrize("row_format", ["bf16", "fp8_e4m3_block32"])
def test_gather_rows_compiles(row_format):
    rows, scales = random_rows(row_format, 50, 64, torch.Generator().manual_seed(0))
    table = RowTable.from_tensor(rows, scales, row_format)

    def step(ids):
        return gather_rows(table, ids) * 2

    for ids in (make_ids(7, 3, num_rows=50), make_ids(9, 3, num_rows=50)):
        assert torch.equal(torch.compile(step, fullgraph=True)(ids), step(ids))


def test_gather_rows_compiles_with_gradients():
    rows, ids = torch.randn(20, 16), make_ids(7, 3, num_rows=20)

    def loss(weight):
        return gather_rows(RowTable.from_tensor(weight, row_format="f32"), ids, torch.float32).square().sum()

    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True)):
        weight = rows.clone().requires_grad_()
        run(weight).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-6)


def u8(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


DIRECT = {
    "rows_dtype": {"rows": torch.zeros(9, 64)},
    "rows_dims": {"rows": u8(9, 64, 1)},
    "rows_narrow": {"rows": u8(9, 32)},
    "rows_strided": {"rows": u8(64, 9).t()},
    "rows_overlap": {"rows": u8(1, 64).expand(9, 64)},
    "scales_missing": {"scales": None},
    "scales_short": {"scales": u8(8, 2)},
    "scales_narrow": {"scales": u8(9, 1)},
    "scales_dtype": {"scales": torch.zeros(9, 2)},
    "scales_strided": {"scales": u8(2, 9).t()},
    "ids_dtype": {"row_ids": torch.zeros(4)},
    "ids_strided": {"row_ids": torch.zeros(4, 2, dtype=torch.int64)[:, 0]},
    "format": {"row_format": "fp4"},
    "dim_zero": {"row_dim": 0},
    "dim_huge": {"row_dim": 2**40},
    "dim_odd": {"row_dim": 63},
    "out_dtype": {"out_dtype": torch.float64},
}


@pytest.mark.parametrize("change", DIRECT.values(), ids=DIRECT.keys())
def test_gather_rows_op_is_memory_safe_without_the_public_checks(change):
    args = {"rows": u8(9, 64), "scales": u8(9, 2), "row_ids": torch.tensor([0, 8, -1, 3]), "row_format": "fp8_e4m3_block32",
            "row_dim": 64, "zero_scale_is_zero": False, "out_dtype": torch.bfloat16, **change}
    with pytest.raises(ValueError, match="gather_rows: "):
        OPS.gather_rows(*args.values())
    if set(change) & {"dim_huge", "row_dim"} or args["out_dtype"] == torch.float64:
        return
    with pytest.raises(ValueError, match="gather_rows: "):
        OPS.gather_rows.out(*args.values(), out=torch.empty(4, 64, dtype=torch.bfloat16))


def test_gather_rows_op_rejects_outputs_and_gradients_that_do_not_fit():
    rows, ids = torch.randn(9, 8), torch.tensor([0, 8])
    options = ("f32", 8, False, torch.float32)
    for out in (torch.empty(2, 7), torch.empty(3, 8), torch.empty(2, 8, dtype=torch.float16), torch.empty(8, 2).t(), rows[3:5],
                torch.empty(16)):
        with pytest.raises(ValueError, match="gather_rows: "):
            OPS.gather_rows.out(rows, None, ids, *options, out=out)
    with pytest.raises(IndexError, match=r"gather_rows: row_ids\[1\] is 8, expected \[0, 8\) or -1"):
        OPS.gather_rows(rows[:8], None, ids, *options)
    for grad, num_rows in ((torch.zeros(3, 8), 9), (torch.zeros(2, 8).double(), 9), (torch.zeros(2, 8), -1), (torch.zeros(2), 9),
                           (torch.zeros(8, 2).t(), 9)):
        with pytest.raises(ValueError, match="gather_rows_bwd: "):
            OPS.gather_rows_bwd(grad, ids, num_rows, torch.float32)
    with pytest.raises(IndexError, match=r"gather_rows_bwd: row_ids\[1\] is 8"):
        OPS.gather_rows_bwd(torch.zeros(2, 8), ids, 8, torch.float32)


def test_gather_rows_allocates_nothing_but_its_output():
    from torch.profiler import ProfilerActivity, profile
    rows, ids = torch.randn(1000, 64).bfloat16(), make_ids(5000, num_rows=1000)
    table, out = RowTable.from_tensor(rows), torch.empty(5000, 64, dtype=torch.bfloat16)
    gather_rows(table, ids, out=out)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        gather_rows(table, ids, out=out)
    assert sum(max(e.self_cpu_memory_usage, 0) for e in run.events()) == 0
