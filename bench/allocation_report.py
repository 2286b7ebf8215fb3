"""What a sweep of allocation.py has shown: a paragraph that claims no more than that, a table, and a figure. Needs matplotlib."""
from __future__ import annotations

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

Runs = list[dict[str, Any]]


def by_split(runs: Runs) -> dict[float, Runs]:
    """The runs of one size by the rho that was asked for, all experts first."""
    found: dict[float, Runs] = defaultdict(list)
    for run in sorted(runs, key=lambda r: (-r["asked"], r["seed"])):
        found[run["asked"]].append(run)
    return dict(found)


def spread(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error over seeds (nan of one)."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def paired(a: Runs, b: Runs) -> tuple[float, float]:
    """Mean and standard error of the loss of a less that of b, seed by seed."""
    other = {run["seed"]: run["loss"] for run in b}
    return spread([run["loss"] - other[run["seed"]] for run in a if run["seed"] in other])


def paragraph(report: dict[str, Any]) -> str:
    """What was seen, in words."""
    said = []
    for size, runs in _sizes(report).items():
        splits = by_split(runs)
        means = {rho: spread([r["loss"] for r in of])[0] for rho, of in splits.items()}
        best, first = min(means, key=lambda rho: means[rho]), runs[0]
        seeds = min(len(of) for of in splits.values())
        said.append(f"{size.capitalize()} ({first['total_parameters'] / 1e3:.0f}k parameters, "
                    f"{first['active_parameters'] / 1e3:.0f}k active, {first['steps']} steps, seeds: {seeds}): the mean loss is "
                    + ", ".join(f"{means[rho]:.3f} at rho {splits[rho][0]['rho']:.2f}" for rho in splits) + ".")
        ends = [rho for rho in (max(means), min(means)) if rho != best]
        for end in ends:
            gain, error = paired(splits[end], splits[best])
            sure = ("more than two standard errors" if gain > 2 * error else "one seed, no spread" if math.isnan(error) else
                    "within two standard errors, so it is not shown")
            margin = f"{gain:.4f}" if math.isnan(error) else f"{gain:.4f} +- {error:.4f}"
            said.append(f"The lowest, at rho {splits[best][0]['rho']:.2f}, lies {margin} below rho "
                        f"{splits[end][0]['rho']:.2f} ({sure}).")
        if len(ends) < 2:
            said.append("The lowest is at an end: no split between experts and memory beats both ends here.")
    said.append("This says nothing of larger models: so small and so little trained, local statistics are most of what there is "
                "to learn, and the place of an optimum does not transfer.")
    return " ".join(said)


def table(report: dict[str, Any]) -> str:
    """One line per size and split, in Markdown."""
    lines = ["| size | rho | experts | rows | total | active | loss | off | local | local, off | other | other, off |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for size, runs in _sizes(report).items():
        for of in by_split(runs).values():
            cells = [_cell(of, f"loss{off}{kind}") for kind in ("", "_local", "_other") for off in ("", "_off")]
            rows = of[0]["rows"]["rank"][-1] if "rows" in of[0] else 0
            lines.append(f"| {size} | {of[0]['rho']:.2f} | {of[0]['experts']} | {rows:,} | "
                         f"{of[0]['total_parameters']:,} | {of[0]['active_parameters']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(runs: Runs, name: str) -> str:
    if name not in runs[0]:
        return "-"
    mean, error = spread([run[name] for run in runs])
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} +- {error:.3f}"


def _sizes(report: dict[str, Any]) -> dict[str, Runs]:
    found: dict[str, Runs] = defaultdict(list)
    for run in report["runs"]:
        found[run["size"]].append(run)
    return found


def draw(report: dict[str, Any], path: Path) -> None:
    """Loss by split with every seed, what switching the memory off costs, and how often rows are looked up and found."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, ((loss, off), (rank, lookups)) = plt.subplots(2, 2, figsize=(9.6, 6.4))
    for size, runs in _sizes(report).items():
        splits = by_split(runs)
        rhos = [of[0]["rho"] for of in splits.values()]
        points = [spread([r["loss"] for r in of]) for of in splits.values()]
        bars = [0 if math.isnan(e) else 2 * e for _, e in points]
        line = loss.errorbar(rhos, [m for m, _ in points], bars, label=size, capsize=2)
        loss.plot([r["rho"] for r in runs], [r["loss"] for r in runs], ".", color=line.lines[0].get_color(), alpha=0.4)
        with_memory = [of for of in splits.values() if "loss_off" in of[0]]
        for kind, style in (("local", "-"), ("other", "--")):
            cost = [statistics.fmean(r[f"loss_off_{kind}"] - r[f"loss_{kind}"] for r in of) for of in with_memory]
            off.plot([of[0]["rho"] for of in with_memory], cost, style, marker=".", color=line.lines[0].get_color(),
                     label=f"{size}, {kind}")
        for of in with_memory:
            rows, name = of[0]["rows"], f"{size}, rho {of[0]['rho']:.2f}"
            rank.loglog(rows["rank"], [max(n, 0.5) for n in rows["trained"]], label=name)
            lookups.plot([int(n) for n in rows["lookups"]], list(rows["lookups"].values()), marker=".", label=name)
    loss.set(xlabel="rho: share of the sparse parameters in experts", ylabel="held-out loss, nats per token",
             title="mean, two standard errors")
    off.set(xlabel="rho", ylabel="nats per token", title="what switching the memory off costs")
    rank.set(xlabel="row, by rank", ylabel="lookups in training", title="rows by frequency")
    lookups.set(xlabel="lookups of the row in training, at least", ylabel="share of held-out lookups",
                title="rows that a lookup finds", xscale="log")
    for axes in (loss, off, rank):
        axes.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
