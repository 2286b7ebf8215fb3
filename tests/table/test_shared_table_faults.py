"""Shared tables when things go wrong: processes killed at any moment, segments broken in any way, sources that fail midway."""
import errno
import fcntl
import gc
import json
import os
import re
import struct
import time
import zlib

import pytest
import torch

from engram_kernels._library import COMPILE_ERROR
from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.table import shared_segment, shared_table
from engram_kernels.table.row_table import RowTable

if not COMPILE_ERROR:
    from engram_kernels import _C

pytest_plugins = ("shared_worker",)
R = 3000
ROWS = torch.arange(R * 8).view(R, 8).float()
SHARE = f"RowTable.from_tensor(torch.arange({R * 8}).view({R}, 8).float(), row_format='f32').share('t', directory=shm)"
ATTACH = "t = RowTable.attach('t', directory=shm)"
DIE_AFTER_A_PIECE = """shared_table._FILL_BYTES = 4096
copy, copied = shared_table._copy_rows, []
def copy_and_die(*args):
    copy(*args)
    copied.append(1)
    if len(copied) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
shared_table._copy_rows = copy_and_die"""


def source():
    return RowTable.from_tensor(ROWS, row_format="f32")


def intact(table):
    ids = torch.arange(R).flip(0)
    return torch.equal(gather_rows(table, ids, torch.float32), ROWS.flip(0))


def segments(directory):
    gc.collect()
    return sorted(os.listdir(directory))


def test_shared_table_user_is_killed(worker, shm):
    shared, other = source().share("t", directory=shm), worker()
    assert other.do(ATTACH) == "done" and shared.memory_stats()["users"] == 2
    other.kill()
    assert shared.memory_stats()["users"] == 1 and intact(shared) and RowTable.unlink_stale(shm) == []
    del shared
    assert segments(shm) == []


def test_shared_table_maker_is_killed(worker, shm):
    """Users of the segment go on, others may still join, and the last one removes it."""
    maker, user = worker(), worker()
    assert maker.do(f"t = {SHARE}") == "done" and user.do(ATTACH) == "done"
    maker.kill()
    attached = RowTable.attach("t", source(), directory=shm)
    assert intact(attached) and user.do("t.memory_stats()['users']") == "2" and RowTable.unlink_stale(shm) == []
    joined = source().share("t", directory=shm)
    assert joined.memory_stats()["users"] == 3
    with pytest.raises(FileExistsError, match=rf"by process {maker.process.pid}, which is gone\); another table is in use"):
        RowTable.from_tensor(ROWS[1:], row_format="f32").share("t", directory=shm)
    del attached, joined
    assert segments(shm) == ["engram-t"]
    user.end()
    assert segments(shm) == []


@pytest.mark.parametrize("recovery", ["attach", "share", "unlink_stale", "another_share"])
def test_shared_table_of_the_dead(recovery, worker, shm):
    """All are killed: the segment stays, whole and nobody's, until somebody comes along."""
    maker = worker()
    assert maker.do(f"t = {SHARE}") == "done"
    maker.kill()
    assert segments(shm) == ["engram-t"]
    if recovery == "attach":
        table = RowTable.attach("t", source(), directory=shm)
        assert intact(table) and table.memory_stats()["users"] == 1
    elif recovery == "share":  # another table by this name: nobody needs the old one
        table = RowTable.from_tensor(ROWS + 1, row_format="f32").share("t", directory=shm)
        assert torch.equal(table.rows, ROWS + 1)
    elif recovery == "unlink_stale":
        assert RowTable.unlink_stale(shm) == ["t"]
        table = None
    else:
        table = source().share("other", directory=shm)
        assert segments(shm) == ["engram-other"]
    del table
    assert segments(shm) == []


def test_shared_table_maker_is_killed_while_filling(worker, shm):
    maker = worker()
    maker.do(DIE_AFTER_A_PIECE)
    assert maker.do(f"t = {SHARE}") == "" and maker.exit_code() == -9
    assert segments(shm) == ["engram-t"]
    with pytest.raises(ValueError, match=r"RowTable.attach: .*engram-t is half-written: it was made by process "
                                         f"{maker.process.pid}, which is gone, before it was full; share it anew"):
        RowTable.attach("t", directory=shm)
    with pytest.raises(FileNotFoundError, match="no process shares a table by this name"):
        RowTable.attach("t", directory=shm)
    table = source().share("t", directory=shm)
    assert intact(table)


