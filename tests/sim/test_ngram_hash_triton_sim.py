"""ngram_hash in Triton: the compiled PTX on the simulator, against the reference, and what it costs."""
import dataclasses
import re

import numpy as np
import pytest
import torch
from op_cases import packed
from test_ngram_hash_cuda_sim import check_bad_ids_are_counted, expected, make_layout, random_ids
from triton_sim import MISSING_TRITON, compile_variants, simulate

from engram_kernels.layout import reciprocals_of

pytestmark = pytest.mark.skipif(bool(MISSING_TRITON), reason=MISSING_TRITON)


def run(layout, ids, cu, token_map=None, history=None, dead=None, **options):
    from engram_kernels.triton_kernels import ngram_hash as module
    errors = torch.zeros(1, dtype=torch.int32)
    original, module.error_counter = module.error_counter, lambda op, device: errors
    try:
        rows, launches = simulate(lambda: module.ngram_hash(
            ids, cu, layout.moduli, layout.offsets, layout.multipliers, layout.reciprocals, token_map, history, dead,
            layout.num_ids, layout.boundary_id, layout.eos_id), **options)
    finally:
        module.error_counter = original
    return rows, errors.item(), launches


def check(layout, ids, cu, token_map=None, history=None, dead=None, **options):
    rows, errors, launches = run(layout, ids, cu, token_map, history, dead, **options)
    torch.testing.assert_close(rows, expected(layout, ids, cu, token_map, history, dead), rtol=0, atol=0)
    assert errors == 0
    return launches


CASES = {  # name: (lengths, family, boundary, max_order, heads, table_size, layers)
    "v41_shape": ([130, 1, 67], "xor_prime", "pad", 4, 8, 16_000_000, (1, 14)),
    "one_past_a_chunk": ([129], "xor_prime", "pad", 4, 8, 16_000_000, (1, 14)),
    "five_orders_odd_heads_three_layers": ([70, 2, 1], "xor_prime", "pad", 5, 11, 30_000, (0, 1, 2)),
    "ple_shape": ([100, 3], "xor_splitmix", "eos_reset", 3, 8, 20_000_000, (0,)),
    "longcat_shape": ([100, 3], "polynomial", "stop", 4, 4, 10_000_000, (0,)),
    "empty_sequences": ([0, 4, 0, 0, 3, 0], "xor_prime", "pad", 3, 8, 3, (1, 14)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ngram_hash_matches_reference(case):
    lengths, family, boundary, max_order, heads, table_size, layers = case
    layout = make_layout(family, boundary, max_order, heads, table_size, layers=layers)
    ids = random_ids(sum(lengths), 1000)
    ids[::11] = 7
    assert len(check(layout, ids, packed(lengths), cta_order="random")) == 1


def test_ngram_hash_counts_what_is_older_than_the_start():
    """A placeholder in front of known tokens: counted once per entry, whatever the length of the chunk; pads are written."""
    layout, cu, ids = make_layout(), packed([2, 3, 0, 1]), random_ids(6, 1000)
    history = torch.tensor([[-1, 12, 13], [5, -1, -2], [-1, 7, 7], [5, 6, -1]], dtype=torch.int32)
    rows, errors = run(layout, ids, cu, history=history)[:2]
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


def test_ngram_hash_token_map_strided_int64_ids_and_chunks(monkeypatch):
    from engram_kernels.triton_kernels import ngram_hash as module
    monkeypatch.setattr(module, "TARGET_PROGRAMS", 1)
    layout = dataclasses.replace(make_layout(), num_ids=300)
    token_map = torch.cat([torch.arange(300), random_ids(700, 300, seed=4)]).to(torch.int32)
    ids = random_ids(1000, 1000, seed=5).long()
    history = torch.tensor([[999, -1, -1], [0, -2, 998]])
    check(layout, ids[::2], packed([150, 350]), token_map, history)


@pytest.mark.parametrize("family", ["xor_prime", "xor_splitmix"])
def test_ngram_hash_every_modulus_size(family):
    """The quotient is right on both sides of every rounding: powers of two and their neighbours, halves, random ones."""
    rng = np.random.default_rng(0)
    near = [2**k + d for k in range(31) for d in (-1, 0, 1)] + [2**31 - d for d in range(1, 8)]
    moduli = [m for m in near if 1 <= m < 2**31] + [int(2 ** rng.uniform(0, 31)) for _ in range(120)]
    moduli = torch.tensor(moduli[:len(moduli) // 24 * 24]).reshape(-1, 24)
    layout = make_layout(family, layers=tuple(range(len(moduli))), vocab_size=2**31 - 1 if family == "xor_prime" else 1000)
    if family == "xor_prime":  # products up to 2^63 - 1
        layout = dataclasses.replace(layout, multipliers=torch.from_numpy(rng.integers(1, 2**32, layout.multipliers.shape)))
    layout = dataclasses.replace(layout, num_rows=(1,) * len(moduli), moduli=moduli, reciprocals=reciprocals_of(moduli),
                                 offsets=torch.zeros_like(moduli))
    ids = random_ids(200, layout.num_ids, seed=7)
    ids[:20] = torch.tensor([0, layout.num_ids - 1] * 10)
    check(layout, ids, packed([200]))


def test_ngram_hash_counts_bad_ids():
    check_bad_ids_are_counted(run)


@pytest.mark.parametrize("cu", [[0, 60, 50, 100], [1, 100], [0, 90], [0, 5000], [-7, 100], [0, 200, -3, 100]],
                         ids=["decreases", "starts_late", "short", "long", "negative", "wild"])
def test_ngram_hash_bad_cu_seqlens_is_counted_and_stays_in_bounds(cu):
    history = torch.full((len(cu) - 1, 3), 5, dtype=torch.int32)
    assert run(make_layout(), random_ids(100, 1000), torch.tensor(cu, dtype=torch.int32), history=history)[1] > 0


@pytest.fixture(scope="module")
def v41():
    """The V4.1 layout with a token map; programs take as many tokens as those of a large batch."""
    from engram_kernels.triton_kernels import ngram_hash as module
    layout = make_layout(table_size=16_000_000, vocab_size=99_092)
    token_map, ids = random_ids(129_280, 99_092, seed=8), random_ids(2048, 129_280, seed=9)
    before, module.TARGET_PROGRAMS = module.TARGET_PROGRAMS, 1
    try:
        return check(layout, ids, packed([1365, 683]), token_map, race=False)[0]
    finally:
        module.TARGET_PROGRAMS = before


NUM_IDS = 2048 * 48


def test_ngram_hash_instructions_per_id(v41):
    assert v41.result.thread_instructions / NUM_IDS <= 18


def test_ngram_hash_stores_are_wide_and_written_once(v41):
    wide = [line for line in v41.result.lines if (line["space"], line["kind"]) == ("global", "store")]
    assert all(line["bytes"] == 16 * line["threads"] and line["sectors"] == line["ideal"] for line in wide)
    written = v41.result.buffers["out"]
    assert written["store_bytes"] == written["unique_bytes_written"] == 4 * NUM_IDS


def test_ngram_hash_divides_nothing(v41):
    for compiled in (v41.compiled, compile_variants([v41.variant], "sm_80")[0]):
        assert not re.search(r"\b(div|rem)\.[us]|\bcall\b", compiled.code)
    assert not re.search(r"v_div_\w+_f64|s_swappc", compile_variants([v41.variant], "gfx942")[0].code)
