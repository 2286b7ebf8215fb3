"""Rows of a file in memory, for the ops: read at once, or in a graph by the torch op `read_rows`.

The op knows a table by where its file is, so that a graph that was saved finds it again.
"""
from __future__ import annotations

import collections
import json
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from engram_kernels._checks import expect_apart, expect_tensor
from engram_kernels._library import LIB
from engram_kernels.row_format import check_tensors
from engram_kernels.table.row_ids import check_row_ids, expect_row_ids

if TYPE_CHECKING:
    from engram_kernels.table.row_table import RowTable

LIB.define("read_rows(Tensor row_ids, str table, ScalarType dtype, int width, ScalarType scale_dtype, int scale_width)"
           " -> (Tensor, Tensor)")

_MOST_HELD = 64
_OPEN: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_HELD: collections.OrderedDict[str, Any] = collections.OrderedDict()  # opened here, for a graph that outlived its table


_OPENERS: dict[str, Any] = {}  # RowTable.open and connect; row_table, which imports this module, puts them here


def remember(name: str, table: RowTable) -> None:
    """Graphs read this table by its name while it lives."""
    _OPEN[name] = table


def _table(name: str) -> Any:
    table = _OPEN.get(name)
    if table is None:
        options = json.loads(name)
        table = _HELD[name] = _OPENERS["connect" if "address" in options else "open"](**options)
        while len(_HELD) > _MOST_HELD:
            _HELD.popitem(last=False)
    return table


@torch.library.impl(LIB, "read_rows", "CPU")
def read_rows(row_ids: Tensor, table: str, dtype: torch.dtype, width: int, scale_dtype: torch.dtype,
              scale_width: int) -> tuple[Tensor, Tensor]:
    """Rows of a file table as stored, one per id. Each distinct row is read once.

    Args:
        row_ids: int32 or int64, any shape, contiguous; -1 or in [0, R).
        table: `TableFile.name` of the table.
        dtype: of the stored rows.
        width: elements of a stored row.
        scale_dtype: of the scales.
        scale_width: scales of a row; 0: there are none per row.

    Returns:
        [n, width] rows and [n, scale_width] scales, n the number of ids; zeros for id -1.

    Raises:
        IndexError: an id is neither -1 nor in [0, R); nothing is read.
        ValueError: the file has another row format by now.
        OSError: the file cannot be read, or it changed.
    """
    found = _table(table)
    if found.rows.dtype != dtype or found.rows.shape[1] != width:
        raise ValueError(f"read_rows: {found.path} has rows of {found.rows.dtype} {list(found.rows.shape)}, the graph was made "
                         f"for {dtype} [R, {width}]")
    rows = torch.zeros(row_ids.numel(), width, dtype=dtype, device="cpu")
    scales = torch.zeros(row_ids.numel(), scale_width, dtype=scale_dtype, device="cpu")
    staged, local_ids = stage(found, row_ids)
    flat = local_ids.reshape(-1)
    present = flat != -1
    ids = flat[present].long()
    rows[present] = staged.rows[ids]
    if scale_width and staged.scales is not None:
        scales[present] = staged.scales[ids]
    return rows, scales


@torch.library.register_fake("engram_kernels::read_rows", lib=LIB)
def _fake(row_ids: Tensor, table: str, dtype: torch.dtype, width: int, scale_dtype: torch.dtype,
          scale_width: int) -> tuple[Tensor, Tensor]:
    count = row_ids.numel()
    return row_ids.new_empty((count, width), dtype=dtype), row_ids.new_empty((count, scale_width), dtype=scale_dtype)


def stage(table: RowTable, row_ids: Tensor) -> tuple[RowTable, Tensor]:
    """`RowTable.stage` of a table in a file."""
    if is_compiling():
        return _stage_traced(table, row_ids)
    op = "gather_rows"
    expect_row_ids(op, row_ids, table.device)
    check_row_ids(op, row_ids, table.num_rows)
    present = row_ids != -1
    distinct, where = torch.unique(row_ids[present], return_inverse=True)
    rows, scales = table.read_rows(distinct)
    local_ids = torch.full_like(row_ids, -1).masked_scatter_(present, where.to(row_ids.dtype))
    return _staged(table, rows, scales), local_ids


