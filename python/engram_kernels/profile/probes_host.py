"""Probes of the host's memory: streams, memcpy, latency, and the random rows that all of this is about."""
from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from engram_kernels import info
from engram_kernels._library import COMPILE_ERROR
from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.prefetch.row_prefetcher import RowPrefetcher
from engram_kernels.profile import arena as arenas
from engram_kernels.profile.arena import Arena
from engram_kernels.profile.cells import CACHED_TABLES, JsonCell, Skip, expect_share, give_verdict
from engram_kernels.profile.machine import allowed_cpus
from engram_kernels.profile.row_draws import draw, load_trace
from engram_kernels.profile.session import Session
from engram_kernels.table.row_table import RowTable

MIB = 1 << 20
_CONTROL_PASSES = 8
V41_ROW_BYTES, V41_ROW_DIM, V41_COLUMNS = 264, 256, 24  # DeepSeek-V4.1-Flash: packed fp8 rows, 24 per token and layer
_MAX_CALL_BYTES = 32 * MIB  # payload of a call
# every byte of a table: as fp8 and as bf16 an ordinary number, as a scale 2^-7 (zeros are 2^-127: subnormal arithmetic)
ROW_FILL = 120
_CHASE_STEPS = 1 << 16
_PREFETCH = (0, 4, 16, 64)


SECONDS = {"host_limits": 1, "host_stream": 3, "host_memcpy": 2, "host_latency": 3, "host_gather": 12}


def native() -> Any:
    """The compiled loops.

    Raises:
        Skip: the compiled module is missing.
    """
    if COMPILE_ERROR:
        raise Skip("NO_COMPILED_MODULE", COMPILE_ERROR)
    from engram_kernels import _C
    return _C


def control() -> Callable[[], float]:
    """Seconds of a fixed piece of work: one thread reads 1 MiB eight times, after a pass that is not timed. That pass brings back
    what the measured call pushed out of the caches: without it every large table seems to lie in a slow machine."""
    loops, memory = native(), Arena(MIB, True, [-1]).data
    read = partial(loops.probe_stream, "read", memory, memory, memory, [-1])
    return lambda: sum([float(read()) for _ in range(1 + _CONTROL_PASSES)][1:])


def run_host_probes(session: Session) -> None:
    """All of them, each for its share of the time."""
    fixed = None if COMPILE_ERROR else control()
    share = host_share(session.quick, session.has_gpu)
    runs = {"host_limits": limits, "host_stream": stream, "host_memcpy": memcpy, "host_latency": latency, "host_gather": gather}
    for name, seconds in SECONDS.items():
        with session.probe(name, seconds * share, fixed):
            runs[name](session)


def host_share(quick: bool, has_gpu: bool) -> float:
    """What the seconds of the probes are multiplied by: a machine without a GPU has the GPU's time."""
    return (1.0 if quick else 10.0) * (0.5 if has_gpu else 1.8)


def limits(session: Session) -> None:
    """Capacities and limits; nothing is timed."""
    block = session.machine
    free = table_limit(session)
    facts = {**block["limits"], "memory_free_bytes": block["machine"]["memory_free_bytes"], "largest_table_bytes": free,
             "huge_pages_setting": block["machine"]["huge_pages"], "disk_free_bytes": block["disk"]["free_bytes"],
             "disk_writable": block["disk"]["writable"]}
    cell: JsonCell = {"probe": "host_limits", "status": "ok", "verdict": "OK", "provenance": "measured", "reason": None,
                      "facts": facts}
    flags = []
    if block["machine"]["huge_pages"] in (None, "never"):
        give_verdict(cell, "NO_HUGEPAGES")
    if block["limits"]["shm_free_bytes"] is None:
        flags.append("no /dev/shm: processes cannot share a table")
    memlock = block["limits"]["memlock_bytes"]
    if memlock is not None and memlock < 1 << 30:
        flags.append(f"memlock is {memlock >> 10} KiB: RDMA and mlock are bound by it (ulimit -l), CUDA's pinned memory is not")
    session.add({**cell, "flags": flags})


