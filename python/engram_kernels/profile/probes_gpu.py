"""Probes of a GPU: its link, its memory, and streams beside each other. Random rows are in probes_gpu_gather.py."""
from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.profile.cells import JsonCell, Skip, expect_share, give_verdict
from engram_kernels.profile.gpu_device import TorchGpu
from engram_kernels.profile.machine import allowed_cpus
from engram_kernels.profile.nvml import LoadSampler, Nvml, keep_busy, link_payload_bytes_per_s, numa_node, throttle_reasons
from engram_kernels.profile.pcie import pcie_of
from engram_kernels.profile.probes_gpu_gather import Gather, Shape, gather, interference
from engram_kernels.profile.probes_host import V41_ROW_BYTES
from engram_kernels.profile.probes_host import table_limit as host_limit
from engram_kernels.profile.session import Session
from engram_kernels.table.row_table import RowTable

KIB, MIB = 1 << 10, 1 << 20
ROW_DIM = 256  # of rows that are read in order
SECONDS = {"gpu_link_state": 3, "gpu_stream": 2, "gpu_link": 7, "gpu_gather": 11, "gpu_interference": 4}
_CALL_BYTES, _MAX_CALLS = 64 * MIB, 32
_LOAD_SECONDS, _LOAD_BYTES, _LOAD_CALLS = 0.4, 64 * MIB, 8
_LINK_BYTES = {"quick": (64 * KIB, MIB, 16 * MIB, 256 * MIB),
               "full": (4 * KIB, 64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB)}
_STREAM_BYTES = 1024 * MIB
_LARGE_BYTES = 16 * MIB  # transfers from here on should reach the link's rate
_OWN_LINK = ("GH200", "GB200", "GB300")  # the host is behind NVLink-C2C, not PCIe


def run_gpu_probes(session: Session, open_gpu: Callable[[int], Any] | None = None, nvml_library: Any = None) -> None:
    """All of them, each for its share of the time.

    Args:
        session: where cells go.
        open_gpu: makes the device from its index; injected by tests.
        nvml_library: stands in for pynvml in tests.
    """
    try:
        gpu = _open(session, open_gpu)
    except Skip as skip:
        for name in SECONDS:
            with session.probe(name, 1):
                session.skip({"probe": name, "gpu": session.options.gpu}, skip.kind, skip.text)
        return
    nvml, why_no_nvml = _open_nvml(gpu, nvml_library)
    _describe(session, nvml, why_no_nvml)
    share = gpu_share(session.quick)
    runs = {"gpu_stream": stream, "gpu_link": link, "gpu_gather": gather, "gpu_interference": interference}
    with torch.inference_mode():
        with session.probe("gpu_link_state", SECONDS["gpu_link_state"] * share):
            link_state(session, gpu, nvml, why_no_nvml)
        for name, run in runs.items():
            before = len(session.cells)
            with session.probe(name, SECONDS[name] * share), _watch_clocks(session, nvml, before):
                session.control = link_control(gpu) if name == "gpu_link" else memory_control(gpu)
                run(session, gpu)
            session.control = None  # and its memory
            gpu.release()


def gpu_share(quick: bool) -> float:
    """What the seconds of the probes are multiplied by."""
    return 1.0 if quick else 8.0


def link_control(gpu: Any) -> Callable[[], float]:
    """Seconds of a fixed piece of work: 1 MiB from pinned memory to the device."""
    call = _copy(gpu.empty(MIB), gpu.host(MIB, True))
    return lambda: float(gpu.seconds([call] * 4))


