"""A budget as text, as JSON and as a figure."""
from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engram_kernels._terminal import Printer
from engram_kernels.allocation import curve
from engram_kernels.allocation.budget import Budget
from engram_kernels.allocation.number import Number, count_text
from engram_kernels.allocation.split import OPTIMIZERS, Split, numbers_of
from engram_kernels.profile.show import bytes_text, time_text

SCHEMA_VERSION = 1
_WIDTH = 100  # columns of plain text
LEGEND = ("(g) given, (c) computed, (e) measured elsewhere, (a) assumed; of a profile: (m) measured. The tables' columns are "
          "computed, \"paper\" is (e).")
_LETTERS = {"given": "g", "computed": "c", "measured elsewhere": "e", "assumed": "a"}


def print_budget(found: Budget, printer: Printer, explain: bool = False) -> None:
    """Prints the model, the rows, the chosen one, and where the paper's curve does not reach."""
    chosen, model = found.chosen, found.model
    _say(printer, _chosen_line(found), "bold")
    _say(printer, _model_line(found))
    printer.say()
    _print_parameters(found, printer)
    printer.say()
    _print_costs(found, printer)
    printer.say()
    _print_training(found, printer)
    for row in found.rows:
        if row.why_not is not None:
            _say(printer, f"No rho {row.asked:g}: {row.why_not}.")
    if found.merged:
        shares = ", ".join(f"{one:g}" for one in sorted(found.merged))
        _say(printer, f"rho {shares}: the nearest whole number of experts is that of another row.")
    if chosen.spec is not None:
        printer.say()
        for line in chosen_lines(found):
            _say(printer, line)
    _say(printer, f"paper: {curve.PAPER}, loss {curve.POINTS[2][1]} at rho 1 and {curve.POINTS[1][1]} near 0.8, best at "
                  f"{curve.BEST[0]:.2f} to {curve.BEST[1]:.2f}, flat there; measured from {curve.POINTS[0][0]} to 1; losses "
                  "between its points are straight lines.")
    idle = (model.experts - model.top_k) * model.expert_parameters
    if abs(model.total - model.active - idle) > 1e-3 * idle:
        _say(printer, f"note: total less active is {count_text(model.total - model.active)} as given, but the idle experts have "
                      f"{count_text(idle)} (c): sparse counts these.")
    for line in found.outside:
        _say(printer, f"outside of it: {line}.")
    if not found.outside:
        _say(printer, f"Nothing of this configuration lies outside of what it had ({model.name}).")
    if explain:
        printer.say()
        for name, number in found.inputs.items():
            text = count_text(number.value) if number.text is None else number.text
            _say(printer, f"{name}: {text} ({_LETTERS[number.provenance]}), {number.source}")
    _say(printer, LEGEND if explain else f"{LEGEND} --explain prints every input with its source.")


def _say(printer: Printer, text: str, style: str | None = None) -> None:
    for line in textwrap.wrap(text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False) or [""]:
        printer.say(line, style)


def _chosen_line(found: Budget) -> str:
    c, model = found.chosen, found.model
    field = model.experts_field or "routed experts"
    if c.spec is None:
        return f"chosen: rho 1, {c.routed_experts} routed experts and no memory."
    sizes = ", ".join(f"{n:,}" for n in c.spec.table_sizes)
    return (f"chosen: rho {c.rho:.3f} (c): {field} {model.experts} -> {c.routed_experts}, and a memory of "
            f"{count_text(c.tables + c.modules)} (c) parameters: table_sizes {sizes} in layers "
            f"{', '.join(map(str, c.spec.layer_ids))} (counted from 0).")


def _model_line(found: Budget) -> str:
    m = found.model
    letters = {name: _LETTERS[number.provenance] for name, number in found.inputs.items()}
    parts = [f"total {count_text(found.inputs['total parameters'].value)} ({letters['total parameters']})",
             f"active {count_text(found.inputs['active parameters'].value)} ({letters['active parameters']})",
             f"{m.top_k} of {m.experts} routed experts ({letters['routed experts']})",
             f"one in all layers {count_text(m.expert_parameters)} (c)"]
    own = "" if m.memory is None else f"; its own memory {count_text(m.memory.num_parameters)} (c)"
    if found.configured is not None:
        own += f", rho {found.configured.rho:.3f} (c) as configured"
    return f"{m.name}: {', '.join(parts)}{own}."


