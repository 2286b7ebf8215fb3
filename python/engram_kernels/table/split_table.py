"""Tables whose rows lie in pinned host memory and whose scales lie on a GPU: `RowTable.with_scales_on`.

A row of 256 values in its own 256 bytes is two requests of 128 bytes over the link; with its scales behind it, or apart on the
host too, it is three.
"""
from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from engram_kernels.capacity import check_device_memory
from engram_kernels.row_format import ROW_FORMATS

if TYPE_CHECKING:
    from engram_kernels.table.row_table import RowTable

_OP = "RowTable.with_scales_on"


def with_scales_on(table: RowTable, device: torch.device | str) -> RowTable:
    """`RowTable.with_scales_on`."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type != "cuda":
        raise ValueError(f"{_OP}: device is {device}, expected a GPU, which reads the rows from pinned host memory")
    if not table.in_memory or table.rows.device.type != "cpu":
        raise ValueError(f"{_OP}: the rows are of tier {table.tier!r}, expected rows in host memory; a table in a file comes "
                         "there by share()")
    if table.scales is None or table.scales.dim() != 2:
        apart = [name for name, fmt in ROW_FORMATS.items() if fmt.has_row_scales and fmt.scale_dtype]
        raise ValueError(f"{_OP}: rows of format {table.row_format!r} have no scales that lie apart, expected one of "
                         f"{', '.join(apart)}")
    if not table.rows.is_pinned():
        raise ValueError(f"{_OP}: the rows are not pinned, so no GPU can read them: call table.pin() first "
                         "(from_tensor(copy=True) or share() gives a table that can be)")
    check_device_memory(_OP, f"the scales of {table.num_rows} rows", table.scales.nbytes, device)
    return dataclasses.replace(table, scales=table.scales.detach().to(device))
