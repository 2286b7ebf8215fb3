"""RowTable: bad files, bad arguments, and failures while a file is written. Each is one clear error, nothing half-written."""
import errno
import json
import os
import socket

import pytest
import torch

from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.table.row_table import RowTable
from engram_kernels.table.safetensors_file import MAX_HEADER_BYTES


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="BF16", shape=(4, 8), begin=0, end=64):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


WHOLE = file_of({"rows": entry()}, bytes(64))
CORRUPT = {
    "empty": (b"", "it has 0 bytes, the header length alone takes 8"),
    "seven_bytes": (b"1234567", "it has 7 bytes"),
    "no_header": (file_of(b"", length=0), "is not valid"),
    "header_cut": (WHOLE[:30], r"its header should have \d+ bytes, the file has 22 after the length"),
    "data_cut": (WHOLE[:-1], r"its tensors end at byte \d+, the file has \d+ bytes \(truncated\)"),
    "data_gone": (WHOLE[:-64], r"\(truncated\)"),
    "trailing": (WHOLE + b"x", r"its tensors end at byte \d+, the file has \d+ bytes"),
    "length_huge": (file_of({}, length=2**64 - 1), "its header should have 18446744073709551615 bytes"),
    "not_json": (file_of(b"hello{"), "is not valid"),
    "not_utf8": (file_of(b'{"\xff":1}'), "is not valid"),
    "nested": (file_of(b"[" * 100_000), "is not valid"),
    "a_list": (file_of([1]), "its header is no JSON object"),
    "a_pickle": (b"\x80\x04\x95" + bytes(200), "its header should have"),
    "metadata": (file_of({"__metadata__": {"a": 1}}), "its __metadata__ is no map of strings"),
    "duplicate": (file_of(b'{"rows":{},"rows":{}}'), "names 'rows' twice"),
    "entry": (file_of({"rows": 3}), "tensor 'rows' is described by 3"),
    "no_shape": (file_of({"rows": {"dtype": "F32", "data_offsets": [0, 0]}}), "tensor 'rows' has shape None"),
    "negative_shape": (file_of({"rows": entry(shape=(-4, -8))}, bytes(64)), r"tensor 'rows' has shape \[-4, -8\]"),
    "float_offsets": (file_of({"rows": entry(begin=0.0)}, bytes(64)), r"has data_offsets \[0.0, 64\]"),
    "reversed": (file_of({"rows": entry(begin=64, end=0)}, bytes(64)), r"has data_offsets \[64, 0\]"),
    "dtype_number": (file_of({"rows": entry(dtype=16)}, bytes(64)), "has dtype 16"),
    "size": (file_of({"rows": entry(shape=(4, 9))}, bytes(64)), r"has 64 bytes, expected 72 for BF16 \[4, 9\]"),
    "size_overflow": (file_of({"rows": entry(shape=(2**40, 2**40))}, bytes(64)), "has 64 bytes, expected 2417851639"),
    "outside": (file_of({"rows": entry(begin=64, end=128)}, bytes(64)), "leave a hole"),
    "overlap": (file_of({"a": entry(), "rows": entry(begin=32, end=96)}, bytes(96)), r"begins at byte \d+, tensor 'a' ends at "
                r"\d+: they overlap"),
    "hole": (file_of({"a": entry(), "rows": entry(begin=65, end=129)}, bytes(129)), "they leave a hole"),
}


@pytest.mark.parametrize("content, message", CORRUPT.values(), ids=CORRUPT.keys())
def test_row_table_refuses_corrupt_files(content, message, tmp_path):
    path = tmp_path / "table.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"RowTable.open: \S*table.safetensors is no whole safetensors file: .*{message}"):
        RowTable.open(path)


def test_row_table_refuses_every_truncation(tmp_path):
    for size in range(len(WHOLE)):
        (tmp_path / "t").write_bytes(WHOLE[:size])
        with pytest.raises(ValueError, match="no whole safetensors file"):
            RowTable.open(tmp_path / "t")


