"""Which tables a RowOptimizer can train, and which ones are trained by one."""
from __future__ import annotations

import gc
import os
import weakref
from typing import TYPE_CHECKING

from torch import Tensor, nn

from engram_kernels.ops.row_update import expect_trained_format, expect_writable
from engram_kernels.table.row_table import RowTable

if TYPE_CHECKING:
    from engram_kernels.training.row_optimizer import RowOptimizer

_optimizers: weakref.WeakSet[RowOptimizer] = weakref.WeakSet()


def note(optimizer: RowOptimizer) -> None:
    """Notes that an optimizer trains the rows of its table while it lives."""
    _optimizers.add(optimizer)


def without_trained(rows: list[nn.Parameter]) -> list[nn.Parameter]:
    """The tensors among `rows` that no RowOptimizer trains."""
    if any(_is_trained(x) for x in rows):
        gc.collect()  # a scheduler keeps an optimizer that nobody has any more
    return [x for x in rows if not _is_trained(x)]


def _is_trained(rows: Tensor) -> bool:
    return any(optimizer.table.rows is rows for optimizer in list(_optimizers))


def expect_trainable(op: str, table: RowTable, state: str | os.PathLike[str] | None) -> None:
    """Raises ValueError unless the rows can be updated where they are."""
    if table.tier != "file":
        expect_writable(op, table)
        if state is not None:
            raise ValueError(f"{op}: state is given, but table is in memory, where its moments are too; use save and load")
        return
    expect_trained_format(op, table)
    if state is None:
        raise ValueError(f"{op}: table is in the file {table.path}, and state is None; expected the file of its moments, state=, "
                         "which is made where there is none")


def is_computed(table: RowTable) -> bool:
    """Whether its rows are made of something else, so that an update of them would be lost."""
    return not table.rows.is_leaf or bool(getattr(table, "is_computed", False))
