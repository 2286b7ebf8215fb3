"""Tables of many tensors and files, in the naming of the published checkpoints: equal to memory, or refused in words."""
import json
import os
import pickle
from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file

from engram_kernels import RowPrefetcher, RowTable, gather_rows
from engram_kernels.table.pack import pack_table
from engram_kernels.testing import random_rows

pytest_plugins = ("shared_worker",)
pytestmark = pytest.mark.usefixtures("compiled")
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


LAYOUTS = {f.__name__: f for f in (qwen, qwen_fp8, longcat, v41, v41_int8)}


@pytest.fixture(params=LAYOUTS)
def checkpoint(request, tmp_path):
    """A folder, the names of its table, and its rows in memory."""
    return LAYOUTS[request.param](tmp_path / "checkpoint")


def check(table, memory, seed=0):
    """Every row, by random ids with duplicates and in order."""
    assert (table.num_rows, table.row_dim, table.row_format) == (memory.num_rows, memory.row_dim, memory.row_format)
    ids = torch.randint(-1, memory.num_rows, (60, 7), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    for some in (ids, torch.arange(memory.num_rows), torch.tensor([memory.num_rows - 1, 0])):
        torch.testing.assert_close(gather_rows(table, some), gather_rows(memory, some), rtol=0, atol=0)
    for got, want in zip(table.read_rows(torch.arange(memory.num_rows)), memory.read_rows(torch.arange(memory.num_rows)),
                         strict=True):
        assert got is want is None or torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("io, cache_bytes", [("auto", 0), ("io_uring", 5000), ("preadv", 0), ("preadv_buffered", 1 << 20)])
def test_checkpoint_table_equals_memory(io, cache_bytes, checkpoint):
    folder, names, memory = checkpoint
    sources = [folder] + [folder / name for name in os.listdir(folder) if name.endswith(".json")]
    for source in sources:
        table = RowTable.open(str(source), *names, io=io, cache_bytes=cache_bytes)
        assert table.path == source and table.tier == "file"
        for seed in range(2):
            check(table, memory, seed)
        assert table.io_stats()["rows"] == table.io_stats()["cache_hits"] + table.io_stats()["file_rows"] > memory.num_rows


def test_checkpoint_table_in_every_tier(checkpoint, tmp_path, shm):
    folder, names, memory = checkpoint
    table = RowTable.open(folder, *names)
    assert table.fingerprint() == memory.fingerprint()
    shared = table.share("checkpoint", directory=shm)
    check(shared, memory)
    assert RowTable.attach("checkpoint", like=table, directory=shm).fingerprint() == memory.fingerprint()
    again = pickle.loads(pickle.dumps(table))
    check(again, memory)
    assert deepcopy(table) is table
    rows, scales = table.read_rows(torch.arange(table.num_rows))
    check(RowTable.from_tensor(rows, scales, table.row_format, copy=True), memory)
    ids = torch.randint(-1, memory.num_rows, (9, 5), generator=torch.Generator().manual_seed(1))
    staged, local_ids = table.stage(ids)
    torch.testing.assert_close(gather_rows(staged, local_ids), gather_rows(memory, ids), rtol=0, atol=0)
    with RowPrefetcher(table) as prefetcher:
        for _ in range(3):
            torch.testing.assert_close(prefetcher.wait(prefetcher.submit(ids)), gather_rows(memory, ids), rtol=0, atol=0)
    if table.row_format == "fp8_e4m3_block32":
        result = pack_table(folder, tmp_path / "packed", *names, chunk_rows=64)
        assert result.num_rows == memory.num_rows
        torch.testing.assert_close(gather_rows(RowTable.open(tmp_path / "packed"), ids), gather_rows(memory, ids), rtol=0, atol=0)


def test_checkpoint_table_by_a_list_of_names(tmp_path):
    """The order of the list is that of the rows."""
    folder, _, memory = longcat(tmp_path / "c")
    names = [LONGCAT.format(i) for i in (3, 0, 11)]
    heights = [21 + 2 * i for i in range(12)]
    begins = [sum(heights[:i]) for i in range(12)]
    rows = torch.cat([memory.rows[begins[i]:begins[i] + heights[i]] for i in (3, 0, 11)])
    check(RowTable.open(folder, names), RowTable.from_tensor(rows))
    check(RowTable.open(folder, tuple(names[:1])), RowTable.from_tensor(rows[:27]))


def test_checkpoint_table_in_one_file(tmp_path):
    rows, scales = stored("fp8_e4m3_block32", 110, 64)
    parts = {f"w.{n}": x.clone() for n, x in enumerate(rows.split(10))} | {f"s.{n}": x.clone() for n, x in
                                                                             enumerate(scales.split(10))}
    save_file(parts, tmp_path / "t.safetensors")
    memory = RowTable.from_tensor(rows, scales, "fp8_e4m3_block32")
    before = len(os.listdir("/proc/self/fd"))
    table = RowTable.open(tmp_path / "t.safetensors", "w.{}", "s.{}", row_format="fp8_e4m3_block32", io="preadv_buffered")
    assert len(os.listdir("/proc/self/fd")) == before + 1  # one descriptor for all parts
    check(table, memory)


@pytest.mark.parametrize("row_format", ["fp8_e4m3_block32", "fp8_e4m3_tensor"])
def test_checkpoint_table_of_ranks(row_format, tmp_path):
    """What convert.py writes: the rows rounded up to whole ranks and divided evenly, the same names in each file; a scale that is
    not divided stands in every file."""
    rows, scales = stored(row_format, 45, 64)
    padded = torch.cat([rows, rows.new_zeros(3, 64)])
    per_row = row_format == "fp8_e4m3_block32"
    padded_scales = torch.cat([scales, scales.new_zeros(3, 2)]) if per_row else scales
    for rank in range(4):
        own = slice(rank * 12, rank * 12 + 12)
        save_file({V41: padded[own].clone(), V41_SCALE: padded_scales[own].clone() if per_row else scales,
                   "layers.1.engram.wkv.weight": torch.randn(2)}, tmp_path / f"model{rank}-mp4.safetensors")
    memory = RowTable.from_tensor(padded, padded_scales, row_format)
    files = [tmp_path / f"model{rank}-mp4.safetensors" for rank in range(4)]
    for source in (files, tmp_path / "model{}-mp4.safetensors"):
        table = RowTable.open(source, V41, V41_SCALE, row_format=row_format)
        check(table, memory)
        check(pickle.loads(pickle.dumps(table)), memory)
    with pytest.raises(ValueError, match=r"4 files of \S+ have a tensor 'layers.1.engram.embed.weight': model0-mp4.safetensors"):
        RowTable.open(tmp_path, V41, V41_SCALE, row_format=row_format)
    os.unlink(files[3])
    with pytest.raises(ValueError, match=r"there are 3 files \S+model\{\}-mp4.safetensors, expected 4 as their name says"):
        RowTable.open(tmp_path / "model{}-mp4.safetensors", V41, V41_SCALE, row_format=row_format)
    save_file({"other": rows}, files[3])
    with pytest.raises(ValueError, match="is missing in model3-mp4.safetensors, but 3 other files have it"):
        RowTable.open(files, V41, V41_SCALE, row_format=row_format)
    os.unlink(files[1])
    with pytest.raises(ValueError, match=r"is called 'model\{\}-mp4.safetensors' with 1 for \{\}: there are 3, the last is 3"):
        RowTable.open(tmp_path / "model{}-mp4.safetensors", V41, V41_SCALE, row_format=row_format)
