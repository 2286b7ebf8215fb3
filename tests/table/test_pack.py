"""`engram-kernels pack`: the same rows, one extent each; killed, starved of disk or disturbed, it leaves no wrong table."""
import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from engram_kernels.cli import main as cli
from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.table import pack
from engram_kernels.table.pack import pack_table
from engram_kernels.table.row_table import RowTable
from engram_kernels.testing import random_rows

R, D, CHUNK = 1000, 96, 64


@pytest.fixture
def source(tmp_path):
    rows, scales = random_rows("fp8_e4m3_block32", R, D, torch.Generator().manual_seed(0))
    RowTable.create(tmp_path / "source", rows, scales, "fp8_e4m3_block32", zero_scale_is_zero=True)
    return tmp_path / "source"


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


def check(target, source, names=()):
    """The target is the packed source, and nothing else is left."""
    packed, plain = RowTable.open(target), RowTable.open(source, *names)
    assert (packed.row_format, packed.num_rows, packed.row_dim) == ("fp8_e4m3_block32_packed", plain.num_rows, plain.row_dim)
    assert packed.zero_scale_is_zero == plain.zero_scale_is_zero
    ids = torch.arange(plain.num_rows)
    assert torch.equal(gather_rows(packed, ids).view(torch.int16), gather_rows(plain, ids).view(torch.int16))
    assert sorted(os.listdir(target.parent)) == sorted([source.name, target.name])


def opens_as_no_table(folder, source):
    for name in os.listdir(folder):
        if name != source.name:
            with pytest.raises(ValueError, match="no whole safetensors file"):
                RowTable.open(folder / name)


@pytest.mark.parametrize("verify_all", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 7, 999, 1000, 5000])
def test_pack_equals_the_source(chunk_rows, verify_all, source, target):
    if chunk_rows == 1:
        rows, scales = RowTable.open(source).read_rows(torch.arange(20))
        RowTable.create(source, rows, scales, "fp8_e4m3_block32")
    result = pack_table(source, target, chunk_rows=chunk_rows, verify_all=verify_all)
    assert (result.row_bytes, result.resumed_rows, result.verified_rows) == (99, 0, result.num_rows)
    check(target, source)


def test_pack_of_a_checkpoint_shard_by_command(tmp_path, target, capsys):
    rows, scales = random_rows("fp8_e4m3_block32", R, D, torch.Generator().manual_seed(1))
    shard = {"x": torch.randn(3, 5), "e.weight": rows.view(torch.float8_e4m3fn), "e.scale": scales.view(torch.float8_e8m0fnu)}
    source = tmp_path / "shard"
    save_file(shard, source)
    assert cli.main(["pack", str(source), str(target), "--tensor", "e.weight", "--scales", "e.scale", "--verify", "all"]) == 0
    assert "target: 1,000 rows of 99 bytes; 1,000 compared with the source" in capsys.readouterr().out
    check(target, source, ("e.weight", "e.scale"))
    assert cli.main(["pack", str(source), str(target), "--tensor", "e.weight", "--scales", "e.scale"]) == 1
    assert "engram-kernels pack: [Errno 17] pack: the target exists already" in capsys.readouterr().err


def test_pack_verifies_a_sample_of_a_large_table(source, target, monkeypatch):
    monkeypatch.setattr(pack, "_SAMPLE_ROWS", 50)
    assert 10 < pack_table(source, target, chunk_rows=CHUNK).verified_rows <= 51
    check(target, source)


def test_pack_of_no_rows(tmp_path, target):
    RowTable.create(tmp_path / "source", [], num_rows=0, row_dim=64, row_format="fp8_e4m3_block32")
    assert pack_table(tmp_path / "source", target).num_rows == 0
    assert RowTable.open(target).num_rows == 0 and sorted(os.listdir(tmp_path)) == ["source", "target"]


