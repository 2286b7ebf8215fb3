"""Rows on 1 to 4 gloo processes: the bits of one process, bytes, checkpoints, and what goes wrong, on every rank."""
import multiprocessing
import time

import pytest
import shard_processes
import torch
import torch.distributed as dist
from shard_processes import CHECKS, PROCESSES

from engram_kernels import RowTable, ShardedRows
from engram_kernels._library import COMPILE_ERROR

pytestmark = pytest.mark.skipif(bool(COMPILE_ERROR), reason=COMPILE_ERROR or "")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank says of each check, from four processes that do all of them."""
    folder = tmp_path_factory.mktemp("shards")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=shard_processes.run, args=(rank, str(folder))) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    end = time.monotonic() + 240
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
        process.kill()
    return [torch.load(folder / f"found{rank}") if (folder / f"found{rank}").exists() else {} for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", CHECKS)
def test_shards(name, found):
    dies = name == "check_a_rank_that_dies_is_an_error_on_every_other"
    wrong = [said.get(name, f"rank {rank} said nothing") for rank, said in enumerate(found) if not (dies and rank == 3)]
    assert "".join(wrong) == "", "\n".join(wrong)


def test_shards_need_torch_distributed():
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialized; call init_process_group"):
        ShardedRows(RowTable.from_tensor(torch.zeros(3, 32), row_format="f32"))


@pytest.mark.parametrize(("num_rows", "ranks", "ranges"), [
    (10, 4, [(0, 3), (3, 6), (6, 9), (9, 10)]), (5, 4, [(0, 2), (2, 4), (4, 5), (5, 5)]), (0, 2, [(0, 0), (0, 0)])])
def test_shards_ranges_are_those_of_dtensor(num_rows, ranks, ranges):
    assert [ShardedRows.range_of(num_rows, rank, ranks) for rank in range(ranks)] == ranges
    pieces = torch.arange(num_rows).chunk(ranks) if num_rows else ()
    assert [len(p) for p in pieces] == [end - begin for begin, end in ranges if end > begin]


def test_shards_ranges_refuse_what_is_none():
    assert [ShardedRows.range_of(9, rank, 2, [2, 3, 4]) for rank in range(2)] == [(0, 2), (2, 9)]
    with pytest.raises(ValueError, match="heads have 9 rows, expected num_rows 10"):
        ShardedRows.range_of(10, 0, 2, [2, 3, 4])
    with pytest.raises(ValueError, match="rank is 2, expected at most 1"):
        ShardedRows.range_of(10, 2, 2)
