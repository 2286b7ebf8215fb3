"""engram_forward: gather, projection and gate (docs/ops.md, engram_forward), on every backend."""
import pytest
import torch
from format_cases import table_options

import engram_kernels as ek
from engram_kernels import _steps
from engram_kernels.ops import engram_forward as op_file
from engram_kernels.ops.engram_forward import engram_forward
from engram_kernels.reference.engram_forward import engram_forward as reference
from engram_kernels.reference.gather_rows import gather_rows as reference_gather
from engram_kernels.table.row_table import ROW_FORMATS, RowTable
from engram_kernels.testing import assert_as_accurate_as_torch
from engram_kernels.testing.inputs import random_rows

NUM_ROWS = 50
FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SHAPES = {  # name: (tokens, branches, hidden size, columns, row_dim)
    "one": (1, 1, 1, 1, 32),
    "v41_rows": (3, 4, 96, 6, 256),
    "odd": (19, 2, 37, 3, 13),
    "wide_rows": (5, 1, 65, 2, 160),
}


def make_inputs(tokens, branches, size, columns, row_dim, row_format, dtype, num_rows=NUM_ROWS, device="cpu"):
    """[hidden, table, row_ids, w_kv, w_hidden, w_key]"""
    generator = torch.Generator().manual_seed(1)
    rows, scales = random_rows(row_format, num_rows, row_dim, torch.Generator().manual_seed(0))
    table = RowTable.from_tensor(rows.to(device), None if scales is None else scales.to(device), row_format, row_dim=row_dim,
                                 **table_options(row_format))
    row_ids = torch.randint(-1, num_rows, (tokens, columns), generator=generator)
    shapes = ((tokens, branches, size), ((branches + 1) * size, columns * row_dim), (branches, size), (branches, size))
    hidden, w_kv, w_hidden, w_key = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    return [hidden, table, row_ids.to(device), w_kv / (columns * row_dim) ** 0.5, w_hidden, w_key]


def exact(hidden, table, row_ids, w_kv, w_hidden, w_key, mask=None, add_residual=True):
    """In float64 but for the one rounding of the memory vector that the contract has."""
    ids = row_ids if mask is None else row_ids.masked_fill(mask[:, None], -1)
    memory = reference_gather(table.rows, table.scales, ids, table.row_format, table.row_dim, False, hidden.dtype)
    rows, ids = memory.double().flatten(0, 1), torch.arange(row_ids.numel(), device=row_ids.device).view(row_ids.shape)
    return reference(hidden.double(), rows, None, ids, w_kv.double(), w_hidden.double(), w_key.double(), mask, "f32",
                     table.row_dim, False, 1e-6, 1e-6, "copysign", add_residual, table.table_scale)


def plain(hidden, table, row_ids, w_kv, w_hidden, w_key, mask=None, add_residual=True):
    """The three steps as ordinary PyTorch computes them, keys and value in the dtype of hidden."""
    ids = row_ids if mask is None else row_ids.masked_fill(mask[:, None], -1)
    memory = reference_gather(table.rows, table.scales, ids, table.row_format, table.row_dim, False, hidden.dtype,
                              table.table_scale).flatten(1)
    kv = (memory @ w_kv.T).view(len(hidden), -1, hidden.shape[2])
    k, w = kv[:, :-1], (w_hidden, w_key)
    x = (hidden * w[0] * k * w[1]).sum(-1, keepdim=True) * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
    x = x * torch.rsqrt(k.square().mean(-1, keepdim=True) + 1e-6) / hidden.shape[-1] ** 0.5
    g = torch.sigmoid(torch.copysign(x.abs().clamp_min(1e-6).sqrt(), x))
    g = g if mask is None else g.masked_fill(mask[:, None, None], 0)
    return hidden + g * kv[:, -1:] if add_residual else g * kv[:, -1:]


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_engram_forward_matches_reference(row_format, dtype, backend, device):
    inputs = make_inputs(7, 3, 40, 3, 64, row_format, dtype, device=device)
    mask = torch.arange(7, device=device) % 3 == 1
    inputs[2][mask] = NUM_ROWS + 5  # not looked at
    got = engram_forward(*inputs, mask, backend=backend)
    assert torch.equal(got[mask], inputs[0][mask])
    assert_as_accurate_as_torch(got.cpu(), plain(*inputs, mask).cpu(), exact(*inputs, mask).cpu())


