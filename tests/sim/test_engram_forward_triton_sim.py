"""engram_forward in Triton: the compiled PTX on the simulator, against the reference, and what it moves beside the three steps.

sm_80 code: the matrix instructions of later targets are not simulated.
"""
import functools

import pytest
import torch
from test_engram_forward import exact, make_inputs, plain
from triton_sim import MISSING_TRITON, simulate, total

from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.spec import EngramSpec
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


V41 = EngramSpec.deepseek_v41()
BATCH = 16384
SCALE = 40  # H 5120 -> 128, C * D 6144 -> 160, and the batch too, so that weights and activations keep their shares


def three_steps_bytes(inputs):
    """The least that gather, product and gate can move, one after the other, where no row is read twice."""
    hidden, rows, scales, row_ids, w_kv, w_hidden, w_key = inputs
    tokens, branches, size = hidden.shape
    memory, kv = tokens * w_kv.shape[1] * 2, tokens * (branches + 1) * size * 2
    stored = row_ids.numel() * rows[0].nbytes + (0 if scales is None else row_ids.numel() * scales[0].nbytes)
    gather, product = stored + row_ids.nbytes + memory, memory + w_kv.nbytes + kv
    return gather + product + 2 * hidden.nbytes + kv + w_hidden.nbytes + w_key.nbytes


def fused_bytes(launches, row_ids, branches):
    """What the kernels move, from the tensors of their launches: each once a launch, of w_kv the part that it multiplies with."""
    moved = 0
    for variant, args in launches:
        by_name = dict(zip(variant.kernel.arg_names, args, strict=False))
        scores = "w_hidden" in by_name
        for name, x in by_name.items():
            if not isinstance(x, torch.Tensor) or name == "errors":
                continue
            if name in ("rows", "scales"):
                moved += row_ids.numel() * x[0].nbytes
            elif name == "w_kv":
                moved += x.nbytes * (branches if scores else 1) // (branches + 1)
            else:
                moved += x.nbytes
    return moved


def v41_inputs(row_format, device="meta", scale=1, columns=24, row_dim=256):
    """[hidden, rows, scales, row_ids, w_kv, w_hidden, w_key] of a batch, its widths and tokens over `scale`; no row twice."""
    tokens, size, branches = BATCH // scale, V41.hidden_size // scale, V41.branches
    if device == "meta":
        make = functools.partial(torch.empty, device="meta")
        stored = ROW_FORMATS[row_format]
        shape = stored.scale_shape(64, row_dim)
        rows, scales = make(64, stored.width(row_dim), dtype=stored.dtype), shape and make(shape, dtype=stored.scale_dtype)
        hidden, w_kv = make(tokens, branches, size, dtype=torch.bfloat16), make(5 * size, columns * row_dim, dtype=torch.bfloat16)
        return [hidden, rows, scales, make(tokens, columns, dtype=torch.int32), w_kv, hidden[0], hidden[0]]
    hidden, table, _, *rest = make_inputs(tokens, branches, size, columns, row_dim, row_format, torch.bfloat16, tokens * columns)
    row_ids = torch.randperm(tokens * columns, generator=torch.Generator().manual_seed(3)).view(tokens, columns).int()
    return [hidden, table.rows, table.scales, row_ids, *rest]


@pytest.mark.parametrize("row_format", ["fp8_e4m3_block32", "bf16"])
def test_engram_forward_moves_less_than_three_steps(row_format):
    """Distinct bytes of each buffer, summed over the launches, are at most 0.7x of those of gather, product and gate.

    The simulation, over 40, shows that a launch moves each of its tensors once; from that follows the figure of the whole size.
    Scaled down it is higher, for the sums of a token and branch do not scale; with none it would be 0.694 for bf16 rows.
    """
    from engram_kernels.triton_kernels.engram_forward import engram_forward
    from engram_kernels.triton_runtime import launch

    def call(inputs, row_dim):
        return engram_forward(*inputs, None, row_format, row_dim, False, *OPTIONS, True)

    small = v41_inputs(row_format, "cpu", SCALE, columns=5, row_dim=32)
    _, launches = simulate(lambda: call(small, 32), arch=80, race=False)
    moved = total(launches, "unique_bytes_read") + total(launches, "unique_bytes_written")
    recorded = []
    with launch.executing_on(lambda variant, grid, args: recorded.append((variant, args)), "sm_80"):
        call(small, 32)
    assert moved == fused_bytes(recorded, small[3], V41.branches)
    assert not any(name in made.result.buffers for made in launches for name in ("key", "value"))

    whole, recorded = v41_inputs(row_format), []
    with launch.executing_on(lambda variant, grid, args: recorded.append((variant, args)), "sm_90"):
        call(whole, 256)
    ratio = fused_bytes(recorded, whole[3], V41.branches) / three_steps_bytes(whole)
    print(f"engram_forward, {row_format}: {ratio:.4f} of the bytes of the three steps; "
          f"scaled down {moved / three_steps_bytes(small):.4f}")
    assert ratio <= 0.7
