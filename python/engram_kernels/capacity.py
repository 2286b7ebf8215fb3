"""What there is room for: checked before memory or disk is taken, so that a table too large is a sentence, not a killed process.

Every limit is read from where the system states it; one that cannot be read is taken as none.
"""
from __future__ import annotations

import dataclasses
import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

HUGE_PAGE_BYTES = 2 << 20
DISK_REMEDY = "free space there, or write to another file system"
_NO_LIMIT_BYTES = 1 << 60  # cgroup v1 writes the largest page count


class CapacityError(OSError):
    """There is no room; says what was needed, which limit is in the way, how much it leaves, and what to do."""


class System:
    """Where the limits are read. Tests put another in its place."""

    def read(self, path: str) -> str:
        """The text of a file; "" where it cannot be read."""
        try:
            return Path(path).read_text()
        except (OSError, UnicodeDecodeError):
            return ""

    def free_bytes(self, directory: str) -> int | None:
        """Bytes that may still be written below a directory; None: unknown."""
        try:
            info = os.statvfs(directory)
        except OSError:
            return None
        return info.f_bavail * info.f_frsize if info.f_blocks else None  # no blocks: a file system that does not count

    def limit(self, name: str) -> int | None:
        """A soft limit of this process, by its name in `resource`; None: unlimited."""
        try:
            import resource
        except ImportError:  # Windows has none
            return None
        soft = resource.getrlimit(getattr(resource, name))[0]
        return None if soft == resource.RLIM_INFINITY else soft


SYSTEM = System()


def expect_linux(what: str) -> None:
    """Raises OSError where `what` needs locks and memory that only Linux gives."""
    if not sys.platform.startswith("linux"):
        raise OSError(errno.ENOSYS, f"{what}: needs Linux, this is {sys.platform}; the ops' reference backend runs here")


def usable_cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Room:
    """What one limit leaves."""

    limit: str
    available_bytes: int
    remedy: str


def check_memory(op: str, what: str, num_bytes: int) -> None:
    """Raises CapacityError unless `num_bytes` of memory can be had.

    Args:
        op: who asks, for the message.
        what: what for, such as "a copy of 100 rows".
        num_bytes: bytes that will be touched.

    Raises:
        CapacityError: RAM, a cgroup of this process or its address space is too small; errno ENOMEM.
    """
    _check(op, what, num_bytes, memory_room(), errno.ENOMEM)


