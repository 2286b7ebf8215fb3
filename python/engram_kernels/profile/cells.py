"""One measurement of a profile as the JSON object of `profile.schema.json`, and what is said of it."""
from __future__ import annotations

from typing import Any

from engram_kernels.profile.statistics import Summary

JsonCell = dict[str, Any]

# width of the median's interval over the median; narrower ones change no decision: placements differ by factors
NOISY_SPREAD = 0.25
DRIFTED = 1.25  # the fixed piece of work took so much longer than at its best: the machine was slower just then
CACHED_TABLES = 8  # a table of fewer last-level caches than this may be faster than memory
PEAK_MARGIN = 1.02  # physical ceilings are exact but for the clock
MEASURED_PEAK_MARGIN = 1.25  # of a peak that was itself measured
# at least this share of a peak is expected of ops that do nothing but move bytes
EXPECTED_SHARE = {"gpu_stream": 0.75, "gpu_link": 0.75, "host_gather": 0.9}

ADVICE = {
    "OK": "",
    "LINK_DEGRADED": "the link runs below what slot and card allow: reseat the card, check riser and BIOS settings",
    "NUMA_REMOTE": "memory and reader are on different NUMA nodes: numactl --cpunodebind --membind with the node that "
                   "the table or the GPU is on",
    "NO_HUGEPAGES": "the kernel gave no huge pages: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
    "THROTTLED": "clocks or CPU time were held back meanwhile: check power limit, temperature, CPU quota, other users",
    "NOISY": "the median is not known well: read the interval instead, or measure again when the machine is quiet",
    "BELOW_REFERENCE": "slower than such work should be here: see the facts of the cell and `engram-kernels info`",
    "ABOVE_PEAK": "faster than the hardware can be: a cache answered, or the peak was measured in a bad moment; not to be used",
    "SKIPPED": "",
    "FAILED": "the probe broke; its reason holds the error",
}
# the first that a cell of a probe has is the verdict of the probe; NOISY counts where a quarter of the cells is
_BY_WEIGHT = ("FAILED", "ABOVE_PEAK", "THROTTLED", "LINK_DEGRADED", "NUMA_REMOTE", "NO_HUGEPAGES", "BELOW_REFERENCE")
_NOISY_SHARE = 0.25


class Skip(Exception):
    """Why a measurement cannot be made on this machine.

    Args:
        kind: one of the reasons in `profile.schema.json`.
        text: what is missing, with numbers.
    """

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind, self.text = kind, text


def measured(cell: JsonCell, summary: Summary, control: Summary | None = None) -> JsonCell:
    """`cell` with the numbers of `summary`, the rates that follow, and verdict OK or NOISY."""
    result = {"provenance": "measured", "status": "ok", "verdict": "OK", "reason": None, **cell}
    result.update(unit="s", median=summary.median, low=summary.low, high=summary.high, least=summary.least, q1=summary.q1,
                  q3=summary.q3, samples=list(summary.samples), flags=[*cell.get("flags", []), *summary.flags],
                  control=control.median if control else None)
    for per_call, rate in (("rows", "rows_per_s"), ("bytes", "bytes_per_s")):
        if cell.get(per_call):
            result[rate] = cell[per_call] / summary.median
    if summary.spread > NOISY_SPREAD:  # what disturbed it and left the interval narrow is told by the flags alone
        give_verdict(result, "NOISY")
    if any(flag.startswith("throttled") for flag in summary.flags):
        give_verdict(result, "THROTTLED")
    return result


def not_measured(cell: JsonCell, kind: str, text: str) -> JsonCell:
    """`cell` without a number: failed where the reason is an error, else skipped."""
    status, verdict = ("failed", "FAILED") if kind == "ERROR" else ("skipped", "SKIPPED")
    return {"provenance": "measured", **cell, "status": status, "verdict": verdict, "advice": ADVICE[verdict],
            "reason": {"kind": kind, "text": text}}


def give_verdict(cell: JsonCell, verdict: str) -> None:
    """Sets the verdict and what to do; a lighter one does not replace a heavier one."""
    order = (*_BY_WEIGHT, "NOISY", "OK")
    if order.index(verdict) <= order.index(cell.get("verdict", "OK")):
        cell["verdict"], cell["advice"] = verdict, ADVICE[verdict]


