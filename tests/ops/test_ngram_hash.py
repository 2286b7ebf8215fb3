"""ngram_hash: every backend against the reference, the reference against an independent restatement and golden values."""
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import ngram_hash_spec as make_spec
from op_cases import packed

from engram_kernels.layout import Layout, reciprocals_of
from engram_kernels.ops.ngram_hash import ngram_hash
from engram_kernels.token_map import TokenMap

FAMILIES = ("xor_prime", "xor_splitmix", "polynomial")
BOUNDARIES = ("pad", "eos_reset", "stop")
PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make_ids(count, vocab_size, seed=0, dtype=torch.int32):
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).to(dtype)


def history_of(ids, dead, position, max_order):
    """What `history` must hold for a chunk that starts at `position` of a sequence."""
    values = []
    for back in range(1, max_order):
        source = position - back
        values.append(-1 if source < 0 else -2 if dead[source] else int(ids[source]))
    return values


def restated(token_ids, cu_seqlens, layout, token_map=None, history=None, dead_mask=None):
    """The formula of docs/ops.md, ngram_hash, one id at a time in Python integers: nothing shared with the reference."""
    rows = np.empty((len(layout.num_rows), len(token_ids), layout.num_columns), dtype=np.int64)
    for b in range(len(cu_seqlens) - 1):
        for t in range(cu_seqlens[b], cu_seqlens[b + 1]):
            window, blocked = [], False
            for back in range(layout.max_order):
                source = t - back
                if source >= cu_seqlens[b]:
                    raw = -2 if dead_mask is not None and dead_mask[source] else int(token_ids[source])
                else:
                    raw = -1 if history is None else int(history[b, cu_seqlens[b] - source - 1])
                canonical = -1 if raw < 0 else raw if token_map is None else int(token_map.map[raw])
                blocked = blocked or canonical < 0 or (back > 0 and canonical == layout.eos_id)
                window.append(layout.boundary_id if blocked else canonical)
            for layer in range(len(layout.num_rows)):
                for column in range(layout.num_columns):
                    mix = 0
                    for back in range(column // layout.heads + 2):
                        if layout.multipliers.dim() == 3:
                            mix += window[back] * int(layout.multipliers[layer, column, back])
                        else:
                            product = window[back] * int(layout.multipliers[layer, back])
                            mix ^= (product + 2**63) % 2**64 - 2**63  # wraps in int64
                    rows[layer, t, column] = mix % int(layout.moduli[layer, column]) + int(layout.offsets[layer, column])
    return torch.from_numpy(rows).to(torch.int32)


CASES = {  # name: (lengths, family, boundary, max_order, heads, table_size)
    "one_token": ([1], "xor_prime", "pad", 4, 8, 16_000_000),
    "v41_shape": ([130, 1, 67], "xor_prime", "pad", 4, 8, 16_000_000),
    "one_past_a_block": ([65, 64, 63], "xor_prime", "pad", 3, 8, 646_400),
    "bigrams_one_head": ([9, 5], "xor_prime", "pad", 2, 1, 50_000),
    "five_orders_odd_heads": ([40, 2, 1], "xor_prime", "pad", 5, 11, 30_000),
    "largest_order": ([30], "xor_prime", "stop", 8, 3, 9_000),
    "small_moduli": ([70], "xor_prime", "pad", 4, 8, 3),
    "ple_shape": ([100, 3], "xor_splitmix", "eos_reset", 3, 8, 20_000_000),
    "splitmix_small_moduli": ([33], "xor_splitmix", "eos_reset", 3, 5, 700),
    "longcat_shape": ([100, 3], "polynomial", "stop", 4, 4, 10_000_000),
    "polynomial_small_moduli": ([33], "polynomial", "stop", 5, 9, 2),
    "empty_sequences": ([0, 4, 0, 0, 3, 0], "xor_prime", "pad", 3, 8, 20_011),
    "no_tokens": ([0, 0], "xor_prime", "pad", 3, 8, 20_011),
    "no_sequences": ([], "xor_prime", "pad", 3, 8, 20_011),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_ngram_hash_matches_restatement(case, ids_dtype, backend, device):
    lengths, family, boundary, max_order, heads, table_size = case
    layout = make_spec(family, boundary, max_order, heads, table_size).layout()
    ids, cu = make_ids(sum(lengths), 1000, dtype=ids_dtype), packed(lengths)
    ids[::11] = min(layout.eos_id, 7) if layout.eos_id >= 0 else 7
    got = ngram_hash(ids.to(device), cu.to(device), layout.to(device), backend=backend).cpu()
    assert got.dtype == torch.int32 and got.shape == (2, sum(lengths), layout.num_columns)
    torch.testing.assert_close(got, restated(ids, cu, layout), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_ngram_hash_every_rule_with_history_and_dead_tokens(family, boundary, backend, device):
    layout = make_spec(family, boundary, vocab_size=30).layout()
    ids, cu = make_ids(60, 30, seed=1), packed([20, 0, 1, 39])
    dead = torch.rand(60, generator=torch.Generator().manual_seed(2)) < 0.15
    history = torch.randint(-2, 30, (4, 3), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    history = torch.where((history == -1).cumsum(1) > 0, -1, history)  # once -1, every older entry is -1
    args = [x.to(device) for x in (ids, cu)]
    got = ngram_hash(*args, layout.to(device), history=history.to(device), dead_mask=dead.to(device), backend=backend)
    torch.testing.assert_close(got.cpu(), restated(ids, cu, layout, None, history, dead), rtol=0, atol=0)


def test_ngram_hash_token_map(backend, device):
    spec = dataclasses.replace(make_spec(), vocab_size=1000, num_classes=300, pad_class=5)
    layout = spec.layout()
    classes = torch.cat([torch.arange(300), torch.randint(0, 300, (700,), generator=torch.Generator().manual_seed(4))])
    token_map = TokenMap(classes.to(torch.int32), 300, "test")
    ids, cu = make_ids(200, 1000, seed=5), packed([150, 50])
    history = torch.tensor([[999, -1, -1], [0, -2, 998]], dtype=torch.int32)
    got = ngram_hash(ids.to(device), cu.to(device), layout.to(device), token_map.to(device), history.to(device), backend=backend)
    torch.testing.assert_close(got.cpu(), restated(ids, cu, layout, token_map, history), rtol=0, atol=0)
    compressed = token_map.map[ids.long()]
    compressed_history = torch.where(history < 0, history, token_map.map[history.clamp_min(0).long()])
    again = ngram_hash(compressed.to(device), cu.to(device), layout.to(device), None, compressed_history.to(device),
                       backend=backend)
    torch.testing.assert_close(got, again, rtol=0, atol=0)


def test_ngram_hash_golden(backend, device):
    # by hand: ids 3 5, pad 7, multipliers 11 13: (3*11)^(7*13) = 122, (5*11)^(3*13) = 16; moduli 100 9, offsets 0 100
    moduli = torch.tensor([[100, 9]])
    layout = dataclasses.replace(make_spec(max_order=2, heads=2, layers=(0,)).layout(), moduli=moduli,
                                 reciprocals=reciprocals_of(moduli),
                                 offsets=torch.tensor([[0, 100]]), multipliers=torch.tensor([[11, 13]]), boundary_id=7)
    ids, cu = torch.tensor([3, 5], dtype=torch.int32), packed([2])
    got = ngram_hash(ids.to(device), cu.to(device), layout.to(device), backend=backend)
    assert got.tolist() == [[[22, 105], [16, 107]]]


@given(st.data())
@PROPERTY
def test_ngram_hash_any_chunking_equals_whole(backend, device, data):
    family, boundary = data.draw(st.sampled_from(FAMILIES)), data.draw(st.sampled_from(BOUNDARIES))
    layout = make_spec(family, boundary, max_order=data.draw(st.integers(2, 5)), heads=3, vocab_size=12).layout()
    length = data.draw(st.integers(0, 80))
    ids = make_ids(length, 12, seed=data.draw(st.integers(0, 99)))
    dead = torch.tensor(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)), dtype=torch.bool)
    whole = ngram_hash(ids.to(device), packed([length]).to(device), layout.to(device), dead_mask=dead.to(device), backend=backend)
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=6))})
    pieces = [whole[:, :0]]
    for begin, end in itertools.pairwise(cuts):
        history = torch.tensor([history_of(ids, dead, begin, layout.max_order)], dtype=torch.int32)
        pieces.append(ngram_hash(ids[begin:end].to(device), packed([end - begin]).to(device), layout.to(device),
                                 history=history.to(device), dead_mask=dead[begin:end].to(device), backend=backend))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=0)


