"""One row of a budget: what a split costs, and the formula of each of its numbers."""
from __future__ import annotations

import dataclasses
from typing import Any

from engram_kernels.allocation.number import COMPUTED, Number, computed
from engram_kernels.spec import EngramSpec

# name -> (bytes per parameter of a table in training, bytes per row, source); gradients are rows of the batch and left out
OPTIMIZERS = {
    "adam_master": (14.0, 0, "bf16 rows, f32 master, two f32 moments: Megatron-LM docs/models/engram.md"),
    "adam_f32": (12.0, 0, "f32 rows, two f32 moments: torch.optim.SparseAdam"),
    "adagrad": (8.0, 0, "f32 rows, one f32 sum: torch.optim.Adagrad"),
    "rowwise_adagrad": (4.0, 4, "f32 rows, one f32 sum per row: FBGEMM exact row-wise Adagrad")}


@dataclasses.dataclass(frozen=True)
class Split:
    """One row: the model at one number of routed experts, the memory taking what the others leave.

    Attributes:
        asked: the rho that was asked for.
        routed_experts: per MoE layer.
        rho: share of the sparse parameters that the routed experts have.
        why_not: why there is no such memory; None: there is, or there is none to be had (`spec` None as well: all experts).
        spec: the memory; None: there is none.
        total, active, sparse: parameters; sparse: idle experts, and the rows that a token does
            not read; total less active where both are counted.
        tables, modules: of them, the memory's tables and its projections, norms and convolution.
        unspent: parameters of the budget that neither got.
        flops: per token, forward; attention over the context is left out.
        loss: the paper's, at this rho; None outside the range that it measured.
        table_bytes: by row format; those that do not take rows of this width are left out.
        bytes_per_token: of table rows.
        training_bytes: of the tables and their optimizer state, by optimizer.
        freed_bytes: accelerator memory at inference that the model without a memory would need on top; the tables lie elsewhere.
        narrower: columns by which the shared expert would have to be narrower for the active parameters to stay as they are
            without a memory; None: there is no shared expert as wide.
        exposed, placement: seconds per step that the model waits for rows, and where `plan` puts the tables; None: no profile.
    """
    asked: float
    routed_experts: int
    rho: float
    why_not: str | None = None
    spec: EngramSpec | None = None
    total: float = 0.0
    active: float = 0.0
    sparse: float = 0.0
    tables: int = 0
    modules: int = 0
    unspent: float = 0.0
    flops: float = 0.0
    loss: Number | None = None
    table_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    bytes_per_token: int = 0
    training_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    freed_bytes: float = 0.0
    narrower: int | None = None
    exposed: Any = None
    placement: str | None = None


def numbers_of(row: Split) -> dict[str, Number]:
    """The numbers of a row, each with its formula."""
    found = {
        "rho": computed(row.rho, "1", "idle routed experts / sparse"),
        "total": computed(row.total, "parameters", "model with these experts + tables + modules"),
        "active": computed(row.active, "parameters", "model's active + modules + rows of one token"),
        "sparse": computed(row.sparse, "parameters", "idle routed experts + rows that a token does not read"),
        "tables": computed(row.tables, "parameters", "sum of the true moduli * head dim"),
        "modules": computed(row.modules, "parameters", "EngramSpec.num_module_parameters"),
        "unspent": computed(row.unspent, "parameters", "budget - total"),
        "flops_per_token": computed(row.flops, "flop", "2 per active parameter in a product + EngramSpec.flops_per_token; "
                                                       "attention over the context left out"),
        "bytes_per_token": computed(row.bytes_per_token, "B", "rows per token * bytes per row"),
        "freed_bytes": computed(row.freed_bytes, "B", "experts given up * bytes of their weights - modules in bf16")}
    found |= {f"table_bytes_{name}": computed(n, "B", "rows * bytes per row") for name, n in row.table_bytes.items()}
    found |= {f"training_bytes_{name}": Number(n, "B", COMPUTED, OPTIMIZERS[name][2]) for name, n in row.training_bytes.items()}
    if row.narrower is not None:
        found["shared_expert_narrower_by"] = computed(row.narrower, "elements", "modules / (MoE layers * 3 * hidden), rounded up")
    if row.loss is not None:
        found["paper_loss"] = row.loss
    return found
