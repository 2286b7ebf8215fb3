"""What the processes of tests/table/test_sharded_rows.py share: groups of ranks, and a table that each of them can make."""
import torch
import torch.distributed as dist

from engram_kernels import RowTable
from engram_kernels.testing.inputs import random_rows

PROCESSES = 4
R, D, TABLE_SCALE = 203, 64, 0.375


class World:
    """This process in groups of 1, 2, 3 and 4 ranks: for tables, and others for what runs beside them."""

    def __init__(self, rank, folder):
        self.rank, self.folder = rank, folder
        self.groups, self.others = self.made(), self.made()

    def made(self):
        found = {}
        for n in range(1, PROCESSES + 1):
            for begin in range(0, PROCESSES, n):
                ranks = list(range(begin, min(begin + n, PROCESSES)))
                group = dist.new_group(ranks)
                if self.rank in ranks:
                    found[n] = group
        return found

    def full(self, n):
        """(group, rank in it) where this process is in the first group of n ranks; else None."""
        return (self.groups[n], self.rank) if self.rank < n else None


def table_of(row_format, begin=0, end=R):
    """Rows of one table that every process can make."""
    rows, scales = random_rows(row_format, R, D, torch.Generator().manual_seed(7))
    scales = scales if scales is None or scales.dim() == 1 else scales[begin:end]
    of_table = TABLE_SCALE if row_format == "nvfp4" else None
    return RowTable.from_tensor(rows[begin:end], scales, row_format, row_dim=D, table_scale=of_table)


def ids_of(seed, count=60):
    """Ids with duplicates and some that name no row."""
    return torch.randint(-1, R, (count // 4, 4), generator=torch.Generator().manual_seed(seed))


def micro_batch(k):
    """Ids and gradients of one of the micro-batches."""
    ids = ids_of(100 + k, 24)
    return ids, torch.randn(*ids.shape, D, generator=torch.Generator().manual_seed(k)) * 10.0 ** (k % 5)


def uneven(n):
    """Sizes of n shards that are unlike; one has no rows."""
    sizes = {1: [R], 2: [R, 0], 3: [50, 0, R - 50], 4: [3, 100, 0, R - 103]}[n]
    begin = [sum(sizes[:k]) for k in range(n)]
    return [(b, b + size) for b, size in zip(begin, sizes, strict=True)]


def raises(kind, words, call):
    """The error of a call, which must be of a kind and have some words."""
    try:
        call()
    except kind as err:
        assert all(word in str(err) for word in words), f"{err} lacks one of {words}"
        return err
    raise AssertionError(f"no {kind.__name__}")