@pytest.mark.slow_cases("triton")
@given(st.lists(st.integers(0, 70), max_size=6), st.sampled_from(FAMILIES), st.sampled_from(BOUNDARIES))
@PROPERTY
def test_ngram_hash_packed_equals_one_by_one(backend, device, lengths, family, boundary):
    layout = make_spec(family, boundary, heads=2, vocab_size=20).layout().to(device)
    ids, cu = make_ids(sum(lengths), 20).to(device), packed(lengths)
    joint = ngram_hash(ids, cu.to(device), layout, backend=backend)
    alone = [ngram_hash(ids[begin:end], packed([end - begin]).to(device), layout, backend=backend)
             for begin, end in itertools.pairwise(cu.tolist())]
    torch.testing.assert_close(joint, torch.cat([joint[:, :0], *alone], dim=1), rtol=0, atol=0)


@pytest.mark.slow_cases("triton")
@given(st.integers(0, 40), st.integers(1, 6))
@PROPERTY
def test_ngram_hash_blocking_is_sticky(backend, device, blocked_at, max_order):
    """Nothing before a dead token, nor before the start, reaches any row after it."""
    layout = make_spec(max_order=max_order + 1, heads=2).layout().to(device)
    ids, other = make_ids(60, 1000, seed=1), make_ids(60, 1000, seed=2)
    other[blocked_at:] = ids[blocked_at:]
    dead = torch.zeros(60, dtype=torch.bool)
    dead[blocked_at] = True
    rows = [ngram_hash(x.to(device), packed([60]).to(device), layout, dead_mask=dead.to(device), backend=backend)
            for x in (ids, other)]
    torch.testing.assert_close(rows[0][:, blocked_at:], rows[1][:, blocked_at:], rtol=0, atol=0)
    pad = make_ids(1, 1000).fill_(layout.boundary_id)
    all_pad = ngram_hash(pad.to(device), packed([1]).to(device), layout, backend=backend)[:, 0]
    torch.testing.assert_close(rows[0][:, blocked_at], all_pad, rtol=0, atol=0)


