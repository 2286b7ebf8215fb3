"""ngram_hash_and_commit on the simulator, CUDA's kernels and Triton's: row ids, histories, what is counted, how many launches."""
import pytest
import torch
from cuda_sim import MISSING_NVCC, Device
from op_cases import packed
from test_ngram_hash_cuda_sim import make_layout, random_ids
from test_ngram_hash_cuda_sim import simulate as run_cuda
from triton_sim import MISSING_TRITON, simulate

from engram_kernels.reference.ngram_hash import ngram_hash_update as reference


def run_triton(layout, ids, cu, token_map, history, dead, state_indices, rejected, **options):
    from engram_kernels.triton_kernels import ngram_hash as module
    errors = torch.zeros(1, dtype=torch.int32)
    original, module.error_counter = module.error_counter, lambda op, device: errors
    try:
        rows, launches = simulate(lambda: module.ngram_hash_update(
            ids, cu, layout.moduli, layout.offsets, layout.multipliers, layout.reciprocals, history, token_map, dead,
            state_indices, rejected, layout.num_ids, layout.boundary_id, layout.eos_id), cta_order="random", **options)
    finally:
        module.error_counter = original
    return rows, errors.item(), launches


def run_on(toolchain, layout, ids, cu, history, token_map=None, dead=None, state_indices=None, rejected=None):
    """Row ids, errors counted, launches; `history` is updated."""
    if toolchain == "triton":
        return run_triton(layout, ids, cu, token_map, history, dead, state_indices, rejected)
    return run_cuda(layout, ids, cu, token_map, history, dead, Device(options={"cta_order": "random"}),
                    state_indices=state_indices, rejected=rejected, commits=True)


@pytest.fixture(params=["cuda", "triton"])
def toolchain(request):
    reason = MISSING_NVCC if request.param == "cuda" else MISSING_TRITON
    if reason:
        pytest.skip(reason)
    return request.param


def check(toolchain, layout, ids, cu, history, token_map=None, dead=None, state_indices=None, rejected=None):
    want_history = history.clone()
    want = reference(ids, cu, layout.moduli, layout.offsets, layout.multipliers, want_history, token_map, dead, state_indices,
                     rejected, layout.num_ids, layout.boundary_id, layout.eos_id)
    rows, errors, launches = run_on(toolchain, layout, ids, cu, history, token_map, dead, state_indices, rejected)
    torch.testing.assert_close(rows, want, rtol=0, atol=0)
    torch.testing.assert_close(history, want_history, rtol=0, atol=0)
    assert errors == 0
    return launches


