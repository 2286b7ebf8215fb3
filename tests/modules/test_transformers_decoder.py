"""A memory in front of Llama's layers: trained, generated with, saved. The measure is the same model without a cache."""
import copy

import pytest
import torch
from transformers import DynamicCache, Lfm2Config, Lfm2ForCausalLM, LlamaForCausalLM, StaticCache
from transformers_cases import CACHE, MEMORIES, VOCAB, left_padded, llama_model, memory_spec, new_cache, some_ids, step

from engram_kernels import Engram, RowTable, TokenMap
from engram_kernels.integrations.transformers import attach, load

IDS, MASK = left_padded(some_ids(3, 21), [0, 4, 9])
CLOSE = dict(rtol=1e-5, atol=1e-5)  # sums of a chunk's tokens are blocked otherwise than the whole's


def model_of(variant="demo_v1", **options):
    """A Llama with a memory in front of its layers 0 and 2, whose weights all count."""
    model = attach(llama_model(), spec=memory_spec(variant), **options)
    with torch.no_grad():
        for layer in (0, 2):
            for name, parameter in model.model.layers[layer].memory.named_parameters():
                parameter.normal_(1 if name in ("w_hidden", "w_key", "conv_norm") else 0, 0.2)
    return model.eval()


@pytest.fixture(scope="module", params=MEMORIES)
def model(request):
    """Of each variant, with what the sequences give whole; no test changes it."""
    return model_of(request.param)


def whole(model, ids, **kwargs):
    """Logits without a cache."""
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


def test_the_memory_adds_what_the_module_gives(model):
    """In front of layer 0 the hidden states are the embeddings: what the layer is called with is ours of them."""
    seen = []
    hook = model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    whole(model, IDS)
    hook.remove()
    memory, hidden = model.model.layers[0].memory, model.model.embed_tokens(IDS).view(-1, 1, 32)
    with torch.no_grad():
        out = Engram.forward(memory, hidden, IDS.flatten(), torch.arange(0, 64, 21, dtype=torch.int32))
    want = out if memory.spec.variant == "deepseek_v41" else hidden + out
    torch.testing.assert_close(seen[0].view_as(want), want, rtol=0, atol=0)


def test_chunks_with_a_cache_equal_the_whole(model):
    cache, want = new_cache(model), whole(model, IDS)
    got = [step(model, IDS[:, begin:end], cache) for begin, end in ((0, 1), (1, 2), (2, 15), (15, 21))]
    torch.testing.assert_close(torch.cat(got, dim=1), want, **CLOSE)


def test_layers_that_count_no_tokens():
    """A memory in front of a convolution of the model, of whose cached state nobody can tell how many tokens it holds."""
    torch.manual_seed(0)
    plain = Lfm2ForCausalLM(Lfm2Config(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                                       num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
                                       layer_types=["full_attention", "conv", "full_attention"])).eval()
    model = attach(copy.deepcopy(plain), spec=memory_spec(), layers=[1, 2]).eval()
    cache, want = new_cache(model), whole(model, IDS)
    got = [step(model, IDS[:, begin:end], cache) for begin, end in ((0, 15), (15, 16), (16, 21))]
    torch.testing.assert_close(torch.cat(got, dim=1), want, **CLOSE)
    filled = new_cache(plain)
    step(plain, IDS, filled)
    with pytest.raises(ValueError, match="layer 1 of the cache holds 21 tokens, of which the memory has seen 0"):
        step(model, IDS[:, :1], filled)


def test_left_padding_changes_nothing(model):
    padded = whole(model, IDS, attention_mask=MASK)
    for row, pads in enumerate((0, 4, 9)):
        torch.testing.assert_close(padded[row, pads:], whole(model, IDS[row:row + 1, pads:])[0], **CLOSE)
    cache = new_cache(model)
    got = [step(model, IDS[:, begin:end], cache, attention_mask=MASK[:, :end], position_ids=(MASK.cumsum(1) - 1)[:, begin:end])
           for begin, end in ((0, 5), (5, 6), (6, 21))]
    torch.testing.assert_close(torch.cat(got, dim=1)[MASK.bool()], padded[MASK.bool()], **CLOSE)


@pytest.mark.parametrize("options", [dict(), dict(num_beams=3, num_return_sequences=2)], ids=["greedy", "beam"])
def test_generate_with_a_cache_gives_the_tokens_without_one(model, options):
    with_cache, without = (model.generate(IDS, attention_mask=MASK, max_new_tokens=10, do_sample=False, use_cache=use, **options)
                           for use in (True, False))
    torch.testing.assert_close(with_cache, without, rtol=0, atol=0)


