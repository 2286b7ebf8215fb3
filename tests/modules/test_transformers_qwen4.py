"""transformers' own Qwen4Exp with the PLE layers of this library: held to the model as it was, in ids, logits and generation."""
import copy
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Qwen4ExpForCausalLM, StaticCache
from transformers_cases import QWEN, left_padded, llama_model, new_cache, qwen_model, rows_of, some_ids, step, tables_in_memory

import engram_kernels.modules.memory_module as memory_module
from engram_kernels import EngramSpec, RowTable
from engram_kernels.integrations.transformers import attach, load

IDS, MASK = left_padded(some_ids(3, 21), [0, 4, 9])
EXACT = dict(rtol=0, atol=0)
FLOAT32 = dict(rtol=2e-5, atol=2e-6)  # one rounding to float32 of each layer's update in place of seven, behind four layers


def both(dtype=torch.float32, **options):
    """The model as it is, and with our layers."""
    theirs = qwen_model(dtype)
    return theirs, attach(copy.deepcopy(theirs), table=tables_in_memory(theirs), **options)


@pytest.fixture(scope="module")
def models():
    """In bfloat16 with the published rounding, which no test changes: equal to the bit."""
    return both(torch.bfloat16, rounding="published")


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "left_padded"])
def test_logits_are_those_of_the_model(models, mask):
    """To the bit in bfloat16 with the published rounding; in float32 within it; in bfloat16 rounded once, nearer the truth."""
    shown = slice(None) if mask is None else mask.bool()
    with torch.no_grad():
        want, got = (model(IDS, attention_mask=mask).logits[shown] for model in models)
        torch.testing.assert_close(got, want, **EXACT)
        want, got = (model(IDS, attention_mask=mask).logits[shown] for model in both())
        torch.testing.assert_close(got, want, **FLOAT32)
        once = both(torch.bfloat16)[1](IDS, attention_mask=mask).logits[shown]
        torch.testing.assert_close(once.float(), want, rtol=0, atol=2**-4 * want.abs().max().item())  # bfloat16 in all layers


def test_ple_rounded_once_is_nearer_the_truth():
    """The layer itself, in bfloat16 against float32: at most 0.85 of the published code's mean error."""
    theirs, ours = both(torch.bfloat16)
    hidden = torch.randn(3, 21, 128, generator=torch.Generator().manual_seed(2))
    errors = []
    with torch.no_grad():
        exact = copy.deepcopy(theirs.model.layers[0].ple).float()(hidden.bfloat16().float(), IDS, None)
        for model in (theirs, ours):
            errors.append((model.model.layers[0].ple(hidden.bfloat16(), IDS, None).float() - exact).abs().mean().item())
    assert 0 < errors[1] < 0.85 * errors[0], errors


@pytest.mark.parametrize("options", [dict(), dict(num_beams=3, num_return_sequences=2), dict(do_sample=True, top_k=20)],
                         ids=["greedy", "beam", "sample"])
def test_generate_gives_the_same_tokens_from_the_same_rows(models, options, monkeypatch):
    theirs, ours = models
    rows, tokens = {"theirs": [], "ours": []}, []
    hooks = [layer.ple.ple_embedding.ngram_embedding.register_forward_pre_hook(lambda _, args: rows["theirs"].append(args[0]))
             for layer in theirs.model.layers if layer.ple is not None]
    hashed = memory_module.ngram_hash

    def spy(*args, **kwargs):
        found = hashed(*args, **kwargs)
        rows["ours"].append(found[0])
        return found

    monkeypatch.setattr(memory_module, "ngram_hash", spy)
    for model in (theirs, ours):
        torch.manual_seed(7)
        tokens.append(model.generate(IDS, attention_mask=MASK, max_new_tokens=12, **{"do_sample": False, **options}))
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(*tokens, **EXACT)
    assert len(rows["ours"]) == len(rows["theirs"]) == 2 * 12
    for a, b in zip(rows["ours"], rows["theirs"], strict=True):
        torch.testing.assert_close(a.long().flatten(), b.flatten(), **EXACT)


