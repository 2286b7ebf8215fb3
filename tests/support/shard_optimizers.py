"""A RowOptimizer per shard, on the processes of tests/table/test_sharded_rows.py, against one of the whole table."""
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from shard_cases import R, micro_batch, raises, table_of, uneven

from engram_kernels import RowOptimizer, RowTable, ShardedRows


def _copied(table):
    scales = None if table.scales is None else table.scales.clone()
    return RowTable.from_tensor(table.rows.clone(), scales, table.row_format, row_dim=table.row_dim)


def check_row_optimizers_of_shards_have_the_bits_of_one_process(world):
    for n in (2, 3):
        if world.full(n) is None:
            continue
        group, rank = world.full(n)
        for row_format, rule, options in (("bf16", "adam", {"first_moment": "bf16"}),
                                          ("bf16", "adagrad", {"second_moment": "element"}),
                                          ("fp8_e4m3_block32", "adam", {}), ("fp8_e4m3_row", "sgd", {})):
            whole = _copied(table_of(row_format))
            one = RowOptimizer(whole, rule, lr=0.1, seed=5, **options)
            begin, end = uneven(n)[rank]
            shard = _copied(table_of(row_format, begin, end))
            with ShardedRows(shard, group, gradients="rows", timeout_s=30) as sharded:
                mine = RowOptimizer(shard, rule, lr=0.1, seed=5, first_row=sharded.first_row, **options)
                for step in range(5):
                    summed = [_by_row(*micro_batch(10 * step + other)) for other in range(n)]  # what each rank sends
                    one.step(torch.cat([ids for ids, _ in summed]), torch.cat([grads for _, grads in summed]))
                    ids, grads = micro_batch(10 * step + rank)
                    sharded.gather(ids, torch.float32).backward(grads)
                    sharded.step(mine)
                assert sharded.first_row == begin and torch.equal(shard.rows, whole.rows[begin:end]), (n, rule)
                assert shard.scales is None or torch.equal(shard.scales, whole.scales[begin:end]), (n, rule)
            assert not torch.equal(whole.rows, table_of(row_format).rows)
            for name in ("second", "first", "steps"):
                x, y = getattr(mine, name), getattr(one, name)
                assert (x is None) == (y is None) and (x is None or torch.equal(x, y[begin:end])), (n, rule, name)


def check_a_step_that_one_rank_skips_is_skipped_by_all(world):
    """A NaN for a row of one rank: rows, moments and counts stay together, and the next step is that of one process."""
    for n in (2, 3):
        if world.full(n) is None:
            continue
        group, rank = world.full(n)
        begin, end = uneven(n)[rank]
        shard = RowTable.from_tensor(table_of("bf16", begin, end).rows.clone(), row_format="bf16")
        with ShardedRows(shard, group, gradients="rows", timeout_s=30) as sharded:
            mine = RowOptimizer(shard, lr=0.1, seed=5, nonfinite="skip", bias_correction="step", first_row=begin)
            for step, (spoils, scale) in enumerate(((True, 1.0), (False, 1.0), (False, float("nan") if rank == n - 1 else 1.0))):
                before = shard.rows.clone()
                ids, grads = micro_batch(step)  # the same on each rank, so that every rank that has rows has some to update
                if spoils and rank == 0:
                    grads[(ids == ids.max()).nonzero()[0].tolist()] = float("nan")
                sharded.gather(ids, torch.float32).backward(grads)
                assert bool(sharded.norm().isnan()) == spoils  # on every rank, so that clipping comes as far as the step
                sharded.step(mine, grad_scale=scale)
                taken = not spoils and step == 1
                assert torch.equal(shard.rows, before) != (taken and bool(((ids >= begin) & (ids < end)).any())), (n, step)
                assert mine.num_steps == (step >= 1) and mine.skipped_steps == (1, 1, 2)[step], (n, step, mine.skipped_steps)
                assert not sharded.take_gradients()[0].numel()