@pytest.mark.parametrize("num_ids", [2, 99_092, 2**31 - 1])
@pytest.mark.parametrize("family", ["xor_prime", "xor_splitmix"])
def test_ngram_hash_ids_and_products_at_the_edge(num_ids, family, backend, device):
    """Largest ids times largest multipliers: products next to 2^63; and, for splitmix, products that wrap."""
    layout = make_spec(family, "pad", vocab_size=max(num_ids, 3), table_size=16_000_000).layout()
    edge = (2**63 - 1) // (num_ids - 1) if family == "xor_prime" else 2**63 - 1
    layout = dataclasses.replace(layout, multipliers=torch.full_like(layout.multipliers, edge), num_ids=num_ids, boundary_id=1)
    ids = torch.tensor([num_ids - 1, 0, num_ids - 1, 1, num_ids - 1, num_ids - 1, num_ids - 2], dtype=torch.int64)
    got = ngram_hash(ids.to(device), packed([7]).to(device), layout.to(device), backend=backend)
    torch.testing.assert_close(got.cpu(), restated(ids, packed([7]), layout), rtol=0, atol=0)
    assert (got >= 0).all() and (got.cpu() < torch.tensor(layout.num_rows)[:, None, None]).all()


def test_ngram_hash_every_modulus_size(backend, device):
    """Remainders are exact on both sides of the switch between the two ways of taking them, and next to 2^31."""
    sizes = [1, 2, 3, 8191, 8192, 8193, 8209, 2**16 + 1, 2**24 - 3, 2**30 + 7, 2**31 - 1]
    for size in sizes:
        layout = dataclasses.replace(make_spec("xor_splitmix", "pad", heads=8, layers=(0,)).layout(), num_rows=(size,),
                                     moduli=torch.full((1, 24), size), reciprocals=reciprocals_of(torch.full((1, 24), size)),
                                     offsets=torch.zeros(1, 24, dtype=torch.int64))
        ids = make_ids(300, 1000, seed=size % 100)
        got = ngram_hash(ids.to(device), packed([300]).to(device), layout.to(device), backend=backend)
        torch.testing.assert_close(got.cpu(), restated(ids, packed([300]), layout), rtol=0, atol=0)


