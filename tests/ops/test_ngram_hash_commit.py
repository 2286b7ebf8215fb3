"""ngram_hash_and_commit: any mix of chunks, drafts, rejections and skipped sequences gives the ids of the whole."""
import inspect
import random

import pytest
import torch
from op_cases import ngram_hash_spec as make_spec
from op_cases import packed

from engram_kernels.ops.ngram_hash import ngram_hash, ngram_hash_and_commit
from engram_kernels.token_map import TokenMap

OP = "ngram_hash"
VOCAB = 12
RULES = (("xor_prime", "pad"), ("xor_splitmix", "eos_reset"), ("polynomial", "stop"), ("xor_prime", "stop"))


def make_ids(count, seed, vocab=VOCAB):
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def history_of(ids, dead, length, width):
    """The row of history after `length` tokens."""
    known = [-2 if dead[t] else int(ids[t]) for t in range(length)][::-1][:width]
    return known + [-1] * (width - len(known))


def test_ngram_hash_commit_golden(backend, device):
    """One sequence by hand: 11 and 12 come in, 12 is rejected, an empty chunk, a dead token."""
    layout = make_spec(vocab_size=100).layout().to(device)
    history = torch.full((1, 4), -1, dtype=torch.int32, device=device)
    for ids, dead, rejected, want in (([11, 12], [0, 0], 0, [12, 11, -1, -1]), ([13], [0], 1, [13, 11, -1, -1]),
                                      ([], [], 1, [11, -1, -1, -1]), ([14, 15, 16], [0, 1, 0], 0, [16, -2, 14, 11]),
                                      ([17], [0], 1, [17, -2, 14, 11]), ([], [], 1, [-2, 14, 11, -3])):
        ngram_hash_and_commit(torch.tensor(ids, dtype=torch.int32, device=device), packed([len(ids)]).to(device), layout, history,
                              dead_mask=torch.tensor(dead, dtype=torch.bool, device=device),
                              rejected=torch.tensor([rejected], device=device), backend=backend)
        assert history.tolist() == [want]


@pytest.mark.parametrize("family, boundary", RULES)
def test_ngram_hash_commit_many_sequences_of_one_token(family, boundary, backend, device):
    """More than share a block of the CPU kernel, with longer, empty, dead and skipped ones between: each as if it were alone."""
    layout = make_spec(family, boundary, max_order=4, heads=9, vocab_size=VOCAB).layout()
    lengths = [1] * 70 + [0, 1, 3, 1, 66, 1, 1] + [1] * 5
    skipped = {10, 72, 80}
    ids, dead = make_ids(sum(lengths), 3), torch.arange(sum(lengths)) % 11 == 5
    history = make_ids(3 * len(lengths), 4).view(-1, 3)
    rows = torch.tensor([-1 if b in skipped else b for b in range(len(lengths))])
    alone, begin = [], 0
    for b, n in enumerate(lengths):
        part = slice(begin, begin + n)
        found = ngram_hash(ids[part], packed([n]), layout, history=history[b:b + 1], dead_mask=dead[part], backend="reference")
        alone.append(torch.full_like(found, -1) if b in skipped else found)
        begin += n
    known = [history[b].tolist() if b in skipped else
             ([-2 if d else int(i) for i, d in zip(ids[e - n:e], dead[e - n:e], strict=True)][::-1] + history[b].tolist())[:3]
             for b, (n, e) in enumerate(zip(lengths, torch.tensor(lengths).cumsum(0).tolist(), strict=True))]
    updated = history.to(device)
    got = ngram_hash_and_commit(ids.to(device), packed(lengths).to(device), layout.to(device), updated, dead_mask=dead.to(device),
                                state_indices=rows.to(device), backend=backend)
    assert torch.equal(got.cpu(), torch.cat(alone, dim=1)) and updated.tolist() == known


