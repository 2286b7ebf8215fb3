"""Random rows on a GPU: from its memory, from pinned host memory over the link, staged by the CPU, alone or beside other work."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.profile.arena import Arena
from engram_kernels.profile.cells import JsonCell, Skip
from engram_kernels.profile.machine import allowed_cpus
from engram_kernels.profile.probes_host import ROW_FILL, V41_COLUMNS, V41_ROW_BYTES, V41_ROW_DIM
from engram_kernels.profile.probes_host import table_limit as host_limit
from engram_kernels.profile.session import Session
from engram_kernels.table.row_table import RowTable

MIB, GIB = 1 << 20, 1 << 30
_TOKENS = {"quick": (1, 16, 512, 4096), "full": (1, 4, 16, 64, 512, 4096)}
_ROW_BYTES = {"quick": (128, V41_ROW_BYTES, 512, 4096), "full": (64, 128, 256, V41_ROW_BYTES, 512, 1024, 2048, 4096)}
_MAX_CALL_BYTES, _SAMPLE_BYTES, _MAX_CALLS = 64 * MIB, 64 * MIB, 20
_GEMM, _BESIDE_BYTES = 4096, 16 * MIB


@dataclass(frozen=True)
class Shape:
    """One point.

    Attributes:
        placement: "device", "uva" or "staged".
        row_bytes, table_bytes: as in the report.
        rows: ids per call, which are what is in flight.
        cold: fresh random ids in each call; False: the same ids again and again.
    """
    placement: str
    row_bytes: int
    table_bytes: int
    rows: int
    cold: bool = True


class Gather:
    """Calls of gather_rows of one shape on a GPU.

    Args:
        gpu: the device.
        memory: uint8, of the device, pinned, or, to be staged, any of the host's.
        shape: of the calls.
    """

    def __init__(self, gpu: Any, memory: Any, shape: Shape):
        num_rows = shape.table_bytes // shape.row_bytes
        stored = memory[:num_rows * shape.row_bytes].view(num_rows, shape.row_bytes)
        staged = shape.placement == "staged"
        packed = shape.row_bytes == V41_ROW_BYTES and not staged  # what is staged crosses the link as it is stored
        self.table = RowTable.from_tensor(stored, row_format="fp8_e4m3_block32_packed", row_dim=V41_ROW_DIM) if packed else \
            RowTable.from_tensor(stored.view(torch.bfloat16))
        self.shape, self.gpu, self.num_rows = shape, gpu, num_rows
        self.calls_a_sample = max(1, min(_MAX_CALLS, _SAMPLE_BYTES // (shape.rows * shape.row_bytes)))
        # int32: what ngram_hash gives
        self.ids = torch.empty(self.calls_a_sample, shape.rows, dtype=torch.int32, device="cpu" if staged else gpu.device)
        self.out = gpu.empty(shape.rows * self.table.row_dim * 2).view(torch.bfloat16).view(shape.rows, self.table.row_dim)
        self.staging = gpu.host(self.out.numel() * 2, True).view(torch.bfloat16).view_as(self.out) if staged else None
        self.ids.random_(0, num_rows)

    def calls(self) -> list[Callable[[], object]]:
        """Fresh calls; run them before the next are made."""
        if self.shape.cold:
            self.ids.random_(0, self.num_rows)
        sets = list(self.ids) if self.shape.cold else [self.ids[0]] * self.calls_a_sample
        return [partial(gather_rows, self.table, ids, out=self.out) for ids in sets]

    def sample(self) -> float:
        """Seconds of a call."""
        if self.staging is None:
            return float(self.gpu.seconds(self.calls()))
        self.ids.random_(0, self.num_rows)
        return float(self.gpu.wall_seconds(self._stage)) / self.calls_a_sample

    def _stage(self) -> None:
        for ids in self.ids:
            gather_rows(self.table, ids, out=self.staging)
            self.out.copy_(self.staging, non_blocking=True)
            self.gpu.sync()  # the buffer is used again

    def cell(self, session: Session, backend: str) -> JsonCell:
        """What is measured."""
        shape = self.shape
        return {"probe": "gpu_gather", "op": "gather_rows", "tier": "device" if shape.placement == "device" else "host",
                "placement": shape.placement, "row_bytes": shape.row_bytes, "row_format": self.table.row_format,
                "table_bytes": shape.table_bytes, "rows": shape.rows, "bytes": shape.rows * shape.row_bytes, "order": "uniform",
                "cold": shape.cold, "gpu": session.options.gpu, "beside": "nothing",
                "pinned": {"device": None, "uva": True, "staged": False}[shape.placement],
                "threads": torch.get_num_threads() if shape.placement == "staged" else None, "facts": {"backend": backend}}


def gather(session: Session, gpu: Any) -> None:
    """The surface of row size, table size and rows in flight, by placement."""
    backend = gpu.gather_backend()
    device = _sizes(gpu.free_bytes() * 6 // 10, (GIB, 8 * GIB) if session.quick else (GIB // 4, GIB, 4 * GIB, 16 * GIB, 64 * GIB))
    host = _pinned_sizes(session, (2 * GIB,) if session.quick else (GIB, 8 * GIB, 32 * GIB))
    # the host first: what no one knows beforehand. Each has a part of the time
    for placement, sizes, share in (("uva", [*host], 0.4), ("device", device, 0.7), ("staged", host, 1.0)):
        with session.at_most(share):
            memory = _table_memory(session, gpu, placement, sizes)
            for shape in shapes(session, placement, sizes) if memory is not None else ():
                _measure(session, gpu, memory, shape, backend if placement != "staged" else "cpu")
        del memory
        gpu.release()


def _sizes(limit: int, wanted: tuple[int, ...]) -> list[int]:
    sizes = sorted({min(size, limit) // MIB * MIB for size in wanted})
    if sizes[0] < MIB:
        raise Skip("NO_MEMORY", f"a table may have {limit // MIB} MiB here")
    return sizes


def _pinned_sizes(session: Session, wanted: tuple[int, ...], part: int = 2) -> list[int]:
    """Powers of two, which torch's pinned memory is rounded up to, within a part of the memory that a table may have."""
    limit = host_limit(session) // part
    return _sizes(1 << limit.bit_length() - 1 if limit else 0, wanted)


