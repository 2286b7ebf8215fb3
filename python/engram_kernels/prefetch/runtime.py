"""The compiled prefetcher (csrc/prefetch/row_prefetcher.h) and the memory that it works in."""
from __future__ import annotations

import contextlib
import dataclasses
import mmap
from typing import Any

import torch
from torch import Tensor

from engram_kernels._library import COMPILE_ERROR, CUDA_ERROR
from engram_kernels.capacity import check_device_memory, check_memory
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
    engine: Any = None  # tests: an engine that injects faults

    @property
    def slot_bytes(self) -> int:
        """Bytes of rows that one request can have."""
        return self.ring_bytes // (self.depth + 1) // _SLOT_ALIGN * _SLOT_ALIGN


class CompiledRuntime:
    """Tickets and slots. Holds what the C++ object only knows the addresses of: the ring, the table, ids on a device."""

    def __init__(self, options: RuntimeOptions):
        self._table, self._device, self._policy = options.table, options.device, options.policy
        self._engine = options.engine or _make_engine(options)  # first: it says why there is no such device
        check_room_of_cache(options)
        self._ring = _ring_memory(options)
        self._slots = self._ring.view(options.out_dtype).view(options.depth + 1, -1)
        self._registered: list[int] = []
        self._scales = options.table.scales
        if self._scales is not None and self._scales.dim() == 1:
            self._scales = self._scales.to(options.device)  # one number, which every gather reads
        self._direct = options.policy in ("uva", "device") or (options.policy == "staged" and self._engine.reads_host_memory)
        if options.policy == "uva":
            for memory in (options.table.rows, self._scales):
                if memory is not None and memory.device.type == "cpu":
                    self._register(memory)
        self._impl = _C.RowPrefetcher({
            **_table_of(options.table, self._scales), "direct": self._direct, "on_device": options.table.tier == "device",
            "staging_bytes": options.staging_bytes, "cache_bytes": min(options.cache_bytes, _ALL_BYTES),
            "num_threads": options.threads, "out_dtype": str(options.out_dtype).removeprefix("torch."), "depth": options.depth,
            "slots": self._ring.data_ptr(), "slot_bytes": options.slot_bytes, "max_blocks": options.max_blocks,
            "trace_spans": options.trace_spans}, self._engine)
        self.cancel, self.drain, self.clear_cache = self._impl.cancel, self._impl.drain, self._impl.clear_cache
        self.counters, self.chrome_trace, self.knows = self._impl.counters, self._impl.chrome_trace, self._impl.knows

    def submit(self, row_ids: Tensor, timeout_s: float) -> int:
        """A ticket."""
        on_device = row_ids.device.type != "cpu"
        if self._device.type != "cpu" and torch.cuda.is_current_stream_capturing() and not (self._direct and on_device):
            raise RuntimeError(f"RowPrefetcher: under graph capture the policy must be uva or device and the ids on "
                               f"{self._device}; got policy {self._policy!r} and ids on {row_ids.device}")
        ids = (row_ids.data_ptr(), row_ids.numel(), row_ids.dtype == torch.int64, on_device, self._stream())
        ticket: int = self._impl.submit(ids, row_ids.shape, timeout_s)
        return ticket

    def wait(self, ticket: int, timeout_s: float, keep: bool) -> int:
        """The slot of a ticket."""
        slot: int = self._impl.wait(ticket, timeout_s, self._stream(), keep)
        return slot

    def release(self, slot: int) -> None:
        """The slot may be written again after what the current stream holds."""
        self._impl.release(slot, self._stream())

    def rows(self, slot: int, count: int) -> Tensor:
        """The first `count` elements of a slot."""
        return self._slots[slot, :count]

    def close(self) -> None:
        """Drops what is in flight; nothing touches the ring or the table afterwards."""
        self._impl.close()
        while self._registered:
            self._engine.unregister_host(self._registered.pop())

    def _register(self, memory: Tensor) -> None:
        num_bytes = (memory.shape[0] - 1) * memory.stride(0) * memory.element_size() + memory[0].nbytes if len(memory) else 0
        if num_bytes and self._engine.register_host(memory.data_ptr(), num_bytes):
            self._registered.append(memory.data_ptr())

    def _stream(self) -> int:
        return 0 if self._device.type == "cpu" else int(torch.cuda.current_stream(self._device).cuda_stream)


def _make_engine(options: RuntimeOptions) -> Any:
    if options.device.type == "cpu":
        return _C.host_engine(options.threads)
    if CUDA_ERROR:
        raise RuntimeError(f"RowPrefetcher: device {options.device} is not available: {CUDA_ERROR}")
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


def _ring_memory(options: RuntimeOptions) -> Tensor:
    num_bytes = options.slot_bytes * (options.depth + 1)
    if options.device.type != "cpu":
        ring = torch.empty(num_bytes, dtype=torch.uint8, device=options.device)
        # the engine has a stream of its own, and this one may still use what it was memory of before, or be filling the table
        torch.cuda.current_stream(options.device).synchronize()
        return ring
    # pages of a slot cost memory once they are written
    memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and options.slot_bytes >= _HUGE_PAGE_BYTES:
        with contextlib.suppress(OSError):  # a kernel without them: small pages serve
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:num_bytes]  # keeps the memory alive


def _table_of(table: RowTable, scales: Tensor | None) -> dict[str, Any]:
    rows, in_file = table.rows, table.tier == "file"

    def stride(x: Tensor) -> int:  # that of a single row means nothing
        return (x.stride(0) if x.shape[0] > 1 and not in_file else x.shape[1]) * x.element_size()

    return {
        "rows": 0 if in_file else rows.data_ptr(), "num_rows": table.num_rows, "row_stride_bytes": stride(rows),
        "scales": scales.data_ptr() if scales is not None and not scales.is_meta else 0,
        "scale_stride_bytes": stride(scales) if scales is not None and scales.dim() == 2 else 0,
        "row_dim": table.row_dim, "row_format": table.row_format, "zero_scale_is_zero": table.zero_scale_is_zero,
        "file": table._file.tier if table._file is not None else None}
