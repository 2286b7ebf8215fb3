"""What goes wrong on the processes of tests/table/test_sharded_rows.py, and must be an error on each of them, in time."""
import dataclasses
import os
import signal
import time

import torch
from shard_cases import R, ids_of, raises, table_of
from torch import nn

from engram_kernels import RowTable, ShardedRows, gather_rows
from engram_kernels.sharding import exchange

DEADLINE_S = 3.0
LAST = ("check_a_rank_that_does_not_come_is_an_error_in_time", "check_a_rank_that_dies_is_an_error_on_every_other")


def check_bad_ids_are_errors_on_every_rank(world):
    group, rank = world.groups[4], world.rank
    begin, end = ShardedRows.range_of(R, rank, 4)
    with ShardedRows(table_of("f32", begin, end), group, timeout_s=30) as sharded:
        good, bad = torch.arange(8), torch.tensor([[3, R], [4, 5]])
        tickets = [sharded.submit(ids) for ids in (good, bad if rank == 2 else good, bad.float() if rank == 1 else good, good)]
        want = gather_rows(table_of("f32"), good, torch.float32)
        assert torch.equal(sharded.wait(tickets[0]), want)
        names = [] if rank == 2 else ["rank 2 of 4"]
        raises(IndexError, ["row_ids[0, 1] is 203, expected [0, 203)", *names], lambda: sharded.wait(tickets[1]))
        raises(ValueError, ["row_ids must be torch.int32 or torch.int64, got torch.float32"], lambda: sharded.wait(tickets[2]))
        assert torch.equal(sharded.wait(tickets[3]), want)
        raises(KeyError, ["ticket 3"], lambda: sharded.wait(tickets[3]))
        raises(ValueError, ["out_dtype is torch.float64"], lambda: sharded.gather(good, torch.float64))
    raises(ConnectionError, ["closed"], lambda: sharded.submit(good))


def check_other_orders_are_errors_on_every_rank(world):
    group, rank = world.groups[4], world.rank
    begin, end = ShardedRows.range_of(R, rank, 4)
    with ShardedRows(table_of("f32", begin, end), group, gradients="rows", timeout_s=30) as sharded:
        tickets = [sharded.submit(ids_of(rank)) for _ in range(2)]
        for ticket in tickets if rank else tickets[::-1]:
            raises(ValueError, ["different exchanges", "rank 0 those of rows for ticket", "same order"],
                   lambda ticket=ticket: sharded.wait(ticket))
        outs = [sharded.gather(ids_of(rank)) for _ in range(2)]
        for out in outs if rank else outs[::-1]:
            raises(ValueError, ["different exchanges", "gradients"], lambda out=out: out.sum().backward())


def check_shards_that_do_not_fit_are_errors_on_every_rank(world):
    group, rank = world.groups[4], world.rank
    rows = table_of("f32", *ShardedRows.range_of(R, rank, 4)).rows
    parameter = nn.Parameter(rows)
    for kind, words, shard, more in (
            (ValueError, ["num_rows 204", "203 rows on 4 ranks"], rows, dict(num_rows=204)),
            (ValueError, ["row_format is 'bf16' on rank 2", "'f32' on rank 0"], rows.bfloat16() if rank == 2 else rows, {}),
            (ValueError, ["table_scale is 2.0 on rank 1", "0.375 on rank 0"],
             dataclasses.replace(table_of("nvfp4"), table_scale=2.0) if rank == 1 else table_of("nvfp4"), {}),
            (ValueError, ["row_dim is 32 on rank 3", "64 on rank 0"], rows[:, :32] if rank == 3 else rows, {}),
            (ValueError, ["by is 'row'", "'rows' or 'heads'"], rows, dict(by="row")),
            (ValueError, ["reduce is 'mean' on rank 1"], rows, dict(reduce="mean" if rank == 1 else "sum")),
            (ValueError, ["heads is missing"], rows, dict(by="heads")),
            (ValueError, ["timeout_s is 0"], rows, dict(timeout_s=0)),
            (ValueError, ["gradients is 'sparse', but shard is no nn.Parameter"], parameter if rank else rows,
             dict(gradients="sparse")),
            (TypeError if rank == 1 else ValueError, ["shard is a list"], rows.tolist() if rank == 1 else rows, {}),
            (ValueError, ["torch.float64"], rows.double(), {})):
        raises(kind, words, lambda shard=shard, more=more: ShardedRows(shard, group, **more))
    if world.full(3) is not None:  # shards that four ranks had
        raises(ValueError, ["153 rows on 3 ranks", "num_rows 203", "cut again"],
               lambda: ShardedRows(rows, world.groups[3], num_rows=R))


def check_a_bad_file_is_an_error_on_every_rank(world):
    group, rank = world.groups[4], world.rank
    begin, end = ShardedRows.range_of(R, rank, 4)
    path = f"{world.folder}/bad{rank}.safetensors"
    shard = RowTable.create(path, table_of("f32", begin, end).rows, row_format="f32")
    with ShardedRows(shard, group, timeout_s=30) as sharded:
        if rank == 3:
            os.truncate(path, 300)
        raises(OSError, ["bad3.safetensors"], lambda: sharded.gather(torch.arange(R)))
        raises(ValueError, ["is its own checkpoint"], sharded.state_dict)


def check_gradients_that_cannot_be_summed_are_an_error_on_every_rank(world):
    group, rank = world.groups[4], world.rank
    sum_rows = exchange.sum_rows

    def has_no_memory(*args):
        raise MemoryError("no memory for the sums")
    with ShardedRows(table_of("f32", *ShardedRows.range_of(R, rank, 4)), group, gradients="rows", timeout_s=30) as sharded:
        out = sharded.gather(ids_of(rank))
        exchange.sum_rows = has_no_memory if rank == 1 else sum_rows
        raises(MemoryError, ["no memory", *([] if rank == 1 else ["rank 1 of 4"])], lambda: out.sum().backward())
        exchange.sum_rows = sum_rows
        sharded.gather(ids_of(rank)).sum().backward()  # later ones go on
        assert sharded.take_gradients()[0].numel() > 0


def check_a_rank_that_does_not_come_is_an_error_in_time(world):
    if world.full(3) is None:
        return
    group, rank = world.full(3)
    sharded = ShardedRows(table_of("f32", *ShardedRows.range_of(R, rank, 3)), group, gradients="rows", timeout_s=DEADLINE_S)
    out = sharded.gather(ids_of(rank))
    begin = time.monotonic()
    if rank == 2:
        time.sleep(DEADLINE_S + 2)
        return
    raises(ConnectionError, [f"rank {rank} of 3", "timeout_s=3"], lambda: out.sum().backward())
    assert time.monotonic() - begin < 30  # no hang; a loaded machine is slow
    raises(ConnectionError, ["died"], lambda: sharded.submit(ids_of(rank)))


def check_a_rank_that_dies_is_an_error_on_every_other(world):
    sharded = ShardedRows(table_of("f32", *ShardedRows.range_of(R, world.rank, 4)), timeout_s=30)
    sharded.gather(ids_of(world.rank))
    if world.rank == 3:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    err = raises(ConnectionError, [f"rank {world.rank} of 4"], lambda: sharded.gather(ids_of(world.rank)))
    assert time.monotonic() - begin < 30, err
