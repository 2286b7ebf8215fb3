"""What the processes of tests/table/test_sharded_rows.py do; they import this file and nothing of pytest."""
import datetime
import os
import time
import traceback

import shard_faults
import shard_optimizers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from module_cases import T, make_layer
from shard_cases import PROCESSES, D, R, World, ids_of, micro_batch, raises, table_of, uneven
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from engram_kernels import Engram, RowTable, ShardedRows, gather_rows

FORMATS = ("f32", "bf16", "f16", "fp8_e4m3_block32", "fp8_e4m3_block32_packed", "fp8_e4m3_tensor", "int8_group32",
           "nvfp4", "mxfp4", "fp8_e4m3_row")


def check_rows_have_the_bits_of_one_process(world):
    for n in range(1, PROCESSES + 1):
        if world.full(n) is None:
            continue
        group, rank = world.full(n)
        for row_format in FORMATS if n in (1, 3) else ("bf16", "int8_group32"):
            whole = table_of(row_format)
            with ShardedRows(table_of(row_format, *uneven(n)[rank]), group, num_rows=R, timeout_s=30) as sharded:
                batches = [ids_of(10 * n + rank, 0 if rank == 1 else 60), ids_of(rank, 4 * rank).int(), torch.full((3,), -1)]
                tickets = [sharded.submit(ids) for ids in batches]
                for ids, ticket in zip(batches, tickets, strict=True):
                    got = sharded.wait(ticket, torch.float32)
                    want = gather_rows(whole, ids, torch.float32)
                    assert got.shape == want.shape and torch.equal(got.view(torch.int32), want.view(torch.int32)), (n, row_format)


def check_shards_may_be_files_padded_or_dtensors(world):
    group, rank = world.groups[4], world.rank
    begin, end = ShardedRows.range_of(R, rank, 4)
    ids, want = ids_of(rank), gather_rows(table_of("bf16"), ids_of(rank))
    packed = table_of("fp8_e4m3_block32_packed")
    wide = nn.functional.pad(packed.rows, (0, 30))[begin:end]
    path = f"{world.folder}/shard{rank}.safetensors"
    mesh = DeviceMesh.from_group(group, "cpu")
    rows = DTensor.from_local(table_of("bf16").rows[begin:end], mesh, [Shard(0)], shape=torch.Size([R, D]), stride=(D, 1))
    for shard in (RowTable.create(path, table_of("bf16").rows[begin:end]), rows):
        with ShardedRows(shard, group, timeout_s=30) as sharded:
            assert sharded.num_rows == R and torch.equal(sharded.gather(ids), want)
    with ShardedRows(RowTable.from_tensor(wide, None, "fp8_e4m3_block32_packed", row_dim=D), group, timeout_s=30) as sharded:
        assert torch.equal(sharded.gather(ids), gather_rows(packed, ids))
        assert sharded.stats()["rows_bytes"] == sharded.stats()["served_rows"] * packed.row_bytes  # the padding stays where it is


def check_heads(world):
    heads = [40, 33, 30, 60, 40]
    group, rank = world.groups[4], world.rank
    begin, end = ShardedRows.range_of(R, rank, 4, heads)
    table = table_of("f32")
    with ShardedRows(table.rows[begin:end], group, by="heads", heads=torch.tensor(heads), timeout_s=30) as sharded:
        want = gather_rows(table, ids_of(rank), torch.float32)
        assert begin in (0, 40, 73, 103, 163) and torch.equal(sharded.gather(ids_of(rank)), want)
    cut = [(0, 41), (41, 73), (73, 103), (103, R)][rank]
    raises(ValueError, ["row 41", "heads", "40, 73"],
           lambda: ShardedRows(table.rows[slice(*cut)], group, by="heads", heads=heads))


MICRO_BATCHES = 12


