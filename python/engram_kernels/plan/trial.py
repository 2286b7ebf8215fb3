"""Runs a plan's pick at a small size on this machine, and says how far the model was off."""
from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from engram_kernels import backends
from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.plan.hardware import Hardware
from engram_kernels.plan.placements import TITLES, lookup
from engram_kernels.plan.quantity import Quantity, derived, given, measured
from engram_kernels.plan.repeats import Repeats
from engram_kernels.plan.workload import Workload
from engram_kernels.prefetch.row_prefetcher import RowPrefetcher
from engram_kernels.profile.statistics import measure
from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.spec import EngramSpec
from engram_kernels.table.row_table import RowTable
from engram_kernels.testing.inputs import random_rows

TABLE_BYTES = 256 << 20
MAX_TOKENS = 4096
_PIECE_ROWS = 1 << 15
_BATCHES = 8  # of ids, in turn: a table of this size is not read from the caches alone
_SEED = 20260101


@dataclasses.dataclass(frozen=True)
class Trial:
    """A prediction beside a measurement.

    Attributes:
        placement: what ran.
        instead_of: the plan's pick and why it cannot run here; None: it is what ran.
        what: the table and the request, in words.
        predicted, actual: seconds from submit to rows, one layer.
        error: predicted over measured, less 1.
        spread: quartiles of the measurement, seconds.
    """
    placement: str
    instead_of: str | None
    what: str
    predicted: Quantity
    actual: Quantity
    error: Quantity
    spread: tuple[Quantity, Quantity]


def runnable(placement: str) -> str | None:
    """Why a placement cannot run on this machine; None: it can."""
    if placement == "remote":
        return "it needs another machine"
    if placement == "device_cache":
        return "the hot-row cache on a device has no public op yet"
    if placement in ("device", "uva") and (why := _no_gpu()) is not None:
        return why
    return None


def _no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    if not {"cuda", "triton"} & set(backends.available("gather_rows")):
        return "no backend of gather_rows runs on the GPU here"
    return None


def run_trial(pick: str, work: Workload, here: Hardware, planned: Hardware, seconds: float = 2.0) -> Trial:
    """Runs the pick, or what can run of it here: gathers by the CPU.

    Args:
        pick: the placement that won.
        work: what was planned for; its tokens are cut to `MAX_TOKENS`, its tables to one of `TABLE_BYTES`.
        here: this machine, as the model sees it: what its profile measured, or constants.
        planned: the machine that was planned for: predicts for a GPU that no profile of this machine measured.
        seconds: of measuring, at most about.

    Raises:
        OSError: the file of a trial of `file` cannot be written.
    """
    why_not = runnable(pick)
    placement = pick if why_not is None else "staged"
    small = _small(work)
    cpu = placement in ("staged", "file")
    node = dataclasses.replace(here, device_bytes=None, copy_latency=None) if cpu else here if here.has_gpu else planned
    predicted = lookup(placement, small, node).seconds
    requests = _requests(small)
    with tempfile.TemporaryDirectory(prefix="engram-plan-") as folder:
        table = _table(small.spec, int(small.table_bytes.value) // small.row_bytes, placement, Path(folder))
        times = _time_prefetcher(table, requests, seconds) if cpu else _time_gather(table, requests, "cuda", seconds)
    median, q1, q3 = (measured(t, "s", f"this machine, {len(times[3])} calls") for t in times[:3])
    error = derived("1", lambda p, m: p / m - 1, predicted, median)
    what = (f"{small.requested.value:,.0f} rows of {small.row_bytes} bytes ({small.tokens.value:,.0f} tokens, one layer) from a "
            f"table of {small.table_bytes.value / 2**20:.0f} MiB, uniform ids")
    return Trial(placement, None if why_not is None else f"{TITLES[pick]} cannot run here: {why_not}", what, predicted, median,
                 error, (q1, q3))


def _small(work: Workload) -> Workload:
    """One layer, a small table that lies on one machine, uniform ids, which hardly repeat."""
    num_rows = max(min(TABLE_BYTES, int(work.table_bytes.value)) // work.row_bytes, 1)
    tokens = min(int(work.tokens.value), MAX_TOKENS)
    draws = tokens * work.spec.num_columns
    ratio = given(num_rows * (1 - (1 - 1 / num_rows) ** draws) / draws, "1", "uniform ids: expected distinct rows")
    one = given(1, "1", "trial")
    return dataclasses.replace(
        work, spec=dataclasses.replace(work.spec, layer_ids=work.spec.layer_ids[:1]),
        table_bytes=given(num_rows * work.row_bytes, "B", "trial"), tokens=given(tokens, "tokens", "trial"), copies=one, gpus=one,
        nodes=one, repeats=Repeats(((1.0, ratio), (float(tokens) + 1, ratio)), ((1.0, given(0, "1", "trial")),)))


def _requests(work: Workload) -> list[Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    shape = (int(work.tokens.value), work.spec.num_columns)
    num_rows = int(work.table_bytes.value) // work.row_bytes
    return [torch.randint(0, num_rows, shape, generator=generator, dtype=torch.int32) for _ in range(_BATCHES)]


def _table(spec: EngramSpec, num_rows: int, placement: str, folder: Path) -> RowTable:
    """A table of random rows, one piece of them over and over."""
    piece, scales = random_rows(spec.row_format, min(num_rows, _PIECE_ROWS), spec.row_dim, torch.Generator().manual_seed(_SEED))
    times = -(-num_rows // piece.shape[0])
    table_scale = 1.0 if ROW_FORMATS[spec.row_format].has_table_scale else None
    rows = piece.repeat(times, 1)[:num_rows]
    if scales is not None and scales.dim() == 2:
        scales = scales.repeat(times, 1)[:num_rows]
    if placement == "file":
        path = folder / "table.safetensors"
        RowTable.create(path, rows, scales, row_dim=spec.row_dim, row_format=spec.row_format, table_scale=table_scale)
        return RowTable.open(path)
    if placement in ("device", "uva"):
        rows = rows.pin_memory() if placement == "uva" else rows.cuda()
        scales = None if scales is None else scales.pin_memory() if placement == "uva" else scales.cuda()
    return RowTable.from_tensor(rows, scales, spec.row_format, copy=placement == "staged", row_dim=spec.row_dim,
                                table_scale=table_scale)


def _time_prefetcher(table: RowTable, requests: list[Tensor], seconds: float) -> tuple[float, float, float, tuple[float, ...]]:
    with RowPrefetcher(table) as prefetcher:
        return _times(lambda ids: prefetcher.wait(prefetcher.submit(ids)), requests, seconds)


def _time_gather(table: RowTable, requests: list[Tensor], device: str, seconds: float
                 ) -> tuple[float, float, float, tuple[float, ...]]:
    on_device = [ids.to(device) for ids in requests]
    out = torch.empty(*on_device[0].shape, table.row_dim, dtype=torch.bfloat16, device=device)

    def run(ids: Tensor) -> None:
        gather_rows(table, ids, out=out)
        if out.is_cuda:
            torch.cuda.synchronize()

    return _times(run, on_device, seconds)


def _times(run: Callable[[Tensor], object], requests: list[Tensor], seconds: float
           ) -> tuple[float, float, float, tuple[float, ...]]:
    """Median, quartiles and samples of a call, the requests in turn."""
    calls = 0

    def call() -> None:
        nonlocal calls
        run(requests[calls % len(requests)])
        calls += 1

    summary, _ = measure(call, max_seconds=seconds)
    return summary.median, summary.q1, summary.q3, summary.samples
