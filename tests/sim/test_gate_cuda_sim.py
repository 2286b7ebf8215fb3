"""gate on the PTX simulator: the launcher and its kernels against the reference in float64, and what they cost."""
import ctypes
import re

import numpy as np
import pytest
import torch
from cuda_sim import MISSING_NVCC, MISSING_SASS, Device, build, bytes_asked
from cuda_sim.params import DTYPES, BranchRows, GateOptions, GateParams, GateWeights
from cuda_sim.sass_path import longest_path, longest_without, parts_of, token_loop

from engram_kernels.reference.gate import gate as reference
from engram_kernels.testing import assert_as_accurate_as_torch, assert_rounded_once

pytestmark = pytest.mark.skipif(bool(MISSING_NVCC), reason=MISSING_NVCC)
OP = "gate_cuda"


def make_inputs(tokens, branches, size, dtype=torch.bfloat16, weight_dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, branches, size), (tokens, branches, size), (tokens, size), (branches, size), (branches, size))
    dtypes = (dtype,) * 3 + (weight_dtype,) * 2
    return [torch.randn(shape, generator=generator).to(d) for shape, d in zip(shapes, dtypes, strict=True)]


def branch_rows(device, x, name, readonly=True):
    return BranchRows(device.address(x, name, readonly), x.stride(0), x.stride(1))


def gate_params(device, hidden, key, value, w_hidden, w_key, mask=None, out=None, eps=1e-6, clamp=1e-6, zero_sign="copysign",
                add_residual=True):
    """GateParams over tensors; `out` may be `hidden`."""
    tokens, branches, size = hidden.shape
    at = device.address
    rows = branch_rows(device, hidden, "hidden", readonly=out is not hidden)
    if out is None:
        target = BranchRows()
    else:
        target = rows if out is hidden else branch_rows(device, out, "out", readonly=False)
    return GateParams(
        hidden=rows, key=branch_rows(device, key, "key"), value=at(value, "value", readonly=True),
        weights=GateWeights(at(w_hidden, "w_hidden", readonly=True), at(w_key, "w_key", readonly=True), DTYPES[w_hidden.dtype]),
        mask=at(None if mask is None else mask.view(torch.uint8), "mask", readonly=True), out=target,
        value_stride=value.stride(0), num_tokens=tokens, branches=branches, hidden_size=size, dtype=DTYPES[hidden.dtype],
        options=GateOptions(eps, clamp, zero_sign == "sign", add_residual))


def simulate(inputs, mask=None, device=None, in_place=False, **options):
    """(output, launches)."""
    device = device or Device()
    hidden = inputs[0]
    out = hidden if in_place else torch.full(hidden.shape, float("nan"), dtype=hidden.dtype)
    launches = device.run(OP, gate_params(device, *inputs, mask=mask, out=out, **options))
    return out, launches


def check(inputs, mask=None, device=None, **options):
    got, launches = simulate(inputs, mask, device, **options)
    words = [options.get(name, default) for name, default in
             (("eps", 1e-6), ("clamp", 1e-6), ("zero_sign", "copysign"), ("add_residual", True))]
    want = reference(*(x.double() for x in inputs), mask, *words)
    if inputs[0].dtype == torch.float32:
        assert_as_accurate_as_torch(got, reference(*inputs, mask, *words), want)
    else:
        assert_rounded_once(got, want)
    return launches


