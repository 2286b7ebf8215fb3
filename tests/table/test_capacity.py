"""Capacity: each limit refuses, in words that say what is missing; what cannot be read refuses nothing."""
import ctypes
import errno
import os
import re

import pytest
import torch

from engram_kernels import capacity
from engram_kernels._library import COMPILE_ERROR
from engram_kernels.capacity import CapacityError
from engram_kernels.table import pack
from engram_kernels.table.row_table import RowTable
from engram_kernels.testing import random_rows

ROWS = torch.ones(1000, 256)  # 1,024,000 bytes
MIB = 1 << 20


class Fake(capacity.System):
    """A system of files, free bytes and limits that a test states."""

    def __init__(self, files=None, free=None, limits=None):
        self.files, self.free, self.limits, self.asked = files or {}, free, limits or {}, []

    def read(self, path):
        return self.files.get(path, "")

    def free_bytes(self, directory):
        self.asked.append(str(directory))
        return self.free

    def limit(self, name):
        return self.limits.get(name)


@pytest.fixture
def system(monkeypatch):
    """Installs a fake."""
    def install(**what):
        fake = Fake(**what)
        monkeypatch.setattr(capacity, "SYSTEM", fake)
        return fake
    return install


def meminfo(available_kib=1 << 30, free_pages=0, reserved=0, page_kib=2048):
    return (f"MemTotal: 99 kB\nMemAvailable:   {available_kib} kB\nHugePages_Free: {free_pages}\nHugePages_Rsvd: {reserved}\n"
            f"Hugepagesize:  {page_kib} kB\n")


def v2(limit, used, cached=0, folder="/sys/fs/cgroup"):
    return {f"{folder}/memory.max": f"{limit}\n", f"{folder}/memory.current": f"{used}\n",
            f"{folder}/memory.stat": f"anon 5\ninactive_file {cached // 2}\nactive_file {cached - cached // 2}\n"}


V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = ("31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n32 31 0:29 {root} /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
            "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n")
V1 = {"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes": "1000000\n",
      "/sys/fs/cgroup/memory{path}/memory.usage_in_bytes": "600000\n",
      "/sys/fs/cgroup/memory{path}/memory.stat": "inactive_file 7\ntotal_inactive_file 50000\ntotal_active_file 50000\n"}


def v1(path, cgroup, root):
    return {"/proc/self/cgroup": f"9:cpu:/x\n4:memory:{cgroup}\n0::/\n", "/proc/self/mountinfo": V1_MOUNT.format(root=root),
            **{name.format(path=path): text for name, text in V1.items()}}


NO_ROOM = {  # name: files, limits, which limit the message names, bytes that it leaves
    "ram": ({"/proc/meminfo": meminfo(500)}, {}, r"RAM \(MemAvailable\)", 500 << 10),
    "cgroup_v2": ({"/proc/self/cgroup": "0::/\n", "/proc/self/mountinfo": V2_MOUNT, **v2(2_000_000, 1_500_000)}, {},
                  "the memory limit of cgroup / ", 500_000),
    "cgroup_v2_page_cache_counts_as_free": (
        {"/proc/self/cgroup": "0::/\n", "/proc/self/mountinfo": V2_MOUNT, **v2(2_000_000, 1_500_000, 400_000)}, {},
        "the memory limit of cgroup / ", 900_000),
    "cgroup_v2_of_a_parent": ({"/proc/self/cgroup": "0::/a/b/c\n", "/proc/self/mountinfo": V2_MOUNT, **v2(9_000_000, 10),
                               **v2("max", 5, folder="/sys/fs/cgroup/a/b/c"), **v2(700_000, 1, folder="/sys/fs/cgroup/a/b")}, {},
                              "the memory limit of cgroup /a/b ", 699_999),
    "cgroup_v2_over_its_limit": ({"/proc/self/cgroup": "0::/\n", "/proc/self/mountinfo": V2_MOUNT, **v2(1000, 1500)}, {},
                                 "the memory limit of cgroup / ", 0),
    "cgroup_v1": (v1("/api/x", "/api/x", "/"), {}, "the memory limit of cgroup /api/x ", 500_000),
    "cgroup_v1_in_a_container": (v1("", "/docker/abc", "/docker/abc"), {}, "the memory limit of cgroup / ", 500_000),
    "cgroup_namespace": (v1("", "/../../x", "/other"), {}, "the memory limit of cgroup / ", 500_000),
    "address_space": ({"/proc/self/status": "VmSize:   1000 kB\n"}, {"RLIMIT_AS": 1_524_000}, "RLIMIT_AS ", 500_000),
    "the_tightest_of_two": ({"/proc/meminfo": meminfo(900), "/proc/self/status": "VmSize: 0 kB\n"}, {"RLIMIT_AS": 1000},
                            "RLIMIT_AS ", 1000),
    "a_huge_page_pool_too_small": ({"/proc/meminfo": meminfo(500, 3, 3)}, {}, "RAM ", 500 << 10),
    "a_huge_page_pool_of_another_size": ({"/proc/meminfo": meminfo(500, 9, 0, 1 << 20)}, {}, "RAM ", 500 << 10),
}


@pytest.mark.parametrize("files, limits, name, left", NO_ROOM.values(), ids=NO_ROOM.keys())
def test_capacity_of_memory(files, limits, name, left, system):
    system(files=files, limits=limits)
    size = capacity.size_text(left)
    missing = capacity.size_text(1_024_000 - left)
    with pytest.raises(CapacityError) as caught:
        RowTable.from_tensor(ROWS, row_format="f32", copy=True)
    assert caught.value.errno == errno.ENOMEM and isinstance(caught.value, OSError)
    text = str(caught.value)
    assert "RowTable.from_tensor: a copy of 1000 rows needs 1000.0 KiB (1024000 bytes), " in text
    assert f" leaves {size}, {missing} are missing: " in text and re.search(name, text), text