class Broken:
    """An optimizer whose steps fail."""

    def step(self, row_ids, grad_rows):
        return 1 / 0


def check_the_global_norm_and_the_moments_are_those_of_one_process(world):
    """Clipped Adam on 4, then 3, then 1 ranks, through checkpoints between, against one process that never stopped."""
    def shard_of(begin, end):
        return RowTable.from_tensor(table_of("bf16", begin, end).rows.clone(), row_format="bf16")

    def batch(step):  # of one process: twelve micro-batches one after the other
        summed = [_by_row(*micro_batch(20 * step + k)) for k in range(12)]
        return torch.cat([ids for ids, _ in summed]), torch.cat([grads for _, grads in summed])

    whole, options = shard_of(0, R), {"lr": 0.1, "seed": 5, "first_moment": "bf16", "bias_correction": "step"}
    one, norms = RowOptimizer(whole, **options), []
    for step in range(6):
        one.param_groups[0]["lr"] = 0.1 / (1 + step)
        norms.append(one.norm(*batch(step)))
        one.step(*batch(step), grad_scale=min(1.0, 0.5 / norms[-1].item()))

    def even(n, rank):
        return ShardedRows.range_of(R, rank, n)

    for stage, (n, cut) in enumerate(((4, even), (3, lambda n, rank: uneven(n)[rank]), (1, even))):
        if world.full(n) is not None:
            (group, rank), others = world.full(n), world.others[n]
            shard = shard_of(*cut(n, rank))
            with ShardedRows(shard, group, gradients="rows", timeout_s=30) as sharded:
                mine = RowOptimizer(shard, first_row=sharded.first_row, **options)
                if stage:
                    state = sharded.state_dict(mine)
                    dcp.load(state, checkpoint_id=f"{world.folder}/trained{stage - 1}", process_group=others)
                    sharded.load_state_dict(state, mine)
                    assert mine.num_steps == 2 * stage and mine.param_groups[0]["lr"] == 0.1 / (2 * stage), mine
                for step in range(2 * stage, 2 * stage + 2):
                    mine.param_groups[0]["lr"] = 0.1 / (1 + step)
                    for k in range(rank * 12 // n, (rank + 1) * 12 // n):
                        ids, grads = micro_batch(20 * step + k)
                        sharded.gather(ids, torch.float32).backward(grads)
                    norm = sharded.norm()
                    assert torch.equal(norm, norms[step]), (n, step, norm, norms[step])
                    raises(ZeroDivisionError, [], lambda sharded=sharded: sharded.step(Broken()))
                    assert torch.equal(sharded.norm(), norm)  # its gradients are still there
                    sharded.step(mine, grad_scale=min(1.0, 0.5 / norm.item()))
                    assert sharded.norm() == 0
                raises(TypeError, ["optimizer is a SGD, expected a RowOptimizer"],
                       lambda sharded=sharded: sharded.state_dict(torch.optim.SGD([torch.zeros(1)])))
                if n > 1:  # on the first rank too, where the optimizer would do
                    raises(ValueError, ["first_row is 0, expected"], lambda s=sharded: s.state_dict(RowOptimizer(s.table)))
                if stage < 2:
                    dcp.save(sharded.state_dict(mine), checkpoint_id=f"{world.folder}/trained{stage}", process_group=others)
                else:
                    assert torch.equal(shard.rows, whole.rows)
                    assert all(torch.equal(getattr(mine, name), getattr(one, name)) for name in ("second", "first", "steps"))
        dist.barrier()


def _by_row(ids, grads):
    """Distinct ids of one rank, ascending, and their gradients, summed in float32."""
    present = ids >= 0
    distinct, inverse = torch.unique(ids[present], return_inverse=True)
    return distinct, torch.ops.engram_kernels.gather_rows_bwd(grads[present], inverse, distinct.numel(), torch.float32)
