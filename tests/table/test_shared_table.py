"""Tables that processes share: equal to their source, verified, one copy, counted, gone with the last user."""
import contextlib
import gc
import os
import subprocess
import sys
import threading

import pytest
import torch
from format_cases import table_options

from engram_kernels import capacity
from engram_kernels._library import COMPILE_ERROR
from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.table import host_memory, shared_segment, shared_table
from engram_kernels.table.row_table import ROW_FORMATS, RowTable
from engram_kernels.testing import random_rows

if not COMPILE_ERROR:
    from engram_kernels import _C

pytest_plugins = ("shared_worker",)
pytestmark = pytest.mark.usefixtures("compiled")
R, D = 3001, 64
IDS = torch.randint(-1, R, (40, 7), generator=torch.Generator().manual_seed(1))


def table_of(row_format="bf16", seed=0, num_rows=R, **options):
    rows, scales = random_rows(row_format, num_rows, D, torch.Generator().manual_seed(seed))
    return RowTable.from_tensor(rows, scales, row_format, row_dim=D, **table_options(row_format), **options)


def same_rows(a, b):
    stored = zip(a.read_rows(torch.arange(a.num_rows)), b.read_rows(torch.arange(b.num_rows)), strict=True)
    return all(x is y is None or torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in stored) and torch.equal(
        gather_rows(a, IDS % a.num_rows).view(torch.int16), gather_rows(b, IDS % b.num_rows).view(torch.int16))


def segments(directory):
    return sorted(os.listdir(directory))


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_shared_table_equals_its_source(row_format, shm, tmp_path):
    source = table_of(row_format, zero_scale_is_zero=True)
    file = RowTable.create(tmp_path / "t", source.rows, source.scales, row_format, row_dim=D, zero_scale_is_zero=True,
                           **table_options(row_format))
    for table in (source, file):
        shared = table.share("t", directory=shm)
        attached = RowTable.attach("t", like=file, directory=shm)
        for one in (shared, attached):
            assert same_rows(one, source) and one.tier == "host" and one.zero_scale_is_zero and one.path is None
            assert one.fingerprint() == source.fingerprint() == file.fingerprint()
            assert (one.row_format, one.row_dim, one.num_rows, one.row_bytes) == (row_format, D, R, source.row_bytes)
        assert shared.memory_stats()["users"] == 2 and repr(shared).endswith("tier='host', shared as 't')")
        del shared, one, attached
        gc.collect()
        assert segments(shm) == []


def test_shared_table_of_padded_and_sliced_rows(shm):
    rows, _ = random_rows("fp8_e4m3_block32_packed", R, D, torch.Generator().manual_seed(0))
    wide = torch.cat([rows, rows, rows], 1)[:, :rows.shape[1] + 14]
    source = RowTable.from_tensor(wide, row_format="fp8_e4m3_block32_packed", row_dim=D)
    shared = source.share("padded", directory=shm)
    assert shared.rows.shape == wide.shape and shared.rows.is_contiguous() and torch.equal(shared.rows, wide)
    assert same_rows(shared, source)


@pytest.mark.parametrize("num_rows", [0, 1, 1024, 1025])
def test_shared_table_of_few_rows(num_rows, shm):
    source = table_of("int8_group32", num_rows=num_rows)
    attached = [source.share("few", directory=shm), RowTable.attach("few", source, directory=shm)][1]
    assert torch.equal(attached.rows, source.rows) and torch.equal(attached.scales, source.scales)


