"""RowTable: every format in memory and in a file, checkpoint shards, staging, reading while things go wrong."""
import errno
import os
import threading
import time

import pytest
import torch
from format_cases import table_options
from safetensors.torch import load_file, save_file

from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.table import file_reader
from engram_kernels.table.row_table import ROW_FORMATS, RowTable
from engram_kernels.testing import random_rows

R, D = 300, 64


def stored(row_format, seed=0):
    return random_rows(row_format, R, D, torch.Generator().manual_seed(seed))


def in_pieces(rows, scales, row_format, size=77):
    yield (rows[:0], None if scales is None or row_format == "fp8_e4m3_tensor" else scales[:0])
    for begin in range(0, R, size):
        part = None if scales is None or row_format == "fp8_e4m3_tensor" else scales[begin:begin + size]
        yield (rows[begin:begin + size], part)


def create(path, row_format="bf16", seed=0, **options):
    rows, scales = stored(row_format, seed)
    return RowTable.create(path, rows, scales, row_format, row_dim=D, **table_options(row_format), **options)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


IDS = torch.tensor([[5, 0, -1], [R - 1, 5, 6], [7, 8, 0]], dtype=torch.int32)


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_row_table_file_equals_memory(row_format, tmp_path):
    rows, scales = stored(row_format)
    scale = table_options(row_format)
    memory = RowTable.from_tensor(rows, scales, row_format, row_dim=D, **scale)
    whole = RowTable.create(tmp_path / "whole.safetensors", rows, scales, row_format, row_dim=D, zero_scale_is_zero=True, **scale)
    pieces = RowTable.create(tmp_path / "pieces.safetensors", in_pieces(rows, scales, row_format), row_format=row_format,
                             scales=scales if row_format == "fp8_e4m3_tensor" else None, num_rows=R, row_dim=D,
                             zero_scale_is_zero=True, **scale)
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "pieces.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["pieces.safetensors", "whole.safetensors"]
    again = RowTable.open(str(tmp_path / "whole.safetensors"))
    for table in (whole, pieces, again):
        assert (table.tier, table.num_rows, table.row_dim, table.row_format) == ("file", R, D, row_format)
        assert table.row_bytes == memory.row_bytes and table.zero_scale_is_zero and table.device.type == "cpu"
        assert same(gather_rows(table, IDS), gather_rows(memory, IDS))
        got_rows, got_scales = table.read_rows(torch.arange(R))
        assert same(got_rows, rows) and (scales is None or same(got_scales, scales))


def test_row_table_file_is_safetensors(tmp_path):
    rows, scales = stored("int8_group32")
    RowTable.create(tmp_path / "t", rows, scales, "int8_group32")
    loaded = load_file(tmp_path / "t")
    assert set(loaded) == {"rows", "scales"} and same(loaded["rows"], rows) and same(loaded["scales"], scales)


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_row_table_from_tensor_shares_or_copies(row_format):
    rows, scales = stored(row_format)
    table = RowTable.from_tensor(rows, scales, row_format, row_dim=D, **table_options(row_format))
    assert table.rows.data_ptr() == rows.data_ptr() and table.tier == "host" and table.path is None
    copied = RowTable.from_tensor(rows, scales, row_format, row_dim=D, copy=True, **table_options(row_format))
    assert copied.rows.data_ptr() != rows.data_ptr() and copied.rows.data_ptr() % (2 << 20) == 0
    assert same(copied.rows, rows) and (scales is None or same(copied.scales, scales))
    assert table.stage(IDS)[0] is table and table.stage(IDS)[1] is IDS


def test_row_table_row_bytes():
    assert {name: ROW_FORMATS[name].row_bytes(256) for name in ROW_FORMATS} == {
        "f32": 1024, "bf16": 512, "f16": 512, "fp8_e4m3_block32": 264, "fp8_e4m3_block32_packed": 264, "fp8_e4m3_tensor": 256,
        "int8_group32": 288, "fp8_e4m3_row": 260, "nvfp4": 144, "mxfp4": 136}
    assert ROW_FORMATS["nvfp4"].row_bytes(160) == 90


