"""short_conv: every backend against the reference, the reference against torch's conv1d and gradcheck."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import packed
from op_cases import plain_short_conv as plain_torch
from op_cases import short_conv_inputs as make_inputs

from engram_kernels.ops.short_conv import short_conv
from engram_kernels.reference.short_conv import short_conv as reference
from engram_kernels.testing import assert_as_accurate_as_torch, assert_rounded_once

EPS = 1e-5
PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


CASES = {  # name: (lengths, branches, size, width, dilation, dtype, weight dtype)
    "one_token": ([1], 1, 32, 4, 3, torch.bfloat16, torch.bfloat16),
    "demo_shape": ([70, 1, 130], 4, 1024, 4, 3, torch.bfloat16, torch.bfloat16),
    "one_past_a_block": ([65, 64, 63], 2, 48, 4, 2, torch.bfloat16, torch.float32),
    "tail_channels": ([20, 9], 3, 37, 4, 3, torch.float16, torch.float16),
    "one_channel": ([12], 1, 1, 4, 1, torch.float32, torch.float32),
    "no_taps_back": ([9, 2], 2, 40, 1, 3, torch.float32, torch.float32),
    "two_taps": ([9, 30], 2, 40, 2, 4, torch.float32, torch.float32),
    "most_taps": ([50], 1, 40, 8, 2, torch.bfloat16, torch.bfloat16),
    "reach_past_the_sequence": ([3, 5, 2], 2, 24, 4, 100, torch.bfloat16, torch.bfloat16),
    "empty_sequences": ([0, 4, 0, 0, 3, 0], 2, 40, 4, 3, torch.bfloat16, torch.bfloat16),
    "no_tokens": ([0, 0], 2, 40, 4, 3, torch.bfloat16, torch.bfloat16),
    "no_sequences": ([], 2, 40, 4, 3, torch.bfloat16, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_short_conv_matches_reference(case, backend, device):
    lengths, branches, size, width, dilation, dtype, weight_dtype = case
    args = make_inputs(lengths, branches, size, width, dtype, weight_dtype)
    got = short_conv(*(a.to(device) for a in args), dilation, EPS, backend=backend).cpu()
    exact = reference(*(a.double() for a in args[:3]), args[3], dilation, EPS)
    assert_as_accurate_as_torch(got, plain_torch(*args, dilation, EPS), exact)
    if dtype != torch.float32 and got.numel() > 5000:
        assert_rounded_once(got, exact)


def test_short_conv_reference_is_torchs_conv1d():
    x, weight, norm_weight, cu = make_inputs([13, 1, 0, 7], 3, 20, dtype=torch.float64)
    torch.testing.assert_close(reference(x, weight, norm_weight, cu, 2, EPS), plain_torch(x, weight, norm_weight, cu, 2, EPS))


def test_short_conv_golden(backend, device):
    # by hand: one channel, eps 0, so that n is the sign of x; taps 1 and 2, dilation 1: z = -1*2, then 1*2 - 1*1 = 1
    x, cu = torch.tensor([-3.0, 5.0]).view(2, 1, 1), packed([2])
    got = short_conv(x.to(device), torch.tensor([[[1.0, 2.0]]], device=device), torch.ones(1, 1, device=device), cu.to(device), 1,
                     0.0, backend=backend)
    silu = [-2 / (1 + 2.718281828 ** 2), 1 / (1 + 2.718281828 ** -1)]
    torch.testing.assert_close(got.flatten().cpu(), torch.tensor([-3 + silu[0], 5 + silu[1]]))


@pytest.mark.slow_cases("triton")
@given(st.data())
@PROPERTY
def test_short_conv_any_chunking_equals_whole(backend, device, data):
    width, dilation = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    longest = 6 if backend == "triton" and device == "cpu" else 40  # the interpreter takes minutes for more
    lengths = data.draw(st.lists(st.integers(0, longest), min_size=1, max_size=3))
    x, weight, norm_weight, cu = make_inputs(lengths, 2, 24, width)
    x, weight, norm_weight = x.to(device), weight.to(device), norm_weight.to(device)
    whole = short_conv(x, weight, norm_weight, cu.to(device), dilation, EPS, backend=backend)
    state = torch.full((len(lengths), (width - 1) * dilation, 2, 24), float("nan"), dtype=x.dtype, device=device)
    done, pieces = [0] * len(lengths), [[] for _ in lengths]
    while done != lengths:  # a chunk takes some tokens of each sequence, perhaps none
        take = [data.draw(st.integers(0, n - d)) for n, d in zip(lengths, done, strict=True)]
        if not any(take):
            take = [min(1, n - d) for n, d in zip(lengths, done, strict=True)]
        spans = [(int(cu[b]) + done[b], int(cu[b]) + done[b] + take[b]) for b in range(len(lengths))]
        chunk = torch.cat([x[begin:end] for begin, end in spans])
        out = short_conv(chunk, weight, norm_weight, packed(take).to(device), dilation, EPS, state,
                         torch.tensor(done, dtype=torch.int32, device=device), backend=backend)
        for b, rows in enumerate(out.split(take)):
            pieces[b].append(rows)
        done = [d + n for d, n in zip(done, take, strict=True)]
    got = torch.cat([torch.cat([x[:0], *rows]) for rows in pieces])
    torch.testing.assert_close(got, whole, rtol=0, atol=0)


def test_short_conv_decode_equals_prefill_and_ignores_what_lay_there(backend, device):
    """Two sequences, one of which takes over a state full of NaN; state is a slice of a larger cache."""
    x, weight, norm_weight, cu = (a.to(device) for a in make_inputs([30, 30], 2, 40))
    whole = short_conv(x, weight, norm_weight, cu, 3, EPS, backend=backend).view(2, 30, 2, 40)
    cache = torch.full((2, 5, 9, 2, 40), float("nan"), dtype=x.dtype, device=device)
    state, one_each = cache[:, 3], packed([1, 1]).to(device)
    assert not state.is_contiguous()
    steps = x.view(2, 30, 2, 40)
    for t in range(30):
        positions = torch.full((2,), t, dtype=torch.int32, device=device)
        out = short_conv(steps[:, t], weight, norm_weight, one_each, 3, EPS, state, positions, backend=backend)
        torch.testing.assert_close(out, whole[:, t], rtol=0, atol=0)
    torch.testing.assert_close(state[:, [t % 9 for t in range(21, 30)]], steps[:, 21:30], rtol=0, atol=0)
    assert cache[:, [0, 1, 2, 4]].isnan().all()


def test_short_conv_positions_past_int32(backend, device):
    """Long after 2^31 inputs a ring says the same as one that has just filled; int32 and int64 positions are alike."""
    x, weight, norm_weight, cu = (a.to(device) for a in make_inputs([5, 3]))
    ring = torch.randn(2, 9, 2, 40, generator=torch.Generator().manual_seed(3)).to(x)
    results = []
    for positions in (torch.tensor([9, 10], dtype=torch.int32), torch.tensor([9, 10]), torch.tensor([9 << 40, (9 << 40) + 1])):
        state = ring.clone()
        out = short_conv(x, weight, norm_weight, cu, 3, EPS, state, positions.to(device), backend=backend)
        results.append((out, state))
    for out, state in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(state, results[0][1])


def test_short_conv_does_not_leak_across_sequences(backend, device):
    x, weight, norm_weight, _ = (a.to(device) for a in make_inputs([20]))
    joint = short_conv(x, weight, norm_weight, packed([8, 12]).to(device), 3, EPS, backend=backend)
    x[:8] = float("nan")
    alone = short_conv(x, weight, norm_weight, packed([8, 12]).to(device), 3, EPS, backend=backend)
    torch.testing.assert_close(joint[8:], alone[8:], rtol=0, atol=0)
    assert alone[:8].isnan().all()


@pytest.mark.parametrize("value", [0.0, -0.0, float("inf"), float("nan"), 1e30, -90.0])
def test_short_conv_special_values(value, backend, device):
    x, weight, norm_weight, cu = make_inputs([6], 1, 24, dtype=torch.float32)
    x[2] = value
    weight *= 40  # z past where e^-z leaves the range of a float
    got = short_conv(*(a.to(device) for a in (x, weight, norm_weight, cu)), 1, EPS, backend=backend).cpu()
    want = reference(x.double(), weight.double(), norm_weight.double(), cu, 1, EPS)
    if value == 1e30:  # its square is past float32: the norm is 0 there and not in float64
        want = reference(x, weight, norm_weight, cu, 1, EPS).double()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("width", [3, 4])
def test_short_conv_inf_weight_meets_nothing_before_the_start(width, backend, device):
    """The first tokens have no input that the Inf tap could multiply, so they stay finite; the others do not."""
    x, weight, norm_weight, cu = make_inputs([4, 9], 2, 24, width, torch.float32)
    weight[:, :, 0] = float("inf")
    got = short_conv(*(a.to(device) for a in (x, weight, norm_weight, cu)), 2, EPS, backend=backend).cpu()
    reach = (width - 1) * 2
    reached = torch.tensor([t >= reach for n in (4, 9) for t in range(n)])
    assert got[~reached].isfinite().all() and not got[reached].isfinite().any()
    rest = weight.clone()
    rest[:, :, 0] = 0
    want = reference(x, rest, norm_weight, cu, 2, EPS)
    torch.testing.assert_close(got[~reached], want[~reached], rtol=1e-5, atol=1e-5)


@pytest.mark.slow_cases("triton")
def test_short_conv_threads_give_the_same_bits(backend, device):
    lengths = [5, 1, 3] if backend == "triton" and device == "cpu" else [300, 1, 99]  # the interpreter takes minutes for more
    args = tuple(a.to(device) for a in make_inputs(lengths, 4, 64))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(short_conv(*args, 3, EPS, backend=backend))
            leaves = [a.detach().requires_grad_() for a in args[:3]]
            out = short_conv(*leaves, args[3], 3, EPS, backend=backend)
            results += torch.autograd.grad(out.float().square().sum(), leaves)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[4])
    if backend == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(results[1:4], results[5:], strict=True))


def test_short_conv_strided_input_and_out(backend, device):
    x, weight, norm_weight, cu = (a.to(device) for a in make_inputs([11, 6], 3, 40))
    wide = torch.zeros(17, 5, 64, dtype=x.dtype, device=device)
    wide[:, 1:4, :40] = x
    strided = wide[:, 1:4, :40]
    want = short_conv(x, weight, norm_weight, cu, 2, EPS, backend=backend)
    out = torch.full_like(x, float("nan"))
    assert short_conv(strided, weight, norm_weight, cu, 2, EPS, out=out, backend=backend) is out
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    branches_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(short_conv(branches_first, weight, norm_weight, cu, 2, EPS, backend=backend), want, rtol=0, atol=0)


def test_short_conv_reference_gradcheck():
    x, weight, norm_weight, cu = make_inputs([5, 0, 3], 2, 3, 3, torch.float64)
    leaves = tuple(a.requires_grad_() for a in (x, weight, norm_weight))
    assert torch.autograd.gradcheck(lambda *a: reference(*a, cu, 2, EPS), leaves)


@pytest.mark.slow_cases("triton-demo_shape", "triton-one_past_a_block", "triton-most_taps", "triton-tail_channels")
@pytest.mark.parametrize("case", ["demo_shape", "one_past_a_block", "tail_channels", "no_taps_back", "most_taps",
                                  "reach_past_the_sequence", "empty_sequences", "no_tokens"])
def test_short_conv_backward_matches_reference(case, backend, device):
    lengths, branches, size, width, dilation, dtype, weight_dtype = CASES[case]
    if case == "demo_shape":
        # several groups of several blocks; the interpreter takes minutes for as many
        lengths, size = [90, 1, 40] if device == "cpu" and backend == "triton" else [700, 1, 400], 64
    args = make_inputs(lengths, branches, size, width, dtype, weight_dtype)
    upstream = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(9)).to(dtype)

    def grads(run, cast):
        leaves = [cast(a).detach().requires_grad_() for a in args[:3]]
        out = run(*leaves, args[3].to(leaves[0].device), dilation, EPS)
        return torch.autograd.grad(out, leaves, cast(upstream), allow_unused=True, materialize_grads=True)

    got = grads(lambda *a: short_conv(*a, backend=backend), lambda a: a.to(device))
    plain = grads(plain_torch, lambda a: a if a.dtype == dtype or weight_dtype == torch.float32 else a.to(dtype))
    exact = grads(reference, torch.Tensor.double)
    for name, g, p, e in zip(("x", "weight", "norm_weight"), got, plain, exact, strict=True):
        if name == "weight":  # taps as rows: one tap's sums over all tokens
            g, p, e = g.transpose(1, 2), p.transpose(1, 2), e.transpose(1, 2)
        try:
            assert_as_accurate_as_torch(g.cpu(), p, e)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None


def good():
    x, weight, norm_weight, cu = make_inputs([6, 4])
    return dict(x=x, weight=weight, norm_weight=norm_weight, cu_seqlens=cu, dilation=3)


def with_state(**change):
    return dict(state=torch.zeros(2, 9, 2, 40, dtype=torch.bfloat16), positions=torch.zeros(2, dtype=torch.int32)) | change


BAD = {  # name: (changed arguments, what the message says)
    "x_dtype": (dict(x=torch.zeros(10, 2, 40, dtype=torch.int32)), "x must be torch.float32 or torch.bfloat16 or torch.float16"),
    "x_shape": (dict(x=torch.zeros(10, 40)), r"x must have shape \[T, M, H\], got \[10, 40\]"),
    "x_stride": (dict(x=torch.zeros(10, 2, 80, dtype=torch.bfloat16)[..., ::2]), "must be contiguous, got strides"),
    "weight_shape": (dict(weight=torch.zeros(2, 41, 4)), r"weight must have shape \[2, 40, W\]"),
    "weight_dtype": (dict(weight=torch.zeros(2, 40, 4, dtype=torch.float16)), "weight must be torch.bfloat16 or torch.float32"),
    "weight_taps": (dict(weight=torch.zeros(2, 40, 9)), "weight has 9 taps, expected 1..8"),
    "norm_dtype": (dict(norm_weight=torch.zeros(2, 40)), "norm_weight must be torch.bfloat16"),
    "dilation": (dict(dilation=0), "dilation is 0"),
    "eps": (dict(eps=-1.0), "eps is -1.0"),
    "cu_decreases": (dict(cu_seqlens=torch.tensor([0, 7, 6, 10], dtype=torch.int32)), "cu_seqlens"),
    "cu_ends_late": (dict(cu_seqlens=torch.tensor([0, 11], dtype=torch.int32)), "cu_seqlens.*10"),
    "cu_no_sequence": (dict(cu_seqlens=torch.zeros(1, dtype=torch.int32)), "cu_seqlens.*10; got one entry"),
    "cu_dtype": (dict(cu_seqlens=torch.tensor([0, 10])), "cu_seqlens must be torch.int32"),
    "out_shape": (dict(out=torch.zeros(9, 2, 40, dtype=torch.bfloat16)), r"out must have shape \[10, 2, 40\]"),
    "positions_alone": (dict(positions=torch.zeros(2, dtype=torch.int32)), "positions is given without state"),
    "state_alone": (with_state(positions=None), "positions is None"),
    "state_shape": (with_state(state=torch.zeros(2, 8, 2, 40, dtype=torch.bfloat16)), "state has 8 slots, expected at least 9"),
    "state_dtype": (with_state(state=torch.zeros(2, 9, 2, 40)), "state must be torch.bfloat16"),
    "state_stride": (with_state(state=torch.zeros(2, 9, 2, 80, dtype=torch.bfloat16)[..., ::2]), "must be contiguous"),
    "positions_negative": (with_state(positions=torch.tensor([0, -1], dtype=torch.int32)), "positions.*-1"),
    "positions_64_negative": (with_state(positions=torch.tensor([0, -(2**40)])), f"positions.*{-(2**40)}"),
    "positions_dtype": (with_state(positions=torch.zeros(2)), "positions must be torch.int32 or torch.int64"),
    "grad_and_state": (with_state(x=torch.zeros(10, 2, 40, dtype=torch.bfloat16, requires_grad=True)), "state cannot be given"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_short_conv_rejects(change, message, name, compiled):
    with pytest.raises(ValueError, match=message):
        short_conv(**{**good(), **change}, backend=name)


def test_short_conv_rejects_out_that_shares_memory(compiled):
    args = good()
    with pytest.raises(ValueError, match="out shares memory with x"):
        short_conv(**args, out=args["x"], backend="cpu")


@pytest.mark.parametrize("which", ["x", "weight", "state"])
def test_short_conv_update_has_no_derivative_in_silence(which, compiled):
    args = {**good(), **with_state()}
    args[which] = args[which].clone().requires_grad_()
    call = [args[name] for name in ("x", "weight", "norm_weight", "cu_seqlens", "positions", "dilation")] + [EPS, args["state"]]
    op = torch.ops.engram_kernels.short_conv_update
    with pytest.raises(RuntimeError, match="short_conv_update: an input requires grad"):
        op(*call)
    with torch.no_grad():
        op(*call)


def test_short_conv_decode_step_compiles(compiled):
    x, weight, norm_weight, cu = make_inputs([1, 1], dtype=torch.float32)
    positions = torch.tensor([20, 3])

    def step(x, state):
        return short_conv(x * 2, weight, norm_weight, cu, 3, EPS, state, positions) + 1

    ring = torch.randn(2, 9, 2, 40)
    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        state = ring.clone()
        results.append((run(x, state), state))
    torch.testing.assert_close(results[1], results[0])
    assert not torch.equal(results[0][1], ring)


def test_short_conv_opcheck(compiled):
    x, weight, norm_weight, cu = make_inputs([6, 4], dtype=torch.float32)
    leaves = tuple(a.requires_grad_() for a in (x, weight, norm_weight))
    ops = torch.ops.engram_kernels
    torch.library.opcheck(ops.short_conv.default, (*leaves, cu, 3, EPS))
    plain = tuple(a.detach() for a in leaves)
    torch.library.opcheck(ops.short_conv.out, (*plain, cu, 3, EPS), {"out": torch.empty_like(x)})
    update = (*plain, cu, torch.tensor([4, 0], dtype=torch.int32), 3, EPS, torch.zeros(2, 9, 2, 40))
    torch.library.opcheck(ops.short_conv_update.default, update)
    torch.library.opcheck(ops.short_conv_update.out, update, {"out": torch.empty_like(plain[0])})
    torch.library.opcheck(ops.short_conv_bwd.default, (torch.randn_like(plain[0]), *plain, cu, 3, EPS))


def test_short_conv_compiles(compiled):
    x, weight, norm_weight, cu = make_inputs([6, 4], dtype=torch.float32)
    leaves = [a.requires_grad_() for a in (x, weight, norm_weight)]

    def loss(*a):
        return (short_conv(*a, cu, 3, EPS) * 2).square().sum()

    want, got = loss(*leaves), torch.compile(loss, fullgraph=True)(*leaves)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)
