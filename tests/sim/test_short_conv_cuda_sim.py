"""short_conv on the PTX simulator: the launcher and its kernels against the reference, and what they cost."""
import itertools

import pytest
import torch
from cuda_sim import MISSING_NVCC, MISSING_SASS, Device, LaunchError, build
from op_cases import packed
from op_cases import plain_short_conv as plain_torch
from op_cases import short_conv_inputs as make_inputs
from short_conv_sim import EPS, OP, kernel_of, simulate

from engram_kernels.reference.short_conv import short_conv as reference
from engram_kernels.reference.short_conv import short_conv_update as reference_update
from engram_kernels.testing import assert_as_accurate_as_torch, assert_rounded_once

pytestmark = pytest.mark.skipif(bool(MISSING_NVCC), reason=MISSING_NVCC)
ONE_SM, RANDOM = {"multiprocessors": 1}, {"options": {"cta_order": "random"}}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

CASES = {  # name: (kernel, device, lengths, branches, size, width, dilation, dtype, weight dtype)
    "walk_bf16": ("walk", ONE_SM, [70, 1, 130], 2, 64, 4, 3, BF16, BF16),
    "walk_f16_float_weights": ("walk", ONE_SM, [70, 1, 131], 2, 64, 4, 3, F16, F32),
    "walk_f32": ("walk", ONE_SM, [70, 1, 130], 2, 32, 4, 3, F32, F32),
    "walk_several_warps": ("walk", ONE_SM, [50], 1, 1304, 4, 4, BF16, BF16),
    "walk_f32_several_warps": ("walk", ONE_SM, [33], 1, 1304, 3, 4, F32, F32),
    "walk_one_past_a_group": ("walk", {"multiprocessors": 1}, [65], 1, 256, 2, 5, BF16, BF16),
    "walk_no_taps_back": ("walk", ONE_SM, [90], 1, 64, 1, 7, BF16, BF16),
    "walk_published_rows": ("walk", ONE_SM, [25], 1, 5120, 4, 4, BF16, BF16),
    "walk_published_rows_three_taps": ("walk", ONE_SM, [41], 1, 5120, 3, 10, BF16, BF16),
    "taps_bf16": ("taps", RANDOM, [7, 1, 13], 2, 64, 4, 3, BF16, BF16),
    "taps_f16": ("taps", RANDOM, [7, 1, 13], 3, 264, 4, 1, F16, F16),
    "taps_f32": ("taps", RANDOM, [7, 1, 13], 2, 32, 4, 3, F32, F32),
    "taps_float_weights": ("taps", RANDOM, [7, 1, 13], 2, 64, 4, 2, BF16, F32),
    "taps_three": ("taps", RANDOM, [7, 1, 13], 2, 64, 3, 2, BF16, BF16),
    "taps_one": ("taps", RANDOM, [7], 1, 64, 1, 2, BF16, BF16),
    "taps_reach_past_the_sequence": ("taps", ONE_SM, [3, 5, 2], 2, 24, 4, 100, BF16, BF16),
    "taps_several_tokens_a_block": ("taps", ONE_SM, [3] * 30, 2, 64, 4, 3, BF16, BF16),
    "one_token": ("taps", RANDOM, [1], 1, 32, 4, 3, BF16, BF16),
    "empty_sequences": ("taps", RANDOM, [0, 4, 0, 0, 3, 0], 2, 40, 4, 3, BF16, BF16),
    "plain_tail_channels": ("plain", ONE_SM, [20, 9], 3, 37, 4, 3, F16, F16),
    "plain_tail_f32": ("plain", RANDOM, [20, 9], 1, 39, 2, 3, F32, F32),
    "plain_one_channel": ("plain", RANDOM, [12], 1, 1, 4, 1, BF16, BF16),
    "plain_most_taps": ("plain", RANDOM, [50], 1, 40, 8, 2, BF16, BF16),
    "plain_five_taps_f32": ("plain", ONE_SM, [20], 2, 40, 5, 2, F32, F32),
    "plain_long_rows": ("plain", RANDOM, [5], 1, 5128, 4, 1, BF16, F32),
    "plain_float_weights": ("plain", RANDOM, [9], 2, 21, 3, 1, BF16, F32),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_short_conv_matches_reference(case):
    kernel, device, lengths, branches, size, width, dilation, dtype, weight_dtype = case
    args = make_inputs(lengths, branches, size, width, dtype, weight_dtype)
    got, errors, launches = simulate(*args, dilation, device=Device(**device))
    exact = reference(*(a.double() for a in args[:3]), args[3], dilation, EPS)
    assert_as_accurate_as_torch(got, plain_torch(*args, dilation), exact)
    if dtype != F32 and got.numel() > 5000:
        assert_rounded_once(got, exact)
    assert errors == 0 and kernel_of(launches) == kernel and len(launches) == 1


def test_short_conv_no_tokens():
    for lengths in ([0, 0], []):
        got, errors, launches = simulate(*make_inputs(lengths), 3)
        assert (got.shape, errors, launches) == ((0, 2, 40), 0, [])


# ---- state -----------------------------------------------------------------------------------------------------------

def in_chunks(args, dilation, cuts, state, devices, position_dtype=torch.int32):
    """(outputs in the order of x, kernels used) of all sequences in the chunks that end at cuts[i][b] tokens of sequence b."""
    x, weight, norm_weight, cu = args
    done, pieces, kernels = [0] * (len(cu) - 1), [[] for _ in cu[1:]], []
    for upto, device in zip(cuts, itertools.cycle(devices)):
        spans = [(int(begin) + d, int(begin) + u) for begin, d, u in zip(cu, done, upto, strict=False)]
        take = [e - b for b, e in spans]
        chunk = torch.cat([x[b:e] for b, e in spans])
        out, errors, launches = simulate(chunk, weight, norm_weight, packed(take), dilation, state,
                                         torch.tensor(done, dtype=position_dtype), Device(**device))
        assert errors == 0
        kernels.append(kernel_of(launches))
        for rows, part in zip(pieces, out.split(take), strict=True):
            rows.append(part)
        done = upto
    return torch.cat([torch.cat(rows) for rows in pieces]), kernels


def check_ring(state, x, cu, reach):
    """Every slot holds the last input that went there; the state held NaN before, so what was never written is NaN."""
    for b, (begin, end) in enumerate(itertools.pairwise(cu.tolist())):
        for slot in range(reach):
            at = [t for t in range(max(begin, end - reach), end) if (t - begin) % reach == slot]
            assert torch.equal(state[b, slot], x[at[0]]) if at else state[b, slot].isnan().all()


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("size", [64, 37], ids=["vectors", "elements"])
def test_short_conv_any_chunking_gives_the_bits_of_the_whole(dtype, size):
    """Whole by the walking kernel; then chunks shorter and longer than the ring, by walking blocks, by taps, over many blocks."""
    lengths = [80, 61]
    args = make_inputs(lengths, 2, size, 4, dtype, seed=1)
    whole, _, launches = simulate(*args, 3, device=Device(**ONE_SM))
    assert kernel_of(launches) == ("walk" if size == 64 else "plain")
    for cuts, devices in {
        "decode": ([(t, t) for t in range(1, 16)] + [(16, 15), (80, 61)], [RANDOM]),
        "mixed": ([(2, 0), (11, 40), (12, 41), (60, 41), (61, 52), (80, 61)], [ONE_SM, RANDOM]),
    }.values():
        state = torch.full((2, 9, 2, size), float("nan"), dtype=dtype)
        got, kernels = in_chunks(args, 3, cuts, state, devices, torch.int64 if size == 64 else torch.int32)
        assert torch.equal(got, whole)
        check_ring(state, args[0], args[3], 9)
        assert size == 37 or {"taps", "walk"} >= set(kernels)


def test_short_conv_walks_on_from_a_state():
    args = make_inputs([200], 2, 64, seed=2)
    whole, _, _ = simulate(*args, 3, device=Device(**ONE_SM))
    state = torch.full((1, 9, 2, 64), float("nan"), dtype=BF16)
    got, kernels = in_chunks(args, 3, [(71,), (200,)], state, [ONE_SM])
    assert kernels == ["walk", "walk"] and torch.equal(got, whole)
    check_ring(state, args[0], args[3], 9)


def test_short_conv_bits_depend_on_no_path():
    """Tokens give the same bits by all three kernels, with and without 16-byte alignment, over one block and over many."""
    x, weight, norm_weight, cu = make_inputs([150, 30], 3, 2056, 4)
    wide = torch.zeros(180, 4, 2063, dtype=BF16)
    wide[:, 1:, 3:2059] = x
    strided = wide[:, 1:, 3:2059]
    first, _, launches = simulate(x[:150], weight, norm_weight, cu[:2], 3, device=Device(multiprocessors=2))
    assert kernel_of(launches) == "walk"
    for inputs, lead, kernel in ((x, 0, "taps"), (strided, 0, "plain"), (x, 1, "plain")):
        got, _, launches = simulate(inputs[:40], weight, norm_weight, packed([40]), 3, out_lead=lead)
        assert kernel_of(launches) == kernel and torch.equal(got, first[:40])
    branches_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    got, _, launches = simulate(branches_first[:150], weight, norm_weight, cu[:2], 3, device=Device(multiprocessors=2))
    assert kernel_of(launches) == "walk" and torch.equal(got, first)


def test_short_conv_state_is_a_slice_of_a_cache():
    """A new sequence takes over a slot full of NaN beside one that runs; nothing outside the slice is touched."""
    x, weight, norm_weight, cu = make_inputs([30, 30], 2, 40, seed=3)
    cache = torch.full((2, 5, 9, 2, 40), float("nan"), dtype=BF16)
    state = cache[:, 3]
    got, _ = in_chunks((x, weight, norm_weight, cu), 3, [(20, 0), (21, 1), (22, 2), (30, 30)], state, [RANDOM])
    assert torch.equal(got, simulate(x, weight, norm_weight, cu, 3)[0])
    check_ring(state, x, cu, 9)
    assert cache[:, [0, 1, 2, 4]].isnan().all()


@pytest.mark.parametrize("width, dilation", [(4, 3), (2, 300), (8, 5)])
def test_short_conv_positions_past_int32(width, dilation):
    x, weight, norm_weight, cu = make_inputs([5, 3], 2, 40, width)
    reach = (width - 1) * dilation
    ring = torch.randn(2, reach, 2, 40, generator=torch.Generator().manual_seed(3)).to(BF16)
    want_state = ring.clone()
    doubles = (a.double() for a in (x, weight, norm_weight))
    want = reference_update(*doubles, cu, torch.tensor([reach, reach + 1]), dilation, EPS, want_state)
    results = []
    for positions in (torch.tensor([reach, reach + 1], dtype=torch.int32), torch.tensor([reach << 40, (reach << 40) + 1])):
        state = ring.clone()
        out, errors, _ = simulate(x, weight, norm_weight, cu, dilation, state, positions)
        assert errors == 0 and torch.equal(state, want_state)
        results.append(out)
    assert torch.equal(*results)
    assert_as_accurate_as_torch(results[0], want.to(BF16), want)


@pytest.mark.parametrize("kernel, size, tokens", [("walk", 64, 100), ("taps", 64, 3), ("plain", 37, 3)])
def test_short_conv_rejected_drafts_in_a_pool(kernel, size, tokens):
    """Chunks with drafts of NaN behind them, which the next chunk goes back over; a skipped sequence of NaN between."""
    x, weight, norm_weight, _ = make_inputs([tokens + 5, tokens + 5], 2, size, dtype=F32)
    whole = simulate(x, weight, norm_weight, packed([tokens + 5] * 2), 2)[0].view(2, tokens + 5, 2, size)
    state, ends = torch.full((5, 6 + 2, 2, size), float("nan")), torch.zeros(5, 2, dtype=torch.int64)
    table, done = torch.tensor([[0, 3], [-7, -1], [0, 1]]), 0
    for take, drafts in ((tokens, 2), (1, 0), (0, 1), (2, 2), (2, 0)):
        parts = x.view(2, -1, 2, size)[:, done:done + take]
        bad = torch.full((drafts, 2, size), float("nan"))
        sizes = [take + drafts, 2, take + drafts]
        rows = torch.cat([parts[0], bad, torch.full((2, 2, size), float("nan")), parts[1], bad])
        table[::2, 0] = done
        got, errors, launches = simulate(rows, weight, norm_weight, packed(sizes), 2, state, table[:, 0], indices=table[:, 1],
                                         ends=ends, device=Device(**ONE_SM if take > 50 else RANDOM))
        assert errors == 0 and "short_conv_ends" in launches[-1].kernel and kernel_of(launches) in (kernel, "taps")
        first, skipped, second = got.split(sizes)
        assert torch.equal(torch.stack([first[:take], second[:take]]), whole[:, done:done + take]) and (skipped == 0).all()
        done += take
        assert ends[[3, 1], 0].tolist() == [done + drafts] * 2
    assert state[[0, 2, 4]].isnan().all() and (ends[[0, 2, 4]] == 0).all()


def test_short_conv_refused_sequences_are_counted_and_skipped():
    """What the CPU refuses: positions a ring cannot follow, ends that cannot be, rings outside the pool, a ring for two."""
    x, weight, norm_weight, cu = make_inputs([2] * 8, 2, 64)
    ends = torch.tensor([[20, 20], [9, 11], [0, 0], [5, 5], [7, 5]])
    positions, indices = torch.tensor([17, 10, 1, 5, -1, 0, 0, 6]), torch.tensor([0, 1, 2, 3, 3, 5, -2, 4])
    state = torch.full((5, 8, 2, 64), 0.5, dtype=BF16)
    got, errors, _ = simulate(x, weight, norm_weight, cu, 2, state, positions, indices=indices, ends=ends)
    assert errors == 8  # seven, and the ring that 3 and 4 share
    assert (state[[0, 1, 2, 4]] == 0.5).all() and not (state[3] == 0.5).all()
    assert ends.tolist() == [[20, 20], [9, 11], [0, 0], [7, 7], [7, 5]]
    assert (got[:6] == 0).all() and (got[8:] == 0).all() and not (got[6:8] == 0).all()


def test_short_conv_many_sequences():
    """Searches of more than one round; each block finds its own sequence."""
    lengths = [(7 * b) % 3 for b in range(70)]
    args = make_inputs(lengths, 1, 24, seed=4)
    got, errors, _ = simulate(*args, 1, device=Device(**RANDOM))
    exact = reference(*(a.double() for a in args[:3]), args[3], 1, EPS)
    assert_as_accurate_as_torch(got, plain_torch(*args, 1), exact)
    assert errors == 0


# ---- special values and bad data -------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [0.0, -0.0, float("inf"), float("nan"), 1e30, -90.0])
@pytest.mark.parametrize("size", [24, 23], ids=["taps", "plain"])
def test_short_conv_special_values(value, size):
    x, weight, norm_weight, cu = make_inputs([6], 1, size, dtype=F32)
    x[2] = value
    weight *= 40  # z past where e^-z leaves the range of a float
    got = simulate(x, weight, norm_weight, cu, 1)[0]
    want = reference(x.double(), weight.double(), norm_weight.double(), cu, 1, EPS)
    if value == 1e30:  # its square is past float32: the norm is 0 there and not in float64
        want = reference(x, weight, norm_weight, cu, 1, EPS).double()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kernel, width, size", [("walk", 4, 64), ("walk", 3, 64), ("taps", 4, 64), ("plain", 5, 64)])
def test_short_conv_inf_weight_meets_nothing_before_the_start(kernel, width, size):
    x, weight, norm_weight, cu = make_inputs([90, 50], 1, size, width, F32)
    weight[:, :, 0] = float("inf")
    device = Device(**ONE_SM) if kernel == "walk" else Device()
    got, _, launches = simulate(x, weight, norm_weight, cu, 2, device=device)
    reached = torch.tensor([t >= (width - 1) * 2 for n in (90, 50) for t in range(n)])
    assert got[~reached].isfinite().all() and not got[reached].isfinite().any() and kernel_of(launches) == kernel


BAD_CU = {"decreases": [0, 60, 50, 100], "starts_late": [1, 100], "short": [0, 90], "long": [0, 5000], "negative": [-7, 100],
          "wild": [0, 2**31 - 1, -2**31, 100]}


@pytest.mark.parametrize("cu", BAD_CU.values(), ids=BAD_CU.keys())
def test_short_conv_bad_cu_seqlens_is_counted_and_stays_in_bounds(cu):
    cu = torch.tensor(cu, dtype=torch.int32)
    for size, width, device in ((64, 4, ONE_SM), (64, 4, {}), (37, 4, {}), (64, 6, {})):
        x, weight, norm_weight, _ = make_inputs([100], 1, size, width)
        device = {**device, "options": {"race": False}}  # what is written to the state is not defined
        assert simulate(x, weight, norm_weight, cu, 3, device=Device(**device))[1] > 0
        state = torch.zeros(len(cu) - 1, (width - 1) * 3, 1, size, dtype=BF16)
        positions = torch.arange(len(cu) - 1) * 10
        assert simulate(x, weight, norm_weight, cu, 3, state, positions, Device(**device))[1] > 0


def test_short_conv_bad_positions_are_counted_and_stay_in_bounds():
    x, weight, norm_weight, cu = make_inputs([4, 4, 4, 4], 2, 64)
    for positions, bad in (([3, -1, -2**31, 2**31 - 1], 2), ([-2**63, 2**63 - 1, 2**63 - 17, 0], 2)):
        dtype = torch.int32 if positions[3] else torch.int64
        state = torch.full((4, 9, 2, 64), float("nan"), dtype=BF16)
        _, errors, _ = simulate(x, weight, norm_weight, cu, 3, state, torch.tensor(positions, dtype=dtype))
        assert errors == bad
    good = torch.tensor([0, 1, 9, 2**31 - 1], dtype=torch.int32)
    assert simulate(x, weight, norm_weight, cu, 3, torch.zeros(4, 9, 2, 64, dtype=BF16), good)[1] == 0


def test_short_conv_rejects():
    x, weight, norm_weight, cu = make_inputs([6])
    with pytest.raises(LaunchError, match="dilation is 0"):
        simulate(x, weight, norm_weight, cu, 0)
    with pytest.raises(LaunchError, match="dilation is 300000000"):
        simulate(x, weight, norm_weight, cu, 300_000_000)
    with pytest.raises(LaunchError, match="6 tokens in 0 sequences"):
        simulate(x, weight, norm_weight, packed([]), 3)


# ---- what it costs ---------------------------------------------------------------------------------------------------

ROW, BRANCHES = 5120 * 2, 4


@pytest.fixture(scope="module")
def walk():
    """V4.1 rows, 36 tokens; one multiprocessor, so that a block walks along a whole phase, as in a large batch."""
    return simulate(*make_inputs([36], 1, 5120), 3, device=Device(**ONE_SM))[2][0]


@pytest.fixture(scope="module")
def decode():
    """Eight sequences, a token of each."""
    state = torch.zeros(8, 9, BRANCHES, 5120, dtype=BF16)
    args = make_inputs([1] * 8, BRANCHES, 5120)
    return simulate(*args, 3, state, torch.full((8,), 100))[2][0]


def test_short_conv_walk_moves_each_byte_once(walk):
    buffers, weights = walk.result.buffers, walk.grid[0] * 5 * ROW
    moved = sum(b.get("load_bytes", 0) + b.get("store_bytes", 0) for b in buffers.values())
    assert walk.grid[:2] == (3, 1)  # a block for each phase
    assert buffers["x"]["load_bytes"] == buffers["out"]["store_bytes"] == 36 * ROW
    assert buffers["weight"]["load_bytes"] + buffers["norm_weight"]["load_bytes"] == weights
    assert moved <= 1.02 * (2 * 36 * ROW + weights)


def test_short_conv_walk_reads_again_only_what_lies_in_front_of_a_block():
    args = make_inputs([150], 2, 1024)
    launch = simulate(*args, 3, device=Device(multiprocessors=3))[2][0]
    stretches = launch.grid[0] // 3
    assert kernel_of([launch]) == "walk" and stretches > 1
    assert launch.result.buffers["x"]["load_bytes"] == (150 + 9 * (stretches - 1)) * 2 * 2048


def test_short_conv_decode_reads_what_its_taps_reach(decode):
    buffers, rows = decode.result.buffers, 8 * BRANCHES * ROW
    assert decode.grid[:2] == (8, BRANCHES)  # a block for each row: weights come from L2 for all but the first
    state = buffers["state"]
    assert (state["load_bytes"], state["store_bytes"]) == (3 * rows, rows)
    assert buffers["x"]["load_bytes"] == buffers["out"]["store_bytes"] == rows
    unique = sum(b.get("unique_bytes_read", 0) + b.get("unique_bytes_written", 0) for b in buffers.values())
    assert unique <= 1.02 * (6 * rows + BRANCHES * 5 * ROW)


def test_short_conv_accesses_are_wide(walk, decode):
    for launch in (walk, decode):
        for name in ("x", "out", "state"):
            buffer = launch.result.buffers.get(name, {})
            for kind in ("load", "store"):
                assert buffer.get(f"{kind}_sectors", 0) * 32 == buffer.get(f"{kind}_bytes", 0)
        copies = [line for line in launch.result.lines if "cp.async" in line["text"] or
                  (line["space"], line["kind"]) == ("global", "store")]
        assert copies and all(line["bytes"] == 16 * line["threads"] for line in copies)


def test_short_conv_bank_conflicts(walk, decode):
    for launch in (walk, decode):
        for kind in ("load", "store"):
            shared = launch.result.memory[f"shared.{kind}"]
            assert shared["waves"] <= 1.1 * shared["ideal_waves"]


def test_short_conv_walk_instructions(walk):
    """Of a token and branch, as in a long chunk: PTX instructions of warps. Rows kept in shared memory took 8,170."""
    longer = simulate(*make_inputs([84], 1, 5120), 3, device=Device(**ONE_SM))[2][0]
    took = (longer.result.warp_instructions - walk.result.warp_instructions) / (84 - 36)
    print(f"{took:.0f} PTX instructions of warps per token and branch")
    assert 2000 < took <= 3850


def test_short_conv_uses_no_local_memory():
    usages = build().usage(OP)
    assert len(usages) == 16
    for name, usage in usages.items():
        threads = 512 if "walk_kernelILNS_5DTypeE0E" in name else 640  # float rows take more
        assert (usage.stack_bytes, usage.spill_bytes) == (0, 0) and -(-usage.registers // 8) * 8 * threads <= 65536


@pytest.mark.skipif(bool(MISSING_SASS), reason=MISSING_SASS)
def test_short_conv_machine_code():
    for code in build().sass(OP).values():
        assert not [op for _, _, op, _ in code if op.startswith(("CALL", "LDL", "STL"))]
