"""The small language models of allocation.py: routed experts and a memory that share one budget of parameters.

Parameters are counted without token embedding and head, as in the paper (arXiv 2601.07372). A token reads `TOP_K` routed experts,
one shared expert, everything that is neither expert nor table, and its rows. What it does not read is sparse; rho is the share of
the sparse parameters that the routed experts have.
"""
from __future__ import annotations

import bisect
import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

import engram_kernels as ek

TOP_K = 2
VOCAB = 2048
HEADS, HEAD_DIM, MAX_ORDER = 4, 16, 3  # of the memory: orders 2 and 3
MEMORY_LAYER = 1
BALANCE = 0.01  # weight of the auxiliary loss that spreads tokens over experts


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model without a memory: width, layers, routed experts and their width, width of the shared expert."""
    hidden: int
    layers: int
    experts: int
    expert_width: int
    shared_width: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One split of a shape's budget. `spec` is the memory; None: all sparse parameters are experts."""
    shape: Shape
    experts: int
    shared_width: int
    spec: ek.EngramSpec | None

    def counts(self) -> dict[str, int]:
        """Parameters: total, active per token, and the sparse ones of experts and tables."""
        with torch.device("meta"):
            model = Model(self)
        dense = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("embed.", "head.")))
        idle_experts = (self.experts - TOP_K) * 3 * self.shape.hidden * self.shape.expert_width * self.shape.layers
        idle_rows = 0 if self.spec is None else (self.spec.layout().num_rows[0] - self.spec.num_columns) * HEAD_DIM
        tables = 0 if self.spec is None else self.spec.layout().num_rows[0] * HEAD_DIM
        return {"total": dense + tables, "active": dense + tables - idle_experts - idle_rows, "experts": idle_experts,
                "rows": idle_rows}

    def rho(self) -> float:
        """The share of the sparse parameters that the experts have."""
        counts = self.counts()
        return counts["experts"] / (counts["experts"] + counts["rows"])


def memory_spec(shape: Shape, *sizes: int) -> ek.EngramSpec:
    """The memory whose heads have at least so many rows each, by order."""
    return ek.EngramSpec.deepseek_v41(vocab_size=VOCAB, num_classes=VOCAB, pad_token_id=0, pad_class=0, max_order=MAX_ORDER,
                                      heads=HEADS, head_dim=HEAD_DIM, table_sizes=sizes, layer_ids=(MEMORY_LAYER,),
                                      hidden_size=shape.hidden, branches=1, row_format="f32")


def plan_of(shape: Shape, rho: float) -> Plan:
    """The split nearest to rho with as many total and active parameters as the shape without a memory.

    The memory's projections are paid for by a narrower shared expert, and the rows are what is left, in true primes.

    Raises:
        ValueError: the total differs by more than 0.05 % or the active parameters by more than 0.2 %.
    """
    whole = Plan(shape, shape.experts, shape.shared_width, None)
    if rho == 1:
        return whole
    want = whole.counts()
    experts = TOP_K + round(rho * (shape.experts - TOP_K))
    column = 3 * shape.hidden * shape.layers
    width, sizes = shape.shared_width, (64,) * (MAX_ORDER - 1)
    width -= round((Plan(shape, experts, width, memory_spec(shape, *sizes)).counts()["active"] - want["active"]) / column)
    rows = (want["total"] - Plan(shape, experts, width, None).counts()["total"] - _modules(shape)) // HEAD_DIM
    size = rows // (HEADS * len(sizes))
    specs = []
    for first in range(max(size - 96, 2), size, 8):  # for each size of order 2 the sizes of order 3 on both sides of what is left
        at = bisect.bisect_left(range(2 * size + 64), rows, lo=2, key=lambda n: memory_spec(shape, first, n).layout().num_rows[0])
        specs += [memory_spec(shape, first, max(n, 2)) for n in (at - 1, at)]
    spec = min(specs, key=lambda spec: abs(spec.layout().num_rows[0] - rows))
    plan = Plan(shape, experts, width, spec)
    for name, limit in (("total", 5e-4), ("active", 2e-3)):
        off = plan.counts()[name] / want[name] - 1
        if abs(off) > limit:
            raise ValueError(f"allocation: at rho {rho} the {name} parameters differ by {off:+.2%} from those at rho 1, more "
                             f"than {limit:.2%}: no whole number of columns and primes is nearer")
    return plan


def _modules(shape: Shape) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in ek.Engram(memory_spec(shape, 64, 64), MEMORY_LAYER, dtype=torch.float32).parameters())


class Attention(nn.Module):
    """Causal self-attention over sequences of one length, with rotated positions."""

    def __init__(self, hidden: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(_rotated(q), _rotated(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def _rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 100.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class Experts(nn.Module):
    """A shared expert and routed ones, of which a token takes TOP_K. `balance`: the auxiliary loss of the last call."""

    def __init__(self, hidden: int, experts: int, width: int, shared_width: int):
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, 2 * width) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) * width**-0.5)
        self.shared_up = nn.Linear(hidden, 2 * shared_width, bias=False)
        self.shared_down = nn.Linear(shared_width, hidden, bias=False)
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        x, shape = x.flatten(0, -2), x.shape
        scores = self.router(x).softmax(-1)
        weight, chosen = scores.topk(TOP_K)
        counts = torch.bincount(chosen.flatten(), minlength=scores.shape[1])
        self.balance = scores.shape[1] * (counts / chosen.numel() * scores.mean(0)).sum()
        order = chosen.flatten().argsort(stable=True)
        taken = x[order // TOP_K].split(counts.tolist())
        parts = [_glu(part @ self.up[e]) @ self.down[e] for e, part in enumerate(taken)]
        weight = (weight / weight.sum(-1, keepdim=True)).flatten()[order]
        y = self.shared_down(_glu(self.shared_up(x))).index_add(0, order // TOP_K, torch.cat(parts) * weight[:, None])
        return y.view(shape)


def _glu(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return functional.silu(a) * b


class Model(nn.Module):
    """Embedding, layers of attention and experts with the memory in front of layer MEMORY_LAYER, and the head.

    The table is no parameter: `rows` of a call are what `gather_rows` gave, so that its gradient is one of rows.
    """

    def __init__(self, plan: Plan):
        super().__init__()
        shape = plan.shape
        self.embed, self.head = nn.Embedding(VOCAB, shape.hidden), nn.Linear(shape.hidden, VOCAB, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(shape.hidden) for _ in range(2 * shape.layers + 1))
        self.attention = nn.ModuleList(Attention(shape.hidden) for _ in range(shape.layers))
        self.experts = nn.ModuleList(Experts(shape.hidden, plan.experts, shape.expert_width, plan.shared_width)
                                     for _ in range(shape.layers))
        self.memory = None if plan.spec is None else ek.Engram(plan.spec, MEMORY_LAYER, dtype=torch.float32)

    def forward(self, ids: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits [B, T, VOCAB] of ids [B, T], and the auxiliary loss. rows [B * T, C, D]; None: without the memory."""
        x = self.embed(ids)
        balance = torch.zeros(())
        for i, (attention, experts) in enumerate(zip(self.attention, self.experts, strict=True)):
            if i == MEMORY_LAYER and self.memory is not None and rows is not None:
                x = self.memory(x.flatten(0, 1)[:, None], rows=rows).view_as(x)
            x = x + attention(self.norms[2 * i](x))
            x = x + experts(self.norms[2 * i + 1](x))
            balance = balance + experts.balance
        return self.head(self.norms[-1](x)), BALANCE * balance
