"""ngram_hash on the PTX simulator: the launcher and its kernels against the reference, and what they cost."""
import dataclasses

import numpy as np
import pytest
import torch
from cuda_sim import MISSING_NVCC, MISSING_SASS, Device, LaunchError, build, poisoned
from cuda_sim.params import NgramHashParams
from cuda_sim.sass_path import executed
from op_cases import ngram_hash_spec, packed
from ptxsim import sassflow

from engram_kernels.layout import reciprocals_of
from engram_kernels.reference.ngram_hash import ngram_hash as reference

pytestmark = pytest.mark.skipif(bool(MISSING_NVCC), reason=MISSING_NVCC)
OP, FEW = "ngram_hash_cuda", "ngram_hash_few_cuda"


def make_layout(*args, **options):
    return ngram_hash_spec(*args, **options).layout()


def random_ids(count, vocab_size, seed=0, low=0):
    return torch.randint(low, vocab_size, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def simulate(layout, ids, cu, token_map=None, history=None, dead=None, device=None, misalign=0, state_indices=None, rejected=None,
             commits=False):
    """Row ids [L, T, C], the number of errors counted, the launches. With `commits` the history is brought up to date."""
    device = device or Device()
    num_layers, columns = layout.moduli.shape
    room = poisoned(num_layers * len(ids) * columns + misalign)
    errors = np.zeros(1, np.uint32)
    at = device.address
    params = NgramHashParams(
        token_ids=at(ids, "token_ids"), history=at(history, "history"), state_indices=at(state_indices, "state_indices"),
        rejected=at(rejected, "rejected"), dead_mask=at(dead, "dead_mask"),
        cu_seqlens=at(cu, "cu_seqlens"), token_map=at(token_map, "token_map"), multipliers=at(layout.multipliers),
        moduli=at(layout.moduli), offsets=at(layout.offsets), reciprocals=at(layout.reciprocals),
        row_ids=at(room, "row_ids") + 4 * misalign,
        num_tokens=len(ids), token_stride=ids.stride(0), num_sequences=len(cu) - 1,
        vocab_size=layout.num_ids if token_map is None else len(token_map), num_ids=layout.num_ids,
        boundary_id=layout.boundary_id, eos_id=layout.eos_id, num_layers=num_layers, max_order=layout.max_order,
        heads=layout.heads, ids_are_int64=ids.dtype == torch.int64, per_column=layout.multipliers.dim() == 3,
        error_count=at(errors, "error_count"))
    if history is not None:
        params.num_histories, params.history_width, params.history_stride = *history.shape, history.stride(0)
        params.committed = params.history if commits else None
    for name, x in (("indices", state_indices), ("rejected", rejected)):
        if x is not None:
            setattr(params, f"{name.replace('indices', 'index')}_stride", x.stride(0))
            setattr(params, f"{name}_are_int64", x.dtype == torch.int64)
    launches = device.run(OP, params)
    rows = torch.from_numpy(room[misalign:].reshape(num_layers, len(ids), columns))
    return rows, int(errors[0]), launches


def expected(layout, ids, cu, token_map=None, history=None, dead=None):
    return reference(ids, cu, layout.moduli, layout.offsets, layout.multipliers, token_map, history, dead, layout.num_ids,
                     layout.boundary_id, layout.eos_id)


def check(layout, ids, cu, token_map=None, history=None, dead=None, device=None, misalign=0):
    rows, errors, launches = simulate(layout, ids, cu, token_map, history, dead, device, misalign)
    torch.testing.assert_close(rows, expected(layout, ids, cu, token_map, history, dead), rtol=0, atol=0)
    assert errors == 0
    return launches


CASES = {  # name: (lengths, family, boundary, max_order, heads, table_size, layers)
    "one_token": ([1], "xor_prime", "pad", 4, 8, 16_000_000, (1, 14)),
    "v41_shape": ([130, 1, 67], "xor_prime", "pad", 4, 8, 16_000_000, (1, 14)),
    "one_past_a_tile": ([33], "xor_prime", "pad", 4, 8, 16_000_000, (1, 14)),
    "one_sequence_a_token": ([1] * 70, "xor_prime", "pad", 3, 8, 646_400, (1, 14)),
    "four_orders_one_head": ([50], "xor_prime", "pad", 4, 1, 646_400, (1, 14)),
    "polynomial_one_head": ([50], "polynomial", "stop", 4, 1, 646_400, (0,)),
    "bigrams_one_head": ([9, 5], "xor_prime", "pad", 2, 1, 50_000, (1,)),
    "five_orders_odd_heads_three_layers": ([40, 2, 1], "xor_prime", "pad", 5, 11, 30_000, (0, 1, 2)),
    "largest_order": ([30], "xor_prime", "stop", 8, 3, 9_000, (0, 1)),
    "small_moduli": ([70], "xor_prime", "pad", 4, 8, 3, (1, 14)),
    "ple_shape": ([100, 3], "xor_splitmix", "eos_reset", 3, 8, 20_000_000, (0,)),
    "splitmix_small_moduli": ([33], "xor_splitmix", "eos_reset", 3, 5, 700, (0, 1)),
    "longcat_shape": ([100, 3], "polynomial", "stop", 4, 4, 10_000_000, (0,)),
    "polynomial_small_moduli": ([33], "polynomial", "stop", 5, 9, 2, (0, 1)),
    "many_columns": ([5], "xor_prime", "pad", 4, 96, 5_000, (0, 1)),
    "empty_sequences": ([0, 4, 0, 0, 3, 0], "xor_prime", "pad", 3, 8, 20_011, (1, 14)),
    "no_tokens": ([0, 0], "xor_prime", "pad", 3, 8, 20_011, (1, 14)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ngram_hash_matches_reference(case):
    lengths, family, boundary, max_order, heads, table_size, layers = case
    layout = make_layout(family, boundary, max_order, heads, table_size, layers=layers)
    for more in ([], [129]):  # few tokens, and with more the others' kernel
        ids, cu = random_ids(sum(lengths + more), 1000), packed(lengths + more)
        ids[::11] = 7
        launches = check(layout, ids, cu, device=Device(options={"cta_order": "random"}))
        if len(ids):
            is_few = len(ids) <= min(128, 16 * len(lengths)) and layout.num_columns <= 32
            assert ["few" in launch.kernel for launch in launches] == [is_few]
        assert len(check(layout, ids.long(), cu)) == (1 if len(ids) else 0)


def test_ngram_hash_counts_what_is_older_than_the_start():
    """A placeholder in front of known tokens: counted once per entry, whatever the length of the chunk; pads are written."""
    layout, cu, ids = make_layout(), packed([2, 3, 0, 1]), random_ids(6, 1000)
    history = torch.tensor([[-1, 12, 13], [5, -1, -2], [-1, 7, 7], [5, 6, -1]], dtype=torch.int32)
    rows, errors = simulate(layout, ids, cu, history=history)[:2]
    ends_there = torch.tensor([[-1, -1, -1], [5, -1, -1], [-1, -1, -1], [5, 6, -1]], dtype=torch.int32)
    assert errors == 3 and torch.equal(rows, expected(layout, ids, cu, None, ends_there))


@pytest.mark.parametrize("family", ["xor_prime", "xor_splitmix", "polynomial"])
@pytest.mark.parametrize("boundary", ["pad", "eos_reset", "stop"])
def test_ngram_hash_every_rule_with_history_and_dead_tokens(family, boundary):
    layout = make_layout(family, boundary, vocab_size=30)
    ids, cu = random_ids(160, 30, seed=1), packed([20, 0, 1, 39, 1, 1, 2, 96])
    dead = torch.rand(160, generator=torch.Generator().manual_seed(2)) < 0.15
    history = random_ids(24, 30, seed=3, low=-2).reshape(8, 3)
    history = torch.where((history == -1).cumsum(1) > 0, -1, history)  # once -1, every older entry is -1
    check(layout, ids, cu, None, history, dead)
    check(layout, ids.long(), cu, None, history.long(), dead)
    ids, cu, dead = ids[:64], packed([20, 0, 1, 39, 1, 1, 2, 0]), dead[:64]  # few enough for the kernel of a step
    assert "few" in check(layout, ids, cu, None, history, dead)[0].kernel
    check(layout, ids.long(), cu, None, history.long(), dead)


def test_ngram_hash_token_map_and_strided_ids():
    layout = dataclasses.replace(make_layout(), num_ids=300)
    token_map = torch.cat([torch.arange(300), random_ids(700, 300, seed=4)]).to(torch.int32)
    ids = random_ids(400, 1000, seed=5)
    history = torch.tensor([[999, 3, -1], [0, -2, 998]], dtype=torch.int32)
    check(layout, ids[::2], packed([150, 50]), token_map, history)


def test_ngram_hash_chunks_equal_the_whole():
    layout = make_layout("xor_splitmix", "eos_reset", vocab_size=20)
    ids = random_ids(90, 20, seed=6)
    whole = simulate(layout, ids, packed([90]))[0]
    for cut in (1, 2, 3, 63, 64, 65):
        before = [int(ids[cut - back]) if cut >= back else -1 for back in range(1, layout.max_order)]
        part = simulate(layout, ids[cut:].clone(), packed([90 - cut]), history=torch.tensor([before], dtype=torch.int32))[0]
        torch.testing.assert_close(part, whole[:, cut:], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["xor_prime", "xor_splitmix"])
def test_ngram_hash_every_modulus_size(family):
    """The quotient is right on both sides of every rounding: powers of two and their neighbours, halves, random ones."""
    rng = np.random.default_rng(0)
    near = [2**k + d for k in range(31) for d in (-1, 0, 1)]
    near += [2**31 - d for d in range(1, 8)] + [2**32 * 2 // 5 + d for d in (-1, 0, 1)]
    moduli = [m for m in near if 1 <= m < 2**31] + [int(2 ** rng.uniform(0, 31)) for _ in range(120)]
    moduli = torch.tensor(moduli[:len(moduli) // 24 * 24]).reshape(-1, 24)
    layout = make_layout(family, layers=tuple(range(len(moduli))), vocab_size=2**31 - 1 if family == "xor_prime" else 1000)
    if family == "xor_prime":  # products up to 2^63 - 1
        multipliers = torch.from_numpy(rng.integers(1, 2**32, layout.multipliers.shape))
        layout = dataclasses.replace(layout, multipliers=multipliers)
    layout = dataclasses.replace(layout, num_rows=(1,) * len(moduli), moduli=moduli, reciprocals=reciprocals_of(moduli),
                                 offsets=torch.zeros_like(moduli))
    ids = random_ids(200, layout.num_ids, seed=7)
    ids[:20] = torch.tensor([0, layout.num_ids - 1] * 10)
    check(layout, ids, packed([200]))
    of_few = dataclasses.replace(layout, **{name: getattr(layout, name)[:30] for name in ("moduli", "reciprocals", "offsets",
                                                                                         "multipliers")})
    for first in (0, 100, 180):
        assert "few" in check(of_few, ids[first:first + 16].clone(), packed([16]))[0].kernel


def test_ngram_hash_misaligned_output_takes_narrow_stores():
    layout = make_layout()
    launches = check(layout, random_ids(50, 1000), packed([50]), misalign=1)
    assert all(line["bytes"] == 4 * line["threads"] for line in stores(launches[0]))


def check_bad_ids_are_counted(run, tokens=100):
    layout = make_layout()
    ids, cu = random_ids(tokens, 1000), packed([tokens - 10, 10])
    bad = [3, tokens - 10, tokens - 1]
    ids[bad] = torch.tensor([-1, 1000, 2**31 - 1], dtype=torch.int32)
    dead = torch.zeros(tokens, dtype=torch.bool)
    dead[9], ids[9] = True, -77  # not looked at
    history = torch.tensor([[1, -3, 5], [1000, 0, -1]], dtype=torch.int32)
    rows, errors, _ = run(layout, ids, cu, None, history, dead)
    assert errors == 5
    dead[bad], ids[bad] = True, 0
    history[0, 1], history[1, 0] = -1, -1
    torch.testing.assert_close(rows, expected(layout, ids, cu, None, history, dead), rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [100, 32])
def test_ngram_hash_counts_bad_ids(tokens):
    check_bad_ids_are_counted(simulate, tokens)


@pytest.mark.parametrize("cu", [[0, 60, 50, 100], [1, 100], [0, 90], [0, 5000], [-7, 100], [0, 200, -3, 100]],
                         ids=["decreases", "starts_late", "short", "long", "negative", "wild"])
def test_ngram_hash_bad_cu_seqlens_is_counted_and_stays_in_bounds(cu):
    history = torch.full((len(cu) - 1, 3), 5, dtype=torch.int32)
    device = Device(options={"race": False})  # what is written where is not defined
    cu = torch.tensor(cu, dtype=torch.int32)
    assert simulate(make_layout(), random_ids(100, 1000), cu, history=history, device=device)[1] > 0
    of_few = cu.clamp(max=40) if cu.max() <= 100 else cu
    device = Device(options={"race": False})
    _, errors, launches = simulate(make_layout(), random_ids(10, 1000), of_few, history=history, device=device)
    assert errors > 0 and "few" in launches[0].kernel


def test_ngram_hash_rejects():
    layout = make_layout()
    with pytest.raises(LaunchError, match="boundary_id is 2000"):
        simulate(dataclasses.replace(layout, boundary_id=2000), random_ids(5, 9), packed([5]))
    with pytest.raises(LaunchError, match="5 tokens in 0 sequences"):
        simulate(layout, random_ids(5, 9), packed([]))
    wide = make_layout(heads=1000, table_size=50_000, layers=(0,))
    with pytest.raises(LaunchError, match="3000 columns of order 4 need .* bytes of shared memory"):
        simulate(wide, random_ids(5, 9), packed([5]))


# ---- what it costs ---------------------------------------------------------------------------------------------------

def stores(launch):
    return [line for line in launch.result.lines if (line["space"], line["kind"]) == ("global", "store")]


def of_a_warp(layers, **options):
    """PTX instructions of each warp that hashes one token, and of the one that checks and commits."""
    def run(count):
        layout = make_layout(table_size=16_000_000, vocab_size=99_092, layers=layers[:count])
        given = {name: x.clone() for name, x in options.items() if torch.is_tensor(x)}
        launch, = simulate(layout, random_ids(1, 129_280, seed=9), packed([1]), random_ids(129_280, 99_092, seed=8),
                           **options | given)[2]
        assert "few" in launch.kernel and launch.block == (32, count + 1, 1) and launch.shared_bytes == 0
        return launch.result.warp_instructions
    one, two = run(1), run(2)
    print(f"{two - one} PTX instructions per hashing warp, {2 * one - two} of the last one")
    return max(two - one, 2 * one - two)


def test_ngram_hash_of_one_token_takes_few_instructions():
    """A third and more of them are loads of parameters, moves and changes of a number's width."""
    layers, history = (1, 14), torch.tensor([[4, 5, 6]], dtype=torch.int32)
    assert of_a_warp(layers) <= 172
    assert of_a_warp(layers, history=history) <= 172
    assert of_a_warp(layers, history=history, commits=True) <= 200
    assert of_a_warp(layers, history=torch.tensor([[4, 5, 6, 7]], dtype=torch.int32), commits=True,
                     state_indices=torch.tensor([0]), rejected=torch.tensor([1])) <= 212


@pytest.mark.skipif(bool(MISSING_SASS), reason=MISSING_SASS)
def test_ngram_hash_of_one_token_takes_few_machine_instructions():
    """From above: the longest way of any warp through the kernel of order 4 with indices and rejected drafts, every loop once.

    PTX counts for the last warp and the hashing ones what no GPU executes (moves, changes of width, addresses made global) and
    counts once a 64-bit product or comparison that a GPU makes of two or three."""
    took = [executed(code, lambda ops: 1, lambda op, args: op.startswith("RED"))
            for name, code in build().sass(FEW).items() if "ILb1ELb0ELi4E" in name]
    print(f"{took} machine instructions per warp")
    assert len(took) == 1 and took[0] <= 212


V41_TOKENS = 2048
NUM_IDS = V41_TOKENS * 48


def run_v41(num_tokens, multiprocessors):
    layout = make_layout(table_size=16_000_000, vocab_size=99_092)
    token_map = random_ids(129_280, 99_092, seed=8)
    cut = num_tokens * 2 // 3
    return check(layout, random_ids(num_tokens, 129_280, seed=9), packed([cut, num_tokens - cut]), token_map,
                 device=Device(multiprocessors=multiprocessors, options={"race": False}))[0]


@pytest.fixture(scope="module")
def v41():
    """The V4.1 layout with a token map; one multiprocessor, so that the tiles are those of a large batch on a large GPU."""
    return run_v41(V41_TOKENS, 1)


def test_ngram_hash_instructions_per_id(v41):
    assert v41.result.thread_instructions / NUM_IDS <= 12
    # 2,048 tokens over 32 multiprocessors are 8,448 over 132: small tiles, to keep every multiprocessor busy, cost more
    assert run_v41(512, 8).result.thread_instructions / (512 * 48) <= 26


def test_ngram_hash_stores_are_wide_and_coalesced(v41):
    wide = stores(v41)
    assert all(line["bytes"] == 16 * line["threads"] and line["sectors"] == line["ideal"] for line in wide)
    written = v41.result.buffers["row_ids"]
    assert written["store_bytes"] == written["unique_bytes_written"] == 4 * NUM_IDS


def test_ngram_hash_reads_ids_once(v41):
    halo = 3 * (v41.grid[0] - 1)
    assert v41.grid[1] == 1
    assert v41.result.buffers["token_ids"]["load_bytes"] == 4 * (V41_TOKENS + halo)
    assert v41.result.memory["global.load"]["bytes"] < 0.1 * 4 * NUM_IDS


def test_ngram_hash_bank_conflicts(v41):
    for kind in ("load", "store"):
        shared = v41.result.memory[f"shared.{kind}"]
        assert shared["waves"] <= 1.1 * shared["ideal_waves"]


def test_ngram_hash_uses_no_local_memory():
    usages = build().usage(OP)
    assert len(usages) == 17  # each with a pool of histories too; the last commits those that other blocks may still read
    few = build().usage(FEW)
    assert len(few) == 12  # of three orders
    for name, usage in (usages | few).items():
        pooled = name in usages and "ELb1EEEv" in name  # three blocks per multiprocessor, else four; or one of 1,024 threads
        assert (usage.stack_bytes, usage.spill_bytes) == (0, 0) and usage.registers <= (80 if pooled else 64)


@pytest.mark.skipif(bool(MISSING_SASS), reason=MISSING_SASS)
def test_ngram_hash_machine_code(v41):
    """No call (a division would be one), and under 50 executed instructions per id."""
    sass = build().sass(OP)
    assert len(sass) == 17
    for code in (*sass.values(), *build().sass(FEW).values()):
        assert not [op for _, _, op, _ in code if op.startswith(("CALL", "MUFU.RCP64", "LDL", "STL"))]
    code = sass[v41.kernel]
    at = {address: i for i, (address, *_) in enumerate(code)}
    loops = [code[at[sassflow.target(args)]:i + 1] for i, (address, _, op, args) in enumerate(code)
             if op == "BRA" and sassflow.target(args) < address]
    walks = [body for body in loops if [op for _, _, op, _ in body].count("STG.E.128") == 4]
    per_id = min(len(body) for body in walks) / 16  # four tokens of four columns a turn
    assert per_id <= 8
    # the rest from above: every other loop as if all of it ran for every token, all else once per thread
    per_token = sum(len(body) for body in loops if not any(op.startswith("STG") for _, _, op, _ in body))
    ids_per_thread = NUM_IDS / (v41.grid[0] * np.prod(v41.block))
    assert per_id + per_token / 48 + len(code) / ids_per_thread < 50
