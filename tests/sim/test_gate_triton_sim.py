"""gate in Triton, forward and backward: the compiled PTX on the simulator, against the reference, and what it moves."""
import re
from pathlib import Path

import pytest
import torch
from op_cases import gate_inputs as make_inputs
from test_gate import assert_rows_as_accurate, exact, gradients, plain
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


def cuda_figure(kernel):
    """Bytes over the minimum that the CUDA kernel asks for at the shapes of V4.1, by its own simulation (docs/cuda.md)."""
    page = Path(__file__).parents[2] / "docs/cuda.md"
    return float(re.search(rf"^\| `{kernel}` \| [^|]*\| ([\d.]+) \|", page.read_text(), re.M)[1])


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


def test_gate_moves_the_least(programs):
    """Each input once and the output once; the weights once per program."""
    programs(2)
    inputs = make_inputs(6, 4, 5120, torch.bfloat16)
    out, launches = run(inputs, race=False)
    least = sum(x.nbytes for x in inputs[:3])
    assert total(launches, "load_bytes", ("hidden", "key", "value")) == least
    assert total(launches, "load_bytes", ("w_hidden", "w_key")) == 2 * (inputs[3].nbytes + inputs[4].nbytes)
    assert total(launches, "store_bytes") == total(launches, "unique_bytes_written") == out.nbytes
    assert total(launches, "store_sectors") <= 1.02 * out.nbytes / 32
    assert total(launches, "load_sectors", ("hidden", "key", "value")) <= 1.02 * least / 32


def test_gate_backward_moves_the_least(programs):
    """Every input and gradient once; at 12 tokens per program at most 1.05x of what the CUDA kernel asks for."""
    programs(1)
    tokens, inputs = 2, make_inputs(2, 4, 5120, torch.bfloat16)
    grads, launches = run_bwd(inputs[0].clone(), inputs, torch.zeros(2, dtype=torch.bool), race=False)
    data = 3 * inputs[0].nbytes + inputs[2].nbytes
    assert total(launches, "load_bytes", ("grad_out", "hidden", "key", "value")) == data
    assert total(launches, "load_sectors", ("grad_out", "hidden", "key", "value")) <= 1.02 * data / 32
    written = sum(g.nbytes for g in grads[:3])
    assert total(launches, "store_bytes", ("grad_hidden", "grad_key", "grad_value")) == written
    # a program adds the weights, which it asks the caches for again, and its sums, written and read; a call of two programs,
    # as in the figure of CUDA, weights and gradients
    weights = inputs[3].nbytes + inputs[4].nbytes
    of_program = (weights + total(launches, "load_bytes", ("partial_sums",)) + total(launches, "store_bytes", ("partial_sums",)) +
                  (weights + total(launches, "store_bytes", ("grad_w_hidden", "grad_w_key"))) / 2)
    assert total(launches, "unique_bytes_read", ("w_hidden", "w_key")) == 2 * weights
    least = 12 * (data + written) // tokens
    over, of_cuda = 1 + of_program / least, cuda_figure("gate backward")
    print(f"gate backward: {over:.3f} of the least bytes, CUDA {of_cuda}; weights asked of the caches "
          f"{total(launches[:1], 'load_bytes', ('w_hidden', 'w_key')) / (data + written):.2f} of the least")
    assert over <= 1.05 * of_cuda


def test_gate_backward_with_sums_apart(programs):
    """Where the weights' gradients do not fit beside the rows, hidden and key are read again for them; any order, same bits."""
    programs(2)
    inputs, grad_out = make_inputs(3, 8, 4096, torch.float32), make_inputs(3, 8, 4096, torch.float32, seed=1)[0]
    mask = torch.tensor([False, True, False])
    got, launches = run_bwd(grad_out, inputs, mask)
    assert [launch.variant.kernel.__name__ for launch in launches] == \
        ["gate_bwd_kernel", "gate_products_bwd_kernel", "gate_weights_bwd_kernel"]
    want = gradients(exact, [x.double() for x in inputs], grad_out.double(), mask=mask)
    assert_rows_as_accurate(got, lambda *x: gradients(plain, x[:5], x[5], mask=mask), [*inputs, grad_out], want)
    again, _ = run_bwd(grad_out, inputs, mask, cta_order="random")
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_gate_backward_passes_the_gradient_of_masked_tokens_bit_for_bit():
    """Minus zero, infinities and what weights of infinity would make of it."""
    inputs, grad_out = make_inputs(3, 2, 64, torch.bfloat16), make_inputs(3, 2, 64, torch.bfloat16, seed=1)[0]
    inputs[3][0, 3], inputs[4][1, 5] = float("inf"), float("nan")
    grad_out[1, :, :4] = torch.tensor([-0.0, 0.0, float("inf"), -float("inf")])
    mask = torch.tensor([False, True, False])
    for add_residual in (True, False):
        got, _ = run_bwd(grad_out, inputs, mask, add_residual)
        if add_residual:
            assert torch.equal(got[0][1].view(torch.int16), grad_out[1].view(torch.int16))
        else:
            assert not got[0][1].any()
        assert not got[1][1].any() and not got[2][1].any()
