"""ek.budget: the split of a model's sparse parameters between routed experts and a memory, one row per rho."""
from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

from engram_kernels.allocation import arguments, curve
from engram_kernels.allocation.memory_shape import memory_shape
from engram_kernels.allocation.moe_model import MoeModel, model_of_config, model_of_totals
from engram_kernels.allocation.number import Number
from engram_kernels.allocation.split import OPTIMIZERS, Split
from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.spec import EngramSpec

_INT32_MAX = 2**31 - 1
_SHAPE = ("experts", "top_k", "hidden_size", "num_layers", "vocab_size")
DEFAULT_RHOS = tuple(round(0.5 + 0.05 * i, 2) for i in range(11))


@dataclasses.dataclass(frozen=True)
class Budget:
    """What `budget` found.

    Attributes:
        model: the model, as configured.
        rows: a `Split` per number of experts, from the most experts to the fewest.
        chosen: the row nearest to `choose` that can be.
        configured: the split that the configuration itself has, where it has a memory; else None.
        outside: what of this configuration the paper's curve was not measured for.
        inputs: every input, by name.
        merged: rhos that were asked for and give the same experts as another row.
    """
    model: MoeModel
    rows: tuple[Split, ...]
    chosen: Split
    configured: Split | None
    outside: tuple[str, ...]
    inputs: dict[str, Number]
    merged: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class _Question:
    """The model, the memory's shape (its table sizes stand for nothing yet), and what experts may be."""
    model: MoeModel
    shape: EngramSpec
    multiple: int
    whole: float  # parameters in all, the configured memory's included

    @property
    def most(self) -> float:
        """Routed experts without a memory, as a real number."""
        m = self.model
        return m.experts + (self.whole - m.total) / (m.expert_parameters + m.router_parameters)

    @property
    def fewest(self) -> int:
        """Routed experts at rho 0 or above: a token takes that many."""
        return -(-self.model.top_k // self.multiple) * self.multiple

    @property
    def largest(self) -> int:
        """The most routed experts that the multiple and the budget allow."""
        return math.floor(self.most + 1e-9) // self.multiple * self.multiple

    @property
    def baseline(self) -> int:
        """Routed experts of the model without a memory: as configured, whatever the multiple, unless it has a memory itself."""
        return self.model.experts if self.model.memory is None else self.largest

    def rho_of(self, experts: float) -> float:
        """Idle experts over those without a memory, before the projections are paid for."""
        return (experts - self.model.top_k) / (self.most - self.model.top_k)

    def experts_at(self, rho: float) -> int:
        """The whole number of experts nearest to a rho."""
        if rho == 1:
            return self.baseline
        real = self.model.top_k + rho * (self.most - self.model.top_k)
        nearest = math.floor(real / self.multiple + 0.5) * self.multiple
        return min(max(nearest, self.fewest), self.largest)


def budget(config: Any = None, *, total: float | None = None, active: float | None = None,
           rho: float | Sequence[float] = DEFAULT_RHOS, choose: float | None = None, experts_multiple: int = 1,
           layers: Sequence[int] | None = None, orders: Sequence[int] | None = None, heads: int | None = None,
           head_dim: int | None = None, row_format: str | None = None, branches: int | None = None,
           profile: str | os.PathLike[str] | None = None, tokens_per_step: int | None = None, step_ms: float | None = None,
           **shape: int | None) -> Budget:
    """Splits a model's sparse parameters between routed experts and a memory, at the same number of parameters.

    ``rho = idle routed experts / sparse``, sparse being the idle experts and the rows that a token does not read. The experts
    are whole numbers of `experts_multiple`. The memory gets what the others leave: its projections first, then tables of
    distinct primes. Active parameters grow by the projections and the rows of one token, which every row shows.

    Args:
        config: of a mixture-of-experts model: dict, object, path of a config.json or its folder; None: `total` and `active`.
        total, active: parameters; beside `config`: published counts instead of those counted from it.
        rho: one share or several, in 0..1.
        choose: the row that is chosen is the nearest to it; None: 0.75, or the only rho.
        experts_multiple: such as the expert-parallel size.
        layers: decoder layers with a memory, zero based; None: the configuration's, else 1 and half of the layers less 1.
        orders: 2 up to the longest n-gram; None: the configuration's, else 2, 3.
        heads: per order; None: the configuration's, else 8.
        head_dim: elements of a row; None: the configuration's, else half of the hidden size over the columns, rounded up to
            16 (32 where the row format has scales per 32).
        row_format: of the tables at inference; None: the configuration's, else bf16.
        branches: hyper-connection streams; None: the configuration's, else 1 (4 without a configuration).
        profile: a report of ``engram-kernels profile --json``; adds exposed times by the planner.
        tokens_per_step, step_ms: the planner's workload; None: its defaults.
        shape: without `config`: experts, top_k, hidden_size, num_layers, vocab_size; None: those of the paper's 27B model.

    Returns:
        The rows, the chosen one with its `EngramSpec`, and where the configuration lies outside the paper's measurements.

    Raises:
        ValueError: an input makes no sense, no whole number of experts meets it, or no row can be; names the value and the
            nearest that works.
        OSError: a file cannot be read.

    Source: arXiv 2601.07372, section 3 (rho, the curve) and table 5; docs/budget.md has every formula.
    """
    if unknown := [name for name in shape if name not in _SHAPE]:
        raise TypeError(f"budget: {', '.join(unknown)} is no argument of it")
    rhos, choose = _rhos(rho, choose)
    total, active, step_ms = (arguments.real(*one) for one in (("total", total), ("active", active), ("step_ms", step_ms)))
    layers, orders = arguments.integers("layers", layers), arguments.integers("orders", orders)
    multiple, heads, head_dim, branches, tokens_per_step = (arguments.whole_number(*one) for one in (
        ("experts_multiple", experts_multiple), ("heads", heads), ("head_dim", head_dim), ("branches", branches),
        ("tokens_per_step", tokens_per_step)))
    shape = {name: arguments.whole_number(name, value) for name, value in shape.items()}
    if profile is None and (tokens_per_step is not None or step_ms is not None):
        raise ValueError("budget: tokens_per_step or step_ms is given, but no profile, to which alone they say something")
    if config is None:
        if total is None or active is None:
            raise ValueError("budget: neither a configuration nor both of total and active are given, expected --config, or "
                             "--total and --active")
        model = model_of_totals(total, active, branches=branches, **shape)
    else:
        if given := [name for name, value in shape.items() if value is not None]:
            raise ValueError(f"budget: {', '.join(given)} beside a configuration, which says it itself; expected without")
        model = model_of_config(config, total, active, branches)
    inputs = dict(model.inputs)
    spec = memory_shape(model, layers, orders, heads, head_dim, row_format, inputs)
    whole = model.total + (0 if model.memory is None else model.memory.num_parameters)
    ask = _Question(model, spec, multiple or 1, whole)
    if ask.fewest > ask.largest:
        raise ValueError(f"budget: no multiple of {ask.multiple} lies between the {model.top_k} experts that a token takes and "
                         f"the {math.floor(ask.most + 1e-9)} that the budget has; {_nearest_multiple(ask)}")
    by_experts: dict[int, float] = {}
    merged = []
    for one in rhos:
        experts = ask.experts_at(one)
        if experts in by_experts and abs(ask.rho_of(experts) - by_experts[experts]) <= abs(ask.rho_of(experts) - one):
            merged.append(one)
            continue
        if experts in by_experts:
            merged.append(by_experts[experts])
        by_experts[experts] = one
    rows = [_split(ask, experts, one) for experts, one in by_experts.items()]
    rows.sort(key=lambda row: -row.routed_experts)
    if profile is not None:
        rows = _with_exposed(rows, profile, model.num_layers, tokens_per_step, step_ms)
    chosen = _choose(ask, rows, choose, min(rhos))
    configured = None if model.memory is None else _measure(ask, model.experts, model.memory, math.nan)
    orders_now = tuple(range(2, spec.max_order + 1))
    far = curve.outside(model, whole, chosen.active, orders_now)
    return Budget(model, tuple(rows), chosen, configured, tuple(far), inputs, tuple(merged))


def _rhos(rho: float | Sequence[float], choose: float | None) -> tuple[list[float], float]:
    rhos = arguments.shares("rho", rho)
    if choose is not None:
        return rhos, arguments.share("choose", choose)
    return rhos, rhos[0] if len(rhos) == 1 else curve.DEFAULT_RHO


def _nearest_experts(ask: _Question, experts: int) -> int | None:
    """The number of experts nearest to `experts` with which a memory goes; None: there is none."""
    each, row = ask.model.expert_parameters + ask.model.router_parameters, ask.shape.head_dim * ask.shape.rows_per_token
    modules, most_rows = ask.shape.num_module_parameters, (_INT32_MAX - 2**20) / ask.shape.num_columns
    low = max(math.ceil((ask.most - (modules + most_rows * row) / each) / ask.multiple) * ask.multiple, ask.fewest)
    high = min(math.floor((ask.most - (modules + 2 * row) / each) / ask.multiple) * ask.multiple, ask.largest)
    if high == ask.baseline and _room(ask, high)[0] < 2 * modules:  # that is the row without a memory
        high -= ask.multiple
    low += 0 if low > high or _why_not(ask, low) is None else ask.multiple  # quotients are rounded
    high -= 0 if low > high or _why_not(ask, high) is None else ask.multiple
    return None if low > high else min(max(experts // ask.multiple * ask.multiple, low), high)


def _nearest_rho(ask: _Question, experts: int) -> str | None:
    """The rho of the number of experts nearest to `experts` that works, in as few digits as give it; None: there is none."""
    if (works := _nearest_experts(ask, experts)) is None:
        return None
    exact = ask.rho_of(works)
    digits = next((n for n in range(3, 16) if ask.experts_at(round(exact, n)) == works), 17)
    return f"nearest rho that works: {exact:.{digits}f}, {works} experts"


def _nearest_multiple(ask: _Question) -> str:
    works = _nearest_experts(dataclasses.replace(ask, multiple=1), ask.largest or math.floor(ask.most))
    return "no --experts-multiple works" if works is None else f"nearest --experts-multiple that works: {works}"


def _split(ask: _Question, experts: int, asked: float) -> Split:
    """The row of a number of experts."""
    room, modules = _room(ask, experts)
    if experts == ask.baseline and (asked == 1 or room < 2 * modules):
        return _measure(ask, experts, None, asked)
    if (why := _why_not(ask, experts)) is not None:
        return Split(asked, experts, ask.rho_of(experts), why_not=why)
    return _measure(ask, experts, _fill(ask.shape, room - modules), asked)


def _room(ask: _Question, experts: int) -> tuple[float, int]:
    """Parameters that these experts leave, and those of them that the memory's modules take."""
    return ask.whole - _without_memory(ask.model, experts), ask.shape.num_module_parameters


def _why_not(ask: _Question, experts: int) -> str | None:
    """Why no memory goes with so many experts; None: one does."""
    room, modules = _room(ask, experts)
    per_head = (room - modules) / (ask.shape.head_dim * ask.shape.rows_per_token)
    if per_head < 2:
        return (f"{experts} experts leave {room:,.0f} parameters, of which the memory's projections take {modules:,}: nothing is "
                "left for rows")
    if per_head * ask.shape.num_columns > _INT32_MAX - 2**20:  # the primes lie above the base size
        return (f"{experts} experts leave {per_head * ask.shape.num_columns:,.0f} rows per layer, and row ids are int32: at most "
                f"{_INT32_MAX - 2**20:,}; more layers or a larger head dim make them fewer")
    return None


def _without_memory(model: MoeModel, experts: int) -> float:
    return model.total + (experts - model.experts) * (model.expert_parameters + model.router_parameters)


def _fill(shape: EngramSpec, parameters: float) -> EngramSpec:
    """The memory whose tables, at their true moduli, have as many parameters as fit into `parameters`, within some primes."""
    columns, rows = shape.rows_per_token, parameters / shape.head_dim
    base = int(rows / columns)
    while True:
        spec = dataclasses.replace(shape, table_sizes=(max(base, 1),) * (shape.max_order - 1))
        excess = sum(spec.layout().num_rows) - rows
        if excess <= 0 or base <= 1:
            return spec
        base -= max(math.ceil(excess / columns), 1)


def _measure(ask: _Question, experts: int, spec: EngramSpec | None, asked: float) -> Split:
    """Everything that is computed of a split."""
    model = ask.model
    tables, modules = (0, 0) if spec is None else (spec.num_table_parameters, spec.num_module_parameters)
    rows_read = 0 if spec is None else spec.rows_per_token * spec.row_dim
    idle = (experts - model.top_k) * model.expert_parameters
    total = _without_memory(model, experts) + tables + modules
    active = model.active + (experts - model.experts) * model.router_parameters + modules + rows_read
    sparse = idle + tables - rows_read
    formats = {}
    for name in ROW_FORMATS if spec is not None else ():
        try:
            formats[name] = spec.bytes(name)  # type: ignore[union-attr]
        except ValueError:  # blocks that do not divide the row
            continue
    num_rows = tables // spec.head_dim if spec is not None else 0
    products = model.active - model.lookups + (experts - model.experts) * model.router_parameters
    removed = (ask.most - experts) * (model.expert_parameters + model.router_parameters)
    narrower = math.ceil(modules / model.shared_width_parameters) if model.shared_width_parameters else 0
    return Split(
        asked=asked, routed_experts=experts, rho=idle / sparse if sparse else 0.0, spec=spec, total=total, active=active,
        sparse=sparse, tables=tables, modules=modules, unspent=ask.whole - total,
        flops=2 * products + (0 if spec is None else spec.flops_per_token()), loss=curve.loss(idle / sparse if sparse else 0.0),
        table_bytes=formats, bytes_per_token=0 if spec is None else spec.rows_per_token * spec.bytes_per_row,
        training_bytes={name: tables * each + num_rows * row for name, (each, row, _) in OPTIMIZERS.items()},
        freed_bytes=0 if spec is None else removed * model.weight_bytes - 2 * modules,
        narrower=narrower if 0 < narrower < model.shared_width else None)


def _choose(ask: _Question, rows: list[Split], choose: float, asked: float) -> Split:
    """The row nearest to a rho; where all that were asked for, from `asked` up, give none a memory, they cannot be met."""
    able = [row for row in rows if row.why_not is None]
    with_memory = [row for row in able if row.spec is not None]
    if with_memory or asked == 1:
        return min(with_memory if with_memory and choose < 1 else able, key=lambda row: abs(row.rho - choose))
    if failed := [row for row in rows if row.why_not is not None]:
        first = min(failed, key=lambda row: abs(row.asked - choose))
        nearest = _nearest_rho(ask, first.routed_experts) or "no rho works with this shape of the memory"
        raise ValueError(f"budget: rho {first.asked:g}: {first.why_not}; {nearest}")
    nearest = _nearest_rho(ask, ask.largest) or _nearest_multiple(ask)
    raise ValueError(f"budget: rho {asked:g} leaves no expert to give up in multiples of {ask.multiple}: the nearest whole "
                     f"number is all {ask.largest}; {nearest}")


def _with_exposed(rows: list[Split], profile: str | os.PathLike[str], num_layers: int, tokens: int | None,
                  step_ms: float | None) -> list[Split]:
    from engram_kernels.allocation.exposed import exposed_of
    specs = [row.spec for row in rows if row.spec is not None]
    found = iter(exposed_of(specs, profile, num_layers, tokens, step_ms))
    out = []
    for row in rows:
        placement, exposed = (None, None) if row.spec is None else next(found)
        out.append(dataclasses.replace(row, placement=placement, exposed=exposed))
    return out
