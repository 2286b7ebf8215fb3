"""gather_gate: docs/ops.md, gather_gate, on every backend."""
import pytest
import torch
from format_cases import table_options
from on_device import on_device, raises_bad_ids

from engram_kernels.ops.gate import gate
from engram_kernels.ops.gather_gate import gather_gate as gather_gate_op
from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.reference.gather_gate import gather_gate as reference
from engram_kernels.table.row_table import ROW_FORMATS, RowTable
from engram_kernels.testing import assert_as_accurate_as_torch
from engram_kernels.testing.draws import worst_draw
from engram_kernels.testing.inputs import random_rows

gather_gate = on_device(gather_gate_op)
NUM_ROWS = 50
FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SHAPES = {  # name: (tokens, branches, columns, row_dim)
    "one_row": (1, 1, 1, 32),
    "v41_rows": (5, 4, 20, 256),
    "half_pairs": (4, 3, 5, 48),  # rows that end inside a pair of registers
    "odd_rows": (6, 2, 7, 13),
    "one_element_rows": (3, 1, 70, 1),
}


def make_table(row_format, row_dim, seed=0, num_rows=NUM_ROWS):
    rows, scales = random_rows(row_format, num_rows, row_dim, torch.Generator().manual_seed(seed))
    return RowTable.from_tensor(rows, scales, row_format, row_dim=row_dim, **table_options(row_format))


def make_inputs(tokens, branches, columns, row_dim, dtype, seed=1, num_rows=NUM_ROWS):
    generator = torch.Generator().manual_seed(seed)
    size = columns * row_dim
    hidden = torch.randn(tokens, branches, size, generator=generator).to(dtype)
    row_ids = torch.randint(-1, num_rows, (tokens, columns), generator=generator)
    weights = [torch.randn(branches, size, generator=generator).to(dtype) for _ in range(2)]
    return hidden, row_ids, *weights


def exact(hidden, table, row_ids, w_hidden, w_key, mask=None, add_residual=True):
    """In float64, from the rows as they are dequantized to float32."""
    options = (table.row_format, table.row_dim, table.zero_scale_is_zero, 1e-6, 1e-6, "copysign", add_residual, table.table_scale)
    return reference(hidden.double(), table.rows, table.scales, row_ids, w_hidden.double(), w_key.double(), mask, *options)


def worst_plain(hidden, table, row_ids, w_hidden, w_key, mask, want, add_residual=True):
    """The formula as ordinary PyTorch computes it: every step in the dtype of hidden."""
    ids = row_ids if mask is None else row_ids.masked_fill(mask[:, None], -1)
    memory = gather_rows(table, ids, torch.float32, backend="reference").flatten(1).to(hidden.dtype)

    def plain(h, e, w_h, w_k):
        e = e[:, None]
        x = (h * w_h * e * w_k).sum(-1, keepdim=True) * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
        x = x * torch.rsqrt(e.square().mean(-1, keepdim=True) + 1e-6) / hidden.shape[-1] ** 0.5
        g = torch.sigmoid(torch.copysign(x.abs().clamp_min(1e-6).sqrt(), x))
        g = g if mask is None else g.masked_fill(mask[:, None, None], 0)
        return [h + g * e if add_residual else g * e]

    return worst_draw(plain, (hidden, memory, w_hidden, w_key), [want])[0]


def gradients(function, leaves, grad_out):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    return torch.autograd.grad(function(*leaves), leaves, grad_out)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_gather_gate_matches_reference(row_format, dtype, backend):
    table = make_table(row_format, 64)
    inputs = make_inputs(6, 3, 4, 64, dtype)
    mask = torch.arange(6) % 3 == 1
    got = gather_gate(inputs[0], table, *inputs[1:], mask, backend=backend)
    want = exact(inputs[0], table, *inputs[1:], mask)
    assert_as_accurate_as_torch(got, worst_plain(inputs[0], table, *inputs[1:], mask, want), want)


