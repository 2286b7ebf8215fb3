"""Two runs of a benchmark, cell by cell: same, faster, slower, or not known."""
from __future__ import annotations

import enum
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engram_kernels.profile.statistics import Summary, summarize

TOLERANCE = 0.05  # a change smaller than this is none


class Verdict(enum.Enum):
    """What the interval of a ratio says."""
    SAME = "SAME"
    FASTER = "FASTER"
    SLOWER = "SLOWER"
    UNCLEAR = "UNCLEAR"


@dataclass(frozen=True)
class Series:
    """One contender's measurement in one run.

    Attributes:
        role: "ours", "peer" or "bound".
        seconds: per call.
        controls: name of a fixed piece of work that was timed among the calls -> (seconds per call over its, its median seconds).
    """
    role: str
    seconds: Summary
    controls: Mapping[str, tuple[Summary, float]] = field(default_factory=dict)


Run = Mapping[tuple[str, str], Series]  # by group and contender


@dataclass(frozen=True)
class Cell:
    """One contender of one group in both runs.

    Attributes:
        group, contender: what was measured.
        before, after: seconds per call.
        ratio, low, high: time after over time before, with its interval, divided by what the controls did.
        control: that of the controls: how much slower the machine itself was.
        verdict: from the interval alone.
    """
    group: str
    contender: str
    before: Summary
    after: Summary
    ratio: float
    low: float
    high: float
    control: float
    verdict: Verdict


def load_run(path: Path, ops: Sequence[str] = ()) -> dict[tuple[str, str], Series]:
    """(group, contender) -> what a JSON file of pytest-benchmark holds of it.

    Args:
        path: of the file.
        ops: only what bench_<op>.py of these measured; none: everything.

    Raises:
        ValueError: it is no such file, or holds no samples.
    """
    try:
        cells = {}
        for entry in _load(path)["benchmarks"]:
            if ops and Path(str(entry.get("fullname", "")).partition("::")[0]).stem.removeprefix("bench_") not in ops:
                continue
            info = entry["extra_info"]
            group, contender, role = entry["group"], info.get("contender", entry["name"]), info.get("role", "ours")
            if not all(isinstance(word, str) for word in (group, contender, role)):
                raise ValueError(f"group, contender and role are {group!r}, {contender!r} and {role!r}, expected words")
            samples = _samples(entry["stats"]["data"])
            cells[group, contender] = Series(role, summarize(samples), _over_controls(samples, info.get("controls", {})))
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise ValueError(f"{path}: no run of the benchmarks with its samples: {type(err).__name__}: {err}") from None
    return cells