@pytest.mark.parametrize("add_residual", [True, False], ids=["residual", "update_only"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_engram_forward_shapes_match_reference(shape, add_residual, backend, device):
    inputs = make_inputs(*shape, "bf16", torch.bfloat16, device=device)
    got = engram_forward(*inputs, add_residual=add_residual, backend=backend)
    assert_as_accurate_as_torch(got.cpu(), plain(*inputs, None, add_residual).cpu(), exact(*inputs, None, add_residual).cpu())


def test_engram_forward_equals_its_steps(backend, device):
    hidden, table, row_ids, w_kv, w_hidden, w_key = make_inputs(9, 2, 64, 4, 64, "fp8_e4m3_block32", torch.float32, device=device)
    kv = (ek.gather_rows(table, row_ids, torch.float32).flatten(1) @ w_kv.T).view(9, 3, 64)
    want = ek.gate(hidden, kv[:, :2], kv[:, 2], w_hidden, w_key)
    got = engram_forward(hidden, table, row_ids, w_kv, w_hidden, w_key, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_engram_forward_of_several_tiles(backend, device, monkeypatch):
    """More tokens than are worked on at a time, some masked, ids by column, in place."""
    monkeypatch.setattr(_steps, "CHUNK_TOKENS", 4)
    tokens = 9 if backend == "triton" else 259  # the interpreter walks them one by one; a tile of the CPU has 256
    hidden, table, row_ids, *rest = make_inputs(tokens, 2, 24, 2, 32, "f32", torch.float32, device=device)
    mask = torch.arange(tokens, device=device) % 5 == 4
    want = exact(hidden, table, row_ids, *rest, mask).float()
    got = engram_forward(hidden, table, row_ids.int().t().contiguous().t(), *rest, mask, out=hidden, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
def test_engram_forward_of_slices(dtype, backend, device):
    """Every tensor a slice of a larger one, as the weights of one layer are where those of all are stacked."""
    inputs = make_inputs(5, 2, 40, 2, 32, "f32", dtype, device=device)
    mask = torch.arange(5, device=device) == 3

    def sliced(x):
        stacked = torch.full((3, *x.shape), float("nan") if x.is_floating_point() else 7, device=device).to(x.dtype)
        stacked[1] = x
        return stacked[1]
    table = RowTable.from_tensor(sliced(inputs[1].rows), row_format="f32")
    got = engram_forward(sliced(inputs[0]), table, *map(sliced, inputs[2:]), sliced(mask), backend=backend)
    assert_as_accurate_as_torch(got.cpu(), plain(*inputs, mask).cpu(), exact(*inputs, mask).cpu())


def test_engram_forward_is_the_module(backend, device):
    spec = ek.EngramSpec.deepseek_v41(hidden_size=32, branches=2, row_format="bf16", head_dim=32)
    rows = torch.randn(100, 32, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    layer = ek.Engram(spec, 1, device=device)
    hidden, ids = torch.randn(6, 2, 32).bfloat16().to(device), torch.randint(0, 100, (6, 24), device=device)
    table = RowTable.from_tensor(rows, row_format="bf16")
    with torch.no_grad():
        want = layer(hidden, rows=ek.gather_rows(table, ids, torch.bfloat16))
        got = engram_forward(hidden, table, ids, layer.wkv.weight, layer.w_hidden, layer.w_key, eps=spec.gate_eps,
                             clamp=spec.gate_clamp, backend=backend)
    torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("what", ["inf_weight", "nan_row"])
def test_engram_forward_masked_token_passes_bit_for_bit(what, backend, device):
    hidden, table, row_ids, w_kv, *weights = make_inputs(4, 2, 40, 3, 32, "f32", torch.bfloat16, device=device)
    mask = torch.tensor([False, True, True, False], device=device)
    (w_kv if what == "inf_weight" else table.rows)[:] = float("inf") if what == "inf_weight" else float("nan")
    hidden[1, :, :3] = torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.bfloat16, device=device)
    got = engram_forward(hidden, table, row_ids, w_kv, *weights, mask, backend=backend)
    assert torch.equal(got[1:3].view(torch.int16), hidden[1:3].view(torch.int16))
    got = engram_forward(hidden, table, row_ids, w_kv, *weights, mask, add_residual=False, backend=backend)
    assert not got[1:3].view(torch.int16).any()


def test_engram_forward_in_place_strided_and_empty(backend, device):
    hidden, *rest = make_inputs(5, 2, 40, 3, 32, "bf16", torch.bfloat16, device=device)
    want = engram_forward(hidden, *rest, backend=backend)
    wide = torch.zeros(5, 2, 50, dtype=hidden.dtype, device=device)
    wide[..., :40] = hidden
    out = torch.empty_like(hidden)
    assert engram_forward(wide[..., :40], *rest, out=out, backend=backend) is out and torch.equal(out, want)
    by_column = [*rest[:1], rest[1].int().t().contiguous().t(), *rest[2:]]
    assert engram_forward(hidden, *by_column, out=hidden, backend=backend) is hidden and torch.equal(hidden, want)
    assert engram_forward(hidden[:0], rest[0], rest[1][:0], *rest[2:], backend=backend).shape == (0, 2, 40)


def test_engram_forward_threads_change_no_more_than_the_product(backend, device):
    tokens = 3 if backend == "triton" else 67
    inputs = make_inputs(tokens, 2, 40, 3, 32, "bf16", torch.bfloat16, device=device)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            results.append(engram_forward(*inputs, backend=backend))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*results, rtol=2**-7, atol=2**-7)  # torch promises no bits


def op_args(hidden, table, row_ids, w_kv, w_hidden, w_key, mask=None):
    return (hidden, table.rows, table.scales, row_ids, w_kv, w_hidden, w_key, mask, table.row_format, table.row_dim, False, 1e-6,
            1e-6, "copysign", True, table.table_scale)


def test_engram_forward_steps_read_each_row_once_into_one_workspace(monkeypatch):
    """What a GPU runs: chunks in order, no row twice, so that one in pinned host memory crosses the link once."""
    monkeypatch.setattr(_steps, "CHUNK_TOKENS", 4)
    hidden, table, row_ids, *rest = make_inputs(11, 2, 40, 3, 32, "bf16", torch.bfloat16)
    mask = torch.arange(11) == 5
    gathered, workspaces, gated = [], set(), []

    def gather_rows(rows, scales, ids, *options, out):
        assert rows is table.rows and out.shape == (*ids.shape, 32) and ids.is_contiguous()
        gathered.append(ids)
        workspaces.add(("memory", out.data_ptr()))
        out.zero_()

    def gate(hidden, key, value, w_hidden, w_key, mask, *options, out):
        workspaces.add(("kv", key.data_ptr()))
        assert not key.any() and not value.any() and len(mask) == len(hidden)
        gated.append(out)

    out = torch.empty_like(hidden)
    args = op_args(hidden, table, row_ids.t().contiguous().t(), *rest, mask)
    assert _steps.forward(gather_rows, gate, *args, out=out) is out
    assert torch.equal(torch.cat(gathered), row_ids.masked_fill(mask[:, None], -1))
    assert len(workspaces) == 2 and [len(x) for x in gated] == [4, 4, 3]
    assert [x.data_ptr() for x in gated] == [out[first].data_ptr() for first in (0, 4, 8)]


@pytest.mark.parametrize("row_format", ["bf16", "fp8_e4m3_block32_packed"])
def test_engram_forward_for_cuda_on_ops_of_the_cpu(row_format, compiled, monkeypatch):
    """The functions that serve a GPU, with the CPU's gather_rows and gate: that those of CUDA do the same is theirs to show."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("engram_kernels::engram_forward.out", "CUDA")
    monkeypatch.setattr(_steps, "CHUNK_TOKENS", 4)
    inputs = make_inputs(11, 2, 40, 3, 32, row_format, torch.bfloat16)
    mask = torch.arange(11) % 4 == 1
    args, want = op_args(*inputs, mask), engram_forward(*inputs, mask, backend="cpu")
    torch.testing.assert_close(op_file._on_cuda(*args), want, rtol=2**-7, atol=2**-7)
    op_file._out_on_cuda(*args, out=inputs[0])
    torch.testing.assert_close(inputs[0], want, rtol=2**-7, atol=2**-7)
    for position, wrong in ((0, inputs[0][..., :39]), (3, inputs[2][:2]), (4, inputs[3][:-1]), (4, inputs[3].double())):
        with pytest.raises(ValueError, match="engram_forward: "):
            op_file._on_cuda(*args[:position], wrong, *args[position + 1:])
    with pytest.raises(ValueError, match="engram_forward: out shares memory with w_kv"):
        op_file._out_on_cuda(*args, out=inputs[3].flatten()[:880].view(11, 2, 40))


@pytest.mark.parametrize(("where", "value"), [((2, 1), NUM_ROWS), ((0, 0), -2)], ids=["end", "negative"])
def test_engram_forward_rejects_row_id_out_of_range(where, value, backend, device):
    if device == "cuda":
        pytest.skip("a GPU counts bad ids; check_errors raises them")
    hidden, table, row_ids, *rest = make_inputs(4, 2, 40, 3, 32, "bf16", torch.bfloat16)
    row_ids[where], out = value, torch.full_like(hidden, 7)
    with pytest.raises(IndexError, match=rf"row_ids\[{where[0]}, {where[1]}\] is {value}, expected \[0, {NUM_ROWS}\)"):
        engram_forward(hidden, table, row_ids, *rest, out=out, backend=backend)
    assert (out == 7).all()  # nothing half-written


REJECTED = {  # name: (position, new value, words of the message)
    "hidden_dtype": (0, lambda x: x.double(), "hidden must be torch.float32 or"),
    "row_ids_shape": (2, lambda x: x[:2], "row_ids must have shape"),
    "no_column": (2, lambda x: x[:, :0], "row_ids has no column"),
    "w_kv_shape": (3, lambda x: x[:-1], r"w_kv must have shape \[120, 96\]"),
    "w_kv_dtype": (3, lambda x: x.float(), "w_kv must be torch.bfloat16"),
    "w_kv_fp8": (3, lambda x: x.to(torch.float8_e4m3fn), "w_kv is torch.float8_e4m3fn, and no backend .* expected one decoded"),
    "w_kv_strides": (3, lambda x: x.t().contiguous().t(), "dimensions of w_kv must be contiguous"),
    "w_key": (5, lambda x: x.float(), "w_key must be torch.bfloat16"),
}


@pytest.mark.parametrize("case", REJECTED.values(), ids=REJECTED.keys())
def test_engram_forward_rejects(case):
    position, change, words = case
    inputs = make_inputs(3, 2, 40, 3, 32, "bf16", torch.bfloat16)
    inputs[position] = change(inputs[position])
    with pytest.raises(ValueError, match=words):
        engram_forward(*inputs)


def test_engram_forward_rejects_other_misuse(backend):
    inputs = make_inputs(3, 2, 40, 3, 32, "bf16", torch.bfloat16)
    with pytest.raises(TypeError, match="table must be a RowTable"):
        engram_forward(inputs[0], torch.empty(3, 32), *inputs[2:])
    if backend in ("cpu", "triton") and not torch.cuda.is_available():
        with pytest.raises(ValueError, match="out shares memory with w_kv"):
            engram_forward(*inputs, out=inputs[3].flatten()[:240].view(3, 2, 40), backend=backend)
    out = torch.empty_like(inputs[0])
    inputs[3].requires_grad_()
    with pytest.raises(ValueError, match="out cannot be given while an input requires grad"):
        engram_forward(*inputs, out=out, backend=backend)


def test_engram_forward_op_called_directly_is_checked(compiled):
    hidden, table, row_ids, w_kv, w_hidden, w_key = make_inputs(3, 2, 40, 3, 32, "fp8_e4m3_block32", torch.float32)
    good = (hidden, table.rows, table.scales, row_ids, w_kv, w_hidden, w_key, None, "fp8_e4m3_block32", 32, False, 1e-6, 1e-6,
            "copysign", True)
    op = torch.ops.engram_kernels.engram_forward
    torch.library.opcheck(op.default, good)
    torch.library.opcheck(op.out, good, {"out": torch.empty_like(hidden)})
    for position, wrong in ((0, hidden[..., :39]), (1, table.rows[:, :31]), (2, None), (3, row_ids[:2]), (4, w_kv[:-1]),
                            (4, w_kv[:, :-1]), (4, w_kv.double()), (5, w_hidden[0]), (8, "fp9"), (9, 33)):
        with pytest.raises(ValueError, match="engram_forward: "):
            op(*good[:position], wrong, *good[position + 1:])
    with pytest.raises(IndexError, match="row_ids"):
        op(*good[:3], row_ids + NUM_ROWS, *good[4:])


def test_engram_forward_compiles(compiled):
    hidden, table, *rest = make_inputs(5, 2, 40, 3, 32, "bf16", torch.bfloat16)

    def step(x):
        return engram_forward(x * 2, table, *rest) + 1

    assert torch.equal(torch.compile(step, fullgraph=True)(hidden), step(hidden))
