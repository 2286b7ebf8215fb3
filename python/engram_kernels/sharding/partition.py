"""Which rank has which rows: contiguous ranges in the order of the ranks."""
from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from engram_kernels._checks import expect_int

BY = ("rows", "heads")


def rows_of(num_rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """[begin, end) of a rank where `num_rows` rows are spread as DTensor's Shard(0) spreads them: ceil(R / n) each, and what is
    left to the last ranks that get any."""
    chunk = -(-num_rows // ranks)
    return min(rank * chunk, num_rows), min((rank + 1) * chunk, num_rows)


def range_of(num_rows: int, rank: int, ranks: int, heads: Sequence[int] | Tensor | None = None) -> tuple[int, int]:
    """[begin, end) of the rows that a rank should have: ``shard = weight[begin:end]``.

    Args:
        num_rows: R.
        rank: in the group.
        ranks: of the group.
        heads: rows of each head, for by="heads".

    Returns:
        As DTensor's Shard(0): ceil(R / ranks) rows each, what is left to the last ranks that get any. With heads: whole ones,
        as many to each rank as can be.

    Raises:
        TypeError: a number is no integer.
        ValueError: there is no such rank, or the heads do not sum up to R.
    """
    op = "ShardedRows.range_of"
    expect_int(op, "num_rows", num_rows, 0)
    expect_int(op, "ranks", ranks, 1)
    expect_int(op, "rank", rank, 0, ranks - 1)
    if heads is None:
        return rows_of(num_rows, rank, ranks)
    begins = head_begins(op, heads)
    if begins[-1] != num_rows:
        raise ValueError(f"{op}: the {len(begins) - 1} heads have {begins[-1]} rows, expected num_rows {num_rows}")
    count = len(begins) - 1
    return begins[rank * count // ranks], begins[(rank + 1) * count // ranks]


def head_begins(op: str, heads: object) -> list[int]:
    """First row of each head and, last, the number of rows."""
    if isinstance(heads, Tensor):
        heads = heads.flatten().tolist()
    if not isinstance(heads, Sequence) or isinstance(heads, str) or not heads:
        raise TypeError(f"{op}: heads is {heads!r}, expected the number of rows of each head, such as layout.moduli[0]")
    return [0, *itertools.accumulate(expect_int(op, f"heads[{i}]", rows, 0) for i, rows in enumerate(heads))]


class Partition:
    """Ranges of rows by rank.

    Args:
        sizes: rows of each rank, in the order of the ranks.

    Attributes:
        begins: [n+1] first row of each rank and, last, R.
    """

    def __init__(self, sizes: Sequence[int]):
        self.begins = [0, *itertools.accumulate(sizes)]
        self._inner = torch.tensor(self.begins[1:], dtype=torch.int64, device="cpu")

    @property
    def num_rows(self) -> int:
        """R."""
        return self.begins[-1]

    def is_dtensors(self) -> bool:
        """Whether DTensor's Shard(0) would spread the rows in the same way."""
        ranks = len(self.begins) - 1
        return all((self.begins[k], self.begins[k + 1]) == rows_of(self.num_rows, k, ranks) for k in range(ranks))

    def counts(self, distinct: Tensor) -> list[int]:
        """How many of the ascending ids [n] int64 each rank has."""
        ends = [0, *torch.searchsorted(distinct, self._inner.to(distinct.device)).tolist()]
        return [b - a for a, b in itertools.pairwise(ends)]

    def overlaps(self, rank: int, other: Partition) -> list[int]:
        """How many of the rows of `rank` each rank has by another partition of the same rows."""
        begin, end = self.begins[rank], self.begins[rank + 1]
        return [max(0, min(end, b) - max(begin, a)) for a, b in itertools.pairwise(other.begins)]