def where_stored(table: RowTable) -> torch.device:
    """Where `read_rows` takes ids and gives rows: the device of the rows, whose scales may lie elsewhere; the CPU of a file."""
    return table.rows.device if table.in_memory else torch.device("cpu")


def read_stored(table: RowTable, row_ids: Tensor, out_rows: Tensor | None,
                out_scales: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`RowTable.read_rows`."""
    op = "RowTable.read_rows"
    expect_row_ids(op, row_ids, where_stored(table))
    check_row_ids(op, row_ids, table.num_rows, may_be_absent=False)
    ids = row_ids.reshape(-1).to(torch.int64)
    per_row = table.scales is not None and table.scales.dim() == 2
    for name, out in (("out_rows", out_rows), ("out_scales", out_scales)):
        if isinstance(out, Tensor):
            expect_apart(op, "row_ids", row_ids, out, out_name=name)
    if isinstance(out_rows, Tensor) and isinstance(out_scales, Tensor):
        expect_apart(op, "out_rows", out_rows, out_scales, out_name="out_scales")
    out_rows = output(op, "out_rows", table.rows, ids, out_rows)
    if per_row:
        assert table.scales is not None
        out_scales = output(op, "out_scales", table.scales, ids, out_scales)
    elif out_scales is not None:
        raise ValueError(f"{op}: row_format {table.row_format!r} has no scales per row, but out_scales was given")
    if table._file is None:
        # a module may have converted them
        check_tensors(op, table.rows, table.scales, table.row_format, table.row_dim, table.device)
        torch.index_select(table.rows.detach(), 0, ids, out=out_rows)
        if out_scales is not None and table.scales is not None:
            out_scales.copy_(torch.index_select(table.scales, 0, ids.to(table.scales.device)))
    elif ids.numel() < 2 or bool((ids.diff() > 0).all()):
        table._file.read(ids, out_rows, out_scales)
    else:
        distinct, where = torch.unique(ids, return_inverse=True)
        rows, scales = table.read_rows(distinct)
        torch.index_select(rows, 0, where, out=out_rows)
        if per_row and scales is not None:
            torch.index_select(scales, 0, where, out=out_scales)
    return out_rows, out_scales if per_row else table.scales


def output(op: str, name: str, like: Tensor, ids: Tensor, out: Tensor | None) -> Tensor:
    """`out`, checked, or a new tensor for as many rows like those of `like` as there are ids."""
    shape = (ids.shape[0], like.shape[1])
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=ids.device)
    expect_tensor(op, name, out, (like.dtype,), shape, ids.device, dense_dims=2)
    return out


def _stage_traced(table: RowTable, row_ids: Tensor) -> tuple[RowTable, Tensor]:
    """A row per id instead of the distinct ones, whose number a graph cannot know."""
    assert table._file is not None
    scales = table.scales
    per_row = scales is not None and scales.dim() == 2
    rows, row_scales = torch.ops.engram_kernels.read_rows.default(
        row_ids, table._file.name, table.rows.dtype, table.rows.shape[1],
        scales.dtype if scales is not None else torch.uint8, scales.shape[1] if scales is not None and per_row else 0)
    places = torch.arange(row_ids.numel(), dtype=row_ids.dtype, device=row_ids.device).view(row_ids.shape)
    local_ids = torch.where(row_ids == -1, row_ids, places)
    return _staged(table, rows, row_scales if per_row else scales), local_ids


def _staged(table: RowTable, rows: Tensor, scales: Tensor | None) -> RowTable:
    return type(table)(rows, scales, table.row_format, table.row_dim, table.zero_scale_is_zero, table_scale=table.table_scale)
