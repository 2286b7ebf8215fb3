"""The file tier when reading goes wrong: every row delivered is right, every failure names its row, and nothing hangs."""
import errno
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from io_faults import inject_faults
from prefetch_cases import num_threads
from row_files import PAGE, SHAPES, File, open_reader

from engram_kernels._library import COMPILE_ERROR
from engram_kernels.table.row_table import RowTable

if not COMPILE_ERROR:
    from engram_kernels import _C

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.mark.parametrize("seed", range(6))
def test_file_tier_survives_short_reads_reordering_and_delays(seed, io, tmp_path):
    shape = list(SHAPES.values())[seed]
    file = File(tmp_path / "t", seed=seed, **shape)
    tier = file.tier(io, (1, 5, 64)[seed % 3], seed=seed, shorter=0.4, reorder=True, max_delay_us=200)
    rng = np.random.default_rng(seed)
    for count in (1, 40, 333):
        file.check(tier, rng.permutation(file.num_rows)[:count])


def test_file_tier_eio_reaches_its_rows(io, tmp_path):
    """A bad sector fails the rows of its page, by name, and no others, however they were read together."""
    file = File(tmp_path / "t", num_rows=1000, row_bytes=264, offset=0)
    begin = 20 * PAGE
    tier = file.tier(io, bad_begin=begin + 100, bad_end=begin + 101)
    bad = [r for r in range(1000) if r * 264 < begin + PAGE and (r + 1) * 264 > begin] if tier.stats()["direct"] else \
        [r for r in range(1000) if r * 264 <= begin + 100 < (r + 1) * 264]
    for row in bad:
        with pytest.raises(OSError, match=rf"tier file: \S*/t: row {row} at byte {row * 264} cannot be read: Input") as caught:
            file.fetch(tier, [row])
        assert caught.value.errno == errno.EIO
    good = np.array([r for r in range(1000) if r not in bad])
    file.check(tier, good)
    for ids in (np.arange(1000), np.arange(1000)[::-1], np.arange(0, 1000, 1 if len(bad) == 1 else 3)):
        with pytest.raises(OSError, match="cannot be read") as caught:
            file.fetch(tier, ids)
        assert int(str(caught.value).split(": row ")[1].split()[0]) in bad
    file.check(tier, good)


def test_file_tier_passing_errors_are_errors_or_right(io, tmp_path):
    file = File(tmp_path / "t", num_rows=2000)
    tier = file.tier(io, seed=3, eio=0.02, shorter=0.1, reorder=True)
    rng, outcomes = np.random.default_rng(0), set()
    for _ in range(60):
        try:
            file.check(tier, rng.permutation(2000)[:30])
            outcomes.add("right")
        except OSError as err:
            assert err.errno == errno.EIO and "tier file: " in str(err) and ": row " in str(err)
            outcomes.add("error")
    assert outcomes == {"right", "error"}
    assert tier.stats()["rows"] % 30 == 0 and tier.stats()["rows"] < 60 * 30  # failures are not counted as delivered


def test_file_tier_direct_reads_refused_at_the_first_read(tmp_path):
    file = File(tmp_path / "t")
    tier = file.tier("preadv", refuse_direct=True)
    if not tier.stats()["direct"]:
        pytest.skip("this file system refuses O_DIRECT at open")
    file.check(tier, np.arange(0, 3000, 7))
    assert not tier.stats()["direct"]
    file.check(tier, np.arange(0, 3000, 5))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("change", ["truncated", "emptied", "overwritten", "copied_over"])
