"""What no op may do in silence: write where it reads, drop a derivative, hide a write from autograd."""
import pytest
import torch
from torch.autograd import forward_ad

import engram_kernels as ek

pytestmark = pytest.mark.usefixtures("compiled")
T, M, C, D = 64, 1, 8, 16
LAYOUT = ek.EngramSpec.deepseek_v41(vocab_size=500, num_classes=500, table_sizes=(10_000,) * 3).layout()


def in_memory_of(out, like):
    """A tensor with the values of `like` that lies in the memory of `out`."""
    shared = out.view(-1).view(torch.uint8)[:like.nbytes].view(like.dtype).view(like.shape)
    return shared.copy_(like)


def calls(dtype=torch.float32):
    """op -> (run(**inputs, out=), inputs, out)."""
    rand = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(T, M, C * D, generator=rand), torch.ones(M, C * D)
    cu = torch.tensor([0, T], dtype=torch.int32)
    ids = torch.randint(0, 9, (T, C), generator=rand)
    dead = torch.zeros(T, dtype=torch.bool)

    def gather_gate(hidden, rows, scales, row_ids, w_hidden, w_key, mask, out):
        ek.gather_gate(hidden, ek.RowTable.from_tensor(rows, scales, "int8_group32"), row_ids, w_hidden, w_key, mask, out=out)

    def gather_rows(rows, scales, row_ids, out):
        ek.gather_rows(ek.RowTable.from_tensor(rows, scales, "int8_group32"), row_ids, torch.float32, out=out)

    def ngram_hash(token_ids, cu_seqlens, history, dead_mask, token_map, out):
        token_map = ek.TokenMap(token_map, 500, "x")
        ek.ngram_hash(token_ids, cu_seqlens, LAYOUT, token_map, history, dead_mask, out=out)

    def row_update(rows, row_ids, grad_rows, second, first, steps, out):
        ek.row_update(ek.RowTable.from_tensor(rows, row_format="f32"), row_ids, grad_rows, lr=0.1, second=second, first=first,
                      steps=steps, out=out)

    int8 = dict(rows=torch.ones(9, 32, dtype=torch.int8), scales=torch.ones(9, 1))
    state = dict(state=torch.zeros(1, 9, M, C * D), positions=torch.zeros(1, dtype=torch.int32))
    moments = dict(second=torch.ones(9, 1), first=torch.ones(9, 1), steps=torch.ones(9, dtype=torch.int32))
    return {
        "gate": (ek.gate, dict(hidden=hidden, key=hidden.clone(), value=hidden[:, 0].clone(), w_hidden=weight,
                               w_key=weight.clone(), mask=dead), torch.empty_like(hidden), {"hidden"}),
        "gather_gate": (gather_gate, dict(hidden=hidden, **int8, row_ids=ids[:, :4].contiguous(), w_hidden=weight,
                                          w_key=weight.clone(), mask=dead), torch.empty_like(hidden), {"hidden"}),
        "gather_rows": (gather_rows, dict(**int8, row_ids=ids), torch.empty(T, C, 32), set()),
        "ngram_hash": (ngram_hash, dict(token_ids=ids[:, 0].contiguous(), cu_seqlens=cu, dead_mask=dead,
                                        history=torch.zeros(1, 3, dtype=torch.int64), token_map=torch.arange(500).int()),
                       torch.empty(2, T, 24, dtype=torch.int32), set()),
        "short_conv": (ek.short_conv, dict(x=hidden, weight=torch.ones(M, C * D, 4), norm_weight=weight, cu_seqlens=cu,
                                           dilation=3, **state), torch.empty_like(hidden), set()),
        "row_update": (row_update, dict(rows=torch.ones(9, 1), row_ids=ids[:, 0].int(), grad_rows=hidden[:, :, 0].clone(),
                                        **moments), torch.empty(T), set()),
    }


OVERLAPS = [(op, name) for op, (_, inputs, _, same) in calls().items() for name, x in inputs.items()
            if isinstance(x, torch.Tensor) and name not in same]


@pytest.mark.parametrize("op, name", OVERLAPS)
def test_safety_out_that_shares_memory_is_refused(op, name):
    run, inputs, out, _ = calls()[op]
    run(**inputs, out=out)  # apart, it is fine
    inputs[name] = in_memory_of(out, inputs[name])
    with pytest.raises(ValueError, match=f"{op}: out shares memory with"):
        run(**inputs, out=out)


@pytest.mark.parametrize("name", ["x", "weight", "cu_seqlens", "positions"])
def test_safety_state_that_shares_memory_is_refused(name):
    run, inputs, out, _ = calls()["short_conv"]
    if name == "x":
        inputs |= dict(cu_seqlens=torch.tensor([0, 9], dtype=torch.int32), x=inputs["state"][0])
        out = out[:9]
    else:
        inputs[name] = in_memory_of(inputs["state"], inputs[name])
    with pytest.raises(ValueError, match=f"short_conv: state shares memory with {name}"):
        run(**inputs, out=out)


