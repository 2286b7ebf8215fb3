"""A step on rows that are stored in eight bits: decoded, updated in float32, encoded again. On the CPU."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.ops.row_update import expect_writable, update_named
from engram_kernels.reference.row_update import random_bits, row_keys
from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.table.quantize import encode
from engram_kernels.table.row_ids import check_row_ids, expect_row_ids
from engram_kernels.table.row_table import RowTable

_OP = "RowOptimizer"
_PIECE_ROWS = 1024
FORMATS = ("fp8_e4m3_block32", "fp8_e4m3_block32_packed", "fp8_e4m3_row", "int8_group32")  # scales of a row are its own


def expect_decodable(table: RowTable) -> None:
    """Raises ValueError where rows of one of `FORMATS` are on a device."""
    if table.row_format in FORMATS and not table.rows.is_cpu:
        raise ValueError(f"{_OP}: table has row_format {table.row_format!r} on {table.device}, expected it in host memory: rows "
                         "on a device are trained as f32, bf16 or f16")


def distinct_of(row_ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Distinct rows, ascending, and the place of each id [n] among them, or -1. IndexError: an id is out of range."""
    expect_row_ids(_OP, row_ids, torch.device("cpu"))
    check_row_ids(_OP, row_ids, num_rows)
    ids = row_ids.reshape(-1).to(torch.int64)
    present = ids != -1
    distinct, places = torch.unique(ids[present], return_inverse=True)
    return distinct, torch.full_like(ids, -1).masked_scatter_(present, places)


def update_quantized(table: RowTable, row_ids: Tensor, grad_rows: Tensor, rule: str, *, second: Tensor | None,
                     first: Tensor | None, steps: Tensor | None, rounding: str, seed: int, first_row: int,
                     **options: Any) -> None:
    """One step, in place. What `row_update` refuses, and a row that leaves float32, is raised before anything is written.

    A row is decoded exactly and updated in float32. Its scales follow its largest values; a float32 scale stays while they fit
    it and fill half of it, so that an element that the step left alone keeps its value. With rounding="stochastic" each
    element goes up in magnitude with the probability of what is cut off, by the bits that `row_update` has for that row, step
    and element.

    `table` is of one of `FORMATS`. The other arguments are those of `row_update`; `options`: lr, betas, eps, step, grad_scale.
    """
    expect_writable(_OP, table, FORMATS)
    distinct, places = distinct_of(row_ids, table.num_rows)
    values = gather_rows(table, distinct, torch.float32, backend="cpu").detach()
    moments = {"second": second, "first": first, "steps": steps}
    own: dict[str, Any] = {name: None if x is None else x[distinct] for name, x in moments.items()}
    update_named(values, places, grad_rows.detach().reshape(places.numel(), table.row_dim), distinct + first_row, rule, **own,
                 rounding=rounding, seed=seed, **options)
    if not distinct.numel():
        return
    if not (finite := values.isfinite().all(1)).all():
        raise ValueError(f"{_OP}: row {distinct[~finite][0].item()} is not finite after this step; nothing was written")
    width = ROW_FORMATS[table.row_format].width(table.row_dim)
    for begin in range(0, distinct.numel(), _PIECE_ROWS):  # in pieces that stay in the caches
        at = distinct[begin:begin + _PIECE_ROWS]
        draws = None
        if rounding == "stochastic":
            keys = row_keys(at + first_row, own["steps"][begin:begin + _PIECE_ROWS], seed)
            draws = random_bits(keys & 0xFFFFFFFF, table.row_dim).double() * 2.0**-32
        rows, scales = encode(values[begin:begin + _PIECE_ROWS], table.row_format, draws=draws,
                              before=None if table.scales is None else table.scales[at])
        table.rows[at, :width] = rows
        if scales is not None:
            table.scales[at] = scales  # type: ignore[index]
    for name, x in moments.items():
        if x is not None:
            x[distinct] = own[name]