def _print_parameters(found: Budget, printer: Printer) -> None:
    head = ["rho", "experts", "rows per head", "tables", "projections", "total", "active", "sparse", "paper loss", "there"]
    rows = []
    for r in found.rows:
        if r.why_not is not None:
            rows.append([f"{r.rho:.3f}", f"{r.routed_experts}", *["-"] * 7, "no"])
            continue
        sizes = "-" if r.spec is None else f"{r.spec.table_sizes[0]:,}"
        loss = "-" if r.loss is None else f"{r.loss.value:.4f}"
        rows.append([f"{r.rho:.3f}", f"{r.routed_experts}", sizes, count_text(r.tables), count_text(r.modules),
                     count_text(r.total), count_text(r.active), count_text(r.sparse), loss, curve.place(r.rho)])
    printer.table(head, rows, _styles(found))


def _print_costs(found: Budget, printer: Printer) -> None:
    exposed = any(r.placement is not None for r in found.rows)
    spec = next((r.spec for r in found.rows if r.spec is not None), None)
    fmt = "tables" if spec is None else spec.row_format.replace("_block32_packed", "_packed")
    head = ["rho", "flop/token", fmt, "per token", *(["placed", "exposed"] if exposed else []), "frees"]
    rows = []
    for r in found.rows:
        if r.spec is None:
            rows.append([f"{r.rho:.3f}", "-" if r.why_not else count_text(r.flops), *["-"] * (len(head) - 2)])
            continue
        waits = [] if not exposed else ["-", "-"] if r.placement is None else [
            r.placement, f"{_seconds(r.exposed.value)} ({r.exposed.provenance.word[0]})"]
        rows.append([f"{r.rho:.3f}", count_text(r.flops), bytes_text(r.spec.bytes()), bytes_text(r.bytes_per_token), *waits,
                     _signed(r.freed_bytes)])
    printer.table(head, rows, _styles(found))


def _print_training(found: Budget, printer: Printer) -> None:
    rows = [[f"{r.rho:.3f}", *(["-"] * len(OPTIMIZERS) if r.spec is None else map(bytes_text, r.training_bytes.values()))]
            for r in found.rows]
    printer.table(["rho", *(f"{name}, training" for name in OPTIMIZERS)], rows, _styles(found))


def _seconds(value: float) -> str:
    return "0 s" if value < 1e-12 else time_text(value)


def _signed(num_bytes: float) -> str:
    return f"-{bytes_text(-num_bytes)}" if num_bytes < 0 else bytes_text(num_bytes)


def _styles(found: Budget) -> list[str | None]:
    return ["bold green" if r is found.chosen else "dim" if r.why_not else None for r in found.rows]


def chosen_lines(found: Budget) -> list[str]:
    """What the chosen row costs, and what pays for it."""
    c, m = found.chosen, found.model
    assert c.spec is not None, "the chosen row has a memory"
    gave = found.model.total - (c.total - c.tables - c.modules) + (0 if m.memory is None else m.memory.num_parameters)
    more = c.active - (m.active + (c.routed_experts - m.experts) * m.router_parameters)
    pays = (f"A shared expert narrower by {c.narrower} of {m.shared_width} columns (c) would pay for it."
            if c.narrower is not None else "No shared expert is there to pay for it.")
    formats = ", ".join(f"{name} {bytes_text(n)}" for name, n in c.table_bytes.items())
    return [f"what pays: {count_text(gave)} (c) of experts given up pay for {count_text(c.tables)} (c) of rows and "
            f"{count_text(c.modules)} (c) of projections and norms; {count_text(c.unspent)} (c) stay unspent. Active parameters "
            f"grow by {count_text(more)} (c), {more / m.active:.2%}. {pays}",
            f"tables by row format (c): {formats}.",
            "training (c): bytes of rows and optimizer state, gradients left out: "
            + "; ".join(f"{name} {each:g} B per parameter{f' and {row} per row' if row else ''}"
                        for name, (each, row, _) in OPTIMIZERS.items()) + ".",
            f"frees (c): accelerator memory of {m.weight_bytes:g} B per expert parameter, where the tables lie elsewhere, less "
            "the projections in bf16.",
            "The spec hashes raw token ids; a token map makes num_classes smaller and the multipliers others."
            if c.spec.num_classes is None and m.memory is None else "The hash is that of the configuration's memory."]


