"""gate in Triton, forward and backward: the compiled PTX on the simulator, against the reference, and what it moves."""
import pytest
import torch
from test_gate import assert_rows_as_accurate, exact, gradients, make_inputs, plain
from triton_sim import MISSING_TRITON, simulate, total

pytestmark = pytest.mark.skipif(bool(MISSING_TRITON), reason=MISSING_TRITON)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
OPTIONS = (1e-6, 1e-6, "copysign")


def run(inputs, mask=None, add_residual=True, out=None, **options):
    from engram_kernels.triton_kernels.gate import gate
    return simulate(lambda: gate(*inputs, mask, *OPTIONS, add_residual, out), **options)


def run_bwd(grad_out, inputs, mask=None, add_residual=True, **options):
    from engram_kernels.triton_kernels.gate import gate_bwd
    return simulate(lambda: gate_bwd(grad_out, *inputs, mask, *OPTIONS, add_residual), **options)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", [(5, 3, 37), (70, 2, 65), (2, 4, 5120)], ids=["odd_sizes", "large_class", "v41"])
def test_gate_matches_reference(shape, dtype):
    inputs = make_inputs(*shape, dtype)
    mask = torch.arange(shape[0]) % 3 == 1
    masked = [x.clone() for x in inputs]
    masked[1][mask], masked[2][mask] = float("nan"), float("inf")
    got, _ = run(masked, mask, cta_order="random", race=shape[0] < 70)
    assert torch.equal(got[mask], inputs[0][mask])
    assert_rows_as_accurate([got], lambda *x: [plain(*x, mask)], inputs, [exact(*inputs, mask=mask)])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", [(5, 3, 37), (2, 4, 5120)], ids=["odd_sizes", "v41"])
def test_gate_backward_matches_reference(shape, dtype):
    inputs, grad_out = make_inputs(*shape, dtype), make_inputs(*shape, dtype, seed=1)[0]
    mask = torch.arange(shape[0]) % 4 == 1
    masked = [torch.where(mask.view(-1, *[1] * (x.dim() - 1)), float("nan"), x) for x in inputs[:3]] + inputs[3:]
    got, _ = run_bwd(grad_out, masked, mask)
    want = gradients(exact, [x.double() for x in inputs], grad_out.double(), mask=mask)
    assert_rows_as_accurate(got, lambda *x: gradients(plain, x[:5], x[5], mask=mask), [*inputs, grad_out], want)
    again, _ = run_bwd(grad_out, masked, mask, cta_order="random")
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))  # weight gradients in any order of the programs


def test_gate_strided_and_in_place():
    fused = torch.randn(6, 4 * 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    key, value = fused[:, :120].view(6, 3, 40), fused[:, 120:]
    hidden, _, _, w_hidden, w_key = make_inputs(6, 3, 40, torch.bfloat16)
    want, _ = run([hidden, key.contiguous(), value.contiguous(), w_hidden, w_key])
    got, launches = run([hidden, key, value, w_hidden, w_key], out=hidden)
    assert got is hidden and torch.equal(got, want)
    assert launches[0].variant.aligned


@pytest.mark.parametrize("tokens", [6])
def test_gate_moves_the_least(tokens, monkeypatch):
    """Each input once and the output once; the weights once a program."""
    from engram_kernels.triton_kernels import tuning
    monkeypatch.setitem(tuning.DEFAULTS["gate"]["small"], "programs", 2)
    tuning._parameters.cache_clear()
    inputs = make_inputs(tokens, 4, 5120, torch.bfloat16)
    out, launches = run(inputs, race=False)
    tuning._parameters.cache_clear()
    least = sum(x.nbytes for x in inputs[:3])
    assert total(launches, "load_bytes", ("hidden", "key", "value")) == least
    assert total(launches, "load_bytes", ("w_hidden", "w_key")) == 2 * (inputs[3].nbytes + inputs[4].nbytes)
    assert total(launches, "store_bytes") == total(launches, "unique_bytes_written") == out.nbytes
    assert total(launches, "store_sectors") <= 1.02 * out.nbytes / 32
    assert total(launches, "load_sectors", ("hidden", "key", "value")) <= 1.02 * least / 32


def test_gate_backward_moves_little():
    inputs = make_inputs(4, 4, 5120, torch.bfloat16)
    grads, launches = run_bwd(inputs[0].clone(), inputs, race=False)
    data = total(launches, "load_bytes", ("grad_out", "hidden", "key", "value"))
    assert data == 3 * inputs[0].nbytes + inputs[2].nbytes + 2 * inputs[0].nbytes  # hidden and key again for the weights
    assert total(launches, "store_bytes", ("grad_hidden", "grad_key", "grad_value")) == sum(g.nbytes for g in grads[:3])