def test_row_table_refuses_a_header_beyond_the_limit(tmp_path):
    with (tmp_path / "t").open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(ValueError, match=f"at most {MAX_HEADER_BYTES} are allowed"):
        RowTable.open(tmp_path / "t")


def tensors_file(path, **tensors):
    header, data = {}, b""
    for name, (dtype, shape, num_bytes) in tensors.items():
        header[name] = entry(dtype, shape, len(data), len(data) + num_bytes)
        data += bytes(num_bytes)
    path.write_bytes(file_of(header, data))
    return path


ROWS = ("F8_E4M3", (4, 64), 256)
MISMATCHED = {
    "no_such_tensor": ({"tensor": "w"}, "it has no tensor 'w'; it has rows, scales"),
    "no_such_scales": ({"scales": "s"}, "it has no tensor 's'"),
    "scales_needed": ({"tensor": "rows", "row_format": "fp8_e4m3_block32"}, r"needs scales \[4, 2\], name their tensor"),
    "format_needed": ({"tensor": "rows"}, "row_format is needed: rows of F8_E4M3 with no scales"),
    "format_unknown": ({"row_format": "fp4"}, "row_format is 'fp4', expected one of f32"),
    "format_of_other_dtype": ({"row_format": "bf16"}, "the rows are F8_E4M3, expected BF16"),
    "row_dim": ({"row_dim": 32}, "rows are 64 elements wide, expected 32"),
    "scales_rows": ({"file": {"rows": ROWS, "scales": ("F8_E8M0", (3, 2), 6)}}, r"the scales are F8_E8M0 \[3, 2\], expected "
                    r"F8_E8M0 or U8 \[4, 2\] for rows \[4, 64\]"),
    "scales_width": ({"file": {"rows": ROWS, "scales": ("U8", (4, 1), 4)}}, r"the scales are U8 \[4, 1\]"),
    "scales_dtype": ({"row_format": "fp8_e4m3_block32", "file": {"rows": ROWS, "scales": ("F32", (4, 2), 32)}},
                     "the scales are F32"),
    "scales_unwanted": ({"file": {"rows": ("F32", (4, 8), 128), "scales": ("U8", (4, 2), 8)}, "row_format": "f32"},
                        "has no scales"),
    "one_dim": ({"file": {"rows": ("BF16", (32,), 64)}}, r"the rows have shape \[32\], expected \[num_rows, width\]"),
    "odd_dim": ({"file": {"rows": ("F8_E4M3", (4, 63), 252), "scales": ("U8", (4, 1), 4)}},
                "row_dim is 63, expected a multiple of 32"),
    "no_columns": ({"file": {"rows": ("BF16", (4, 0), 0)}}, "row_dim is 0, expected an integer of at least 1"),
    "foreign_dtype": ({"file": {"rows": ("I64", (4, 8), 256)}}, "row_format is needed: rows of I64"),
    "packed_row_dim": ({"file": {"rows": ("U8", (4, 66), 264)}, "row_format": "fp8_e4m3_block32_packed"}, "row_dim is needed"),
}


@pytest.mark.parametrize("change, message", MISMATCHED.values(), ids=MISMATCHED.keys())
def test_row_table_open_rejects(change, message, tmp_path):
    content = {"rows": ROWS, "scales": ("F8_E8M0", (4, 2), 8)}
    path = tensors_file(tmp_path / "t", **change.get("file", content))
    with pytest.raises(ValueError, match=f"RowTable.open: .*{message}"):
        RowTable.open(path, **{k: v for k, v in change.items() if k != "file"})


@pytest.mark.parametrize("metadata, message", [({"row_dim": "x"}, "its metadata says row_dim 'x'"),
                                               ({"row_dim": "9" * 5000}, "RowTable.open"),
                                               ({"row_format": "fp4"}, "row_format is 'fp4'")])