def test_shared_table_waiters_take_over_from_the_dead(worker, shm):
    """The maker dies while one process waits to attach and two to share: one of these fills, all have the table."""
    maker, waiters = worker(), [worker(), worker(), worker()]
    maker.do(DIE_AFTER_A_PIECE.replace("        os.kill", "        time.sleep(1)\n        os.kill"))
    assert [one.do("1") for one in waiters] == ["1"] * 3
    maker.send(f"t = {SHARE}")
    while not segments(shm):
        time.sleep(0.01)
    waiters[0].send("t = RowTable.attach('t', timeout_s=60, directory=shm)")
    waiters[1].send(f"t = {SHARE}")
    waiters[2].send(f"t = {SHARE}")
    assert [one.answer() for one in waiters] == ["done"] * 3 and maker.exit_code() == -9
    for one in waiters:
        assert one.do("int(t.rows[-1, -1])") == str(R * 8 - 1)
    assert waiters[0].do("t.memory_stats()['users']") == "3"
    for one in waiters:
        one.end()
    assert segments(shm) == []


def test_shared_table_made_and_killed_again_and_again(worker, shm):
    """Users come, go and are killed at random: the rows are right at every attach, and nothing stays."""
    shared = source().share("t", directory=shm)
    workers = [worker(), worker()]
    for round_number in range(3):
        for one in workers:
            one.send("for _ in range(100000):\n    t = RowTable.attach('t', directory=shm)\n"
                     f"    assert t.rows[-1, -1] == {R * 8 - 1}\n    del t")
        time.sleep(0.3 + 0.2 * round_number)
        workers.pop(0).kill()
        assert intact(RowTable.attach("t", source(), directory=shm))
        workers.append(worker())
        workers[-1].do("1")
    for one in workers:
        one.kill()
    assert shared.memory_stats()["users"] == 1
    del shared
    assert segments(shm) == []


def test_shared_table_is_not_written_to(worker, shm):
    """A stray write ends the process that does it, and no row changes for the others."""
    shared, other = source().share("t", directory=shm), worker()
    other.do(ATTACH)
    by_sanitizer = not COMPILE_ERROR and _C.sanitized  # which reports the fault and exits
    assert other.do("t.rows[5] = 1") == "" and other.exit_code() == (1 if by_sanitizer else -11)
    assert intact(shared) and shared.memory_stats()["users"] == 1


def header(path):
    with path.open("rb") as file:
        magic, version, state, size, _ = struct.unpack("<8sIIII", file.read(24))
        return [magic, version, state, json.loads(file.read(size))]


def rewrite(magic=None, version=None, state=None, crc=None, **fields):
    """What writes another first page, with the right checksum unless that is the point."""
    def change(path):
        old = header(path)
        old[3].update(fields)
        text = json.dumps(old[3]).encode()
        head = [magic or old[0], version or old[1], state or old[2], len(text)]
        found = zlib.crc32(struct.pack("<8sIIII", *head, 0) + text)
        with path.open("r+b") as file:
            file.write((struct.pack("<8sIIII", *head, found if crc is None else crc) + text).ljust(4096, b"\0"))
    return change


def put(at, data):
    def change(path):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(data)
    return change


