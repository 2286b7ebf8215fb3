"""Backward of engram_forward, which computes keys and value again, against gather_rows, a linear and gate."""
import pytest
import torch
from test_engram_forward import NUM_ROWS, make_inputs, op_args
from torch.nn.functional import linear

import engram_kernels as ek
from engram_kernels import _steps
from engram_kernels.table.row_table import RowTable

OP = "engram_forward"
NAMES = ("hidden", "rows", "w_kv", "w_hidden", "w_key")
ROW_FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def gradients(function, leaves, grad_out):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    return torch.autograd.grad(function(*leaves), leaves, grad_out)


def make_case(tokens, dtype, device="cpu"):
    """(leaves in the order of NAMES, row_ids, mask, grad_out); one row id of a masked token is out of range."""
    hidden, table, row_ids, *weights = make_inputs(tokens, 2, 40, 3, 32, ROW_FORMATS[dtype], dtype, device=device)
    mask = torch.arange(tokens, device=device) % 4 == 1
    row_ids[mask] = NUM_ROWS + 7
    grad_out = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    return (hidden, table.rows, *weights), row_ids, mask, grad_out


def fused(row_ids, mask, backend="auto"):
    def run(hidden, rows, w_kv, w_hidden, w_key):
        table = RowTable.from_tensor(rows, row_format=ROW_FORMATS[rows.dtype])
        return ek.engram_forward(hidden, table, row_ids, w_kv, w_hidden, w_key, mask, backend=backend)
    return run


def steps(row_ids, mask, backend="auto"):
    def run(hidden, rows, w_kv, w_hidden, w_key):
        table = RowTable.from_tensor(rows, row_format=ROW_FORMATS[rows.dtype])
        memory = ek.gather_rows(table, row_ids.masked_fill(mask[:, None], -1), hidden.dtype, backend=backend)
        kv = linear(memory.flatten(1), w_kv).unflatten(1, (-1, hidden.shape[2]))
        return ek.gate(hidden, kv[:, :-1], kv[:, -1], w_hidden, w_key, mask, backend=backend)
    return run


@pytest.mark.parametrize(("dtype", "chunk"), [(torch.float32, 4), (torch.bfloat16, 4), (torch.float16, 100)],
                         ids=["f32-chunks", "bf16-chunks", "f16-one_chunk"])
def test_engram_forward_backward_is_that_of_its_steps(dtype, chunk, backend, device, monkeypatch):
    monkeypatch.setattr(_steps, "CHUNK_TOKENS", chunk)
    leaves, row_ids, mask, grad_out = make_case(6, dtype, device)
    got = gradients(fused(row_ids, mask, backend), leaves, grad_out)
    want = gradients(steps(row_ids, mask, backend), leaves, grad_out)
    tolerance = 1e-4 if dtype == torch.float32 else 2**-6
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(got[0][mask], grad_out[mask])


def test_engram_forward_backward_sums_chunks_in_float32(compiled, monkeypatch):
    """The gradient of w_kv over many chunks is as near to the exact one as that of one product."""
    leaves, row_ids, mask, grad_out = make_case(96, torch.bfloat16)
    want = gradients(steps(row_ids, mask), [x.float() for x in leaves], grad_out.float())[2]

    def error(chunk):
        monkeypatch.setattr(_steps, "CHUNK_TOKENS", chunk)
        return (gradients(fused(row_ids, mask), leaves, grad_out)[2].float() - want).square().mean().sqrt().item()
    assert error(2) < 1.5 * error(96)


def test_engram_forward_backward_saves_its_inputs_alone(backend, device):
    leaves, row_ids, mask, _ = make_case(5, torch.float32, device)
    leaves = [x.requires_grad_() for x in leaves]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        fused(row_ids, mask, backend)(*leaves)
    known = {x.data_ptr() for x in (*leaves, row_ids, mask)}
    if backend != "reference":
        assert saved and all(x.data_ptr() in known for x in saved)