def thread_counts() -> list[int]:
    """1, 2, 4, ... and all CPUs that may be used."""
    cpus = len(allowed_cpus())
    return sorted({cpus, *(1 << i for i in range(cpus.bit_length()) if 1 << i <= cpus)})


def stream(session: Session) -> None:
    """Read, copy and triad by threads, then by NUMA node; sets the peaks that host cells are divided by."""
    loops, cpus = native(), allowed_cpus()
    num_bytes = min(max(4 * session.last_level_bytes, 64 * MIB), table_limit(session) // 3) // 64 * 64
    if num_bytes < session.last_level_bytes:
        raise Skip("NO_MEMORY", f"three arrays of {num_bytes >> 20} MiB are smaller than the cache")
    a, b, c = (Arena(num_bytes, True, cpus) for _ in range(3))
    for loop, arrays in (("read", 1), ("copy", 2), ("triad", 3)):
        for threads in thread_counts():
            base = {"probe": "host_stream", "op": loop, "tier": "host", "placement": "host", "threads": threads,
                    "table_bytes": num_bytes, "bytes": arrays * num_bytes, "huge_pages": b.huge_pages}
            cell = session.measure(base, partial(loops.probe_stream, loop, a.data, b.data, c.data, cpus[:threads]))
            if cell["status"] == "ok":
                session.set_peak(f"host_{loop}", cell["bytes_per_s"], f"{loop} of {num_bytes >> 20} MiB arrays in this run")
    session.peak_again["host_read"] = partial(_read_rate, loops, num_bytes, cpus)
    nodes = session.machine["numa"]
    if len(nodes) < 2:
        session.skip({"probe": "host_stream", "op": "read", "cpu_node": 0, "memory_node": 1}, "ONE_NUMA_NODE",
                     f"this machine has {len(nodes) or 'no'} NUMA node{'s' if len(nodes) != 1 else ''} that the system tells of")
    else:
        _stream_by_node(session, loops, num_bytes)


def _read_rate(loops: Any, num_bytes: int, cpus: list[int]) -> float:
    memory = Arena(num_bytes, True, cpus).data
    seconds = (float(loops.probe_stream("read", memory, memory, memory, on)) for on in (cpus, cpus[:1]) for _ in range(9))
    return num_bytes / min(seconds)


def _stream_by_node(session: Session, loops: Any, num_bytes: int) -> None:
    """Every node's memory read by every node's CPUs. Reads across are facts; they are a fault where there are no others."""
    mine = set(allowed_cpus())
    sides = {n["node"]: [c for c in n["cpus"] if c in mine] for n in session.machine["numa"]}
    across, has_near = [], False
    for memory_node in sides:
        try:
            memory = Arena(num_bytes, True, [-1], memory_node)
        except ValueError as err:
            session.skip({"probe": "host_stream", "op": "read", "memory_node": memory_node}, "PERMISSION", str(err))
            continue
        for cpu_node, cpus in sides.items():
            if not cpus:
                continue
            base = {"probe": "host_stream", "op": "read", "tier": "host", "placement": "host", "threads": len(cpus),
                    "bytes": num_bytes, "table_bytes": num_bytes, "huge_pages": memory.huge_pages,
                    "cpu_node": cpu_node, "memory_node": memory_node}
            cell = session.measure(base, partial(loops.probe_stream, "read", *[memory.data] * 3, cpus))
            has_near |= cpu_node == memory_node
            if cpu_node != memory_node and cell["status"] == "ok":
                cell["facts"] = {"crosses_nodes": True}
                across.append(cell)
    if not has_near:
        for cell in across:
            give_verdict(cell, "NUMA_REMOTE")


def memcpy(session: Session) -> None:
    """memcpy by size and threads: where staging through the host goes."""
    loops, cpus = native(), allowed_cpus()
    largest = min(256 * MIB, table_limit(session) // 2)
    if largest < MIB // 4:
        raise Skip("NO_MEMORY", f"{largest >> 10} KiB are all that may be used")
    source, target = Arena(largest, True, cpus), Arena(largest, True, cpus)
    for num_bytes in (size for size in (4 << 10, 64 << 10, MIB, 16 * MIB, 256 * MIB) if size <= largest):
        for threads in sorted({1, len(cpus)}):
            repeats = max(1, 4 * MIB // num_bytes)
            arrays = target.data[:num_bytes], source.data[:num_bytes]
            session.measure({"probe": "host_memcpy", "op": "memcpy", "tier": "host", "placement": "host", "threads": threads,
                             "table_bytes": num_bytes, "bytes": 2 * num_bytes, "huge_pages": source.huge_pages},
                            partial(_copy_seconds, loops, arrays, repeats, cpus[:threads]),
                            peak="host_copy", may_be_cached=num_bytes < cached_below(session))


def _copy_seconds(loops: Any, arrays: tuple[Any, Any], repeats: int, cpus: list[int]) -> float:
    return float(loops.probe_memcpy(*arrays, repeats, cpus)) / repeats


def cached_below(session: Session) -> int:
    """Bytes below which a cache may answer."""
    return CACHED_TABLES * session.last_level_bytes


def latency(session: Session) -> None:
    """Nanoseconds of a load whose address the load before gave, with and without huge pages."""
    loops, cpu, steps = native(), allowed_cpus()[0], _CHASE_STEPS
    largest = min((256 if session.quick else 1024) * MIB, table_limit(session))
    sizes = [s for s in (4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB) if s <= largest]
    if not sizes:
        raise Skip("NO_MEMORY", f"{largest >> 10} KiB are all that may be used")
    for huge_pages in (True, False):
        for num_bytes in sizes if huge_pages else sizes[-1:]:
            memory = Arena(num_bytes, huge_pages, [cpu])
            loops.probe_make_chase(memory.data, 1)
            line = 0

            def sample(memory: Arena = memory) -> float:
                nonlocal line
                seconds, line = loops.probe_chase(memory.data, steps, line, cpu)
                return float(seconds) / steps

            base = {"probe": "host_latency", "op": "load", "tier": "host", "placement": "host", "threads": 1,
                    "table_bytes": num_bytes, "row_bytes": 64, "rows": 1, "huge_pages": memory.huge_pages}
            cell = session.measure(base, sample)
            if huge_pages and not memory.huge_pages and cell["status"] == "ok":
                give_verdict(cell, "NO_HUGEPAGES")
            if cell["status"] == "ok":
                cell["facts"] = {"load_ns": cell["median"] * 1e9}


def table_limit(session: Session) -> int:
    """Bytes of the largest table that may be made now."""
    block = session.machine
    return arenas.table_limit(info.memory_room(block), session.options.max_memory_bytes)


@dataclass(frozen=True)
class Shape:
    """One point of the surface of random rows.

    Attributes:
        row_bytes, table_bytes, order, threads: as in the report.
        rows: ids per call.
        prefetch: None: as `op`; else the plain loop, which asks for rows this far ahead.
        op: "gather_rows"; or "prefetcher": submit and wait of RowPrefetcher, whose threads gather.
    """
    row_bytes: int
    table_bytes: int
    order: str
    threads: int
    rows: int
    prefetch: int | None = None
    op: str = "gather_rows"

    @property
    def packed(self) -> bool:
        """Whether rows are fp8 and decoded."""
        return self.row_bytes == V41_ROW_BYTES


def gather(session: Session) -> None:
    """Random rows: the surface of row size, table size, order, threads, pages and prefetch."""
    sizes = table_sizes(session)
    trace = None if session.options.trace is None else load_trace(session.options.trace)
    threads_before = torch.get_num_threads()
    try:
        for huge_pages in (True, False):
            if session.time_is_up():
                session.skip({"probe": "host_gather", "huge_pages": huge_pages}, "TIME_BUDGET",
                             "the time of this probe was used up")
                break
            memory = Arena(sizes[-1], huge_pages, allowed_cpus(), fill=ROW_FILL, max_seconds=session.seconds_left() / 3)
            there = memory.data.size
            if there < sizes[-1]:
                session.skip({"probe": "host_gather", "table_bytes": sizes[-1]}, "TIME_BUDGET",
                             f"the system gave only {there // MIB} MiB in the time that a {session.options.mode} run has")
            sizes = sorted({min(size, there) for size in sizes})
            with session.at_most(0.7 if huge_pages else 1.0):
                for shape in shapes(session, sizes, huge_pages, trace is not None):
                    measure_gather(session, memory, shape, trace, huge_pages)
            del memory
    finally:
        torch.set_num_threads(threads_before)
    if trace is None:
        session.skip({"probe": "host_gather", "order": "trace"}, "NOT_SUPPORTED", "no --trace FILE was given")
    _against_plain(session)


def table_sizes(session: Session) -> list[int]:
    """Bytes of the tables, ascending: in a full run up to the limit."""
    limit = table_limit(session)
    wanted = (64 * MIB, 512 * MIB, 2048 * MIB) if session.quick else (64 * MIB, 256 * MIB, 1024 * MIB, 4096 * MIB, limit)
    sizes = sorted({min(size, limit) // (2 * MIB) * (2 * MIB) for size in wanted})
    if sizes[0] < 16 * MIB:
        raise Skip("NO_MEMORY", f"a table may have {limit >> 20} MiB here")
    return sizes


def shapes(session: Session, sizes: list[int], huge_pages: bool, has_trace: bool) -> list[Shape]:
    """The points to measure, those that a planner needs most first: a run may end before the last."""
    row_sizes = (64, V41_ROW_BYTES, 512, 4096) if session.quick else (64, 128, 256, V41_ROW_BYTES, 512, 1024, 2048, 4096)
    all_threads, largest = len(allowed_cpus()), sizes[-1]
    main = [Shape(row, size, "uniform", threads, rows_per_call(row))
            for size in reversed(sizes) for row in row_sizes for threads in sorted({1, all_threads}, reverse=True)]
    if not huge_pages:
        return [s for s in main if s.row_bytes in (V41_ROW_BYTES, 512) and (s.threads == all_threads or not session.quick)]
    calls = [Shape(row, largest, "uniform", threads, rows) for row in (V41_ROW_BYTES, 512)
             for rows in (V41_COLUMNS, 16 * V41_COLUMNS) for threads in sorted({1, all_threads})]
    orders = [Shape(row, largest, order, all_threads, rows_per_call(row))
              for row in ((512,) if session.quick else (V41_ROW_BYTES, 512))
              for order in ("sorted", "deduplicated", "zipf", *(["trace"] if has_trace else []))]
    plain = [Shape(512, largest, "uniform", 1, rows_per_call(512), prefetch) for prefetch in _PREFETCH]
    smaller = [s for s in main if s.table_bytes < largest]
    behind = [Shape(row, largest, "uniform", all_threads, rows, op="prefetcher") for row in (V41_ROW_BYTES, 512)
              for rows in (V41_COLUMNS, rows_per_call(row))]
    return [*(s for s in main if s.table_bytes == largest), *calls, *behind, *orders, *plain, *smaller]


def rows_per_call(row_bytes: int) -> int:
    """Rows of a large call."""
    return min(1 << 16, _MAX_CALL_BYTES // row_bytes)


def measure_gather(session: Session, memory: Arena, shape: Shape, trace: Any = None, huge_pages: bool = True) -> None:
    """Files the cell of one shape.

    Args:
        session: where it goes.
        memory: the table, at least as large as the shape's.
        shape: of the calls.
        trace: row ids for the order "trace".
        huge_pages: whether they were asked for.
    """
    drawn = _draw_calls(shape, 4 * session.last_level_bytes, trace)
    rows = round(statistics.fmean(len(ids) for ids in drawn))
    cell: JsonCell = {
        "probe": "host_gather", "op": shape.op if shape.prefetch is None else "plain", "tier": "host", "placement": "host",
        "row_bytes": shape.row_bytes, "row_format": "fp8_e4m3_block32_packed" if shape.packed else "bf16",
        "table_bytes": shape.table_bytes, "rows": rows, "bytes": rows * shape.row_bytes, "order": shape.order,
        "unique_ratio": round(len(np.unique(drawn[0])) / len(drawn[0]), 4), "threads": shape.threads,
        "huge_pages": memory.huge_pages, "prefetch": shape.prefetch, "cold": True}
    cached = shape.order != "uniform" or shape.table_bytes < cached_below(session)
    with contextlib.ExitStack() as stack:
        sample = _gather_sample(memory, shape, drawn, max(1, 2048 // shape.rows), stack)
        result = session.measure(cell, sample, peak="host_read", may_be_cached=cached)
    if huge_pages and not memory.huge_pages and result["status"] == "ok":
        give_verdict(result, "NO_HUGEPAGES")


def _draw_calls(shape: Shape, cold_bytes: int, trace: Any) -> list[Any]:
    """Ids of different calls, of so many rows together that no cache holds those of the last round."""
    sets = max(2, -(-cold_bytes // (shape.rows * shape.row_bytes)))
    num_rows = shape.table_bytes // shape.row_bytes
    rng = np.random.default_rng(shape.rows + shape.row_bytes)
    if shape.order == "uniform":
        return list(draw("uniform", num_rows, sets * shape.rows, rng).reshape(sets, shape.rows))
    return [draw(shape.order, num_rows, shape.rows, rng, trace) for _ in range(sets)]


def _gather_sample(memory: Arena, shape: Shape, drawn: list[Any], calls: int,
                   stack: contextlib.ExitStack) -> Callable[[], float]:
    """Seconds of a call; a sample of small calls is the mean of several."""
    bytes_used = memory.data[:shape.table_bytes // shape.row_bytes * shape.row_bytes]
    turn = itertools.cycle(drawn)
    # pages as the table's: in small ones the stores of gather_rows took a quarter longer
    target = Arena(shape.rows * (2 * V41_ROW_DIM if shape.packed else shape.row_bytes), memory.huge_pages, [-1]).data
    if shape.prefetch is not None:
        loops = native()
        return lambda: sum(float(loops.probe_gather(bytes_used, shape.row_bytes, ids, target[:ids.size * shape.row_bytes],
                                                    shape.prefetch, [-1] * shape.threads))
                           for ids in itertools.islice(turn, calls)) / calls
    torch.set_num_threads(shape.threads)
    stored = torch.from_numpy(bytes_used).view(-1, shape.row_bytes)
    if shape.packed:
        table = RowTable.from_tensor(stored, row_format="fp8_e4m3_block32_packed", row_dim=V41_ROW_DIM)
    else:
        table = RowTable.from_tensor(stored.view(torch.bfloat16))
    if shape.op == "prefetcher":
        return _prefetcher_sample(stack.enter_context(RowPrefetcher(table)), drawn, calls)
    out = torch.from_numpy(target).view(torch.bfloat16).view(shape.rows, table.row_dim)
    tensors = itertools.cycle([torch.from_numpy(ids) for ids in drawn])

    def sample() -> float:
        torch.set_num_threads(shape.threads)
        begin = time.perf_counter()
        for ids in itertools.islice(tensors, calls):
            gather_rows(table, ids, out=out[:ids.shape[0]])
        return (time.perf_counter() - begin) / calls

    return sample


def _prefetcher_sample(prefetcher: RowPrefetcher, drawn: list[Any], calls: int) -> Callable[[], float]:
    """Seconds from a submit to its rows, where nothing else is asked for."""
    tensors = itertools.cycle([torch.from_numpy(ids) for ids in drawn])

    def sample() -> float:
        begin = time.perf_counter()
        for ids in itertools.islice(tensors, calls):
            prefetcher.wait(prefetcher.submit(ids))
        return (time.perf_counter() - begin) / calls

    return sample


def _against_plain(session: Session) -> None:
    """gather_rows beside the best plain loop of the same shape in this run."""
    cells = [c for c in session.cells if c["probe"] == "host_gather" and c["status"] == "ok"]
    plain = [c for c in cells if c["op"] == "plain"]
    if not plain:
        return
    best = min(plain, key=lambda c: c["least"] / c["bytes"])
    same = ("row_bytes", "table_bytes", "order", "threads", "rows", "huge_pages")
    for cell in cells:
        if cell["op"] == "gather_rows" and all(cell[k] == best[k] for k in same):
            # the two were measured one after the other, and a disturbance only makes slower: the least of each judges
            expect_share(cell, best["median"] / cell["median"], "plain_loop", best["least"] / cell["least"])


