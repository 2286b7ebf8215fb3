"""The machine block of a report: what `info` tells, and nodes, caches and disk."""
from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from engram_kernels import info

_NODES = Path("/sys/devices/system/node")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_MOUNTS = Path("/proc/self/mounts")


def nothing_known() -> dict[str, Any]:
    """The machine block of a run that has not come to look."""
    return {"versions": {}, "machine": {}, "limits": {}, "gpu": [], "numa": [], "caches": {"last_level_bytes": None}, "disk": {}}


def collect(disk_folder: Path) -> dict[str, Any]:
    """The machine block; what cannot be found out is None, or an empty list."""
    found = info.collect()
    return {"versions": found["versions"], "machine": found["machine"], "limits": found["limits"], "gpu": found["gpu"],
            "numa": numa_nodes(), "caches": {"last_level_bytes": last_level_bytes()}, "disk": disk(disk_folder)}


def allowed_cpus() -> list[int]:
    """CPUs that this process may use."""
    return sorted(os.sched_getaffinity(0))


def cpu_list(text: str) -> list[int]:
    """The CPUs of a list such as "0-3,8"."""
    cpus: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        cpus += range(int(first), int(last or first) + 1)
    return cpus


def numa_nodes() -> list[dict[str, Any]]:
    """Node, CPUs and memory of every NUMA node."""
    nodes = []
    for folder in sorted(_NODES.glob("node[0-9]*"), key=lambda p: int(p.name[4:])):
        memory = re.search(r"MemTotal:\s+(\d+) kB", _read(folder / "meminfo") or "")
        nodes.append({"node": int(folder.name[4:]), "cpus": cpu_list(_read(folder / "cpulist") or ""),
                      "memory_bytes": int(memory[1]) * 1024 if memory else None})
    return nodes


def last_level_bytes() -> int | None:
    """Size of the cache of the highest level that CPU 0 has."""
    sizes = []
    for index in _CACHES.glob("index[0-9]*"):
        size, level = re.fullmatch(r"(\d+)([KMG]?)", _read(index / "size") or ""), _read(index / "level")
        if size and level:
            sizes.append((int(level), int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]))
    return max(sizes)[1] if sizes else None


def disk(folder: Path) -> dict[str, Any]:
    """What the folder of the disk probe is."""
    found: dict[str, Any] = {"folder": folder.name or ".", "free_bytes": None, "writable": False, "file_system": None}
    try:
        found["free_bytes"] = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder):
            found["writable"] = True
    except OSError:
        pass
    where = folder.resolve()
    best = -1
    for line in (_read(_MOUNTS) or "").splitlines():
        _, mount, kind, *_ = line.split()
        if (where == Path(mount) or Path(mount) in where.parents) and len(mount) > best:
            best, found["file_system"] = len(mount), kind
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
