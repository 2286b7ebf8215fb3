"""From a folder to logits in three lines, with transformers' own model code around the memory.

Held to that model code with the table's values in its embedding (Qwen), or with a restated input embedding (LongCat).
"""
import json

import pytest
import torch
from miniatures import longcat
from safetensors.torch import load_file, save_file
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM, Qwen4ExpForCausalLM
from transformers_cases import qwen_model, rows_of, some_ids

import engram_kernels as ek
from engram_kernels.integrations.transformers import attach, load

IDS = some_ids(2, 14)
NAME = "model.layers.0.ple.ple_embedding.ngram_embedding."
SMALL = dict(ple_layer_ids=[1], ple_embed_dim=256)  # rows of 16: one block of NVFP4
FLOAT32 = dict(rtol=2e-5, atol=2e-6)


def e2m1(stored):
    """Values of bytes of two elements each, the first in the low bits."""
    codes = torch.stack([stored % 16, stored // 16], -1).flatten(1).long()
    return torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes % 8] * (1 - 2 * (codes // 8))


def edition(name, rows):
    """dtype in the configuration, rows as stored, their scales, that of the table; and the values that these are."""
    draw = torch.Generator().manual_seed(3)
    if name == "bf16":
        return None, rows.bfloat16(), {}, rows.bfloat16().float()
    if name == "fp8":
        scale = torch.tensor([0.0123]).bfloat16()
        stored = (rows / scale.float()).to(torch.float8_e4m3fn)
        return "float8_e4m3fn", stored, {"weight_scale": scale}, stored.float() * scale.float()
    stored = torch.randint(256, (rows.shape[0], 8), generator=draw, dtype=torch.uint8)
    fine = (0.5 + torch.randn(rows.shape[0], 1, generator=draw).abs()).to(torch.float8_e4m3fn)
    scales = {"shard_{}.weight_scale": fine, "weight_scale_2": torch.tensor(0.1)}
    return "nvfp4", stored, scales, e2m1(stored) * fine.float() * 0.1


def published(folder, kind):
    """transformers' own model with the values of an edition in its embedding, and the edition's folder as it is published."""
    theirs = qwen_model(**SMALL)
    dtype, stored, scales, values = edition(kind, rows_of(theirs)[0])
    theirs.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    parts = [key for key in tensors if key.startswith(NAME + "shard_")]
    assert len(parts) == 8
    table = {f"{NAME}shard_{i}.weight": part.clone() for i, part in enumerate(stored.chunk(8))}
    for name, scale in scales.items():
        pieces = scale.chunk(8) if "{}" in name else [scale]
        table |= {NAME + name.format(i): part.clone() for i, part in enumerate(pieces)}
    files = {"model-00001-of-00002.safetensors": {key: x for key, x in tensors.items() if key not in parts},
             "model-00002-of-00002.safetensors": table}
    (folder / "model.safetensors").unlink()
    for file, content in files.items():
        save_file(content, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": {key: file for file, content in files.items() for key in content}}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({} if dtype is None else {"ple_embedding_dtype": dtype})))
    with torch.no_grad():
        theirs.model.layers[0].ple.ple_embedding.ngram_embedding.weight.copy_(values)
    return theirs


@pytest.mark.parametrize("kind", ["bf16", "fp8", "nvfp4"])
def test_qwen_folder_to_logits(kind, tmp_path):
    theirs = published(tmp_path, kind)
    model = load(Qwen4ExpForCausalLM, tmp_path, table=tmp_path).eval()
    with torch.no_grad():
        logits = model(IDS).logits
        torch.testing.assert_close(logits, theirs(IDS).logits, **FLOAT32)
        table = model.model.layers[0].ple.table
        assert table.tier == "file" and table.row_format == {"bf16": "bf16", "fp8": "fp8_e4m3_tensor", "nvfp4": "nvfp4"}[kind]
        assert not any("ngram_embedding" in name for name, _ in model.named_parameters())
        if kind == "bf16":
            torch.testing.assert_close(attach(theirs, table=str(tmp_path))(IDS).logits, logits, **FLOAT32)


def test_a_folder_of_another_model_is_refused(tmp_path):
    published(tmp_path, "bf16")
    other = qwen_model(**SMALL | {"ngram_vocab_size_base": 301})
    with pytest.raises(ValueError, match=r"table of another model: its table_sizes is \(300, 300\), the model's \(301, 301\)"):
        attach(other, table=tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    del found["weight_map"][f"{NAME}shard_5.weight"]
    index.write_text(json.dumps(found))
    for give in (lambda: attach(qwen_model(**SMALL), table=tmp_path),
                 lambda: load(Qwen4ExpForCausalLM, tmp_path, table=tmp_path)):
        with pytest.raises(ValueError, match=r"attach: .*there is no tensor .*shard_5\.weight"):
            give()
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        attach(qwen_model(**SMALL), table=tmp_path)
    spec = ek.EngramSpec.demo_v1(vocab_size=200, num_classes=None, pad_class=None, layer_ids=(0,), table_sizes=(101, 103),
                                 heads=2)
    with pytest.raises(TypeError, match=r"expected with spec a RowTable: RowTable\.open\(path\)"):
        attach(qwen_model(**SMALL), table=tmp_path, spec=spec)


def test_longcat_folder_to_logits(tmp_path):
    """The decoder is transformers' LongCat-Flash, which has no n-gram embedding: it starts from ours."""
    mini, folder = longcat(), tmp_path
    torch.manual_seed(0)
    config = LongcatFlashConfig(vocab_size=64, hidden_size=48, num_layers=1, num_attention_heads=2, ffn_hidden_size=32,
                                q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, head_dim=8,
                                v_head_dim=16, moe_topk=2, n_routed_experts=4, zero_expert_num=2, expert_ffn_hidden_size=16,
                                eos_token_id=2)
    decoder = LongcatFlashForCausalLM(config).eval()
    decoder.save_pretrained(folder)
    whole = load_file(folder / "model.safetensors") | mini.tensors
    del whole["model.layers.0.input_layernorm.weight"]
    mini.files = {"model.safetensors": whole}
    mini.config = json.loads((folder / "config.json").read_text()) | mini.config
    mini.has_index = False
    mini.write(folder)
    ids = torch.randint(3, 64, (13,), generator=torch.Generator().manual_seed(5))
    ids[[4, 9]] = 2

    embed = ek.from_checkpoint(folder, dtype=torch.float32)
    model = LongcatFlashForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(inputs_embeds=embed(ids, torch.tensor([0, 13], dtype=torch.int32))[None]).logits
        want = decoder(inputs_embeds=mini.expected(0, ids.tolist()).float()[None]).logits
    torch.testing.assert_close(logits, want, **FLOAT32)
    assert logits.std() > 1e-3