@pytest.mark.parametrize("add_residual", [True, False], ids=["residual", "update_only"])
@pytest.mark.parametrize("row_format", ["f32", "bf16", "fp8_e4m3_tensor"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gather_gate_shapes_match_reference(shape, row_format, add_residual, backend):
    table = make_table(row_format, shape[3])
    inputs = make_inputs(*shape, torch.bfloat16)
    got = gather_gate(inputs[0], table, *inputs[1:], add_residual=add_residual, backend=backend)
    want = exact(inputs[0], table, *inputs[1:], add_residual=add_residual)
    assert_as_accurate_as_torch(got, worst_plain(inputs[0], table, *inputs[1:], None, want, add_residual), want)


@pytest.mark.parametrize("row_format", [f for f in ROW_FORMATS if "fp8" in f or "int8" in f])
def test_gather_gate_every_byte_value(row_format, backend):
    # one row of all 256 byte values; the gate is 1/2 where x is 0 and zero_sign "sign", so out = e / 2, exactly
    rows, scales = random_rows(row_format, 1, 256, torch.Generator().manual_seed(0))
    rows.view(torch.uint8)[0, :256] = torch.arange(256, dtype=torch.uint8)
    table = RowTable.from_tensor(rows, scales, row_format, row_dim=256)
    hidden, weight = torch.zeros(1, 1, 256), torch.ones(1, 256)
    got = gather_gate(hidden, table, torch.zeros(1, 1, dtype=torch.int64), weight, weight, zero_sign="sign", backend=backend)
    values = gather_rows(table, torch.zeros(1, dtype=torch.int64), torch.float32, backend="reference")
    if "fp8" in row_format:  # NaN among the values: nothing but NaN may come out, for the gate itself is NaN
        assert got.isnan().all() and values.isnan().sum() == 2
        rows.view(torch.uint8)[0, [0x7F, 0xFF]] = 0
        got = gather_gate(hidden, table, torch.zeros(1, 1, dtype=torch.int64), weight, weight, zero_sign="sign", backend=backend)
        values = gather_rows(table, torch.zeros(1, dtype=torch.int64), torch.float32, backend="reference")
    torch.testing.assert_close(got[0], values / 2, rtol=0, atol=0)


@pytest.mark.parametrize("zero_scale_is_zero", [False, True])
def test_gather_gate_zero_scales(zero_scale_is_zero, backend):
    rows = torch.full((1, 64), 0x38, dtype=torch.uint8)  # 1.0
    scales = torch.tensor([[0, 127]], dtype=torch.uint8)
    table = RowTable.from_tensor(rows, scales, "fp8_e4m3_block32", zero_scale_is_zero=zero_scale_is_zero)
    hidden, weight = torch.zeros(1, 1, 64), torch.ones(1, 64)
    got = gather_gate(hidden, table, torch.zeros(1, 1, dtype=torch.int32), weight, weight, zero_sign="sign", backend=backend)
    assert got[0, 0, 0].item() == (0 if zero_scale_is_zero else 2.0**-128) and got[0, 0, 63].item() == 0.5


def test_gather_gate_equals_gather_rows_then_gate(backend):
    # rows of the dtype of hidden: nothing is rounded in between, so the two ways differ by the order of sums alone
    table = make_table("bf16", 64)
    hidden, row_ids, w_hidden, w_key = make_inputs(9, 2, 4, 64, torch.bfloat16)
    memory = gather_rows(table, row_ids, torch.bfloat16).flatten(1)
    two_steps = gate(hidden, memory[:, None].expand(hidden.shape), memory, w_hidden, w_key)
    got = gather_gate(hidden, table, row_ids, w_hidden, w_key, backend=backend)
    assert (got != two_steps).float().mean() < 0.01
    torch.testing.assert_close(got, two_steps, rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_gather_gate_row_ids_of_any_stride(dtype, backend):
    table = make_table("bf16", 32)
    hidden, row_ids, w_hidden, w_key = make_inputs(6, 2, 3, 32, torch.bfloat16)
    want = gather_gate(hidden, table, row_ids, w_hidden, w_key, backend=backend)
    by_column = row_ids.to(dtype).t().contiguous().t()
    assert torch.equal(gather_gate(hidden, table, by_column, w_hidden, w_key, backend=backend), want)
    one_id = torch.full((1, 1), 7, dtype=dtype).expand(6, 3)
    got = gather_gate(hidden, table, one_id, w_hidden, w_key, backend=backend)
    assert torch.equal(got, gather_gate(hidden, table, one_id.contiguous(), w_hidden, w_key, backend=backend))


def test_gather_gate_padded_and_strided_rows(backend):
    hidden, row_ids, w_hidden, w_key = make_inputs(6, 2, 3, 64, torch.bfloat16)
    dense = make_table("fp8_e4m3_block32_packed", 64)
    padded = RowTable.from_tensor(torch.nn.functional.pad(dense.rows, (0, 30), value=0x7F), None, dense.row_format, row_dim=64)
    every_other = RowTable.from_tensor(padded.rows.repeat_interleave(2, 0)[::2], None, dense.row_format, row_dim=64)
    want = gather_gate(hidden, dense, row_ids, w_hidden, w_key, backend=backend)
    for table in (padded, every_other):
        assert torch.equal(gather_gate(hidden, table, row_ids, w_hidden, w_key, backend=backend), want)


def test_gather_gate_missing_rows_are_zeros(backend):
    table = make_table("bf16", 32)
    hidden, row_ids, w_hidden, w_key = make_inputs(4, 2, 3, 32, torch.float32)
    row_ids.fill_(-1)
    assert torch.equal(gather_gate(hidden, table, row_ids, w_hidden, w_key, backend=backend), hidden)
    got = gather_gate(hidden, table, row_ids, w_hidden, w_key, add_residual=False, backend=backend)
    assert not got.any()
    empty = RowTable.from_tensor(torch.empty(0, 32).bfloat16())  # a table without rows has no id but -1
    assert torch.equal(gather_gate(hidden, empty, row_ids, w_hidden, w_key, backend=backend), hidden)


def test_gather_gate_masked_token_passes_bit_for_bit(backend):
    table = make_table("bf16", 32)
    table.rows[3] = float("nan")
    hidden, row_ids, w_hidden, w_key = make_inputs(4, 2, 3, 32, torch.bfloat16)
    row_ids = row_ids.masked_fill(row_ids == 3, 4)
    row_ids[1], row_ids[2] = 3, torch.tensor([10**9, -7, 2**40])  # ids of masked tokens are not looked at
    hidden.view(torch.int16)[1, :, :3] = torch.tensor([0x7FC5, 0x7F81, -(2**15)], dtype=torch.int16)
    mask = torch.tensor([False, True, True, False])
    got = gather_gate(hidden, table, row_ids, w_hidden, w_key, mask, backend=backend)
    assert torch.equal(got[1:3].view(torch.int16), hidden[1:3].view(torch.int16))
    assert got[[0, 3]].isfinite().all()
    got = gather_gate(hidden, table, row_ids, w_hidden, w_key, mask, add_residual=False, backend=backend)
    assert torch.equal(got[1:3].view(torch.int16), torch.zeros_like(got[1:3]).view(torch.int16))


def test_gather_gate_in_place_and_out(backend):
    table = make_table("fp8_e4m3_block32", 32)
    hidden, *rest = make_inputs(5, 2, 3, 32, torch.bfloat16)
    want = gather_gate(hidden, table, *rest, backend=backend)
    out = torch.empty_like(hidden)
    assert gather_gate(hidden, table, *rest, out=out, backend=backend) is out and torch.equal(out, want)
    assert gather_gate(hidden, table, *rest, out=hidden, backend=backend) is hidden and torch.equal(hidden, want)


def test_gather_gate_from_a_file(tmp_path, backend):
    hidden, row_ids, w_hidden, w_key = make_inputs(5, 2, 3, 32, torch.bfloat16)
    in_memory = make_table("fp8_e4m3_block32", 32)
    in_file = RowTable.create(tmp_path / "table.safetensors", in_memory.rows, in_memory.scales, "fp8_e4m3_block32")
    mask = torch.tensor([False, True, False, False, False])
    row_ids[1] = NUM_ROWS + 5  # masked
    got = gather_gate(hidden, in_file, row_ids, w_hidden, w_key, mask, backend=backend)
    assert torch.equal(got, gather_gate(hidden, in_memory, row_ids, w_hidden, w_key, mask, backend=backend))


@pytest.mark.parametrize("row_format", ["bf16", "fp8_e4m3_block32"])
def test_gather_gate_empty_batch(row_format, backend):
    table = make_table(row_format, 32)
    inputs = make_inputs(0, 2, 3, 32, torch.bfloat16)
    assert gather_gate(inputs[0], table, *inputs[1:], backend=backend).shape == (0, 2, 96)


@pytest.mark.parametrize(("where", "value"), [((2, 1), NUM_ROWS), ((0, 0), -2), ((3, 2), 2**40)],
                         ids=["end", "negative", "beyond_int32"])
def test_gather_gate_rejects_row_id_out_of_range(where, value, backend):
    table = make_table("bf16", 32)
    hidden, row_ids, w_hidden, w_key = make_inputs(4, 2, 3, 32, torch.bfloat16)
    row_ids[where] = value
    out = torch.full_like(hidden, 7)
    message = rf"row_ids\[{where[0]}, {where[1]}\] is {value}, expected \[0, {NUM_ROWS}\)"
    with raises_bad_ids("gather_gate", backend, message):
        gather_gate(hidden, table, row_ids, w_hidden, w_key, out=out, backend=backend)
    assert (out == 7).all()  # nothing half-written


REJECTED = {  # name: (what to change, words of the message)
    "hidden_dtype": (lambda a: a.update(hidden=a["hidden"].double()), "hidden must be torch.float32 or"),
    "hidden_shape": (lambda a: a.update(hidden=a["hidden"][0]), "hidden must have shape"),
    "row_ids_dtype": (lambda a: a.update(row_ids=a["row_ids"].float()), "row_ids must be torch.int32 or torch.int64"),
    "row_ids_shape": (lambda a: a.update(row_ids=a["row_ids"][:2]), "row_ids must have shape"),
    "columns": (lambda a: a.update(row_ids=a["row_ids"][:, :2]), "2 columns of rows of 8 elements, which do not make"),
    "weight_dtype": (lambda a: a.update(w_key=a["w_key"].half()), "w_key must be torch.bfloat16"),
    "weight_shape": (lambda a: a.update(w_hidden=a["w_hidden"][:1]), "w_hidden must have shape"),
    "mask": (lambda a: a.update(mask=torch.zeros(4, dtype=torch.bool)), "mask must have shape"),
    "device": (lambda a: a.update(row_ids=a["row_ids"].to("meta")), "row_ids must be on cpu, got meta"),
    "clamp": (lambda a: a.update(clamp=0.0), "clamp is 0"),
    "zero_sign": (lambda a: a.update(zero_sign=""), "zero_sign is ''"),
    "out": (lambda a: a.update(out=torch.empty(3, 2, 24)), "out must be torch.bfloat16"),
}


@pytest.mark.parametrize("case", REJECTED.values(), ids=REJECTED.keys())
def test_gather_gate_rejects(case):
    change, words = case
    hidden, row_ids, w_hidden, w_key = make_inputs(3, 2, 3, 8, torch.bfloat16)
    args = dict(hidden=hidden, table=make_table("bf16", 8), row_ids=row_ids, w_hidden=w_hidden, w_key=w_key)
    change(args)
    with pytest.raises(ValueError, match=words):
        gather_gate(**args)


def test_gather_gate_rejects_other_misuse():
    hidden, row_ids, w_hidden, w_key = make_inputs(3, 2, 3, 32, torch.bfloat16)
    with pytest.raises(TypeError, match="table must be a RowTable, got Tensor"):
        gather_gate(hidden, torch.empty(4, 32), row_ids, w_hidden, w_key)
    with pytest.raises(ValueError, match="out cannot be given while an input requires grad"):
        gather_gate(hidden, make_table("bf16", 32), row_ids, w_hidden.requires_grad_(), w_key, out=torch.empty_like(hidden))


@pytest.mark.slow_cases("triton")
def test_gather_gate_threads_give_the_same_bits(backend):
    table = make_table("int8_group32", 64)
    hidden, *rest = make_inputs(7 if backend == "triton" else 67, 2, 16, 64, torch.bfloat16)  # the interpreter is slow
    grad_out = torch.randn_like(hidden)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 7):
            torch.set_num_threads(threads)
            results.append([gather_gate(hidden, table, *rest, backend=backend)])
            if backend != "reference":  # torch's own reductions make no such promise
                leaves = (hidden, *rest[1:])
                results[-1] += gradients(lambda h, w, k: gather_gate(h, table, rest[0], w, k, backend=backend), leaves, grad_out)
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


def test_gather_gate_gradcheck():
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 2, 6), (5, 3), (2, 6), (2, 6))
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    row_ids, mask = torch.tensor([[0, 4], [2, 2], [-1, 1]]), torch.tensor([False, True, False])

    def run(hidden, rows, w_hidden, w_key):
        return reference(hidden, rows, None, row_ids, w_hidden, w_key, mask, "f32", 3, False, 1e-6, 1e-6, "copysign", True)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("row_dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gather_gate_backward_matches_reference(shape, row_dtype, backend):
    table = make_table(row_dtype, shape[3])
    hidden, row_ids, w_hidden, w_key = make_inputs(*shape, torch.float32)
    mask = torch.arange(shape[0]) % 4 == 3
    grad_out = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))

    def run(h, rows, w_h, w_k, **options):
        return gather_gate(h, RowTable.from_tensor(rows, None, row_dtype), row_ids, w_h, w_k, mask, **options)

    def run_exact(h, rows, w_h, w_k):
        return reference(h, rows, None, row_ids, w_h, w_k, mask, row_dtype, shape[3], False, 1e-6, 1e-6, "copysign", True)

    leaves = (hidden, table.rows, w_hidden, w_key)
    got = gradients(lambda *x: run(*x, backend=backend), leaves, grad_out)
    want = gradients(run_exact, [x.double() for x in leaves], grad_out.double())
    # the square root amplifies what is lost in x where x is small: what float32 inputs moved by one unit in the last place
    # do to the result is the measure
    generator, moved_by = torch.Generator().manual_seed(0), [torch.zeros(())] * 4
    for _ in range(6):
        moved = [x.double() * (1 + 2**-23 * torch.randint(-1, 2, x.shape, generator=generator)) for x in leaves]
        results = gradients(run_exact, moved, grad_out.double())
        moved_by = [torch.maximum(m, (r - b).abs().max()) for m, r, b in zip(moved_by, results, want, strict=True)]
    for name, a, b, m in zip(("hidden", "rows", "w_hidden", "w_key"), got, want, moved_by, strict=True):
        ulp = torch.finfo(a.dtype).eps  # the table's gradient has the dtype of its rows
        torch.testing.assert_close(a.double(), b, rtol=2 * ulp, atol=10 * m.item() + 2 * ulp * b.abs().max().item(), msg=name)


