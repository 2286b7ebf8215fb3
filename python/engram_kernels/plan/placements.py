"""Where the table may lie, and what one layer's lookup costs there: whether it fits, and the stages that its rows pass."""
from __future__ import annotations

import dataclasses

from engram_kernels._names import PLACEMENTS
from engram_kernels.plan.hardware import Hardware, rate_at
from engram_kernels.plan.profile_input import PAGE_BYTES
from engram_kernels.plan.quantity import Quantity, assumed, derived, given, total
from engram_kernels.plan.workload import OUT_BYTES, Workload, touched

TITLES = {"device": "device memory", "device_cache": "device cache", "uva": "UVA", "staged": "staged", "file": "file",
          "remote": "remote"}
ENGINE_ROW_BYTES = 264  # of the rows with which engines for remote rows were measured
CHUNKS = 4  # pieces in which rows pass from stage to stage
RING_DEPTH = 2  # requests whose buffers exist at once
_NO_COMPUTE = given(0, "1", "a link, a drive or another machine takes no compute")
_MEMORY_BOUND = assumed(1, "1", "default: a gather takes the memory that the compute waits for")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a lookup.

    Attributes:
        resource: what it occupies: "device", "link", "host", "disk", "nvlink" or "network".
        seconds: how long, for all rows of a layer.
        share: of the compute that is lost meanwhile.
    """
    resource: str
    seconds: Quantity
    share: Quantity


@dataclasses.dataclass(frozen=True)
class Lookup:
    """One layer's rows: a delay, then the stages, in pieces.

    Attributes:
        latency: seconds until the first piece enters the first stage.
        stages: in the order in which rows pass them.
        device_bytes: what the placement takes of the device memory, for all layers.
        why_not: why it cannot be, in words; None: it can.
    """
    latency: Quantity
    stages: tuple[Stage, ...]
    device_bytes: Quantity
    why_not: str | None

    @property
    def seconds(self) -> Quantity:
        """Seconds from submit to the last row where nothing else runs: a pipeline of equal pieces."""
        parts = [stage.seconds for stage in self.stages]
        return derived("s", lambda latency, *s: latency + sum(s) / CHUNKS + max(s) * (CHUNKS - 1) / CHUNKS, self.latency, *parts)

    @property
    def lost(self) -> Quantity:
        """Seconds of compute that its stages take where they run beside it."""
        return total("s", [derived("s", lambda s, share: s * share, x.seconds, x.share) for x in self.stages])


def lookup(placement: str, work: Workload, node: Hardware) -> Lookup:
    """The lookup of one layer.

    Args:
        placement: one of `PLACEMENTS`.
        work: what is asked for.
        node: the machine.

    Raises:
        ValueError: no such placement.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"plan: placement is {placement!r}, expected {', '.join(PLACEMENTS)}")
    if not node.has_gpu and placement in ("device", "device_cache", "uva"):
        zero = given(0, "s", "no GPU")
        return Lookup(zero, (), given(0, "B", "no GPU"), "there is no GPU (name one with --gpu)")
    of = {"device": _in_device, "device_cache": _device_cache, "uva": _uva, "staged": _staged, "file": _file, "remote": _remote}
    return of[placement](work, node)


def _seconds(num_bytes: float, rows: Quantity, rate: Quantity, times: Quantity | None = None) -> Quantity:
    if times is None:
        return derived("s", lambda n, r: n * num_bytes / r, rows, rate)
    return derived("s", lambda n, r, k: n * num_bytes * k / r, rows, rate, times)


def _device_seconds(work: Workload, node: Hardware, rows: Quantity, table_bytes: float) -> Quantity:
    """A kernel gathers rows from device memory and writes them out; a measured rate of rows has the writing in it."""
    rate, = _device(node, "device_gather")
    num_bytes = work.link_bytes + work.spec.row_dim * OUT_BYTES if node.device_counts_traffic else work.row_bytes
    return _seconds(num_bytes, rows, rate_at(rate, work.row_bytes, table_bytes))


def _fits(need: Quantity, room: Quantity | None, where: str) -> str | None:
    if room is None or need.value <= room.value:
        return None
    return f"needs {need.value / 2**30:.1f} GiB of {where}, {room.value / 2**30:.1f} GiB are there"


