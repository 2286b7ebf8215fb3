"""Tables of many tensors and files, in the naming of the published checkpoints: equal to memory in every tier."""
import os
import pickle
import re
from copy import deepcopy

import numpy as np
import pytest
import torch
from checkpoint_cases import (
    LONGCAT,
    V41,
    V41_SCALE,
    check,
    longcat,
    qwen,
    qwen_fp8,
    row_scales,
    row_scales_f16,
    stored,
    v41,
    v41_int8,
)
from io_faults import inject_faults
from safetensors.torch import load_file, save_file

from engram_kernels import RowPrefetcher, RowTable, gather_rows
from engram_kernels.table.file_reader import make_files_reader
from engram_kernels.table.pack import pack_table

pytest_plugins = ("shared_worker",)
pytestmark = pytest.mark.usefixtures("compiled")
LAYOUTS = {f.__name__: f for f in (qwen, qwen_fp8, longcat, v41, v41_int8, row_scales, row_scales_f16)}


@pytest.fixture(params=LAYOUTS)
def checkpoint(request, tmp_path):
    """A folder, the names of its table, and its rows in memory."""
    return LAYOUTS[request.param](tmp_path / "checkpoint")


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


@pytest.mark.parametrize("scale", [torch.tensor(0.1), torch.tensor([0.1]).bfloat16(), torch.tensor([6e-8]).half(),
                                   torch.tensor(-0.0).bfloat16(), torch.tensor([float("inf")]).bfloat16()], ids=str)
