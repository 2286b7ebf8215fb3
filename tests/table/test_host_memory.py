"""Memory of a table: exactly as large as asked, in huge pages, placed, pinned chunk by chunk; never more than one copy."""
import ctypes
import gc
import os
import re
import subprocess
import sys

import pytest
import torch
from format_cases import table_options

from engram_kernels import capacity
from engram_kernels._library import COMPILE_ERROR
from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.table import host_memory
from engram_kernels.table.row_table import ROW_FORMATS, RowTable
from engram_kernels.testing import random_rows

if not COMPILE_ERROR:
    from engram_kernels import _C

pytestmark = pytest.mark.usefixtures("compiled")
MIB = 1 << 20
HUGE = 2 * MIB
HUGE_PAGES = capacity.SYSTEM.read("/sys/kernel/mm/transparent_hugepage/enabled")


def num_maps():
    with open("/proc/self/maps") as maps:
        return sum(1 for _ in maps)


def run(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_host_memory_copy_equals_tensor(row_format):
    rows, scales = random_rows(row_format, 3001, 96, torch.Generator().manual_seed(0))
    wide = torch.cat([rows, rows], 1)[:, :rows.shape[1]]  # rows that lie apart
    table = RowTable.from_tensor(wide, scales, row_format, copy=True, row_dim=96, **table_options(row_format))
    ids = torch.randint(-1, 3001, (40, 7), generator=torch.Generator().manual_seed(1))
    want = gather_rows(RowTable.from_tensor(rows, scales, row_format, row_dim=96, **table_options(row_format)), ids)
    assert torch.equal(gather_rows(table, ids).view(torch.int16), want.view(torch.int16))
    assert table.rows.is_contiguous() and table.rows.data_ptr() % HUGE == 0
    stats = table.memory_stats()
    layout = host_memory.TableLayout.of(row_format, 3001, rows.shape[1], 96)
    exact = rows.nbytes + (0 if scales is None else scales.nbytes)
    assert exact <= stats["bytes"] == layout.num_bytes < exact + 64
    assert stats["pinned_bytes"] == 0 and "name" not in stats


@pytest.mark.parametrize("num_rows", [0, 1])
def test_host_memory_of_next_to_nothing(num_rows):
    table = RowTable.from_tensor(torch.ones(num_rows, 8), row_format="f32", copy=True)
    assert table.num_rows == num_rows and (gather_rows(table, torch.tensor([-1] + [0] * num_rows)) == torch.tensor(
        [[0.0]] + [[1.0]] * num_rows)).all()
    assert RowTable.from_tensor(torch.ones(2, 8), row_format="f32").memory_stats() == {}


@pytest.mark.alone
def test_host_memory_takes_what_it_needs(compiled):
    """130 MiB and a bit: a power of two would be 256."""
    weight = torch.ones(130 * MIB // 512 + 3, 256, dtype=torch.bfloat16)
    stats = RowTable.from_tensor(weight, copy=True).memory_stats()
    assert stats["bytes"] == weight.nbytes and stats["mapped_bytes"] < weight.nbytes + HUGE
    assert weight.nbytes <= stats["resident_bytes"] <= stats["mapped_bytes"]
    assert sum(stats["numa_pages"].values()) in (0, 256)
    if stats["pages"] == "transparent" and ("[always]" in HUGE_PAGES or "[madvise]" in HUGE_PAGES):
        assert stats["huge_bytes"] > 0.5 * weight.nbytes  # nearly all, where memory is not in small pieces
    elif stats["pages"] == "explicit":
        assert stats["huge_bytes"] == stats["mapped_bytes"]


@pytest.mark.alone
def test_host_memory_in_explicit_huge_pages(compiled):
    if capacity.huge_pool_bytes() < 24 * MIB:
        pytest.skip("this machine has no free explicit huge pages (vm.nr_hugepages)")
    before = capacity.huge_pool_bytes()
    host = _C.HostMemory(24 * MIB - 5)
    assert host.pages == "explicit" and host.usage() == (24 * MIB, 24 * MIB) and host.mapped_bytes == 24 * MIB
    assert before - capacity.huge_pool_bytes() == 24 * MIB
    del host
    assert capacity.huge_pool_bytes() == before
    assert _C.HostMemory(MIB).pages == "small"  # a huge page would be half empty
    assert _C.HostMemory(before + HUGE).pages == "transparent"  # more than there are


def test_host_memory_gives_its_memory_back():
    table = RowTable.from_tensor(torch.ones(100, 8), row_format="f32", copy=True)
    del table
    gc.collect()
    before = num_maps()
    for _ in range(200):
        host_memory.make_host_memory(5 * MIB)
    gc.collect()
    assert num_maps() < before + 20  # what an allocator may take meanwhile


def test_host_memory_lives_as_long_as_its_rows():
    rows = RowTable.from_tensor(torch.arange(800.0).view(100, 8), row_format="f32", copy=True).rows[50:]
    gc.collect()
    assert torch.equal(rows, torch.arange(400.0, 800.0).view(50, 8))


def test_host_memory_overrun_is_a_fault(compiled):
    """The page after the table, and the page before it."""
    for at in (4096, -1):
        result = run("import ctypes, torch\nfrom engram_kernels import _C\nhost = _C.HostMemory(4096)\n"
                     "start = torch.frombuffer(host, dtype=torch.uint8).data_ptr()\n"
                     f"print('ready', flush=True)\nctypes.c_char.from_address(start + {at}).value\nprint('read')")
        assert result.stdout == "ready\n" and result.returncode == (1 if _C.sanitized else -11)


@pytest.mark.parametrize("options, message", [
    ((0,), "bytes is 0, expected"), ((-1,), "bytes is -1"), ((1 << 46,), "bytes is 70368744177664"),
    ((1, [-1]), "numa node is -1"), ((1, [1024]), r"numa node is 1024, expected \[0, 1024\)"),
    ((1, [], 0, 4096), "fd_offset is 4096, expected a multiple of 2097152")])
def test_host_memory_rejects(options, message, compiled):
    with pytest.raises(ValueError, match=f"HostMemory: {message}"):
        _C.HostMemory(*options)


def test_host_memory_errors_name_the_step(compiled):
    before = num_maps()
    for _ in range(20):
        with pytest.raises(OSError, match="bytes of a segment cannot be mapped: Bad file descriptor"):
            _C.HostMemory(4096, [], 9999)
        with pytest.raises(OSError, match="memory cannot be placed on NUMA nodes 1023: "):
            _C.HostMemory(4096, [1023])
    assert num_maps() < before + 20  # what an allocator may take meanwhile
    if _C.sanitized:
        return  # its shadow takes more addresses than a limit could spare
    result = run("""
import resource
from engram_kernels import _C
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20),) * 2)
try:
    _C.HostMemory(64 << 20)
except OSError as err:
    print(err)
""")
    assert re.fullmatch(r"\[Errno 12\] HostMemory: \d+ bytes of addresses cannot be had: Cannot allocate memory\n", result.stdout)


def fake_nodes(monkeypatch, allowed, with_memory):
    files = {"/proc/self/status": f"Mems_allowed:\tff\nMems_allowed_list:\t{allowed}\n",
             "/sys/devices/system/node/has_memory": f"{with_memory}\n"}
    fake = capacity.System()
    monkeypatch.setattr(fake, "read", lambda path: files.get(path, ""))
    monkeypatch.setattr(capacity, "SYSTEM", fake)


@pytest.mark.parametrize("allowed, with_memory, all_nodes", [
    ("0", "0", []), ("0-1", "0-1", [0, 1]), ("0-7", "0-1,4,6-7", [0, 1, 4, 6, 7]), ("3", "0-3", []), ("", "", [])])
def test_host_memory_nodes(allowed, with_memory, all_nodes, monkeypatch):
    fake_nodes(monkeypatch, allowed, with_memory)
    assert host_memory.nodes_for(None) == all_nodes
    last = int(with_memory[-1]) if with_memory else 0
    assert host_memory.nodes_for(last) == ([last] if with_memory else [])
    for wrong in (99, -1, True, "0"):
        with pytest.raises(ValueError, match=r"numa is .*, expected one of the nodes with memory, \["):
            RowTable.from_tensor(torch.ones(3, 8), row_format="f32", copy=True, numa=wrong)


def test_host_memory_is_placed_on_a_node(compiled):
    nodes = host_memory._node_list("/sys/devices/system/node/has_memory", "")
    if not nodes:
        pytest.skip("this machine names no NUMA nodes")
    table = RowTable.from_tensor(torch.ones(1000, 1024), row_format="f32", copy=True, numa=max(nodes))
    assert table.memory_stats()["numa_pages"] == {max(nodes): 256}
    with open("/proc/self/numa_maps") as maps:
        policy = [line for line in maps if line.startswith(f"{table.rows.data_ptr():x} ")]
    assert policy == [] or f" prefer:{max(nodes)} " in policy[0] or f" prefer (many):{max(nodes)} " in policy[0]
    spread = _C.HostMemory(8 * MIB, sorted(nodes))
    torch.frombuffer(spread, dtype=torch.uint8).fill_(1)
    assert set(dict(spread.pages_by_node())) == nodes


class Device:
    """A device runtime that records what is registered, and refuses the call that it is told to."""

    def __init__(self, refuse=None):
        self.refuse, self.calls, self.registered, self.text = refuse, 0, {}, ctypes.create_string_buffer(b"out of pins")
        kinds = ((self.take, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t), (self.drop, ctypes.c_int, ctypes.c_void_p),
                 (lambda error: ctypes.addressof(self.text), ctypes.c_void_p, ctypes.c_int))
        self.functions = [ctypes.CFUNCTYPE(*types)(function) for function, *types in kinds]
        self.registrar = _C.HostRegistrar(*(ctypes.cast(f, ctypes.c_void_p).value for f in self.functions))

    def take(self, pointer, num_bytes):
        self.calls += 1
        if self.calls == self.refuse:
            return 2
        assert pointer not in self.registered
        self.registered[pointer] = num_bytes
        return 0

    def drop(self, pointer):
        del self.registered[pointer]
        return 0


def test_host_memory_is_pinned_in_chunks(compiled):
    device, host = Device(), _C.HostMemory(11 * MIB + 5)
    start = torch.frombuffer(host, dtype=torch.uint8).data_ptr()
    host.pin(device.registrar, 4 * MIB)
    assert device.registered == {start: 4 * MIB, start + 4 * MIB: 4 * MIB, start + 8 * MIB: 3 * MIB + 4096}
    assert host.pinned_bytes == host.mapped_bytes == 11 * MIB + 4096  # not 16 MiB
    host.pin(device.registrar, 4 * MIB)
    assert device.calls == 3  # it is pinned already
    host.unpin()
    assert device.registered == {} and host.pinned_bytes == 0
    host.pin(device.registrar)
    assert device.registered == {start: 11 * MIB + 4096}
    del host
    assert device.registered == {}  # before the memory goes
    for wrong in (0, 4096, -HUGE):
        with pytest.raises(ValueError, match=f"chunk_bytes is {wrong}, expected a multiple"):
            _C.HostMemory(4096).pin(device.registrar, wrong)


@pytest.mark.parametrize("refuse", [1, 3])
def test_host_memory_that_cannot_be_pinned_stays_unpinned(refuse, compiled):
    device, host = Device(refuse), _C.HostMemory(11 * MIB)
    begin = (refuse - 1) * 4 * MIB
    end = min(begin + 4 * MIB, 11 * MIB)
    with pytest.raises(OSError, match=rf"bytes {begin}..{end} of {11 * MIB} cannot be pinned: out of pins"):
        host.pin(device.registrar, 4 * MIB)
    assert device.registered == {} and host.pinned_bytes == 0
    host.pin(device.registrar, 4 * MIB)
    assert len(device.registered) == 3


def test_host_memory_pin_says_what_is_missing(compiled):
    with pytest.raises(ValueError, match="RowTable.pin: the table has no memory of its own"):
        RowTable.from_tensor(torch.ones(3, 8), row_format="f32").pin()
    table = RowTable.from_tensor(torch.ones(3, 8), row_format="f32", copy=True)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="RowTable.pin: memory is pinned for a GPU; "):
            table.pin()
    table.pin(_C.HostRegistrar())  # without a device nothing is registered, and nothing locked
    assert table.memory_stats()["pinned_bytes"] == 4096
    with open("/proc/self/status") as status:
        assert "VmLck:\t       0 kB" in status.read()


def test_host_memory_after_a_fork(compiled):
    """A child reads the rows, and leaves the registration of its parent alone."""
    device = Device()
    table = RowTable.from_tensor(torch.arange(80.0).view(10, 8), row_format="f32", copy=True)
    table.pin(device.registrar)
    child = os.fork()
    if child == 0:
        whole = bool((gather_rows(table, torch.tensor([9, 0]), torch.float32) == torch.arange(80.0).view(10, 8)[[9, 0]]).all())
        table._memory.unpin()
        os._exit(0 if whole and len(device.registered) == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(device.registered) == 1
    table._memory.unpin()
    assert device.registered == {}


def test_host_memory_is_the_only_copy(compiled):
    """Peak memory of a copy is the copy: 192 MiB of a table of 192 MiB."""
    script = """
import torch, engram_kernels as ek
def peak_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
weight = torch.ones(192 << 11, 256, dtype=torch.bfloat16)
ek.RowTable.from_tensor(weight[:1000], copy=True)
before = peak_kib()
table = ek.RowTable.from_tensor(weight, copy=True)
print(peak_kib() - before)
"""
    result = run(script)
    assert result.stderr == "" and 185 << 10 < int(result.stdout) < 200 << 10