@pytest.mark.parametrize("row_format", [f for f in ROW_FORMATS if f not in FLOATS])
def test_gather_gate_backward_of_stored_formats(row_format, backend):
    table = make_table(row_format, 32)
    hidden, row_ids, w_hidden, w_key = make_inputs(4, 2, 3, 32, torch.float32)
    grad_out = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))
    leaves = (hidden, w_hidden, w_key)
    got = gradients(lambda h, w, k: gather_gate(h, table, row_ids, w, k, backend=backend), leaves, grad_out)
    want = gradients(lambda h, w, k: exact(h, table, row_ids, w, k), [x.double() for x in leaves], grad_out.double())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_gather_gate_backward_of_masked_tokens(backend):
    table = make_table("f32", 32)
    table.rows[3] = float("nan")
    hidden, row_ids, w_hidden, w_key = make_inputs(4, 2, 3, 32, torch.float32)
    row_ids = row_ids.masked_fill(row_ids == 3, 4)
    row_ids[1], row_ids[2] = 3, NUM_ROWS + 9
    mask, grad_out = torch.tensor([False, True, True, False]), torch.randn(hidden.shape)

    def run(h, rows, w, k):
        return gather_gate(h, RowTable.from_tensor(rows, None, "f32"), row_ids, w, k, mask, backend=backend)

    grads = gradients(run, (hidden, table.rows, w_hidden, w_key), grad_out)
    assert torch.equal(grads[0][1:3], grad_out[1:3])
    assert all(g.isfinite().all() for g in grads) and not grads[1][3].any()


