"""A few seconds of the probes of `profile`, for a plan without one: what this machine does with just the rows of this plan."""
from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from engram_kernels.plan.inputs import DEFAULT_TOKENS
from engram_kernels.plan.trial import MAX_TOKENS, TABLE_BYTES
from engram_kernels.profile import machine, probes_disk, probes_host
from engram_kernels.profile.arena import Arena
from engram_kernels.profile.probes_host import Shape
from engram_kernels.profile.session import Options, Session
from engram_kernels.spec import EngramSpec

_HOST_SECONDS, _DISK_SECONDS = 5.0, 3.0  # at most; on an idle machine about 1 and 2
_FILE_BYTES, _WRITE_SECONDS = 64 << 20, 1.0
_PAGE_BYTES = 4096
_LEAST_ROWS = 4096  # fewer are mostly latency, which is measured by itself


def measure_here(spec: EngramSpec, tokens: int | None) -> dict[str, Any]:
    """A report of `profile` (profile/profile.schema.json) with few cells: random rows of host memory, and reads of a file.

    Args:
        spec: whose rows are gathered: as many bytes as one of its rows has, and packed fp8 rows, which are dequantized.
        tokens: of a step, which says how many rows a call gathers; None: the planner's default.

    Returns:
        The report, of provenance "measured". A probe that cannot run here leaves its reason in place of cells.
    """
    folder = Path(tempfile.gettempdir())
    session = Session(Options("quick", ("host", "disk"), folder), machine.collect(folder))
    rows = max(min(tokens or DEFAULT_TOKENS, MAX_TOKENS) * spec.num_columns, _LEAST_ROWS)
    with session.probe("host_gather", _HOST_SECONDS):
        _gather(session, spec, rows)
    with session.probe("disk_read", _DISK_SECONDS), probes_disk.scratch_file(session, _FILE_BYTES, _WRITE_SECONDS) as file:
        probes_disk.read(session, *file, (_PAGE_BYTES,), (1, 64))
    session.complete = True
    return session.report()


def _gather(session: Session, spec: EngramSpec, rows: int) -> None:
    """A step's rows in one call, then calls of one token, which are all latency; what a plan needs most comes first."""
    limit = min(probes_host.table_limit(session), TABLE_BYTES)
    memory = Arena(limit // probes_host.MIB * probes_host.MIB, True, machine.allowed_cpus(), fill=probes_host.ROW_FILL,
                   max_seconds=_HOST_SECONDS / 3)
    row_sizes = [spec.bytes_per_row // 2 * 2, probes_host.V41_ROW_BYTES]
    threads = torch.get_num_threads()
    for count, row_bytes in dict.fromkeys((count, row) for count in (rows, spec.num_columns) for row in row_sizes):
        shape = Shape(row_bytes, memory.data.size, "uniform", threads, count, op="prefetcher")
        probes_host.measure_gather(session, memory, shape)
