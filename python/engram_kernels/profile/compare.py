"""Two runs of a benchmark, cell by cell: same, faster, slower, or not known."""
from __future__ import annotations

import enum
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
class Cell:
    """One contender of one group in both runs.

    Attributes:
        group, contender: what was measured.
        before, after: seconds a call.
        ratio, low, high: time after over time before, with its interval, divided by what the controls of the group did.
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


def load_run(path: Path, ops: Sequence[str] = ()) -> dict[tuple[str, str], tuple[str, Summary]]:
    """(group, contender) -> (role, seconds a call) of a JSON file of pytest-benchmark.

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
            cells[group, contender] = (role, summarize(_samples(entry["stats"]["data"])))
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise ValueError(f"{path}: no run of the benchmarks with its samples: {err!r}") from None
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


def compare_runs(before: Mapping[tuple[str, str], tuple[str, Summary]],
                 after: Mapping[tuple[str, str], tuple[str, Summary]], tolerance: float = TOLERANCE) -> list[Cell]:
    """The cells that both runs have.

    A ratio is divided by that of the group's controls (role "bound": a copy or a memset of the same bytes; peers are not
    used, since a library's update is no change of the machine), or by 1 where the group has none. The interval of the
    ratio joins the medians' intervals of run and control at their worst.
    """
    cells = []
    for key, (role, old) in before.items():
        if key not in after or role == "bound":
            continue
        new = after[key][1]
        controls = [(old_c, after[k][1]) for k, (r, old_c) in before.items() if k[0] == key[0] and r == "bound" and k in after]
        drift = _mean([c.median / b.median for b, c in controls])
        drift_low, drift_high = _mean([c.low / b.high for b, c in controls]), _mean([c.high / b.low for b, c in controls])
        low, high = new.low / old.high / drift_high, new.high / old.low / drift_low
        cells.append(Cell(*key, old, new, new.median / old.median / drift, low, high, drift, judge(low, high, tolerance)))
    return cells


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