def op_args(hidden, table, row_ids, w_hidden, w_key, mask=None):
    return (hidden, table.rows, table.scales, row_ids, w_hidden, w_key, mask, table.row_format, table.row_dim,
            table.zero_scale_is_zero, 1e-6, 1e-6, "copysign", True, table.table_scale)


def test_gather_gate_op_called_directly_is_checked(compiled):
    # the op itself never reads out of bounds, whoever calls it
    hidden, row_ids, w_hidden, w_key = make_inputs(3, 2, 3, 32, torch.float32)
    table = make_table("fp8_e4m3_block32", 32)
    good = op_args(hidden, table, row_ids, w_hidden, w_key)
    ops = torch.ops.engram_kernels
    for position, wrong in ((0, hidden[:, :, :95]), (1, table.rows[:, :31]), (2, None), (2, table.scales[:9]), (3, row_ids[:2]),
                            (4, w_hidden[0]), (7, "fp9"), (8, 33), (8, -1)):
        args = (*good[:position], wrong, *good[position + 1:])
        for run in (lambda a: ops.gather_gate(*a), lambda a: ops.gather_gate_bwd(hidden, *a)):
            with pytest.raises(ValueError, match="gather_gate: "):
                run(args)
    with pytest.raises(IndexError, match="row_ids"):
        ops.gather_gate(*good[:3], row_ids + NUM_ROWS, *good[4:])
    with pytest.raises(ValueError, match="out shares memory with hidden"):
        buffer = torch.zeros(4, 2, 96)
        ops.gather_gate.out(buffer[:3], *good[1:], out=buffer[1:])