def test_two_generations_take_turns(models):
    """The state is the cache's: what one conversation has seen does not reach the other, whatever module they share."""
    ours, other = models[1], some_ids(2, 14, seed=5)
    with torch.no_grad():
        want = [ours(ids).logits for ids in (IDS[:1], other)]
    caches = [new_cache(ours), new_cache(ours)]
    got = [[], []]
    for begin, end in ((0, 1), (1, 6), (6, 7), (7, 14)):
        for turn, ids in enumerate((IDS[:1], other)):
            got[turn].append(step(ours, ids[:, begin:end], caches[turn]))
    got[0].append(step(ours, IDS[:1, 14:], caches[0]))
    for pieces, whole in zip(got, want, strict=True):  # the rest of the model rounds a chunk otherwise than the whole
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=2**-4 * whole.abs().max().item())


def test_cache_operations_reach_the_memory(models):
    """Chunks, drafts taken back, another order, a reset: each step to the bit as the model's own."""
    results = []
    for model in models:
        cache = new_cache(model)
        out = [step(model, IDS[:, :1], cache), step(model, IDS[:, 1:5], cache)]
        cache.activate_past_recording()
        out.append(step(model, IDS[:, 5:9], cache))
        for layer in (0, 2, 3):  # Cache.crop fails at layer 1, which has no convolution but its own, with or without us
            cache.layers[layer].crop(-3)
        out.append(step(model, IDS[:, 6:8], cache))
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        out.append(step(model, IDS[:, 8:10], cache))
        cache.reset()
        out.append(step(model, IDS[:, :1], cache))
        results.append(out)
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_assisted_decoding_is_refused_as_by_the_model(models):
    """transformers takes no drafts back from recurrent states: it says so for its own model and for ours."""
    for model in models:
        with pytest.raises(ValueError, match="stateful"):
            model.generate(IDS[:1], max_new_tokens=5, prompt_lookup_num_tokens=3)


def test_static_cache(models):
    results = []
    for model in models:
        cache = StaticCache(config=model.config, max_cache_len=24)
        results.append(torch.cat([step(model, IDS[:1, :5], cache), step(model, IDS[:1, 5:6], cache)], dim=1))
    torch.testing.assert_close(results[1], results[0], **EXACT)


def test_gradients_are_those_of_the_model():
    theirs = qwen_model()
    ours = attach(copy.deepcopy(theirs))  # table=None: its own rows stay a parameter
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    for model in (theirs, ours):
        model.train()(IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100)).loss.backward()
    for (name, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4 * a.grad.abs().max().item(), msg=name)
    assert ours.model.layers[0].ple.rows.grad.any()


def file_tables(folder, model):
    """The rows of the model in files, never read whole."""
    tables = {}
    for layer, rows in rows_of(model).items():
        save_file({"rows": rows}, folder / f"{layer}.safetensors")
        tables[layer] = RowTable.open(folder / f"{layer}.safetensors", tensor="rows", row_format="f32")
    return tables


def test_rows_leave_the_model_and_lie_in_a_file(tmp_path):
    theirs = qwen_model()
    ours = attach(copy.deepcopy(theirs), table=file_tables(tmp_path, theirs))
    lost = {name for name, _ in theirs.named_parameters()} - {name for name, _ in ours.named_parameters()}
    assert lost == {f"model.layers.{i}.ple.ple_embedding.ngram_embedding.weight" for i in (0, 2)}
    bytes_of = [sum(p.nbytes for p in model.parameters()) for model in (theirs, ours)]
    assert bytes_of[0] - bytes_of[1] == sum(rows.nbytes for rows in rows_of(theirs).values())
    assert all(layer.ple is None or layer.ple.table.tier == "file" for layer in ours.model.layers)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, both()[1](IDS).logits, **EXACT)


def test_rows_of_another_format(tmp_path):
    """Rows of fp8 with one scale give the logits that their values give the model itself."""
    theirs = qwen_model()
    tables = {}
    for layer, rows in rows_of(theirs).items():
        scale = rows.abs().max() / 448
        stored = (rows / scale).to(torch.float8_e4m3fn)
        tables[layer] = RowTable.from_tensor(stored, scale.view(1), row_format="fp8_e4m3_tensor")
        with torch.no_grad():
            theirs.model.layers[layer].ple.ple_embedding.ngram_embedding.weight.copy_(stored.float() * scale)
    ours = attach(copy.deepcopy(theirs), table=tables)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, **FLOAT32)