def _ring(work: Workload) -> Quantity:
    """Buffers for the rows of `RING_DEPTH` requests of every layer."""
    return derived("B", lambda n: n * work.row_bytes * RING_DEPTH * len(work.spec.layer_ids), work.requested)


def _device_ring(work: Workload, node: Hardware) -> Quantity:
    return _ring(work) if node.has_gpu else given(0, "B", "no GPU")


def _ring_fits(work: Workload, node: Hardware) -> str | None:
    return _fits(_device_ring(work, node), node.device_bytes, "device memory for the buffers")


def _device(node: Hardware, *fields: str) -> list[Quantity]:
    values = [getattr(node, field) for field in fields]
    assert all(v is not None for v in values), "lookup() lets no placement that needs a GPU through without one"
    return values


def _in_device(work: Workload, node: Hardware) -> Lookup:
    gpus = derived("1", lambda g, n: g * n, work.gpus, work.nodes)
    mine = derived("B", lambda table, g: table / g, work.table_bytes, gpus)
    latency, nvlink = _device(node, "gpu_latency", "nvlink")
    stages = [Stage("device", _device_seconds(work, node, work.requested, mine.value), _MEMORY_BOUND)]
    if work.gpus.value > 1:  # the shard of another GPU of the node
        away = derived("1", lambda g, n: (g - 1) / (g * n), work.gpus, work.nodes)
        stages.append(Stage("nvlink", _seconds(work.row_bytes, work.requested, nvlink, away), _NO_COMPUTE))
    stages += _from_other_nodes(work, node, work.requested)
    return Lookup(_latency(work, node, latency), tuple(stages), mine, _fits(mine, node.device_bytes, "device memory per GPU"))


def _from_other_nodes(work: Workload, node: Hardware, rows: Quantity) -> list[Stage]:
    """The exchange of the shards: every node asks every other for its part, and receives as much as it sends."""
    if work.nodes.value <= 1:
        return []
    away = derived("1", lambda n: (n - 1) / n, work.nodes)
    return [Stage("network", _seconds(work.row_bytes, rows, node.network, away), _NO_COMPUTE)]


def _uva_rate(work: Workload, node: Hardware) -> Quantity:
    rate, = _device(node, "uva")
    at = rate_at(rate, work.row_bytes, work.table_bytes.value)
    return derived("B/s", lambda r: r * work.row_bytes / work.link_bytes, at) if node.uva_counts_sectors else at


def _uva(work: Workload, node: Hardware) -> Lookup:
    latency, share = _device(node, "gpu_latency", "gather_share")
    host = derived("B", lambda table, copies: table * copies, work.table_bytes, work.copies)
    stage = Stage("link", _seconds(work.row_bytes, work.requested, _uva_rate(work, node)), share)
    return Lookup(latency, (stage,), _ring(work), _fits(host, node.host_bytes, "host memory") or _ring_fits(work, node))


def _device_cache(work: Workload, node: Hardware) -> Lookup:
    latency, share = _device(node, "gpu_latency", "gather_share")
    hit_rows = derived("rows", lambda n, h: n * h, work.distinct, work.hit_rate)
    missed = derived("rows", lambda n, h: n - h, work.distinct, hit_rows)
    hits = Stage("device", _device_seconds(work, node, hit_rows, max(work.cache_bytes.value, 1)), _MEMORY_BOUND)
    misses = Stage("link", _seconds(work.row_bytes, missed, _uva_rate(work, node)), share)
    host = derived("B", lambda table, copies: table * copies, work.table_bytes, work.copies)
    device = derived("B", lambda c, ring: c + ring, work.cache_bytes, _ring(work))
    why_not = "the cache has no room: no device memory is given to it" if work.cache_slots.value < 1 else (
        _fits(device, node.device_bytes, "device memory") or _fits(host, node.host_bytes, "host memory"))
    return Lookup(latency, (misses, hits), device, why_not)


