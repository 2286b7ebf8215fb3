"""short_conv against the published eager formulation (RMSNorm, conv1d, SiLU) and a sum of shifted inputs, and the decode step
against a shifted state. A step must not depend on how far the convolution reaches: one contender has a hundred times the state.
"""
import pytest
import torch
import torch.nn.functional as F

from engram_kernels import short_conv
from harness import measure

BRANCHES, SIZE, WIDTH, DILATION, EPS = 4, 1024, 4, 3, 1e-5  # the demo's
PREFILL_TOKENS, LONG_DILATION = 2048, 300
FAR = f"engram_kernels, dilation {LONG_DILATION}"
PREFILL = f"short_conv, demo_v1 ({BRANCHES}x{SIZE}, bf16), {PREFILL_TOKENS} tokens"
BACKWARD = f"short_conv forward and backward, demo_v1 ({BRANCHES}x{SIZE}, bf16), {PREFILL_TOKENS} tokens"
DECODE = f"short_conv, demo_v1 ({BRANCHES}x{SIZE}, bf16), decode step of {{}} sequence(s)"


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


def shifted_sum(x, weight, norm_weight):
    """One sequence, tap by tap: what conv1d does, without its transpositions."""
    normed = F.rms_norm(x, (SIZE,), None, EPS) * norm_weight
    conv = normed * weight[:, :, -1]
    for back in range(1, WIDTH):
        conv[back * DILATION:] += normed[:-back * DILATION] * weight[:, :, WIDTH - 1 - back]
    return x + F.silu(conv)


PEERS = {"eager torch": eager, "eager torch, shifted sum": shifted_sum}


def eager_step(x, weight, norm_weight, state):
    """One token of each sequence; the state is shifted by one."""
    normed = F.rms_norm(x, (SIZE,), None, EPS) * norm_weight
    window = torch.cat([state, normed[:, None]], dim=1)
    conv = sum(window[:, j * DILATION] * weight[:, :, j] for j in range(WIDTH))
    state.copy_(window[:, 1:])
    return x + F.silu(conv)


@pytest.mark.parametrize("contender", ["engram_kernels", *PEERS])
def test_prefill(benchmark, contender):
    x, weight, norm_weight = inputs(PREFILL_TOKENS)
    cu, out = torch.tensor([0, PREFILL_TOKENS], dtype=torch.int32), torch.empty_like(x)
    ours = contender == "engram_kernels"

    def run():
        short_conv(x, weight, norm_weight, cu, DILATION, EPS, out=out) if ours else PEERS[contender](x, weight, norm_weight)

    measure(benchmark, run, group=PREFILL, contender=contender, role="ours" if ours else "peer", num_bytes=2 * x.nbytes,
            units=PREFILL_TOKENS, unit="token", rounds=7)


@pytest.mark.parametrize("contender", ["engram_kernels", *PEERS])
def test_forward_and_backward(benchmark, contender):
    leaves = [a.requires_grad_() for a in inputs(PREFILL_TOKENS)]
    cu, upstream = torch.tensor([0, PREFILL_TOKENS], dtype=torch.int32), torch.ones_like(leaves[0])
    ours = contender == "engram_kernels"

    def run():
        out = short_conv(*leaves, cu, DILATION, EPS) if ours else PEERS[contender](*leaves)
        torch.autograd.grad(out, leaves, upstream)

    measure(benchmark, run, group=BACKWARD, contender=contender, role="ours" if ours else "peer", units=PREFILL_TOKENS,
            unit="token", num_bytes=5 * upstream.nbytes, rounds=5)


@pytest.mark.parametrize("sequences", [1, 64])
@pytest.mark.parametrize("contender", ["engram_kernels", FAR, "eager torch, shifted state"])
def test_decode(benchmark, contender, sequences):
    x, weight, norm_weight = inputs(sequences)
    dilation = LONG_DILATION if contender == FAR else DILATION
    state = torch.zeros(sequences, (WIDTH - 1) * dilation, BRANCHES, SIZE, dtype=torch.bfloat16)
    cu = torch.arange(sequences + 1, dtype=torch.int32)
    positions, out = torch.full((sequences,), 1000, dtype=torch.int32), torch.empty_like(x)
    ours = contender in ("engram_kernels", FAR)

    def run():
        if ours:
            short_conv(x, weight, norm_weight, cu, dilation, EPS, state, positions, out=out)
        else:
            eager_step(x, weight, norm_weight, state)

    measure(benchmark, run, group=DECODE.format(sequences), contender=contender,
            role="ours" if contender == "engram_kernels" else "peer", units=sequences, unit="token", num_bytes=6 * x.nbytes,
            rounds=50)


def test_peers_agree():
    x, weight, norm_weight = (a.float() for a in inputs(50))
    want = short_conv(x, weight, norm_weight, torch.tensor([0, 50], dtype=torch.int32), DILATION, EPS)
    for peer in PEERS.values():
        torch.testing.assert_close(peer(x, weight, norm_weight), want, rtol=1e-4, atol=1e-4)