def one_after_the_other():
    """What one process gets: each micro-batch summed position by position in float32, then added to what was there."""
    total = {}
    for k in range(MICRO_BATCHES):
        ids, grads = micro_batch(k)
        summed = {}
        for row, grad in zip(ids.flatten().tolist(), grads.flatten(0, 1), strict=True):
            if row >= 0:
                summed[row] = summed[row] + grad if row in summed else grad
        for row, grad in summed.items():
            total[row] = total[row] + grad if row in total else grad
    return total


class Recorder:
    """An optimizer that keeps what it is given."""

    def step(self, row_ids, grad_rows):
        self.row_ids, self.grad_rows = row_ids, grad_rows
        return "stats"


def check_gradients_have_the_bits_of_one_process(world):
    want = one_after_the_other()
    for n in range(1, PROCESSES + 1):
        if world.full(n) is None:
            continue
        group, rank = world.full(n)
        begin, end = uneven(n)[rank]
        with ShardedRows(table_of("bf16", begin, end), group, gradients="rows", timeout_s=30) as sharded:
            for k in range(rank * MICRO_BATCHES // n, (rank + 1) * MICRO_BATCHES // n):
                ids, grads = micro_batch(k)
                sharded.gather(ids, torch.float32).backward(grads)
            recorder = Recorder()
            assert sharded.step(recorder) == "stats" and sharded.take_gradients()[0].numel() == 0
        mine = sorted(row - begin for row in want if begin <= row < end)
        assert recorder.row_ids.tolist() == mine and recorder.grad_rows.dtype == torch.float32
        for row, grad in zip(mine, recorder.grad_rows, strict=True):
            assert torch.equal(grad, want[row + begin]), (n, row)


def check_sparse_gradients_train_the_shards(world):
    if world.full(2) is None:
        return
    group, rank = world.full(2)
    whole = table_of("f32").rows.clone()
    for step in range(2):  # what one process does: the second rank's sums are added to the first's
        total = torch.zeros_like(whole)
        for other in range(2):
            ids, grads = micro_batch(10 * step + other)
            total += torch.ops.engram_kernels.gather_rows_bwd(grads, ids, R, torch.float32)
        whole -= 0.5 * total
    begin, end = ShardedRows.range_of(R, rank, 2)
    with ShardedRows(nn.Parameter(table_of("f32", begin, end).rows.clone()), group, timeout_s=30) as sharded:
        optimizer = torch.optim.SGD([sharded.parameter], lr=0.5)
        for step in range(2):
            ids, grads = micro_batch(10 * step + rank)
            ticket = sharded.submit(ids)
            if step:
                optimizer.step()  # after submit: wait reads what this writes
                optimizer.zero_grad()
            sharded.wait(ticket).backward(grads)
            assert sharded.parameter.grad.is_sparse
        optimizer.step()
        torch.testing.assert_close(sharded.parameter.detach(), whole[begin:end], rtol=2e-6, atol=0)
        with torch.no_grad():
            assert not sharded.gather(ids).requires_grad


def check_what_may_go_ahead_does(world):
    """After `submit` ids have crossed without a `wait`, and rows too where nothing trains them; the ids may change then."""
    group, rank = world.groups[4], world.rank
    table = table_of("f32")
    begin, end = ShardedRows.range_of(R, rank, 4)
    for gradients in ("rows", "none"):
        with ShardedRows(table.rows[begin:end], group, gradients=gradients, timeout_s=30) as sharded:
            ids = torch.arange(R)
            ticket = sharded.submit(ids)
            ids.fill_(5)
            crossed, end_s = "ids_bytes" if sharded.trains else "rows_bytes", time.monotonic() + 25
            while not sharded.stats()[crossed] and time.monotonic() < end_s:
                time.sleep(0.01)
            assert sharded.stats()[crossed] > 0 and (not sharded.trains or sharded.stats()["rows_bytes"] == 0)
            assert torch.equal(sharded.wait(ticket), table.rows) and sharded.stats()["in_flight"] == 0


def check_compiled_layers_take_shards(world):
    if world.full(2) is None:
        return
    group, rank = world.full(2)
    layer, ids, hidden = make_layer("demo_v1")
    rows, cu = layer.table.rows, torch.tensor([0, T], dtype=torch.int32)
    want = layer(hidden, ids, cu)
    begin, end = ShardedRows.range_of(rows.shape[0], rank, 2)
    with ShardedRows(nn.Parameter(rows[begin:end].clone()), group, timeout_s=30) as sharded:
        layer.table = sharded
        out = torch.compile(layer, backend="eager")(hidden, ids, cu)
        out.square().sum().backward()
        assert torch.equal(out, want) and sharded.parameter.grad.is_sparse


def check_rows_are_those_of_the_last_step(world):
    group, rank = world.groups[4], world.rank
    begin, end = ShardedRows.range_of(R, rank, 4)
    rows = torch.zeros(end - begin, D)
    with ShardedRows(RowTable.from_tensor(rows, row_format="f32"), group, gradients="rows", timeout_s=30) as sharded:
        tickets = [sharded.submit(torch.arange(R)) for _ in range(3)]
        for step, ticket in enumerate(tickets):
            time.sleep(0.02 * rank)
            rows += 1
            assert sharded.wait(ticket, torch.float32).unique().tolist() == [step + 1]


def check_bytes_are_those_of_a_deduplicated_exchange(world):
    if world.full(2) is None:
        return
    group, rank = world.full(2)
    begin, end = ShardedRows.range_of(R, rank, 2)
    tally, plain = [0], dist.all_to_all_single

    def counted(got, sent, in_sizes, out_sizes, group):
        stays = sent[rank].nbytes if out_sizes is None else out_sizes[rank] * sent.element_size()
        tally[0] += sent.nbytes - stays
        return plain(got, sent, in_sizes, out_sizes, group=group)

    sharded = ShardedRows(table_of("bf16", begin, end), group, gradients="rows", timeout_s=30)
    every_rank = [torch.randint(0, R, (4000,), generator=torch.Generator().manual_seed(other)) for other in range(2)]
    try:
        dist.all_to_all_single = counted
        sharded.gather(every_rank[rank], torch.float32).sum().backward()
    finally:
        dist.all_to_all_single = plain
    asked = [ids.unique() for ids in every_rank]
    wanted = int(((asked[rank] < begin) | (asked[rank] >= end)).sum())  # four bytes of an id to the owner, float32 gradients too
    served = int(((asked[1 - rank] >= begin) & (asked[1 - rank] < end)).sum())
    needed = wanted * (4 + 4 * D) + served * 2 * D
    assert sharded.stats()["sent_bytes"] == tally[0] and needed <= tally[0] <= 1.1 * needed, (tally[0], needed)
    assert sharded.stats()["remote_rows"] == wanted and sharded.stats()["served_rows"] == served
    sharded.close()


def check_checkpoints_go_from_4_to_3_to_1_ranks(world):
    paths = [f"{world.folder}/checkpoint{k}" for k in range(2)]
    tables = {name: table_of(name) for name in ("bf16", "int8_group32", "fp8_e4m3_tensor")}
    moments = torch.randn(R, 3, generator=torch.Generator().manual_seed(5))

    def made(n, cut, filled):
        group, rank = world.full(n)
        begin, end = cut(n, rank)
        fill = (lambda x: x.clone()) if filled else torch.zeros_like
        found = {}
        for name in tables:
            part = table_of(name, begin, end)
            scales = None if part.scales is None else fill(part.scales)
            shard = RowTable.from_tensor(fill(part.rows), scales, name, row_dim=D)
            found[name] = ShardedRows(shard, group, num_rows=R, timeout_s=30)
        return found, fill(moments[begin:end])

    def even(n, rank):
        return ShardedRows.range_of(R, rank, n)

    stages = ((4, even), (3, lambda n, rank: uneven(n)[rank]), (1, even))
    for stage, (n, cut) in enumerate(stages):
        if world.full(n) is not None:
            (sharded, moment), group = made(n, cut, stage == 0), world.others[n]
            state = {name: one.state_dict() for name, one in sharded.items()} | {"moments": sharded["bf16"].dtensor(moment)}
            assert isinstance(state["bf16"]["rows"], DTensor) and state["bf16"]["rows"].shape == (R, D)
            if stage:
                dcp.load(state, checkpoint_id=paths[stage - 1], process_group=group)
                for name, one in sharded.items():
                    one.load_state_dict(state[name])
                    assert torch.equal(one.gather(torch.arange(R), torch.float32),
                                       gather_rows(tables[name], torch.arange(R), torch.float32)), (n, name)
                whole = state["moments"].full_tensor()
                assert torch.equal(whole, moments)
                raises(ValueError, ["rows is", "[100, 64], expected torch.bfloat16 [203, 64]", "torch.distributed.checkpoint"],
                       lambda sharded=sharded: sharded["bf16"].load_state_dict({"rows": torch.zeros(100, D).bfloat16()}))
            if stage < 2:
                dcp.save(state, checkpoint_id=paths[stage], process_group=group)
            for one in sharded.values():
                one.close()
        dist.barrier()


def check_engram_trains_beside_ddp_and_fsdp2(world):
    if world.full(2) is None:
        return
    group, rank = world.full(2)
    part, cu = slice(rank * (T // 2), (rank + 1) * (T // 2)), torch.tensor([0, T // 2], dtype=torch.int32)

    def trained(layer, model, parameters, parts):
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            sum(model(hidden[one], ids[one], cu).square().mean() / len(parts) for one in parts).backward()
            optimizer.step()
        return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in layer.named_parameters()}

    for kind, variant in (("ddp", "demo_v1"), ("fsdp2", "deepseek_v41")):
        alone, ids, hidden = make_layer(variant, trained_rows=True)
        before = alone.rows.detach().clone()
        layer = make_layer(variant)[0]
        begin, end = ShardedRows.range_of(before.shape[0], rank, 2)
        with ShardedRows(nn.Parameter(before[begin:end].clone()), group, reduce="mean", timeout_s=30) as sharded:
            layer.table = sharded
            assert layer.table is sharded and "ShardedRows" in repr(layer) and "rows" not in layer.state_dict()
            with torch.no_grad():
                assert torch.equal(layer(hidden[part], ids[part], cu), alone(hidden[part], ids[part], cu))
            model = (DistributedDataParallel(layer, process_group=world.others[2]) if kind == "ddp"
                     else fully_shard(layer, mesh=DeviceMesh.from_group(world.others[2], "cpu")))
            got = trained(layer, model, [*model.parameters(), sharded.parameter], [part])
            want = trained(alone, alone, [*alone.parameters()], [slice(0, T // 2), slice(T // 2, 2 * (T // 2))])
            rows, first = want.pop("rows")[begin:end], dict(make_layer(variant)[0].named_parameters())
            moved = (rows - before[begin:end]).abs().max().item()
            torch.testing.assert_close(sharded.parameter.detach(), rows, rtol=1e-5, atol=1e-3 * moved)
            assert set(got) == set(want)
            for name, value in want.items():
                moved = (value - first[name]).abs().max().item()
                assert moved > 1e-5
                torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-3 * moved)
    assert isinstance(layer, Engram)


CHECKS = {**globals(), **vars(shard_optimizers), **vars(shard_faults)}
CHECKS = {name: found for name, found in CHECKS.items() if name.startswith("check_")}
CHECKS = {**{name: CHECKS[name] for name in CHECKS if name not in shard_faults.LAST}, **{n: CHECKS[n] for n in shard_faults.LAST}}


def run(rank, folder):
    """One of the processes: does every check and writes what went wrong after each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES,
                            timeout=datetime.timedelta(seconds=30))
    world, found = World(rank, folder), {}
    for name in CHECKS:
        found[name] = "did not end"
        torch.save(found, f"{folder}/found{rank}")
        try:
            CHECKS[name](world)
            found[name] = ""
        except BaseException:
            found[name] = f"rank {rank}: {traceback.format_exc()}"
        torch.save(found, f"{folder}/found{rank}")
    os._exit(0)  # a process group without one of its ranks has no orderly end
