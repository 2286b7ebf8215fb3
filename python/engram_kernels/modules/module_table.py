"""The table of a module whose rows are trained: it reads the module's parameter each time it is asked."""
from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram_kernels.row_format import FLOAT_FORMATS
from engram_kernels.sharding.sharded_rows import ShardedRows
from engram_kernels.table.quantize import QuantizeReport
from engram_kernels.table.row_table import RowTable
from engram_kernels.training.trainable_rows import TrainableRows

if TYPE_CHECKING:
    from engram_kernels.modules.memory_module import MemoryModule

AnyTable = RowTable | ShardedRows | TrainableRows  # what a module reads its rows from
_FORMAT_OF = {dtype: name for name, dtype in FLOAT_FORMATS.items()}


class ModuleTable(RowTable):
    """The rows of a memory module, read from its attribute `rows` whenever this table is asked for them.

    Frameworks put another tensor in a parameter's place: FSDP gathers it around the forward, `torch.func.functional_call`
    swaps it, `load_state_dict(assign=True)`, `parametrize`, `prune` and offloading replace it. A table that kept the tensor
    would go on reading what the module was made with.

    Ownership: holds the module. Threads and failure: as `RowTable`; what cannot be read as rows is a ValueError.
    """

    module: MemoryModule

    def __init__(self, module: MemoryModule):
        object.__setattr__(self, "module", module)

    @property
    def rows(self) -> Tensor:  # type: ignore[override]
        """The parameter as it is now."""
        return checked_rows(self.module, getattr(self.module, "rows", None))

    @property
    def scales(self) -> None:  # type: ignore[override]
        """None: rows that are trained are floats."""
        return None

    @property
    def row_format(self) -> str:  # type: ignore[override]
        """By the dtype that the parameter has now."""
        return _FORMAT_OF[self.rows.dtype]

    @property
    def row_dim(self) -> int:  # type: ignore[override]
        """D of the module's spec."""
        return self.module.spec.row_dim

    @property
    def tier(self) -> str:  # type: ignore[override]
        """By the device that the parameter is on now."""
        return "host" if self.rows.device.type == "cpu" else "device"

    @property
    def is_computed(self) -> bool:
        """Whether `rows` is no parameter of the module but made of one: by a parametrization, by pruning, by a copy."""
        rows = self.rows
        return not any(rows is parameter for parameter in self.module.parameters(recurse=False))

    def quantize(self, row_format: str, path: str | os.PathLike[str] | None = None) -> tuple[RowTable, QuantizeReport]:
        """`RowTable.quantize` of the rows as they are now."""
        return self._detached().quantize(row_format, path)

    def share(self, name: str, **options: Any) -> RowTable:
        """`RowTable.share` of the rows as they are now."""
        return self._detached().share(name, **options)

    def _detached(self) -> RowTable:
        rows = self.rows.detach()
        return RowTable.from_tensor(rows, row_format=_FORMAT_OF[rows.dtype])

    def snapshot(self) -> RowTable:
        """A table of the rows as they are now. One read: a parametrization computes the rows anew for each."""
        rows = self.rows
        return RowTable(rows, None, _FORMAT_OF[rows.dtype], self.row_dim, tier="host" if rows.device.type == "cpu" else "device")


def checked_rows(module: MemoryModule, rows: Any) -> Tensor:
    """`rows` if a table can be made of it. ValueError says what it is instead, TypeError that it is no tensor."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"{module.op}: rows is {type(rows).__name__} now, expected a tensor [R, {module.spec.row_dim}]")
    if hasattr(rows, "placements"):  # a DTensor: of its rows this process has some
        raise ValueError(f"{module.op}: rows is a DTensor with placements {rows.placements}, expected whole rows: fully_shard "
                         "gathers them for the forward of the module that it wraps; outside of it use rows.full_tensor()")
    if rows.dtype not in _FORMAT_OF:
        raise ValueError(f"{module.op}: rows is {rows.dtype} now, expected {' or '.join(map(str, _FORMAT_OF))}; no backend "
                         "computes in float64")
    if rows.dim() != 2 or rows.shape[1] != module.spec.row_dim or rows.shape[0] < module.layout.num_rows[0]:
        raise ValueError(f"{module.op}: rows has shape {list(rows.shape)} now, expected [R, {module.spec.row_dim}] with R at "
                         f"least {module.layout.num_rows[0]}, the rows of layer {module.layer_id}")
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def as_table(op: str, table: object) -> AnyTable | None:
    """`table` if a module can read it. TypeError says how to make a table of a tensor or a path."""
    if table is None or isinstance(table, AnyTable):
        return table
    got, how = type(table).__name__, ""
    if isinstance(table, Tensor):
        how = "; make one of it: RowTable.from_tensor(weight, row_format=..), of an nn.Parameter where the rows are trained"
    elif isinstance(table, str) or hasattr(table, "__fspath__"):
        how = "; RowTable.open(path) makes one of a file"
    elif isinstance(table, torch.nn.Embedding):
        how = "; make one of its weight: RowTable.from_tensor(embedding.weight, row_format=..)"
    raise TypeError(f"{op}: table is a {got}, expected a RowTable{how}")