def test_file_tier_changed_while_open(change, cache_bytes, io, tmp_path):
    file = File(tmp_path / "t")
    tier = file.tier(io, cache_bytes=cache_bytes)
    file.check(tier, np.arange(0, 3000, 9))
    if change == "truncated":
        os.truncate(file.path, file.size - 500)
    elif change == "emptied":
        os.truncate(file.path, 0)
    elif change == "overwritten":
        with file.path.open("r+b") as f:
            f.seek(file.size // 2)
            f.write(b"other")
    else:
        file.path.write_bytes(bytes(file.size))  # truncated and written again: the same inode
    if change in ("overwritten", "copied_over"):
        info = file.path.stat()
        os.utime(file.path, ns=(info.st_atime_ns, info.st_mtime_ns + 1))  # the clock of the file system may tick slowly
    for ids in ([2999], [9], np.arange(3000)):
        with pytest.raises(OSError, match=r"tier file: \S*/t: .*row \d+") as caught:
            file.fetch(tier, ids)
        assert caught.value.errno == errno.EIO
    assert tier.stats()["rows"] == len(range(0, 3000, 9))


def test_file_tier_truncated_in_the_middle_of_a_fetch(io, tmp_path):
    file = File(tmp_path / "t", num_rows=2000, stride=3 * PAGE)  # a read for each row
    tier = file.tier(io, 4, max_delay_us=4000)
    cut = threading.Timer(0.1, os.truncate, (file.path, file.size // 2))
    cut.start()
    with pytest.raises(OSError, match=r"tier file: \S*/t: row \d+ ends at byte|when it was opened; row \d+ is not what it was"):
        file.fetch(tier, np.random.default_rng(0).permutation(2000))
    cut.join()


@pytest.mark.parametrize("when", ["before", "during"])
def test_file_tier_cancel(when, io, tmp_path):
    file = File(tmp_path / "t", num_rows=2000, stride=3 * PAGE)  # a read for each row
    tier = file.tier(io, 2, max_delay_us=40_000, reorder=True)
    flag = _C.CancelFlag()
    setter = threading.Timer(0 if when == "before" else 0.1, flag.set)
    setter.start()
    if when == "before":
        setter.join()
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match="the fetch was cancelled"):
        file.fetch(tier, np.arange(2000), flag)
    assert time.perf_counter() - start < 5  # to its end it takes about 20 s
    setter.join()
    file.check(tier, np.arange(0, 2000, 100))


def test_file_tier_many_threads_under_faults(io, tmp_path):
    """More callers than queues; each gets its own rows or its own error."""
    file = File(tmp_path / "t", row_bytes=256, scale_bytes=8)
    tier = file.tier(io, 16, 100_000, seed=5, eio=0.002, shorter=0.1, reorder=True, max_delay_us=100)
    failures, errors, until = [], [], time.monotonic() + 2

    def run(seed):
        rng = np.random.default_rng(seed)
        while time.monotonic() < until:
            try:
                file.check(tier, rng.permutation(3000)[:int(rng.integers(0, 300))])
            except OSError as err:
                errors.append(err)
            except BaseException as err:
                failures.append(err)

    threads = [threading.Thread(target=run, args=(seed,), daemon=True) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and failures == []
    stats = tier.stats()
    assert stats["rows"] == stats["cache_hits"] + stats["file_rows"] > 0 and stats["cache_hits"] > 0
    assert all(err.errno == errno.EIO for err in errors)


def test_file_tier_does_not_grow(io, tmp_path):
    file = File(tmp_path / "t")
    threads_before, queue_depth = num_threads(), 16
    tier = file.tier(io, queue_depth, cache_bytes=50_000)
    rng = np.random.default_rng(0)

    def descriptors():
        return set(os.listdir("/proc/self/fd"))  # not how many: those that other tests left may go meanwhile

    for n in range(400):
        file.check(tier, rng.permutation(3000)[:70])
        if n == 100:
            before = descriptors()
        assert num_threads() <= threads_before + queue_depth
    assert descriptors() <= before
    del tier
    for _ in range(50):
        file.check(file.tier(io, queue_depth), np.arange(0, 3000, 100))
    assert descriptors() <= before and num_threads() <= threads_before


def test_file_tier_in_a_child_after_a_fork(io, tmp_path):
    """The child has neither the rings nor the threads of its parent; both go on."""
    file = File(tmp_path / "t")
    tier = file.tier(io, cache_bytes=100_000)
    file.check(tier, np.arange(0, 3000, 5))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for begin in range(3):
                file.check(tier, np.arange(begin, 3000, 3))
            code = 0
        finally:
            os._exit(code)
    for begin in range(3):
        file.check(tier, np.arange(begin, 3000, 4))
    until = time.monotonic() + 30
    while (waited := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.01)
    if waited == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert waited == (child, 0)


REFUSE_IO_URING = """
import ctypes, errno, os, resource, struct, sys, threading
import torch
from engram_kernels import RowTable
path, when = sys.argv[1:]

def refuse(number):  # by seccomp, as container runtimes do: the system call answers EPERM
    rules = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | errno.EPERM), (0x06, 0, 0, 0x7FFF0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
        sys.exit(77)

def check(table, count=1):
    got = []
    def read():
        got.append(torch.equal(table.read_rows(torch.arange(0, 100_000, 7))[0], torch.arange(800_000.0).view(-1, 8)[::7]))
    threads = [threading.Thread(target=read) for _ in range(count)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert got == [True] * count, got

if when in ("setup", "enter"):
    refuse({"setup": 425, "enter": 426}[when])
    table = RowTable.open(path)
    assert table.io_stats()["io"] == "preadv", table.io_stats()
    check(table)
    try:
        RowTable.open(path, io="io_uring")
    except ValueError as err:
        assert "io is 'io_uring', but " in str(err), err
    else:
        sys.exit("a backend that was named was replaced in silence")
    sys.exit()
table, named = RowTable.open(path), RowTable.open(path, io="io_uring")
if table.io_stats()["io"] != "io_uring":
    sys.exit(78)
if when == "enter later":
    check(table)
    refuse(426)
    check(table)
    check(table, 4)
    assert table.io_stats()["io"] == "preadv", table.io_stats()
    try:
        named.read_rows(torch.arange(9))
    except OSError as err:
        assert "io_uring was named, and io_uring_enter failed" in str(err), err
    else:
        sys.exit("a backend that was named was replaced in silence")
elif when == "no descriptor":
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
    try:
        while True:
            taken.append(os.dup(0))
    except OSError:
        pass
    check(table, 6)  # they wait for the one queue that there is
    assert table.io_stats()["io"] == "io_uring", table.io_stats()
    check(named, 3)
    child = os.fork()  # which has no queue yet
    if child == 0:
        try:
            check(table)
            os._exit(0 if table.io_stats()["io"] == "preadv" else 3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.parametrize("when", ["setup", "enter", "enter later", "no descriptor"])
def test_file_tier_io_uring_refused(when, tmp_path):
    """At its setup, at its first use, in the middle of it all, for want of a descriptor: preadv reads, or the read waits."""
    RowTable.create(tmp_path / "t", torch.arange(800_000.0).view(-1, 8), row_format="f32")
    environment = {k: v for k, v in os.environ.items() if k != "EK_FILE_IO"}
    run = subprocess.run([sys.executable, "-c", REFUSE_IO_URING, str(tmp_path / "t"), when], capture_output=True, text=True,
                         timeout=120, env=environment)
    if run.returncode in (77, 78):
        pytest.skip("no seccomp filter can be set here" if run.returncode == 77 else "io_uring is refused here")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("shape", SHAPES)
def test_file_reader_reads_rows_twice(shape, io, tmp_path):
    """Also rows that straddle two reads, each time whole."""
    file = File(tmp_path / "t", **SHAPES[shape])
    reader = open_reader(file.path, io=io)
    ids = np.random.default_rng(0).integers(0, file.num_rows, 90)
    ids[::3] = ids[0]
    out = np.full((90, file.rows.shape[1]), 0xA5, np.uint8)
    for order in (ids, np.sort(ids)):
        out[:] = 0xA5
        reader.read_rows(*file.extent, order, out)
        assert np.array_equal(out, file.rows[order])


def test_file_reader_refuses_outputs_that_are_its_ids(tmp_path):
    file = File(tmp_path / "t", row_bytes=8, offset=0)
    reader, memory = open_reader(file.path), np.arange(200, dtype=np.int64)
    for out in (memory[:100], memory[50:150], memory[99:199]):
        with pytest.raises(ValueError, match="FileReader: out shares memory with row_ids"):
            reader.read_rows(*file.extent, memory[:100], out)
    reader.read_rows(*file.extent, memory[:100], memory[100:])
    assert np.array_equal(memory[100:].view(np.uint8).reshape(100, 8), file.rows[:100])
    RowTable.create(tmp_path / "table", torch.randn(100, 2), row_format="f32")
    table, ids = RowTable.open(tmp_path / "table"), torch.arange(20)
    with pytest.raises(ValueError, match="shares memory with row_ids"):
        table.read_rows(ids, out_rows=ids.view(torch.float32).view(20, 2))
    tier = reader.tier(file.extent, (0, 8, 8, 3000), 0)
    with pytest.raises(ValueError, match="rows_out shares memory with scales_out"):
        tier.fetch(memory[:5], memory[100:105], memory[104:109])


def test_file_tier_failure_is_not_cached(io, tmp_path):
    file = File(tmp_path / "t", offset=0)
    reader = open_reader(file.path, io=io)
    tier = reader.tier(file.extent, file.scale_extent, 1 << 20)
    inject_faults(reader, bad_begin=0, bad_end=file.size)
    for _ in range(3):
        with pytest.raises(OSError, match="row 0 at byte 0"):
            file.fetch(tier, [0, 1, 2])
    assert tier.stats()["cached_rows"] == 0
    inject_faults(reader)
    file.check(tier, [0, 1, 2])