def _host_gather(work: Workload, node: Hardware, rows: Quantity, table_bytes: float) -> Stage:
    """The CPU puts rows together: as stored where a copy to a GPU follows, else dequantized. A node's GPUs share it."""
    decodes = not node.has_gpu and work.spec.row_format not in ("f32", "bf16", "f16")
    rate = rate_at(node.host_decode if decodes else node.host_copy, work.row_bytes, table_bytes)
    return Stage("host", _seconds(work.row_bytes, rows, rate, work.gpus), node.host_share)


def _to_device(work: Workload, node: Hardware, rows: Quantity) -> list[Stage]:
    """Over the link by the copy engine, then into the order of the ids by a kernel; nothing where the CPU computes."""
    if not node.has_gpu:
        return []
    link, stream = _device(node, "link", "device_stream")
    share = derived("1", lambda rate, device: rate / device, link, stream)  # of the device memory's time
    expand = _device_seconds(work, node, work.requested, work.row_bytes * work.requested.value)
    return [Stage("link", _seconds(work.row_bytes, rows, link), share),
            Stage("device", expand, _MEMORY_BOUND)]


def _latency(work: Workload, node: Hardware, *parts: Quantity | None) -> Quantity:
    """The sum of the latencies that there are, and of a hop over the network where shards are exchanged."""
    hop = node.network_latency if work.nodes.value > 1 else None
    return total("s", [part for part in (*parts, hop) if part is not None])


def _asked(work: Workload, node: Hardware) -> Quantity:
    """Rows that are fetched: a GPU gets each distinct row once; on the CPU a gather reads every id, the caches help it."""
    return work.distinct if node.has_gpu else work.requested


def _staged(work: Workload, node: Hardware) -> Lookup:
    rows = _asked(work, node)
    shard = derived("B", lambda table, copies, nodes: table * copies / nodes, work.table_bytes, work.copies, work.nodes)
    stages = [_host_gather(work, node, rows, work.table_bytes.value / work.nodes.value), *_from_other_nodes(work, node, rows),
              *_to_device(work, node, rows)]
    return Lookup(_latency(work, node, node.host_latency, node.copy_latency), tuple(stages), _device_ring(work, node),
                  _fits(shard, node.host_bytes, "host memory") or _ring_fits(work, node))


def _file(work: Workload, node: Hardware) -> Lookup:
    pages = sum(touched(part, PAGE_BYTES) for part in work.row_parts)
    rows = work.distinct  # the reader fetches each page once
    shard = derived("B", lambda table, nodes: table / nodes, work.table_bytes, work.nodes)  # processes share a file
    reads = Stage("disk", _seconds(pages, rows, node.disk_reads, work.gpus), _NO_COMPUTE)
    # from buffers that the drive has just written: a small table
    stages = [reads, _host_gather(work, node, rows, PAGE_BYTES * max(rows.value, 1)), *_from_other_nodes(work, node, rows),
              *_to_device(work, node, rows)]
    return Lookup(_latency(work, node, node.disk_latency, node.copy_latency), tuple(stages), _device_ring(work, node),
                  _fits(shard, node.disk_bytes, "disk") or _ring_fits(work, node))


def _remote(work: Workload, node: Hardware) -> Lookup:
    """The whole table in the memory of another machine of the same kind, which gathers and sends, or an engine does it all."""
    rows = work.distinct
    latency = _latency(work, node, node.host_latency, node.copy_latency)
    if node.engine_rows is not None:  # whose rate has the gather and the network in it, and its latency the hop
        latency = total("s", [x for x in (node.engine_latency, node.copy_latency) if x is not None])
        sending = [Stage("network", _seconds(max(work.row_bytes / ENGINE_ROW_BYTES, 1), rows, node.engine_rows), _NO_COMPUTE)]
    else:
        gather = dataclasses.replace(_host_gather(work, node, rows, work.table_bytes.value), share=_NO_COMPUTE)
        sending = [gather, Stage("network", _seconds(work.row_bytes, rows, node.network), _NO_COMPUTE)]
    stages = [*sending, *_to_device(work, node, rows)]
    others = derived("B", lambda room, nodes: room * (nodes - 1), node.host_bytes, work.nodes)
    why_not = "there is no other node (--nodes)" if work.nodes.value < 2 else (
        _fits(work.table_bytes, others, "the other nodes' memory") or _ring_fits(work, node))
    return Lookup(latency, tuple(stages), _device_ring(work, node), why_not)
