"""A plan as a table and as JSON: every number with where it comes from."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engram_kernels._terminal import Printer
from engram_kernels.plan.hardware import Hardware
from engram_kernels.plan.model import MAX_FACTOR, MAX_TOKENS, TIE, Flip, Plan, input_names, input_value
from engram_kernels.plan.module_compute import module_seconds
from engram_kernels.plan.placements import TITLES
from engram_kernels.plan.presets import LIVE, PAPER, Comparison
from engram_kernels.plan.quantity import Quantity
from engram_kernels.plan.schedule import Simulated
from engram_kernels.plan.trial import Trial
from engram_kernels.plan.workload import Workload
from engram_kernels.profile.show import bytes_text, time_text

SCHEMA_VERSION = 1
LEGEND = "(g) given, (m) measured, (s) simulated, (a) assumed; what is computed is as weak as its weakest input."


def tagged(quantity: Quantity | None, text: str | None = None) -> str:
    """A number for reading, with the letter of its provenance."""
    if quantity is None:
        return "-"
    return f"{_text(quantity) if text is None else text} ({quantity.provenance.word[0]})"


def _text(quantity: Quantity) -> str:
    value, unit = quantity.value, quantity.unit
    if unit == "s":
        return "0 s" if abs(value) < 1e-12 else time_text(value)  # less is rounding
    if unit == "B":
        return f"-{bytes_text(-value)}" if value < 0 else bytes_text(value)
    if unit == "B/s":
        return f"{value / 1e9:,.0f} GB/s" if value >= 1e12 else f"{value / 1e9:.3g} GB/s"
    if unit == "1/s":
        return f"{value:,.0f} / s"
    if unit in ("tokens", "rows"):
        return f"{value:,.0f} {unit}"
    return f"{value:.4g}" if unit == "1" else f"{value:.3g} {unit}"


def _share(ratio: float) -> str:
    return f"{ratio:.2%}" if ratio < 0.1 else f"{ratio:.0%}" if ratio < 10 else f"{ratio:.0f}x"


def print_plan(plan: Plan, work: Workload, node: Hardware, printer: Printer, trial: Trial | None = None,
               explain: bool = False) -> None:
    """Prints the verdict first, then the trial of it, then a line per placement; with `explain` also the inputs."""
    spec = work.spec
    machine = f"GPU {node.name}" if node.has_gpu else "the CPU computes"
    for i, line in enumerate([*verdict_lines(plan, work), *([] if trial is None else trial_lines(trial))]):
        printer.say(line, "bold" if i == 0 else None)
    printer.say()
    printer.say(f"{spec.name}: {_text(work.table_bytes)} of tables, {spec.rows_per_token} rows of {spec.bytes_per_row} bytes per "
                f"token in layers {', '.join(map(str, spec.layer_ids))}; {_text(work.tokens)} per step of {_text(work.step)}; "
                f"{machine}.")
    _print_placements(plan, work, node, printer)
    module = module_seconds(work.spec, work.tokens, node)
    if module is not None:
        printer.say(f"Beside its lookups the module computes {tagged(module)} per step, wherever the table lies; it is in none "
                    "of the times above.")
    if not explain:
        printer.say("--explain prints every input with its source.")
        return
    printer.say()
    found = inputs(work, node)
    printer.table(("input", "value", "source"), [(name, tagged(value), value.source) for name, value in found],
                  [None] * len(found))
    printer.say(LEGEND)
    hidden = [f"{TITLES[name]} {tagged(o.hidden_s)}" for name, o in plan.outcomes.items() if o.hidden_s is not None]
    printer.say("Hidden behind compute, per step: " + ", ".join(hidden) + ".")


def _print_placements(plan: Plan, work: Workload, node: Hardware, printer: Printer) -> None:
    """The table, at most 100 columns wide, and why some placements cannot be."""
    rows, styles = [], []
    for placement, o in plan.outcomes.items():
        numbers = [q for q in (o.lookup_s, o.exposed_s, o.slower_s, o.largest_tokens, o.freed_bytes) if q is not None]
        slower = "-" if o.slower_s is None else f"{_text(o.slower_s)}, {_share(o.slower_s.value / work.step.value)}"
        largest = "-" if o.largest_tokens is None else f"{o.largest_tokens.value:,.0f}"
        if o.largest_tokens is not None and o.largest_tokens.value >= MAX_TOKENS:
            largest = f">= {largest}"
        weakest = max((q.provenance for q in numbers), default=None)
        cells = [TITLES[placement], "yes" if o.why_not is None else "no", _or_dash(o.lookup_s), _or_dash(o.exposed_s), slower,
                 largest, *([_or_dash(o.freed_bytes)] if node.has_gpu else []), "-" if weakest is None else weakest.word]
        rows.append(cells)
        styles.append("bold green" if placement == plan.winner else None if o.why_not is None else "dim")
    head = ["placement", "fits", "lookup", "exposed", "step slower by", "hides up to", *(["frees"] if node.has_gpu else []),
            "numbers"]
    printer.table(head, rows, styles)
    by_reason: dict[str, list[str]] = {}
    for placement, o in plan.outcomes.items():
        if o.why_not is not None:
            by_reason.setdefault(o.why_not, []).append(TITLES[placement])
    for reason, titles in by_reason.items():
        printer.say(f"No {', no '.join(titles)}: {reason}.")
    frees = "; \"frees\" is device memory per GPU" if node.has_gpu else ""
    printer.say(f"Times are per step; \"hides up to\" is the most tokens per step whose lookups are hidden{frees}; \"numbers\" "
                "is the weakest of a line's inputs.")


def _or_dash(quantity: Quantity | None) -> str:
    return "-" if quantity is None else _text(quantity)


def inputs(work: Workload, node: Hardware) -> list[tuple[str, Quantity]]:
    """Every input that is a number and is there, at this workload's size."""
    found = [(name, value) for name in input_names() if (value := input_value(name, work, node)) is not None]
    return [*found, ("layers of the model", work.layers), ("GPUs per node", work.gpus), ("nodes", work.nodes)]