def test_shared_table_takes_what_it_needs(compiled, shm):
    shared = table_of(num_rows=100_000).share("t", directory=shm)
    stats = shared.memory_stats()
    assert stats["bytes"] == 100_000 * 128 and stats["name"] == "t" and stats["users"] == 1
    info = os.stat(shm / "engram-t")
    assert info.st_blocks * 512 <= 100_000 * 128 + 2 * 4096  # the manifest's page, and the end of the last one
    gather_rows(shared, torch.arange(100_000))
    assert shared.memory_stats()["resident_bytes"] == -(-100_000 * 128 // 4096) * 4096


def test_shared_table_by_another_process(worker, shm):
    source = table_of("fp8_e4m3_block32")
    shared = source.share("t", directory=shm)
    other = worker()
    assert other.do("t = RowTable.attach('t', directory=shm)") == "done"
    torch.save(IDS, shm / "ids")
    other.do("torch.save(gather_rows(t, torch.load(f'{shm}/ids')), f'{shm}/rows')")
    assert torch.equal(torch.load(shm / "rows").view(torch.int16), gather_rows(source, IDS).view(torch.int16))
    os.unlink(shm / "ids")
    os.unlink(shm / "rows")
    assert shared.memory_stats()["users"] == 2 and other.do("t.memory_stats()['users']") == "2"
    assert other.do("t.fingerprint()") == repr(source.fingerprint())
    del shared
    assert segments(shm) == ["engram-t"] and other.do("t.memory_stats()['users']") == "1"
    assert other.do("int(t.rows[5, 5])") == str(int(source.rows[5, 5]))
    assert other.do("del t\ngc.collect()") == "done" and segments(shm) == []


def test_shared_table_goes_with_a_program_that_ends(shm):
    """A program that ends with its table in use removes the segment."""
    script = ("import os, sys, torch\nfrom engram_kernels.table.row_table import RowTable\n"
              "table = RowTable.from_tensor(torch.ones(9, 8), row_format='f32').share('t', directory=sys.argv[1])\n"
              "print(os.listdir(sys.argv[1]))")
    result = subprocess.run([sys.executable, "-c", script, str(shm)], capture_output=True, text=True, timeout=120)
    assert result.stdout == "['engram-t']\n" and result.stderr == "" and segments(shm) == []


def test_shared_table_of_all_processes_that_call_share(worker, shm, tmp_path):
    """One fills, the others wait for it: the source is read once."""
    source = table_of("fp8_e4m3_block32", num_rows=50_000)
    RowTable.create(tmp_path / "t", source.rows, source.scales, "fp8_e4m3_block32")
    workers = [worker() for _ in range(3)]
    for one in workers:
        one.do("fill = shared_table._fill")
        one.do("shared_table._fill = lambda *args: (time.sleep(0.5), filled.append(1), fill(*args))")
        one.do("filled = []")
        one.do(f"file = RowTable.open({str(tmp_path / 't')!r})")
    for one in workers:
        one.send("t = file.share('t', directory=shm)")
    assert [one.answer() for one in workers] == ["done"] * 3
    assert sum(int(one.do("len(filled)")) for one in workers) == 1
    attached = RowTable.attach("t", source, directory=shm)
    assert same_rows(attached, source) and attached.memory_stats()["users"] == 4
    for one in workers:
        one.end()
    assert attached.memory_stats()["users"] == 1
    assert torch.equal(attached.rows, source.rows)


def test_shared_table_by_a_name_in_use(shm):
    shared = table_of().share("t", directory=shm)
    again = table_of().share("t", directory=shm)  # the same table
    assert again.rows.data_ptr() != shared.rows.data_ptr() and shared.memory_stats()["users"] == 2
    other = RowTable.from_tensor(torch.zeros(R, 32), row_format="f32")
    for table, message in ((table_of(num_rows=R + 1), f"num_rows is {R}, expected {R + 1} "),
                           (table_of(seed=1), "fingerprint is [0-9a-f]{32}, expected [0-9a-f]{32} "),
                           (other, "row_format is bf16, expected f32, row_dim is 64, expected 32, width is 64, expected 32 "),
                           (table_of(zero_scale_is_zero=True), "zero_scale_is_zero is False, expected True ")):
        with pytest.raises(FileExistsError, match=rf"RowTable.share: \S*engram-t holds another table: {message}"
                                                  rf"\(shared by process {os.getpid()}, which is running\)"):
            table.share("t", directory=shm)
        with pytest.raises(ValueError, match=rf"RowTable.attach: \S*engram-t holds another table: {message}"):
            RowTable.attach("t", like=table, directory=shm)
    assert shared.memory_stats()["users"] == 2 and same_rows(shared, table_of())
    with pytest.raises(ValueError, match="fingerprint is .*, expected 123"):
        RowTable.attach("t", fingerprint="123", directory=shm)
    assert RowTable.attach("t", fingerprint=shared.fingerprint(), directory=shm).num_rows == R


@pytest.mark.parametrize("convert", ["float", "half"])
def test_shared_table_of_a_parameter_that_was_converted(convert, shm):
    """The bytes of another dtype were taken for rows of the format."""
    layer = torch.nn.Module()
    layer.rows = torch.nn.Parameter(torch.randn(R, D).to(torch.bfloat16))
    table = RowTable.from_tensor(layer.rows, row_format="bf16")
    shared = table.share("t", directory=shm)
    getattr(layer, convert)()
    message = f"weight must be torch.bfloat16, got {layer.rows.dtype}"
    for op, call in (("RowTable.share", lambda: table.share("other", directory=shm)),
                     ("RowTable.read_rows", lambda: table.read_rows(torch.tensor([1]))),
                     ("RowTable.read_rows", table.fingerprint),
                     ("RowTable.read_rows", lambda: RowTable.attach("t", like=table, directory=shm))):
        with pytest.raises(ValueError, match=f"{op}: {message}"):
            call()
    assert sorted(os.listdir(shm)) == ["engram-t"] and shared.memory_stats()["users"] == 1


def test_shared_table_by_a_name_in_use_with_another_revision_of_the_file(compiled, shm, tmp_path):
    """The fingerprint looks at 1,024 rows of 3,001: here it is the same, and row 1 is not."""
    rows = torch.zeros(R, D, dtype=torch.bfloat16)
    table = RowTable.create(tmp_path / "t", rows)
    shared = table.share("t", directory=shm)
    assert same_rows(RowTable.open(tmp_path / "t").share("t", directory=shm), shared)
    copy = RowTable.create(tmp_path / "copy", rows)  # of another path, nothing but the rows is known
    assert same_rows(copy.share("t", directory=shm), shared)
    rows[1] = 1
    revised = RowTable.create(tmp_path / "t", rows)
    assert revised.fingerprint() == table.fingerprint()
    with pytest.raises(FileExistsError, match="the file is .*/t .*, expected .*/t .*another table is in use by this name"):
        revised.share("t", directory=shm)
    with pytest.raises(ValueError, match="holds another table: the file is"):
        RowTable.attach("t", like=revised, directory=shm)
    del shared


@pytest.mark.parametrize("name", ["", "a/b", ".", "..", ".hidden", "a b", "ä", "x" * 129, "a.tmp", None, "a\0"])
def test_shared_table_names(name, shm):
    for call in (lambda: table_of().share(name, directory=shm), lambda: RowTable.attach(name, directory=shm)):
        with pytest.raises(ValueError, match="name is .*, expected 1 to 128 of letters"):
            call()


def test_shared_table_that_is_not_there(shm):
    with pytest.raises(FileNotFoundError, match="RowTable.attach: no process shares a table by this name: '.*engram-t'"):
        RowTable.attach("t", directory=shm)
    with pytest.raises(FileNotFoundError, match="RowTable.share: cannot be created: No such file or directory"):
        table_of().share("t", directory=shm / "missing")
    assert RowTable.unlink_stale(shm / "missing") == []


def test_shared_table_is_waited_for(worker, shm):
    other = worker()
    other.send("t = RowTable.attach('t', timeout_s=60, directory=shm)")
    shared = table_of().share("t", directory=shm)
    assert other.answer() == "done" and shared.memory_stats()["users"] == 2
    other.end()


def test_shared_table_still_being_filled(shm):
    source = table_of()
    path = shared_segment.segment_path("", "t", shm)
    fd = shared_segment.create("", path, shared_table.describe(source))  # as a process that has come that far
    for call in (lambda s: RowTable.attach("t", timeout_s=s, directory=shm),
                 lambda s: source.share("t", timeout_s=s, directory=shm)):
        for timeout_s in (0, 0.1):
            with pytest.raises(TimeoutError, match=r"another process still fills it after \d+\.\d s: '.*engram-t'"):
                call(timeout_s)
    assert RowTable.unlink_stale(shm) == []
    shared_segment.release(fd, path)


def test_shared_table_after_a_fork(worker, shm):
    """A child reads on, and neither its end nor its exit handlers take the segment from its parent."""
    source = table_of()
    shared = source.share("t", directory=shm)
    parent = worker()
    parent.do("t = RowTable.attach('t', directory=shm)")
    for leave in ("pass", "weakref.finalize._exitfunc()"):
        assert parent.do("pid = os.fork()\nif pid == 0:\n"
                         "    got = int(gather_rows(t, torch.tensor([7])).view(torch.int16)[0, 3])\n"
                         f"    {leave}\n    del t\n    gc.collect()\n"
                         f"    os._exit(0 if got == {int(source.rows.view(torch.int16)[7, 3])} else 3)") == "done"
        assert parent.do("os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])") == "0"
        assert shared.memory_stats()["users"] == 2 and segments(shm) == ["engram-t"]
    # the lock is one: the parent's end takes the name, the child's rows stay
    parent.do("r, w = os.pipe()\nr2, w2 = os.pipe()\npid = os.fork()\nif pid == 0:\n    os.read(r, 1)\n"
              "    os.write(w2, b'y' if int(t.rows[:].view(torch.int16).long().sum()) == "
              f"{int(source.rows.view(torch.int16).long().sum())} else b'n')\n    os._exit(0)")
    del shared
    assert parent.do("del t\ngc.collect()") == "done" and segments(shm) == []
    assert parent.do("os.write(w, b'x')") == "1" and parent.do("os.read(r2, 1)") == "b'y'"
    parent.do("os.waitpid(pid, 0)")


def test_shared_table_does_not_leak(shm):
    """Hundreds of times shared and attached: no descriptor, no mapping, no file more."""
    source = table_of(num_rows=50)

    def counts():
        gc.collect()
        with open("/proc/self/maps") as file:
            maps = file.readlines()
        return set(os.listdir("/proc/self/fd")), len(maps), [line for line in maps if str(shm) in line] + segments(shm)

    source.share("t", directory=shm)
    before = counts()
    for _ in range(300):
        shared = source.share("t", directory=shm)
        attached = RowTable.attach("t", directory=shm)
        assert attached.rows[3, 3] == source.rows[3, 3]
        del shared, attached
    after = counts()
    # what other tests left may go meanwhile, and an allocator take a mapping or two; that of a sanitizer takes them all the time
    allowed = 250 if not COMPILE_ERROR and _C.sanitized else 100
    assert after[0] <= before[0] and after[1] < before[1] + allowed and after[2] == before[2] == []


def test_shared_table_shows_how_far_it_is(shm, monkeypatch):
    shown, source = [], table_of("fp8_e4m3_block32")
    monkeypatch.setattr(shared_table, "_FILL_BYTES", 100 * source.row_bytes)

    @contextlib.contextmanager
    def progress(what, total):
        shown.append((what, total))
        yield shown.append
    shared = source.share("t", directory=shm, progress=progress)
    assert shown[0] == ("share", R) and sum(shown[1:]) == R and sorted(shown[1:]) == [1] + [100] * 30
    assert same_rows(shared, source)


def test_shared_table_last_piece_is_copied_behind_the_end(shm, monkeypatch):
    """A thread that finds no piece left does not stop one that has taken the last and not begun."""
    class Late:
        def __init__(self, pieces):
            self.pieces, self.lock, self.ended = list(pieces), threading.Lock(), threading.Event()

        def __iter__(self):
            return self

        def __next__(self):
            with self.lock:
                piece = self.pieces.pop(0) if self.pieces else None
                is_last = not self.pieces
            if piece is None:
                threading.Timer(0.05, self.ended.set).start()
                raise StopIteration
            if is_last:
                assert self.ended.wait(60)
            return piece

    monkeypatch.setattr(shared_table, "_FILL_BYTES", 20_000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(2))
    monkeypatch.setattr(shared_table, "iter", Late, raising=False)
    source = table_of()
    assert same_rows(source.share("t", directory=shm), source)


@pytest.mark.alone
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("huge", ["advise", "always"])
def test_shared_table_in_huge_pages(huge, compiled, shm, request):
    """Where the file system gives them. A segment that does not fit is an error there too, not a signal."""
    (shm / "mounted").mkdir()
    request.addfinalizer((shm / "mounted").rmdir)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=32m,huge={huge}", "none", shm / "mounted"], capture_output=True)
    if mount.returncode != 0:
        pytest.skip(f"no mount: {mount.stderr.decode().strip()}")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", shm / "mounted"], check=True))
    with (shm / "mounted" / "probe").open("w+b") as probe:
        probe.truncate(8 << 20)
        memory = host_memory.make_host_memory(8 << 20, None, probe.fileno())
        memory.populate(0, 8 << 20)
        huge_in_probe = memory.usage()[1]
        del memory
    (shm / "mounted" / "probe").unlink()
    source = table_of("fp8_e4m3_block32", num_rows=200_001)
    shared = source.share("t", directory=shm / "mounted")
    assert torch.equal(shared.rows, source.rows) and torch.equal(shared.scales, source.scales)
    if huge_in_probe == 0:
        pytest.skip("the system gives no huge pages now")
    assert shared.memory_stats()["huge_bytes"] >= 2 << 20
    monkeypatch = pytest.MonkeyPatch()
    request.addfinalizer(monkeypatch.undo)
    monkeypatch.setattr(capacity, "check_directory", lambda *args: None)
    with pytest.raises(OSError, match="No space left|cannot be"):
        table_of(num_rows=200_000).share("too_large", directory=shm / "mounted")
    assert segments(shm / "mounted") == ["engram-t"]


def test_shared_table_is_the_only_copy(compiled, shm, tmp_path):
    """Sharing a file of 192 MiB: what the process holds privately grows by the reader's buffers, not by the table."""
    rows = torch.ones(192 << 11, 256, dtype=torch.bfloat16)
    rows[:, 0] = torch.arange(192 << 11).bfloat16()
    RowTable.create(tmp_path / "t", rows)
    script = f"""
import sys, threading, torch
from engram_kernels.table.row_table import RowTable
def status(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))
torch.set_num_threads(1)
small = RowTable.open({str(tmp_path / "t")!r})
small.read_rows(torch.arange(10_000))
private, peak = status("RssAnon"), status("VmHWM")
shared = RowTable.open({str(tmp_path / "t")!r}).share("t", directory={str(shm)!r})
print(status("VmHWM") - peak, status("RssAnon") - private)
attached = RowTable.attach("t", directory={str(shm)!r})
assert int(attached.rows[-1, 0]) == int(shared.rows[-1, 0])
print(status("RssAnon") - private)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert result.stderr == ""
    peak, after_share, after_attach = map(int, result.stdout.split())
    assert peak < 225 << 10  # the segment itself, where it was touched, and 33 MiB
    assert after_share < 24 << 10 and after_attach < 24 << 10