@pytest.mark.parametrize("written", ["rows", "second", "first", "steps"])
@pytest.mark.parametrize("name", ["rows", "row_ids", "grad_rows", "second", "first", "steps"])
def test_safety_rows_and_moments_that_share_memory_are_refused(written, name):
    run, inputs, out, _ = calls()["row_update"]
    inputs["row_ids"], inputs["grad_rows"] = inputs["row_ids"][:9].contiguous(), inputs["grad_rows"][:9].contiguous()
    if name == written:
        return run(**inputs, out=out[:9])
    before = {key: x.clone() for key, x in inputs.items()}
    inputs[name] = in_memory_of(inputs[written], inputs[name].clone())
    before[written] = inputs[written].clone()
    with pytest.raises(ValueError, match=f"row_update: .*({name}|{written}|weight) shares memory with"):
        run(**inputs, out=out[:9])
    assert all(torch.equal(inputs[key], before[key]) for key in inputs if key != written)


@pytest.mark.parametrize("op", calls())
def test_safety_writes_are_seen_by_autograd(op):
    run, inputs, out, _ = calls()[op]
    before = out._version
    run(**inputs, out=out)
    assert out._version > before
    if op == "short_conv":
        assert inputs["state"]._version > 0
    if op == "row_update":
        assert all(inputs[name]._version > 0 for name in ("rows", "second", "first", "steps"))


def test_safety_a_saved_tensor_that_is_overwritten_raises():
    run, inputs, out, _ = calls()["gate"]
    p = torch.ones_like(out, requires_grad=True)
    loss = (p * out.fill_(3.0)).sum()
    run(**inputs, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


MIXED = {
    "gate": lambda x, other: torch.ops.engram_kernels.gate(x, other, x[:, 0], x[0], x[0], None, 1e-6, 1e-6, "sign", True),
    "gather_rows": lambda x, other: torch.ops.engram_kernels.gather_rows(other[:, 0], None, torch.zeros(3).int(), "f32", C * D,
                                                                         False, torch.float32),
    "short_conv": lambda x, other: torch.ops.engram_kernels.short_conv(x, torch.ones(M, C * D, 4), other[0],
                                                                       torch.tensor([0, T]).int(), 1, 1e-5),
    "row_update": lambda x, other: torch.ops.engram_kernels.row_update(x[:, 0], None, torch.zeros(T).int(), other[:, 0], None,
                                                                       None, None, "f32", C * D, False, "sgd", 0.1, 0.9, 0.9,
                                                                       1e-8, 1.0, 0, False, 0, 0),
}


@pytest.mark.parametrize("op", MIXED)
def test_safety_tensors_of_two_devices_are_refused(op):
    x = torch.ones(T, M, C * D)
    MIXED[op](x, x.clone())
    with pytest.raises(ValueError, match=f"{op}: the tensors are on cpu and meta, expected one device"):
        MIXED[op](x, x.to("meta"))


DIFFERENTIABLE = {
    "gate": lambda x: ek.gate(x, x.detach(), x.detach()[:, 0], torch.ones(M, C * D), torch.ones(M, C * D)),
    "gather_gate": lambda x: ek.gather_gate(x, ek.RowTable.from_tensor(torch.ones(9, 32), row_format="f32"),
                                            torch.zeros(T, 4, dtype=torch.int32), torch.ones(M, C * D), torch.ones(M, C * D)),
    "short_conv": lambda x: ek.short_conv(x, torch.ones(M, C * D, 4), torch.ones(M, C * D), torch.tensor([0, T]).int(), 3),
}


WRITES = {"row_update": lambda x: ek.row_update(ek.RowTable.from_tensor(torch.ones(9, C * D), row_format="f32"),
                                                torch.zeros(T, M, dtype=torch.int32), x, "sgd", lr=0.1)}


@pytest.mark.parametrize("op", DIFFERENTIABLE | WRITES)
def test_safety_forward_mode_is_refused(op):
    x, call = torch.randn(T, M, C * D), (DIFFERENTIABLE | WRITES)[op]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{op}: the compiled op has no forward-mode"):
        call(forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_safety_second_derivative_is_refused(op):
    x = torch.randn(T, M, C * D, requires_grad=True)
    grad, = torch.autograd.grad(DIFFERENTIABLE[op](x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{op}: there is no second derivative"):
        torch.autograd.grad(grad.pow(2).sum(), x)


def test_safety_long_dilation_takes_no_memory():
    x, weight, norm = torch.randn(2, 1, 8, requires_grad=True), torch.ones(1, 8, 4), torch.ones(1, 8)
    cu = torch.tensor([0, 2], dtype=torch.int32)
    out = ek.short_conv(x, weight, norm, cu, 200_000_000)
    out.sum().backward()  # a ring of that many rows would be terabytes
    torch.testing.assert_close(out, ek.short_conv(x, weight, norm, cu, 5, backend="reference"))


@pytest.mark.parametrize("scale", [-1e3, -1e36, -1e38, -3e38])
def test_safety_silu_of_very_negative_values_is_zero(scale, isa):
    weight = torch.zeros(1, 16, 4)
    weight[:, :, 3] = scale
    out = ek.short_conv(torch.ones(1, 1, 16), weight, torch.ones(1, 16), torch.tensor([0, 1], dtype=torch.int32), 1)
    torch.testing.assert_close(out, torch.ones(1, 1, 16), rtol=0, atol=1e-30)
