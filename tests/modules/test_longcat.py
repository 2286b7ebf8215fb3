"""LongcatEmbedding and the rules for special tokens, against restatements in plain Python and torch."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hf_configs import LONGCAT_CONFIG

from engram_kernels import EngramSpec, LongcatEmbedding, RowPrefetcher, RowTable, ngram_hash
from engram_kernels.spec import HASH_FAMILIES

H, D, ORDER, SPLITS, VOCAB, RATIO = 48, 8, 3, 3, 60, 7
C = (ORDER - 1) * SPLITS
CU = torch.tensor([0, 11, 11, 29], dtype=torch.int32)
T = 29


def make_spec(**overrides):
    return EngramSpec.longcat(**dict(vocab_size=VOCAB, max_order=ORDER, heads=SPLITS, head_dim=D, hidden_size=H,
                                     table_sizes=(RATIO * VOCAB,) * (ORDER - 1), row_format="f32") | overrides)


def make_layer(dtype=torch.float32, trained_rows=False, spec=None, **options):
    """A layer and ids with many EOS (2) among them."""
    torch.manual_seed(0)
    spec = spec or make_spec()
    rows = torch.randn(spec.layout().num_rows[0], D)
    table = RowTable.from_tensor(torch.nn.Parameter(rows) if trained_rows else rows, row_format="f32")
    layer = LongcatEmbedding(spec, table=table, dtype=dtype, **options)
    ids = torch.randint(1, VOCAB, (T,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    ids[torch.arange(4, T, 6)] = 2
    return layer, ids


def published_ids(tokens, ignored=(), zero_ends=False, vocab=VOCAB):
    """The published hash of one sequence: for each position the local ids of all tables, in their order."""
    tokens = [0 if t in ignored else t for t in tokens]
    found = []
    for t, token in enumerate(tokens):
        window, past = [token], tokens[:t]
        alive = not (zero_ends and token == 0)
        for back in range(1, ORDER):
            older = past[-back] if back <= len(past) else None
            alive = alive and older is not None and older != 2 and not (zero_ends and older == 0)
            window.append(older if alive else 0)
        table, ids = 0, []
        for order in range(2, ORDER + 1):
            for _ in range(SPLITS):
                rows = RATIO * vocab + 2 * table + 1
                ids.append(sum(w * pow(vocab, back, rows) for back, w in enumerate(window[:order])) % rows)
                table += 1
        found.append(ids)
    return found


def published_embedding(layer, sequences, ignored=(), zero_ends=False, divisor=1 + C):
    """The published forward in float64, table by table; nothing of ours but the parameters."""
    rows, starts = layer.table.rows.detach().double(), layer.spec.layout().offsets[0].tolist()
    word, projection = layer.word_embeddings.weight.detach().double(), layer.post_proj.weight.detach().double()
    out = []
    for tokens in sequences:
        for token, ids in zip(tokens, published_ids(tokens, ignored, zero_ends), strict=True):
            x = word[token].clone()
            if token in ignored:
                out.append(x)
                continue
            for i, local in enumerate(ids):
                if local > 0 or not zero_ends:
                    x += projection[:, i * D:(i + 1) * D] @ rows[starts[i] + local]
            out.append(x / divisor)
    return torch.stack(out)


def sequences_of(ids):
    return [ids[a:b].tolist() for a, b in zip(CU[:-1].tolist(), CU[1:].tolist(), strict=True)]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_longcat_matches_the_published_formula(backend):
    layer, ids = make_layer()
    out = layer(ids, CU, backend=backend)
    torch.testing.assert_close(out.double(), published_embedding(layer, sequences_of(ids)), rtol=1e-5, atol=1e-5)
    row_ids = layer.hash(ids, CU)
    with RowPrefetcher(layer.table, out_dtype=torch.float32) as prefetcher:
        rows = prefetcher.wait(prefetcher.submit(row_ids))
    same = (layer(ids, row_ids=row_ids), layer(ids, rows=rows.view(T, C, D)), layer(ids, rows=rows.reshape(T, C * D)),
            layer(ids, CU, word=layer.word_embeddings(ids)))
    for got in same:
        torch.testing.assert_close(got, out, rtol=0, atol=0)


def test_longcat_published_rounding_is_the_published_code_bit_for_bit():
    once, ids = make_layer(torch.bfloat16)
    layer = LongcatEmbedding(once.spec, table=once.table, dtype=torch.bfloat16, rounding="published")
    layer.load_state_dict(once.state_dict())
    rows = layer.table.rows.bfloat16()[layer.hash(ids, CU).long()]
    x = layer.word_embeddings.weight[ids.long()]
    for i in range(C):
        x = x + F.linear(rows[:, i], layer.post_proj.weight[:, i * D:(i + 1) * D].contiguous())
    published = x / (1 + C)
    exact = published_embedding(once, sequences_of(ids))
    assert torch.equal(layer(ids, CU), published)
    errors = [(out.double() - exact).abs().max().item() for out in (once(ids, CU), published)]
    assert errors[0] < errors[1], "one rounding is nearer the exact result than one per piece"


def test_longcat_chunks_with_history_equal_the_whole():
    layer, ids = make_layer()
    whole = layer(ids, torch.tensor([0, T], dtype=torch.int32))
    pieces = []
    for begin, end in ((0, 1), (1, 2), (2, 9), (9, T)):
        past = [int(ids[t]) if t >= 0 else -1 for t in range(begin - 1, begin - ORDER, -1)]
        history = torch.tensor([past], dtype=torch.int32)
        pieces.append(layer(ids[begin:end], torch.tensor([0, end - begin], dtype=torch.int32), history=history))
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-6, atol=1e-6)  # a product of other shape may add otherwise


def test_longcat_dead_tokens_keep_their_word_and_reach_no_gradient():
    layer, ids = make_layer(trained_rows=True)
    dead = torch.zeros(T, dtype=torch.bool)
    dead[[0, 7, 20]] = True
    kept = layer(ids, CU)
    out = layer(ids, CU, dead_mask=dead)
    torch.testing.assert_close(out[dead], layer.word_embeddings.weight[ids[dead].long()], rtol=0, atol=0)
    changed = (out != kept).any(-1)
    assert changed[dead].all() and changed[8] and not changed[3], "a dead token ends the n-grams behind it"
    rows = layer.table.rows.detach()[layer.hash(ids, CU).long()].clone()
    rows[dead] = float("nan")
    layer(ids, rows=rows, dead_mask=dead).sum().backward()
    assert all(p.grad.isfinite().all() for p in (layer.post_proj.weight, layer.word_embeddings.weight))


def test_longcat_trains():
    layer, ids = make_layer(trained_rows=True)
    assert set(dict(layer.named_parameters())) == {"rows", "word_embeddings.weight", "post_proj.weight"}
    optimizer, target = torch.optim.Adam(layer.parameters(), 1e-2), torch.randn(T, H)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (layer(ids, CU) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and (layer.rows.grad != 0).any()


def test_longcat_gradients_are_those_of_the_formula():
    """In torch ops alone, from the same rows."""
    layer, ids = make_layer(trained_rows=True)
    rows = layer.hash(ids, CU).long()
    weight = torch.randn(T, H)
    (layer(ids, CU) * weight).sum().backward()
    leaves = [p.detach().clone().requires_grad_() for p in (layer.rows, layer.word_embeddings.weight, layer.post_proj.weight)]
    x = (leaves[1][ids.long()] + leaves[0][rows].flatten(1) @ leaves[2].T) / (1 + C)
    for leaf, parameter in zip(torch.autograd.grad((x * weight).sum(), leaves), (layer.rows, layer.word_embeddings.weight,
                                                                                 layer.post_proj.weight), strict=True):
        torch.testing.assert_close(parameter.grad, leaf, rtol=1e-5, atol=1e-5)


def test_longcat_compiles():
    layer, ids = make_layer(spec=make_spec(ignored_token_ids=(5, 6)))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(ids, CU), layer(ids, CU))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_longcat_runs_in_half_precision(dtype):
    layer, ids = make_layer(dtype)
    want = layer(ids, CU)
    torch.testing.assert_close(want.double(), published_embedding(layer, sequences_of(ids)), rtol=2**-7, atol=2**-9)


def test_longcat_next_ignores_tokens_and_zero():
    """LongCat-Next: ignored ids count as 0; EOS and 0 end an n-gram; a hash of 0 reads no row; ignored tokens are not divided."""
    spec = make_spec(ignored_token_ids=(5, 6, 7, VOCAB + 3), zero_is_dead=True)
    layer, ids = make_layer(spec=spec, num_embeddings=VOCAB + 8)
    ids[[1, 3, 13, 14, 22]], ids[[8, 16, 17]] = torch.tensor([5, 7, 6, VOCAB + 3, 5], dtype=torch.int32), 0
    want = published_embedding(layer, sequences_of(ids), spec.ignored_token_ids, zero_ends=True)
    torch.testing.assert_close(layer(ids, CU).double(), want, rtol=1e-5, atol=1e-5)
    assert spec.dead_mask(ids).nonzero().flatten().tolist() == [1, 3, 8, 13, 14, 16, 17, 22]
    # what is hashed as dead is dead in a history too
    begin, one = 14, torch.tensor([0, 18], dtype=torch.int32)
    history = torch.tensor([[-2, int(ids[12])]], dtype=torch.int32)
    torch.testing.assert_close(layer(ids[begin:], one[:1].new_tensor([0, T - begin]), history=history), layer(ids, CU)[begin:],
                               rtol=1e-6, atol=1e-6)


def test_longcat_hash_of_zero_is_no_row():
    """Windows whose residue is 0: a row everywhere else, none in LongCat-Next."""
    spec = make_spec(zero_is_dead=True)
    layer, _ = make_layer(spec=spec)
    windows = [(a, b) for a in range(1, VOCAB) for b in range(1, VOCAB) if 0 in published_ids([b, a])[1][:SPLITS] and b != 2]
    assert windows
    for newest, older in windows[:8]:
        row_ids = layer.hash(torch.tensor([older, newest], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32))[1]
        assert (row_ids == -1).tolist() == [local == 0 for local in published_ids([older, newest])[1]]


def test_longcat_special_tokens_of_tokenspeed():
    config = {**LONGCAT_CONFIG, "vocab_size": VOCAB, "hidden_size": H, "ngram_vocab_size_ratio": RATIO, "emb_neighbor_num": ORDER,
              "emb_split_num": SPLITS, "ngram_exclude_sp_token": True, "special_token_scope": "0:4,36:55",
              "ngram_fix_normalize_factor": True}
    spec = EngramSpec.from_hf_config(config, row_format="f32")
    assert spec.ignored_token_ids == (*range(4), *range(36, 55)) and spec.average == "root" and not spec.zero_is_dead
    layer, ids = make_layer(spec=spec)
    ids[[2, 9, 15]] = torch.tensor([0, 3, 40], dtype=torch.int32)
    want = published_embedding(layer, sequences_of(ids), spec.ignored_token_ids, zero_ends=True, divisor=(1 + C)**0.5)
    torch.testing.assert_close(layer(ids, CU).double(), want, rtol=1e-5, atol=1e-5)
    off = EngramSpec.from_hf_config({**config, "ngram_exclude_sp_token": False})
    assert off.ignored_token_ids == () and off.dead_mask(ids) is None


def test_longcat_next_configuration():
    config = {**LONGCAT_CONFIG, "vocab_size": 282_624, "text_vocab_size": 131_072, "oe_ignored_token_ids": [131_072, 131_073],
              "text_vocab_plus_multimodal_special_token_size": 131_125}
    assert EngramSpec.from_hf_config(config) == EngramSpec.longcat(ignored_token_ids=(131_072, 131_073), zero_is_dead=True)


@pytest.mark.parametrize(("change", "message"), [
    ({"special_token_scope": "4:8"}, "special_token_scope is '4:8', expected ranges with id 0"),
    ({"special_token_scope": "0-4"}, "special_token_scope is '0-4', expected ranges such as"),
    ({"special_token_scope": "4:0"}, "expected ranges with id 0"),
    ({"special_token_scope": "0:99999999"}, "expected ranges such"),
    ({"special_token_scope": None}, "special_token_scope is None"), ({"special_token_scope": 4}, "special_token_scope 4"),
    ({"oe_ignored_token_ids": [3]}, "rules of different models"), ({"text_vocab_size": 50}, "rules of different models"),
    ({"ngram_exclude_sp_token": "yes"}, "ngram_exclude_sp_token is 'yes'"),
    ({"ngram_exclude_sp_token": False, "oe_ignored_token_ids": 3}, "oe_ignored_token_ids is 3, expected a list"),
    ({"ngram_fix_normalize_factor": 2}, "ngram_fix_normalize_factor is 2"),
    ({"ngram_exclude_sp_token": False, "text_vocab_size": "many"}, "text_vocab_size is 'many', expected an integer")])
def test_longcat_rules_that_contradict_are_refused(change, message):
    config = {**LONGCAT_CONFIG, "ngram_exclude_sp_token": True, "special_token_scope": "0:4", **change}
    with pytest.raises(ValueError, match=message):
        EngramSpec.from_hf_config(config)


def test_longcat_loads_published_names_or_none():
    layer, _ = make_layer()
    weights = {f"model.ngram_embeddings.post_projs.{i}.weight": torch.randn(H, D) for i in range(C)}
    weights["model.embed_tokens.weight"] = torch.randn(VOCAB, H)
    layer.load_published(weights, "model.")
    assert torch.equal(layer.post_proj.weight[:, D:2 * D], weights["model.ngram_embeddings.post_projs.1.weight"])
    assert torch.equal(layer.word_embeddings.weight, weights["model.embed_tokens.weight"])
    before = copy.deepcopy(layer.state_dict())
    for name in weights:
        with pytest.raises(KeyError, match=name.split(".")[-2]):
            layer.load_published({k: v for k, v in weights.items() if k != name}, "model.")
    with pytest.raises(ValueError, match=r"word_embeddings.weight has shape \[60, 48\], the published one \[61, 48\]"):
        layer.load_published(weights | {"model.embed_tokens.weight": torch.randn(VOCAB + 1, H)}, "model.")
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_longcat_refuses_what_does_not_belong():
    layer, ids = make_layer()
    rows = torch.zeros(T, C, D)
    with pytest.raises(ValueError, match="variant 'deepseek_v41', expected 'longcat'"):
        LongcatEmbedding(EngramSpec.deepseek_v41(), 1)
    with pytest.raises(ValueError, match=r"layer_id is 3, expected one of \[0\]"):
        LongcatEmbedding(layer.spec, 3)
    with pytest.raises(ValueError, match="rounding is 'twice'"):
        LongcatEmbedding(layer.spec, rounding="twice")
    with pytest.raises(ValueError, match="LongcatEmbedding: cu_seqlens is None"):
        layer(ids)
    with pytest.raises(ValueError, match="row_ids and rows are both given"):
        layer(ids, row_ids=layer.hash(ids, CU), rows=rows)
    with pytest.raises(ValueError, match="history is given, but"):
        layer(ids, rows=rows, history=torch.zeros(3, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"rows must have shape \[29, 6, 8\]"):
        layer(ids, rows=rows[:, 1:])
    with pytest.raises(ValueError, match=r"dead_mask must have shape \[29\]"):
        layer(ids, CU, dead_mask=torch.zeros(T - 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="without word embeddings"):
        LongcatEmbedding(layer.spec, num_embeddings=0, table=layer.table)(ids, CU)
    with pytest.raises(ValueError, match="token_ids needs a table"):
        LongcatEmbedding(layer.spec)(ids, CU)
    with pytest.raises(ValueError, match="branches is 2, expected 1 with variant 'longcat'"):
        make_spec(branches=2)


@pytest.mark.parametrize("numbers", [(2, 16), [1], (3, 2, 9)])
def test_megatron_layer_numbers_count_from_one(numbers):
    """Megatron seeds a layer's multipliers with seed + 10007 * its number; moduli go by the order of the layers."""
    spec = EngramSpec.megatron(numbers, seed=5, num_classes=400, pad_class=2, vocab_size=500, table_sizes=(50, 50), heads=2)
    assert spec.layer_ids == tuple(n - 1 for n in numbers)
    bound = max(1, np.iinfo(np.int64).max // 400 // 2)
    want = [(2 * np.random.default_rng(5 + 10007 * n).integers(0, bound, 3, dtype=np.int64) + 1).tolist() for n in numbers]
    assert spec.layout().multipliers.tolist() == want
    wrong = EngramSpec.demo_v1(layer_ids=spec.layer_ids, seed=5, num_classes=400, vocab_size=500, table_sizes=(50, 50), heads=2)
    assert torch.equal(spec.layout().moduli, wrong.layout().moduli)
    ids, cu = torch.arange(40, dtype=torch.int32), torch.tensor([0, 40], dtype=torch.int32)
    assert (ngram_hash(ids, cu, spec.layout()) != ngram_hash(ids, cu, wrong.layout())).float().mean() > 0.9


@pytest.mark.parametrize("numbers", [(0, 2), (1.0,), (True,), ("2",)])
def test_megatron_refuses_numbers_that_are_none(numbers):
    with pytest.raises(ValueError, match="expected integers of at least 1: Megatron counts layers from one"):
        EngramSpec.megatron(numbers)


def test_maxtext_multipliers_fit_int32():
    """MaxText draws int32 with a bound that keeps id * multiplier below 2**31, and hashes in int32; ours gives the same rows."""
    spec = EngramSpec.demo_v1(hash_family="xor_prime_int32", layer_ids=(2, 9), seed=3, num_classes=99_092, table_sizes=(500, 700))
    bound = max(1, np.iinfo(np.int32).max // 99_092 // 2)
    want = np.stack([np.random.default_rng(3 + 10007 * n).integers(0, bound, 3, dtype=np.int32) * 2 + 1 for n in (2, 9)])
    layout = spec.layout()
    assert layout.multipliers.tolist() == want.tolist() != EngramSpec.demo_v1(
        layer_ids=(2, 9), seed=3, table_sizes=(500, 700)).layout().multipliers.tolist()
    ids = torch.randint(0, 99_092, (200,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    got = ngram_hash(ids, torch.tensor([0, 200], dtype=torch.int32), layout)
    x = ids.numpy().astype(np.int32)
    shifted = [np.concatenate([np.full(s, spec.pad_class, np.int32), x[:200 - s]]) for s in range(3)]
    for layer in range(2):
        mix = shifted[0] * want[layer, 0]
        for order in (2, 3):
            mix = mix ^ (shifted[order - 1] * want[layer, order - 1])
            assert mix.dtype == np.int32 and (mix >= 0).all()
            for head in range(8):
                column = (order - 2) * 8 + head
                local = got[layer, :, column].numpy() - int(layout.offsets[layer, column])
                assert np.array_equal(local, mix % np.int32(layout.moduli[layer, column]))


def test_hash_families_are_all_tested():
    assert HASH_FAMILIES == ("xor_prime", "xor_prime_int32", "xor_splitmix", "polynomial")
