"""The rows of all ranks as one DTensor, which torch.distributed.checkpoint writes once and gives to any number of ranks."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram_kernels.sharding.channel import Channel
from engram_kernels.sharding.partition import Partition, rows_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def dtensor_of(local: Tensor, partition: Partition, channel: Channel) -> DTensor:
    """A DTensor [R, ...] of what each rank has for its rows [r, ...].

    Where the rows are spread as DTensor spreads them, it shares memory with `local`. Elsewhere rows go to the rank that DTensor
    wants them on: every rank has to call it.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard  # a second and a half, for those alone who save
    mesh = DeviceMesh.from_group(channel.group, local.device.type)
    part = local.detach()
    if not (partition.is_dtensors() and part.is_contiguous()):
        part = _moved(part.contiguous(), partition, _dtensors(partition, channel.ranks), channel)
    shape = (partition.num_rows, *local.shape[1:])
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape),
                              stride=torch.empty(shape, device="meta").stride())


def copy_state(name: str, state: Any, local: Tensor, partition: Partition, channel: Channel, ticket: int) -> None:
    """Copies a state, of this world size, into what this rank has for its rows. Every rank has to call it.

    Args:
        name: of the state, for the messages.
        state: a DTensor [R, ...] with Shard(0) or Replicate() over as many ranks, or a tensor of all R rows.
        local: [r, ...], written.
        partition: of the rows.
        channel: to move rows and errors with.
        ticket: a number that is the same on every rank.

    Raises:
        TypeError: it is no tensor.
        ValueError: its shape or dtype differs, or it is the state of another number of ranks. On every rank.
    """
    error: Exception | None = None
    part = whole = None
    try:
        part, whole = _parts(name, state, local, partition, channel)
    except (TypeError, ValueError) as err:
        error = err
    kinds = channel.agree("state", ticket, error, [int(whole is not None)] * channel.ranks)
    if len(set(kinds)) > 1:
        raise ValueError(f"ShardedRows.load_state_dict: {name} is a whole tensor on some ranks and a DTensor on others")
    if whole is not None:
        begin = partition.begins[channel.rank]
        local.copy_(whole[begin:begin + local.shape[0]])
        return
    assert part is not None
    if not partition.is_dtensors():
        part = _moved(part.contiguous(), _dtensors(partition, channel.ranks), partition, channel)
    if part.data_ptr() != local.data_ptr() or part.stride() != local.stride():
        local.copy_(part)


def _parts(name: str, state: Any, local: Tensor, partition: Partition, channel: Channel) -> tuple[Tensor | None, Tensor | None]:
    """(the rows of this rank as DTensor spreads them, None) or (None, all rows)."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    op = "ShardedRows.load_state_dict"
    wanted = (partition.num_rows, *local.shape[1:])
    if not isinstance(state, Tensor):
        raise TypeError(f"{op}: {name} must be a DTensor or a tensor of all rows, got {type(state).__name__}")
    if tuple(state.shape) != wanted or state.dtype != local.dtype:
        raise ValueError(f"{op}: {name} is {state.dtype} {list(state.shape)}, expected {local.dtype} {list(wanted)}, all rows; "
                         "the state of another number of ranks has to go through torch.distributed.checkpoint, which reshapes it")
    if not isinstance(state, DTensor):
        return None, state
    if isinstance(state.placements[0], Replicate):
        return None, state.to_local()
    ranks = state.device_mesh.size()
    if state.device_mesh.ndim != 1 or state.placements != (Shard(0),) or ranks != channel.ranks:
        raise ValueError(f"{op}: {name} is a DTensor with placements {state.placements} over {ranks} ranks, expected (Shard(0),) "
                         f"over {channel.ranks}; torch.distributed.checkpoint reshapes the state of another number of ranks")
    return state.to_local(), None


def _dtensors(partition: Partition, ranks: int) -> Partition:
    bounds = [rows_of(partition.num_rows, k, ranks) for k in range(ranks)]
    return Partition([end - begin for begin, end in bounds])


def _moved(part: Tensor, given: Partition, wanted: Partition, channel: Channel) -> Tensor:
    """The rows of this rank by `wanted`, of which each rank has those by `given`."""
    flat = part.reshape(part.shape[0], part[:1].numel() if part.shape[0] else part.shape[1:].numel())
    moved = channel.exchange("state", flat, given.overlaps(channel.rank, wanted), wanted.overlaps(channel.rank, given))
    return moved.reshape(-1, *part.shape[1:])
