"""What only a GPU can show: graphs, streams, tables in pinned host memory, errors that are counted. `make test-gpu`."""
import pytest
import torch

import engram_kernels as ek

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
T, M, C, D = 300, 4, 24, 256
H = C * D
LAYOUT = ek.EngramSpec.deepseek_v41(vocab_size=5000, num_classes=5000, table_sizes=(100_000,) * 3).layout()
TOKEN_MAP = ek.TokenMap(torch.arange(5000, dtype=torch.int32), 5000, "x")


def make_calls(device="cuda", seed=0):
    """op -> (call(out), out). The inputs are the same on every device."""
    rand = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=rand).bfloat16().to(device)
    tokens = torch.randint(0, 5000, (T,), generator=rand).to(device)
    cu_seqlens = torch.tensor([0, 17, 17, 250, T], dtype=torch.int32, device=device)
    packed = torch.randint(0, 120, (5000, 264), generator=rand, dtype=torch.uint8).to(device)
    table = ek.RowTable.from_tensor(packed, row_format="fp8_e4m3_block32_packed", row_dim=D)
    ids = torch.randint(-1, 5000, (T, C), generator=rand).to(device)
    hidden, key, value, w_hidden, w_key = randn(T, M, H), randn(T, M, H), randn(T, H), randn(M, H), randn(M, H)
    conv, norm, w_kv = randn(M, H, 4), randn(M, H), randn((M + 1) * H, 2 * D) / 22
    layout, token_map = LAYOUT.to(device), TOKEN_MAP.to(device)
    like = torch.empty_like
    rows, second, first = randn(5000, D), torch.ones(5000, device=device), randn(5000, D)
    kept, steps = (rows.clone(), second.clone(), first.clone()), torch.zeros(5000, dtype=torch.int32, device=device)

    def update(out):  # always of the same rows: the kernel is a function of what is given
        for x, old in zip((rows, second, first), kept, strict=True):
            x.copy_(old)
        return ek.row_update(ek.RowTable.from_tensor(rows), ids, update_grads, lr=0.1, second=second, first=first,
                             steps=steps.zero_(), rounding="stochastic", out=out)
    update_grads = randn(T, C, D)
    return {
        "ngram_hash": (lambda out: ek.ngram_hash(tokens, cu_seqlens, layout, token_map, out=out),
                       torch.empty(2, T, 24, dtype=torch.int32, device=device)),
        "gather_rows": (lambda out: ek.gather_rows(table, ids, out=out), like(randn(T, C, D))),
        "gate": (lambda out: ek.gate(hidden, key, value, w_hidden, w_key, out=out), like(hidden)),
        "gather_gate": (lambda out: ek.gather_gate(hidden, table, ids, w_hidden, w_key, out=out), like(hidden)),
        "engram_forward": (lambda out: ek.engram_forward(hidden, table, ids[:, :2], w_kv, w_hidden, w_key, out=out),
                           like(hidden)),
        "short_conv": (lambda out: ek.short_conv(hidden, conv, norm, cu_seqlens, 3, out=out), like(hidden)),
        "row_update": (update, torch.empty(T * C, device=device)),
    }


@pytest.fixture(params=ek.backends.ops())
def op(request):
    assert "cuda" in ek.backends.available(request.param), ek.backends.explain(request.param, "cuda")
    return request.param


def result(op, device):
    call, out = make_calls(device)[op]
    return call(out).cpu()


def assert_close(got, want):
    if want.dtype == torch.int32:
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=1e-2)


def test_every_op_runs(op):
    assert_close(result(op, "cuda"), result(op, "cpu"))
    ek.check_errors()


def test_graph_capture_and_replay(op):
    call, out = make_calls()[op]
    want = call(out).clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call(out)
        with torch.cuda.graph(graph, stream=stream):
            call(out)
    torch.cuda.synchronize()
    for _ in range(3):
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want)


def test_runs_on_the_current_stream(op):
    """The inputs of a side stream are ready late: a kernel on another stream would read the old ones."""
    call, out = make_calls()[op]
    want = call(out).clone()
    out.zero_()
    before = out.clone()  # and the kernels of clone and equal are loaded: loading one later could wait for the other stream
    assert torch.equal(before, out)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)
        call(out)
    before.copy_(out)
    torch.cuda.current_stream().synchronize()
    assert not stream.query(), "the call waited, or did not go to the side stream"
    assert before.count_nonzero() == 0
    stream.synchronize()
    assert torch.equal(out, want)


