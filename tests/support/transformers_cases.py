"""Small random transformers models, with and without a memory of this library."""
import inspect

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen4ExpForCausalLM, Qwen4ExpTextConfig

from engram_kernels import EngramSpec, RowTable

EOS, PAD, VOCAB = 3, 0, 200
# older releases call it past_key_values
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
QWEN = dict(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
            moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts_per_tok=2, num_experts=4,
            ple_layer_ids=[1, 3], ple_embed_dim=128, ngram_vocab_size_base=300, split_ngram_parts=8, hc_count=2, hc_lowrank=16,
            eos_token_id=EOS, pad_token_id=PAD, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=32, indexer_budget=64,
            indexer_compress_ratio=4, rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5,
                                                           mrope_section=[2, 3, 3]))
MEMORIES = {"deepseek_v41": dict(max_order=3, heads=2, table_sizes=(101, 103)),
            "demo_v1": dict(heads=2, table_sizes=(101, 103))}


def qwen_model(dtype=torch.float32, **overrides):
    """A Qwen4Exp model of random weights: norms, convolutions and n-gram rows too, which are constants when it is made."""
    torch.manual_seed(0)
    model = Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**{**QWEN, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ple." in name and "proj" not in name:
                parameter.normal_(std=0.3)
            elif parameter.dim() > 1:
                parameter.mul_(3)  # initializer_range gives logits of 1e-3, in which nothing is seen
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.to(dtype)


def rows_of(model):
    """Decoder layer -> the rows of its PLE layer, copied."""
    return {i: layer.ple.ple_embedding.ngram_embedding.weight.detach().clone()
            for i, layer in enumerate(model.model.layers) if layer.ple is not None}


def tables_in_memory(model):
    """Decoder layer -> those rows as a table."""
    return {i: RowTable.from_tensor(rows, row_format="bf16" if rows.dtype == torch.bfloat16 else "f32")
            for i, rows in rows_of(model).items()}


def llama_model(dtype=torch.float32):
    """A Llama of two layers."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                                         num_attention_heads=4, num_key_value_heads=2, eos_token_id=EOS, pad_token_id=PAD)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    model.generation_config.eos_token_id = None
    return model.to(dtype)


def memory_spec(variant="demo_v1"):
    """A memory in front of the layers 0 and 2 of that Llama."""
    return getattr(EngramSpec, variant)(vocab_size=VOCAB, num_classes=None, pad_class=None, pad_token_id=PAD, layer_ids=(0, 2),
                                        head_dim=32, row_format="f32", **MEMORIES[variant])


def some_ids(batch, length, seed=1):
    """Token ids without padding, with an EOS here and there."""
    ids = torch.randint(4, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[0, length // 2] = EOS
    return ids


def left_padded(ids, pads):
    """ids with the first `pads[b]` of row b replaced by the pad, and the attention mask."""
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    return ids.masked_fill(mask == 0, PAD), mask


def new_cache(model):
    """An empty cache for it."""
    return DynamicCache(config=model.config)


def step(model, ids, cache, **kwargs):
    """Logits of a chunk behind what the cache holds."""
    with torch.no_grad():
        return model(ids, use_cache=True, **{CACHE: cache}, **kwargs).logits