def flag_drift(cells: list[JsonCell]) -> None:
    """Marks the cells of a probe during which its control was slower than in others: the machine was, not what they measure."""
    controls = [c["control"] for c in cells if c.get("control")]
    for cell in cells:
        if cell.get("control") and cell["control"] > DRIFTED * min(controls):
            cell["flags"].append(f"control {cell['control'] / min(controls):.1f}x its least")
            give_verdict(cell, "NOISY")


def passes(cell: JsonCell, peak: dict[str, Any]) -> bool:
    """Whether the cell is faster than the peak allows."""
    margin = PEAK_MARGIN if peak.get("physical") else MEASURED_PEAK_MARGIN
    return bool(cell["bytes_per_s"] > margin * peak["bytes_per_s"])


def against_peak(cell: JsonCell, name: str, peak: dict[str, Any], may_be_cached: bool) -> None:
    """Divides the cell's rate by a peak; above what is possible it is invalid, below what is expected BELOW_REFERENCE.

    Args:
        cell: with `bytes_per_s`.
        name, peak: of `peaks` in the report.
        may_be_cached: the bytes fit, or were just used, so that a cache may answer: then the cell has no share of the peak,
            which is one of memory.
    """
    if cell["status"] != "ok" or may_be_cached:
        return
    cell["peak"], cell["peak_share"] = name, cell["bytes_per_s"] / peak["bytes_per_s"]
    if passes(cell, peak):
        give_verdict(cell, "ABOVE_PEAK")
        cell["status"] = "invalid"


def expect_share(cell: JsonCell, share: float, of_what: str, at_most: float | None = None) -> None:
    """BELOW_REFERENCE where a share is less than what this probe should reach; the fact is kept either way.

    Args:
        cell: what was measured.
        share: of `of_what`, by the medians.
        of_what: for the name of the fact.
        at_most: the share that the cell might have, all noise on its side; None: by its own interval.
    """
    if cell["status"] == "ok":
        cell.setdefault("facts", {})[f"share_of_{of_what}"] = share
        if (share * cell["median"] / cell["low"] if at_most is None else at_most) < EXPECTED_SHARE[cell["probe"]]:
            give_verdict(cell, "BELOW_REFERENCE")


def verdict_of(cells: list[JsonCell]) -> tuple[str, str]:
    """(verdict, what to do) of a probe from those of its cells."""
    tried = [c for c in cells if c["status"] != "skipped"]
    if not tried:
        reasons = dict.fromkeys(f"{c['reason']['kind']}: {c['reason']['text']}" for c in cells)
        return "SKIPPED", "; ".join(reasons)
    for verdict in _BY_WEIGHT:
        if any(c["verdict"] == verdict for c in tried):
            return verdict, ADVICE[verdict]
    noisy = [c for c in tried if c["verdict"] == "NOISY"]
    return ("NOISY", noise_text(noisy, len(tried))) if noisy and len(noisy) >= _NOISY_SHARE * len(tried) else ("OK", "")


def noise_text(noisy: list[JsonCell], tried: int) -> str:
    """What made these of `tried` cells noisy, how far it goes, and what to do."""
    flags = [str(flag) for cell in noisy for flag in cell.get("flags", [])]
    steal, control = ([float(f.partition(word)[2].rstrip("% ").split("x")[0]) for f in flags if f.startswith(word)]
                      for word in ("steal ", "control "))
    causes = [f"steal of up to {max(steal):.0f} % by other guests"] if steal else []
    for words, what in (("preempted", "other processes on these CPUs"), ("major faults", "major page faults"),
                        ("throttled", "throttled clocks or CPU quota")):
        if any(words in flag for flag in flags):
            causes.append(what)
    if control:
        causes.append(f"a machine up to {max(control):.1f} times as slow as at its best (clock frequency or other guests)")
    wide = [width for c in noisy if c.get("median") and (width := (c["high"] - c["low"]) / c["median"]) > NOISY_SPREAD]
    what = " or ".join([*([f"have intervals of up to {max(wide):.0%} of the median"] if wide else []),
                        *(["were measured while the machine was slower"] if len(wide) < len(noisy) else [])])
    cause = ", ".join(causes) or "nothing that the system tells of"
    return f"{len(noisy)} of {tried} cells {what}; the cause: {cause}; {ADVICE['NOISY']}"