ROOM = {
    "nothing_known": {},
    "ram": {"/proc/meminfo": meminfo(1000)},
    "explicit_huge_pages": {"/proc/meminfo": meminfo(0, 2, 1)},
    "no_limit": {"/proc/self/cgroup": "0::/a\n", "/proc/self/mountinfo": V2_MOUNT, **v2("max", 5),
                 **v2("max", 5, folder="/sys/fs/cgroup/a")},
    "no_limit_v1": {**v1("", "/", "/"), "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"},
    "garbage": {"/proc/meminfo": "MemAvailable: much\n",
                "/proc/self/cgroup": "::\n\nx\n4:memory\n", "/proc/self/mountinfo": "a - b\n\n"},
}


@pytest.mark.parametrize("files", ROOM.values(), ids=ROOM.keys())
def test_capacity_where_there_is_room(files, system):
    system(files=files)
    assert torch.equal(RowTable.from_tensor(ROWS, row_format="f32", copy=True).rows, ROWS)


def test_capacity_is_not_asked_without_a_copy(system):
    system(files={"/proc/meminfo": meminfo(0)})
    assert RowTable.from_tensor(ROWS, row_format="f32").num_rows == 1000


def test_capacity_of_this_machine():
    rooms = capacity.memory_room()
    assert rooms and all(room.available_bytes >= 0 for room in rooms)
    assert capacity.SYSTEM.free_bytes("/") > 0 and capacity.SYSTEM.free_bytes("/no/such") is None
    with pytest.raises(CapacityError, match=r"needs 1073741824.0 GiB \(1152921504606846976 bytes\), .* leaves"):
        capacity.check_memory("op", "something", 1 << 60)


@pytest.mark.parametrize("free, files, error, message", [
    (1_000_000, {}, errno.ENOSPC, "the file system of .* leaves 976.6 KiB .*, 27.4 KiB .* are missing: enlarge it .*shm-size"),
    (1 << 30, {"/proc/meminfo": meminfo(10)}, errno.ENOMEM, r"RAM \(MemAvailable\) leaves 10.0 KiB")], ids=["shm", "ram"])
def test_capacity_of_share(free, files, error, message, system, tmp_path):
    fake = system(free=free, files=files)
    with pytest.raises(CapacityError, match=f"RowTable.share: a table of 1000 rows of 1024 bytes needs .*{message}") as caught:
        RowTable.from_tensor(ROWS, row_format="f32").share("t", directory=str(tmp_path))
    assert caught.value.errno == error and os.listdir(tmp_path) == [] and fake.asked == [str(tmp_path)]


def test_capacity_of_create(system, tmp_path):
    RowTable.create(tmp_path / "t", ROWS[:3], row_format="f32")
    fake = system(free=1_024_000)  # the header is missing
    for path in (tmp_path / "t", tmp_path / "fresh"):
        with pytest.raises(CapacityError, match=r"RowTable.create: the file \S*/\w+ needs 1004.0 KiB .* leaves 1000.0 KiB .*"
                                                r"4.0 KiB \(4096 bytes\) are missing: free space"):
            RowTable.create(path, ROWS, row_format="f32")
    assert os.listdir(tmp_path) == ["t"] and RowTable.open(tmp_path / "t").num_rows == 3
    fake.free += 4096
    assert RowTable.create(tmp_path / "t", ROWS, row_format="f32").num_rows == 1000


def test_capacity_of_pack(system, tmp_path):
    rows, scales = random_rows("fp8_e4m3_block32", 1000, 64, torch.Generator().manual_seed(0))
    RowTable.create(tmp_path / "t", rows, scales, "fp8_e4m3_block32")
    fake = system(free=50_000)
    with pytest.raises(CapacityError, match="pack: the rest of .*packed needs 68.5 KiB .* leaves 48.8 KiB") as caught:
        pack.pack_table(tmp_path / "t", tmp_path / "packed")
    assert caught.value.errno == errno.ENOSPC and os.listdir(tmp_path) == ["t"]
    fake.free = 100_000
    assert pack.pack_table(tmp_path / "t", tmp_path / "packed").num_rows == 1000


@pytest.mark.skipif(COMPILE_ERROR is not None, reason=str(COMPILE_ERROR))
def test_capacity_of_pinning(system):
    from engram_kernels import _C
    table = RowTable.from_tensor(ROWS, row_format="f32", copy=True)
    take = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)(lambda ptr, size: 0)
    drop = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda ptr: 0)
    addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in (take, drop)]
    status = "CapEff:\t{:016x}\nVmLck:\t   24 kB\n"
    fake = system(files={"/proc/self/status": status.format(1 << 13)}, limits={"RLIMIT_MEMLOCK": 1 << 20})
    heeding = _C.HostRegistrar(*addresses, 0, True)
    table.pin(heeding)  # 1000 KiB are left, and wanted
    assert table.memory_stats()["pinned_bytes"] == 1_024_000
    fake.limits = {"RLIMIT_MEMLOCK": 1 << 19}
    other = RowTable.from_tensor(ROWS, row_format="f32", copy=True)
    with pytest.raises(CapacityError, match="RLIMIT_MEMLOCK leaves 488.0 KiB"):
        other.pin(heeding)
    other.pin(_C.HostRegistrar(*addresses, 0, False))  # a runtime that does not heed the limit
    fake.files = {"/proc/self/status": status.format(1 << 14)}  # nor does the kernel for who may lock memory
    another = RowTable.from_tensor(ROWS, row_format="f32", copy=True)
    another.pin(heeding)
    for pinned in (table, other, another):
        pinned._memory.unpin()  # while the callbacks are there