def test_rejected_drafts_leave_no_trace(model):
    """Assisted decoding, by a model that is mostly wrong and by look-up in the prompt, gives greedy decoding's tokens."""
    ids = IDS[:1].repeat(1, 2)
    want = model.generate(ids, max_new_tokens=12, do_sample=False)
    cropped = []
    crop = DynamicCache.crop
    for helper in (dict(assistant_model=llama_model()), dict(prompt_lookup_num_tokens=3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DynamicCache, "crop", lambda self, *args: (cropped.append(args), crop(self, *args))[1])
            torch.testing.assert_close(model.generate(ids, max_new_tokens=12, do_sample=False, **helper), want, rtol=0, atol=0)
    assert cropped


def test_cache_operations_reach_the_memory(model):
    """Reordered, repeated, selected, cropped, copied and reset caches go on as the sequences that they then hold."""
    ids, cache = IDS, new_cache(model)
    step(model, ids[:, :9], cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    ids = ids[[2, 0, 0]]
    torch.testing.assert_close(step(model, ids[:, 9:12], cache), whole(model, ids[:, :12])[:, 9:], **CLOSE)
    copied = copy.deepcopy(cache)
    before = cache.get_seq_length()
    cache.crop(-4)
    assert cache.get_seq_length() == before - 4
    torch.testing.assert_close(step(model, ids[:, 8:13], cache), whole(model, ids[:, :13])[:, 8:], **CLOSE)
    cache.batch_repeat_interleave(2)
    ids = ids.repeat_interleave(2, dim=0)
    cache.batch_select_indices(torch.tensor([1, 2, 5]))
    ids = ids[[1, 2, 5]]
    torch.testing.assert_close(step(model, ids[:, 13:15], cache), whole(model, ids[:, :15])[:, 13:], **CLOSE)
    torch.testing.assert_close(step(model, IDS[[2, 0, 0], 12:14], copied), whole(model, IDS[[2, 0, 0], :14])[:, 12:], **CLOSE)
    cache.reset()
    if cache.get_seq_length():  # of 5.16: it keeps its length, and zeros in place of what it held
        with pytest.raises(ValueError, match="layer 0 of the cache holds 15 tokens, of which the memory has seen 0"):
            step(model, IDS[:, :7], cache)
    else:
        torch.testing.assert_close(step(model, IDS[:, :7], cache), whole(model, IDS[:, :7]), **CLOSE)


def test_crop_to_a_length(model):
    """The older way, of 5.16: what newer releases refuse leaves the memory's state as it is."""
    cache = new_cache(model)
    step(model, IDS[:, :9], cache)
    try:
        cache.crop(5)
    except ValueError:
        assert cache.get_seq_length() == 9
    kept = cache.get_seq_length()
    torch.testing.assert_close(step(model, IDS[:, kept:11], cache), whole(model, IDS[:, :11])[:, kept:], **CLOSE)


class Counted:
    """A backend of torch.compile that runs each graph as it is and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph


@pytest.mark.parametrize("made", ["of the configuration", "as it comes", "by the model"])
def test_a_forward_with_a_cache_is_one_graph(model, made):
    """As without the memory: a prefill with padding, and a step behind it, in each kind of DynamicCache."""
    torch.compiler.reset()
    kwargs = {} if made == "by the model" else {CACHE: new_cache(model) if made == "of the configuration" else DynamicCache()}
    want = whole(model, IDS, attention_mask=MASK)
    for begin, end in ((0, 20), (20, 21)):
        counted = Counted()
        with torch.no_grad():
            out = torch.compile(model.forward, backend=counted, fullgraph=True)(
                IDS[:, begin:end], attention_mask=MASK[:, :end], position_ids=(MASK.cumsum(1) - 1)[:, begin:end],
                use_cache=True, **kwargs)
        assert counted.graphs == 1
        kwargs = {CACHE: out[CACHE]}
        shown = MASK[:, begin:end].bool()
        torch.testing.assert_close(out.logits[shown], want[:, begin:end][shown], **CLOSE)


def test_two_generations_take_turns(model):
    other, caches = some_ids(3, 21, seed=9), [new_cache(model), new_cache(model)]
    for begin, end in ((0, 8), (8, 9), (9, 21)):
        for ids, cache in zip((IDS, other), caches, strict=True):
            torch.testing.assert_close(step(model, ids[:, begin:end], cache), whole(model, ids[:, :end])[:, begin:], **CLOSE)


@pytest.mark.parametrize("variant", MEMORIES)
def test_it_trains(variant):
    """The loss falls, and gradients reach rows, projection, norms and convolution; with the cache that transformers makes."""
    model = attach(llama_model(), spec=memory_spec(variant)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("memory" in name)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for layer in (0, 2):
        names = dict(model.model.layers[layer].memory.named_parameters())
        assert {"rows", "wkv.weight", "w_hidden", "w_key"} <= set(names) and all(p.grad.any() for p in names.values())


def test_gradients_behind_a_cache_are_those_of_the_whole():
    model = model_of()
    grads = []
    for pieces in (((0, 21),), ((0, 12), (12, 21))):
        model.zero_grad()
        cache = new_cache(model)
        for begin, end in pieces:
            out = model(IDS[:, begin:end], use_cache=True, **{CACHE: cache}).logits
        out[:, -1].square().sum().backward()
        grads.append(model.lm_head.weight.grad.clone())
        assert model.model.layers[0].memory.rows.grad.any()
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4 * grads[0].abs().max().item())


def test_gradient_checkpointing_changes_no_gradient():
    model = model_of().train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(IDS, attention_mask=MASK, labels=IDS, use_cache=False).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_save_pretrained_and_load(tmp_path):
    """With rows that are trained, which lie in the checkpoint, and with rows in a table of their own, which do not."""
    trained = model_of("deepseek_v41")
    trained.save_pretrained(tmp_path)
    again = load(LlamaForCausalLM, tmp_path).eval()
    assert type(again) is LlamaForCausalLM and again.model.layers[2].memory.spec == trained.model.layers[2].memory.spec
    torch.testing.assert_close(whole(again, IDS), whole(trained, IDS), **CLOSE)
    tables = {i: RowTable.from_tensor(trained.model.layers[i].memory.rows.detach().clone(), row_format="f32") for i in (0, 2)}
    for i in (0, 2):
        trained.model.layers[i].memory.table = tables[i]
    trained.save_pretrained(tmp_path / "apart")
    apart = load(LlamaForCausalLM, tmp_path / "apart", table=tables).eval()
    assert not any(name.endswith("memory.rows") for name, _ in apart.named_parameters())
    torch.testing.assert_close(whole(apart, IDS), whole(again, IDS), **CLOSE)


def test_classes_of_tokens():
    """With a token map, ids of one class are one token to the memory, in the history too."""
    spec = memory_spec("deepseek_v41")
    token_map = TokenMap(torch.arange(VOCAB, dtype=torch.int32) % 100, 100, "x")
    fields = {f: getattr(spec, f) for f in ("max_order", "heads", "table_sizes", "layer_ids", "head_dim")}
    classes = type(spec).deepseek_v41(vocab_size=VOCAB, num_classes=100, pad_class=0, pad_token_id=0, row_format="f32", **fields)
    model = attach(llama_model(), spec=classes, token_map=token_map)
    ids = IDS % 100
    rows = []
    for given in (ids, ids + 100):
        cache = new_cache(model)
        memory = model.model.layers[0].memory
        hook = memory.wkv.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
        step(model, given[:, :9], cache), step(model, given[:, 9:], cache)
        hook.remove()
    for a, b in zip(rows[:2], rows[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_is_not_supported_is_refused_by_name():
    model = model_of()
    packed = torch.cat([torch.arange(10), torch.arange(11)])[None]
    for arguments, message in (
            (dict(inputs_embeds=model.model.embed_tokens(IDS)), "input_ids is None, but the memory hashes token ids"),
            (dict(input_ids=IDS[:1], position_ids=packed), "position_ids start anew within a row"),
            (dict(input_ids=IDS[:1], cu_seq_lens_q=torch.tensor([0, 10, 21])), "cu_seq_lens_q is given, but sequences packed"),
            (dict(input_ids=IDS, attention_mask=torch.ones(3, 1, 21, 21)), r"attention_mask is \[3, 1, 21, 21\], expected"),
            (dict(input_ids=IDS, attention_mask=MASK[:, :5]), "attention_mask has 5 columns, expected at least 21")):
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    with pytest.raises(TypeError, match="cache is a StaticCache, expected a DynamicCache"):
        step(model, IDS, StaticCache(config=model.config, max_cache_len=32))
    plain, cache = llama_model(), DynamicCache(config=model.config)
    step(plain, IDS, cache)
    with pytest.raises(ValueError, match="layer 0 of the cache holds 21 tokens, of which the memory has seen 0"):
        step(model, IDS, cache)
    with pytest.raises(ValueError, match="layer 0 was called without its model"):
        model.model.layers[0](torch.zeros(1, 2, 32))
    for arguments, message in ((dict(layers=[0]), r"layers is \[0\], expected one decoder layer for each of the spec's \[0, 2\]"),
                               (dict(layers=[0, 3]), r"layers has 3, expected a decoder layer in \[0, 3\)"),
                               (dict(layers=[1, 1]), r"layers is \[1, 1\]")):
        with pytest.raises(ValueError, match=message):
            attach(llama_model(), spec=memory_spec(), **arguments)
    with pytest.raises(TypeError, match="spec is a str, expected an EngramSpec"):
        attach(llama_model(), spec="demo_v1")
    with pytest.raises(TypeError, match="model_class is 'Llama', expected a class of models"):
        load("Llama", "nowhere")


def test_crop_beyond_what_the_convolution_keeps_is_refused():
    model, ids = model_of(), some_ids(1, 150)
    cache = new_cache(model)
    step(model, ids, cache)
    with pytest.raises(ValueError, match="the cache is cropped by 65 tokens, but the memory's convolution can go back by 64"):
        cache.crop(-65)