def test_row_table_takes_torch_fp8(tmp_path):
    rows, scales = stored("fp8_e4m3_block32")
    fp8, e8m0 = rows.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)
    want = gather_rows(RowTable.from_tensor(rows, scales, "fp8_e4m3_block32"), IDS)
    assert same(gather_rows(RowTable.from_tensor(fp8, e8m0, "fp8_e4m3_block32"), IDS), want)
    table = RowTable.create(tmp_path / "t", [(fp8, e8m0)], num_rows=R, row_dim=D, row_format="fp8_e4m3_block32")
    assert same(gather_rows(table, IDS), want)


SHARDS = {  # dtypes as a checkpoint has them -> format found
    "fp8_block": ("fp8_e4m3_block32", torch.float8_e4m3fn, torch.float8_e8m0fnu),
    "fp8_block_uint8_scales": ("fp8_e4m3_block32", torch.float8_e4m3fn, torch.uint8),
    "fp8_tensor": ("fp8_e4m3_tensor", torch.float8_e4m3fn, torch.float32),
    "int8": ("int8_group32", torch.int8, torch.float32),
    "bf16": ("bf16", torch.bfloat16, None),
    "f16": ("f16", torch.float16, None),
    "f32": ("f32", torch.float32, None),
}


@pytest.mark.parametrize("row_format, dtype, scale_dtype", SHARDS.values(), ids=SHARDS.keys())
def test_row_table_opens_a_checkpoint_shard(row_format, dtype, scale_dtype, tmp_path):
    """Between other tensors, by name; the format follows from the dtypes."""
    rows, scales = stored(row_format)
    name, scale_name = "layers.1.engram.embed.weight", "layers.1.engram.embed.scale"
    shard = {"a.first": torch.randn(3, 5), name: rows.view(dtype), "layers.1.engram.wkv.weight": torch.randn(7).bfloat16()}
    if scale_dtype is not None:
        shard[scale_name] = scales.view(scale_dtype)
    save_file(shard, tmp_path / "shard.safetensors")
    table = RowTable.open(tmp_path / "shard.safetensors", name, scale_name if scale_dtype else None)
    assert table.row_format == row_format and table.row_dim == D and table.num_rows == R
    assert same(gather_rows(table, IDS), gather_rows(RowTable.from_tensor(rows, scales, row_format), IDS))


def test_row_table_opens_a_packed_shard(tmp_path):
    rows, _ = stored("fp8_e4m3_block32_packed")
    padded = torch.cat([rows, torch.full((R, 14), 255, dtype=torch.uint8)], 1)
    save_file({"w": padded}, tmp_path / "shard")
    table = RowTable.open(tmp_path / "shard", "w", row_format="fp8_e4m3_block32_packed", row_dim=D)
    memory = RowTable.from_tensor(rows, row_format="fp8_e4m3_block32_packed", row_dim=D)
    assert same(gather_rows(table, IDS), gather_rows(memory, IDS))


def test_row_table_open_reads_no_data(tmp_path):
    """A table of 1 TiB that is all hole opens at once."""
    num_rows = (1 << 40) // 128
    header = f'{{"rows":{{"dtype":"BF16","shape":[{num_rows},64],"data_offsets":[0,{1 << 40}]}}}}'.encode()
    with (tmp_path / "t").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 40))
    table = RowTable.open(tmp_path / "t")
    assert table.num_rows == num_rows
    assert (gather_rows(table, torch.tensor([num_rows - 1, 0, -1])) == 0).all()
    with pytest.raises(IndexError, match=rf"row_ids\[0\] is {num_rows}"):
        gather_rows(table, torch.tensor([num_rows]))


def test_row_table_of_no_rows(tmp_path):
    table = RowTable.create(tmp_path / "t", [], num_rows=0, row_dim=64, row_format="fp8_e4m3_block32")
    assert table.num_rows == 0 and (gather_rows(table, torch.tensor([-1, -1])) == 0).all()
    assert gather_rows(table, torch.empty(0, 3, dtype=torch.int32)).shape == (0, 3, 64)
    with pytest.raises(IndexError, match="is 0"):
        gather_rows(table, torch.tensor([0]))


