"""One exchange of rows: which rows each rank wants of each, the rows themselves, and the gradients on their way back."""
from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.sharding.channel import Channel
from engram_kernels.sharding.partition import Partition
from engram_kernels.table.row_ids import check_row_ids, expect_row_ids
from engram_kernels.table.row_table import RowTable


@dataclasses.dataclass
class Wanted:
    """Ids after their exchange."""

    ticket: int
    inverse: Tensor  # of the caller's shape: place of each id among the distinct ones, -1 where it names no row
    counts: list[int]  # [n] distinct rows that this rank wants of each
    asked: Tensor  # rows of this shard that the ranks want, in the order of the ranks, ascending within each
    asked_counts: list[int]


@dataclasses.dataclass
class Arrived:
    """Distinct rows that this rank wanted, ascending, as they are stored."""

    wanted: Wanted
    rows: Tensor
    scales: Tensor | None


class Exchange:
    """What the threads of a `ShardedRows` work on; it knows nothing of tickets in flight or of autograd.

    Args:
        table: the rows of this rank.
        partition: of all rows.
        channel: to the other ranks.
    """

    def __init__(self, table: RowTable, partition: Partition, channel: Channel):
        self.table, self.partition, self.channel = table, partition, channel
        self.rank, self.ranks = channel.rank, channel.ranks
        self.first_row = partition.begins[self.rank]
        self.wire_ids = torch.int32 if partition.num_rows <= torch.iinfo(torch.int32).max else torch.int64
        self.counters = {"requested": 0, "distinct": 0, "remote_rows": 0, "served_rows": 0}

    def ids(self, ticket: int, row_ids: Any) -> Wanted:
        """Finds the distinct ids and tells each rank which of its rows are wanted. Errors: `check_row_ids`, on every rank."""
        channel, error = self.channel, None
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        distinct, inverse, counts = none, none, [0] * self.ranks
        try:
            expect_row_ids("ShardedRows", row_ids, row_ids.device if isinstance(row_ids, Tensor) else torch.device("cpu"))
            check_row_ids("ShardedRows", row_ids, self.partition.num_rows)
            distinct, inverse = torch.unique(row_ids.to(torch.int64), return_inverse=True)
            if distinct.numel() and distinct[0] == -1:
                distinct, inverse = distinct[1:], inverse - 1
            counts = self.partition.counts(distinct)
        except Exception as err:
            error = err
        coming = channel.agree("ids", ticket, error, counts)
        begins = torch.tensor(self.partition.begins[:-1], device="cpu").repeat_interleave(torch.tensor(counts, device="cpu"))
        asked = channel.exchange("ids", (distinct - begins.to(distinct.device)).to(self.wire_ids)[:, None], counts, coming)
        remote = distinct.numel() - counts[self.rank]
        for name, more in (("requested", inverse.numel()), ("distinct", distinct.numel()), ("remote_rows", remote),
                           ("served_rows", asked.shape[0] - coming[self.rank])):
            self.counters[name] += more
        return Wanted(ticket, inverse, counts, asked[:, 0].to(self.table.device), coming)

    def rows(self, ids: Future[Wanted]) -> Arrived:
        """Reads the rows that are wanted of this rank and sends them. Errors of `ids`, and of a file, on every rank."""
        wanted, channel, error = ids.result(), self.channel, None
        rows, scales = self.table.rows, self.table.scales
        try:
            rows, scales = self.table.read_rows(wanted.asked)
            width = ROW_FORMATS[self.table.row_format].width(self.table.row_dim)
            rows = rows[:, :width]  # packed rows may be padded
        except Exception as err:
            error = err
        channel.agree("rows", wanted.ticket, error)
        arrived = channel.exchange("rows", rows, wanted.asked_counts, wanted.counts)
        if scales is not None and scales.dim() == 2:
            scales = channel.exchange("rows", scales, wanted.asked_counts, wanted.counts)
        return Arrived(wanted, arrived, scales)

    def gradients(self, wanted: Wanted, grad: Tensor) -> Tensor:
        """Sums the gradients of each distinct row in the order of the positions and sends them to their owners. What fails here
        is raised on every rank.

        Args:
            wanted: of the forward.
            grad: [*ids.shape, D] float.

        Returns:
            [rows asked of this rank, D] float32, in the order of `Wanted.asked`.
        """
        channel, error, summed = self.channel, None, grad
        try:
            summed = sum_rows(grad, wanted.inverse.to(grad.device), sum(wanted.counts)).to(self.table.device)
        except Exception as err:
            error = err
        channel.agree("gradients", wanted.ticket, error)
        return channel.exchange("gradients", summed, wanted.counts, wanted.asked_counts)

    def everywhere(self, ticket: int, error: Exception | None, numbers: list[float]) -> list[float]:
        """The numbers of all ranks, as many from each, on every rank. What failed on one is raised on all."""
        self.channel.agree("gradients", ticket, error)
        each = torch.tensor([numbers] * self.ranks, dtype=torch.float64, device="cpu")
        return self.channel.exchange("gradients", each, [1] * self.ranks, [1] * self.ranks).flatten().tolist()

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and the bytes that went to other ranks."""
        sent = self.channel.sent_bytes
        return {**self.counters, **{f"{kind}_bytes": count for kind, count in sent.items()}, "sent_bytes": sum(sent.values())}


def sum_rows(grad: Tensor, inverse: Tensor, num_rows: int) -> Tensor:
    """[num_rows, D] float32: `grad` [*inverse.shape, D] summed by row in the order of the positions; -1 counts nowhere."""
    if num_rows == 0:
        return grad.new_zeros(0, grad.shape[-1], dtype=torch.float32)
    return torch.ops.engram_kernels.gather_rows_bwd(grad.contiguous(), inverse.contiguous(), num_rows, torch.float32)
