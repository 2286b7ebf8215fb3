"""Miniatures of the published checkpoints' tables: their names, layouts and dtypes, and the same rows in memory."""
import json

import torch
from safetensors.torch import load_file, save_file

from engram_kernels import RowTable, gather_rows
from engram_kernels.testing import random_rows

QWEN = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding.shard_{}.weight"
QWEN_SCALE = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding.weight_scale"
LONGCAT = "model.ngram_embeddings.embedders.{}.weight"
V41, V41_SCALE = "layers.1.engram.embed.weight", "layers.1.engram.embed.scale"


def stored(row_format, num_rows, row_dim, seed=0):
    return random_rows(row_format, num_rows, row_dim, torch.Generator().manual_seed(seed))


def write(folder, files, index=True):
    """A checkpoint of these tensors by file, each file with another tensor first; its index in the order of the text."""
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for number, (file, tensors) in enumerate(files.items()):
        save_file({f"a.{number}": torch.randn(number + 1), **tensors}, folder / file)
        weight_map.update({name: file for name in tensors})
    if index:
        text = {"metadata": {"total_size": 1}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(text))
    return folder


def qwen(folder, num_parts=128, height=5, width=160, **options):
    rows, _ = stored("bf16", num_parts * height, width)
    files = {}
    for n in range(num_parts):  # neighbours in other files, and in another order than their numbers
        part = rows[n * height:n * height + height].clone()
        files.setdefault(f"model-0000{n * 7 % 5 + 1}-of-00005.safetensors", {})[QWEN.format(n)] = part
    return write(folder, files, **options), (QWEN,), RowTable.from_tensor(rows)


def qwen_fp8(folder):
    rows, _ = stored("fp8_e4m3_tensor", 60, 160)
    scale = torch.tensor([0.0123]).bfloat16()
    files = {f"model-{n % 2}.safetensors": {} for n in range(2)}
    for n in range(12):
        files[f"model-{n % 2}.safetensors"][QWEN.format(n)] = rows[n * 5:n * 5 + 5].clone().view(torch.float8_e4m3fn)
    files["model-9.safetensors"] = {QWEN_SCALE: scale}
    return write(folder, files), (QWEN, QWEN_SCALE), RowTable.from_tensor(rows, scale.float(), "fp8_e4m3_tensor")


def longcat(folder):
    heights = [21 + 2 * i for i in range(12)]
    rows, _ = stored("bf16", sum(heights), 256)
    parts = dict(zip([LONGCAT.format(i) for i in range(12)], [x.clone() for x in rows.split(heights)], strict=True))
    names = list(parts)
    files = {"a.safetensors": {n: parts[n] for n in names[6:]}, "b.safetensors": {n: parts[n] for n in names[:6]}}
    return write(folder, files, index=False), (LONGCAT,), RowTable.from_tensor(rows)


def v41(folder):
    rows, scales = stored("fp8_e4m3_block32", 301, 64)
    shard = {V41: rows.view(torch.float8_e4m3fn), V41_SCALE: scales.view(torch.float8_e8m0fnu)}
    other = {"layers.14.engram.embed.weight": rows.view(torch.float8_e4m3fn)}
    files = {"model-00047-of-00048.safetensors": shard, "model-00048-of-00048.safetensors": other}
    return write(folder, files), (V41, V41_SCALE), RowTable.from_tensor(rows, scales, "fp8_e4m3_block32")


def v41_int8(folder):
    """Scales in another file, in other parts than the rows."""
    rows, scales = stored("int8_group32", 301, 256)
    files = {"model-00047.safetensors": {V41: rows}, "s.safetensors": {f"{V41_SCALE}.1": scales[200:].clone()},
             "t.safetensors": {f"{V41_SCALE}.0": scales[:200].clone()}}
    return write(folder, files), (V41, V41_SCALE + ".{}"), RowTable.from_tensor(rows, scales, "int8_group32")


def row_scales(folder, dtype=torch.bfloat16, flat=False):
    """fp8 rows in parts, each with a half-precision scale per row, in other files and other parts."""
    rows, scales = stored("fp8_e4m3_row", 60, 160)
    scales = (scales * 0.37).to(dtype)
    parts = [part.clone().view(torch.float8_e4m3fn) for part in rows.split(5)]
    files = {f"model-{n}.safetensors": {QWEN.format(n): part} for n, part in enumerate(parts)}
    shaped = scales.flatten() if flat else scales
    files |= {"s.safetensors": {f"{QWEN_SCALE}.1": shaped[7:].clone()}, "t.safetensors": {f"{QWEN_SCALE}.0": shaped[:7].clone()}}
    return write(folder, files), (QWEN, QWEN_SCALE + ".{}"), RowTable.from_tensor(rows, scales.float(), "fp8_e4m3_row")


def row_scales_f16(folder):
    return row_scales(folder, torch.float16, flat=True)


def check(table, memory, seed=0):
    """Every row, by random ids with duplicates and in order."""
    assert (table.num_rows, table.row_dim, table.row_format) == (memory.num_rows, memory.row_dim, memory.row_format)
    ids = torch.randint(-1, memory.num_rows, (60, 7), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    for some in (ids, torch.arange(memory.num_rows), torch.tensor([memory.num_rows - 1, 0])):
        torch.testing.assert_close(gather_rows(table, some), gather_rows(memory, some), rtol=0, atol=0)
    for got, want in zip(table.read_rows(torch.arange(memory.num_rows)), memory.read_rows(torch.arange(memory.num_rows)),
                         strict=True):
        assert got is want is None or torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    text = json.loads(path.read_text())
    change(text["weight_map"])
    path.write_text(json.dumps(text))


def replace(folder, part, tensor):
    """Writes the file of a part again with another tensor for it; None: without it."""
    name = QWEN.format(part)
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(folder / file)
    tensors.pop(name)
    save_file(tensors if tensor is None else {name: tensor, **tensors}, folder / file)