def budget_json(found: Budget) -> dict[str, Any]:
    """Everything as JSON; a number is an object with value, unit, provenance and source, counts of experts are plain."""
    return {"schema_version": SCHEMA_VERSION, "model": found.model.name,
            "inputs": {name: number.as_json() for name, number in found.inputs.items()},
            "rows": [_row_json(row) for row in found.rows],
            "configured": None if found.configured is None else _row_json(found.configured),
            "chosen": choice_json(found),
            "paper": {"points": [[rho, curve_loss.as_json()] for rho, _ in curve.POINTS
                                 if (curve_loss := curve.loss(rho)) is not None],
                      "best": list(curve.BEST), "measured_from": curve.POINTS[0][0], "measured_to": 1.0,
                      "outside": list(found.outside)},
            "merged": list(found.merged)}


def choice_json(found: Budget) -> dict[str, Any]:
    """The chosen row with its spec: what a training configuration needs."""
    spec = found.chosen.spec
    return {"experts_field": found.model.experts_field, "routed_experts": found.chosen.routed_experts,
            "configured_experts": found.model.experts, "rho": found.chosen.rho,
            "spec": None if spec is None else dataclasses.asdict(spec)}


def _row_json(row: Split) -> dict[str, Any]:
    numbers: dict[str, Any] = {} if row.why_not is not None else {name: n.as_json() for name, n in numbers_of(row).items()}
    return {"asked": None if row.asked != row.asked else row.asked, "routed_experts": row.routed_experts, "why_not": row.why_not,
            "table_sizes": None if row.spec is None else list(row.spec.table_sizes),
            "place_on_curve": curve.place(row.rho), "numbers": numbers, "placement": row.placement,
            "exposed_s": None if row.exposed is None else row.exposed.as_json()}


def write_plot(found: Budget, path: Path) -> None:
    """A figure: the paper's curve with the range it was measured in and the rows on it, and what the parameters are.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True)
    top.axvspan(curve.POINTS[0][0], 1, color="#56B4E9", alpha=0.15, label="range that was measured")
    top.axvspan(*curve.BEST, color="#009E73", alpha=0.25, label="best there")
    top.plot(*zip(*curve.POINTS, strict=True), "o--", color="#000000", label=f"{curve.PAPER}, 9.9B, measured elsewhere")
    on_curve = [row for row in found.rows if row.loss is not None]
    top.plot([r.rho for r in on_curve], [_loss_value(r.loss) for r in on_curve], "x", color="#0072B2",
             label="rows of this budget")
    if found.chosen.loss is not None:
        top.plot([found.chosen.rho], [found.chosen.loss.value], "s", color="#D55E00", label="chosen")
    top.set_ylabel("validation loss of the paper's model")
    top.legend(fontsize=7)
    able: Sequence[Split] = [row for row in found.rows if row.why_not is None]
    width = 0.6 * min((a.rho - b.rho for a, b in itertools.pairwise(able)), default=0.05)
    bottom = [0.0] * len(able)
    for label, colour, values in (
            ("active", "#999999", [r.active for r in able]), ("tables", "#009E73", [r.sparse - _idle(found, r) for r in able]),
            ("idle experts", "#0072B2", [_idle(found, r) for r in able])):
        below.bar([r.rho for r in able], [v / 1e9 for v in values], width, bottom=bottom, color=colour, label=label)
        bottom = [b + v / 1e9 for b, v in zip(bottom, values, strict=True)]
    below.set_xlabel("rho, share of the sparse parameters that the routed experts have")
    below.set_ylabel("parameters, 1e9")
    below.legend(fontsize=7)
    figure.suptitle(f"{found.model.name}: the same parameters, split", fontsize=10)
    figure.savefig(path, dpi=110)


def _loss_value(loss: Number | None) -> float:
    assert loss is not None
    return loss.value


def _idle(found: Budget, row: Split) -> float:
    return (row.routed_experts - found.model.top_k) * found.model.expert_parameters