def test_ngram_hash_threads_give_the_same_bits(backend, device):
    layout = make_spec(table_size=16_000_000).layout().to(device)
    ids, cu = make_ids(5000, 1000).to(device), packed([4000, 1, 999]).to(device)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ngram_hash(ids, cu, layout, backend=backend)
        torch.set_num_threads(4)
        many = ngram_hash(ids, cu, layout, backend=backend)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(one, many, rtol=0, atol=0)


def test_ngram_hash_strided_ids_and_out(backend, device):
    layout = make_spec().layout().to(device)
    ids, cu = make_ids(100, 1000).to(device), packed([100]).to(device)
    strided = torch.stack([ids, ids + 1], dim=1)[:, 0]
    assert not strided.is_contiguous()
    want = ngram_hash(ids, cu, layout, backend="reference")
    out = torch.full_like(want, -5)
    got = ngram_hash(strided, cu, layout, out=out, backend=backend)
    assert got is out
    torch.testing.assert_close(out, want, rtol=0, atol=0)


def test_ngram_hash_dead_ids_are_not_looked_at(backend, device):
    layout = make_spec().layout().to(device)
    ids = make_ids(10, 1000)
    dead = torch.zeros(10, dtype=torch.bool)
    dead[4] = True
    want = ngram_hash(ids.to(device), packed([10]).to(device), layout, dead_mask=dead.to(device), backend=backend)
    ids[4] = -77  # a placeholder of an image token, say
    got = ngram_hash(ids.to(device), packed([10]).to(device), layout, dead_mask=dead.to(device), backend=backend)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def args_of(layout_device="cpu"):
    return {"token_ids": make_ids(10, 1000), "cu_seqlens": packed([6, 4]), "layout": make_spec().layout()}


