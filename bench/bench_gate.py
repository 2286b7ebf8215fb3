"""gate against plain PyTorch, the same compiled, and a copy of the same bytes. One thread; hidden, key and value in DRAM."""
import pytest
import torch

from engram_kernels.ops.gate import gate
from engram_kernels.reference.gate import gate as reference
from harness import measure

HIDDEN_SIZE = 5120  # DeepSeek-V4.1-Flash, whose branches are 4
BRANCHES = (1, 4)
TOKENS = 512
OPTIONS = (1e-6, 1e-6, "copysign", True)


def make_inputs(tokens, branches):
    """bf16, key and value as slices of one projection, weights in float32."""
    torch.manual_seed(0)
    fused = torch.randn(tokens, (branches + 1) * HIDDEN_SIZE).bfloat16()
    key = fused[:, :branches * HIDDEN_SIZE].view(tokens, branches, HIDDEN_SIZE)
    hidden = torch.randn(tokens, branches, HIDDEN_SIZE).bfloat16()
    return hidden, key, fused[:, branches * HIDDEN_SIZE:], torch.rand(branches, HIDDEN_SIZE), torch.rand(branches, HIDDEN_SIZE)


def eager_bf16(hidden, key, value, w_hidden, w_key):
    """What a careful author writes: big tensors stay bf16, sums are float32, the update is one addcmul."""
    weight = (w_hidden * w_key).bfloat16()
    x = (hidden * weight).mul_(key).sum(-1, keepdim=True, dtype=torch.float32)
    size = hidden.shape[-1]
    rh = torch.rsqrt(torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32).square() / size + 1e-6)
    rk = torch.rsqrt(torch.linalg.vector_norm(key, dim=-1, keepdim=True, dtype=torch.float32).square() / size + 1e-6)
    x = x * rh * rk / size**0.5
    g = torch.sigmoid(torch.copysign(x.abs().clamp_min(1e-6).sqrt(), x))
    return torch.addcmul(hidden, g.bfloat16(), value[:, None])


def eager_reference(*inputs):
    return reference(*inputs, None, *OPTIONS)


def bytes_of(tokens, branches):
    return (3 * tokens * branches + tokens) * HIDDEN_SIZE * 2


def contenders(tokens, branches):
    """name: (role, function of no argument)."""
    inputs = make_inputs(tokens, branches)
    out = torch.empty_like(inputs[0])
    source = torch.ones(bytes_of(tokens, branches) // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    compiled = torch.compile(eager_reference, fullgraph=True)
    return {
        "engram_kernels (out=)": ("ours", lambda: gate(*inputs, out=out)),
        "engram_kernels (new tensor)": ("peer", lambda: gate(*inputs)),
        "eager reference (float32)": ("peer", lambda: eager_reference(*inputs)),
        "eager bf16": ("peer", lambda: eager_bf16(*inputs)),
        "torch.compile of the reference": ("peer", lambda: compiled(*inputs)),
        "copy of the same bytes": ("bound", lambda: target.copy_(source)),
    }


NAMES = ("engram_kernels (out=)", "engram_kernels (new tensor)", "eager reference (float32)", "eager bf16",
         "torch.compile of the reference", "copy of the same bytes")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("branches", BRANCHES)
def test_bench_gate(benchmark, branches, name):
    role, run = contenders(TOKENS, branches)[name]
    measure(benchmark, run, group=f"gate, {TOKENS} tokens, M {branches}, H {HIDDEN_SIZE}, bf16, one thread", contender=name,
            role=role, num_bytes=bytes_of(TOKENS, branches), units=TOKENS, unit="token", rounds=11)


@pytest.mark.parametrize("name", NAMES[:1] + NAMES[2:5])
def test_bench_gate_decode(benchmark, name):
    role, run = contenders(1, 4)[name]
    measure(benchmark, lambda: [run() for _ in range(100)], group=f"gate, 100 calls of 1 token, M 4, H {HIDDEN_SIZE}, bf16",
            contender=name, role=role, units=100, unit="call", rounds=11)


@pytest.mark.parametrize("name", ["engram_kernels", "eager reference (float32)", "eager bf16"])
def test_bench_gate_backward(benchmark, name):
    inputs = make_inputs(TOKENS, 4)
    grad_out = torch.randn_like(inputs[0])
    leaves = [x.detach().requires_grad_() for x in inputs]
    function = {"engram_kernels": gate, "eager bf16": eager_bf16}.get(name, eager_reference)

    def run():
        return torch.autograd.grad(function(*leaves), leaves, grad_out)

    measure(benchmark, run, group=f"gate forward and backward, {TOKENS} tokens, M 4, H {HIDDEN_SIZE}, bf16, one thread",
            contender=name, role="ours" if name == "engram_kernels" else "peer", units=TOKENS, unit="token", rounds=5)