@pytest.mark.parametrize("seed", range(8))
def test_ngram_hash_commit_any_mix_equals_the_whole(seed, backend, device):
    """Histories in a pool, chunks of any size with drafts behind them that the next call rejects, a skipped sequence."""
    draw = random.Random(seed)
    family, boundary = draw.choice(RULES)
    layout = make_spec(family, boundary, max_order=draw.randint(2, 5), heads=3, vocab_size=VOCAB).layout()
    spare, index_dtype = draw.randint(0, 3), draw.choice((torch.int32, torch.int64))
    lengths = [draw.randint(1, 14) for _ in range(draw.randint(1, 3))]
    rows = draw.sample(range(len(lengths) + 2), len(lengths))
    ids = [make_ids(n, 10 * seed + b) for b, n in enumerate(lengths)]
    dead = [torch.rand(n, generator=torch.Generator().manual_seed(b)) < 0.2 for b, n in enumerate(lengths)]
    on_device = layout.to(device)
    whole = [ngram_hash(a, packed([len(a)]), layout, dead_mask=d, backend="reference") for a, d in zip(ids, dead, strict=True)]
    width = layout.max_order - 1 + spare
    history = torch.full((len(lengths) + 2, width), -7, dtype=torch.int32, device=device)
    history[rows] = -1
    done, rejected = [0] * len(lengths), [0] * len(lengths)
    while done != lengths:
        take = [draw.randint(0, n - d) for n, d in zip(lengths, done, strict=True)]
        drafts = [draw.randint(0, spare) if n else 0 for n in take]
        chunks, dead_chunks = [], []
        for b, (n, d) in enumerate(zip(take, drafts, strict=True)):
            chunks += [ids[b][done[b]:done[b] + n], make_ids(d, draw.randint(0, 99))]
            dead_chunks += [dead[b][done[b]:done[b] + n], torch.zeros(d, dtype=torch.bool)]
        sizes = [n + d for n, d in zip(take, drafts, strict=True)] + [2]
        out = ngram_hash_and_commit(
            torch.cat([*chunks, torch.tensor([-9, 9999], dtype=torch.int32)]).to(device), packed(sizes).to(device), on_device,
            history, dead_mask=torch.cat([*dead_chunks, torch.tensor([False, False])]).to(device),
            state_indices=torch.tensor([*rows, -1], dtype=index_dtype, device=device),
            rejected=torch.tensor([*rejected, 99], dtype=index_dtype, device=device), backend=backend).cpu().split(sizes, 1)
        for b, n in enumerate(take):
            torch.testing.assert_close(out[b][:, :n], whole[b][:, done[b]:done[b] + n], rtol=0, atol=0)
        assert (out[-1] == -1).all()
        done, rejected = [d + n for d, n in zip(done, take, strict=True)], drafts
    left = [history[row, drop:].tolist() for row, drop in zip(rows, rejected, strict=True)]
    for b, entries in enumerate(left):
        want = history_of(ids[b], dead[b], lengths[b], len(entries))
        lost = entries.index(-3) if -3 in entries else len(entries)
        assert lost >= layout.max_order - 1 and entries[:lost] == want[:lost] and set(entries[lost:]) <= {-3}
    assert (history[[r for r in range(len(history)) if r not in rows]] == -7).all()


def test_ngram_hash_commit_many_sequences_and_long_chunks(backend, device):
    """More than one block of a GPU; rows of a wider pool, a token map, strided indices, int64 ids, `out`."""
    spec = make_spec(vocab_size=1000, layers=(0, 1, 2))
    classes = torch.cat([torch.arange(300), make_ids(700, 4, 300)]).to(torch.int32)
    layout = type(spec)(**{**spec.__dict__, "num_classes": 300, "pad_class": 2}).layout().to(device)
    token_map = TokenMap(classes, 300, "test").to(device)
    lengths = [3, 0, 200, 1, *[2] * 60]
    pool = torch.full((len(lengths) + 5, 9), -1, device=device)
    history, table = pool[:, 1:6], torch.randperm(len(lengths) + 5, generator=torch.Generator().manual_seed(1))
    indices = torch.stack([table, table], 1).to(device)[:len(lengths), 1]
    ids = make_ids(sum(lengths), 5, 1000).long().to(device)
    out = torch.full((3, len(ids), 24), -5, dtype=torch.int32, device=device)
    got = ngram_hash_and_commit(ids, packed(lengths).to(device), layout, history, token_map, state_indices=indices, out=out,
                                backend=backend)
    want = ngram_hash(ids, packed(lengths).to(device), layout, token_map, backend="reference")
    assert got is out and not indices.is_contiguous() and (pool[:, 0] == -1).all() and (pool[:, 6:] == -1).all()
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for b, chunk in enumerate(ids.cpu().split(lengths)):
        assert history[indices[b]].tolist() == history_of(chunk, [False] * len(chunk), len(chunk), 5)