BAD = {  # name: (changed arguments, exception, what the message says)
    "ids_dtype": ({"token_ids": torch.zeros(10)}, ValueError, r"token_ids must be torch.int32 or torch.int64, got torch.float32"),
    "ids_shape": ({"token_ids": torch.zeros(2, 5, dtype=torch.int32)}, ValueError, r"token_ids must have shape \[T\], got"),
    "ids_no_tensor": ({"token_ids": [1, 2]}, TypeError, "token_ids must be a tensor, got list"),
    "ids_device": ({"cu_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")}, ValueError, "cu_seqlens must be on cpu"),
    "id_placeholder": ({"token_ids": torch.tensor([0] * 7 + [-1, 0, 0])}, IndexError, r"token_ids\[7\] is -1.*placeholders"),
    "id_too_large": ({"token_ids": torch.tensor([0] * 9 + [1000])}, IndexError, r"token_ids\[9\] is 1000, expected \[0, 1000\)"),
    "id_int64_edge": ({"token_ids": torch.tensor([0] * 9 + [2**63 - 1])}, IndexError, r"token_ids\[9\] is 9223372036854775807"),
    "cu_decreases": ({"cu_seqlens": torch.tensor([0, 6, 5, 10], dtype=torch.int32)}, ValueError, "cu_seqlens"),
    "cu_short": ({"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)}, ValueError, "cu_seqlens.*10"),
    "cu_long": ({"cu_seqlens": torch.tensor([0, 600], dtype=torch.int32)}, ValueError, "cu_seqlens.*600"),
    "cu_starts_late": ({"cu_seqlens": torch.tensor([1, 10], dtype=torch.int32)}, ValueError, "cu_seqlens"),
    "cu_none": ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ValueError, "cu_seqlens must have at least one entry"),
    "cu_no_sequence": ({"cu_seqlens": torch.zeros(1, dtype=torch.int32)}, ValueError, "cu_seqlens.*10; got one entry"),
    "cu_dtype": ({"cu_seqlens": torch.tensor([0, 10])}, ValueError, "cu_seqlens must be torch.int32, got torch.int64"),
    "layout_type": ({"layout": make_spec()}, TypeError, "layout must be a Layout"),
    "history_shape": ({"history": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, r"history must have shape \[2, 3\]"),
    "history_dtype": ({"history": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, "history must be torch.int32"),
    "history_placeholder": ({"history": torch.tensor([[0, 0, 0], [0, -3, 0]], dtype=torch.int32)}, IndexError,
                            r"history\[1, 1\] is -3"),
    "history_placeholder_in_front": ({"history": torch.tensor([[0, 0, -1], [-1, 12, 13]], dtype=torch.int32)}, IndexError,
                                     r"history\[1, 1\] is 12, older than a -1 \(before the start\), expected -1"),
    "history_dead_before_the_start": ({"history": torch.tensor([[0, -1, -2], [0, 0, 0]], dtype=torch.int32)}, IndexError,
                                      r"history\[0, 2\] is -2, older than a -1"),
    "history_too_large": ({"history": torch.tensor([[0, 0, 1000], [0, 0, 0]], dtype=torch.int32)}, IndexError,
                          r"history\[0, 2\] is 1000"),
    "dead_shape": ({"dead_mask": torch.zeros(9, dtype=torch.bool)}, ValueError, r"dead_mask must have shape \[10\]"),
    "dead_dtype": ({"dead_mask": torch.zeros(10, dtype=torch.uint8)}, ValueError, "dead_mask must be torch.bool"),
    "out_shape": ({"out": torch.zeros(2, 10, 23, dtype=torch.int32)}, ValueError, r"out must have shape \[2, 10, 24\]"),
    "out_stride": ({"out": torch.zeros(2, 10, 48, dtype=torch.int32)[..., ::2]}, ValueError, "must be contiguous"),
    "map_classes": ({"token_map": TokenMap(torch.arange(9, dtype=torch.int32), 9, "x")}, ValueError, "9 classes.*1000"),
    "map_type": ({"token_map": torch.arange(9)}, TypeError, "token_map must be a TokenMap"),
    "backend_name": ({"backend": "tpu"}, ValueError, "backend is 'tpu'"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_ngram_hash_rejects(change, error, message, name, compiled):
    with pytest.raises(error, match=message):
        ngram_hash(**{**args_of(), "backend": name, **change})


@pytest.mark.parametrize("change", ids=["id", "history"], argvalues=[
    dict(token_ids=torch.tensor([0] * 9 + [-1])), dict(history=torch.tensor([[0, 0, 0], [-1, 12, 13]], dtype=torch.int32))])
def test_ngram_hash_rejects_before_writing(change, backend, device):
    if device != "cpu":
        pytest.skip("counted on a GPU: tests/sim")
    out = torch.full((2, 10, 24), -5, dtype=torch.int32)
    with pytest.raises(IndexError):
        ngram_hash(**{**args_of(), **change}, out=out, backend=backend)
    assert (out == -5).all()


def test_ngram_hash_named_backend_never_falls_back():
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: "):
        ngram_hash(**args_of(), backend="cuda")


def op_args(layout: Layout):
    ids = make_ids(20, 1000)
    return (ids, packed([12, 8]), layout.moduli, layout.offsets, layout.multipliers, layout.reciprocals, None, None, None,
            layout.num_ids, layout.boundary_id, layout.eos_id)


def test_ngram_hash_op_is_memory_safe_without_the_public_checks(compiled):
    layout = make_spec().layout()
    args = list(op_args(layout))
    for position, bad in ((0, torch.zeros(20)), (0, torch.zeros(4, 5, dtype=torch.int32)), (1, torch.tensor([0, 20])),
                          (2, layout.moduli[:, :23]), (3, layout.offsets[:1]), (4, layout.multipliers[:, :3]),
                          (5, layout.reciprocals[:, :23]), (5, layout.reciprocals + 1), (5, layout.reciprocals - 1),
                          (7, torch.zeros(1, 3, dtype=torch.int32)), (8, torch.zeros(3, dtype=torch.bool)),
                          (9, 0), (10, 1000), (2, torch.zeros_like(layout.moduli))):
        with pytest.raises(ValueError, match="ngram_hash: "):
            torch.ops.engram_kernels.ngram_hash(*args[:position], bad, *args[position + 1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_ngram_hash_opcheck(family, compiled):
    args = op_args(make_spec(family, "stop").layout())
    torch.library.opcheck(torch.ops.engram_kernels.ngram_hash.default, args)
    torch.library.opcheck(torch.ops.engram_kernels.ngram_hash.out, args,
                          {"out": torch.empty(2, 20, 24, dtype=torch.int32)})


def test_ngram_hash_compiles(compiled):
    layout = make_spec().layout()

    def rows_plus_one(ids, cu):
        return ngram_hash(ids, cu, layout, backend="cpu") + 1

    ids, cu = make_ids(20, 1000), packed([12, 8])
    got = torch.compile(rows_plus_one, fullgraph=True)(ids, cu)
    torch.testing.assert_close(got, rows_plus_one(ids, cu), rtol=0, atol=0)