def _load(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("the file holds no object")
    return content


def _samples(data: Any) -> list[float]:
    if not isinstance(data, list) or not data:
        raise ValueError("a benchmark has no samples")
    for value in data:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise ValueError(f"a sample is {str(value)[:40]}, expected a positive number of seconds")
    return data


def _over_controls(samples: list[float], controls: dict[str, Any]) -> dict[str, tuple[Summary, float]]:
    """Blocks of samples over the control that was timed before each; the controls are spread evenly over the samples.

    A block counts as one, by its median: what disturbs its control is in all of it, however many samples it has.
    """
    found = {}
    for name, times in controls.items():
        seconds = _samples(times)[:len(samples)]
        starts = [-(-i * len(samples) // len(seconds)) for i in range(len(seconds) + 1)]
        ratios = [statistics.median(samples[a:b]) / c for (a, b), c in zip(itertools.pairwise(starts), seconds, strict=True)]
        found[name] = (summarize(ratios, "1"), statistics.median(seconds))
    return found


def load_machine(path: Path) -> str:
    """What a run says of its machine: processor and its number of CPUs, system, node; "" where it says nothing."""
    about = _load(path).get("machine_info")
    if not isinstance(about, dict):
        return ""
    cpu = about.get("cpu")
    words = [cpu.get("brand_raw"), f"{cpu.get('count')} CPUs"] if isinstance(cpu, dict) else []
    words += [about.get(field) for field in ("machine", "system", "node")]
    return ", ".join(str(word) for word in words if word)


def gone(before: Mapping[tuple[str, str], object], after: Mapping[tuple[str, str], object]) -> list[tuple[str, str]]:
    """The cells that the second run does not have."""
    return [key for key in before if key not in after]


def judge(low: float, high: float, tolerance: float = TOLERANCE) -> Verdict:
    """The verdict of a ratio that lies in [low, high]."""
    if low > 1 + tolerance:
        return Verdict.SLOWER
    if high < 1 / (1 + tolerance):
        return Verdict.FASTER
    if low >= 1 / (1 + tolerance) and high <= 1 + tolerance:
        return Verdict.SAME
    return Verdict.UNCLEAR


def compare_runs(before: Run, after: Run, tolerance: float = TOLERANCE) -> list[Cell]:
    """The cells that both runs have.

    A ratio is divided by what the machine did meanwhile, as the controls timed among the calls tell, and the verdict must hold by
    each of them: what computes and what waits for memory are not disturbed alike. Of a correction half is taken to be uncertain
    (its root widens the interval). Runs without such controls have those of the group (role "bound": a copy or a memset of the
    same bytes; peers are not used, since a library's update is no change of the machine), which were timed at another moment: the
    whole correction is uncertain. An interval joins the medians' intervals of both runs at their worst.
    """
    cells = []
    for key, old in before.items():
        if key not in after or old.role == "bound":
            continue
        new = after[key]
        found = [_corrected(old.controls[name], new.controls[name]) for name in old.controls if name in new.controls]
        if not found:
            same_group = ((b, after[k]) for k, b in before.items() if k[0] == key[0] and k in after)
            found = [_by_bounds(old.seconds, new.seconds, [(b.seconds, a.seconds) for b, a in same_group if b.role == "bound"])]
        low, high = min(c[1] for c in found), max(c[2] for c in found)
        cells.append(Cell(*key, old.seconds, new.seconds, _mean([c[0] for c in found]), low, high, _mean([c[3] for c in found]),
                          judge(low, high, tolerance)))
    return cells


def _corrected(old: tuple[Summary, float], new: tuple[Summary, float]) -> tuple[float, float, float, float]:
    """(ratio, low, high, drift) by one control."""
    drift = new[1] / old[1]
    slack = math.exp(abs(math.log(drift)) / 2)
    return new[0].median / old[0].median, new[0].low / old[0].high / slack, new[0].high / old[0].low * slack, drift


def _by_bounds(old: Summary, new: Summary, bounds: list[tuple[Summary, Summary]]) -> tuple[float, float, float, float]:
    drift = _mean([a.median / b.median for b, a in bounds])
    drift_low, drift_high = _mean([a.low / b.high for b, a in bounds]), _mean([a.high / b.low for b, a in bounds])
    slack = math.exp(abs(math.log(drift)))
    return new.median / old.median / drift, new.low / old.high / drift_high / slack, new.high / old.low / drift_low * slack, drift


def _mean(ratios: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(r) for r in ratios)) if ratios else 1.0


def markdown(cells: list[Cell]) -> str:
    """A table of the cells, the changes first."""
    order = [Verdict.SLOWER, Verdict.FASTER, Verdict.UNCLEAR, Verdict.SAME]
    lines = ["| verdict | workload | contender | before | after | time after / before, machine's drift taken out | drift |",
             "|---|---|---|---|---|---|---|"]
    for cell in sorted(cells, key=lambda c: order.index(c.verdict)):
        lines.append(f"| {cell.verdict.value} | {cell.group} | {cell.contender} | {cell.before.median * 1e6:.1f} us | "
                     f"{cell.after.median * 1e6:.1f} us | {cell.ratio:.2f} ({cell.low:.2f} to {cell.high:.2f}) | "
                     f"{cell.control:.2f} |")
    counts = ", ".join(f"{sum(c.verdict is v for c in cells)} {v.value}" for v in order)
    return "\n".join([*lines, "", counts]) + "\n"