def test_bad_ids_are_zeros_and_raised_later():
    table = ek.RowTable.from_tensor(torch.ones(10, 64, dtype=torch.bfloat16, device="cuda"))
    rows = ek.gather_rows(table, torch.tensor([3, 10, -2, -1], device="cuda"))
    assert rows[0].eq(1).all() and rows[1:].eq(0).all()
    with pytest.raises(IndexError, match="gather_rows: 2 bad values .* on cuda:0"):
        ek.check_errors()
    ek.check_errors()  # it counts anew


def test_bad_ids_of_gather_gate_are_rows_of_zeros():
    table = ek.RowTable.from_tensor(torch.ones(10, 64, dtype=torch.bfloat16, device="cuda"))
    hidden, weight = torch.randn(2, 1, 128, device="cuda").bfloat16(), torch.ones(1, 128, device="cuda")
    got = ek.gather_gate(hidden, table, torch.tensor([[10, -2], [-1, -1]], device="cuda"), weight, weight)
    assert torch.equal(got, hidden)
    with pytest.raises(IndexError, match="gather_gate: 2 bad values .* on cuda:0"):
        ek.check_errors()


def test_tables_in_pinned_host_memory():
    rows = torch.randn(1000, 256).bfloat16()
    ids = torch.randint(0, 1000, (333,), device="cuda")
    got = ek.gather_rows(ek.RowTable.from_tensor(rows.pin_memory()), ids)
    assert got.is_cuda and torch.equal(got.cpu(), rows[ids.cpu()])
    hidden, weight = torch.randn(111, 2, 768, device="cuda").bfloat16(), torch.ones(2, 768, device="cuda")
    calls = [ek.gather_gate(hidden, ek.RowTable.from_tensor(x), ids.view(111, 3), weight, weight)
             for x in (rows.pin_memory(), rows.cuda())]
    assert torch.equal(*calls)
    w_kv = torch.randn(3 * 768, 768, device="cuda").bfloat16() / 28
    calls = [ek.engram_forward(hidden, ek.RowTable.from_tensor(x), ids.view(111, 3), w_kv, weight, weight)
             for x in (rows.pin_memory(), rows.cuda())]
    assert torch.equal(*calls)
    with pytest.raises(ValueError, match="row_ids must be on cpu"):
        ek.gather_rows(ek.RowTable.from_tensor(rows), ids)
    with pytest.raises(ValueError, match="cannot read"):
        torch.ops.engram_kernels.gather_rows(rows, None, ids, "bf16", 256, False, torch.bfloat16)


def gradients(device, dtype):
    """op -> gradients of a weighted sum of its output. The inputs are the same on every device."""
    rand = torch.Generator().manual_seed(1)

    def leaf(*shape):
        return torch.randn(*shape, generator=rand).to(device, dtype).requires_grad_()
    tokens, branches, size = 37, 2, 4 * 64
    hidden, key, value = leaf(tokens, branches, size), leaf(tokens, branches, size), leaf(tokens, size)
    w_hidden, w_key, rows = leaf(branches, size), leaf(branches, size), leaf(50, 64)
    conv, norm, w_kv = leaf(branches, size, 4), leaf(branches, size), leaf((branches + 1) * size, size)
    ids = torch.randint(-1, 50, (tokens, 4), generator=rand).to(device)
    cu_seqlens = torch.tensor([0, 5, 5, tokens], dtype=torch.int32, device=device)
    weight = torch.randn(tokens, branches, size, generator=rand).to(device)
    table = ek.RowTable.from_tensor(rows, row_format="f32" if dtype == torch.float32 else "bf16")
    calls = {
        "gather_rows": (lambda: ek.gather_rows(table, ids, dtype).view(tokens, 1, size), (rows,)),
        "gate": (lambda: ek.gate(hidden, key, value, w_hidden, w_key), (hidden, key, value, w_hidden, w_key)),
        "gather_gate": (lambda: ek.gather_gate(hidden, table, ids, w_hidden, w_key), (hidden, rows, w_hidden, w_key)),
        "engram_forward": (lambda: ek.engram_forward(hidden, table, ids, w_kv / 16, w_hidden, w_key),
                           (hidden, rows, w_kv, w_hidden, w_key)),
        "short_conv": (lambda: ek.short_conv(hidden, conv, norm, cu_seqlens, 3), (hidden, conv, norm)),
    }
    return {op: [g.cpu() for g in torch.autograd.grad((call().float() * weight).sum(), leaves)]
            for op, (call, leaves) in calls.items()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2**-6)], ids=["f32", "bf16"])
def test_gradients_match_the_cpu_kernels(dtype, tolerance):
    got, want = gradients("cuda", dtype), gradients("cpu", dtype)
    for op in want:
        for a, b in zip(got[op], want[op], strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance * b.abs().max().item(),
                                       msg=lambda m, op=op: f"{op}: {m}")


