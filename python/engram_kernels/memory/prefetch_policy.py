"""Which way rows take to the device: the policies of a prefetcher, and how "auto" decides."""
from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from engram_kernels.memory.row_table import RowTable

POLICIES = ("auto", "staged", "uva", "device", "file")
SURFACE_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy and why it was taken."""

    name: str
    reason: str


def choose_policy(policy: str, table: RowTable, device: torch.device, surface: str | os.PathLike[str] | None) -> Policy:
    """The policy of a prefetcher.

    A file table is read by "file" and one in the device's own memory by "device": there is no other way. Host memory goes to a
    GPU by "staged" or "uva": "auto" takes the one with more rows/s in the measured surface, at the row size nearest to the
    table's; without one, "uva" where the table is pinned (no copy by the CPU, lowest latency), else "staged". On the CPU,
    where the gather reads host memory itself, "auto" is "staged".

    Args:
        policy: one of POLICIES.
        table: the table.
        device: where the rows go.
        surface: JSON that `engram-kernels profile` writes; None: none was measured.

    Returns:
        The policy's name (never "auto") and the reason.

    Raises:
        ValueError: there is no such policy, the table cannot be read by it, or the surface is no such file.

    Source: docs/prefetch.md.
    """
    if policy not in POLICIES:
        raise ValueError(f"RowPrefetcher: policy is {policy!r}, expected one of {', '.join(POLICIES)}")
    if table.tier == "file":
        allowed: tuple[str, ...] = ("file",)
    elif table.device.type != "cpu":
        if table.device != device:
            raise ValueError(f"RowPrefetcher: the table is on {table.device}, expected the host or {device}")
        allowed = ("device",)
    else:
        allowed = ("staged", "uva") if device.type != "cpu" else ("staged", "uva", "device")
    if policy != "auto":
        if policy not in allowed:
            raise ValueError(f"RowPrefetcher: policy {policy!r} cannot read a table of tier {table.tier!r} for {device}; "
                             f"expected {' or '.join(allowed)}")
        return Policy(policy, "named")
    if len(allowed) == 1:
        return Policy(allowed[0], f"the table is of tier {table.tier!r}")
    if device.type == "cpu":
        return Policy("staged", "the CPU reads host memory itself")
    if surface is None:
        pinned = table.rows.is_pinned()
        return Policy("uva" if pinned else "staged", f"default: the table is {'' if pinned else 'not '}pinned; no surface given")
    rates = read_surface(surface, table.row_bytes)
    if not rates.keys() >= {"staged", "uva"}:
        raise ValueError(f"RowPrefetcher: {surface} has no rows_per_s of both staged and uva; it has "
                         f"{', '.join(sorted(rates)) or 'none'}")
    best = max(("staged", "uva"), key=lambda name: rates[name])
    return Policy(best, f"measured: staged {rates['staged']:.3g} rows/s, uva {rates['uva']:.3g} rows/s")


def read_surface(path: str | os.PathLike[str], row_bytes: int) -> dict[str, float]:
    """Rows/s of random rows on a GPU by placement, at the row size nearest to `row_bytes` (on a log scale; the best cell there).

    Args:
        path: a report of `engram-kernels profile`. Of its cells those count that have a "placement", "row_bytes" and
            "rows_per_s", are not of another "status" than "ok", and had fresh ids and nothing beside them.
        row_bytes: bytes of a row.

    Returns:
        placement ("staged", "uva", ..) -> rows/s.

    Raises:
        ValueError: the file cannot be read or is no such report; names the path.
    """
    try:
        surface: Any = json.loads(Path(path).read_text())
        if surface["schema_version"] != SURFACE_VERSION:
            raise ValueError(f"schema_version is {surface['schema_version']}, expected {SURFACE_VERSION}")
        nearest: dict[str, tuple[float, float]] = {}  # placement: distance, -rows/s
        for cell in surface["cells"]:
            alone = cell.get("beside", "nothing") == "nothing" and cell.get("cold", True)
            if cell.get("status", "ok") == "ok" and alone and cell.get("rows_per_s") and cell.get("row_bytes"):
                entry = (abs(math.log(cell["row_bytes"] / row_bytes)), -float(cell["rows_per_s"]))
                nearest[cell["placement"]] = min(nearest.get(cell["placement"], entry), entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"RowPrefetcher: {path} is no report of engram-kernels profile: {type(err).__name__}: {err}") from None
    return {placement: -rate for placement, (_, rate) in nearest.items()}