def test_gather_gate_opcheck(compiled):
    ops, mask = torch.ops.engram_kernels, torch.tensor([False, True, False])
    for row_format in ("f32", "fp8_e4m3_block32"):
        hidden, row_ids, w_hidden, w_key = make_inputs(3, 2, 3, 32, torch.float32)
        table = make_table(row_format, 32)
        plain = op_args(hidden, table, row_ids, w_hidden, w_key, mask)
        trained = list(plain)
        for position in (0, 1, 4, 5) if row_format == "f32" else (0, 4, 5):
            trained[position] = trained[position].clone().requires_grad_()
        torch.library.opcheck(ops.gather_gate.default, tuple(trained))
        torch.library.opcheck(ops.gather_gate.out, plain, {"out": torch.empty_like(hidden)})
        torch.library.opcheck(ops.gather_gate_bwd.default, (hidden.flip(0), *plain))


def test_gather_gate_compiles(compiled):
    table = make_table("bf16", 32)
    hidden, row_ids, w_hidden, w_key = make_inputs(5, 2, 3, 32, torch.bfloat16)

    def step(h, w, k):
        return gather_gate(h, table, row_ids, w * 2, k) * 3

    fused, grad_out = torch.compile(step, fullgraph=True), torch.randn_like(hidden)
    assert torch.equal(fused(hidden, w_hidden, w_key), step(hidden, w_hidden, w_key))
    leaves = (hidden, w_hidden, w_key)
    for a, b in zip(gradients(fused, leaves, grad_out), gradients(step, leaves, grad_out), strict=True):
        assert torch.equal(a, b)


def test_gather_gate_allocates_only_its_output(compiled):
    table = make_table("bf16", 64)
    hidden, *rest = make_inputs(64, 2, 8, 64, torch.bfloat16)

    def allocated(run):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        return sum(e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0)

    assert allocated(lambda: gather_gate(hidden, table, *rest)) == hidden.numel() * 2
    assert allocated(lambda: gather_gate(hidden, table, *rest, out=hidden)) == 0
