"""Backward of short_conv on the PTX simulator: gradients against float64 autograd of the reference, and what they cost."""
import pytest
import torch
from cuda_sim import MISSING_NVCC, MISSING_SASS, Device, LaunchError, build
from op_cases import plain_short_conv as plain_torch
from op_cases import short_conv_inputs as make_inputs
from short_conv_sim import BWD, EPS, simulate_bwd

from engram_kernels.reference.short_conv import short_conv as reference
from engram_kernels.testing import assert_as_accurate_as_torch

pytestmark = pytest.mark.skipif(bool(MISSING_NVCC), reason=MISSING_NVCC)
ONE_SM, RANDOM = {"multiprocessors": 1}, {"options": {"cta_order": "random"}}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
RING, PLAIN = ("stats_kernel", "grads_kernel"), ("stats_plain", "grads_plain")
MIXED = ("stats_plain", "grads_kernel")

CASES = {  # name: (kernels, device, lengths, branches, size, width, dilation, dtype, weight dtype)
    "bf16": (RING, RANDOM, [40, 1, 30], 2, 64, 4, 3, BF16, BF16),
    "one_sm": (RING, ONE_SM, [70, 1, 130], 2, 64, 4, 3, BF16, BF16),
    "f16_float_weights": (RING, RANDOM, [40, 1, 31], 1, 72, 4, 2, F16, F32),
    "f32": (RING, ONE_SM, [70, 1, 130], 2, 40, 4, 3, F32, F32),
    "several_warps_and_tiles": (RING, RANDOM, [33], 1, 2056, 4, 4, BF16, BF16),
    "f32_several_tiles": (RING, ONE_SM, [33], 1, 1304, 3, 4, F32, F32),
    "one_past_a_group": (RING, RANDOM, [65], 1, 256, 2, 5, BF16, BF16),
    "no_taps_back": (RING, RANDOM, [50, 3], 1, 64, 1, 7, BF16, BF16),
    "smaller_groups": (RING, ONE_SM, [19], 1, 5120, 4, 4, BF16, BF16),
    "one_token": (RING, RANDOM, [1], 1, 32, 4, 3, BF16, BF16),
    "empty_sequences": (RING, RANDOM, [0, 4, 0, 0, 3, 0], 2, 40, 4, 3, BF16, BF16),
    "reach_past_the_sequence": (RING, RANDOM, [3, 5, 2], 2, 24, 4, 20, BF16, BF16),
    "long_rows": (MIXED, RANDOM, [12], 1, 5128, 4, 2, BF16, BF16),
    "long_reach": (("stats_kernel", "grads_plain"), RANDOM, [300, 20], 1, 24, 4, 90, F32, F32),
    "tail_channels": (PLAIN, RANDOM, [20, 9], 3, 37, 4, 3, F16, F16),
    "one_channel": (PLAIN, RANDOM, [12], 1, 1, 4, 1, BF16, BF16),
    "most_taps": (PLAIN, RANDOM, [50], 1, 40, 8, 2, BF16, BF16),
    "five_taps_float_weights": (PLAIN, ONE_SM, [20, 40], 2, 139, 5, 2, BF16, F32),
}


def torch_grads(run, args, upstream, dilation):
    leaves = [a.detach().requires_grad_() for a in args[:3]]
    out = run(*leaves, args[3], dilation)
    return torch.autograd.grad(out, leaves, upstream, allow_unused=True, materialize_grads=True)


def rms(x):
    return float(x.square().mean().sqrt())


def check(got, args, upstream, dilation):
    dtype, weight_dtype = args[0].dtype, args[1].dtype
    cast = [a if a.dtype == dtype or weight_dtype == F32 else a.to(dtype) for a in args[:3]] + [args[3]]
    plain = torch_grads(plain_torch, cast, upstream, dilation)
    exact = torch_grads(lambda *a: reference(*a, EPS), [a.double() for a in args[:3]] + [args[3]], upstream.double(), dilation)
    for name, g, p, e in zip(("x", "weight", "norm_weight"), got, plain, exact, strict=True):
        if name == "weight":  # taps as rows: one tap's sums over all tokens
            g, p, e = g.transpose(1, 2), p.transpose(1, 2), e.transpose(1, 2)
        try:
            assert_as_accurate_as_torch(g, p, e, 2.0 if dtype != F32 else 6.0)
            if dtype == F32 and name != "norm_weight":  # each row's largest error is a draw: the rows together must be alike
                assert rms(g - e) <= 1.3 * rms(p - e) + torch.finfo(F32).eps
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None


def random_like(x, seed=9):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_short_conv_bwd_matches_reference(case):
    kernels, device, lengths, branches, size, width, dilation, dtype, weight_dtype = case
    args = make_inputs(lengths, branches, size, width, dtype, weight_dtype)
    upstream = random_like(args[0])
    got, errors, launches = simulate_bwd(upstream, *args, dilation, device=Device(**device))
    check(got, args, upstream, dilation)
    assert errors == 0 and len(launches) == 3
    assert all(name in launch.kernel for name, launch in zip((*kernels, "weights_kernel"), launches, strict=True))


def test_short_conv_bwd_no_tokens_gives_zeros():
    args = make_inputs([0, 0])
    (grad_x, *weights), errors, _ = simulate_bwd(args[0].clone(), *args, 3)
    assert grad_x.shape == (0, 2, 40) and errors == 0 and all((g == 0).all() for g in weights)