def verdict_lines(plan: Plan, work: Workload) -> list[str]:
    """The pick, the runner-up, and what would flip them."""
    if plan.winner is None:
        return ["pick: none. No placement fits; the lines below the table say what each lacks. --gpu, --host-gib, --disk-gib, "
                "--device-gib and --nodes plan for another machine."]
    first = plan.outcomes[plan.winner]
    assert first.slower_s is not None and first.freed_bytes is not None
    frees = f" It frees {tagged(first.freed_bytes)} of device memory per GPU." if first.freed_bytes.value else ""
    lines = [f"pick: {TITLES[plan.winner]}. A step of {_text(work.step)} gets {tagged(first.slower_s)} slower, "
             f"{tagged(first.exposed_s)} of it waiting for rows.{frees}"]
    if plan.runner_up is None:
        lines.append("runner-up: none; nothing else fits.")
    else:
        second = plan.outcomes[plan.runner_up]
        assert second.slower_s is not None
        more = (second.slower_s.value - first.slower_s.value) / work.step.value
        why = f"{_share(more)} of the step more" if more > TIE else (
            f"within {TIE:.1%} of the step, a tie: the pick frees more device memory or looks up sooner")
        lines.append(f"runner-up: {TITLES[plan.runner_up]}. A step gets {tagged(second.slower_s)} slower ({why}).")
    if plan.flip is None:
        lines.append(f"flip: none. No single input, changed by up to {MAX_FACTOR:.0f} times, makes another placement win.")
    else:
        lines.append(flip_line(plan.flip))
    return lines


def flip_line(flip: Flip) -> str:
    """The nearest change that makes another placement win, in words."""
    by = f"{flip.factor:.3g} times as large" if flip.factor > 1 else f"{1 / flip.factor:.3g} times smaller"
    return f"flip: {TITLES[flip.winner]} wins when {flip.name} gets {by}: from {tagged(flip.now)} to {tagged(flip.then)}."


def trial_lines(trial: Trial) -> list[str]:
    """The model's own error."""
    lines = [f"{trial.instead_of}; rows gathered by the CPU run instead."] if trial.instead_of else []
    low, high = trial.spread
    return [*lines, f"run here: {TITLES[trial.placement]} was predicted to take {tagged(trial.predicted)} and took "
                    f"{tagged(trial.actual)}, quartiles {_text(low)} to {_text(high)}: the prediction is off by "
                    f"{trial.error.value:+.0%}. It fetched {trial.what}."]


