"""short_conv against the published eager formulation (RMSNorm, conv1d, SiLU), and the decode step against a shifted state."""
import pytest
import torch
import torch.nn.functional as F

from engram_kernels import short_conv
from harness import measure

BRANCHES, SIZE, WIDTH, DILATION, EPS = 4, 1024, 4, 3, 1e-5  # the demo's
PREFILL_TOKENS, DECODE_SEQUENCES = 2048, 64
PREFILL = f"short_conv, demo_v1 ({BRANCHES}x{SIZE}, bf16), {PREFILL_TOKENS} tokens"
BACKWARD = f"short_conv forward and backward, demo_v1 ({BRANCHES}x{SIZE}, bf16), {PREFILL_TOKENS} tokens"
DECODE = f"short_conv, demo_v1 ({BRANCHES}x{SIZE}, bf16), decode step of {DECODE_SEQUENCES} sequences"


def inputs(tokens):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, BRANCHES, SIZE, generator=generator).bfloat16()
    return x, torch.randn(BRANCHES, SIZE, WIDTH, generator=generator).bfloat16(), torch.ones(BRANCHES, SIZE).bfloat16()


def eager(x, weight, norm_weight):
    """One sequence, as the published module does it."""
    normed = torch.cat([F.rms_norm(x[:, m], (SIZE,), norm_weight[m], EPS) for m in range(BRANCHES)], dim=1)
    line = F.pad(normed.T[None], ((WIDTH - 1) * DILATION, 0))
    conv = F.conv1d(line, weight.view(BRANCHES * SIZE, 1, WIDTH), dilation=DILATION, groups=BRANCHES * SIZE)
    return x + F.silu(conv[0].T).view_as(x)


def eager_step(x, weight, norm_weight, state):
    """One token of each sequence; the state is shifted by one."""
    normed = F.rms_norm(x, (SIZE,), None, EPS) * norm_weight
    window = torch.cat([state, normed[:, None]], dim=1)
    conv = sum(window[:, j * DILATION] * weight[:, :, j] for j in range(WIDTH))
    state.copy_(window[:, 1:])
    return x + F.silu(conv)


@pytest.mark.parametrize("contender", ["engram_kernels", "eager torch"])
def test_prefill(benchmark, contender):
    x, weight, norm_weight = inputs(PREFILL_TOKENS)
    cu, out = torch.tensor([0, PREFILL_TOKENS], dtype=torch.int32), torch.empty_like(x)
    ours = contender == "engram_kernels"

    def run():
        short_conv(x, weight, norm_weight, cu, DILATION, EPS, out=out) if ours else eager(x, weight, norm_weight)

    measure(benchmark, run, group=PREFILL, contender=contender, role="ours" if ours else "peer", num_bytes=2 * x.nbytes,
            units=PREFILL_TOKENS, unit="token", rounds=7)


@pytest.mark.parametrize("contender", ["engram_kernels", "eager torch"])
def test_forward_and_backward(benchmark, contender):
    leaves = [a.requires_grad_() for a in inputs(PREFILL_TOKENS)]
    cu, upstream = torch.tensor([0, PREFILL_TOKENS], dtype=torch.int32), torch.ones_like(leaves[0])
    ours = contender == "engram_kernels"

    def run():
        out = short_conv(*leaves, cu, DILATION, EPS) if ours else eager(*leaves)
        torch.autograd.grad(out, leaves, upstream)

    measure(benchmark, run, group=BACKWARD, contender=contender, role="ours" if ours else "peer", units=PREFILL_TOKENS,
            unit="token", num_bytes=5 * upstream.nbytes, rounds=5)


@pytest.mark.parametrize("contender", ["engram_kernels", "eager torch, shifted state"])
def test_decode(benchmark, contender):
    x, weight, norm_weight = inputs(DECODE_SEQUENCES)
    state = torch.zeros(DECODE_SEQUENCES, (WIDTH - 1) * DILATION, BRANCHES, SIZE, dtype=torch.bfloat16)
    cu = torch.arange(DECODE_SEQUENCES + 1, dtype=torch.int32)
    positions, out = torch.full((DECODE_SEQUENCES,), 100, dtype=torch.int32), torch.empty_like(x)
    ours = contender == "engram_kernels"

    def run():
        if ours:
            short_conv(x, weight, norm_weight, cu, DILATION, EPS, state, positions, out=out)
        else:
            eager_step(x, weight, norm_weight, state)

    measure(benchmark, run, group=DECODE, contender=contender, role="ours" if ours else "peer", units=DECODE_SEQUENCES,
            unit="token", num_bytes=6 * x.nbytes, rounds=50)