def _table_memory(session: Session, gpu: Any, placement: str, sizes: list[int]) -> Any:
    """Memory for the largest table that can be had; `sizes` loses those that cannot be, which are filed. None: none can."""
    while sizes:
        try:
            if placement == "staged":  # the CPU reads it: huge pages, and nothing that a device must reach
                return torch.from_numpy(Arena(sizes[-1], True, allowed_cpus(), fill=ROW_FILL).data)
            return gpu.empty(sizes[-1]).fill_(ROW_FILL) if placement == "device" else gpu.host(sizes[-1], True)
        except RuntimeError as err:
            session.skip({"probe": "gpu_gather", "placement": placement, "table_bytes": sizes.pop()}, "NO_MEMORY", str(err)[:300])
            gpu.release()
    return None


def shapes(session: Session, placement: str, sizes: list[int]) -> list[Shape]:
    """The points, those that a planner needs most first."""
    mode, largest = session.options.mode, sizes[-1]
    tokens = _TOKENS[mode]
    row_sizes = _ROW_BYTES[mode] if placement != "staged" or not session.quick else (V41_ROW_BYTES, 512)
    points = [Shape(placement, row, size, V41_COLUMNS * t) for size in reversed(sizes) for row in row_sizes
              for t in reversed(tokens if row in (V41_ROW_BYTES, 512) or not session.quick else tokens[-1:])]
    if placement == "device":
        points += [Shape(placement, row, largest, V41_COLUMNS * t, cold=False) for row in (V41_ROW_BYTES, 512) for t in (1, 512)]
    return [p for p in points if p.rows * p.row_bytes <= _MAX_CALL_BYTES] + \
        [Shape(p.placement, p.row_bytes, p.table_bytes, _MAX_CALL_BYTES // p.row_bytes, p.cold)
         for p in points if p.rows * p.row_bytes > _MAX_CALL_BYTES]


def _measure(session: Session, gpu: Any, memory: Any, shape: Shape, backend: str) -> None:
    base: JsonCell = {"probe": "gpu_gather", "placement": shape.placement, "row_bytes": shape.row_bytes,
                      "table_bytes": shape.table_bytes, "rows": shape.rows}
    try:
        work = Gather(gpu, memory, shape)
    except (RuntimeError, ValueError) as err:
        session.fail(base, err)
        return
    # what a stream reached here, and what the hardware, the copy engine and loads over the link could: the one divides
    peak, others = ("device_stream", ["device"]) if shape.placement == "device" else ("link_h2d", ["link_h2d_copy"])
    others += ["link_h2d_sm"] if shape.placement == "uva" else []
    result = session.measure(work.cell(session, backend), work.sample, peak=peak,
                             may_be_cached=not shape.cold or shape.table_bytes < GIB)
    for other in others if result["status"] == "ok" else ():
        if other in session.peaks:
            result["facts"][f"share_of_{other}"] = result["bytes_per_s"] / session.peaks[other]["bytes_per_s"]


def interference(session: Session, gpu: Any) -> None:
    """Rows gathered while a GEMM, or copies to the device, run on another stream; and what that does to the other work."""
    backend = gpu.gather_backend()
    size = min(_pinned_sizes(session, (GIB,), 4)[0], _sizes(gpu.free_bytes() // 4, (GIB,))[0])
    side = _GEMM if size == GIB else 256
    a, b, c = (torch.ones(side, side, dtype=torch.bfloat16, device=gpu.device) for _ in range(3))
    source, target = gpu.host(_BESIDE_BYTES, True), gpu.empty(_BESIDE_BYTES)
    others = {"gemm": lambda: torch.mm(a, b, out=c), "copies": lambda: target.copy_(source, non_blocking=True)}
    for placement in ("uva", "device"):
        memory = gpu.host(size, True) if placement == "uva" else gpu.empty(size)
        for tokens in (16, 512):
            work = Gather(gpu, memory, Shape(placement, V41_ROW_BYTES, size, V41_COLUMNS * tokens))
            for beside, other in others.items():
                try:
                    _measure_beside(session, gpu, work, (beside, other), backend)
                except Exception as err:
                    session.fail({**work.cell(session, backend), "probe": "gpu_interference", "beside": beside}, err)
        del memory
        gpu.release()


def _measure_beside(session: Session, gpu: Any, work: Gather, beside: tuple[str, Callable[[], object]], backend: str) -> None:
    name, other = beside
    cell = {**work.cell(session, backend), "probe": "gpu_interference", "beside": name}
    if session.time_is_up():
        session.skip(cell, "TIME_BUDGET", "the time of this probe was used up")
        return
    work.sample()
    gpu.seconds([other] * 2)
    alone, other_alone = work.sample(), gpu.seconds([other] * 4)
    # the other work outlasts the gathers, so that they are beside it to their end
    count = min(256, 2 + int(1.5 * alone * work.calls_a_sample / other_alone))
    result = session.measure(cell, lambda: gpu.seconds_beside(work.calls(), [other] * count))
    if result["status"] != "ok":
        return
    rounds = max(1, min(16, int(1.5 * 4 * other_alone / max(alone * work.calls_a_sample, 1e-9))))
    slowed = sorted(gpu.seconds_beside([other] * 4, [c for _ in range(rounds) for c in work.calls()]) for _ in range(5))[2]
    result["slowdown_of_other"] = slowed / other_alone
    result["facts"].update(slowdown_of_gather=result["median"] / alone)