def print_comparisons(comparisons: Sequence[Comparison], printer: Printer) -> None:
    """The paper's table beside the model's."""
    head = ("backbone, memory of 100B parameters in host DRAM", "exposed per step", "rest of the lookup",
            "launches of hash and module", "products and passes", "throughput lost: predicted", "published", "off by",
            "missing per step")
    rows = []
    for c in comparisons:
        rest = Quantity(c.slower_s.value - c.exposed_s.value, "s", c.slower_s.provenance, c.slower_s.source)
        rows.append((PAPER[c.name].title, tagged(c.exposed_s), tagged(rest), tagged(c.launches_s), tagged(c.compute_s),
                     tagged(c.predicted, f"{c.predicted.value:.2%}"), tagged(c.published, f"{c.published.value:.2%}"),
                     tagged(c.error_points, f"{c.error_points.value:+.2f} points"), tagged(c.missing_s)))
    printer.table(head, rows, [None] * len(rows))
    printer.say(LEGEND)
    printer.say("Nothing is fitted. Published is the throughput lost against the backbone without a memory, the module's own "
                "compute included. The model says that the rows are hidden; what the paper's harness (nano-vLLM, Python) does "
                f"beside that it does not know. A step is a token of each of {LIVE:.0f} sequences, at the throughput that was "
                "measured.")


def simulated_lines(simulated: Simulated, placement: str, early: int | None) -> list[str]:
    """What the simulation says."""
    busy = ", ".join(f"{name} {tagged(share, f'{share.value:.0%}')}" for name, share in simulated.busy.items())
    lines = [f"simulated, {TITLES[placement]}: {tagged(simulated.step_s)} per step, of it {tagged(simulated.exposed_s)} waiting "
             f"for rows ({len(simulated.tasks):,} tasks; streams busy: {busy})"]
    if early is not None:
        lines.append(f"early enough: a lookup submitted {early} layer{'' if early == 1 else 's'} before its own costs as little "
                     "as one submitted when the step starts")
    return lines


def plan_json(plan: Plan, work: Workload, node: Hardware, trial: Trial | None, simulated: Simulated | None) -> dict[str, Any]:
    """Everything as JSON; a number is always an object with value, unit, provenance and source."""
    outcomes = {}
    for placement, o in plan.outcomes.items():
        outcomes[placement] = {
            "feasible": o.why_not is None, "why_not": o.why_not,
            **{field: _json(getattr(o, field)) for field in ("lookup_s", "hidden_s", "exposed_s", "slower_s", "largest_tokens",
                                                             "freed_bytes")},
            "stages": [{"resource": s.resource, "seconds": s.seconds.as_json(), "compute_lost": s.share.as_json()}
                       for s in o.lookup.stages]}
    flip = plan.flip and {"input": plan.flip.name, "now": plan.flip.now.as_json(), "then": plan.flip.then.as_json(),
                          "winner": plan.flip.winner}
    return {"schema_version": SCHEMA_VERSION, "spec": work.spec.name, "machine": node.name,
            "inputs": {name: value.as_json() for name, value in inputs(work, node)}, "placements": outcomes,
            "module_s": _json(module_seconds(work.spec, work.tokens, node)),
            "winner": plan.winner, "runner_up": plan.runner_up, "flip": flip, "trial": trial and trial_json(trial),
            "simulation": simulated and {"step_s": simulated.step_s.as_json(), "exposed_s": simulated.exposed_s.as_json(),
                                         "busy": {name: share.as_json() for name, share in simulated.busy.items()}}}


def trial_json(trial: Trial) -> dict[str, Any]:
    """A trial as JSON."""
    return {"placement": trial.placement, "instead_of": trial.instead_of, "what": trial.what,
            "predicted": trial.predicted.as_json(), "measured": trial.actual.as_json(), "error": trial.error.as_json(),
            "q1": trial.spread[0].as_json(), "q3": trial.spread[1].as_json()}


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """A row of the paper's table as JSON."""
    fields = ("exposed_s", "slower_s", "launches_s", "compute_s", "predicted", "published", "error_points", "missing_s")
    return {"preset": comparison.name, "backbone": PAPER[comparison.name].title, "placement": comparison.placement,
            **{field: getattr(comparison, field).as_json() for field in fields}}


def _json(quantity: Quantity | None) -> dict[str, Any] | None:
    return None if quantity is None else quantity.as_json()
