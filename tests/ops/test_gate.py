"""gate: docs/ops.md, gate, on every backend."""
import re

import numpy as np
import pytest
import torch
from op_cases import gate_inputs as make_inputs

from engram_kernels.ops.gate import gate
from engram_kernels.reference.gate import gate as reference
from engram_kernels.testing import assert_as_accurate_as_torch, assert_rounded_once
from engram_kernels.testing.draws import worst_draw

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
CASES = {  # name: (tokens, branches, hidden_size)
    "one_element": (1, 1, 1),
    "odd_sizes": (5, 3, 37),
    "tail_of_one": (4, 2, 65),
    "one_branch": (7, 1, 96),
    "v41": (6, 4, 5120),
}
GRADS = ("hidden", "key", "value", "w_hidden", "w_key")


def plain(hidden, key, value, w_hidden, w_key, mask=None, eps=1e-6, clamp=1e-6, add_residual=True):
    """The formula as ordinary PyTorch computes it: every step in the dtype of the inputs."""
    x = (hidden * w_hidden * key * w_key).sum(-1, keepdim=True)
    x = x * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
    x = x * torch.rsqrt(key.square().mean(-1, keepdim=True) + eps) / hidden.shape[-1] ** 0.5
    g = torch.sigmoid(torch.copysign(x.abs().clamp_min(clamp).sqrt(), x))
    if mask is not None:
        g = g.masked_fill(mask[:, None, None], 0)
    update = (g * value[:, None]).to(hidden.dtype)
    return hidden + update if add_residual else update


def exact(*inputs, mask=None, eps=1e-6, clamp=1e-6, zero_sign="copysign", add_residual=True):
    return reference(*(x.double() for x in inputs), mask, eps, clamp, zero_sign, add_residual)


def gradients(function, inputs, grad_out, **options):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves, **options), leaves, grad_out)


def assert_rows_as_accurate(got, function, inputs, want):
    for name, a, b, c in zip(GRADS, got, worst_draw(function, inputs, want), want, strict=False):
        try:
            assert_as_accurate_as_torch(a, b, c)
        except AssertionError as err:
            raise AssertionError(f"{name}: {err}") from None


