"""short_conv in Triton, forward, state and backward: the compiled PTX on the simulator, against the reference."""
import pytest
import torch
from op_cases import packed
from op_cases import plain_short_conv as plain_torch
from op_cases import short_conv_inputs as make_inputs
from test_short_conv import EPS
from triton_sim import MISSING_TRITON, simulate, total

from engram_kernels.reference.short_conv import short_conv as reference
from engram_kernels.testing import assert_as_accurate_as_torch

pytestmark = pytest.mark.skipif(bool(MISSING_TRITON), reason=MISSING_TRITON)
CASES = {  # name: (lengths, branches, size, width, dilation, dtype)
    "odd_sizes": ([9, 1, 0, 5], 2, 37, 4, 3, torch.bfloat16),
    "demo_rows": ([5, 3], 4, 1024, 4, 3, torch.bfloat16),
    "wide_rows": ([6], 1, 5120, 4, 2, torch.float32),  # constants from memory
    "most_taps_large_class": ([60, 30], 1, 40, 8, 2, torch.float16),
    "reach_past_the_sequence": ([3, 5], 2, 24, 4, 100, torch.bfloat16),
}


@pytest.fixture
def programs(monkeypatch):
    """Sets how many programs there are, and so how far one walks."""
    from engram_kernels.triton_runtime import tuning

    def set_to(count):
        for size in ("small", "large"):
            monkeypatch.setitem(tuning.DEFAULTS["short_conv"][size], "programs", count)
        tuning._parameters.cache_clear()
    yield set_to
    monkeypatch.undo()
    tuning._parameters.cache_clear()


def run(args, dilation, positions=None, state=None, indices=None, ends=None, **options):
    from engram_kernels.triton_kernels.short_conv import short_conv
    return simulate(lambda: short_conv(*args, dilation, EPS, positions, state, indices, ends), **options)


@pytest.mark.parametrize("walk", [1, 16], ids=["long_walks", "short_walks"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_short_conv_matches_reference(case, walk, programs):
    lengths, branches, size, width, dilation, dtype = case
    programs(walk)
    args = make_inputs(lengths, branches, size, width, dtype)
    got, _ = run(args, dilation, cta_order="random", race=len(args[0]) < 20)
    exact = reference(*(a.double() for a in args[:3]), args[3], dilation, EPS)
    assert_as_accurate_as_torch(got, plain_torch(*args, dilation, EPS), exact)


@pytest.mark.parametrize("size", [40, 1024])
def test_short_conv_chunks_and_decode_equal_the_whole(size, programs):
    """Chunks of several tokens, then single ones, of two sequences; the state begins as NaN."""
    programs(2)
    x, weight, norm_weight, cu = make_inputs([14, 14], 2, size)
    whole, _ = run((x, weight, norm_weight, cu), 3)
    both, want, done = x.view(2, 14, 2, size), whole.view(2, 14, 2, size), 0
    state = torch.full((2, 9, 2, size), float("nan"), dtype=x.dtype)
    for take in (5, 4, 1, 1, 3):
        chunk = both[:, done:done + take].flatten(0, 1)
        positions = torch.full((2,), done, dtype=torch.int64)
        got, launches = run((chunk, weight, norm_weight, packed([take, take])), 3, positions, state, cta_order="random")
        assert torch.equal(got.view(2, take, 2, size), want[:, done:done + take]) and len(launches) == 2
        done += take
    assert torch.equal(state[:, [t % 9 for t in range(5, 14)]], both[:, 5:])


def test_short_conv_rejected_drafts_in_a_pool_and_refused_sequences(programs, monkeypatch):
    """A draft of NaN that is rejected; then a skipped sequence, a position that is too far back, and a ring outside the pool."""
    from engram_kernels.triton_kernels import short_conv as module
    programs(2)
    errors = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(module, "error_counter", lambda op, device: errors)
    x, weight, norm_weight, cu = make_inputs([7], 1, 24)
    whole, _ = run((x, weight, norm_weight, cu), 2)
    state, ends = torch.full((4, 6 + 1, 1, 24), float("nan"), dtype=x.dtype), torch.zeros(4, 2, dtype=torch.int64)
    ends[0] = 9
    nan = torch.full((2, 1, 24), float("nan"), dtype=x.dtype)
    table = torch.tensor([[0, 2], [-5, -1], [7, 0], [0, 4]])
    for done, take, drafts, wrong in ((0, 5, 1, 2), (5, 2, 0, 2)):
        table[0, 0] = done
        sizes = [take + drafts, 2, 2, 1]
        rows = torch.cat([x[done:done + take], nan[:drafts], nan, nan, nan[:1]])
        got, launches = run((rows, weight, norm_weight, packed(sizes)), 2, table[:, 0], state, table[:, 1], ends,
                            cta_order="random")
        assert torch.equal(got[:take], whole[done:done + take]) and (got[take + drafts:] == 0).all() and len(launches) == 3
        assert errors.item() == wrong
        errors.zero_()
    assert ends.tolist() == [[9, 9], [0, 0], [7, 7], [0, 0]] and state[[0, 1, 3]].isnan().all()


def test_short_conv_reads_a_row_once_in_a_walk(programs):
    programs(1)  # one walk per branch and residue: no row is read twice
    args = make_inputs([12], 2, 1024)
    out, launches = run(args, 3, race=False)
    assert total(launches, "load_bytes", ("x",)) == args[0].nbytes
    assert total(launches, "store_bytes", ("out",)) == out.nbytes


def test_short_conv_bad_bounds_are_counted_and_read_nothing_outside(monkeypatch):
    from engram_kernels.triton_kernels import short_conv as module
    errors = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(module, "error_counter", lambda op, device: errors)
    x, weight, norm_weight, _ = make_inputs([6], 1, 24)
    state = torch.zeros(2, 9, 1, 24, dtype=x.dtype)
    run((x, weight, norm_weight, torch.tensor([2, -7, 90], dtype=torch.int32)), 3, torch.tensor([-4, 2**62]), state)
    assert errors.item() >= 3


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_short_conv_backward_matches_reference(case):
    from engram_kernels.triton_kernels.short_conv import short_conv_bwd
    lengths, branches, size, width, dilation, dtype = case
    args = make_inputs(lengths, branches, size, width, dtype)
    upstream = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(9)).to(dtype)

    def grads(function, cast):
        leaves = [cast(a).detach().requires_grad_() for a in args[:3]]
        return torch.autograd.grad(function(*leaves, args[3], dilation, EPS), leaves, cast(upstream))

    got, _ = simulate(lambda: short_conv_bwd(upstream, *args, dilation, EPS), race=len(args[0]) < 20, cta_order="random")
    for g, p, e in zip(got, grads(plain_torch, lambda a: a), grads(reference, torch.Tensor.double), strict=True):
        if g.dim() == 3 and g.shape == args[1].shape:  # taps as rows: one tap's sums over all tokens
            g, p, e = g.transpose(1, 2), p.transpose(1, 2), e.transpose(1, 2)
        assert_as_accurate_as_torch(g, p, e)
