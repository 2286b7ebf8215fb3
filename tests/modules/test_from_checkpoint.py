"""from_checkpoint: miniatures of each published checkpoint against restatements, and every damage refused with its reason."""
import json

import pytest
import torch
from miniatures import CU, MINIATURES, WORDS, H, M, T, demo, longcat, qwen, randn, v41

import engram_kernels as ek


def tokens():
    ids = torch.randint(3, WORDS, (T,), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    ids[[4, 12]], ids[[2, 15]] = 60, 2  # Qwen's and LongCat's EOS
    return ids


@pytest.mark.parametrize("name", MINIATURES)
def test_checkpoint_to_hidden_states(name, tmp_path):
    mini, ids, hidden = MINIATURES[name](), tokens(), randn(T, M, H, seed=9)
    folder = mini.write(tmp_path)
    for layer in mini.layers:
        module = ek.from_checkpoint(folder, layer, dtype=torch.float32)
        out = module(ids, CU) if name == "longcat" else module(hidden, ids, CU)
        want = torch.cat([mini.expected(layer, ids[a:b].tolist(), hidden[a:b]) for a, b in ((0, 8), (8, 21))])
        torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-5)
        assert module.unused_tensors == () and module.table.tier == "file"
        assert (module.layer_id, module.spec.row_format) == (layer, module.table.row_format)


def test_checkpoint_keeps_the_stored_dtype_and_the_class_decides(tmp_path):
    assert ek.Engram.from_checkpoint(v41().write(tmp_path / "a"), 3).wkv.weight.dtype == torch.bfloat16
    assert ek.from_checkpoint(demo().write(tmp_path / "b")).wkv.weight.dtype == torch.float32
    assert isinstance(ek.from_checkpoint(longcat().write(tmp_path / "c")), ek.LongcatEmbedding)
    with pytest.raises(ValueError, match="is a model of variant 'longcat', expected 'deepseek_v41'"):
        ek.Engram.from_checkpoint(tmp_path / "c")
    with pytest.raises(ValueError, match=r"layer is None, expected one of \[1, 3\]"):
        ek.from_checkpoint(tmp_path / "a")
    for layer in (2, True, 1.0, "1"):
        with pytest.raises(ValueError, match=rf"layer is {layer!r}, expected one of \[1, 3\]"):
            ek.from_checkpoint(tmp_path / "a", layer)
    with pytest.raises(TypeError, match="source is None, expected the path of a checkpoint's folder"):
        ek.from_checkpoint(None)


def test_a_snapshot_of_a_hub_cache(tmp_path):
    """Links to files of other names; a folder of the cache above it is refused with the name of the snapshot."""
    hub = tmp_path / "with space/models--a--b {} [x]*"
    folder, blobs = v41().write(hub / "snapshots" / "c0ffee"), hub / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
        (blobs / str(number)).chmod(0o444)
    folder.chmod(0o555)
    hidden = randn(T, M, H, seed=9)
    out = ek.from_checkpoint(folder, 1, dtype=torch.float32)(hidden, tokens(), CU)
    folder.chmod(0o755)
    want = torch.cat([v41().expected(1, tokens()[a:b].tolist(), hidden[a:b]) for a, b in ((0, 8), (8, 21))])
    torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="name a revision in it: snapshots/c0ffee"):
        ek.from_checkpoint(hub, 1)


