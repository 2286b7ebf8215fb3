"""Parameter groups of a model with memories: tables at a rate of their own, without decay."""
from __future__ import annotations

from typing import Any

from torch import nn

from engram_kernels.modules.memory_module import MemoryModule
from engram_kernels.ops.row_update import check_rate
from engram_kernels.sharding.sharded_rows import ShardedRows
from engram_kernels.training.trained_table import without_trained

TABLE_RATE = 5.0


def param_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Groups for a ``torch.optim`` optimizer: trained tables at five times the rate and without decay, the rest as given.

    Args:
        model: has `Engram` or `LongcatEmbedding` modules, or is one. A table of a `ShardedRows` with gradients="sparse" counts as
            its module's. A table that a `RowOptimizer` trains is left out: make that one before.
        lr: learning rate of the rest, at least 0.

    Returns:
        [{"params": the rest, "lr": lr}, {"params": tables, "lr": 5 * lr, "weight_decay": 0.0}]; parameters that need no gradient,
        and groups without parameters, are left out. Each parameter is in one group, in the order of the model.

    Raises:
        TypeError: `model` is no module, or `lr` no number.
        ValueError: `lr` is below 0, or nothing of the model needs a gradient.

    Source: Engram, arXiv 2601.07372, training: Adam on the tables at five times the learning rate, without weight decay.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups: model is a {type(model).__name__}, expected a torch.nn.Module")
    check_rate("param_groups", "lr", lr)
    tables: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, MemoryModule):
            tables += [x for name, x in module.named_parameters() if name in ("rows", "rows_orig")
                       or name.startswith("parametrizations.rows.")]
            if isinstance(module.table, ShardedRows) and module.table.parameter is not None:
                tables.append(module.table.parameter)
    tables = list({id(x): x for x in tables if x.requires_grad}.values())
    known = {id(x) for x in tables}
    rest = [x for x in model.parameters() if x.requires_grad and id(x) not in known]
    tables = without_trained(tables)
    if not tables and not rest:
        raise ValueError("param_groups: no parameter of model needs a gradient")
    groups: list[dict[str, Any]] = [{"params": rest, "lr": lr},
                                    {"params": tables, "lr": TABLE_RATE * lr, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
