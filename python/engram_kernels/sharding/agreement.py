"""What the ranks of a `ShardedRows` must agree on before any row moves."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from engram_kernels._checks import expect_choice, expect_int
from engram_kernels._library import need_compiled
from engram_kernels.row_format import FLOAT_FORMATS
from engram_kernels.sharding.partition import BY, Partition, head_begins
from engram_kernels.table.row_table import RowTable

GRADIENTS = ("sparse", "rows", "none")
_FORMAT_OF = {dtype: name for name, dtype in FLOAT_FORMATS.items()}


def checked_facts(table: RowTable, parameter: nn.Parameter | None, num_rows: int | None, by: str, heads: Any,
                  gradients: str | None, reduce: str, timeout_s: float) -> dict[str, Any]:
    """Arguments of one rank, checked: what the ranks must agree on, and `rows`, which may differ."""
    expect_choice("ShardedRows", "by", by, BY)
    expect_choice("ShardedRows", "reduce", reduce, ("sum", "mean"))
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < math.inf:
        raise ValueError(f"ShardedRows: timeout_s is {timeout_s!r}, expected seconds above 0")
    if (heads is None) == (by == "heads"):
        raise ValueError(f"ShardedRows: heads is {'missing' if heads is None else 'given'}, but by is {by!r}; expected heads "
                         "with by='heads' and only then")
    begins = None if heads is None else head_begins("ShardedRows", heads)
    if num_rows is not None:
        expect_int("ShardedRows", "num_rows", num_rows, 0)
    scale = None if table.scales is None or table.scales.dim() == 2 else float(table.scales.item())
    return {"rows": table.num_rows, "row_format": table.row_format, "row_dim": table.row_dim, "scale": scale,
            "zero_scale_is_zero": table.zero_scale_is_zero, "table_scale": table.table_scale, "by": by, "heads": begins,
            "num_rows": num_rows, "gradients": _gradients_of(gradients, parameter), "reduce": reduce,
            "timeout_s": float(timeout_s)}


def agreed_facts(group: Any, facts: dict[str, Any], error: Exception | None) -> list[dict[str, Any]]:
    """What every rank of `group` says of its shard. Raises on all of them where one has an error: there `error` itself."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (facts, None if error is None else f"{type(error).__name__}: {error}"), group=group)
    if error is not None:
        raise error
    for rank, (_, text) in enumerate(found):
        if text is not None:
            raise ValueError(f"ShardedRows: rank {rank} of {len(found)}: {text}")
    return [said for said, _ in found]


def table_of(shard: Any) -> tuple[RowTable, nn.Parameter | None, int | None]:
    """The table of a shard, its parameter where it has one, and R where the shard says it."""
    whole, trained = None, isinstance(shard, nn.Parameter) and shard.requires_grad
    if hasattr(shard, "placements"):
        if shard.device_mesh.ndim != 1 or tuple(map(str, shard.placements)) != ("S(0)",):
            raise ValueError(f"ShardedRows: shard is a DTensor with placements {shard.placements}, expected (Shard(0),) on a "
                             "mesh of one dimension")
        whole, local = shard.shape[0], shard.to_local().detach()
        shard = nn.Parameter(local) if trained else local
    if isinstance(shard, Tensor):
        if shard.dtype not in _FORMAT_OF:
            raise ValueError(f"ShardedRows: shard is {shard.dtype}, expected {' or '.join(map(str, _FORMAT_OF))}; rows of other "
                             "formats come as a RowTable")
        shard = RowTable.from_tensor(shard, row_format=_FORMAT_OF[shard.dtype])
    if not isinstance(shard, RowTable):
        raise TypeError(f"ShardedRows: shard is a {type(shard).__name__}, expected a RowTable or a tensor [r, D]")
    rows = shard.rows
    return shard, rows if isinstance(rows, nn.Parameter) and rows.requires_grad else None, whole


def checked_partition(said: Sequence[dict[str, Any]]) -> Partition:
    """The partition of the ranks' shards. ValueError, the same on every rank, where they do not belong together."""
    first, sizes = said[0], [one["rows"] for one in said]
    for rank, one in enumerate(said):
        for name, value in one.items():
            if name != "rows" and value != first[name]:
                raise ValueError(f"ShardedRows: {name} is {value!r} on rank {rank} and {first[name]!r} on rank 0, expected the "
                                 "same on every rank")
    partition = Partition(sizes)
    expected = first["heads"][-1] if first["heads"] is not None else first["num_rows"]
    for name, wanted in (("num_rows", first["num_rows"]), ("the heads' rows", None if first["heads"] is None else expected)):
        if wanted is not None and partition.num_rows != wanted:
            raise ValueError(f"ShardedRows: the shards have {' + '.join(map(str, sizes))} = {partition.num_rows} rows on "
                             f"{len(sizes)} ranks, expected {name} {wanted}; shards of another number of ranks have to be cut "
                             "again (ShardedRows.range_of), or loaded through torch.distributed.checkpoint")
    if first["heads"] is not None:
        odd = [row for row in partition.begins if row not in set(first["heads"])]
        if odd:
            raise ValueError(f"ShardedRows: a shard ends at row {odd[0]}, which is no head's first, but by is 'heads'; expected "
                             f"one of {first['heads']}")
    return partition


def _gradients_of(gradients: str | None, parameter: nn.Parameter | None) -> str:
    if gradients is None:
        gradients = "none" if parameter is None else "sparse"
    expect_choice("ShardedRows", "gradients", gradients, GRADIENTS)
    if gradients == "sparse" and parameter is None:
        raise ValueError("ShardedRows: gradients is 'sparse', but shard is no nn.Parameter that requires a gradient; expected "
                         "one, or gradients='rows'")
    if gradients != "none":
        need_compiled("ShardedRows with gradients")
    return gradients
