"""Training of a shard: sums and norm of the gradients that came, and the state of its RowOptimizer for any number of ranks."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram_kernels._exact_sum import exact_parts
from engram_kernels.ops.row_update import row_update
from engram_kernels.sharding.exchange import Wanted, sum_rows
from engram_kernels.table.row_table import RowTable

if TYPE_CHECKING:
    from engram_kernels.training.row_optimizer import RowOptimizer

_OF_A_SHARD = ("first_row", "num_rows")  # of an optimizer's settings: what differs from rank to rank


def sum_kept(kept: Sequence[tuple[Wanted, Tensor]], ranks: int, row_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Distinct rows of the shard, ascending, and their gradients [n, row_dim], summed in the order of the ranks."""
    if not kept:
        return torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, row_dim, device=device)
    split = [(wanted.asked.split(wanted.asked_counts), grads.split(wanted.asked_counts)) for wanted, grads in kept]
    pieces = [(ids[rank], grads[rank]) for rank in range(ranks) for ids, grads in split]
    row_ids, inverse = torch.unique(torch.cat([ids for ids, _ in pieces]).to(torch.int64), return_inverse=True)
    return row_ids, sum_rows(torch.cat([grads for _, grads in pieces]), inverse, row_ids.numel())


def parts_of_norm(*args: Any) -> tuple[list[float], Exception | None]:
    """`exact_parts` of what `squares_of` gives, and what is wrong, for every rank to raise."""
    try:
        return exact_parts(squares_of(*args).tolist()), None
    except ValueError as err:
        return exact_parts([]), err


def squares_of(gradients: str, parameter: Tensor | None, kept: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of squares of the gradient of each row of the shard that has one: float32.

    Args:
        gradients: of the ShardedRows.
        parameter: whose gradient counts; None: what `kept` gives does, row ids and gradients.
        kept: called where there is no parameter.
    """
    if gradients == "none":
        raise ValueError("ShardedRows.norm: gradients is 'none', expected 'rows' or 'sparse'")
    if parameter is None:
        row_ids, grad_rows = kept()
    elif parameter.grad is None:
        return torch.empty(0)
    elif parameter.grad.layout != torch.sparse_coo:
        raise ValueError(f"ShardedRows.norm: parameter.grad is dense ({parameter.grad.layout}), expected a sparse tensor")
    else:
        row_ids, grad_rows = parameter.grad._indices()[0], parameter.grad._values()
    if not bool(grad_rows.isfinite().all()):  # the step refuses or skips it, on all ranks together
        return torch.full((1,), torch.nan)
    distinct, places = torch.unique(row_ids, return_inverse=True)
    rows = torch.zeros(distinct.numel(), grad_rows.shape[1], dtype=torch.float32, device=grad_rows.device)
    return row_update(RowTable.from_tensor(rows, row_format="f32"), places, grad_rows.contiguous(), "none", lr=0.0)


def refusal(op: str, optimizer: Any, table: RowTable, first_row: int) -> Exception | None:
    """TypeError or ValueError unless it is a RowOptimizer of this shard; for every rank to raise."""
    from engram_kernels.training.row_optimizer import RowOptimizer
    if not isinstance(optimizer, RowOptimizer):
        return TypeError(f"{op}: optimizer is a {type(optimizer).__name__}, expected a RowOptimizer")
    found = optimizer.settings
    wrong = [f"{name} is {found[name]}, expected {value}, the shard's"
             for name, value in (("first_row", first_row), ("num_rows", table.num_rows)) if found[name] != value]
    if optimizer.table is not table and optimizer.table.rows.data_ptr() != table.rows.data_ptr():
        wrong.append("its table is another one than the shard's")
    return ValueError(f"{op}: optimizer is that of another table: {'; '.join(wrong)}") if wrong else None


def optimizer_state(optimizer: RowOptimizer, dtensor: Callable[[Tensor], Any]) -> dict[str, Any]:
    """Moments and steps as DTensors of all rows, and the numbers that every rank has alike."""
    state = optimizer.state_dict()
    settings = {name: value for name, value in optimizer.settings.items() if name not in _OF_A_SHARD}
    return {"num_steps": optimizer.num_steps, "param_groups": [{**state["param_groups"][0], "settings": settings}],
            **{name: dtensor(x) for name, x in optimizer.moments().items()}}


def load_optimizer_numbers(optimizer: Any, given: Any, table: RowTable, first_row: int) -> Exception | None:
    """Takes over the settings and the number of steps, not the moments; what is wrong is returned, for every rank to raise."""
    op = "ShardedRows.load_state_dict"
    try:
        if (wrong := refusal(op, optimizer, table, first_row)) is not None:
            return wrong
        if not isinstance(given, Mapping):
            raise KeyError(f"{op}: the state has no optimizer; it was taken without one")
        groups = given.get("param_groups")
        if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], Mapping):
            raise ValueError(f"{op}: param_groups of the optimizer is {groups!r}, expected what ShardedRows.state_dict gives")
        own = {name: optimizer.settings[name] for name in _OF_A_SHARD}
        group = {**groups[0], "settings": {**groups[0].get("settings", {}), **own}, "params": [0]}
        optimizer.load_state_dict({"state": {0: {**optimizer.moments(), "num_steps": given.get("num_steps")}},
                                   "param_groups": [group]})
    except (TypeError, ValueError, KeyError) as err:
        return err
    return None
