"""What the processes of tests/modules/test_distributed.py do; they import this file and nothing of pytest."""
import io

import torch
import torch.distributed as dist
from module_cases import T, make_layer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from engram_kernels import gather_rows

PROCESSES, STEPS, RATE = 2, 3, 0.5
KINDS = ("ddp", "fsdp2", "fsdp1", "fsdp1_original_parameters")


def batch(rank, hidden, ids):
    """The sequence of a process."""
    part, length = slice(rank * (T // PROCESSES), (rank + 1) * (T // PROCESSES)), T // PROCESSES
    return hidden[part], ids[part], torch.tensor([0, length], dtype=torch.int32)


def trained_alone(variant):
    """What one process gets from all the batches: its parameters before and after."""
    layer, ids, hidden = make_layer(variant, trained_rows=True)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        sum(layer(*batch(rank, hidden, ids)).square().mean() / PROCESSES for rank in range(PROCESSES)).backward()
        optimizer.step()
    return before, {name: p.detach() for name, p in layer.named_parameters()}


def trained_together(kind, variant, rank, mesh):
    """The parameters after the same steps, each process with its batch."""
    layer, ids, hidden = make_layer(variant, trained_rows=True)
    if kind == "ddp":
        model = DistributedDataParallel(layer)
    elif kind == "fsdp2":
        model = fully_shard(layer, mesh=mesh)
        assert hasattr(layer.rows, "placements")
        try:
            _ = layer.table.rows
            raise AssertionError("a part of the rows was taken for the table")
        except ValueError as err:
            assert "DTensor" in str(err) and "full_tensor" in str(err)
    else:
        model = FullyShardedDataParallel(layer, use_orig_params=kind != "fsdp1", device_id=torch.device("cpu"), device_mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(*batch(rank, hidden, ids)).square().mean().backward()
        optimizer.step()
    if kind == "fsdp2":
        return {name: p.full_tensor().detach() for name, p in layer.named_parameters()}
    if kind == "ddp":
        return {name: p.detach() for name, p in layer.named_parameters()}
    with FullyShardedDataParallel.summon_full_params(model):
        return {name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in model.named_parameters()}


def train(rank, store, result):
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    found = {(kind, variant): trained_together(kind, variant, rank, mesh)
             for kind in KINDS for variant in ("deepseek_v41", "demo_v1")}
    if rank == 0:
        torch.save(found, result)
    dist.destroy_process_group()


def answer(connection, things):
    """A started process: what its copies of tables and modules give."""
    torch.set_num_threads(1)
    ids, hidden, cu, tables, layers = things
    answers = [gather_rows(table, ids, torch.float32) for table in tables]
    with torch.no_grad():
        answers += [layer(hidden, ids[:, 0].contiguous(), cu) for layer in layers]
    data = io.BytesIO()
    torch.save((answers, [table.tier for table in tables], [repr(table) for table in tables]), data)
    connection.send_bytes(data.getvalue())
    connection.close()


class Lookup(nn.Module):
    """A model around a table, for export."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, ids):
        return gather_rows(self.table, ids, torch.float32)


class TableDataset(torch.utils.data.Dataset):
    """Reads rows in the workers of a DataLoader."""

    def __init__(self, table):
        self.table = table

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return gather_rows(self.table, torch.tensor([index]), torch.float32)[0]