@pytest.mark.parametrize("add_residual", [True, False], ids=["residual", "update_only"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gate_matches_reference(case, dtype, add_residual, backend, device):
    inputs = make_inputs(*case, dtype, device)
    mask = torch.arange(case[0], device=device) % 3 == 1
    got = gate(*inputs, mask, add_residual=add_residual, backend=backend)
    want = exact(*inputs, mask=mask, add_residual=add_residual)
    assert_rows_as_accurate([got], lambda *x: [plain(*x, mask, add_residual=add_residual)], inputs, [want])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_gate_float32_weights_match_reference(dtype, backend, device):
    inputs = make_inputs(3, 2, 100, dtype, device, weight_dtype=torch.float32)
    assert_rows_as_accurate([gate(*inputs, backend=backend)], lambda *x: [plain(*(y.to(dtype) for y in x))], inputs,
                            [exact(*inputs)])


def test_gate_large_outputs_match_reference(backend, device):
    # above 4 MiB the CPU writes around the caches; the interpreter is slow
    inputs = make_inputs(20 if device == "cpu" and backend == "triton" else 130, 4, 5120, torch.bfloat16, device)
    got = gate(*inputs, backend=backend)
    assert_as_accurate_as_torch(got, plain(*inputs), exact(*inputs))


def test_gate_rounds_to_nearest_even(backend, device):
    # x = 0 and zero_sign "sign" make the gate 1/2: out = h + v / 2 is one float32 sum, rounded once. Over all values of v
    value = torch.arange(2**16, dtype=torch.int32, device=device).to(torch.int16).view(torch.bfloat16).view(16, 4096)
    hidden = torch.randn(16, 1, 4096, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    weight = torch.ones(1, 4096, device=device)
    got = gate(hidden, torch.zeros_like(hidden), value, weight, weight, zero_sign="sign", backend=backend)
    want = (hidden.float() + 0.5 * value[:, None].float()).bfloat16()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_gate_golden(backend, device):
    # by hand: H = 1, eps = 0, so x = sign(h k) and s = x: sigmoid(1) = 0.7310586, sigmoid(-1) = 0.2689414
    hidden = torch.tensor([[[2.0]], [[-2.0]], [[2.0]]], device=device)
    key = torch.tensor([[[3.0]], [[3.0]], [[-0.5]]], device=device)
    value, one = torch.tensor([[1.0], [10.0], [-1.0]], device=device), torch.ones(1, 1, device=device)
    got = gate(hidden, key, value, one, one, eps=0.0, backend=backend)
    want = torch.tensor([2.7310586, -2 + 2.689414, 2 - 0.2689414], device=device)
    torch.testing.assert_close(got.flatten(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("zero_sign", "h", "gate_at_zero"), [
    ("copysign", 0.0, 0.5249792), ("copysign", -0.0, 0.5249792), ("sign", 0.0, 0.5), ("sign", -0.0, 0.5)])
def test_gate_zero_sign(zero_sign, h, gate_at_zero, backend, device):
    # x is 0 (a sum of -0 is +0), so |s| = sqrt(clamp) = 0.1: sigmoid(0.1) = 0.5249792
    hidden, one = torch.full((1, 1, 40), h, device=device), torch.ones(1, 40, device=device)
    got = gate(hidden, torch.ones_like(hidden), one, one, one, clamp=0.01, zero_sign=zero_sign, add_residual=False,
               backend=backend)
    torch.testing.assert_close(got, torch.full_like(got, gate_at_zero), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_gate_masked_token_passes_bit_for_bit(dtype, backend, device):
    hidden, key, value, w_hidden, w_key = make_inputs(4, 3, 70, dtype, device)
    words = torch.int32 if dtype == torch.float32 else torch.int16
    # NaN with a payload, signalling NaN, -0, Inf and a subnormal survive
    odd_bits = {torch.int32: [0x7FC12345, 0x7F800001, -(2**31), 0x7F800000, 1],
                torch.int16: [0x7FC5, 0x7F81, -(2**15), 0x7C00, 1]}
    hidden.view(words)[1, :, :5] = torch.tensor(odd_bits[words], dtype=words, device=device)
    value[1, 0], value[1, 1], key[1, 0, 0] = float("nan"), float("inf"), float("nan")
    mask = torch.tensor([False, True, False, False], device=device)
    got = gate(hidden, key, value, w_hidden, w_key, mask, backend=backend)
    assert torch.equal(got[1].view(words), hidden[1].view(words))
    assert got[[0, 2, 3]].isfinite().all()
    got = gate(hidden, key, value, w_hidden, w_key, mask, add_residual=False, backend=backend)
    assert torch.equal(got[1].view(words), torch.zeros_like(hidden[1]).view(words))


def test_gate_does_not_leak_nan(backend, device):
    hidden, key, value, w_hidden, w_key = make_inputs(5, 2, 50, torch.float32, device)
    clean = gate(hidden, key, value, w_hidden, w_key, backend=backend)
    hidden[1, 0, 3], key[2, 1, 49], value[3, 7] = float("nan"), float("nan"), float("inf")
    got = gate(hidden, key, value, w_hidden, w_key, backend=backend)
    assert got[1, 0].isnan().all() and got[2, 1].isnan().all() and got[3, :, 7].isinf().all()
    same = torch.ones_like(got, dtype=torch.bool)
    same[1, 0] = same[2, 1] = same[3, :, 7] = False
    assert torch.equal(got[same], clean[same])


def test_gate_strided_inputs_match_contiguous(backend, device):
    tokens, branches, size = 6, 3, 40
    fused = torch.randn(tokens, (branches + 1) * size, device=device).bfloat16()  # keys and value of one projection
    key, value = fused[:, :branches * size].view(tokens, branches, size), fused[:, branches * size:]
    hidden = torch.randn(2 * tokens, branches + 2, size, device=device).bfloat16()[::2, 1:-1]
    one_key = key[:, :1].expand(-1, branches, -1)  # stride 0
    weight = torch.randn(branches, size, device=device)
    for k in (key, one_key):
        got = gate(hidden, k, value, weight, weight, backend=backend)
        assert torch.equal(got, gate(hidden.contiguous(), k.contiguous(), value.contiguous(), weight, weight, backend=backend))
        assert got.is_contiguous()


def test_gate_large_offsets(backend, device):
    # key rows more than 2^31 elements apart, in memory that is never touched in between
    step = 2**31 + 64
    buffer = torch.from_numpy(np.zeros(step + 64, dtype=np.int16)).to(device).view(torch.bfloat16)
    key = buffer.as_strided((2, 1, 64), (step, 64, 1))
    hidden, dense, value, w_hidden, w_key = make_inputs(2, 1, 64, torch.bfloat16, device)
    key.copy_(dense)
    got = gate(hidden, key, value, w_hidden, w_key, backend=backend)
    assert torch.equal(got, gate(hidden, dense, value, w_hidden, w_key, backend=backend))


def test_gate_in_place_and_out(backend, device):
    inputs = make_inputs(5, 2, 45, torch.bfloat16, device)
    mask = torch.tensor([False, True, False, False, True], device=device)
    want = gate(*inputs, mask, backend=backend)
    out = torch.empty_like(inputs[0])
    assert gate(*inputs, mask, out=out, backend=backend) is out and torch.equal(out, want)
    assert gate(*inputs, mask, out=inputs[0], backend=backend) is inputs[0] and torch.equal(inputs[0], want)


@pytest.mark.parametrize("shape", [(0, 4, 64), (0, 1, 1)])
def test_gate_empty_batch(shape, backend, device):
    inputs = make_inputs(*shape, torch.bfloat16, device)
    assert gate(*inputs, backend=backend).shape == shape
    grads = gradients(gate, inputs, torch.empty(shape, dtype=torch.bfloat16, device=device), backend=backend)
    assert [g.shape for g in grads] == [x.shape for x in inputs]
    assert not grads[3].any() and not grads[4].any()


REJECTED = {  # name: (what to change, words of the message)
    "dtype": (lambda a: a.update(hidden=a["hidden"].double()), "hidden must be torch.float32 or"),
    "mixed_dtypes": (lambda a: a.update(key=a["key"].half()), "key must be torch.bfloat16"),
    "mixed_weights": (lambda a: a.update(w_key=a["w_key"].float()), "w_key must be torch.bfloat16"),
    "hidden_shape": (lambda a: a.update(hidden=a["hidden"][0]), "hidden must have shape"),
    "no_branches": (lambda a: a.update(hidden=a["hidden"][:, :0], key=a["key"][:, :0]), "at least one branch"),
    "key_shape": (lambda a: a.update(key=a["key"][:, :1]), r"key must have shape \[3, 2, 8\], got \[3, 1, 8\]"),
    "value_shape": (lambda a: a.update(value=a["value"][:2]), "value must have shape"),
    "weight_shape": (lambda a: a.update(w_hidden=a["w_hidden"][0]), "w_hidden must have shape"),
    "stride": (lambda a: a.update(value=a["value"].t().contiguous().t()), "dimensions of value must be contiguous"),
    "mask_dtype": (lambda a: a.update(mask=torch.zeros(3, dtype=torch.uint8)), "mask must be torch.bool"),
    "mask_shape": (lambda a: a.update(mask=torch.zeros(4, dtype=torch.bool)), "mask must have shape"),
    "device": (lambda a: a.update(key=a["key"].to("meta")), "key must be on cpu, got meta"),
    "eps": (lambda a: a.update(eps=-1.0), "eps is -1.0"),
    "eps_nan": (lambda a: a.update(eps=float("nan")), "eps is nan"),
    "clamp": (lambda a: a.update(clamp=0.0), "clamp is 0"),
    "zero_sign": (lambda a: a.update(zero_sign="plus"), "zero_sign is 'plus', expected 'copysign' or 'sign'"),
    "out_dtype": (lambda a: a.update(out=torch.empty(3, 2, 8)), "out must be torch.bfloat16"),
    "out_shape": (lambda a: a.update(out=torch.empty(3, 2, 9).bfloat16()), "out must have shape"),
    "out_stride": (lambda a: a.update(out=torch.empty(3, 2, 16).bfloat16()[..., :8]), "dimensions of out must be contiguous"),
    "backend": (lambda a: a.update(backend="numpy"), "backend is 'numpy'"),
}


@pytest.mark.parametrize("case", REJECTED.values(), ids=REJECTED.keys())
def test_gate_rejects(case):
    change, words = case
    args = dict(zip(GRADS, make_inputs(3, 2, 8, torch.bfloat16), strict=True))
    change(args)
    with pytest.raises(ValueError, match=words):
        gate(**args)


def test_gate_rejects_what_is_no_tensor():
    hidden, key, value, w_hidden, w_key = make_inputs(3, 2, 8, torch.bfloat16)
    for changed in ((None, key), (hidden, key.tolist())):
        with pytest.raises(TypeError, match="must be a tensor"):
            gate(*changed, value, w_hidden, w_key)


def test_gate_rejects_overlapping_out(compiled):
    buffer = torch.zeros(4, 2, 8)
    _, key, value, w_hidden, w_key = make_inputs(3, 2, 8, torch.float32)
    with pytest.raises(ValueError, match="out shares memory with hidden"):
        gate(buffer[:3], key, value, w_hidden, w_key, out=buffer[1:])
    with pytest.raises(ValueError, match="out shares memory with key"):
        gate(torch.zeros(3, 2, 8), key, value, w_hidden, w_key, out=key)
    with pytest.raises(ValueError, match="out shares memory with value"):
        gate(torch.zeros(3, 2, 8), key, buffer[:3, 1], w_hidden, w_key, out=buffer[:3])


def test_gate_rejects_out_where_a_gradient_is_wanted(backend, device):
    inputs = make_inputs(3, 2, 8, torch.float32, device)
    out, weight = torch.empty_like(inputs[0]), inputs[4].requires_grad_()
    with pytest.raises(ValueError, match="out cannot be given while an input requires grad"):
        gate(*inputs, out=out, backend=backend)
    with torch.no_grad():
        assert gate(*inputs, out=out, backend=backend) is out
    assert weight.grad is None


def test_gate_op_called_directly_is_checked(compiled):
    # the op itself never reads out of bounds, whoever calls it
    hidden, key, value, w_hidden, w_key = make_inputs(3, 2, 8, torch.float32)
    op, options = torch.ops.engram_kernels.gate, (None, 1e-6, 1e-6, "copysign", True)
    for args in ((hidden, key[:2], value, w_hidden, w_key), (hidden, key, value[:, :7], w_hidden, w_key),
                 (hidden, key, value, w_hidden[:1], w_key), (hidden, key, value, w_hidden, w_key.half()),
                 (hidden[0], key, value, w_hidden, w_key)):
        with pytest.raises(ValueError, match="gate: "):
            op(*args, *options)
        with pytest.raises(ValueError, match="gate: "):
            torch.ops.engram_kernels.gate_bwd(hidden, *args, *options)
    shapes = f"gate: grad_out has shape {[2, *hidden.shape[1:]]}, expected {list(hidden.shape)}"
    with pytest.raises(ValueError, match=re.escape(shapes)):
        torch.ops.engram_kernels.gate_bwd(hidden[:2], hidden, key, value, w_hidden, w_key, *options)


def on_threads(count, function):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


def test_gate_threads_give_the_same_bits(backend, device):
    tokens = 7 if device == "cpu" and backend == "triton" else 67  # the interpreter is slow
    inputs = make_inputs(tokens, 3, 1030, torch.bfloat16, device)
    grad_out = torch.randn(tokens, 3, 1030, device=device).bfloat16()
    one, many = (on_threads(n, lambda: gate(*inputs, backend=backend)) for n in (1, 7))
    assert torch.equal(one, many)
    if backend == "reference":
        return  # torch's own reductions make no such promise
    one, many = (on_threads(n, lambda: gradients(gate, inputs, grad_out, backend=backend)) for n in (1, 7))
    for name, a, b in zip(GRADS, one, many, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("add_residual", [True, False], ids=["residual", "update_only"])
@pytest.mark.parametrize("zero_sign", ["copysign", "sign"])
def test_gate_gradcheck(zero_sign, add_residual):
    inputs = [x.requires_grad_() for x in make_inputs(4, 2, 5, torch.float64)]
    mask = torch.tensor([False, False, True, False])
    assert torch.autograd.gradcheck(lambda *x: reference(*x, mask, 1e-6, 1e-6, zero_sign, add_residual), inputs)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", [*CASES.values(), (100, 2, 64)], ids=[*CASES.keys(), "many_chunks"])
def test_gate_backward_matches_reference(case, dtype, backend, device):
    if device == "cpu" and backend == "triton":
        case = (min(case[0], 20), *case[1:])  # the interpreter is slow
    inputs = make_inputs(*case, dtype, device)
    mask = torch.arange(case[0], device=device) % 4 == 2
    grad_out = make_inputs(*case, dtype, device, seed=1)[0]
    got = gradients(gate, inputs, grad_out, mask=mask, backend=backend)
    want = gradients(exact, [x.double() for x in inputs], grad_out.double(), mask=mask)
    assert_rows_as_accurate(got, lambda *x: gradients(plain, x[:5], x[5], mask=mask), [*inputs, grad_out], want)


def test_gate_backward_options_match_reference(backend, device):
    inputs = make_inputs(5, 2, 33, torch.float32, device, seed=2)
    grad_out = make_inputs(5, 2, 33, torch.float32, device, seed=3)[0]
    options = dict(eps=0.1, clamp=0.2, zero_sign="sign", add_residual=False)  # some |x| lie inside this clamp
    got = gradients(gate, inputs, grad_out, backend=backend, **options)
    want = gradients(exact, [x.double() for x in inputs], grad_out.double(), **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_gate_backward_is_zero_inside_the_clamp(backend, device):
    hidden, key, value, w_hidden, w_key = make_inputs(3, 2, 33, torch.float32, device)
    key.zero_()  # x = 0, as for a row id of -1
    grad_out = torch.randn(3, 2, 33, device=device)
    grads = gradients(gate, (hidden, key, value, w_hidden, w_key), grad_out, backend=backend)
    assert torch.equal(grads[0], grad_out)
    assert not grads[1].any() and not grads[3].any() and not grads[4].any() and grads[2].any()


@pytest.mark.parametrize("add_residual", [True, False], ids=["residual", "update_only"])
def test_gate_backward_of_masked_token(add_residual, backend, device):
    inputs = make_inputs(3, 2, 40, torch.bfloat16, device)
    inputs[0][1, 0, 0] = inputs[1][1] = inputs[2][1] = float("nan")
    mask = torch.tensor([False, True, False], device=device)
    grad_out = torch.randn(3, 2, 40, device=device).bfloat16()
    grads = gradients(gate, inputs, grad_out, mask=mask, add_residual=add_residual, backend=backend)
    assert torch.equal(grads[0][1], grad_out[1] if add_residual else torch.zeros_like(grad_out[1]))
    assert not grads[1][1].any() and not grads[2][1].any()
    assert all(g.isfinite().all() for g in grads)


def test_gate_backward_of_broadcast_gradient(backend, device):
    inputs = [x.requires_grad_() for x in make_inputs(3, 2, 20, torch.float32, device)]
    got = torch.autograd.grad(gate(*inputs, backend=backend).sum(), inputs)  # its gradient has strides 0
    want = gradients(exact, [x.double() for x in inputs], torch.ones(3, 2, 20, device=device).double())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_gate_opcheck(compiled):
    mask = torch.tensor([False, True, False])
    options = (1e-6, 1e-6, "copysign", True)
    ops = torch.ops.engram_kernels
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(3, 2, 40, dtype)
        torch.library.opcheck(ops.gate.default, (*(x.clone().requires_grad_() for x in inputs), mask, *options))
        torch.library.opcheck(ops.gate.default, (*inputs, None, *options))
        torch.library.opcheck(ops.gate.out, (*inputs, mask, *options), {"out": torch.empty(3, 2, 40, dtype=dtype)})
        torch.library.opcheck(ops.gate_bwd.default, (inputs[0].flip(0), *inputs, mask, *options))


def test_gate_compiles(compiled):
    inputs = make_inputs(5, 2, 40, torch.bfloat16)
    mask = torch.tensor([False, True, False, False, False])

    def step(hidden, key, value, w_hidden, w_key):
        return gate(hidden, key * 2, value, w_hidden, w_key, mask) * 3

    fused = torch.compile(step, fullgraph=True)
    assert torch.equal(fused(*inputs), step(*inputs))
    grad_out = torch.randn(5, 2, 40).bfloat16()
    for a, b in zip(gradients(fused, inputs, grad_out), gradients(step, inputs, grad_out), strict=True):
        assert torch.equal(a, b)

    def into(hidden, out):
        gate(hidden, *inputs[1:], mask, out=out)
        return out + 1

    out = torch.empty_like(inputs[0])
    assert torch.equal(torch.compile(into, fullgraph=True)(inputs[0], out), gate(*inputs, mask) + 1)


def test_gate_allocates_only_its_output(compiled):
    inputs = make_inputs(64, 2, 512, torch.bfloat16)

    def allocated(run):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        return sum(e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0)

    assert allocated(lambda: gate(*inputs)) == inputs[0].numel() * 2
    assert allocated(lambda: gate(*inputs, out=inputs[0])) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_gate_rounds_once(dtype, eps, backend, device):
    hidden, key, value, w_hidden, w_key = make_inputs(6, 4, 512, dtype, device)
    key = key * 0.1  # so that eps counts
    got = gate(hidden, key, value, w_hidden, w_key, eps=eps, backend=backend)
    assert_rounded_once(got.cpu(), exact(*(x.cpu() for x in (hidden, key, value, w_hidden, w_key)), eps=eps))
