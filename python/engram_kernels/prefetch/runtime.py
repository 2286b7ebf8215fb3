"""The compiled prefetcher (csrc/prefetch/row_prefetcher.h) and the memory that it works in."""
from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
from typing import Any

import torch
from torch import Tensor

from engram_kernels._library import COMPILE_ERROR, CUDA_ERROR
from engram_kernels.capacity import CapacityError, check_device_memory, check_memory
from engram_kernels.prefetch.distinct import DistinctIds
from engram_kernels.prefetch.errors import PrefetchCancelled
from engram_kernels.prefetch.policy import way_of
from engram_kernels.table.row_table import RowTable

if not COMPILE_ERROR:
    from engram_kernels import _C

_HUGE_PAGE_BYTES = 2 << 20
_SLOT_ALIGN = 256  # bytes
_ALL_BYTES = 1 << 62  # more than any table has
_MAX_CACHED_ROWS = (1 << 31) - 1
_DIRECTORY_BYTES_PER_ROW = 29


@dataclasses.dataclass(frozen=True)
class RuntimeOptions:
    """What a runtime is made of; see `RowPrefetcher`."""

    table: RowTable
    policy: str
    device: torch.device
    out_dtype: torch.dtype
    depth: int
    ring_bytes: int
    staging_bytes: int
    threads: int
    max_blocks: int
    trace_spans: int
    cache_bytes: int = 0
    distinct_from: int | None = None  # see `Policy`
    engine: Any = None  # tests: an engine that injects faults

    @property
    def slot_bytes(self) -> int:
        """Bytes of rows that one request can have."""
        return self.ring_bytes // (self.depth + 1) // _SLOT_ALIGN * _SLOT_ALIGN


