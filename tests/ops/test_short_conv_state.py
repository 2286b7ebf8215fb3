"""The state of short_conv: rejected drafts, rings in a pool, and positions that a ring cannot follow; every backend."""
import itertools
import random

import pytest
import torch

from engram_kernels.ops.short_conv import short_conv

OP = "short_conv"
EPS, SIZE, BRANCHES = 1e-5, 16, 2


def packed(lengths, device="cpu"):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def weights(width, device="cpu"):
    generator = torch.Generator().manual_seed(width)
    return (torch.randn(BRANCHES, SIZE, width, generator=generator).to(device),
            (1 + 0.2 * torch.randn(BRANCHES, SIZE, generator=generator)).to(device))


def random_inputs(tokens, seed, device="cpu"):
    return torch.randn(tokens, BRANCHES, SIZE, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("spare, want", [(0, 1.7311), (1, 2.7311), (5, 2.7311)])
def test_short_conv_state_golden_rejected_draft(spare, want, backend, device):
    """W 2, weight [1, 0], so z is the sign of the input before: x 3, then a draft of -5 that is rejected, then x 2.

    Without a slot to spare the draft has taken the place of the 3, and the ring alone cannot know.
    """
    state = torch.ones(1, 1 + spare, 1, 1, device=device)
    weight, norm_weight, cu = torch.tensor([[[1.0, 0.0]]], device=device), torch.ones(1, 1, device=device), packed([1], device)
    for x, position in ((3.0, 0), (-5.0, 1), (2.0, 1)):
        got = short_conv(torch.full((1, 1, 1), x, device=device), weight, norm_weight, cu, 1, 0.0, state,
                         torch.tensor([position], device=device), backend=backend)
    assert got.item() == pytest.approx(want, abs=1e-4)


@pytest.mark.slow_cases("triton-0", "triton-3", "triton-5")
@pytest.mark.parametrize("seed", range(6))
def test_short_conv_state_any_mix_of_chunks_and_rejected_drafts_equals_the_whole(seed, backend, device):
    """Rings in a pool, chunks of any size, drafts of NaN behind them, a skipped sequence of NaN among them."""
    draw = random.Random(seed)
    width, dilation, spare = draw.randint(1, 4), draw.randint(1, 3), draw.randint(0, 3)
    id_dtype = draw.choice((torch.int32, torch.int64))
    lengths = [draw.randint(1, 14) for _ in range(draw.randint(1, 3))]
    rings = draw.sample(range(len(lengths) + 2), len(lengths))
    weight, norm_weight = weights(width, device)
    x = [random_inputs(n, seed, device) for seed, n in enumerate(lengths)]
    whole = [short_conv(a, weight, norm_weight, packed([len(a)], device), dilation, EPS, backend=backend) for a in x]
    state = torch.full((len(lengths) + 2, (width - 1) * dilation + spare, BRANCHES, SIZE), float("nan"), device=device)
    ends = torch.zeros(len(state), 2, dtype=torch.int64, device=device)
    done = [0] * len(lengths)
    while done != lengths:
        take = [draw.randint(0, n - d) for n, d in zip(lengths, done, strict=True)]
        drafts = [draw.randint(0, spare) for _ in lengths]
        chunks = [a[d:d + n] for a, d, n in zip(x, done, take, strict=True)]
        bad = [torch.full((n, BRANCHES, SIZE), float("nan"), device=device) for n in (*drafts, 2)]
        sizes = [n + r for n, r in zip(take, drafts, strict=True)] + [2]
        rows = torch.cat([a for pair in itertools.zip_longest(chunks, bad, fillvalue=x[0][:0]) for a in pair])
        out = short_conv(rows, weight, norm_weight, packed(sizes, device), dilation, EPS, state,
                         torch.tensor([*done, -9], dtype=id_dtype, device=device),
                         torch.tensor([*rings, -1], dtype=id_dtype, device=device), ends, backend=backend).split(sizes)
        for b, n in enumerate(take):
            torch.testing.assert_close(out[b][:n], whole[b][done[b]:done[b] + n], rtol=0, atol=0)
        assert (out[-1] == 0).all()
        done = [d + n for d, n in zip(done, take, strict=True)]
    untouched = [r for r in range(len(state)) if r not in rings]
    assert state[untouched].isnan().all() and (ends[untouched] == 0).all()


def test_short_conv_state_strided_positions_and_indices(backend, device):
    """Columns of a scheduler's table; the state of the sequences lies in rings 4 and 1."""
    weight, norm_weight = weights(3, device)
    x, cu = random_inputs(6, 0, device), packed([4, 2], device)
    table = torch.tensor([[0, 4, 7], [0, 1, 7]], device=device)
    results = []
    for positions, indices in ((table[:, 0], table[:, 1]), (table[:, 0].clone(), table[:, 1].clone())):
        state = torch.zeros(5, 7, BRANCHES, SIZE, device=device)
        results.append((short_conv(x, weight, norm_weight, cu, 2, EPS, state, positions, indices, backend=backend), state))
    assert not table[:, 0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(results[0][1][4, :4], x[:4]) and (results[0][1][[0, 2, 3]] == 0).all()


def call(backend, **change):
    """Chunks of 2 and 1 tokens; W 3, dilation 2, K 2."""
    weight, norm_weight = weights(3)
    args = dict(x=random_inputs(3, 1), weight=weight, norm_weight=norm_weight, cu_seqlens=packed([2, 1]), dilation=2,
                state=torch.zeros(2, 6, BRANCHES, SIZE), positions=torch.tensor([0, 0]))
    return short_conv(**args | change, backend=backend)


ENDS = [[20, 20], [9, 11], [0, 0], [7, 5]]  # of rings that hold 20 inputs; 9, of 11 that there were; none; what cannot be
REFUSED = {  # name: (positions, indices, error, message)
    "too_far_back": ([17, 0], None, ValueError, r"positions\[0\] is 17, 3 before the furthest input, expected at most 2"),
    "too_far_back_after_going_back": ([20, 8], None, ValueError, r"positions\[1\] is 8, 3 before the furthest"),
    "inputs_left_out": ([21, 0], None, ValueError, r"positions\[0\] is 21, expected at most 20"),
    "rejected_inputs_taken_for_good": ([0, 10], None, ValueError, r"positions\[1\] is 10, expected at most 9"),
    "inputs_of_an_empty_ring": ([0, 1], [0, 2], ValueError, r"positions\[1\] is 1, expected at most 0.*state_ends\[2\]"),
    "negative": ([0, -1], [0, 1], ValueError, r"positions.*-1"),
    "past_int64": ([2**63 - 2, 0], [0, 1], ValueError, r"positions\[0\] is 9223372036854775806, .*room for the 2 tokens"),
    "ends_that_contradict_themselves": ([0, 6], [0, 3], ValueError, r"state_ends\[3\] is \[7, 5\], expected"),
    "index_past_the_pool": ([0, 0], [0, 4], IndexError, r"state_indices\[1\] is 4, expected \[0, 4\) or -1"),
    "index_negative": ([0, 0], [-2, 0], IndexError, r"state_indices\[0\] is -2"),
    "index_twice": ([0, 0], [1, 1], ValueError, r"state_indices\[0\] and state_indices\[1\] are both 1"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_short_conv_state_refuses_what_a_ring_cannot_follow(case, backend, device):
    if device != "cpu":
        pytest.skip("counted on a GPU: tests/sim")
    positions, indices, error, message = case
    ends = torch.tensor(ENDS if indices else ENDS[:2])
    state, out = torch.full((len(ends), 6, BRANCHES, SIZE), 0.5), torch.full((3, BRANCHES, SIZE), 7.0)
    with pytest.raises(error, match=message):
        call(backend, positions=torch.tensor(positions), state_indices=None if indices is None else torch.tensor(indices),
             state_ends=ends, state=state, out=out)
    assert (state == 0.5).all() and (out == 7).all() and ends.tolist() == (ENDS if indices else ENDS[:2])


def test_short_conv_state_ends_follow(backend, device):
    """Back by K, over the end, from the start again; a sequence without tokens and a skipped one stay."""
    ends = torch.tensor([*ENDS[:3], [5, 5], [6, 6]], device=device)
    weight, norm_weight = weights(3, device)
    state = torch.zeros(5, 6, BRANCHES, SIZE, device=device)
    positions, indices = torch.tensor([18, 9, 0, 77, 6], device=device), torch.tensor([0, 1, 2, 3, -1], device=device)
    short_conv(random_inputs(10, 1, device), weight, norm_weight, packed([1, 4, 3, 0, 2], device), 2, EPS, state, positions,
               indices, ends, backend=backend)
    assert ends.tolist() == [[19, 20], [13, 13], [3, 3], [5, 5], [6, 6]]


NO_STATE = dict(state=None, positions=None)
BAD = {  # name: (changed arguments, message)
    "indices_without_state": (NO_STATE | dict(state_indices=torch.tensor([0, 1])), "state_indices is given without"),
    "ends_without_state": (NO_STATE | dict(state_ends=torch.zeros(2, 2)), "state_ends is given without"),
    "indices_dtype": (dict(state_indices=torch.tensor([0, 1], dtype=torch.int32)), "state_indices must be torch.int64"),
    "indices_shape": (dict(state_indices=torch.tensor([0, 1, 1])), r"state_indices must have shape \[2\]"),
    "ends_dtype": (dict(state_ends=torch.zeros(2, 2, dtype=torch.int32)), "state_ends must be torch.int64"),
    "ends_shape": (dict(state_ends=torch.zeros(2, dtype=torch.int64)), r"state_ends must have shape \[2, 2\]"),
    "too_few_slots": (dict(state=torch.zeros(2, 3, BRANCHES, SIZE)), "state has 3 slots, expected at least 4"),
    "too_few_rings": (dict(state=torch.zeros(1, 6, BRANCHES, SIZE)), r"state must have shape \[2, 4\+K"),
    "state_dtype": (dict(state=torch.zeros(2, 6, BRANCHES, SIZE, dtype=torch.bfloat16)), "state must be torch.float32"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD.keys())
def test_short_conv_state_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        call("reference", **change)


def test_short_conv_state_ends_must_lie_apart(compiled):
    """One memory for positions and ends would be checked, then changed under the reader."""
    ends = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="shares memory with positions"):
        call("cpu", state_ends=ends, positions=ends[:, 0])


def test_short_conv_state_opcheck_and_compile(compiled):
    weight, norm_weight = weights(3)
    x, cu, positions, indices = random_inputs(3, 1), packed([2, 1]), torch.tensor([2, 0]), torch.tensor([2, 0])
    state, ends = random_inputs(18, 2).view(3, 6, BRANCHES, SIZE), torch.tensor([[0, 0], [0, 0], [2, 4]])
    op = torch.ops.engram_kernels.short_conv_update
    torch.library.opcheck(op.default, (x, weight, norm_weight, cu, positions, 2, EPS, state.clone(), indices, ends.clone()))

    def step(x, state, ends):
        return short_conv(x * 2, weight, norm_weight, cu, 2, EPS, state, positions, indices, ends) + 1

    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        given = state.clone(), ends.clone()
        results.append((run(x, *given), *given))
    torch.testing.assert_close(results[1], results[0])
    assert results[0][2].tolist() == [[1, 1], [0, 0], [4, 4]]
