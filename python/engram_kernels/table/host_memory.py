"""Memory for the rows of a table: how they lie in it, where it comes from, and what was got."""
from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from engram_kernels import capacity
from engram_kernels._library import CUDA_ERROR, need_compiled
from engram_kernels.row_format import ROW_FORMATS

_SCALES_ALIGN_BYTES = 64


@dataclasses.dataclass(frozen=True)
class TableLayout:
    """Rows, then scales where there are any, in one piece of memory."""

    rows: tuple[int, ...]
    rows_dtype: torch.dtype
    scales: tuple[int, ...] | None
    scales_dtype: torch.dtype | None

    @classmethod
    def of(cls, row_format: str, num_rows: int, width: int, row_dim: int) -> TableLayout:
        """The layout of a dense table."""
        fmt = ROW_FORMATS[row_format]
        return cls((num_rows, width), fmt.dtype, fmt.scale_shape(num_rows, row_dim), fmt.scale_dtype)

    @property
    def scales_offset(self) -> int:
        """First byte of the scales."""
        return -(-math.prod(self.rows) * self.rows_dtype.itemsize // _SCALES_ALIGN_BYTES) * _SCALES_ALIGN_BYTES

    @property
    def num_bytes(self) -> int:
        """Bytes of all; at least 1, since no memory has none."""
        if self.scales is None or self.scales_dtype is None:
            return max(math.prod(self.rows) * self.rows_dtype.itemsize, 1)
        return max(self.scales_offset + math.prod(self.scales) * self.scales_dtype.itemsize, 1)

    def views(self, host: Any) -> tuple[Tensor, Tensor | None]:
        """The tensors in a piece of memory, which live as long as they do."""
        memory = whole(host)
        rows = _view(memory, 0, self.rows_dtype, self.rows)
        if self.scales is None or self.scales_dtype is None:
            return rows, None
        return rows, _view(memory, self.scales_offset, self.scales_dtype, self.scales)


def _view(memory: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return memory[offset:offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def whole(host: Any) -> Tensor:
    """All bytes of a piece of memory. The tensor keeps it alive."""
    return torch.frombuffer(host, dtype=torch.uint8)


def make_host_memory(num_bytes: int, numa: int | None = None, fd: int = -1, fd_offset: int = 0, read_only: bool = False) -> Any:
    """A piece of memory, private or of a segment.

    Args:
        num_bytes: at least 1; exactly as many can be used.
        numa: the node to place it on; None: page by page over all nodes, where there are several. Not for a segment that is
            mapped read-only, whose pages are where they are.
        fd: a segment to map, from `fd_offset` on; -1: private memory.
        fd_offset: a multiple of 2 MiB.
        read_only: a write to it is a fault.

    Raises:
        ValueError: there is no such node.
        RuntimeError: the compiled module is missing.
        OSError: the memory cannot be had.
    """
    nodes = [] if read_only else nodes_for(numa)
    need_compiled("memory for a copied or shared table")
    from engram_kernels import _C
    return _C.HostMemory(num_bytes, nodes, fd, fd_offset, read_only)


def nodes_for(numa: int | None) -> list[int]:
    """The nodes that memory goes to; none: there is only one."""
    allowed = _node_list("/proc/self/status", "Mems_allowed_list:") & _node_list("/sys/devices/system/node/has_memory", "")
    if numa is None:
        return sorted(allowed) if len(allowed) > 1 else []
    if isinstance(numa, bool) or not isinstance(numa, int) or (numa not in allowed and (allowed or numa != 0)):
        raise ValueError(f"RowTable: numa is {numa!r}, expected one of the nodes with memory, {sorted(allowed) or [0]}")
    return [numa] if allowed else []


def _node_list(path: str, field: str) -> set[int]:
    nodes: set[int] = set()
    for line in capacity.SYSTEM.read(path).splitlines():
        if line.startswith(field):
            for part in line[len(field):].strip().split(","):
                first, _, last = part.partition("-")
                if first.isdigit():
                    nodes.update(range(int(first), int(last or first) + 1))
    return nodes


def new_in_host_memory(op: str, what: str, layout: TableLayout, numa: int | None = None) -> tuple[Tensor, Tensor | None, Any]:
    """Memory for a table, its capacity checked first: rows and scales, of zeros, and the memory. `what` names it in an error."""
    capacity.check_private_memory(op, what, layout.num_bytes)
    host = make_host_memory(layout.num_bytes, numa)
    return *layout.views(host), host


def copied(op: str, rows: Tensor, scales: Tensor | None, described_as: tuple[str, int],
           numa: int | None) -> tuple[Tensor, Tensor | None, Any]:
    """Rows and scales in memory of their own, and on the CPU its owner; `described_as`: row_format and row_dim."""
    if rows.device.type == "cpu":
        layout = TableLayout.of(described_as[0], rows.shape[0], rows.shape[1], described_as[1])
        own, own_scales, host = new_in_host_memory(op, f"a copy of {layout.rows[0]} rows", layout, numa)
        own.copy_(rows.detach())
        if own_scales is not None and scales is not None:
            own_scales.copy_(scales.detach())
        return own, own_scales, host
    copies = [None if x is None else x.detach().clone(memory_format=torch.contiguous_format) for x in (rows, scales)]
    return *copies, None  # type: ignore[return-value]


def pin_host_memory(op: str, host: Any, registrar: Any = None) -> None:
    """Registers the memory with a device. Arguments and errors: `RowTable.pin`."""
    if host is None:
        raise ValueError(f"{op}: the table has no memory of its own: copy it (from_tensor(copy=True)) or share it")
    if registrar is None:
        reason = CUDA_ERROR or (None if torch.cuda.is_available() else "torch finds no GPU")
        if reason:
            raise RuntimeError(f"{op}: memory is pinned for a GPU; {reason}")
        from engram_kernels import _C, _C_cuda
        torch.cuda.init()
        registrar = _C.HostRegistrar(*_C_cuda.host_registrar())
    if registrar.counts_memlock:
        capacity.check_memlock(op, "pinning", host.mapped_bytes - host.pinned_bytes)
    host.pin(registrar)


def memory_stats(host: Any) -> dict[str, Any]:
    """What was got: see `RowTable.memory_stats`."""
    resident, huge = host.usage()
    return {"bytes": host.num_bytes, "mapped_bytes": host.mapped_bytes, "pages": host.pages,
            "resident_bytes": None if resident < 0 else resident, "huge_bytes": None if huge < 0 else huge,
            "pinned_bytes": host.pinned_bytes, "numa_pages": dict(host.pages_by_node())}