LENGTHS = {"a_step": [1] * 5, "drafts": [3] * 8, "ragged": [0, 2, 1, 0, 41, 5, 1, 0], "several_blocks": [30, 1, 1, 70, 40, 3]}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("family, boundary", [("xor_prime", "pad"), ("xor_splitmix", "eos_reset"), ("polynomial", "stop")])
def test_ngram_hash_commit_matches_reference(lengths, family, boundary, toolchain):
    layout = make_layout(family, boundary, vocab_size=30, heads=4)
    tokens, num = sum(lengths), len(lengths)
    ids, cu = random_ids(tokens, 30, seed=1), packed(lengths)
    dead = torch.rand(tokens, generator=torch.Generator().manual_seed(2)) < 0.15
    history = random_ids(7 * (num + 3), 30, seed=3, low=-1).reshape(num + 3, 7)[:, 1:6]  # two drafts to spare
    history.copy_(torch.where((history == -1).cumsum(1) > 0, -1, history))
    indices, rejected = torch.randperm(num + 3, generator=torch.Generator().manual_seed(4))[:num], random_ids(num, 3, seed=5)
    indices[num // 2] = -1
    check(toolchain, layout, ids, cu, history, None, dead, indices, rejected)
    check(toolchain, layout, ids.long(), cu, history.long().contiguous(), None, None, indices.int(), None)
    check(toolchain, layout, ids, cu, torch.full((num, 3), -1, dtype=torch.int32))


def test_ngram_hash_commit_three_layers_with_a_token_map(toolchain):
    layout = make_layout(layers=(0, 1, 2), vocab_size=300)
    token_map = torch.cat([torch.arange(300), random_ids(700, 300, seed=4)]).to(torch.int32)
    history = torch.tensor([[999, 3, 0, -1], [0, -2, 998, 5]], dtype=torch.int32)
    check(toolchain, layout, random_ids(6, 1000, seed=5), packed([1, 5]), history, token_map, rejected=torch.tensor([1, 0]))


@pytest.mark.parametrize("tokens, layers, launches", [(64, (1, 14), 1), (128, (0,), 1), (129, (0,), 2), (3, (0, 1, 2), 1)])
def test_ngram_hash_commit_of_a_step_is_one_launch(tokens, layers, launches, toolchain):
    found = check(toolchain, make_layout(layers=layers), random_ids(tokens, 1000), packed([1] * tokens),
                  torch.full((tokens, 4), -1, dtype=torch.int32), state_indices=torch.arange(tokens))
    assert len(found) == (launches if toolchain == "cuda" else 2)


def test_ngram_hash_commit_without_tokens_drops_what_was_rejected(toolchain):
    history = torch.tensor([[1, 2, 3, 4], [5, 6, -1, -1]], dtype=torch.int32)
    check(toolchain, make_layout(), random_ids(0, 9), packed([0, 0]), history, rejected=torch.tensor([1, 1]))
    assert history.tolist() == [[2, 3, 4, -3], [6, -1, -1, -1]]


def test_ngram_hash_commit_counts_what_is_refused(toolchain):
    """Bad ids are dead, also in the history; a bad index or too much rejected skips the sequence; nothing is out of bounds."""
    layout, cu = make_layout(), packed([2, 1, 1, 1, 1])
    ids = torch.tensor([5, 1000, 6, 7, -3, 8], dtype=torch.int32)
    history = torch.tensor([[1, 2, 3, 4], [-1, 9, 9, 9], [1, 2, 3, 4], [1, 2, 3, 4], [7, 7, 7, 7]], dtype=torch.int32)
    indices, rejected = torch.tensor([0, 5, 2, 3, -1]), torch.tensor([0, 0, 2, 0, 99])
    rows, errors, _ = run_on(toolchain, layout, ids, cu, history, state_indices=indices, rejected=rejected)
    assert errors == 4  # token 1, index 5, rejected 2, token 4
    assert history.tolist() == [[-2, 5, 1, 2], [-1, 9, 9, 9], [1, 2, 3, 4], [-2, 1, 2, 3], [7, 7, 7, 7]]
    assert (rows[:, [2, 3, 5]] == -1).all() and (rows[:, [0, 1, 4]] >= 0).all()
    wrong = torch.tensor([[1, -3, 3, 3], [-1, 9, -1, -1]], dtype=torch.int32)
    assert run_on(toolchain, layout, ids[[0, 2]], packed([1, 1]), wrong)[1] == 2


def test_ngram_hash_commit_counts_twins(toolchain):
    """Whose tokens remain is nobody's promise, so the simulator does not look for races."""
    history = torch.full((3, 3), -1, dtype=torch.int32)
    args = (make_layout(), random_ids(3, 9), packed([1, 1, 1]), None, history, None)
    indices = torch.tensor([2, -1, 2])
    if toolchain == "triton":
        errors = run_triton(*args, indices, None, race=False)[1]
    else:
        errors = run_cuda(*args, Device(options={"race": False}), state_indices=indices, commits=True)[1]
    assert errors == 1


@pytest.mark.parametrize("cu", [[0, 60, 50, 100], [1, 100], [0, 5000], [-7, 100], [0, 200, -3, 100]],
                         ids=["decreases", "starts_late", "long", "negative", "wild"])
def test_ngram_hash_commit_bad_cu_seqlens_stays_in_bounds(cu, toolchain):
    history, ids = torch.full((len(cu) - 1, 4), 5, dtype=torch.int32), random_ids(100, 1000)
    cu = torch.tensor(cu, dtype=torch.int32)
    if toolchain == "triton":
        errors = run_triton(make_layout(), ids, cu, None, history, None, torch.arange(len(cu) - 1), None)[1]
    else:
        errors = run_cuda(make_layout(), ids, cu, None, history, None, Device(options={"race": False}),
                          state_indices=torch.arange(len(cu) - 1), commits=True)[1]
    assert errors > 0
