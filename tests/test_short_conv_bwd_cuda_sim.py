"""Backward of short_conv on the PTX simulator: gradients against float64 autograd of the reference, and what they cost."""
import numpy as np
import pytest
import torch
from cuda_sim import MISSING_NVCC, MISSING_SASS, Device, LaunchError, build
from short_conv_sim import BWD, EPS, make_inputs, packed, plain_torch, simulate_bwd

from engram_kernels.reference.short_conv import short_conv as reference
from engram_kernels.testing import assert_as_accurate_as_torch

pytestmark = pytest.mark.skipif(bool(MISSING_NVCC), reason=MISSING_NVCC)
ONE_SM, RANDOM = {"multiprocessors": 1}, {"options": {"cta_order": "random"}}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
RING, ANY, MIXED = ("stats_kernel", "grads_kernel"), ("stats_any", "grads_any"), ("stats_any", "grads_kernel")

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
    "long_reach": (("stats_kernel", "grads_any"), RANDOM, [300, 20], 1, 24, 4, 90, F32, F32),
    "tail_channels": (ANY, RANDOM, [20, 9], 3, 37, 4, 3, F16, F16),
    "one_channel": (ANY, RANDOM, [12], 1, 1, 4, 1, BF16, BF16),
    "most_taps": (ANY, RANDOM, [50], 1, 40, 8, 2, BF16, BF16),
    "five_taps_float_weights": (ANY, ONE_SM, [20, 40], 2, 139, 5, 2, BF16, F32),
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