class CompiledRuntime:
    """Tickets and slots. Holds what the C++ object only knows the addresses of: the ring, the table, ids on a device."""

    def __init__(self, options: RuntimeOptions):
        self._device = options.device
        # makes the device current as torch does: the way back makes no context on a device that the thread never chose
        self.on_device = (lambda: torch.cuda.device(options.device)) if options.device.type == "cuda" else contextlib.nullcontext
        if options.engine is None and options.device.type == "cuda" and CUDA_ERROR:  # before torch looks for it, in its own words
            raise RuntimeError(f"RowPrefetcher: device {options.device} is not available: {CUDA_ERROR}")
        with self.on_device(), torch.inference_mode(False):
            self._make(options)

    def _make(self, options: RuntimeOptions) -> None:
        table = options.table
        _expect_stored(table)
        engine = options.engine or _make_engine(options)
        check_room_of_cache(options)
        scales = table.scales
        if scales is not None and scales.dim() == 1:
            scales = scales.to(options.device)  # one number, which every gather reads
        self._way = way_of(options.policy, engine.reads_host_memory)
        if self._way == "uva":
            _expect_readable(table, engine)
        self._distinct = (DistinctIds(options.device, options.distinct_from)
                          if self._way == "uva" and options.distinct_from is not None else None)
        num_slots = options.depth + 1
        self._ring: _Ring | None = _Ring(options, num_slots + (self._distinct is not None))
        self._held: tuple[Tensor, ...] | None = tuple(x.detach() for x in (table.rows, scales) if x is not None)
        self._table, self._places = table, _places_of(table)
        self._impl = _C.RowPrefetcher({
            **_table_of(table, scales), "way": self._way,
            "staging_bytes": options.staging_bytes, "cache_bytes": min(options.cache_bytes, _ALL_BYTES),
            "num_threads": options.threads, "out_dtype": str(options.out_dtype).removeprefix("torch."), "depth": options.depth,
            "slots": self._ring.address, "slot_bytes": options.slot_bytes,
            "distinct_rows": 0 if self._distinct is None else self._ring.address + num_slots * options.slot_bytes,
            "max_blocks": options.max_blocks,
            "trace_spans": options.trace_spans}, engine)
        self.cancel, self.drain, self.clear_cache = self._impl.cancel, self._impl.drain, self._impl.clear_cache
        self.chrome_trace, self.knows = self._impl.chrome_trace, self._impl.knows
        self.restore = self._impl.restore

    def submit(self, ticket: int, row_ids: Tensor, timeout_s: float, held: list[Tensor]) -> None:
        """Starts a request by the number `ticket`, which no request had before. `held` gets tensors that a device reads until
        the request is waited for or cancelled."""
        on_device, captures = row_ids.device.type != "cpu", False
        if self._device.type != "cpu":
            captures = torch.cuda.is_current_stream_capturing()
        if captures and not (self._way in ("uva", "device") and on_device):
            raise RuntimeError(f"RowPrefetcher: under graph capture the policy must be uva or device and the ids on "
                               f"{self._device}; got rows on the way {self._way!r} and ids on {row_ids.device}")
        self._expect_in_place()
        shape, stream, places = row_ids.shape, self._stream(), 0
        # the CPU as a device of its own stands for a GPU: its ids are the device's
        if (self._distinct is not None and row_ids.numel() >= self._distinct.least and row_ids.device == self._device
                and not captures):
            row_ids, of_rows, stream = self._distinct(row_ids)
            held += (row_ids, of_rows)
            places, on_device = of_rows.data_ptr(), True
            stream = stream or self._stream()
        ids = (ticket, row_ids.data_ptr(), row_ids.numel(), row_ids.dtype == torch.int64, on_device, stream, places)
        with self.on_device():
            self._impl.submit(ids, shape, timeout_s)

    def counters(self) -> dict[str, Any]:
        """The counters of requests that were waited for; under `distinct` those of requests that were submitted."""
        distinct = {"requests": 0, "asked": 0, "fetched": 0} if self._distinct is None else self._distinct.counters()
        return {**self._impl.counters(), "distinct": distinct}

    def wait(self, ticket: int, timeout_s: float, keep: bool) -> int:
        """The slot of a ticket."""
        with self.on_device():
            slot: int = self._impl.wait(ticket, timeout_s, self._stream(), keep)
        return slot

    def release(self, slot: int) -> None:
        """The slot may be written again after what the current stream holds."""
        with self.on_device():
            self._impl.release(slot, self._stream())

    def rows(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """The first elements of a slot that `wait` gave, as a tensor of that shape."""
        if self._ring is None:  # closed since
            raise PrefetchCancelled("RowPrefetcher: it was closed meanwhile")
        return self._ring.rows(slot, shape)

    def close(self) -> None:
        """Drops what is in flight and gives all memory back but that of rows which somebody holds."""
        with self.on_device():
            self._impl.close()
        self._ring = self._held = None

    def others_left(self, timeout_s: float) -> bool:
        """Whether every other call has ended within the time-out."""
        return bool(self._impl.others_left(timeout_s))

    def _expect_in_place(self) -> None:
        """Refuses a table whose tensors were moved or converted since this was made."""
        now = _places_of(self._table)
        if now == self._places or self._ring is None:  # closed, as the submit will say
            return
        name, then, at = next((name, a, b) for name, a, b in zip(("rows", "scales"), self._places, now, strict=False) if a != b)
        moved = ", elsewhere in memory" if at[0] != then[0] else ""
        raise RuntimeError(f"RowPrefetcher: the table is not where it was when this prefetcher was made: its {name} were "
                           f"{then[1]} {list(then[2])}, and are {at[1]} {list(at[2])}{moved} (the module was moved or "
                           "converted, or its data assigned); make a new RowPrefetcher")

    def _stream(self) -> int:
        return 0 if self._device.type == "cpu" else int(torch.cuda.current_stream(self._device).cuda_stream)


class _Ring:
    """Memory for rows, slot by slot, and the tensors that are given out of it."""

    def __init__(self, options: RuntimeOptions, num_slots: int):
        self._slot_bytes, self._dtype, self._on_cpu = options.slot_bytes, options.out_dtype, options.device.type == "cpu"
        if self._on_cpu:
            self._memory = _cpu_memory(options, num_slots)
            self.address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
        else:
            self._tensor = _device_memory(options, num_slots)
            self.address = self._tensor.data_ptr()
            self._streams: set[int] = set()

    def rows(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """The first elements of a slot."""
        count = math.prod(shape)
        if self._on_cpu:
            if count == 0:
                return torch.empty(shape, dtype=self._dtype, device="cpu")
            # a storage of its own, exactly as large: torch may move it (share_memory_, a queue of processes) or save it
            return torch.frombuffer(self._memory, dtype=self._dtype, count=count, offset=slot * self._slot_bytes).view(shape)
        stream = torch.cuda.current_stream(self._tensor.device)
        if stream.cuda_stream not in self._streams:
            # the allocator knows the stream that the ring was made on; it asks each of the others once the ring goes
            self._tensor.record_stream(stream)
            self._streams.add(stream.cuda_stream)
        begin = slot * self._slot_bytes
        return self._tensor[begin:begin + count * self._dtype.itemsize].view(self._dtype).view(shape)


# address, dtype, shape and strides of a tensor
_Place = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


def _places_of(table: RowTable) -> list[_Place]:
    """Where the rows and the scales of a table in memory lie, with dtype, shape and strides; empty for any other table."""
    if not table.in_memory:
        return []
    return [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in (table.rows, table.scales) if x is not None]


def _expect_stored(table: RowTable) -> None:
    """Refuses rows that each read computes anew: nobody holds what an address is taken of."""
    if table.rows is not table.rows:
        raise ValueError("RowPrefetcher: the table's rows are computed anew at each read (by a parametrization, or a copy of "
                         "rows whose elements lie apart), expected rows that are stored; make a table of them as they are now: "
                         "RowTable.from_tensor(table.rows.detach(), row_format=table.row_format)")


def _expect_readable(table: RowTable, engine: Any) -> None:
    for name, x in (("rows", table.rows), ("scales", table.scales)):
        if x is None or x.dim() != 2 or x.numel() == 0 or x.device.type != "cpu":
            continue
        num_bytes = ((x.shape[0] - 1) * x.stride(0) + x.shape[1]) * x.element_size()
        if not engine.can_read(x.data_ptr(), num_bytes):
            raise ValueError(f"RowPrefetcher: policy 'uva' reads the table's {name} where they are, and they are not pinned: "
                             "call table.pin() first (from_tensor(copy=True) or share() gives a table that can be)")


def _make_engine(options: RuntimeOptions) -> Any:
    if options.device.type == "cpu":
        return _C.host_engine(options.threads)
    from engram_kernels import _C_cuda
    return _C_cuda.cuda_engine(options.device.index)


def check_room_of_cache(options: RuntimeOptions) -> None:
    """Raises CapacityError unless the device has room for the cache and, on a GPU, what else a prefetcher has there."""
    if options.cache_bytes == 0:
        return
    table = options.table
    # as csrc/prefetch/device_row_cache.cpp
    rows = min(options.cache_bytes // table.row_bytes, -(-table.num_rows // 16) * 16, _MAX_CACHED_ROWS)
    cache_bytes, what = rows * table.row_bytes, f"a cache of {rows} rows"
    check_memory("RowPrefetcher", f"the directory of {what}", rows * _DIRECTORY_BYTES_PER_ROW)
    if options.device.type == "cpu":
        check_memory("RowPrefetcher", what, cache_bytes)
    else:
        check_device_memory("RowPrefetcher", f"{what}, with ring and staging buffer",
                            cache_bytes + options.ring_bytes + options.staging_bytes, options.device)


def _device_memory(options: RuntimeOptions, num_slots: int) -> Tensor:
    ring = torch.empty(options.slot_bytes * num_slots, dtype=torch.uint8, device=options.device)
    # the engine has a stream of its own, and this one may still use what it was memory of before, or be filling the table
    torch.cuda.current_stream(options.device).synchronize()
    return ring


def _cpu_memory(options: RuntimeOptions, num_slots: int) -> mmap.mmap:
    # pages of a slot cost memory once they are written
    num_bytes = max(options.slot_bytes * num_slots, 1)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as err:
        raise CapacityError(f"RowPrefetcher: no address space for a ring of {num_bytes} bytes, {num_slots} slots (depth "
                            f"{options.depth} and the one that is read); lower depth or ring_bytes") from err
    if hasattr(mmap, "MADV_HUGEPAGE") and options.slot_bytes >= _HUGE_PAGE_BYTES:
        with contextlib.suppress(OSError):  # a kernel without them: small pages serve
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _table_of(table: RowTable, scales: Tensor | None) -> dict[str, Any]:
    rows, elsewhere = table.rows, not table.in_memory

    def stride(x: Tensor) -> int:  # that of a single row means nothing
        return (x.stride(0) if x.shape[0] > 1 and not elsewhere else x.shape[1]) * x.element_size()

    return {
        "rows": 0 if elsewhere else rows.data_ptr(), "num_rows": table.num_rows, "row_stride_bytes": stride(rows),
        "scales": scales.data_ptr() if scales is not None and not scales.is_meta else 0,
        "scale_stride_bytes": stride(scales) if scales is not None and scales.dim() == 2 else 0,
        "row_dim": table.row_dim, "row_format": table.row_format, "zero_scale_is_zero": table.zero_scale_is_zero,
        "table_scale": table.table_scale,
        "tier": table._file.tier if table._file is not None else None}
