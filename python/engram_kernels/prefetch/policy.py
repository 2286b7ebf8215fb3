"""Which way rows take to the device: the policies of a prefetcher, and how "auto" decides."""
from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from engram_kernels.table.row_table import RowTable

POLICIES = ("auto", "staged", "uva", "uva_distinct", "device", "file", "remote")
# the way that rows take (csrc/prefetch/fetch_way.h) by policy: where gathers read host memory themselves, and where they do not
_WAYS = {"staged": ("in_place", "staged"), "uva": ("in_place", "uva"), "uva_distinct": ("in_place", "uva"),
         "device": ("in_place", "device"), "file": ("file", "file_staged"), "remote": ("remote", "remote_staged")}
SURFACE_VERSION = 1
# What "auto" takes for ids that are made distinct on a GPU: the largest share of distinct rows of real text in requests of
# thousands of tokens (docs/dedup_and_cache.md), and an estimate of the sort and what follows it; without a surface, 2,731 tokens
# of 24 rows.
_DISTINCT_SHARE, _SORT_SECONDS, _DISTINCT_FROM = 0.764, 60e-6, 1 << 16


@dataclasses.dataclass(frozen=True)
class Policy:
    """A policy and why it was taken."""

    name: str
    reason: str
    distinct_from: int | None = None  # ids on a GPU from which on each distinct row of a request crosses once; None: never


def choose_policy(policy: str, table: RowTable, device: torch.device, surface: str | os.PathLike[str] | None,
                  caches: bool = False) -> Policy:
    """The policy of a prefetcher.

    A file table is read by "file", a remote one by "remote", one in the device's own memory by "device": there is no other way.
    Host memory goes to a GPU by "staged", "uva" or "uva_distinct": "auto" takes the one of the first two with more rows/s in the
    measured surface, at the row size nearest to the table's; without one, "uva" where the table is pinned (no copy by the CPU,
    lowest latency), else "staged"; and "staged" with a cache on the device, which rows reach by staging alone. Where that is
    "uva", large requests fetch distinct rows alone: from as many ids on as repay the sort, by the surface. On the CPU, where
    the gather reads host memory itself, "auto" is "staged".

    Args:
        policy: one of POLICIES.
        table: the table.
        device: where the rows go.
        surface: JSON that `engram-kernels profile` writes; None: none was measured.
        caches: a cache of hot rows on the device is wanted.

    Returns:
        The policy's name (never "auto") and the reason.

    Raises:
        ValueError: there is no such policy, the table cannot be read by it, or the surface is no such file.

    Source: docs/prefetch.md.
    """
    rates = None if surface is None else read_surface(surface, table.row_bytes)  # also where it decides nothing
    if policy not in POLICIES:
        raise ValueError(f"RowPrefetcher: policy is {policy!r}, expected one of {', '.join(POLICIES)}")
    if not table.in_memory:
        allowed: tuple[str, ...] = (table.tier,)
    elif table.rows.device != table.device:  # rows on the host, their scales on a GPU
        if table.device != device:
            raise ValueError(f"RowPrefetcher: the table's scales are on {table.device}, expected device to be that, got {device}")
        allowed = ("uva", "uva_distinct")
    elif table.device.type != "cpu":
        if table.device != device:
            raise ValueError(f"RowPrefetcher: the table is on {table.device}, expected the host or {device}")
        allowed = ("device",)
    else:
        allowed = ("staged", "uva", "uva_distinct") if device.type != "cpu" else ("staged", "uva", "uva_distinct", "device")
    if policy != "auto":
        if policy not in allowed:
            apart = table.in_memory and table.rows.device != table.device
            what = f"tier {table.tier!r}" + (f" with scales on {table.device}" if apart else "")
            raise ValueError(f"RowPrefetcher: policy {policy!r} cannot read a table of {what} for {device}; "
                             f"expected {' or '.join(allowed)}")
        return Policy(policy, "named", 1 if policy == "uva_distinct" else None)
    if len(allowed) == 1:
        return Policy(allowed[0], f"the table is of tier {table.tier!r}")
    if device.type == "cpu":
        return Policy("staged", "the CPU reads host memory itself")
    if caches:
        return Policy("staged", "rows are cached on the device")
    if "staged" not in allowed:
        return _uva(f"the table's scales are on {table.device}", rates)
    if rates is None:
        pinned = table.rows.is_pinned()
        reason = f"default: the table is {'' if pinned else 'not '}pinned; no surface given"
        return _uva(reason, rates) if pinned else Policy("staged", reason)
    if not rates.keys() >= {"staged", "uva"}:
        raise ValueError(f"RowPrefetcher: {surface} has no rows_per_s of both staged and uva; it has "
                         f"{', '.join(sorted(rates)) or 'none'}")
    reason = f"measured: staged {rates['staged']:.3g} rows/s, uva {rates['uva']:.3g} rows/s"
    return Policy("staged", reason) if rates["staged"] >= rates["uva"] else _uva(reason, rates)


def _uva(reason: str, rates: dict[str, float] | None) -> Policy:
    """Policy "uva", and from how many ids on rows that occur again repay the sort that finds them."""
    if rates is None or not rates.keys() >= {"uva", "device"}:
        distinct_from: int | None = _DISTINCT_FROM
    else:  # saved per id: the link's time for rows that come again, less that of spreading rows in the device's memory
        saved_s = (1 - _DISTINCT_SHARE) / rates["uva"] - 1 / rates["device"]
        distinct_from = math.ceil(_SORT_SECONDS / saved_s) if saved_s > 0 else None
    from_on = "never distinct rows alone" if distinct_from is None else f"distinct rows alone from {distinct_from} ids on"
    return Policy("uva", f"{reason}; {from_on}", distinct_from)


def way_of(policy: str, reads_host_memory: bool) -> str:
    """The way that rows take, a name of csrc/prefetch/fetch_way.h, by a policy that is not "auto" on an engine."""
    return _WAYS[policy][0 if reads_host_memory else 1]


def check_cache(cache_bytes: int, policy: Policy, crosses_link: bool) -> None:
    """Refuses a cache on a device where no row that is known to the host crosses a link to it.

    Args:
        cache_bytes: what was asked for; 0: no cache.
        policy: the way that rows take.
        crosses_link: the device has memory of its own.

    Raises:
        ValueError: there is nothing that the cache could save; says why.

    Source: docs/prefetch.md.
    """
    if cache_bytes == 0:
        return
    asked = f"RowPrefetcher: cache_bytes is {cache_bytes}, expected 0"
    if not crosses_link:
        raise ValueError(f"{asked}: the CPU reads rows where they are, there is no link to a device that a cache would save "
                         "(RowTable.open(cache_bytes=) keeps rows of a file in memory)")
    if policy.name not in ("staged", "file", "remote"):
        why = ("the table is on the device itself" if policy.name == "device" else
               "its kernel reads rows over the bus by ids that the host may never see")
        raise ValueError(f"{asked} with policy {policy.name!r}: {why}; a cache of hot rows goes with policy "
                         "staged, file or remote")


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
