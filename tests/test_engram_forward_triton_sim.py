"""engram_forward in Triton: the compiled PTX on the simulator, against the reference, and what it moves beside the three steps.

sm_80 code: the matrix instructions of later targets are not simulated.
"""
import pytest
import torch
from test_engram_forward import exact, make_inputs, plain
from triton_sim import MISSING_TRITON, simulate, total

from engram_kernels.testing import assert_as_accurate_as_torch

pytestmark = pytest.mark.skipif(bool(MISSING_TRITON), reason=MISSING_TRITON)
OPTIONS = (1e-6, 1e-6, "copysign")


def run(inputs, mask=None, add_residual=True, out=None, **options):
    from engram_kernels.triton_kernels.engram_forward import engram_forward
    hidden, table, *rest = inputs
    return simulate(lambda: engram_forward(hidden, table.rows, table.scales, *rest, mask, table.row_format, table.row_dim,
                                           table.zero_scale_is_zero, *OPTIONS, add_residual, out), arch=80, **options)


@pytest.mark.parametrize(("shape", "row_format", "dtype"), [
    ((5, 2, 40, 3, 64), "fp8_e4m3_block32", torch.bfloat16), ((3, 4, 128, 2, 256), "bf16", torch.bfloat16),
    ((70, 1, 37, 3, 13), "bf16", torch.bfloat16), ((17, 2, 40, 2, 160), "fp8_e4m3_block32_packed", torch.float16),
    ((5, 2, 24, 2, 32), "int8_group32", torch.float32)], ids=["fp8", "bf16", "odd_large_class", "packed_f16", "int8_f32"])
def test_engram_forward_matches_reference(shape, row_format, dtype):
    inputs = make_inputs(*shape, row_format, dtype)
    mask = torch.arange(shape[0]) % 3 == 1
    inputs[2][mask] = 10**6  # not looked at
    got, _ = run(inputs, mask, cta_order="random", race=shape[0] < 70)
    assert torch.equal(got[mask], inputs[0][mask])
    want = exact(*inputs, mask)
    assert_as_accurate_as_torch(got, plain(*inputs, mask), want)


def test_engram_forward_in_place_and_update_only():
    inputs = make_inputs(4, 2, 40, 3, 64, "fp8_e4m3_block32", torch.bfloat16)
    want, _ = run(inputs)
    update, _ = run(inputs, add_residual=False)
    torch.testing.assert_close(inputs[0] + update, want, rtol=2**-6, atol=2**-6)
    got, _ = run(inputs, out=inputs[0])
    assert got is inputs[0] and torch.equal(got, want)


def test_engram_forward_bad_ids_are_counted_once(monkeypatch):
    from engram_kernels.triton_kernels import engram_forward as module
    errors = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(module, "error_counter", lambda op, device: errors)
    inputs = make_inputs(3, 2, 40, 2, 256, "fp8_e4m3_block32", torch.bfloat16)  # rows in two pieces
    inputs[2][0] = torch.tensor([-2, 2**40])
    got, _ = run(inputs)
    assert torch.equal(got[0], inputs[0][0]) and errors.item() == 2


# V4.1 over 40: H 5120 -> 128, C * D 6144 -> 160, and the batch too, so that weights and activations keep their shares
BRANCHES, SIZE, COLUMNS, ROW_DIM, SCALE = 4, 128, 5, 32, 40


# bf16 rows are twice as many bytes, and are read twice
@pytest.mark.parametrize(("row_format", "at_most"), [("fp8_e4m3_block32", 0.7), ("bf16", 0.73)])
def test_engram_forward_moves_less_than_three_steps(row_format, at_most):
    """Distinct bytes of each buffer, summed over the launches, beside the least that gather, product and gate can move."""
    tokens = 16384 // SCALE
    inputs = make_inputs(tokens, BRANCHES, SIZE, COLUMNS, ROW_DIM, row_format, torch.bfloat16, num_rows=tokens * COLUMNS)
    hidden, table, row_ids, w_kv, w_hidden, w_key = inputs
    row_ids.copy_(torch.randperm(tokens * COLUMNS, generator=torch.Generator().manual_seed(3)).view_as(row_ids))
    _, launches = run(inputs, race=False)
    moved = total(launches, "unique_bytes_read") + total(launches, "unique_bytes_written")
    stored = table.rows.nbytes + (0 if table.scales is None else table.scales.nbytes) + row_ids.nbytes
    memory, kv = tokens * COLUMNS * ROW_DIM * 2, tokens * (BRANCHES + 1) * SIZE * 2
    gather, product = stored + memory, memory + w_kv.nbytes + kv
    gate = 2 * hidden.nbytes + kv + w_hidden.nbytes + w_key.nbytes
    ratio = moved / (gather + product + gate)
    print(f"engram_forward, {row_format}: {ratio:.3f} of the bytes of the three steps")
    assert ratio <= at_most
    assert not any(name in launch.result.buffers for launch in launches for name in ("key", "value"))