def test_row_table_stage_reads_each_row_once(tmp_path):
    table = create(tmp_path / "t", "int8_group32")
    staged, local_ids = table.stage(IDS)
    assert staged.tier == "host" and staged.num_rows == len(set(IDS.flatten().tolist()) - {-1})
    assert local_ids.dtype == IDS.dtype and local_ids.shape == IDS.shape and ((local_ids == -1) == (IDS == -1)).all()
    rows, scales = stored("int8_group32")
    present = IDS != -1
    assert same(staged.rows[local_ids[present].long()], rows[IDS[present].long()])
    assert same(staged.scales[local_ids[present].long()], scales[IDS[present].long()])
    staged, local_ids = table.stage(torch.full((2, 2), -1))
    assert staged.num_rows == 0 and (local_ids == -1).all()


@pytest.mark.parametrize("tier", ["memory", "file"])
def test_row_table_read_rows_into_outputs(tier, tmp_path):
    rows, scales = stored("fp8_e4m3_block32")
    table = create(tmp_path / "t", "fp8_e4m3_block32")
    if tier == "memory":
        table = RowTable.from_tensor(rows, scales, "fp8_e4m3_block32")
    for ids in (torch.tensor([3, 4, 5, 9]), torch.tensor([[9, 3], [3, 299]], dtype=torch.int32), torch.empty(0).long()):
        out_rows = torch.empty(ids.numel(), D, dtype=torch.uint8)
        out_scales = torch.empty(ids.numel(), D // 32, dtype=torch.uint8)
        got = table.read_rows(ids, out_rows, out_scales)
        assert got[0] is out_rows and got[1] is out_scales
        assert same(out_rows, rows[ids.flatten().long()]) and same(out_scales, scales[ids.flatten().long()])
    with pytest.raises(IndexError, match=r"read_rows: row_ids\[1\] is -1, expected \[0, 300\)"):
        table.read_rows(torch.tensor([0, -1]))
    both, ids = torch.zeros(2 * 66, dtype=torch.uint8), torch.tensor([3, 1])
    with pytest.raises(ValueError, match="RowTable.read_rows: out_scales shares memory with out_rows"):  # both were written
        table.read_rows(ids, both[:128].view(2, 64), both[126:130].view(2, 2))
    with pytest.raises(ValueError, match="RowTable.read_rows: out_rows shares memory with row_ids"):
        over = torch.zeros(16, dtype=torch.int64)
        table.read_rows(over[:2], out_rows=over.view(torch.uint8).view(2, 64))
    with pytest.raises(ValueError, match=r"out_rows must have shape \[1, 64\], got \[2, 64\]"):
        table.read_rows(torch.tensor([0]), torch.empty(2, D, dtype=torch.uint8))
    with pytest.raises(ValueError, match="out_scales must be torch.uint8, got torch.float32"):
        table.read_rows(torch.tensor([0]), None, torch.empty(1, 2))
    with pytest.raises(ValueError, match="no scales per row, but out_scales was given"):
        RowTable.from_tensor(torch.zeros(3, 4), row_format="f32").read_rows(torch.tensor([0]), None, torch.empty(1, 2))


def test_row_table_large_requests_from_many_threads(tmp_path):
    """Requests of several reader threads each, from several callers at once."""
    table = create(tmp_path / "t", "f32")
    rows, _ = stored("f32")
    failures = []

    def run(seed):
        ids = torch.randint(0, R, (4000,), generator=torch.Generator().manual_seed(seed))
        if not same(table.read_rows(ids)[0], rows[ids]) or not same(gather_rows(table, ids, torch.float32), rows[ids]):
            failures.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_row_table_keeps_reading_the_file_that_it_opened(tmp_path):
    """Replaced by rename, or deleted: the open table is the old one, whole."""
    table, path = create(tmp_path / "t"), tmp_path / "t"
    want = gather_rows(table, IDS)
    replaced = create(path, seed=1)
    assert same(gather_rows(table, IDS), want) and not same(gather_rows(replaced, IDS), want)
    path.unlink()
    assert same(gather_rows(table, IDS), want)


def test_row_table_file_cut_short_while_open(tmp_path):
    table = create(tmp_path / "t")
    size = (tmp_path / "t").stat().st_size
    os.truncate(tmp_path / "t", size - 100)
    out = torch.full((1, D), -7.0, dtype=torch.bfloat16)
    with pytest.raises(OSError, match=rf"t: row 299 ends at byte {size}, but the file has {size - 100} bytes; it had {size}"):
        gather_rows(table, torch.tensor([R - 1]), out=out)
    assert (out == -7).all()
    with pytest.raises(OSError, match=rf"t: the file has {size - 100} bytes; it had {size} when it was opened"):
        gather_rows(table, torch.tensor([0]))  # this row is still there, the file is not what was opened
    os.truncate(tmp_path / "t", 0)
    with pytest.raises(OSError, match="but the file has 0 bytes") as caught:
        gather_rows(table, torch.arange(R))
    assert caught.value.errno == errno.EIO


def test_row_table_file_written_to_while_open(tmp_path):
    table = create(tmp_path / "t")
    with (tmp_path / "t").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    info = (tmp_path / "t").stat()
    os.utime(tmp_path / "t", ns=(info.st_atime_ns, info.st_mtime_ns + 1))  # the clock of the file system may tick slowly
    with pytest.raises(OSError, match="t: the file was written to after it was opened"):
        gather_rows(table, torch.tensor([0]))


def test_row_table_file_touched_while_open(tmp_path):
    """`touch` cannot be told from a write of as many bytes: an error that says so, and what to do; that then works."""
    table, path = create(tmp_path / "t"), tmp_path / "t"
    wanted = table.read_rows(torch.arange(R))[0]
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    with pytest.raises(OSError, match=r"t: the file was written to .*, or touched .*; row 7 .* open the table again") as caught:
        table.read_rows(torch.tensor([7]))
    assert caught.value.errno == errno.EIO
    assert torch.equal(RowTable.open(path).read_rows(torch.arange(R))[0], wanted)


def test_row_table_file_written_to_within_the_tick_of_its_opening(tmp_path):
    """A kernel that stamps writes with the last clock tick: the stamp of a write right after opening is not that of before."""
    path, coarse = tmp_path / "t", 5  # CLOCK_REALTIME_COARSE
    create(path)
    for _ in range(20):
        stamp = time.clock_gettime_ns(coarse)
        os.utime(path, ns=(stamp, stamp))
        table = RowTable.open(path)
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\0")
        stamp = time.clock_gettime_ns(coarse)
        os.utime(path, ns=(stamp, stamp))
        with pytest.raises(OSError, match="the file was written to after it was opened"):
            gather_rows(table, torch.tensor([0]))
    future = time.time_ns() + 3600 * 10**9
    os.utime(path, ns=(future, future))
    RowTable.open(path).read_rows(torch.tensor([0]))  # nothing to wait for


def test_file_readers_check_their_arguments(tmp_path):
    (tmp_path / "f").write_bytes(bytes(range(100)))
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        handle = file_reader.make_reader(fd, "f")
    finally:
        os.close(fd)
    ids = torch.tensor([3, 0]).numpy()
    out = torch.zeros(8, dtype=torch.uint8)
    handle.read_rows(10, 5, 4, 18, ids, out.numpy())
    assert out.tolist() == [25, 26, 27, 28, 10, 11, 12, 13]
    for offset, stride, row, count in ((10, 5, 4, 19), (-1, 5, 4, 3), (0, 3, 4, 3), (0, 2**62, 4, 5)):
        with pytest.raises(ValueError, match="FileReader: "):
            handle.read_rows(offset, stride, row, count, ids, out.numpy())
    with pytest.raises(ValueError, match="out has 7 bytes, expected 8"):
        handle.read_rows(10, 5, 4, 18, ids, out[:7].numpy())
    with pytest.raises(IndexError, match=r"row_ids\[0\] is 3, expected \[0, 3\)"):
        handle.read_rows(10, 5, 4, 3, ids, out.numpy())