@pytest.mark.parametrize("size", [64, 37], ids=["ring", "plain"])
def test_short_conv_bwd_is_deterministic(size):
    args = make_inputs([150, 33], 2, size)
    upstream = random_like(args[0])
    first = simulate_bwd(upstream, *args, 3)[0]
    for options in ({"cta_order": "random", "seed": 1}, {"cta_order": "reverse"}):
        again = simulate_bwd(upstream, *args, 3, device=Device(options=options))[0]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_short_conv_bwd_strided():
    args = make_inputs([31, 6], 3, 64)
    upstream = random_like(args[0])
    want = simulate_bwd(upstream, *args, 2)[0]
    for lead in (8, 3):  # on 16-byte boundaries, and off them
        wide = torch.zeros(37, 5, 80, dtype=BF16)
        x, grad = wide[:, 1:4, lead:lead + 64], wide.clone()[:, 1:4, lead:lead + 64]
        x.copy_(args[0])
        grad.copy_(upstream)
        got, _, launches = simulate_bwd(grad, x, *args[1:], 2)
        check(got, args, upstream, 2)
        assert ("plain" in launches[0].kernel) == (lead == 3)
        assert lead == 3 or all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("size", [64, 37], ids=["ring", "plain"])
def test_short_conv_bwd_does_not_leak_across_sequences(size):
    x, weight, norm_weight, cu = make_inputs([20, 50], 1, size)
    upstream = random_like(x)
    clean = simulate_bwd(upstream, x, weight, norm_weight, cu, 3)[0][0]
    x[:20], upstream[:20] = float("nan"), float("nan")
    assert torch.equal(simulate_bwd(upstream, x, weight, norm_weight, cu, 3)[0][0][20:], clean[20:])


@pytest.mark.parametrize("cu", [[0, 60, 50, 100], [1, 100], [0, 90], [0, 5000], [-7, 100], [0, 2**31 - 1, -2**31, 100]],
                         ids=["decreases", "starts_late", "short", "long", "negative", "wild"])
def test_short_conv_bwd_bad_cu_seqlens_is_counted_and_stays_in_bounds(cu):
    for size in (64, 37):
        x, weight, norm_weight, _ = make_inputs([100], 1, size)
        assert simulate_bwd(x.clone(), x, weight, norm_weight, torch.tensor(cu, dtype=torch.int32), 3)[1] > 0


def test_short_conv_bwd_rejects():
    args = make_inputs([6])
    with pytest.raises(LaunchError, match="dilation is 0"):
        simulate_bwd(args[0].clone(), *args, 0)


# ---- what it costs ---------------------------------------------------------------------------------------------------

ROW = 5120 * 2


@pytest.fixture(scope="module")
def cost():
    """V4.1 rows; one multiprocessor, so that chunks are long as in a large batch."""
    args = make_inputs([40], 1, 5120)
    return simulate_bwd(random_like(args[0]), *args, 3, device=Device(**ONE_SM))[2]


def moved(launch, *names):
    return sum(launch.result.buffers.get(n, {}).get(kind, 0) for n in names for kind in ("load_bytes", "store_bytes"))


def test_short_conv_bwd_reads_rows_twice_and_writes_them_once(cost):
    """5 rows per token where 3 are the least."""
    stats, grads, weights = cost
    assert moved(stats, "x") == moved(stats, "grad_out") == moved(grads, "x") == moved(grads, "grad_out") == 40 * ROW
    assert moved(grads, "grad_x") == 40 * ROW and moved(weights, "x", "grad_out", "grad_x") == 0
    assert sum(moved(launch, "x", "grad_out", "grad_x") for launch in cost) <= 1.67 * 3 * 40 * ROW
    # besides: weights, a chunk's sums of 4 floats per channel, and stats of 5 floats per token
    assert moved(stats, "scratch") == 40 * 5 * 4
    assert moved(weights, "scratch") == 4 * 4 * 5120


def test_short_conv_bwd_accesses_are_wide(cost):
    for launch in cost[:2]:
        for name in ("x", "grad_out", "grad_x"):
            buffer = launch.result.buffers.get(name, {})
            for kind in ("load", "store"):
                assert buffer.get(f"{kind}_sectors", 0) * 32 == buffer.get(f"{kind}_bytes", 0)


def test_short_conv_bwd_bank_conflicts(cost):
    for launch in cost[:2]:
        for kind in ("load", "store"):
            shared = launch.result.memory[f"shared.{kind}"]
            assert shared["waves"] <= 1.1 * shared["ideal_waves"]


def test_short_conv_bwd_instructions(cost):
    stats, grads, _ = (launch.result.thread_instructions / (40 * 5120) for launch in cost)
    assert stats <= 96 and grads <= 116  # PTX


def test_short_conv_bwd_uses_no_local_memory():
    usages = build().usage(BWD)
    assert len(usages) == 15
    for usage in usages.values():
        assert (usage.stack_bytes, usage.spill_bytes) == (0, 0)


@pytest.mark.skipif(bool(MISSING_SASS), reason=MISSING_SASS)
def test_short_conv_bwd_machine_code():
    for code in build().sass(BWD).values():
        assert not [op for _, _, op, _ in code if op.startswith(("CALL", "LDL", "STL"))]
