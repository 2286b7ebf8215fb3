"""What this installation can do here, and why not the rest: versions, machine, limits, backends."""
from __future__ import annotations

import importlib.metadata
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from engram_kernels import backends, capacity
from engram_kernels._library import COMPILE_ERROR
from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.spec import EngramSpec
from engram_kernels.table.file_reader import make_reader

# of /proc/cpuinfo: what the kernels use, or could
_CPU_FEATURES = ("sse2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16",
                 "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "sve", "sve2", "bf16")
_PACKAGES = ("engram-kernels", "torch", "numpy", "triton", "nvidia-ml-py", "matplotlib", "rich")


def collect() -> dict[str, Any]:
    """Everything that `engram-kernels info` shows, as JSON types; what cannot be found out is None."""
    return {"versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
            "machine": _machine(), "limits": _limits(), "gpu": _gpus(), "file_reads": file_reads(),
            "backends": {op: {name: _explain(op, name) for name in backends.BACKENDS} for op in backends.ops()}}


def memory_of(spec: EngramSpec) -> dict[str, Any]:
    """What a memory holds and costs, as JSON types: what `info --spec` shows of it.

    Args:
        spec: the memory; `table_bytes` names the row formats that take rows of its width.
    """
    table_bytes = {}
    for name in ROW_FORMATS:
        try:
            table_bytes[name] = spec.bytes(name)
        except ValueError:  # blocks that do not divide the row
            continue
    return {"name": spec.name, "num_rows": list(spec.layout().num_rows), "layer_ids": list(spec.layer_ids),
            "table_parameters": spec.num_table_parameters, "module_parameters": spec.num_module_parameters,
            "flops_per_token": spec.flops_per_token(), "rows_per_token": spec.rows_per_token,
            "bytes_per_row": spec.bytes_per_row, "row_format": spec.row_format, "bytes": spec.bytes(), "table_bytes": table_bytes}


def memory_room(found: dict[str, Any]) -> int | None:
    """Bytes of memory that a process may have: the least that free memory and the limits leave; None: nothing is known.

    Args:
        found: from `collect`, or the machine block of a report, in which each part may be missing.
    """
    machine, limits = found.get("machine") or {}, found.get("limits") or {}
    known = (machine.get("memory_free_bytes"), limits.get("memory_room_bytes"), limits.get("cgroup_bytes"))
    return min((num_bytes for num_bytes in known if num_bytes is not None), default=None)


def file_reads() -> dict[str, str | None]:
    """How tables in files are read here: `way` is "io_uring", "preadv" (threads) or "python" (one read after the other).

    `why` says why it is not io_uring; None where it is.
    """
    if COMPILE_ERROR is not None:
        return {"way": "python", "why": COMPILE_ERROR}
    with open(__file__, "rb") as file:  # any file: a ring is set up and dropped
        try:
            make_reader(file.fileno(), "info", 1, "io_uring_buffered")
        except (ValueError, OSError) as err:
            return {"way": "preadv", "why": str(err).removeprefix("FileReader: ")}
    return {"way": "io_uring", "why": None}


def file_reads_text(found: dict[str, str | None]) -> str:
    """What `file_reads` found, as a sentence, with what is lost where it is not io_uring."""
    lost = {"io_uring": "Tables in files are read by io_uring. Training writes rows back by it, too.",
            "preadv": "Tables in files are read by pread, in threads, not by io_uring: on a machine with 2 cores that took 3 to "
                      "5 times the CPU time per batch and gave 82 % of the reads per second with 64 in flight. Training writes "
                      "rows back by pwrite.",
            "python": "Tables in files are read by Python, one read after the other: a compiled module would keep 64 in flight."}
    return lost[str(found["way"])] + (f" The reason: {found['why']}." if found["why"] else "")


def _explain(op: str, name: str) -> str:
    return backends.explain(op, name).partition(": ")[2]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    memory = _colon_table("/proc/meminfo")
    about_cpu = _colon_table("/proc/cpuinfo")
    cpu = about_cpu.get("model name") or platform.processor() or platform.machine()
    flags = set((about_cpu.get("flags") or about_cpu.get("Features") or "").split())
    if COMPILE_ERROR is None:
        from engram_kernels import _C
        kernels = _C.cpu_isa()
    else:
        kernels = f"none: {COMPILE_ERROR}"
    return {"platform": platform.platform(), "cpu": cpu, "cores": capacity.usable_cores(), "cpu_kernels": kernels,
            "cpu_features": [name for name in _CPU_FEATURES if name in flags],
            "memory_bytes": _kib(memory.get("MemTotal")), "memory_free_bytes": _kib(memory.get("MemAvailable")),
            "huge_pages": _chosen(_read("/sys/kernel/mm/transparent_hugepage/enabled"))}


def _limits() -> dict[str, Any]:
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None
    return {"cgroup_bytes": capacity.cgroup_limit_bytes(), "memory_room_bytes": capacity.memory_room_bytes(),
            "memlock_bytes": capacity.SYSTEM.limit("RLIMIT_MEMLOCK"), "shm_free_bytes": shm,
            "open_files": capacity.SYSTEM.limit("RLIMIT_NOFILE")}


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    try:
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except RuntimeError:  # devices that are in exclusive use: `profile` gives the reason
        return []
    return [{"name": p.name, "memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"} for p in properties]


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _colon_table(path: str) -> dict[str, str]:
    """The first value of each key in a file of "key : value" lines."""
    table: dict[str, str] = {}
    for line in (_read(path) or "").splitlines():
        key, _, value = line.partition(":")
        table.setdefault(key.strip(), value.strip())
    return table


def _kib(value: str | None) -> int | None:
    return None if value is None else int(value.split()[0]) * 1024


def _chosen(options: str | None) -> str | None:
    """The word in brackets."""
    return None if options is None else options.partition("[")[2].partition("]")[0] or options