def test_gradients_of_rows_are_summed_in_order():
    grad = torch.randn(3000, 64)
    ids = torch.randint(-1, 40, (3000,))
    want = torch.ops.engram_kernels.gather_rows_bwd(grad, ids, 40, torch.float32)
    assert torch.equal(torch.ops.engram_kernels.gather_rows_bwd(grad.cuda(), ids.cuda(), 40, torch.float32).cpu(), want)


def trained(device, dtype=torch.bfloat16, **options):
    """Rows, moments and counts of a table after 20 steps of a RowOptimizer, half of whose positions name one of few rows."""
    rand = torch.Generator().manual_seed(3)
    rows = torch.randn(3000, 64, generator=rand).to(device, dtype)
    table = ek.RowTable.from_tensor(rows, row_format="bf16" if dtype == torch.bfloat16 else "f32")
    optimizer = ek.RowOptimizer(table, "adam", lr=0.05, seed=7, **options)
    for _ in range(20):
        ids = torch.randint(-1, 3000, (2000,), generator=rand)
        ids[::2] %= 9
        optimizer.step(ids.to(device), torch.randn(2000, 64, generator=rand).to(device), grad_scale=0.5)
    ek.check_errors()
    return [x.cpu() for x in (rows, optimizer.second, optimizer.first, optimizer.steps) if x is not None]


@pytest.mark.parametrize("second_moment", ["row", "element"])
@pytest.mark.parametrize("first_moment", ["f32", "bf16", None])
def test_a_row_optimizer_has_the_bits_of_the_cpu_and_of_every_run(second_moment, first_moment):
    options = dict(second_moment=second_moment, first_moment=first_moment)
    first, again, want = trained("cuda", **options), trained("cuda", **options), trained("cpu", **options)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, want, strict=True))


def test_an_update_that_is_refused_writes_nothing_and_is_raised_later():
    rows = torch.ones(10, 64, device="cuda")
    optimizer = ek.RowOptimizer(ek.RowTable.from_tensor(rows, row_format="f32"), lr=0.1)
    grads = torch.ones(3, 64, device="cuda")
    grads[1, 7] = float("nan")
    for ids, gradients, count in ((torch.tensor([3, 10, -1]), torch.ones_like(grads), 1), (torch.tensor([3, 4, -1]), grads, 1)):
        optimizer.step(ids.cuda(), gradients)
        assert rows.eq(1).all() and not optimizer.second.any() and not optimizer.steps.any()
        with pytest.raises(IndexError, match=f"row_update: {count} bad values .* was refused.* on cuda:0"):
            ek.check_errors()
    assert optimizer.norm(torch.tensor([3, 4, -1]).cuda(), grads).isnan()
    with pytest.raises(IndexError, match="row_update: 1 bad values"):
        ek.check_errors()


def test_a_sparse_gradient_on_the_gpu_has_the_bits_of_the_cpu():
    def gradient(device):
        rand = torch.Generator().manual_seed(4)
        rows = torch.nn.Parameter(torch.randn(300, 64, generator=rand).to(device))
        ids, grad = torch.randint(-1, 40, (4000,), generator=rand).to(device), torch.randn(4000, 64, generator=rand).to(device)
        ek.gather_rows(ek.RowTable.from_tensor(rows), ids, torch.float32, sparse_grad=True).backward(grad)
        return rows.grad._indices().cpu(), rows.grad._values().cpu()
    first, again, want = gradient("cuda"), gradient("cuda"), gradient("cpu")
    for a, b, c in zip(first, again, want, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_gradients_do_not_depend_on_the_run():
    hidden = torch.randn(T, M, H, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(M, H, device="cuda", requires_grad=True) for _ in range(2)]
    outs = [ek.gate(hidden, hidden, hidden[:, 0], *weights).float() for _ in range(3)]
    grads = [torch.autograd.grad(out.square().sum(), weights) for out in outs]
    for again in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], again, strict=True))


def test_gather_gate_gradients_match_the_cpu_and_do_not_depend_on_the_run():
    def run(device):
        rand = torch.Generator().manual_seed(1)
        hidden, rows, *weights = ((torch.randn(*shape, generator=rand) / 4).to(device).requires_grad_()
                                  for shape in ((T, M, H), (500, D), (M, H), (M, H)))
        ids = torch.randint(-1, 500, (T, C), generator=rand).to(device)
        out = ek.gather_gate(hidden, ek.RowTable.from_tensor(rows), ids, *weights)
        return torch.autograd.grad(out.square().sum(), (hidden, rows, *weights))
    first, again, want = run("cuda"), run("cuda"), run("cpu")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in zip(first, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