WHOLE = (2 << 20) + R * 32
BROKEN = {  # name: what breaks the file, what attach says
    "no_magic": (put(0, b"garbage!"), "is no table segment: it begins with b'garbage!', expected b'EKSHARE"),
    "other_version": (rewrite(version=7), "has version 7, this is version 3: it is of another engram_kernels"),
    "half_written": (rewrite(state=1), r"is half-written: it was made by process \d+, which is running, before it was full"),
    "manifest_of_zeros": (put(24, bytes(4072)), "has a corrupt manifest: its checksum is not 0x"),
    "one_bit": (lambda path: put(40, bytes([path.read_bytes()[40] ^ 4]))(path), "has a corrupt manifest: its checksum is not"),
    "wrong_crc": (rewrite(crc=5), "has a corrupt manifest: its checksum is not 0x5"),
    "length_beyond_the_page": (put(16, b"\xff\xff\xff\x7f"), "has a corrupt manifest: its checksum"),
    "a_field_too_many": (rewrite(extra=1), "has a corrupt manifest: {.*'extra': 1}, expected row_format, row_dim"),
    "a_field_of_another_type": (rewrite(num_rows="3000"), "has a corrupt manifest: {.*'num_rows': '3000'"),
    "a_field_of_another_number": (rewrite(row_dim=8.0), "has a corrupt manifest: {.*'row_dim': 8.0"),
    "more_rows": (rewrite(num_rows=R + 1), "has a corrupt manifest: 96000 bytes, but 3001 rows of f32, 8 wide, take 96032"),
    "fewer_than_no_rows": (rewrite(num_rows=-R), "has a corrupt manifest: 96000 bytes, but -3000 rows"),
    "unknown_format": (rewrite(row_format="f8"), "row_format is 'f8', expected one of f32"),
    "format_that_does_not_fit": (rewrite(row_format="bf16"), "has a corrupt manifest: 96000 bytes, but .* take 48000"),
    "width_that_does_not_fit": (rewrite(width=9), "rows are 9 elements wide, expected 8"),
    "truncated": (lambda path: os.truncate(path, WHOLE - 1), rf"has {WHOLE - 1} bytes, its manifest says {WHOLE} \(truncated\)"),
    "cut_behind_the_manifest": (lambda path: os.truncate(path, 4096), r"has 4096 bytes, its manifest says .* \(truncated\)"),
    "cut_in_the_manifest": (lambda path: os.truncate(path, 30), "has a corrupt manifest: its checksum"),
    "cut_in_the_header": (lambda path: os.truncate(path, 11), "is no table segment: it has 11 bytes"),
    "empty": (lambda path: os.truncate(path, 0), "is no table segment: it has 0 bytes"),
    "longer": (lambda path: os.truncate(path, WHOLE + 1), f"has {WHOLE + 1} bytes, its manifest says {WHOLE}$"),
    "damaged_row": (put(2 << 20, b"\1"), "holds rows with fingerprint .*, its manifest says .*: they were written to"),
    "of_another_table": (rewrite(fingerprint="0" * 32), "holds rows with fingerprint .*, its manifest says 0{32}"),
}


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN.keys())
def test_shared_table_attach_refuses_a_broken_segment(change, message, shm):
    """Each in words, and each time without a descriptor left over."""
    path = shm / "engram-t"
    fd = shared_segment.create("", path, shared_table.describe(source()))
    os.pwrite(fd, ROWS.numpy().tobytes(), 2 << 20)
    shared_segment.write_manifest(fd, shared_table.describe(source()), ready=True)
    shared_segment.downgrade(fd, path)  # this test is a user: others do not remove it
    assert RowTable.attach("t", source(), directory=shm).num_rows == R
    gc.collect()
    open_before = set(os.listdir("/proc/self/fd"))
    change(path)
    with pytest.raises(ValueError, match=rf"^RowTable.attach: \S*engram-t:? ({message})"):
        RowTable.attach("t", directory=shm)
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= open_before and segments(shm) == ["engram-t"]
    with pytest.raises((FileExistsError, TimeoutError)):  # in use: not replaced, whatever it is
        source().share("t", timeout_s=0.2, directory=shm)
    os.close(fd)
    removed = RowTable.unlink_stale(shm)
    assert removed == ([] if re.search("no table segment|another engram_kernels", message) else ["t"])
    (shm / "engram-t").unlink(missing_ok=True)


def test_shared_table_refuses_what_is_no_file(shm):
    path = shm / "engram-t"
    os.symlink("/etc/passwd", path)
    with pytest.raises(OSError, match="RowTable.attach: cannot be opened: Too many levels of symbolic links"):
        RowTable.attach("t", directory=shm)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="engram-t is no regular file"):
        RowTable.attach("t", directory=shm)
    with pytest.raises(FileExistsError, match="is no regular file; remove it, or share by another name"):
        source().share("t", directory=shm)
    assert RowTable.unlink_stale(shm) == []
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="RowTable.attach: cannot be opened: Is a directory"):
        RowTable.attach("t", directory=shm)
    path.rmdir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user")
def test_shared_table_of_another_user(shm):
    shared = source().share("t", directory=shm)
    os.chown(shm / "engram-t", 12345, -1)
    with pytest.raises(PermissionError, match="RowTable.attach: belongs to user 12345, this process runs as 0"):
        RowTable.attach("t", directory=shm)
    assert RowTable.unlink_stale(shm) == []
    os.chown(shm / "engram-t", 0, -1)
    del shared


