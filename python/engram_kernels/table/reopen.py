"""Copies of a table: pickled, sent to another process, deep-copied. A file is opened again, a shared table attached and a
remote one connected again."""
from __future__ import annotations

import copy
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.table import shared_table

if TYPE_CHECKING:
    from engram_kernels.table.row_table import RowTable


def reduced(table: RowTable) -> tuple[Any, ...] | None:
    """What pickle writes of a table: never rows of a file, a shared or a remote table, but where they are and their fingerprint.

    Args:
        table: any.

    Returns:
        (function, arguments); None: its tensors are pickled as they are.
    """
    if table._file is not None:
        if table.tier == "remote":
            return _connect_again, (type(table), table._file.opened)
        return _open_again, (type(table), table._file.opened, table.fingerprint())
    if isinstance(table._memory, shared_table.SharedMemory):
        shared = table._memory
        return _attach_again, (type(table), shared.name, str(shared.path.parent), table.fingerprint())
    if table._memory is not None:
        return _copy_again, (type(table), *_contents(table))
    return None


def deep_copied(table: RowTable, memo: dict[int, Any]) -> RowTable:
    """A deep copy. Rows that cannot be written, of a file or a shared table, are not copied: it is the table itself."""
    if table._file is not None or isinstance(table._memory, shared_table.SharedMemory):
        return table
    if table._memory is not None:
        return _copy_again(type(table), *_contents(table))
    twin = type(table).__new__(type(table))
    memo[id(table)] = twin
    twin.__dict__.update(copy.deepcopy(table.__dict__, memo))
    return twin


def _contents(table: RowTable) -> tuple[Any, ...]:
    # rows and scales share one piece of memory, and torch.save takes no storage in two dtypes; a GPU's may be another one there
    scales = None if table.scales is None else table.scales.to(table.rows.device, copy=True)
    table_scale = table.table_scale if ROW_FORMATS[table.row_format].has_table_scale else None
    return table.rows.detach(), scales, table.row_format, table.zero_scale_is_zero, table.row_dim, table_scale


def _open_again(cls: type[RowTable], opened: dict[str, Any], fingerprint: str) -> RowTable:
    table = cls.open(**opened)
    found = table.fingerprint()
    if found != fingerprint:
        raise ValueError(f"RowTable: {table.path} has rows with fingerprint {found}, the table that was pickled had "
                         f"{fingerprint}: it is another file by now")
    return table


def _connect_again(cls: type[RowTable], connected: dict[str, Any]) -> RowTable:
    return cls.connect(**connected)


def _attach_again(cls: type[RowTable], name: str, directory: str, fingerprint: str) -> RowTable:
    try:
        return cls.attach(name, fingerprint=fingerprint, directory=directory)
    except FileNotFoundError as err:
        raise FileNotFoundError(err.errno, f"{err.strerror}; a pickled table is attached by its name, so a process must hold it "
                                           "until it is loaded", err.filename) from None


def _copy_again(cls: type[RowTable], rows: Tensor, scales: Tensor | None, row_format: str, zero_scale_is_zero: bool,
                row_dim: int, table_scale: float | None) -> RowTable:
    return cls.from_tensor(rows, scales, row_format, True, zero_scale_is_zero, row_dim, table_scale=table_scale)


def _reduced_for_process(table: RowTable) -> Any:
    """What makes the table again in a process that is started: `reduced`, with the bytes of a table's own memory.

    Torch would move a tensor that it sends into shared memory, which leaves the table's memory behind, or close a copy's before
    the other process is there.
    """
    found = reduced(table)
    if found is None:
        return table.__reduce_ex__(2)
    function, args = found
    if function is not _copy_again:
        return found
    return _copy_bytes_again, tuple((x.contiguous().view(torch.uint8).numpy(), x.dtype) if isinstance(x, Tensor) else x
                                    for x in args)


def _copy_bytes_again(cls: type[RowTable], *sent: Any) -> RowTable:
    args: Any = [torch.from_numpy(x[0]).view(x[1]) if isinstance(x, tuple) else x for x in sent]
    return _copy_again(cls, *args)


def register(cls: type[RowTable]) -> None:
    """Has processes that are started or sent to use it for `cls`."""
    ForkingPickler.register(cls, _reduced_for_process)