def test_checkpoint_table_widens_one_scale_exactly(scale, tmp_path):
    rows, _ = stored("fp8_e4m3_tensor", 20, 64)
    save_file({"w": rows.view(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    save_file({"s": scale}, tmp_path / "b.safetensors")
    table = RowTable.open(tmp_path, "w", "s")
    assert table.row_format == "fp8_e4m3_tensor" and table.scales.dtype == torch.float32 and table.scales.shape == (1,)
    assert table.scales.view(torch.int32).item() == scale.reshape(1).float().view(torch.int32).item()
    save_file({"s": scale.double()}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="F64"):
        RowTable.open(tmp_path, "w", "s")


@pytest.mark.parametrize("io", ["io_uring", "preadv_buffered"])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("change", ["touched", "cut", "gone"])
def test_checkpoint_table_file_changes_while_open(change, cache_bytes, io, tmp_path, shm):
    """The rows of that file fail, cached ones too; those of the others are read on. Opened anew it is another state."""
    folder, names, memory = qwen(tmp_path / "c", num_parts=12, width=16)
    table = RowTable.open(folder, *names, io=io, cache_bytes=cache_bytes)
    check(table, memory)
    sent, path = pickle.dumps(table), folder / "model-00003-of-00005.safetensors"
    of_file = [int(name.split("_")[-1].split(".")[0]) for name in load_file(path) if "shard" in name]
    inside = torch.tensor([row for n in of_file for row in range(n * 5, n * 5 + 5)])
    outside = torch.tensor([row for row in range(60) if row not in inside])
    if change == "touched":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    elif change == "cut":
        os.truncate(path, path.stat().st_size - 1)
    else:
        os.unlink(path)
        check(table, memory)  # what was opened is read
        with pytest.raises(FileNotFoundError, match="model-00003-of-00005.safetensors"):
            pickle.loads(sent)
        return
    for ids in (inside, inside[-1:], torch.arange(60)):
        with pytest.raises(OSError, match=r"tier file: \S+model-00003-of-00005.safetensors: .*row (\d+)") as caught:
            table.read_rows(ids)
        assert int(re.search(r"row (\d+)", str(caught.value))[1]) in inside
    assert torch.equal(table.read_rows(outside)[0], memory.rows[outside])
    with pytest.raises(OSError, match="model-00003-of-00005.safetensors"):
        table.share("changes", directory=shm)


def test_checkpoint_table_of_another_state_is_another_table_to_share(tmp_path, shm):
    """A file that was written again: the fingerprint need not see it."""
    folder, names, _ = qwen(tmp_path / "c", num_parts=12, width=16)
    held = RowTable.open(folder, *names).share("state", directory=shm)
    again = RowTable.open(folder, *names)
    assert RowTable.attach("state", like=again, directory=shm).fingerprint() == held.fingerprint()
    path = folder / "model-00003-of-00005.safetensors"
    os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))  # older than the others
    with pytest.raises(FileExistsError, match="holds another table: the file is"):
        RowTable.open(folder, *names).share("state", directory=shm)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("io", ["io_uring", "preadv_buffered"])
def test_parts_of_any_shape_read_as_one_array(seed, io, tmp_path):
    """The reader itself, under short reads, reordering and delays: parts of any height at odd offsets of any files, rows that
    cross pages, scales in parts of their own."""
    rng = np.random.default_rng(seed)
    num_rows, num_files = 300, int(rng.integers(1, 6))
    arrays = [rng.integers(0, 256, (num_rows, int(rng.integers(1, width))), dtype=np.uint8) for width in (9000, 40)]
    content, extents = [bytes(rng.integers(0, 256, int(rng.integers(0, 5000)), dtype=np.uint8)) for _ in range(num_files)], []
    for array in arrays:
        cuts = np.sort(rng.integers(0, num_rows + 1, int(rng.integers(0, 12))))
        pieces = list(enumerate(np.split(array, cuts)))
        places = {}
        for number in rng.permutation(len(pieces)):  # in another order than the rows
            piece, file = pieces[number][1], int(rng.integers(0, num_files))
            places[number] = (file, len(content[file]), len(piece))
            content[file] += piece.tobytes() + bytes(int(rng.integers(0, 3)))
        parts = [places[number] for number in range(len(pieces))]
        extents.append((array.shape[1], array.shape[1], parts))
    fds = []
    for number, data in enumerate(content):
        (tmp_path / str(number)).write_bytes(data)
        fds.append(os.open(tmp_path / str(number), os.O_RDONLY))
    reader = make_files_reader([(fd, str(n)) for n, fd in enumerate(fds)], 7, io)
    for fd in fds:
        os.close(fd)
    inject_faults(reader, seed=seed, shorter=0.3, reorder=True, max_delay_us=50)
    for cache_bytes in (0, 100_000):
        tier = reader.tier(*extents, cache_bytes)
        for count in (1, 2, 50, num_rows):
            ids = rng.permutation(num_rows)[:count]
            rows, scales = (np.full((count, a.shape[1]), 0xA5, np.uint8) for a in arrays)
            tier.fetch(ids, rows, scales)
            assert np.array_equal(rows, arrays[0][ids]) and np.array_equal(scales, arrays[1][ids])


def test_parts_outside_their_files_are_refused(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100))
    fd = os.open(tmp_path / "a", os.O_RDONLY)
    reader = make_files_reader([(fd, "a"), (fd, "b")])
    os.close(fd)
    nothing = (0, 0, [])
    for parts, message in (([(0, 0, 5), (1, 90, 2)], "2 rows of 10 bytes from byte 90 are not inside b of 100 bytes"),
                           ([(2, 0, 5)], r"part 0 is in file 2, expected \[0, 2\)"), ([(-1, 0, 5)], r"part 0 is in file -1"),
                           ([(0, -1, 5)], "from byte -1"), ([(0, 0, -5)], "a part has -5 rows"),
                           ([(0, 0, 2**62), (0, 0, 2**62 - 1)], "rows of 10 bytes from byte 0 are not inside"),
                           ([(0, 0, 2**63 - 1), (0, 0, 1)], "a part has 1 rows")):
        with pytest.raises(ValueError, match=f"FileReader: .*{message}"):
            reader.tier((10, 10, parts), nothing, 0)
    with pytest.raises(ValueError, match="there are scales for 4 rows, expected 5"):
        reader.tier((10, 10, [(0, 0, 5)]), (1, 1, [(0, 0, 4)]), 0)
    with pytest.raises(ValueError, match="there are no files"):
        make_files_reader([])
    with pytest.raises(ValueError, match=r"file is 2, expected \[0, 2\)"):
        reader.read_range(0, np.zeros(1, np.uint8), 2)