def test_engram_forward_backward_of_what_is_needed(backend, device):
    """A table of fp8 and a frozen projection: neither has a gradient, and neither costs a product."""
    hidden, table, row_ids, w_kv, w_hidden, w_key = make_inputs(5, 2, 40, 3, 32, "fp8_e4m3_block32", torch.float32, device=device)
    got = gradients(lambda h, w, k: ek.engram_forward(h, table, row_ids, w_kv, w, k, backend=backend), (hidden, w_hidden, w_key),
                    torch.ones_like(hidden))
    memory = ek.gather_rows(table, row_ids, torch.float32, backend=backend).flatten(1)
    kv = (memory @ w_kv.T).unflatten(1, (3, 40))
    want = gradients(lambda h, w, k: ek.gate(h, kv[:, :2], kv[:, 2], w, k, backend=backend), (hidden, w_hidden, w_key),
                     torch.ones_like(hidden))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_engram_forward_backward_computes_what_is_needed(compiled):
    leaves, row_ids, mask, grad_out = make_case(5, torch.float32)
    args = op_args(leaves[0], RowTable.from_tensor(leaves[1], row_format="f32"), row_ids, *leaves[2:], mask)
    shapes = [tuple(x.shape) for x in torch.ops.engram_kernels.engram_forward_bwd(grad_out, *args, False, False)]
    assert shapes == [(5, 2, 40), (0,), (0,), (2, 40), (2, 40)]
    gathered = []

    def gather_rows(rows, scales, ids, *options, out):
        gathered.append(ids)
        return torch.ops.engram_kernels.gather_rows.out(rows, scales, ids, *options, out=out)
    wrong = row_ids.clone()
    wrong[0] = torch.tensor([-2, 3, NUM_ROWS])  # counted by forward; on a GPU it does not raise
    _steps.backward(gather_rows, torch.ops.engram_kernels.gate_bwd.default, grad_out, *args[:3], wrong, *args[4:], True, True)
    assert gathered[0][0].tolist() == [-1, 3, -1] and (gathered[0][mask] == -1).all()


def test_engram_forward_backward_without_tokens(compiled):
    leaves, row_ids, mask, grad_out = make_case(3, torch.bfloat16)
    got = gradients(fused(row_ids[:0], mask[:0]), (leaves[0][:0], *leaves[1:]), grad_out[:0])
    assert [x.shape for x in got[1:]] == [x.shape for x in leaves[1:]] and not any(x.any() for x in got[1:])


def test_engram_forward_backward_under_autocast(backend, device):
    """As the other ops: the dtypes of the tensors hold, not autocast's."""
    leaves, row_ids, mask, grad_out = make_case(3, torch.float32, device)
    want = gradients(fused(row_ids, mask, backend), leaves, grad_out)
    leaves = [x.requires_grad_() for x in leaves]
    with torch.autocast(device, torch.bfloat16):
        out = fused(row_ids, mask, backend)(*leaves)
        if backend != "reference":  # whose backward is torch's
            got = torch.autograd.grad(out, leaves, grad_out)
    if backend == "reference":
        got = torch.autograd.grad(out, leaves, grad_out)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_engram_forward_backward_of_func_grad(backend, device):
    leaves, row_ids, mask, grad_out = make_case(4, torch.float32, device)
    if backend == "reference":
        mask = None  # its checks look at data, as those of a masked id do; it is the same op without one
        row_ids = row_ids % NUM_ROWS
    run = fused(row_ids, mask, backend)
    got = torch.func.grad(lambda w: (run(*leaves[:2], w, *leaves[3:]) * grad_out).sum())(leaves[2])
    torch.testing.assert_close(got, gradients(run, leaves, grad_out)[2], rtol=1e-5, atol=1e-5)


def test_engram_forward_has_no_second_derivative(compiled):
    leaves, row_ids, mask, _ = make_case(4, torch.float32)
    leaves = [x.requires_grad_() for x in leaves]
    grads = torch.autograd.grad(fused(row_ids, mask)(*leaves).sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="engram_forward: there is no second derivative"):
        grads[0].sum().backward()


def test_engram_forward_backward_opcheck(compiled):
    leaves, row_ids, mask, grad_out = make_case(4, torch.float32)
    row_ids = row_ids % NUM_ROWS
    args = op_args(leaves[0], RowTable.from_tensor(leaves[1], row_format="f32"), row_ids, *leaves[2:], mask)
    trained = [x.clone().requires_grad_() if i in (0, 1, 4, 5, 6) else x for i, x in enumerate(args)]
    op = torch.ops.engram_kernels
    torch.library.opcheck(op.engram_forward.default, tuple(trained))
    torch.library.opcheck(op.engram_forward_bwd.default, (grad_out, *args, True, False))
    for position, wrong in ((0, leaves[0][..., :39]), (3, row_ids[:2]), (4, leaves[2][:-1]), (9, 33)):
        with pytest.raises(ValueError, match="engram_forward: "):
            op.engram_forward_bwd(grad_out, *args[:position], wrong, *args[position + 1:], True, True)
    with pytest.raises(ValueError, match="engram_forward: grad_out must have shape"):
        op.engram_forward_bwd(grad_out[:3], *args, True, True)


def test_engram_forward_backward_compiles(compiled):
    leaves, row_ids, mask, grad_out = make_case(5, torch.bfloat16)
    table = RowTable.from_tensor(leaves[1], row_format="bf16")

    def step(hidden, w_kv, w_hidden, w_key):
        return ek.engram_forward(hidden, table, row_ids, w_kv * 2, w_hidden, w_key, mask) * 3
    trained = (leaves[0], *leaves[2:])
    compiled_step = torch.compile(step, fullgraph=True)
    for a, b in zip(gradients(compiled_step, trained, grad_out), gradients(step, trained, grad_out), strict=True):
        assert torch.equal(a, b)
