"""What `engram-kernels profile` measured, as the rates and latencies of a plan. The format: profile/profile.schema.json."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from engram_kernels import info
from engram_kernels.plan.hardware import LEFT_SHARE, Hardware
from engram_kernels.plan.quantity import Provenance, Quantity, Surface, derived, measured

SCHEMA_VERSIONS = (1, 2)
_OLD_PLACEMENTS = {"hbm": "device"}  # of version 1
PAGE_BYTES = 4096  # of a read past the page cache
FILE_TIER_DEPTH = 64
_FEW_ROWS = 256  # a call of so few rows is all latency
_WORDS = {p.word: p for p in Provenance}
Cell = dict[str, Any]


def load_profile(path: Path) -> dict[str, Any]:
    """The report in a file.

    Raises:
        ValueError: it is no report of `profile`, or one of another version; names the file and what is wrong.
        OSError: the file cannot be read.
    """
    try:
        report = json.loads(path.read_bytes())
    except ValueError as err:
        raise ValueError(f"plan: {path} is not JSON: {err}") from None
    if not isinstance(report, dict) or "schema_version" not in report:
        raise ValueError(f"plan: {path} is no report of engram-kernels profile: it has no schema_version")
    if report["schema_version"] not in SCHEMA_VERSIONS:
        raise ValueError(f"plan: {path} has schema_version {report['schema_version']!r}, expected one of {SCHEMA_VERSIONS}: "
                         "measure again with this version's engram-kernels profile")
    cells, machine = report.get("cells"), report.get("machine")
    if not isinstance(cells, list) or not isinstance(machine, dict):
        raise ValueError(f"plan: {path} is no report of engram-kernels profile: it has no list of cells or no machine")
    _check_machine(path, machine)
    for number, cell in enumerate(cells):
        _check_cell(path, number, cell)
        if report["schema_version"] == 1:
            cell["placement"] = _OLD_PLACEMENTS.get(cell.get("placement"), cell.get("placement"))
        index = cell.get("gpu")
        known = isinstance(index, int) and 0 <= index < len(machine.get("gpu") or [])
        if index is not None and cell["status"] == "ok" and not known:
            raise ValueError(f"plan: {path}: cell {number} is of GPU {index!r}, which the machine does not have")
    return report


def _check_machine(path: Path, machine: dict[str, Any]) -> None:
    parts = [(name, machine.get(name)) for name in ("machine", "limits", "disk")]
    gpus = machine.get("gpu")
    if gpus is not None and not isinstance(gpus, list):
        raise ValueError(f"plan: {path}: gpu of the machine is {str(gpus)[:80]!r}, expected a list")
    for name, part in [*parts, *((f"gpu {i}", gpu) for i, gpu in enumerate(gpus or []))]:
        if part is not None and not isinstance(part, dict):
            raise ValueError(f"plan: {path}: {name} of the machine is {str(part)[:80]!r}, expected an object")
        for field in ("memory_free_bytes", "memory_room_bytes", "cgroup_bytes", "free_bytes", "memory_bytes"):
            value = (part or {}).get(field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e30):
                raise ValueError(f"plan: {path}: {name} of the machine has {field} {str(value)[:80]!r}, expected a size in bytes")


def _check_cell(path: Path, number: int, cell: Any) -> None:
    where = f"plan: {path}: cell {number}"
    if not isinstance(cell, dict) or not isinstance(cell.get("probe"), str) or not isinstance(cell.get("status"), str):
        raise ValueError(f"{where} is {str(cell)[:80]!r}, expected an object with probe and status")
    if str(cell.get("provenance")) not in _WORDS:
        raise ValueError(f"{where} has provenance {cell.get('provenance')!r}, expected measured, simulated or assumed")
    if cell["status"] == "ok":
        for field in ("rows_per_s", "bytes_per_s", "median", "row_bytes", "table_bytes", "rows", "bytes", "queue_depth",
                      "slowdown_of_other"):
            value = cell.get(field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30):
                raise ValueError(f"{where} ({cell['probe']}) has {field} {value!r}, expected a positive number")


def apply_profile(hardware: Hardware, report: dict[str, Any], source: str, of_gpu: bool) -> Hardware:
    """The hardware with everything that the report measured put in.

    Args:
        hardware: with constants for what is not in the report.
        report: from `load_profile`.
        source: name of the file, for the sources of the numbers.
        of_gpu: whether the report's GPU is the one that is planned for; without, only host and disk are taken.

    Raises:
        ValueError: a rate is out of range.
    """
    cells = [c for c in report["cells"] if c["status"] == "ok"]
    changes = _host(cells, source) | _disk(cells, source) | _room(report["machine"], source)
    if of_gpu:
        changes |= _gpu(cells, _measured_gpu(report) or {}, source)
    return dataclasses.replace(hardware, **{k: v for k, v in changes.items() if v is not None})


def gpu_name(report: dict[str, Any]) -> str | None:
    """The name of the GPU that the report measured, or None: a GPU that was there and could not be used has no numbers."""
    gpu = _measured_gpu(report)
    return None if gpu is None else str(gpu.get("name"))


def _measured_gpu(report: dict[str, Any]) -> dict[str, Any] | None:
    gpus = report["machine"].get("gpu") or []
    measured_on = [cell.get("gpu") or 0 for cell in report["cells"]
                   if cell["probe"].startswith("gpu_") and cell["status"] == "ok"]
    return gpus[measured_on[0]] if gpus and measured_on else None


def _host(cells: list[Cell], source: str) -> dict[str, Any]:
    # `plain` is another program's loop, not what the prefetcher runs
    random = [c for c in cells if c["probe"] == "host_gather" and _is_random(c)]
    # a plan's rows come through the prefetcher; reports that did not measure it have its kernel alone
    gathers = [c for c in random if c.get("op") == "prefetcher"] or [c for c in random if c.get("op") == "gather_rows"]
    packed = [c for c in gathers if str(c.get("row_format", "")).startswith("fp8")]
    copied = [c for c in gathers if c not in packed]
    return {"host_copy": _surface(copied, source), "host_decode": _surface(packed, source) or _surface(copied, source),
            "host_latency": _latency(gathers, source)}


def _disk(cells: list[Cell], source: str) -> dict[str, Any]:
    reads = [c for c in cells if c["probe"] == "disk_read" and c.get("rows_per_s") and c.get("queue_depth")]
    pages = [c for c in reads if c.get("row_bytes") == PAGE_BYTES]
    if not pages:
        return {}
    # the depth of the file tier, or the nearest below it: deeper queues would promise too much
    allowed = [c for c in pages if c["queue_depth"] <= FILE_TIER_DEPTH]
    deep = max(allowed or pages, key=lambda c: (c["queue_depth"] if allowed else -c["queue_depth"], c["rows_per_s"]))
    shallow = min(pages, key=lambda c: c["queue_depth"])
    latency = _of(shallow, "rows_per_s", "1/s", source)
    return {"disk_reads": _of(deep, "rows_per_s", "1/s", source),
            "disk_latency": derived("s", lambda rate: shallow["queue_depth"] / rate, latency)}


def _room(machine: dict[str, Any], source: str) -> dict[str, Any]:
    memory = info.memory_room(machine)
    disk = (machine.get("disk") or {}).get("free_bytes")
    return {"host_bytes": None if memory is None else measured(0.8 * memory, "B", f"{source}: 80 % of the free memory"),
            "disk_bytes": None if disk is None else measured(disk, "B", f"{source}: free disk space")}


def _gpu(cells: list[Cell], gpu: dict[str, Any], source: str) -> dict[str, Any]:
    gathers = [c for c in cells if c["probe"] == "gpu_gather" and _is_random(c) and c.get("beside") in (None, "nothing")]
    device = [c for c in gathers if c.get("placement") == "device"]
    uva = [c for c in gathers if c.get("placement") == "uva"]
    copies = [c for c in cells if c["probe"] == "gpu_link" and c.get("op") == "h2d" and c.get("pinned") is not False
              and c.get("engine") in (None, "copy") and c.get("bytes") and c.get("bytes_per_s")]
    streams = [c for c in cells if c["probe"] == "gpu_stream" and c.get("op") == "read" and c.get("bytes_per_s")]
    memory = gpu.get("memory_bytes")
    room = memory and Quantity(LEFT_SHARE * memory, "B", Provenance.ASSUMED,
                               f"{source}: memory of the GPU; default: a tenth is left")
    changes: dict[str, Any] = {"device_bytes": room, "device_gather": _surface(device, source), "uva": _surface(uva, source),
                               "gpu_latency": _latency(uva or device, source)}
    if changes["uva"] is not None:
        changes["uva_counts_sectors"] = False
    if changes["device_gather"] is not None:
        changes["device_counts_traffic"] = False
    if copies:
        changes["link"] = _of(max(copies, key=lambda c: c["bytes"]), "bytes_per_s", "B/s", source)
        least = min(copies, key=lambda c: c["bytes"])
        if least["bytes"] <= 65_536:
            changes["copy_latency"] = _of(least, "median", "s", source)
    if streams:
        changes["device_stream"] = _of(max(streams, key=lambda c: c["bytes_per_s"]), "bytes_per_s", "B/s", source)
    beside = [c for c in cells if c["probe"] == "gpu_interference" and c.get("placement") == "uva" and c.get("beside") == "gemm"
              and c.get("slowdown_of_other")]
    if beside:
        worst = max(beside, key=lambda c: c["slowdown_of_other"])
        slowdown = Quantity(worst["slowdown_of_other"], "1", _WORDS[worst["provenance"]], f"{source}: gpu_interference")
        changes["gather_share"] = derived("1", lambda s: max(1 - 1 / s, 0.0), slowdown)
    return changes


def _is_random(cell: Cell) -> bool:
    """Whether the ids were uniform and fresh: other orders, and the same ids again, flatter the caches."""
    return cell.get("order") in (None, "uniform") and cell.get("cold") is not False


def _surface(cells: list[Cell], source: str) -> Surface | None:
    """Bytes/s by row and table size, of the calls with the most rows: there the fixed cost of a call is least."""
    best: dict[tuple[int, int], Cell] = {}
    for cell in cells:
        if not (cell.get("row_bytes") and cell.get("table_bytes") and cell.get("bytes_per_s")):
            continue
        if cell.get("rows") and cell["rows"] <= _FEW_ROWS:
            continue
        key = (cell["row_bytes"], cell["table_bytes"])
        if key not in best or _merit(cell) > _merit(best[key]):
            best[key] = cell
    points = tuple((float(row), float(table), _of(cell, "bytes_per_s", "B/s", source)) for (row, table), cell in best.items())
    return Surface(points) if points else None


def _merit(cell: Cell) -> tuple[float, ...]:
    return (cell.get("rows") or 0, bool(cell.get("huge_pages")), cell["bytes_per_s"])


def _latency(cells: list[Cell], source: str) -> Quantity | None:
    """Seconds of the smallest call, where one was so small that it is all latency."""
    few = [c for c in cells if c.get("rows") and c["rows"] <= _FEW_ROWS and c.get("median")]
    return _of(min(few, key=lambda c: c["rows"]), "median", "s", source) if few else None


def _of(cell: Cell, field: str, unit: str, source: str) -> Quantity:
    parts = [f"{name} {cell[name]:,}" for name in ("row_bytes", "table_bytes", "rows", "queue_depth", "bytes") if cell.get(name)]
    verdict = "" if cell.get("verdict", "OK") == "OK" else f", {cell['verdict']}"
    return Quantity(float(cell[field]), unit, _WORDS[cell["provenance"]],
                    f"{source}: {cell['probe']} ({', '.join(parts)}{verdict})")