def stop_after(monkeypatch, calls, number):
    """Writing chunks fails from the given call on."""
    write = os.pwrite
    done = []

    def fail_later(fd, data, at):
        if len(data) > 1000:
            done.append(at)
            if len(done) > calls:
                raise OSError(number, os.strerror(number))
            data = data[:len(data) // 2] if len(done) % 2 else data  # and short writes are gone on with
        return write(fd, data, at)
    monkeypatch.setattr(os, "pwrite", fail_later)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_pack_full_disk_leaves_what_the_next_run_goes_on_from(number, source, target, monkeypatch):
    stop_after(monkeypatch, 9, number)
    with pytest.raises(OSError, match=rf"pack: rows \d+\.\.\d+ cannot be written: {os.strerror(number)}; (\d+) rows are kept"):
        pack_table(source, target, chunk_rows=CHUNK)
    monkeypatch.undo()
    assert sorted(os.listdir(target.parent)) == ["source", "target.part", "target.part.log"]
    opens_as_no_table(target.parent, source)
    assert pack_table(source, target, chunk_rows=CHUNK).resumed_rows >= 4 * CHUNK
    check(target, source)


@pytest.mark.parametrize("call, step", [("posix_fallocate", r"\d+ bytes cannot be reserved: No space left"),
                                        ("pwrite", "cannot be written.*: No space left"),
                                        ("fsync", "cannot be put in place: No space left"),
                                        ("rename", "cannot be put in place: No space left")])
def test_pack_full_disk_at_any_step(call, step, source, target, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=rf"pack: {step}.*'\S*/target.part(.log)?'"):
        pack_table(source, target, chunk_rows=CHUNK)
    monkeypatch.undo()
    assert not target.exists()
    if call in ("posix_fallocate", "pwrite"):
        assert os.listdir(target.parent) == ["source"]
    pack_table(source, target, chunk_rows=CHUNK)
    check(target, source)


SLOW = """
import os, sys, time
from engram_kernels.table.pack import pack_table
sync = os.fdatasync
def slow(fd):
    sync(fd)
    time.sleep(0.02)
os.fdatasync = slow
pack_table(sys.argv[1], sys.argv[2], chunk_rows=16)
"""


def test_pack_killed_goes_on(source, target):
    log = target.with_name("target.part.log")
    for _ in range(3):
        before = log.read_bytes().count(b"\n") if log.exists() else 0
        run = subprocess.Popen([sys.executable, "-c", SLOW, str(source), str(target)])
        until = time.monotonic() + 100
        while (not log.exists() or log.read_bytes().count(b"\n") < before + 8) and time.monotonic() < until:
            time.sleep(0.005)
        if before == 0:
            with pytest.raises(BlockingIOError, match="another process packs into it"):
                pack_table(source, target, chunk_rows=16)
        run.send_signal(signal.SIGKILL)
        assert run.wait(30) == -signal.SIGKILL
        assert not target.exists()
        opens_as_no_table(target.parent, source)
    assert pack_table(source, target, chunk_rows=16).resumed_rows >= 20 * 16
    check(target, source)


def interrupted(source, target, monkeypatch):
    stop_after(monkeypatch, 12, errno.ENOSPC)
    with pytest.raises(OSError):
        pack_table(source, target, chunk_rows=CHUNK)
    monkeypatch.undo()


def damage_part(part, log, source):
    data = bytearray(part.read_bytes())
    data[4096 + 150 * 99] ^= 1  # in the third chunk
    part.write_bytes(data)
    return 2 * CHUNK


def cut_log(part, log, source):
    log.write_bytes(log.read_bytes()[:-5])
    return None


def garbage_log(part, log, source):
    log.write_bytes(b"\xff\x00not json\n" + log.read_bytes())
    return 0


def cut_part(part, log, source):
    os.truncate(part, 4096 + 70 * 99)
    return CHUNK


def change_source(part, log, source):
    rows, scales = random_rows("fp8_e4m3_block32", R, D, torch.Generator().manual_seed(9))
    RowTable.create(source, rows, scales, "fp8_e4m3_block32", zero_scale_is_zero=True)
    return 0


@pytest.mark.parametrize("change", [damage_part, cut_log, garbage_log, cut_part, change_source])
def test_pack_trusts_no_part_that_changed(change, source, target, monkeypatch):
    interrupted(source, target, monkeypatch)
    resumed = change(target.with_name("target.part"), target.with_name("target.part.log"), source)
    result = pack_table(source, target, chunk_rows=CHUNK)
    assert resumed is None or result.resumed_rows == resumed
    check(target, source)


def test_pack_refuses_a_part_that_differs(source, target, monkeypatch):
    """A fault between the checksum and the disk is found by the comparison at the end."""
    write = os.pwrite

    def flip(fd, data, at):
        wrong = bytes([data[0] ^ 1]) + bytes(data[1:]) if len(data) > 1000 and at > 4096 * 3 else data
        return write(fd, wrong, at)
    monkeypatch.setattr(os, "pwrite", flip)
    with pytest.raises(RuntimeError, match=r"target.part: row \d+ differs from the source"):
        pack_table(source, target, chunk_rows=CHUNK)
    assert not target.exists()


def test_pack_source_that_changes_meanwhile(source, target, monkeypatch):
    sync, calls = os.fdatasync, []

    def touch_later(fd):
        calls.append(fd)
        if len(calls) == 6:
            os.utime(source, ns=(1, 1))
        sync(fd)
    monkeypatch.setattr(os, "fdatasync", touch_later)
    with pytest.raises(OSError, match="source: the file was written to after it was opened"):
        pack_table(source, target, chunk_rows=CHUNK)
    monkeypatch.undo()
    assert not target.exists()
    assert pack_table(source, target, chunk_rows=CHUNK).resumed_rows == 0
    check(target, source)


def test_pack_rejects_what_it_cannot_pack(tmp_path, source, target):
    rows, _ = random_rows("fp8_e4m3_block32_packed", 10, D, torch.Generator().manual_seed(0))
    RowTable.create(tmp_path / "packed", rows, row_format="fp8_e4m3_block32_packed", row_dim=D)
    RowTable.create(tmp_path / "f32", torch.zeros(3, 8), row_format="f32")
    for name in ("packed", "f32"):
        with pytest.raises(ValueError, match=f"pack: .*{name} has row_format"):
            pack_table(tmp_path / name, target)
    with pytest.raises(FileNotFoundError):
        pack_table(tmp_path / "missing", target)
    with pytest.raises(FileExistsError, match="pack: the target exists already"):
        pack_table(source, source)
    with pytest.raises(FileNotFoundError, match="pack: cannot be created"):
        pack_table(source, tmp_path / "missing" / "target")