def test_row_table_open_rejects_metadata(metadata, message, tmp_path):
    (tmp_path / "t").write_bytes(file_of({"__metadata__": metadata, "rows": entry()}, bytes(64)))
    with pytest.raises(ValueError, match=message):
        RowTable.open(tmp_path / "t")


def test_row_table_open_unreadable(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"RowTable.open: No such file.*missing"):
        RowTable.open(tmp_path / "missing")
    with pytest.raises(ValueError, match="is a directory without safetensors files; it has none"):
        RowTable.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is no regular file"):
        RowTable.open(tmp_path / "pipe")  # a pipe is refused, not waited for
    with socket.socket(socket.AF_UNIX) as unix:
        monkeypatch.chdir(tmp_path)
        unix.bind("socket")
        with pytest.raises(OSError, match=r"RowTable.open: .*socket"):
            RowTable.open(tmp_path / "socket")
    (tmp_path / "t").write_bytes(WHOLE)
    with pytest.raises(NotADirectoryError, match="RowTable.open: Not a directory"):
        RowTable.open(tmp_path / "t" / "x")
    before = set(os.listdir("/proc/self/fd"))
    for call, number in (("open", errno.EACCES), ("pread", errno.EIO)):  # the tests may run as root, whom no mode stops
        def fail(*args, number=number):
            raise OSError(number, os.strerror(number))
        monkeypatch.setattr(os, call, fail)
        with pytest.raises(PermissionError if number == errno.EACCES else OSError, match=r"RowTable.open: .*'\S*/t'"):
            RowTable.open(tmp_path / "t")
        monkeypatch.undo()
    assert set(os.listdir("/proc/self/fd")) <= before


OLD = torch.ones(3, 8)


@pytest.fixture(params=[False, True], ids=["fresh", "replacing"])
def target(request, tmp_path):
    """A path to create at, and a check that a failure left it as it was."""
    path = tmp_path / "t"
    if request.param:
        RowTable.create(path, OLD, row_format="f32")
    before = path.read_bytes() if request.param else None

    def check():
        assert os.listdir(tmp_path) == (["t"] if before else [])
        assert before is None or path.read_bytes() == before
    return path, check


@pytest.mark.parametrize("call, number, step", [("posix_fallocate", errno.ENOSPC, "bytes cannot be reserved: No space left"),
                                                ("posix_fallocate", errno.EFBIG, "bytes cannot be reserved: File too large"),
                                                ("pwrite", errno.ENOSPC, "cannot be written: No space left"),
                                                ("fsync", errno.EIO, "cannot be synced: Input/output error"),
                                                ("replace", errno.EXDEV, "cannot be put in place")])
def test_row_table_create_leaves_nothing_behind(call, number, step, target, monkeypatch):
    path, check = target

    def fail(*args):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=rf"RowTable.create: .*{step}.*'\S*/t'") as caught:
        RowTable.create(path, torch.zeros(5, 8), row_format="f32")
    assert caught.value.errno == number
    monkeypatch.undo()
    check()


def test_row_table_create_full_disk_after_some_rows(target, monkeypatch):
    path, check = target
    write, calls = os.pwrite, []

    def write_a_little(fd, data, at):
        calls.append(at)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[:7], at)  # short writes are gone on with
    monkeypatch.setattr(os, "pwrite", write_a_little)
    with pytest.raises(OSError, match="No space left"):
        RowTable.create(path, (torch.zeros(1, 8) for _ in range(5)), num_rows=5, row_dim=8, row_format="f32")
    monkeypatch.undo()
    check()


def test_row_table_create_whose_directory_cannot_be_synced(tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def fail_for_the_directory(fd):
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)
    monkeypatch.setattr(os, "fsync", fail_for_the_directory)
    with pytest.raises(OSError, match="is in place and whole, but its directory cannot be synced"):
        RowTable.create(tmp_path / "t", OLD, row_format="f32")
    assert os.listdir(tmp_path) == ["t"] and RowTable.open(tmp_path / "t").num_rows == 3