def call(backend, **change):
    """Chunks of 2 and 1 tokens, two drafts to spare."""
    args = dict(token_ids=torch.tensor([3, 4, 5], dtype=torch.int32), cu_seqlens=packed([2, 1]), layout=make_spec().layout(),
                history=torch.tensor([[1, 2, 3, 4, 5], [6, 7, -1, -1, -1], [8, 9, 10, -3, -3]], dtype=torch.int32),
                state_indices=torch.tensor([2, 0]), rejected=torch.tensor([0, 2]),
                out=torch.full((2, 3, 24), -5, dtype=torch.int32))
    args |= change
    history = args["history"].clone() if isinstance(args["history"], torch.Tensor) else None
    try:
        return ngram_hash_and_commit(**args, backend=backend)
    except Exception:
        assert history is None or torch.equal(history, args["history"])  # whatever was refused
        assert (args["out"] == -5).all()
        raise


LONG = torch.tensor([0, 1, 2])
REFUSED = {  # name: (changed arguments, error, message)
    "rejected_too_much": (dict(rejected=torch.tensor([0, 3])), ValueError, r"rejected\[1\] is 3, expected \[0, 2\]"),
    "rejected_negative": (dict(rejected=torch.tensor([-1, 0])), ValueError, r"rejected\[0\] is -1"),
    "rejected_what_is_forgotten": (dict(rejected=torch.tensor([1, 0])), IndexError, r"history\[2, 3\] is -3"),
    "index_past_the_pool": (dict(state_indices=torch.tensor([0, 3])), IndexError, r"state_indices\[1\] is 3, expected \[0, 3\)"),
    "index_negative": (dict(state_indices=torch.tensor([-2, 0])), IndexError, r"state_indices\[0\] is -2"),
    "index_twice": (dict(state_indices=torch.tensor([1, 1]), rejected=None), ValueError,
                    r"state_indices\[0\] and state_indices\[1\] are both 1"),
    "id": (dict(token_ids=torch.tensor([0, 0, -1], dtype=torch.int32)), IndexError, r"token_ids\[2\] is -1"),
    "history": (dict(history=torch.full((3, 5), -4, dtype=torch.int32)), IndexError, r"history\[2, 0\] is -4"),
    "history_placeholder": (dict(history=torch.tensor([[0, -1, -1, -1, -1], [0] * 5, [-1, -1, 7, 0, 0]], dtype=torch.int32),
                                 rejected=None), IndexError, r"history\[2, 2\] is 7, older than a -1"),
    "cu_long": (dict(cu_seqlens=packed([2, 600])), ValueError, "cu_seqlens"),
    "history_narrow": (dict(history=torch.full((3, 2), -1, dtype=torch.int32)), ValueError, "history has 2 columns, expected at"),
    "history_rows": (dict(state_indices=None), ValueError, r"history must have shape \[2, 3\+K\]"),
    "history_dtype": (dict(history=torch.full((3, 5), -1)), ValueError, "history must be torch.int32"),
    "history_shared": (dict(history=torch.full((8,), -1, dtype=torch.int32).as_strided((3, 5), (1, 1))), ValueError,
                       "rows of history share memory"),
    "history_none": (dict(history=None), TypeError, "history must be a tensor, got NoneType"),
    "index_dtype": (dict(state_indices=torch.tensor([0.0, 1.0])), ValueError, "state_indices must be torch.int32 or"),
    "index_shape": (dict(state_indices=LONG), ValueError, r"state_indices must have shape \[2\]"),
    "rejected_shape": (dict(rejected=LONG), ValueError, r"rejected must have shape \[2\]"),
    "layout": (dict(layout=None), TypeError, "layout must be a Layout"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_ngram_hash_commit_refuses_and_writes_nothing(case, backend, device):
    if device != "cpu":
        pytest.skip("counted on a GPU: tests/sim")
    change, error, message = case
    with pytest.raises(error, match=f"ngram_hash: .*{message}"):
        call(backend, **change)


def test_ngram_hash_commit_what_is_read_must_lie_apart(compiled):
    """One memory for history and indices would be checked, then changed under the reader."""
    history = torch.zeros(2, 5, dtype=torch.int64)
    for change in (dict(rejected=history[:, 0]), dict(state_indices=history[:, 3])):
        with pytest.raises(ValueError, match="shares memory"):
            call("cpu", **dict(token_ids=torch.tensor([3, 4, 5]), history=history, state_indices=None, rejected=None) | change)


def test_ngram_hash_commit_opcheck_and_compile(compiled):
    layout, history = make_spec().layout(), torch.tensor([[1, 2, 3, 4], [5, -1, -1, -1], [6, 7, 8, -3]], dtype=torch.int32)
    ids, cu, indices, rejected = make_ids(3, 1), packed([2, 1]), torch.tensor([0, -1]), torch.tensor([1, 0])
    constants = (layout.moduli, layout.offsets, layout.multipliers, layout.reciprocals)
    args = (ids, cu, *constants, history, None, None, indices, rejected, layout.num_ids, layout.boundary_id, layout.eos_id)
    torch.library.opcheck(torch.ops.engram_kernels.ngram_hash_update.default, args)
    torch.library.opcheck(torch.ops.engram_kernels.ngram_hash_update.out, args,
                          {"out": torch.empty(2, 3, 24, dtype=torch.int32)})

    def steps(ids, history):
        first = ngram_hash_and_commit(ids, cu, layout, history, state_indices=indices, rejected=rejected)
        return first + 1, ngram_hash_and_commit(ids, cu, layout, history, state_indices=indices)

    results = []
    for run in (steps, torch.compile(steps, fullgraph=True)):
        given = history.clone()
        results.append((*run(ids, given), given))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and not torch.equal(results[0][2], history)


def test_ngram_hash_commit_op_is_memory_safe_without_the_public_checks(compiled):
    layout, history = make_spec().layout(), torch.full((2, 5), -1, dtype=torch.int32)
    args = [make_ids(3, 1), packed([2, 1]), layout.moduli, layout.offsets, layout.multipliers, layout.reciprocals,
            history, None, None, torch.tensor([0, 1]), torch.tensor([0, 0]), layout.num_ids, layout.boundary_id, layout.eos_id]
    for position, bad in ((6, history.long()), (6, history[:, :2]), (6, history[:, ::2]), (9, torch.tensor([0, 1, 2])),
                          (9, torch.tensor([0.0, 1.0])), (10, torch.tensor([0])), (10, torch.tensor([0.5, 1])), (9, None)):
        change = {position: bad} if bad is not None else {6: torch.full((3, 5), -1, dtype=torch.int32), 9: None}
        with pytest.raises(ValueError, match="ngram_hash: "):
            torch.ops.engram_kernels.ngram_hash_update(*[change.get(i, x) for i, x in enumerate(args)])


def test_ngram_hash_commit_autograd_sees_the_write(backend):
    """A backward that saved the history as its index must not go on with another one."""
    history, weight = torch.zeros(2, 5, dtype=torch.int64), torch.ones(9, 2, requires_grad=True)
    rows = torch.nn.functional.embedding(history, weight)
    ngram_hash_and_commit(torch.tensor([3, 4, 5]), packed([2, 1]), make_spec().layout(), history, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rows.sum().backward()


def test_ngram_hash_commit_is_documented():
    doc = inspect.getdoc(ngram_hash_and_commit)
    assert all(part in doc for part in ("Args:", "Returns:", "Raises:", "Source:"))