def memory_control(gpu: Any) -> Callable[[], float]:
    """A control of the device's memory: the seconds that copying 64 MiB takes, less where there is little."""
    size = min(64 * MIB, gpu.free_bytes() // 16)
    call = _copy(gpu.empty(size), gpu.empty(size))
    return lambda: float(gpu.seconds([call] * 2))


def _open(session: Session, open_gpu: Callable[[int], Any] | None) -> Any:
    index = session.options.gpu
    if open_gpu is None:
        if not torch.cuda.is_available():
            raise Skip("NO_GPU", "torch finds no CUDA device" if torch.version.cuda else "this torch was built without CUDA")
        if not 0 <= index < torch.cuda.device_count():
            raise Skip("NO_GPU", f"there is no GPU {index}; torch finds {torch.cuda.device_count()}")
        open_gpu = TorchGpu
    try:
        return open_gpu(index)
    except Exception as err:
        raise Skip("NO_GPU", f"GPU {index} cannot be used: {err}") from None


def _open_nvml(gpu: Any, library: Any) -> tuple[Nvml | None, Skip | None]:
    try:
        return Nvml(gpu, library), None
    except Skip as skip:
        return None, skip
    except Exception as err:
        return None, Skip("NO_NVML", f"{type(err).__name__}: {err}")


def _describe(session: Session, nvml: Nvml | None, why_not: Skip | None) -> None:
    """Puts what NVML and the PCIe capability tell into the machine block, and the ceilings into the peaks."""
    blocks = session.machine["gpu"]
    while len(blocks) <= session.options.gpu:
        blocks.append({})
    block = blocks[session.options.gpu]
    values, unread = nvml.read() if nvml else ({}, {"nvml": str(why_not)})
    bus_id = values.get("pci_bus_id")
    block.update(values, unread=unread, numa_node=numa_node(bus_id), pcie=None)
    try:
        block["pcie"] = pcie_of(bus_id) if bus_id else None
    except (OSError, ValueError) as err:  # such as without root
        unread["pcie"] = f"{type(err).__name__}: {err}"
    clock, bits = values.get("memory_clock_max_mhz"), values.get("memory_bus_bits")
    if clock and bits and not values.get("mig_enabled"):  # a slice has a part of it, which NVML does not tell
        source = f"{clock} MHz, two transfers a clock, {bits} bits, by NVML"
        session.set_peak("device", clock * 1e6 * 2 * bits / 8, source, "assumed", physical=True)


def link_state(session: Session, gpu: Any, nvml: Nvml | None, why_not: Skip | None) -> None:
    """Generation and width of the link, clocks and power while copies run; bytes on the wire beside bytes asked for."""
    base: JsonCell = {"probe": "gpu_link_state", "gpu": session.options.gpu, "tier": "host"}
    if nvml is None:
        assert why_not is not None
        raise why_not
    size = _LOAD_BYTES
    host, device = gpu.host(size, True), gpu.empty(size)
    for op, call in (("h2d", _copy(device, host)), ("d2h", _copy(host, device))):
        _measure_load(session, gpu, nvml, {**base, "op": op}, partial(list, [call] * _LOAD_CALLS), size)
    try:
        gpu.gather_backend()
        # several times the GPU's cache, and other rows in each call
        rows = Gather(gpu, gpu.host(4 * size, True), Shape("uva", V41_ROW_BYTES, 4 * size, size // (8 * V41_ROW_BYTES)))
        base.update(op="uva_gather", placement="uva", row_bytes=V41_ROW_BYTES)
        _measure_load(session, gpu, nvml, base, rows.calls, rows.shape.rows * V41_ROW_BYTES)
    except Skip as skip:
        session.skip({**base, "op": "uva_gather"}, skip.kind, skip.text)


def _measure_load(session: Session, gpu: Any, nvml: Nvml, base: JsonCell, make_calls: Callable[[], list[Callable[[], object]]],
                  bytes_per_call: int) -> None:
    calls = 0

    def batch() -> None:
        nonlocal calls
        made = make_calls()
        for call in made:
            call()
        calls += len(made)
        gpu.sync()

    batch()
    calls = 0
    with LoadSampler(nvml) as sampler:
        took = keep_busy(batch, _LOAD_SECONDS)
    rate = calls * bytes_per_call / took
    cell = {**base, "status": "ok", "verdict": "OK", "reason": None, "provenance": "measured",
            "facts": {**sampler.values, "payload_bytes_per_s": rate}, "flags": [f"{k}: {v}" for k, v in sampler.unread.items()]}
    if wire := sampler.sent if base["op"] == "d2h" else sampler.received:
        cell["facts"]["wire_bytes_per_payload_byte"] = statistics.median(wire) / rate
    _judge_link(session, cell)
    session.add(cell)


def _judge_link(session: Session, cell: JsonCell) -> None:
    facts, block = cell["facts"], session.machine["gpu"][session.options.gpu]
    for what in ("link_generation", "link_width"):
        best = block.get(f"{what}_max")
        if best and facts.get(what) and facts[what] < best:
            give_verdict(cell, "LINK_DEGRADED")
            cell["flags"].append(f"{what} {facts[what]} under load, {best} is possible")
    if reasons := throttle_reasons(facts.get("clock_event_reasons")):
        give_verdict(cell, "THROTTLED")
        cell["flags"] += reasons
    generation, width = facts.get("link_generation"), facts.get("link_width")
    if cell["op"] in ("h2d", "d2h") and generation and width and not any(name in str(block.get("name")) for name in _OWN_LINK):
        ceiling = link_payload_bytes_per_s(generation, width)
        for op, ways in ((cell["op"], 1), ("both", 2)):
            if ceiling is not None:
                session.set_peak(f"link_{op}", ways * ceiling, f"PCIe {generation} x{width} under load, {ways} direction"
                                 f"{'s' if ways > 1 else ''}, 512-byte payloads with 24 bytes around each", "assumed", True)


def link(session: Session, gpu: Any) -> None:
    """Copies over the link by direction, size, engine and kind of host memory."""
    room = min(gpu.free_bytes() // 4, host_limit(session) // 4)
    sizes = tuple(size for size in _LINK_BYTES[session.options.mode] if size <= room)
    if not sizes:
        raise Skip("NO_MEMORY", f"buffers may have {room >> 10} KiB here")
    remote = _is_remote(session)
    for pinned in (True, False):
        host, back, device = gpu.host(sizes[-1], pinned), gpu.host(sizes[-1], pinned), gpu.empty(sizes[-1])
        other = gpu.empty(sizes[-1])
        for size in reversed(sizes):
            h2d = _copy(device[:size], host[:size])
            d2h = _copy(back[:size], other[:size])
            for op, call in (("h2d", h2d), ("d2h", d2h), *([("both", gpu.both(h2d, d2h))] if pinned else [])):
                _measure_link(session, gpu, (op, "copy", pinned, size), call, remote)
        if pinned:
            _link_by_multiprocessors(session, gpu, (host, back, device), sizes, remote)
        del host, back, device, other


def _link_by_multiprocessors(session: Session, gpu: Any, memory: tuple[Any, Any, Any], sizes: tuple[int, ...],
                             remote: bool) -> None:
    host, back, device = memory
    words = device.view(torch.int64)
    try:
        from_host, to_host = gpu.alias(host), gpu.alias(back)
    except Exception as err:
        for op in ("h2d", "d2h", "read"):
            session.skip({"probe": "gpu_link", "op": op, "engine": "sm", "pinned": True}, "NOT_SUPPORTED",
                         f"pinned memory as a tensor of the device: {type(err).__name__}: {err}")
        return
    _rows_in_order(session, gpu, (host, device), sizes, remote)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for size in reversed([s for s in sizes if s >= MIB]):
        count = size // 8
        # loads alone, whose sum stays on the device
        _measure_link(session, gpu, ("read", "sm", True, size), partial(torch.sum, from_host[:count], 0, out=total), remote)
        for op, source, target in (("h2d", from_host, words), ("d2h", words, to_host)):
            call = partial(torch.bitwise_not, source[:count], out=target[:count])
            _measure_link(session, gpu, (op, "sm", True, size), call, remote)


def _rows_in_order(session: Session, gpu: Any, memory: tuple[Any, Any], sizes: tuple[int, ...], remote: bool) -> None:
    """Our own kernel's loads: 16 bytes each, many in flight, a row at a time, of rows that lie one behind the other."""
    host, device = memory
    try:
        gpu.gather_backend()
    except Skip as skip:
        session.skip({"probe": "gpu_link", "op": "read_rows", "engine": "sm", "pinned": True}, skip.kind, skip.text)
        return
    for size in reversed([s for s in sizes if s >= MIB]):
        rows, out = (x[:size].view(torch.bfloat16).view(-1, ROW_DIM) for x in (host, device))
        ids = torch.arange(len(rows), dtype=torch.int32, device=device.device)
        call = partial(gather_rows, RowTable.from_tensor(rows), ids, out=out)
        _measure_link(session, gpu, ("read_rows", "sm", True, size), call, remote)


def _copy(target: Any, source: Any) -> Callable[[], object]:
    return lambda: target.copy_(source, non_blocking=True)


def _measure_link(session: Session, gpu: Any, point: tuple[str, str, bool, int], call: Callable[[], object],
                  remote: bool) -> None:
    op, engine, pinned, size = point
    calls = max(1, min(_MAX_CALLS, _CALL_BYTES // size))
    moved = 2 * size if op == "both" else size
    cell: JsonCell = {"probe": "gpu_link", "op": op, "engine": engine, "pinned": pinned, "tier": "host",
                      "gpu": session.options.gpu, "table_bytes": size, "bytes": moved}

    def sample() -> float:
        if pinned:
            return float(gpu.seconds([call] * calls))
        # a copy of pageable memory waits by itself, so it cannot be queued behind a blocked stream
        return float(gpu.wall_seconds(lambda: [call() for _ in range(calls)])) / calls

    result = session.measure(cell, sample, peak=f"link_{'h2d' if op.startswith('read') else op}")
    if result["status"] == "ok" and engine == "sm" and op != "d2h":
        session.set_peak("link_h2d_sm", result["bytes_per_s"], f"{size // KIB} KiB read by multiprocessors in this run")
    if result["status"] == "ok" and pinned and engine == "copy":
        session.set_peak(f"link_{op}_copy", result["bytes_per_s"], f"copies of {size // KIB} KiB in this run")
        if size >= _LARGE_BYTES and "peak_share" in result:
            expect_share(result, result["peak_share"], "link")
    if result["status"] == "ok" and remote:
        give_verdict(result, "NUMA_REMOTE")


def _is_remote(session: Session) -> bool:
    """Whether no CPU that this process may use is on the node of the GPU's slot."""
    node = session.machine["gpu"][session.options.gpu].get("numa_node")
    cpus: list[int] = next((n["cpus"] for n in session.machine["numa"] if n["node"] == node), [])
    return bool(cpus) and not set(cpus) & set(allowed_cpus())


def stream(session: Session, gpu: Any) -> None:
    """Read, copy and triad of the device's memory; sets the peak "device_stream"."""
    num_bytes = min(_STREAM_BYTES, gpu.free_bytes() // 4) // 4 * 4
    a, b, c = (gpu.empty(num_bytes).view(torch.float32) for _ in range(3))
    for x in (a, b, c):
        x.zero_()
    total = torch.zeros((), dtype=torch.float32, device=a.device)
    for op, arrays, call in (("read", 1, lambda: torch.sum(b, 0, out=total)), ("copy", 2, lambda: a.copy_(b)),
                             ("triad", 3, lambda: torch.add(b, c, alpha=3.0, out=a))):
        result = session.measure({"probe": "gpu_stream", "op": op, "tier": "device", "placement": "device",
                                  "gpu": session.options.gpu, "table_bytes": num_bytes, "bytes": arrays * num_bytes},
                                 partial(gpu.seconds, [call] * 4), peak="device")
        if result["status"] == "ok":
            session.set_peak("device_stream", result["bytes_per_s"], f"{op} of {num_bytes // MIB} MiB arrays in this run")
            if "peak_share" in result and op != "read":
                expect_share(result, result["peak_share"], "device")


@contextlib.contextmanager
def _watch_clocks(session: Session, nvml: Nvml | None, before: int) -> Iterator[None]:
    """Marks the cells of the body where the clocks were held down meanwhile."""
    if nvml is None:
        yield
        return
    with LoadSampler(nvml, ("clock_event_reasons",), 0.1) as sampler:
        yield
    for reason in throttle_reasons(sampler.values.get("clock_event_reasons")):
        for cell in (c for c in session.cells[before:] if c["status"] == "ok"):
            give_verdict(cell, "THROTTLED")
            cell["flags"].append(reason)