def test_row_table_create_goes_on_after_short_writes(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:1000], at))
    rows = torch.randn(100, 8)
    table = RowTable.create(tmp_path / "t", rows, row_format="f32")
    assert torch.equal(gather_rows(table, torch.arange(100), torch.float32), rows)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_row_table_create_on_a_full_device(tmp_path, monkeypatch):
    """The errors of a real full device: reserving is refused there by the kernel, and writing by ENOSPC."""
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *mode: opened("/dev/full", os.O_RDWR) if flags & os.O_CREAT
                        else opened(path, flags, *mode))
    with pytest.raises(OSError, match="RowTable.create: .* bytes cannot be reserved"):
        RowTable.create(tmp_path / "t", OLD, row_format="f32")
    monkeypatch.setattr(os, "posix_fallocate", lambda *args: None)
    with pytest.raises(OSError, match="RowTable.create: cannot be written: No space left"):
        RowTable.create(tmp_path / "t", OLD, row_format="f32")


def test_row_table_create_without_a_directory_to_write(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="RowTable.create: cannot be created in its directory: No such file"):
        RowTable.create(tmp_path / "missing" / "t", OLD, row_format="f32")
    with pytest.raises(NotADirectoryError, match="cannot be created in its directory: Not a directory"):
        RowTable.create(tmp_path / "file" / "t", OLD, row_format="f32")
    with pytest.raises(OSError, match="cannot be created in its directory"):
        RowTable.create("/proc/self/t", OLD, row_format="f32")  # read-only for root too
    opened = os.open

    def refuse(path, flags, *mode):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *mode)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match="cannot be created in its directory: Read-only file system"):
        RowTable.create(tmp_path / "t", OLD, row_format="f32")
    assert os.listdir(tmp_path) == ["file"]


def pieces_that_fail():
    yield torch.zeros(2, 8)
    raise RuntimeError("the source broke")


F32 = {"row_format": "f32", "num_rows": 5, "row_dim": 8}
FP8 = {"row_format": "fp8_e4m3_block32", "num_rows": 2, "row_dim": 32}
U8, SCALES = torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8)
BAD_PIECES = {
    "source_breaks": (pieces_that_fail(), F32, RuntimeError, "the source broke"),
    "too_few": ([torch.zeros(2, 8)], F32, ValueError, "the pieces have 2 rows, expected 5"),
    "too_many": ([torch.zeros(4, 8), torch.zeros(2, 8)], F32, ValueError, r"pieces 0..1 have 6 rows, expected 5 in all"),
    "dtype": ([torch.zeros(5, 8).half()], F32, ValueError, "a piece of rows must be torch.float32"),
    "later_width": ([torch.zeros(4, 8), torch.zeros(1, 9)], F32, ValueError, r"rows of piece 1 must have shape \[rows, 8\]"),
    "width": ([torch.zeros(5, 9)], F32, ValueError, "rows are 9 elements wide, expected 8"),
    "no_tensor": ([[1.0] * 8] * 5, F32, TypeError, "must be a tensor, got list"),
    "not_iterable": (7, F32, TypeError, "rows must be a tensor or an iterable of pieces, got int"),
    "no_num_rows": ([OLD], {"row_format": "f32", "row_dim": 8}, ValueError, "num_rows and row_dim are needed"),
    "negative": ([OLD], {**F32, "num_rows": -1}, ValueError, "num_rows is -1"),
    "other_num_rows": (OLD, {"row_format": "f32", "num_rows": 4}, ValueError, "num_rows is 4, rows has 3"),
    "format": ([OLD], {**F32, "row_format": "x"}, ValueError, "row_format is 'x'"),
    "scales_missing": ([U8], FP8, ValueError, "piece 0 brings no scales"),
    "scales_shape": ([(U8, SCALES[:1])], FP8, ValueError, r"scales of piece 0 must have shape \[2, 1\]"),
    "scales_apart": ([U8], {**FP8, "scales": SCALES}, ValueError, "come with their piece of rows"),
    "scales_unwanted": ([(torch.zeros(5, 8), SCALES)], F32, ValueError, "piece 0 brings scales, but its row format has none"),
    "odd_dim": ([(U8, SCALES)], {**FP8, "row_dim": 33}, ValueError, "row_dim is 33, expected a multiple of 32"),
    "no_scale": ([U8], {**FP8, "row_format": "fp8_e4m3_tensor"}, TypeError, "scales must be a tensor, got NoneType"),
    "other_scale": ([(U8[:1], torch.ones(1)), (U8[1:], torch.zeros(1))], {**FP8, "row_format": "fp8_e4m3_tensor"}, ValueError,
                    r"piece 1 has scale \[0.0\], the table has \[1.0\]"),
}


