"""The backward pass of gather_gate on the PTX simulator: against float64 autograd of the reference, and what it costs."""
import ctypes
import functools
import re

import pytest
import torch
from cuda_sim import MISSING_NVCC, MISSING_SASS, Device, build
from cuda_sim.params import DTYPES, ROW_FORMATS, GatherGateBwdParams
from format_cases import table_scale_of
from gather_gate_sim import WORDS, Table, gather_gate_params, make_inputs
from op_cases import assert_all_as_accurate
from test_gate_cuda_sim import branch_rows
from test_gather_gate_cuda_sim import instructions_a_token

from engram_kernels.reference.gate import gate as reference_gate
from engram_kernels.reference.gather_rows import gather_rows as reference_rows
from engram_kernels.testing.draws import worst_draw
from engram_kernels.testing.inputs import random_rows

pytestmark = pytest.mark.skipif(bool(MISSING_NVCC), reason=MISSING_NVCC)
OP = "gather_gate_bwd_cuda"
NAMES = ("hidden", "rows", "w_hidden", "w_key")


def simulate(table, inputs, grad_out, mask=None, device=None, **options):
    """(gradients of hidden, of each token's rows and of the weights, launches)."""
    device = device or Device()
    hidden, _, *weights = inputs
    at = device.address
    shapes = {"grad_hidden": hidden, "grad_rows": hidden[:, 0], "grad_w_hidden": weights[0], "grad_w_key": weights[1]}
    grads = {name: torch.full(like.shape, float("nan"), dtype=like.dtype) for name, like in shapes.items()}
    params = GatherGateBwdParams(
        forward=gather_gate_params(device, table, inputs, mask, **options), grad_out=branch_rows(device, grad_out, "grad_out"),
        grad_hidden=branch_rows(device, grads["grad_hidden"], "grad_hidden", readonly=False),
        **{name: at(grads[name], name) for name in list(shapes)[1:]})
    scratch_bytes = device.library.gather_gate_bwd_cuda_scratch_bytes
    scratch_bytes.restype = ctypes.c_int64
    device.set_runtime()
    params.scratch = at(torch.full((scratch_bytes(ctypes.byref(params)) // 4,), float("nan")), "scratch")
    return list(grads.values()), device.run(OP, params)


def gradients(mask, words, *tensors):
    """By autograd of the reference of gate, with the memory vector for key and value."""
    *leaves, grad_out = (x.detach().clone().requires_grad_() for x in tensors)
    hidden, memory, w_hidden, w_key = leaves
    out = reference_gate(hidden, memory[:, None].expand(hidden.shape), memory, w_hidden, w_key, mask, *words)
    return torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


def check(table, inputs, grad_out, mask=None, device=None, **options):
    got, launches = simulate(table, inputs, grad_out, mask, device, **options)
    hidden, ids, *weights = inputs
    run = functools.partial(gradients, mask, [options.get(name, default) for name, default in WORDS])
    ids = ids if mask is None else ids.masked_fill(mask[:, None], -1)
    memory = reference_rows(table.rows, table.scales, ids, table.row_format, table.row_dim, table.zero_scale,
                            torch.float32, table_scale_of(table.row_format)).flatten(1)
    want = run(*(x.double() for x in (hidden, memory, *weights, grad_out)))
    plain = worst_draw(run, (hidden, memory.to(hidden.dtype), *weights, grad_out), want)
    assert_all_as_accurate(NAMES, got, plain, want)
    return got, launches


def random_grad(inputs, seed=2):
    return torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed)).to(inputs[0].dtype)


@pytest.mark.parametrize("row_format", ROW_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_gate_bwd_matches_autograd(row_format, dtype):
    inputs = make_inputs(7, 3, 2, 128, dtype, weight_dtype=dtype)
    device = Device(multiprocessors=2, options={"cta_order": "random"})
    _, launches = check(Table(row_format, 128), inputs, random_grad(inputs), torch.arange(7) % 3 == 1, device)
    assert kernel_of(launches) == (True, 4)


def kernel_of(launches):
    """(weights in shared memory, branches at once) of the kernel with a block per token, else None."""
    found = re.search(r"gather_gate_bwd_kernelI.*?Lb([01])ELi(\d)E", launches[0].kernel)
    return (found[1] == "1", int(found[2])) if found else None


SHAPES = {  # name: (tokens, branches, columns, row_dim, dtype, kernel)
    "one_token": (1, 1, 1, 8, torch.bfloat16, (True, 4)),
    "block_edge": (3, 2, 1, 512 + 8, torch.bfloat16, (True, 4)),
    "five_branches": (4, 5, 4, 160, torch.float16, (True, 4)),
    "eight_branches": (2, 8, 15, 256, torch.bfloat16, (False, 4)),
    "wide": (2, 2, 49, 128, torch.bfloat16, (False, 1)),
    "wide_f32": (2, 3, 13, 256, torch.float32, (False, 1)),
    "odd_rows": (3, 2, 8, 13, torch.bfloat16, None),
    "one_element_rows": (2, 1, 70, 1, torch.float32, None),
}


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES.keys())
def test_gather_gate_bwd_any_shape(case):
    *shape, dtype, kernel = case
    inputs = make_inputs(*shape, dtype, weight_dtype=dtype)
    _, launches = check(Table("bf16", shape[3]), inputs, random_grad(inputs), device=Device(multiprocessors=1))
    assert kernel_of(launches) == kernel


@pytest.mark.parametrize("row_dim", [64, 13], ids=["tokens", "plain"])
@pytest.mark.parametrize("add_residual", [True, False])
def test_gather_gate_bwd_inside_the_clamp_and_of_zeros(row_dim, add_residual):
    inputs = make_inputs(4, 2, 2, row_dim)
    inputs[1][1] = -1
    table, grad_out = Table("bf16", row_dim), random_grad(inputs)
    for zero_sign in ("copysign", "sign"):
        check(table, inputs, grad_out, zero_sign=zero_sign, add_residual=add_residual, clamp=0.5)
        got, _ = simulate(table, inputs, grad_out, zero_sign=zero_sign, add_residual=add_residual, clamp=1e9)
        assert (got[2] == 0).all() and (got[3] == 0).all()  # x is inside the clamp everywhere
        assert torch.equal(got[0], grad_out if add_residual else torch.zeros_like(grad_out))


@pytest.mark.parametrize("row_dim", [64, 13], ids=["tokens", "plain"])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_gather_gate_bwd_of_masked_tokens(row_dim, multiprocessors):
    table = Table("bf16", row_dim)
    table.rows[3] = float("nan")
    table = Table("bf16", row_dim, table.rows)
    inputs = make_inputs(6, 5, 2, row_dim)
    inputs[1][inputs[1] == 3] = 4
    mask = torch.tensor([True, False, True, True, False, True])
    inputs[1][mask] = torch.tensor([3, 10**9], dtype=torch.int32)  # not looked at
    inputs[0][mask] = float("nan")
    grad_out = random_grad(inputs)
    grad_out.view(torch.int16)[0, :, 0] = 0x7F81  # passes bit for bit
    got, _ = simulate(table, inputs, grad_out, mask, Device(multiprocessors=multiprocessors))
    if row_dim == 64:
        assert torch.equal(got[0][mask].view(torch.int16), grad_out[mask].view(torch.int16))
    assert torch.equal(got[0][mask][1:], grad_out[mask][1:]) and (got[1][mask] == 0).all()
    assert not any(g.isnan().any() for g in (got[0][~mask], *got[1:]))
    got, _ = simulate(table, inputs, grad_out, mask, add_residual=False)
    assert (got[0][mask] == 0).all()


@pytest.mark.parametrize("row_dim", [64, 13], ids=["tokens", "plain"])
def test_gather_gate_bwd_bad_ids_are_rows_of_zeros(row_dim):
    """Ids out of range are rows of zeros and are not read: the table has no byte before its first row or behind its last."""
    table, inputs = Table("bf16", row_dim), make_inputs(2, 2, 3, row_dim)
    inputs[1] = torch.tensor([[-1, 50, 3], [-2, 2**40, -2**63]])
    grad_out = random_grad(inputs)
    got, _ = simulate(table, inputs, grad_out)
    inputs[1] = torch.tensor([[-1, -1, 3], [-1, -1, -1]])
    want, _ = simulate(table, inputs, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("row_dim", [64, 13], ids=["tokens", "plain"])
def test_gather_gate_bwd_of_no_tokens_gives_zeros(row_dim):
    inputs = make_inputs(0, 2, 2, row_dim)
    got, _ = simulate(Table("bf16", row_dim), inputs, random_grad(inputs))
    assert (got[2] == 0).all() and (got[3] == 0).all()


@pytest.mark.parametrize("row_dim", [64, 13], ids=["tokens", "plain"])
def test_gather_gate_bwd_has_the_same_bits_in_every_order(row_dim):
    table, inputs = Table("bf16", row_dim), make_inputs(9, 2, 2, row_dim)
    runs = [simulate(table, inputs, random_grad(inputs), device=Device(multiprocessors=3, options={
        "cta_order": "random", "seed": seed}))[0] for seed in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_gather_gate_bwd_far_behind_four_gib():
    table, inputs = Table("fp8_e4m3_block32_packed", 256), make_inputs(3, 2, 2, 256, none=False)
    shift = 9 * 2**30 // table.pitch
    want = simulate(table, inputs, random_grad(inputs))[0]
    got = simulate(table, [inputs[0], inputs[1] + shift, *inputs[2:]], random_grad(inputs), shift_rows=shift)[0]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gather_gate_bwd_strides():
    table, (_, ids, *weights) = Table("fp8_e4m3_block32", 64), make_inputs(5, 2, 3, 64)
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(15))
    hidden, grad_out = draw(10, 4, 192).bfloat16()[::2, 1:3], draw(5, 1, 192).bfloat16().expand(5, 2, 192)
    _, launches = check(table, [hidden, ids, *weights], grad_out)
    assert kernel_of(launches) is not None
    odd = draw(5, 2, 192 + 1).bfloat16()[:, :, 1:]
    _, launches = check(table, [hidden, ids, *weights], odd)
    assert kernel_of(launches) is None


# ---- what it costs ---------------------------------------------------------------------------------------------------

TOKENS, BRANCHES, ROW_DIM, ROW_BYTES = 4, 4, 256, 264


@pytest.fixture(scope="module", params=[20, 24], ids=["h5120", "h6144"])
def v41(request):
    """(launches, hidden_size) of distinct packed rows in random order, two tokens per block."""
    columns = request.param
    rows, _ = random_rows("fp8_e4m3_block32_packed", TOKENS * columns, ROW_DIM, torch.Generator().manual_seed(11))
    hidden, ids, *weights = make_inputs(TOKENS, BRANCHES, columns, ROW_DIM, weight_dtype=torch.bfloat16)
    ids = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(12)).int().reshape(ids.shape)
    inputs = [hidden, ids, *weights]
    table = Table("fp8_e4m3_block32_packed", ROW_DIM, rows)
    return simulate(table, inputs, random_grad(inputs), device=Device(multiprocessors=2))[1], columns * ROW_DIM


def test_gather_gate_bwd_reads_and_writes_once(v41):
    launches, size = v41
    buffers = dict(launches[0].result.buffers)
    rows, blocks = TOKENS * size // ROW_DIM, launches[0].grid[0]
    least = {"hidden": TOKENS * BRANCHES * size * 2, "grad_out": TOKENS * BRANCHES * size * 2, "rows": rows * ROW_BYTES,
             "ids": rows * 4}
    for name, least_bytes in least.items():
        assert buffers[name]["load_bytes"] == buffers[name]["unique_bytes_read"] == least_bytes
    assert buffers["rows"]["load_sectors"] <= 1.02 * 9 * rows
    written = {"grad_hidden": TOKENS * BRANCHES * size * 2, "grad_rows": TOKENS * size * 2}
    for name, least_bytes in written.items():
        assert buffers[name]["store_bytes"] == buffers[name]["unique_bytes_written"] == least_bytes
    # the weights once per block; the partial sums of the blocks, written once and read once
    partial_sums = BRANCHES * size * 4
    assert buffers["w_hidden"]["load_bytes"] == buffers["w_key"]["load_bytes"] == blocks * partial_sums / 2
    assert buffers["scratch"]["store_bytes"] == launches[1].result.buffers["scratch"]["load_bytes"] == blocks * partial_sums
    assert set(buffers) == {*least, *written, "w_hidden", "w_key", "scratch"}
    # so within a tenth of the least (rows, ids, hidden, grad_out, both gradients) from 18 tokens per block on
    token = (sum(least.values()) + sum(written.values())) / TOKENS
    assert 3 * partial_sums <= 0.10 * 18 * token


def test_gather_gate_bwd_accesses_are_wide(v41):
    launches, size = v41
    for line in launches[0].result.lines:
        if line["space"] != "global":
            continue
        if "cp.async" in line["text"]:
            assert line["bytes"] == 8 * line["threads"]  # 264-byte rows allow no more
        else:
            assert line["bytes"] == 16 * line["threads"] or line["bytes"] <= 4 * TOKENS * size // ROW_DIM  # or ids


def test_gather_gate_bwd_bank_conflicts(v41):
    for kind in ("load", "store"):
        shared = v41[0][0].result.memory[f"shared.{kind}"]
        assert shared["waves"] <= 1.1 * shared["ideal_waves"]


def test_gather_gate_bwd_keeps_bytes_in_flight(v41):
    """Hidden and gradient of the next token, asked for while this one's are written, over the GPU, a block per multiprocessor."""
    _, size = v41
    assert 132 * 2 * BRANCHES * size * 2 >= 2e6


def test_gather_gate_bwd_uses_no_local_memory():
    for usage in build().usage(OP).values():
        assert (usage.stack_bytes, usage.spill_bytes) == (0, 0) and usage.registers <= 168


@pytest.mark.skipif(bool(MISSING_SASS), reason=MISSING_SASS)
def test_gather_gate_bwd_machine_code(v41):
    """No call beside the plain kernels.

    Instructions a (token, branch), every branch of the code taken at its longest: 155,000. The best peer's backward pass of gate
    alone takes 140,066, and none gathers.
    """
    sass = build().sass(OP)
    for name, code in sass.items():
        assert not [op for _, _, op, _ in code if re.match(r"LDL|STL", op)]
        assert "gather_gate_bwd_kernel" not in name or not [op for _, _, op, _ in code if op.startswith("CALL")]
    launches, size = v41
    took = instructions_a_token(sass[launches[0].kernel], launches[0].block[0] // 32) / BRANCHES
    print(f"{took:.0f} machine instructions a (token, branch)")
    assert 70_000 < took / (size / 5120) < 155_000
    four_bits = instructions_a_token(sass[launches[0].kernel], launches[0].block[0] // 32, four_bits=True) / BRANCHES
    print(f"{four_bits:.0f} where rows are of four bits")
    assert took < four_bits < 1.1 * took