def test_shared_table_leaves_files_of_others(shm):
    (shm / "engram-notes").write_text("what somebody wrote")
    (shm / "other").write_bytes(b"EKSHARE\0")
    (shm / "engram-a.12345678.tmp").write_bytes(b"")  # of a maker that died before it wrote a byte
    assert RowTable.unlink_stale(shm) == ["a.12345678.tmp"]
    with pytest.raises(FileExistsError, match="is no table segment.*; remove it, or share by another name"):
        source().share("notes", directory=shm)
    assert segments(shm) == ["engram-notes", "other"]
    for name in segments(shm):
        (shm / name).unlink()


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "the disk is gone"), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_shared_table_source_fails_midway(failure, shm, monkeypatch):
    copy, copied = shared_table._copy_rows, []

    def fail(*args):
        copied.append(segments(shm))
        if len(copied) == 3:
            raise failure
        copy(*args)
    monkeypatch.setattr(shared_table, "_FILL_BYTES", 4096)
    monkeypatch.setattr(shared_table, "_copy_rows", fail)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(type(failure)):
        source().share("t", directory=shm)
    assert copied[2] == ["engram-t"] and segments(shm) == [] and set(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("call, message", [("posix_fallocate", "96000 bytes cannot be reserved: No space left"),
                                           ("pwrite", r"rows \d+\.\.\d+ cannot be written: No space left"),
                                           ("ftruncate", "No space left"), ("link", "No space left")])
def test_shared_table_without_space(call, message, shm, monkeypatch):
    succeed = getattr(os, call)

    def fail(*args):
        if call == "pwrite" and args[2] == 0:  # the manifest
            return succeed(*args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, call, fail)
    gc.disable()
    try:
        with pytest.raises(OSError, match=message) as caught:
            source().share("t", directory=shm)
        monkeypatch.undo()
        assert caught.value.errno == errno.ENOSPC
        del caught
        with open("/proc/self/maps") as maps:
            assert str(shm) not in maps.read()
    finally:
        gc.enable()
    assert segments(shm) == [] and set(os.listdir("/proc/self/fd")) <= before


def test_shared_table_that_cannot_be_mapped(shm, monkeypatch):
    make = shared_table.make_host_memory

    def fail(num_bytes, numa, fd, offset, read_only=False):
        if read_only:
            raise OSError(errno.ENOMEM, "HostMemory: no addresses")
        return make(num_bytes, numa, fd, offset)
    monkeypatch.setattr(shared_table, "make_host_memory", fail)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="no addresses"):
        source().share("t", directory=shm)
    assert segments(shm) == [] and set(os.listdir("/proc/self/fd")) <= before


def test_shared_table_whose_name_was_deleted(shm):
    """By hand: those who use it go on, and the name is free."""
    first = source().share("t", directory=shm)
    (shm / "engram-t").unlink()
    second = source().share("t", directory=shm)
    assert intact(first) and intact(second) and second.memory_stats()["users"] == 1
    del first
    assert segments(shm) == ["engram-t"]  # not the second's


def test_shared_table_last_user_leaves_while_another_joins(shm, monkeypatch):
    """Between the other's open and its lock: it does not take a segment that has no name any more."""
    shared = [source().share("t", directory=shm)]
    flock = fcntl.flock

    def leave_first(fd, operation):
        if shared and operation & fcntl.LOCK_SH:
            shared.clear()
            gc.collect()
        flock(fd, operation)
    monkeypatch.setattr(fcntl, "flock", leave_first)
    with pytest.raises(FileNotFoundError, match="no process shares a table by this name"):
        RowTable.attach("t", directory=shm)
    assert segments(shm) == []


@pytest.mark.parametrize("after", ["pin", "unpin", "refused"])
def test_shared_table_that_is_pinned_is_not_written_to(after, worker, shm):
    """The protection is lifted for no longer than the device locks the pages."""
    shared, other = source().share("t", directory=shm), worker()
    other.do(ATTACH)
    other.do("from engram_kernels import _C")
    if after == "refused":
        other.do("import ctypes; refuse = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)(lambda p, n: 1)")
        other.do("other = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda p: 0)")
        other.do("r = _C.HostRegistrar(*(ctypes.cast(f, ctypes.c_void_p).value for f in (refuse, other)), 0)")
        assert "cannot be pinned" in other.do("t.pin(r)")
    else:
        assert other.do("t.pin(_C.HostRegistrar())") == "None"
    if after == "unpin":
        assert other.do("t._memory.host.unpin()") == "None"
    by_sanitizer = not COMPILE_ERROR and _C.sanitized
    assert other.do("t.rows[5] = 1") == "" and other.exit_code() == (1 if by_sanitizer else -11)
    assert intact(shared)


@pytest.mark.skipif(COMPILE_ERROR is not None, reason=str(COMPILE_ERROR))
def test_shared_table_is_pinned_where_it_is(shm):
    shared = source().share("t", directory=shm)
    shared.pin(_C.HostRegistrar())
    assert shared.memory_stats()["pinned_bytes"] == shared.memory_stats()["mapped_bytes"] and intact(shared)
    shared._memory.host.unpin()
    assert shared.memory_stats()["pinned_bytes"] == 0