@pytest.mark.parametrize("pieces, options, error, message", BAD_PIECES.values(), ids=BAD_PIECES.keys())
def test_row_table_create_rejects_pieces(pieces, options, error, message, tmp_path):
    RowTable.create(tmp_path / "t", OLD, row_format="f32")
    before = (tmp_path / "t").read_bytes()
    with pytest.raises(error, match=message):
        RowTable.create(tmp_path / "t", pieces, **options)
    assert os.listdir(tmp_path) == ["t"] and (tmp_path / "t").read_bytes() == before


BAD_TENSORS = {
    "not_a_tensor": (([1],), TypeError, "weight must be a tensor, got list"),
    "dtype": ((torch.zeros(2, 8),), ValueError, "weight must be torch.bfloat16, got torch.float32"),
    "dims": ((torch.zeros(8), None, "f32"), ValueError, r"weight must have shape \[R, stride\], got \[8\]"),
    "columns_apart": ((torch.zeros(8, 4).t(), None, "f32"), ValueError, "the elements of a row of weight must be contiguous"),
    "rows_overlap": ((torch.zeros(1, 8).expand(4, 8), None, "f32"), ValueError, "the rows of weight overlap"),
    "no_columns": ((torch.zeros(4, 0), None, "f32"), ValueError, "row_dim is 0"),
    "format": ((torch.zeros(2, 8), None, "fp32"), ValueError, "row_format is 'fp32', expected one of f32"),
    "scales_missing": ((U8, None, "fp8_e4m3_block32"), ValueError, r"needs scales of shape \[2, 1\], got none"),
    "scales_unwanted": ((torch.zeros(2, 8), SCALES, "f32"), ValueError, "has no scales"),
    "scales_shape": ((U8, SCALES.repeat(1, 2), "fp8_e4m3_block32"), ValueError, r"scales must have shape \[2, 1\], got \[2, 2\]"),
    "scales_dtype": ((U8, SCALES.float(), "fp8_e4m3_block32"), ValueError, "scales must be torch.uint8, got torch.float32"),
    "scales_device": ((U8, SCALES.to("meta"), "fp8_e4m3_block32"), ValueError, "scales must be on cpu, got meta"),
    "scales_columns_apart": ((torch.zeros(4, 64, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.uint8).t(),
                              "fp8_e4m3_block32"), ValueError, "the scales of a row must be contiguous"),
    "tensor_scale": ((U8, torch.ones(2), "fp8_e4m3_tensor"), ValueError, r"scales must have shape \[1\], got \[2\]"),
    "packed_row_dim": ((torch.zeros(2, 66, dtype=torch.uint8), None, "fp8_e4m3_block32_packed"), ValueError, "row_dim is needed"),
}


@pytest.mark.parametrize("args, error, message", BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_row_table_from_tensor_rejects(args, error, message):
    with pytest.raises(error, match=f"RowTable.from_tensor: .*{message}"):
        RowTable.from_tensor(*args)