@pytest.mark.parametrize("scale_name", ["scale", "weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.uint8, torch.float32])
def test_checkpoint_dequantizes_wkv_with_partial_blocks(scale_name, scale_dtype, tmp_path):
    plain = ek.from_checkpoint(v41().write(tmp_path / "a"), 1, dtype=torch.float32)
    named = ek.from_checkpoint(v41(scale_name=scale_name, scale_dtype=scale_dtype).write(tmp_path / "b"), 1, dtype=torch.float32)
    assert torch.equal(plain.wkv.weight, named.wkv.weight)
    without = v41()
    del without.config["quantization_config"]
    assert torch.equal(plain.wkv.weight, ek.from_checkpoint(without.write(tmp_path / "c"), 1, dtype=torch.float32).wkv.weight)


def test_checkpoint_says_what_it_did_not_use(tmp_path):
    mini = v41()
    mini.files["model-00047-of-00048.safetensors"]["layers.1.engram.extra.weight"] = torch.zeros(3)
    with pytest.warns(UserWarning, match=r"not used: layers\.1\.engram\.extra\.weight"):
        module = ek.from_checkpoint(mini.write(tmp_path), 1)
    assert module.unused_tensors == ("layers.1.engram.extra.weight",)


def damaged(make, name, change):
    return lambda: make().edit(name, change)


def with_tensors(mini, tensors):
    mini.files["more.safetensors"] = tensors
    return mini


def with_config(make, **fields):
    def made():
        mini = make()
        mini.config.get("text_config", mini.config).update(fields)
        return mini
    return made


PLE, V41 = "model.language_model.layers.1.ple.", "layers.1.engram."
SHARD = PLE + "ple_embedding.ngram_embedding.shard_{}.weight"
DAMAGED = {  # what is wrong -> (miniature, layer, message)
    "v41_rows": (damaged(v41, V41 + "embed.weight", lambda x: None), 1, r"no tensor is called layers\.1\.\.\.embed\.weight"),
    "v41_scales": (damaged(v41, V41 + "embed.scale", lambda x: None), 1, "with no scales: no row format here reads that"),
    "v41_norm": (damaged(v41, V41 + "q_weight", lambda x: None), 1, r"there is no tensor layers\.1\.engram\.q_weight"),
    "v41_wkv_scale": (damaged(v41, V41 + "wkv.scale", lambda x: None), 1, r"wkv\.weight is F8_E4M3, but there is neither"),
    "v41_wkv_shape": (damaged(v41, V41 + "wkv.weight", lambda x: x[1:]), 1,
        r"wkv\.weight has shape \[143, 192\], expected \[144, 192\]"),
    "v41_wkv_blocks": (damaged(v41, V41 + "wkv.scale", lambda x: torch.ones(7, 2)), 1, "does not divide"),
    "v41_wkv_block_less": (damaged(v41, V41 + "wkv.scale", lambda x: x[1:]), 1, r"\[1, 2\], which does not divide \[144, 192\]"),
    "v41_wkv_block_more": (damaged(v41, V41 + "wkv.scale", lambda x: torch.ones(3, 2)), 1, "does not divide"),
    "v41_wkv_no_block": (damaged(v41, V41 + "wkv.scale", lambda x: x[:0]), 1, "does not divide"),
    "v41_wkv_scale_f64": (damaged(v41, V41 + "wkv.scale", lambda x: x.double()), 1, "wkv.scale is F64, expected one of F8_E8M0"),
    "v41_wkv_two_scales": (lambda: with_tensors(v41(), {V41 + "wkv.weight_scale": torch.ones(2, 2)}), 1,
        r"has scales of two names, .*wkv\.scale and .*wkv\.weight_scale"),
    "v41_wkv_float": (damaged(v41, V41 + "wkv.weight", lambda x: x.bfloat16()), 1, "is BF16, but there is .*wkv.scale: whet"),
    "v41_mlx": (lambda: with_tensors(v41().edit(V41 + "embed.weight", lambda x: torch.zeros(304, 4, dtype=torch.uint32))
                                     .edit(V41 + "embed.scale", lambda x: None),
                                     {V41 + "embed.scales": torch.ones(304, 1), V41 + "embed.biases": torch.ones(304, 1)}), 1,
        r"is U32 \[304, 4\] with layers.1.engram.embed.biases, as MLX's affine integers have them: no row format"),
    "v41_rows_3d": (damaged(v41, V41 + "embed.weight", lambda x: x[None]), 1, r"\[1, 304, 32\], expected \[rows, width\]"),
    "v41_wkv_packed": (damaged(v41, V41 + "wkv.weight", lambda x: x.view(torch.uint8)), 1, "this quantization is not known here"),
    "v41_wkv_e5m2": (damaged(v41, V41 + "wkv.weight", lambda x: x.float().to(torch.float8_e5m2)), 1, "quantization is not known"),
    "v41_rows_int16": (damaged(v41, V41 + "embed.weight", lambda x: x.to(torch.int16)), 1, "no row format here reads that"),
    "v41_too_few_rows": (damaged(v41, V41 + "embed.weight", lambda x: x[:-1]), 1, "has 303 rows, the configuration gives 304"),
    "v41_norm_shape": (damaged(v41, V41 + "k_weight", lambda x: x.flatten()), 1,
        r"k_weight has shape \[96\], expected \[2, 48\]"),
    "v41_config_rows": (with_config(v41, engram_vocab_size=60), 1, "engram_num_embeddings is"),
    "v41_config_width": (with_config(v41, hidden_size=64), 1, r"wkv\.weight has shape \[144, 192\], expected \[192, 192\]"),
    "qwen_multipliers": (damaged(qwen, PLE + "ple_embedding.layer_multipliers", lambda x: x + 2), 1,
        "layer_multipliers is .* every row"),
    "qwen_sizes": (damaged(qwen, PLE + "ple_embedding.ngram_heads_vocab_sizes", lambda x: x.flip(0)), 1,
        "ngram_heads_vocab_sizes is"),
    "qwen_offsets": (damaged(qwen, PLE + "ple_embedding.ngram_heads_offsets", lambda x: x + 1), 1,
        r"ngram_heads_offsets is \[1, "),
    "qwen_no_multipliers": (damaged(qwen, PLE + "ple_embedding.layer_multipliers", lambda x: None), 1,
        "there is no tensor .*layer_mult"),
    "qwen_part": (damaged(qwen, SHARD.format(10), lambda x: None), 1, r"there is no tensor .*shard_10\.weight"),
    "qwen_last_part": (damaged(qwen, SHARD.format(11), lambda x: None), 1, "has 220 rows, the configuration gives 2"),
    "qwen_part_rows": (damaged(qwen, SHARD.format(3), lambda x: torch.cat([x, x[:1]])), 1,
        r"shard_3\.weight has 21 rows, .*shard_0\.weight has 20: parts of one table have equally many rows"),
    "qwen_multipliers_less": (damaged(qwen, PLE + "ple_embedding.layer_multipliers", lambda x: x[:2]), 1,
        "layer_multipliers has 2 values, the configuration gives 3"),
    "qwen_part_width": (damaged(qwen, SHARD.format(3), lambda x: x[:, 1:]), 1, "parts of one table have one width"),
    "qwen_part_dtype": (damaged(qwen, SHARD.format(3), lambda x: x.float()), 1,
        "parts of one table have one width and one dtype"),
    "qwen_seed": (with_config(qwen, seed=1235), 1, "layer_multipliers is"),
    "qwen_format": (with_config(qwen, ple_embedding_dtype="float8_e4m3fn"), 1, "holds rows of bf16, the configuration says fp8"),
    "qwen_table_scale": (damaged(lambda: qwen("nvfp4"), PLE + "ple_embedding.ngram_embedding.weight_scale_2", lambda x: None), 1,
        r"holds rows of nvfp4, but there is no scale of the whole table: neither .*\.weight_scale_2 nor .*shard_\.\.\.weight"),
    "qwen_table_scales": (damaged(lambda: qwen("nvfp4"), PLE + "ple_embedding.ngram_embedding.weight_scale_2",
                                  lambda x: x.repeat(2)), 1, r"weight_scale_2.*expected one value"),
    "qwen_row_scale": (damaged(lambda: qwen("nvfp4"), SHARD.format(4) + "_scale", lambda x: None), 1,
        r"there is no tensor .*shard_4\.weight_scale"),
    "qwen_scale_blocks": (damaged(lambda: qwen("nvfp4"), SHARD.format(0) + "_scale", lambda x: x[:, :1]), 1,
        "no row format here reads"),
    "qwen_layer": (with_config(qwen, ple_layer_ids=[3]), 2, r"no tensor is called layers\.2\.\.\.ple_embedding"),
    "longcat_part": (damaged(longcat, "model.ngram_embeddings.embedders.5.weight", lambda x: None), 0,
        r"no tensor .*embedders\.5"),
    "longcat_rows": (damaged(longcat, "model.ngram_embeddings.embedders.2.weight", lambda x: x[1:]), 0,
        r"embedders\.2.* has 452 rows"),
    "longcat_projection": (damaged(longcat, "model.ngram_embeddings.post_projs.1.weight", lambda x: x.T), 0,
        r"shape \[8, 48\], exp"),
    "longcat_words": (damaged(longcat, "model.embed_tokens.weight", lambda x: None), 0,
        r"neither model\.embed_tokens\.weight nor .*word_emb"),
    "longcat_few_words": (damaged(longcat, "model.embed_tokens.weight", lambda x: x[1:]), 0, "has 63 rows, .* says 64"),
    "longcat_ratio": (with_config(longcat, ngram_vocab_size_ratio=8), 0,
        r"embedders\.0.* has 449 rows, the configuration gives 513"),
    "demo_offsets": (damaged(demo, "multi_head_embedding.offsets", lambda x: x + 1), 1, "multi_head_embedding.offsets is"),
    "demo_bias": (damaged(demo, "key_projs.1.bias", lambda x: None), 1, r"there is no tensor key_projs\.1\.bias"),
    "demo_rows": (damaged(demo, "multi_head_embedding.embedding.weight", lambda x: x[1:]), 1, "rows, the configuration gives"),
    "demo_order": (with_config(demo, max_ngram_size=4, engram_vocab_size=[50] * 3), 1, "configuration gives"),
}


@pytest.mark.parametrize(("make", "layer", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_checkpoint_is_refused(make, layer, message, tmp_path):
    with pytest.raises((ValueError, KeyError), match=message):
        ek.from_checkpoint(make().write(tmp_path), layer)


def test_damaged_folders_are_refused(tmp_path):
    folder = v41().write(tmp_path / "a")
    (folder / "model-00047-of-00048.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is in model-00047-of-00048\.safetensors, but there is no such file"):
        ek.from_checkpoint(folder, 1)
    assert ek.from_checkpoint(folder, 3).layer_id == 3, "the other layer lies in another shard"

    folder = v41().write(tmp_path / "b")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["layers.1.engram.q_weight"] = "model-00048-of-00048.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"says that layers\.1\.engram\.q_weight is in .*, but that file does not hold it"):
        ek.from_checkpoint(folder, 1)

    swapped = v41()  # the tables of the two layers, which differ in their rows
    a, b = swapped.files["model-00047-of-00048.safetensors"], swapped.files["model-00048-of-00048.safetensors"]
    for name in ("embed.weight", "embed.scale"):
        a[f"layers.1.engram.{name}"], b[f"layers.3.engram.{name}"] = b[f"layers.3.engram.{name}"], a[f"layers.1.engram.{name}"]
    for layer in (1, 3):
        with pytest.raises(ValueError, match=rf"the table of layer {layer}, .* rows, the configuration gives"):
            ek.from_checkpoint(swapped.write(tmp_path / "c"), layer)

    folder = demo().write(tmp_path / "d")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        ek.from_checkpoint(folder)


@pytest.mark.parametrize(("make", "ids", "message"), [
    (v41, WORDS - 8, "the tokenizer has 56 token ids in 42 classes, the configuration says 64 in 48"),
    (demo, WORDS - 8, "the tokenizer has 56 token ids"), (v41, None, "has no tokenizer.json"),
    (qwen, WORDS + 4, "the tokenizer has 68 token ids, the configuration says 64"), (longcat, WORDS + 4, "has 68 token ids")])
def test_tokenizer_of_another_length_is_refused(make, ids, message, tmp_path):
    mini = make()
    mini.tokenizer_ids = ids
    with pytest.raises(ValueError, match=message):
        ek.from_checkpoint(mini.write(tmp_path), mini.layers[0])


@pytest.mark.parametrize("rows", ["fp8", "int8"])
@pytest.mark.parametrize("num_ranks", [1, 3, 4])
def test_rows_split_over_ranks(rows, num_ranks, tmp_path):
    """As convert.py splits them: padded to equal parts, the other tensors in every rank; found by name, or named."""
    whole, ids, hidden = v41(rows), tokens(), randn(T, M, H, seed=9)
    found = v41(rows).over_ranks(num_ranks).write(tmp_path / "a")
    named = v41(rows).over_ranks(num_ranks, "part-{}-of-{}.safetensors").write(tmp_path / "b")
    names = [f"part-{rank}-of-{num_ranks}.safetensors" for rank in range(num_ranks)]
    for layer in whole.layers:
        want = torch.cat([whole.expected(layer, ids[a:b].tolist(), hidden[a:b]) for a, b in ((0, 8), (8, 21))])
        for module in (ek.from_checkpoint(found, layer, dtype=torch.float32),
                       ek.Engram.from_checkpoint(found, layer, dtype=torch.float32, ranks=f"model{{}}-mp{num_ranks}.safetensors"),
                       ek.from_checkpoint(named, layer, dtype=torch.float32, ranks=names)):
            torch.testing.assert_close(module(hidden, ids, CU).double(), want, rtol=2e-5, atol=2e-5)
            assert module.table.tier == "file" and module.unused_tensors == ()


def test_damaged_ranks_are_refused(tmp_path):
    folder = v41().over_ranks(3).write(tmp_path / "a")
    with pytest.raises(ValueError, match=r"no file of \S+ is called 'part\{\}.safetensors' with 0 for \{\}: there is none"):
        ek.from_checkpoint(folder, 1, ranks="part{}.safetensors")
    with pytest.raises(TypeError, match="ranks is 3, expected a name of files with one {}, or a list of names"):
        ek.from_checkpoint(folder, 1, ranks=3)
    v41().over_ranks(2).write(folder)
    with pytest.raises(ValueError, match=r"splits over ranks; ranks should name one of them: model\{\}-mp2.safetensors, "):
        ek.from_checkpoint(folder, 1)
    assert ek.from_checkpoint(folder, 1, ranks="model{}-mp3.safetensors").layer_id == 1
    (folder / "model1-mp3.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no file of \S+ is called .* with 1 for \{\}: there are 2, the last is 2"):
        ek.from_checkpoint(folder, 1, ranks="model{}-mp3.safetensors")

    lost = v41().over_ranks(3)
    del lost.files["model1-mp3.safetensors"][V41 + "embed.weight"]
    with pytest.raises(ValueError, match=r"engram\.embed\.weight is in 2 of 3 ranks: rows are missing"):
        ek.from_checkpoint(lost.write(tmp_path / "b"), 1)
    other = v41().over_ranks(3)
    other.files["model2-mp3.safetensors"][V41 + "q_weight"] = torch.zeros(M, H).bfloat16()
    with pytest.raises(ValueError, match=r"q_weight in model2-mp3.safetensors is not what it is in model0-mp3"):
        ek.from_checkpoint(other.write(tmp_path / "c"), 1)
    short = v41().over_ranks(3)
    short.files["model2-mp3.safetensors"][V41 + "embed.weight"] = torch.zeros(9, 32).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"has \d+ rows, the configuration gives 304"):
        ek.from_checkpoint(short.write(tmp_path / "d"), 1)
    parts = v41().over_ranks(2, split=("embed.weight", "embed.scale", "wkv.weight", "wkv.scale"))
    with pytest.raises(ValueError, match=r"wkv\.weight has shape \[72, 192\] in each of 2 ranks, expected .*: only rows"):
        ek.from_checkpoint(parts.write(tmp_path / "f"), 1)
    many = qwen().over_ranks(2, split=("shard_3.weight",))
    with pytest.raises(ValueError, match="is one of 12 parts, in the files of 2 ranks"):
        ek.from_checkpoint(many.write(tmp_path / "e"), 1)