CASES = {  # name: (tokens, branches, hidden_size)
    "one_token": (1, 4, 1024), "odd_tokens": (7, 3, 264), "one_vector": (3, 1, 8), "block_edge": (5, 2, 1024 + 8),
    "eight_branches": (2, 8, 256), "not_of_vectors": (3, 2, 37), "one_element": (2, 1, 1), "long_rows": (2, 2, 10248),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_matches_reference(case, dtype):
    inputs = make_inputs(*case, dtype, weight_dtype=dtype)
    device = Device(multiprocessors=2, options={"cta_order": "random"})
    launches = check(inputs, torch.arange(case[0]) % 3 == 1, device)
    assert ("gate_plain_kernel" in launches[0].kernel) == (case[2] % (16 // dtype.itemsize) != 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_of_few_tokens_takes_as_many_blocks_as_there_are_multiprocessors(dtype):
    for case, multiprocessors, branches in (((3, 4, 520), 12, 1), ((3, 4, 520), 11, 2), ((3, 4, 520), 6, 2),
                                            ((3, 4, 520), 5, 2 if dtype == torch.float16 else 4)):
        device = Device(multiprocessors=multiprocessors)
        launch, = check(make_inputs(*case, dtype, weight_dtype=dtype), torch.arange(3) == 1, device)
        assert launch.grid == (3, 4 // branches, 1)
        assert (f"gate_kernelILNS_5DTypeE{DTYPES[dtype]}ELi{branches}E" if branches > 1 else "one_token") in launch.kernel


def test_gate_of_few_tokens_gives_a_multiprocessor_half_the_work():
    """Warp instructions of a block of two branches, against one of all four."""
    inputs = make_inputs(1, 4, 5120, weight_dtype=torch.bfloat16)
    two, four = (simulate(inputs, device=Device(multiprocessors=n))[1][0] for n in (2, 1))
    assert (two.grid[1], four.grid[1]) == (2, 1)
    assert two.result.warp_instructions / 2 <= 0.5 * four.result.warp_instructions


def test_gate_of_one_token_keeps_everything_in_registers():
    """PTX instructions per warp of a block, of a token and branch: 731 of the kernel for many tokens. `machine` counts what a
    GPU executes, on the longest way through."""
    for weight_dtype, ptx, machine in ((torch.bfloat16, 350, 375), (torch.float32, 330, 350)):
        launch, = check(make_inputs(1, 4, 5120, weight_dtype=weight_dtype), device=Device(multiprocessors=4))
        assert launch.grid == (1, 4, 1) and "one_token" in launch.kernel and launch.shared_bytes == 0
        took = launch.result.warp_instructions / (4 * launch.block[0] // 32)
        print(f"{took:.0f} PTX instructions per warp")
        assert 200 < took <= ptx
        for name, rows in (("hidden", 4), ("key", 4), ("out", 4), ("value", 4)):
            buffer = launch.result.buffers[name]
            assert buffer.get("load_bytes", 0) + buffer.get("store_bytes", 0) == rows * 5120 * 2
        if not MISSING_SASS:
            took = longest_path(build().sass(OP)[launch.kernel])
            print(f"{took} machine instructions per warp")
            assert 200 < took <= machine


@pytest.mark.parametrize("zero_sign", ["copysign", "sign"])
@pytest.mark.parametrize("add_residual", [True, False])
def test_gate_options(zero_sign, add_residual):
    inputs = make_inputs(4, 2, 64)
    inputs[1][1] = 0.0  # key of zeros: x is 0
    inputs[1][2] = -0.0
    inputs[1][3] *= 1e-30
    check(inputs, zero_sign=zero_sign, add_residual=add_residual)
    check(inputs, zero_sign=zero_sign, add_residual=add_residual, eps=0.1, clamp=0.5)


@pytest.mark.parametrize("size", [256, 37])
def test_gate_masked_tokens_pass_bit_for_bit(size):
    inputs = make_inputs(3, 2, size)
    inputs[0].view(torch.int16)[1, :, :3] = torch.tensor([-64, 0x7FC1, -32768], dtype=torch.int16)  # NaNs, -0
    inputs[1][1], inputs[2][1] = float("nan"), float("inf")
    mask = torch.tensor([False, True, False])
    before = inputs[0].clone()
    for in_place in (False, True):
        got, launches = simulate(inputs, mask, in_place=in_place)
        assert torch.equal(got.view(torch.int16)[1], before.view(torch.int16)[1]) and not got[0].isnan().any()
        read = launches[0].result.buffers["key"]["unique_bytes_read"]
        assert read == 2 * 2 * size * 2  # the key of the masked token is not read
        inputs[0] = before.clone()
    got, _ = simulate(inputs, mask, add_residual=False)
    assert (got[1].view(torch.int16) == 0).all()


def test_gate_nan_stays_in_its_token():
    inputs = make_inputs(3, 2, 128)
    inputs[1][1, 0, 5] = float("nan")
    got, _ = simulate(inputs)
    assert got[1, 0].isnan().all() and not got[0].isnan().any() and not got[1, 1].isnan().any() and not got[2].isnan().any()


def test_gate_strided_inputs():
    fused = torch.randn(5, 3 * 128).bfloat16()
    hidden = torch.randn(10, 4, 128).bfloat16()[::2, 1:3]
    _, _, _, w_hidden, w_key = make_inputs(1, 2, 128)
    check([hidden, fused[:, :256].view(5, 2, 128), fused[:, 256:], w_hidden, w_key])
    odd = torch.randn(5, 3 * 128 + 1).bfloat16()  # rows that begin between the vectors
    launches = check([hidden, odd[:, :256].view(5, 2, 128), odd[:, 256:384], w_hidden, w_key])
    assert "gate_plain_kernel" in launches[0].kernel


def test_gate_of_no_tokens_launches_nothing():
    assert simulate(make_inputs(0, 4, 64))[1] == []


def test_gate_launches_of_two_threads_do_not_lower_each_others_shared_memory():
    """While one thread is between asking for shared memory and its launch, another launches the same kernel on smaller rows."""
    device = Device(multiprocessors=7)  # a device of its own, on which no kernel has asked yet
    big, small = (gate_params(device, *inputs, out=torch.empty_like(inputs[0]))
                  for inputs in (make_inputs(2, 4, size, torch.bfloat16) for size in (5120, 1024)))
    launched = []

    @ctypes.CFUNCTYPE(None)
    def other_thread():
        launched.append(device.library.gate_cuda(ctypes.byref(small)))

    device.library.fake_cudart_after_limit(other_thread)
    launches = device.run(OP, big)
    assert launched == [None]
    assert [launch.shared_bytes > 49152 for launch in launches] == [False, True] and launches[0].kernel == launches[1].kernel


# ---- what it costs ---------------------------------------------------------------------------------------------------

TOKENS, BRANCHES, SIZE = 6, 4, 5120


@pytest.fixture(scope="module")
def v41():
    """Three tokens per block: one warms no cache here, and the weights' share is not counted."""
    launch, = check(make_inputs(TOKENS, BRANCHES, SIZE, weight_dtype=torch.bfloat16), device=Device(multiprocessors=2))
    return launch


def test_gate_reads_and_writes_once(v41):
    rows = TOKENS * SIZE * 2
    buffers = v41.result.buffers
    least = {"hidden": BRANCHES * rows, "key": BRANCHES * rows, "value": rows}
    for name, least_bytes in least.items():
        assert buffers[name]["load_bytes"] <= 1.02 * least_bytes
        assert buffers[name]["load_sectors"] <= 1.02 * least_bytes / 32
    assert buffers["out"]["store_bytes"] == buffers["out"]["unique_bytes_written"] == BRANCHES * rows
    assert buffers["w_key"]["load_bytes"] == v41.grid[0] * BRANCHES * SIZE * 2


def test_gate_moves_the_least_bytes():
    """All that is asked for, the weights too, of 40 tokens per block: a large batch has more."""
    tokens = 40
    launch, = simulate(make_inputs(tokens, BRANCHES, SIZE, weight_dtype=torch.bfloat16), device=Device(multiprocessors=1))[1]
    assert launch.grid[0] == 1
    assert bytes_asked([launch]) <= 1.02 * (3 * BRANCHES + 1) * tokens * SIZE * 2


def test_gate_of_less_shared_memory():
    """What does not fit the block goes the plain way."""
    inputs = make_inputs(5, 4, 1024, weight_dtype=torch.bfloat16)
    assert "gate_kernel" in check(inputs, device=Device(multiprocessors=1))[0].kernel
    assert "gate_plain_kernel" in check(inputs, device=Device(multiprocessors=1, shared_limit=4096))[0].kernel


def test_gate_accesses_are_16_bytes_wide(v41):
    for line in v41.result.lines:
        if line["space"] == "global":
            assert line["bytes"] == 16 * line["threads"] and line["sectors"] <= 1.02 * line["ideal"]


def test_gate_bank_conflicts(v41):
    for kind in ("load", "store"):
        shared = v41.result.memory[f"shared.{kind}"]
        assert shared["waves"] <= 1.1 * shared["ideal_waves"]


def test_gate_keeps_bytes_in_flight(v41):
    """Hidden and key of a token's threads, loaded while the token before is written. 2 MB cover latency times rate."""
    usage = build().usage(OP)[v41.kernel]
    threads = np.prod(v41.block)
    resident = min(65536 // (usage.registers * threads), 232448 // v41.shared_bytes, 2048 // threads)
    assert resident >= 1 and resident * 2 * BRANCHES * SIZE * 2 * 132 >= 2e6


def test_gate_uses_no_local_memory():
    for usage in build().usage(OP).values():
        assert (usage.stack_bytes, usage.spill_bytes) == (0, 0) and usage.registers <= 168


@pytest.mark.skipif(bool(MISSING_SASS), reason=MISSING_SASS)
def test_gate_machine_code(v41):
    """No call, and fewer executed instructions a (token, branch) than the best peer's 77,600.

    From above: every way through the code at its longest, but for that of a masked token.
    """
    sass = build().sass(OP)
    for code in sass.values():
        assert not [op for _, _, op, _ in code if re.match(r"CALL|LDL|STL", op)]
    sums, score, output = parts_of(token_loop(sass[v41.kernel]), 3)
    every_warp = longest_without(sums, "STG") + longest_path(score, choose=min) + longest_path(output)  # STG: a masked token
    first_warp = longest_path(score) - longest_path(score, choose=min)
    assert 32 * (v41.block[0] // 32 * every_warp + first_warp) / BRANCHES < 66_000
