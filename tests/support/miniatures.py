"""Small checkpoints in the naming and layout of each published model, and what their memory gives, restated from the tensors.

Nothing here uses the library: the hash is plain Python over numpy's and splitmix64's numbers, the rest is torch in float64.
"""
import dataclasses
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

H, M, WORDS = 48, 2, 64  # hidden size, branches, token ids
T, CU = 21, torch.tensor([0, 8, 8, 21], dtype=torch.int32)


@dataclasses.dataclass
class Miniature:
    """A checkpoint: what is in config.json, and which tensors in which file; `expected` restates a layer's output."""

    config: dict
    files: dict  # file name -> {tensor name: tensor}
    layers: tuple
    expected: object  # (layer, token ids of one sequence, hidden [T, M, H]) -> [T, M, H] float64; longcat: without hidden
    tokenizer_ids: int | None = WORDS
    has_index: bool = True

    @property
    def tensors(self):
        return {name: x for tensors in self.files.values() for name, x in tensors.items()}

    def write(self, folder):
        """Writes the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        for file, tensors in self.files.items():
            save_file({name: x.contiguous() for name, x in tensors.items()}, folder / file)
        if self.has_index:
            where = {name: file for file, tensors in self.files.items() for name in tensors}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        if self.tokenizer_ids:
            write_tokenizer(folder / "tokenizer.json", self.tokenizer_ids)
        return folder

    def over_ranks(self, ranks, name="model{}-mp{}.safetensors", split=("embed.weight", "embed.scale")):
        """The same as convert.py writes it: what is split, in equal parts and padded with zeros; the rest in every rank."""
        def part(key, x, rank):
            if not key.endswith(split):
                return x
            height = -(-x.shape[0] // ranks)
            padded = torch.cat([x.view(torch.uint8), x.view(torch.uint8)[:1].repeat(height * ranks - x.shape[0], 1) * 0])
            return padded[rank * height:(rank + 1) * height].view(x.dtype)

        self.files = {name.format(rank, ranks): {key: part(key, x, rank) for key, x in self.tensors.items()}
                      for rank in range(ranks)}
        self.has_index = False
        return self

    def edit(self, name, change):
        """Replaces a tensor; None takes it away."""
        for tensors in self.files.values():
            if name in tensors:
                new = change(tensors.pop(name))
                if new is not None:
                    tensors[name] = new
                return self
        raise KeyError(name)


def classes(token_id):
    """Class of a token id: the last quarter of the ids repeats the first in capitals."""
    return token_id if token_id < WORDS * 3 // 4 else token_id - WORDS * 3 // 4


NUM_CLASSES = WORDS * 3 // 4


def write_tokenizer(path, num_ids):
    """A tokenizer.json of one word per id, the later of which are capitals of the first."""
    from tokenizers import Tokenizer, models
    lower = num_ids * 3 // 4
    names = [f"a{i}b" for i in range(lower)] + [f"A{i}B" for i in range(num_ids - lower)]
    Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="a0b")).save(str(path))


def primes_from(bases, heads, layers):
    """For each layer the primes of its heads, each taken once."""
    taken, found = set(), []
    for _ in range(layers):
        line = []
        for base in bases:
            n = base - 1
            for _ in range(heads):
                n += 1
                while n in taken or n < 2 or any(n % d == 0 for d in range(2, math.isqrt(n) + 1)):
                    n += 1
                taken.add(n)
                line.append(n)
        found.append(line)
    return found


def pcg_multipliers(layer, order, ids, seed=0):
    bound = max(1, (2**63 - 1) // ids // 2)
    return (2 * np.random.default_rng(seed + 10007 * layer).integers(0, bound, order, dtype=np.int64) + 1).tolist()


def splitmix_multipliers(position, order, ids, seed):
    mask, found = 2**64 - 1, []
    for s in range(order):
        x = (seed + 10007 * position + 0x9E3779B97F4A7C15 * (s + 1) + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        found.append(2 * ((x ^ (x >> 31)) % max(1, (2**63 - 1) // ids // 2)) + 1)
    return found


def xor_rows(ids, multipliers, primes, heads, boundary, eos=None):
    """Row ids [T, C] of one sequence; `boundary` stands for what is before it and, with `eos`, before and at an EOS."""
    rows = []
    for t in range(len(ids)):
        window, ended = [ids[t]], False
        for back in range(1, len(multipliers)):
            ended = ended or back > t or (eos is not None and ids[t - back] == eos)
            window.append(boundary if ended else ids[t - back])
        line, start = [], 0
        for column, prime in enumerate(primes):
            mix = 0
            for s in range(column // heads + 2):
                mix ^= window[s] * multipliers[s]
            line.append(mix % prime + start)
            start += prime
        rows.append(line)
    return torch.tensor(rows)


def gated(h, keys, value, w_hidden, w_key, eps, at_zero, residual):
    """The gate of each branch, in float64."""
    out = []
    for m in range(M):
        query, key = F.rms_norm(h[:, m], (H,), w_hidden[m], eps), F.rms_norm(keys[:, m], (H,), w_key[m], eps)
        product = (query * key).sum(-1) / math.sqrt(H)
        root = product.abs().clamp_min(1e-6).sqrt()
        score = torch.sigmoid(torch.copysign(root, product) if at_zero == "copysign" else root * product.sign())
        out.append(score[:, None] * value)
    return torch.stack(out, 1) + (h if residual else 0)


def convolved(x, weight, norm, dilation, eps):
    """x plus SiLU of the depthwise causal convolution of its norm, in float64; weight [M*H, 1, W], norm [M, H]."""
    line = torch.stack([F.rms_norm(x[:, m], (H,), norm[m], eps) for m in range(M)], 1).flatten(1).T
    line = F.conv1d(F.pad(line, ((weight.shape[-1] - 1) * dilation, 0)), weight, dilation=dilation, groups=M * H)
    return x + F.silu(line.T.view_as(x))


def by_blocks(values, scale, size):
    """fp8 values times a scale per block of size x size, the last ones partial."""
    out = values.double()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            out[i * size:(i + 1) * size, j * size:(j + 1) * size] *= scale[i, j].double()
    return out


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def v41(rows="fp8", scale_name="scale", scale_dtype=torch.float8_e8m0fnu):
    """DeepSeek-V4.1: a layer per shard. rows="int8": the int8 edition, whose scales are in a file of their own."""
    heads, order, dim, layers = 2, 4, 32, (1, 3)
    columns = heads * (order - 1)
    primes = primes_from((40,) * (order - 1), heads, len(layers))
    config = {"model_type": "deepseek_v41", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
              "text_config": {"vocab_size": WORDS, "hidden_size": H, "hc_mult": M, "rms_norm_eps": 1e-20, "engram_head_dim": dim,
                              "engram_layer_ids": list(layers), "engram_num_embeddings": [sum(p) for p in primes],
                              "engram_max_ngram_size": order, "engram_vocab_size": 40, "engram_n_heads": heads,
                              "engram_pad_token_id": 2, "engram_compressed_vocab_size": NUM_CLASSES}}
    files = {}
    for n, layer in enumerate(layers):
        name, count = f"layers.{layer}.engram.", sum(primes[n])
        file = files.setdefault(f"model-{47 + n:05}-of-00048.safetensors", {})
        if rows == "fp8":
            file[name + "embed.weight"] = randn(count, dim, seed=layer).to(torch.float8_e4m3fn)
            file[name + "embed.scale"] = torch.full((count, dim // 32), 2.0**-3).to(torch.float8_e8m0fnu)
        else:
            file[name + "embed.weight"] = torch.randint(-127, 128, (count, dim), generator=torch.Generator().manual_seed(layer),
                                                        dtype=torch.int8)
            scales = files.setdefault("model-scales.safetensors", {})
            scales[name + "embed.scale"] = 0.01 + 0.01 * randn(count, 1, seed=layer).abs()
        file[name + "wkv.weight"] = randn((M + 1) * H, columns * dim, seed=10 + layer).to(torch.float8_e4m3fn)
        exponents = torch.arange(4).view(2, 2) - 5  # 144 x 192 elements in blocks of 128: the last ones are partial
        scale = (2.0**exponents).to(torch.float8_e8m0fnu)
        file[f"{name}wkv.{scale_name}"] = scale.view(torch.uint8) if scale_dtype == torch.uint8 else scale.to(scale_dtype)
        file[name + "q_weight"] = (1 + 0.2 * randn(M, H, seed=20 + layer)).bfloat16()
        file[name + "k_weight"] = (1 + 0.2 * randn(M, H, seed=30 + layer)).bfloat16()
    files["model-00001-of-00048.safetensors"] = {"embed.weight": torch.zeros(3, H)}
    mini = Miniature(config, files, layers, None)

    def expected(layer, ids, hidden):
        x, name = mini.tensors, f"layers.{layer}.engram."
        own = primes[layers.index(layer)]
        at = xor_rows([classes(i) for i in ids], pcg_multipliers(layer, order, NUM_CLASSES), own, heads, 2)
        scale = x[name + "embed.scale"].float().repeat_interleave(32, 1)
        e = (x[name + "embed.weight"].double() * scale.double())[at].flatten(1)
        stored = x[f"{name}wkv.{scale_name}"]
        stored = stored.view(torch.float8_e8m0fnu) if stored.dtype == torch.uint8 else stored
        weight = by_blocks(x[name + "wkv.weight"], stored, 128)
        projected = (e @ weight.T).view(-1, M + 1, H)
        return gated(hidden.double(), projected[:, :M], projected[:, M], x[name + "q_weight"].double(),
                     x[name + "k_weight"].double(), 1e-20, "copysign", True)

    mini.expected = expected
    return mini


def qwen(edition="bf16", parts=12):
    """Qwen's PLE: the table in many parts, which text order would mix up; the scale of a whole table in another file."""
    heads, order, dim, eos = 2, 3, 32, 60
    primes = primes_from((50,) * (order - 1), heads, 1)[0]
    padded = -(-sum(primes) // parts) * parts
    config = {"model_type": "qwen4_exp", "text_config": {
        "vocab_size": WORDS, "hidden_size": H, "hc_count": M, "eos_token_id": eos, "ple_layer_ids": [2], "ngram_size": order,
        "ple_embed_dim": dim * heads * (order - 1), "ple_conv_kernel_size": 4, "heads_per_ngram": heads, "rms_norm_eps": 1e-6,
        "ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": parts, "split_ngram_parts": parts, "seed": 1234,
        "ple_embedding_dtype": {"bf16": None, "fp8": "float8_e4m3fn", "nvfp4": "nvfp4"}[edition]}}
    name, width = "model.language_model.layers.1.ple.", dim * heads * (order - 1)
    multipliers = splitmix_multipliers(0, order, WORDS, 1234)
    starts = [sum(primes[:i]) for i in range(len(primes))]
    values, ngrams, scales = randn(padded, dim, seed=1), name + "ple_embedding.ngram_embedding.", {}
    if edition == "fp8":
        scales[ngrams + "weight_scale"] = torch.tensor([0.0123], dtype=torch.bfloat16)
    stored = values.to(torch.float8_e4m3fn if edition == "fp8" else torch.bfloat16)
    if edition == "nvfp4":  # two elements per byte, the first in the low bits
        stored = torch.randint(256, (padded, dim // 2), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        scales[ngrams + "weight_scale_2"] = torch.tensor(0.0123)
    table = {f"{ngrams}shard_{i}.weight": part for i, part in enumerate(stored.chunk(parts))}
    if edition == "nvfp4":
        fine = (0.5 + randn(padded, dim // 16, seed=6).abs()).to(torch.float8_e4m3fn)
        table |= {f"{ngrams}shard_{i}.weight_scale": part for i, part in enumerate(fine.chunk(parts))}
    rest = {name + "key_proj.weight": 0.1 * randn(M * H, width, seed=2),
            name + "value_proj.weight": 0.1 * randn(H, width, seed=3), name + "conv1d.weight": 0.3 * randn(M * H, 1, 4, seed=4)}
    rest |= {f"{name}norm_{n}.weight": 0.2 * randn(M * H, seed=5 + i) for i, n in enumerate(("key", "query", "conv"))}
    constants = {name + "ple_embedding.layer_multipliers": torch.tensor(multipliers),
                 name + "ple_embedding.ngram_heads_vocab_sizes": torch.tensor(primes),
                 name + "ple_embedding.ngram_heads_offsets": torch.tensor(starts)}
    files = {"model-00001-of-00003.safetensors": {k: x.bfloat16() for k, x in rest.items()} | constants,
             "model-00002-of-00003.safetensors": dict(list(table.items())[::2]),
             "model-00003-of-00003.safetensors": dict(list(table.items())[1::2]) | {"model.norm.weight": torch.zeros(H)}}
    if scales:
        files["model-scales.safetensors"] = scales
    mini = Miniature(config, files, (1,), None)

    def expected(layer, ids, hidden):
        x = {k.removeprefix(name): v.double() for k, v in mini.tensors.items()}
        shard = "ple_embedding.ngram_embedding.shard_{}.weight"
        rows = torch.cat([x[shard.format(i)] for i in range(parts)])
        if edition == "nvfp4":
            halves = torch.stack([rows % 16, rows // 16], -1).flatten(1).long()
            fine = torch.cat([x[shard.format(i) + "_scale"] for i in range(parts)]).repeat_interleave(16, 1)
            magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
            rows = magnitudes[halves % 8] * (1 - 2 * (halves // 8)) * fine * x["ple_embedding.ngram_embedding.weight_scale_2"]
        rows = rows * x.get("ple_embedding.ngram_embedding.weight_scale", 1)
        e = rows[xor_rows(ids, multipliers, primes, heads, eos, eos)].flatten(1)
        norms = {n: 1 + x[f"norm_{n}.weight"].view(M, H) for n in ("key", "query", "conv")}
        out = gated(hidden.double(), (e @ x["key_proj.weight"].T).view(-1, M, H), e @ x["value_proj.weight"].T, norms["query"],
                    norms["key"], 1e-6, "sign", False)
        return convolved(out, x["conv1d.weight"], norms["conv"], order, 1e-6)

    mini.expected = expected
    return mini


def longcat():
    """LongCat-Flash-Lite: a table and a projection per column."""
    order, splits, ratio = 3, 3, 7
    columns = splits * (order - 1)
    dim, moduli = H // columns, [ratio * WORDS + 2 * i + 1 for i in range(columns)]
    config = {"vocab_size": WORDS, "hidden_size": H, "eos_token_id": 2, "ngram_vocab_size_ratio": ratio,
              "emb_neighbor_num": order, "emb_split_num": splits}
    name = "model.ngram_embeddings."
    tables = {f"{name}embedders.{i}.weight": randn(rows, dim, seed=i).bfloat16() for i, rows in enumerate(moduli)}
    rest = {f"{name}post_projs.{i}.weight": 0.3 * randn(H, dim, seed=20 + i) for i in range(columns)}
    rest |= {"model.embed_tokens.weight": randn(WORDS, H, seed=40), "model.layers.0.input_layernorm.weight": torch.ones(H)}
    mini = Miniature(config, {"model-00001-of-00002.safetensors": {k: x.bfloat16() for k, x in rest.items()},
                              "model-00002-of-00002.safetensors": tables}, (0,), None)

    def expected(layer, ids, hidden=None):
        x, out = {k: v.double() for k, v in mini.tensors.items()}, []
        for t, token in enumerate(ids):
            window, ended = [token], False
            for back in range(1, order):
                ended = ended or back > t or ids[t - back] == 2
                window.append(0 if ended else ids[t - back])
            total = x["model.embed_tokens.weight"][token].clone()
            for i, rows in enumerate(moduli):
                local = sum(w * WORDS**back for back, w in enumerate(window[:i // splits + 2])) % rows
                total += x[f"{name}post_projs.{i}.weight"] @ x[f"{name}embedders.{i}.weight"][local]
            out.append(total / (1 + columns))
        return torch.stack(out)

    mini.expected = expected
    return mini


def demo():
    """The Engram demo: the state dict of one module in one file, without an index."""
    heads, order, dim = 2, 3, 32
    primes = primes_from((50,) * (order - 1), heads, 1)[0]
    width = dim * heads * (order - 1)
    config = {"engram_vocab_size": [50, 50], "max_ngram_size": order, "n_embed_per_ngram": dim * heads, "n_head_per_ngram": heads,
              "layer_ids": [1], "pad_id": 2, "seed": 7, "kernel_size": 4, "hidden_size": H, "hc_mult": M, "vocab_size": WORDS}
    x = {"multi_head_embedding.embedding.weight": randn(sum(primes), dim, seed=1),
         "multi_head_embedding.offsets": torch.tensor([sum(primes[:i]) for i in range(len(primes))]),
         "value_proj.weight": 0.1 * randn(H, width, seed=2), "value_proj.bias": randn(H, seed=3),
         "short_conv.conv.weight": 0.3 * randn(M * H, 1, 4, seed=4)}
    for m in range(M):
        x |= {f"key_projs.{m}.weight": 0.1 * randn(H, width, seed=10 + m), f"key_projs.{m}.bias": randn(H, seed=20 + m)}
        x |= {f"{n}.{m}.weight": 1 + 0.2 * randn(H, seed=30 + 7 * m + i) for i, n in enumerate(("norm1", "norm2",
                                                                                               "short_conv.norms"))}
    mini = Miniature(config, {"model.safetensors": x}, (1,), None, has_index=False)

    def expected(layer, ids, hidden):
        x = {k: v.double() for k, v in mini.tensors.items()}
        at = xor_rows([classes(i) for i in ids], pcg_multipliers(1, order, NUM_CLASSES, 7), primes, heads, 2)
        e = x["multi_head_embedding.embedding.weight"][at].flatten(1)
        keys = torch.stack([e @ x[f"key_projs.{m}.weight"].T + x[f"key_projs.{m}.bias"] for m in range(M)], 1)
        norms = [torch.stack([x[f"{n}.{m}.weight"] for m in range(M)]) for n in ("norm2", "norm1", "short_conv.norms")]
        value = e @ x["value_proj.weight"].T + x["value_proj.bias"]
        out = gated(hidden.double(), keys, value, norms[0], norms[1], 2.0**-23, "sign", False)
        return convolved(out, x["short_conv.conv.weight"], norms[2], order, 1e-5)

    mini.expected = expected
    return mini


MINIATURES = {"v41_fp8": v41, "v41_int8": lambda: v41("int8"), "qwen_bf16": qwen, "qwen_fp8": lambda: qwen("fp8"),
              "qwen_nvfp4": lambda: qwen("nvfp4"),
              "longcat": longcat, "demo": demo}