def test_a_published_folder_loads_without_its_table(tmp_path):
    """From the shards that transformers wrote; ours writes the same names again, without the rows."""
    theirs = qwen_model()
    theirs.save_pretrained(tmp_path / "published")
    tables = file_tables(tmp_path, theirs)
    ours = load(Qwen4ExpForCausalLM, tmp_path / "published", table=tables)
    assert type(ours) is Qwen4ExpForCausalLM
    ours.save_pretrained(tmp_path / "ours")
    names = [set(safe_open(tmp_path / folder / "model.safetensors", "pt").keys()) for folder in ("published", "ours")]
    assert {name for name in names[0] - names[1] if "ngram_embedding.shard_" not in name} == names[1] - names[0] == set()
    again = load(Qwen4ExpForCausalLM, tmp_path / "ours", table=tables)
    with torch.no_grad():
        want = attach(copy.deepcopy(theirs), table=tables)(IDS).logits
        for model in (ours, again):  # weights that lie elsewhere in memory may be summed in another order
            torch.testing.assert_close(model.eval()(IDS).logits, want, **FLOAT32)
        kept = load(Qwen4ExpForCausalLM, tmp_path / "published").eval()  # table=None: the rows are read as a parameter
        torch.testing.assert_close(kept(IDS).logits, want, **FLOAT32)
        kept.save_pretrained(tmp_path / "kept")
        torch.testing.assert_close(Qwen4ExpForCausalLM.from_pretrained(tmp_path / "kept").eval()(IDS).logits, theirs(IDS).logits,
                                   **FLOAT32)


def test_what_does_not_fit_is_refused_by_name(monkeypatch):
    theirs = qwen_model()
    tables = tables_in_memory(theirs)
    short = RowTable.from_tensor(torch.zeros(7, 8), row_format="f32")
    for arguments, error, message in (
            (dict(table=tables[0]), ValueError, r"table has 1 table\(s\), expected one for each of the layers \[0, 2\]"),
            (dict(table={1: tables[0], 3: tables[2]}), ValueError, r"layers \[1, 3\], expected \[0, 2\], counted from zero"),
            (dict(table={0: tables[0], 2: short}), ValueError, "the table has 7 rows, layer 2 needs"),
            (dict(table={0: tables[0], 2: torch.zeros(7, 32)}), TypeError, "table is a Tensor, expected a RowTable"),
            (dict(layers=[0]), ValueError, "layers is given without spec"),
            (dict(rounding="twice"), ValueError, "rounding is 'twice'")):
        with pytest.raises(error, match=message):
            attach(copy.deepcopy(theirs), **arguments)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no PLE layer to replace; spec= says what memory"):
        attach(llama_model())
    with pytest.raises(ValueError, match="has a memory of this library already"):
        attach(attach(copy.deepcopy(theirs)))
    with pytest.raises(TypeError, match="model is a Linear, expected a transformers PreTrainedModel"):
        attach(torch.nn.Linear(1, 1))
    wrong = copy.deepcopy(theirs)
    wrong.model.layers[2].ple.ple_embedding.layer_multipliers += 2
    with pytest.raises(ValueError, match="layer_multipliers of layer 2 is"):
        attach(wrong)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="needs the package transformers"):
        attach(theirs)


def test_published_layers_count_from_one():
    assert EngramSpec.from_hf_config(qwen_model().config).layer_ids == (0, 2) and QWEN["ple_layer_ids"] == [1, 3]


@pytest.mark.parametrize("tier", ["memory", "file"])
def test_the_layer_compiles_as_one_graph_as_the_model_s_own(tier, tmp_path):
    """Without a cache, and with one that a chunk and a step pass through, padding in front."""
    theirs = qwen_model()
    tables = file_tables(tmp_path, theirs) if tier == "file" else tables_in_memory(theirs)
    hidden = torch.randn(3, 8, 128, generator=torch.Generator().manual_seed(3))
    ids, mask = left_padded(IDS[:, :8], [0, 1, 3])

    def whole(layer, cache):
        return layer(hidden, ids, None, mask)

    def chunks(layer, cache):
        return torch.cat([layer(hidden[:, a:b], ids[:, a:b], cache, mask[:, a:b]) for a, b in ((0, 7), (7, 8))], dim=1)

    ours = attach(copy.deepcopy(theirs), table=tables)
    for model in (theirs, ours) if tier == "memory" else (ours,):
        layer = model.model.layers[0].ple
        with torch.no_grad():
            for run in (whole, chunks):
                got = torch.compile(run, fullgraph=True, backend="aot_eager")(layer, new_cache(model))
                torch.testing.assert_close(got, run(layer, new_cache(model)), rtol=1e-6, atol=1e-6)