def check_private_memory(op: str, what: str, num_bytes: int) -> None:
    """Checks memory that explicit huge pages may provide: those are set aside already, in no limit of `check_memory`."""
    if huge_pool_bytes() < -(-num_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES:
        check_memory(op, what, num_bytes)


def check_directory(op: str, what: str, num_bytes: int, directory: str | os.PathLike[str], remedy: str) -> None:
    """Raises CapacityError (ENOSPC) unless `num_bytes` more can be written below `directory`; `remedy` says what to do."""
    free = SYSTEM.free_bytes(os.fspath(directory))
    _check(op, what, num_bytes, [] if free is None else [Room(f"the file system of {directory}", free, remedy)], errno.ENOSPC)


def check_memlock(op: str, what: str, num_bytes: int) -> None:
    """Raises CapacityError (ENOMEM) unless `num_bytes` more may be locked, for devices whose driver locks pages by that limit."""
    limit = SYSTEM.limit("RLIMIT_MEMLOCK")
    if limit is None or _has_capability(14):  # CAP_IPC_LOCK
        return
    locked = _kib("/proc/self/status", "VmLck") or 0
    _check(op, what, num_bytes, [Room("RLIMIT_MEMLOCK", max(limit - locked, 0),
                                      "raise it (ulimit -l, LimitMEMLOCK= in systemd, --ulimit memlock= in docker)")],
           errno.ENOMEM)


def check_device_memory(op: str, what: str, num_bytes: int, device: torch.device) -> None:
    """Raises CapacityError (ENOMEM) unless `num_bytes` of a GPU's memory can be had."""
    free = torch.cuda.mem_get_info(device)[0]
    remedy = "ask for less, or free what other processes and torch's own cache (torch.cuda.empty_cache) hold there"
    _check(op, what, num_bytes, [Room(f"the memory of {device}", free, remedy)], errno.ENOMEM)


def memory_room() -> list[Room]:
    """What each limit on memory leaves for this process."""
    rooms = []
    available = _kib("/proc/meminfo", "MemAvailable")
    if available is not None:
        rooms.append(Room("RAM (MemAvailable)", available, "free memory, or leave the table in its file (RowTable.open)"))
    rooms += [Room(f"the memory limit of cgroup {name}", left, "raise the limit of the container or service")
              for name, _, left in _cgroups()]
    addresses = SYSTEM.limit("RLIMIT_AS")
    if addresses is not None:
        used = _kib("/proc/self/status", "VmSize") or 0
        rooms.append(Room("RLIMIT_AS", max(addresses - used, 0), "raise it (ulimit -v)"))
    return rooms


def memory_room_bytes() -> int | None:
    """The least that a limit on memory leaves for this process; None: none is known."""
    return min((room.available_bytes for room in memory_room()), default=None)


def cgroup_limit_bytes() -> int | None:
    """The lowest memory limit of the cgroups above this process; None: there is none."""
    return min((limit for _, limit, _ in _cgroups()), default=None)


def huge_pool_bytes() -> int:
    """Free explicit huge pages of 2 MiB that nobody has reserved."""
    found = dict(re.findall(r"^HugePages_(\w+):\s*(\d+)", SYSTEM.read("/proc/meminfo"), re.M))
    if _kib("/proc/meminfo", "Hugepagesize") != HUGE_PAGE_BYTES:
        return 0
    return max(int(found.get("Free", 0)) - int(found.get("Rsvd", 0)), 0) * HUGE_PAGE_BYTES


def size_text(num_bytes: int) -> str:
    """A size for reading, and exactly."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name} ({num_bytes} bytes)"
    return f"{num_bytes} bytes"


def _check(op: str, what: str, num_bytes: int, rooms: list[Room], error: int) -> None:
    short = [room for room in rooms if room.available_bytes < num_bytes]
    if short:
        least = min(short, key=lambda room: room.available_bytes)
        missing = size_text(num_bytes - least.available_bytes)
        raise CapacityError(error, f"{op}: {what} needs {size_text(num_bytes)}, {least.limit} leaves "
                                   f"{size_text(least.available_bytes)}, {missing} are missing: {least.remedy}")


def _kib(path: str, field: str) -> int | None:
    found = re.search(rf"^{field}:\s*(\d+) kB", SYSTEM.read(path), re.M)
    return int(found[1]) << 10 if found else None


def _has_capability(number: int) -> bool:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", SYSTEM.read("/proc/self/status"), re.M)
    return bool(found) and bool(int(found[1], 16) >> number & 1)  # type: ignore[index]


def _cgroups() -> Iterator[tuple[str, int, int]]:
    """Name, limit and bytes left of every cgroup above this process that limits memory, version 1 and 2."""
    of_controller = {}
    for line in SYSTEM.read("/proc/self/cgroup").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers == "" or "memory" in controllers.split(","):
            of_controller["cgroup2" if controllers == "" else "cgroup"] = path
    for line in SYSTEM.read("/proc/self/mountinfo").splitlines():
        mount, _, rest = line.partition(" - ")
        kind, _, options = (rest.split(" ", 2) + ["", ""])[:3]
        fields = mount.split(" ")
        if kind not in of_controller or len(fields) < 5 or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        root, folder, path = fields[3], fields[4], of_controller[kind]
        # the mount may show only a part of the tree: what a container sees
        inside = path.removeprefix(root.rstrip("/")) if path == root or path.startswith(root.rstrip("/") + "/") else "/"
        parts = [part for part in inside.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            name = "/" + "/".join(parts[:depth])
            found = _cgroup_memory(folder + name.rstrip("/"), kind == "cgroup2")
            if found is not None:
                yield name, *found


def _cgroup_memory(folder: str, is_v2: bool) -> tuple[int, int] | None:
    """Limit and bytes left."""
    names = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit, used = (SYSTEM.read(f"{folder}/{name}").strip() for name in names)
    if not (limit.isdigit() and used.isdigit()) or int(limit) >= _NO_LIMIT_BYTES:
        return None
    # pages of files are given back when memory is asked for
    prefix = "" if is_v2 else "total_"
    cached = sum(int(n) for n in re.findall(rf"^{prefix}(?:in)?active_file (\d+)", SYSTEM.read(f"{folder}/memory.stat"), re.M))
    return int(limit), max(int(limit) - max(int(used) - cached, 0), 0)
