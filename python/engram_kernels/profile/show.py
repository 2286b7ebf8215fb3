"""A report as a table: rich on a terminal, plain elsewhere."""
from __future__ import annotations

from typing import Any, TextIO

from engram_kernels._terminal import Printer
from engram_kernels.profile.cells import JsonCell
from engram_kernels.profile.headline import headline

HEAD = ("probe", "what", "median", "95 % interval", "rate", "of peak", "verdict")


def bytes_text(num_bytes: float | None) -> str:
    """Bytes as a person reads them, such as "64 MiB"."""
    if num_bytes is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"


def time_text(seconds: float) -> str:
    """Seconds as a person reads them, such as "1.23 ms"."""
    for unit, scale in (("ns", 1e9), ("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 1000:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def describe(cell: JsonCell) -> str:
    """What a cell measured, in a few words."""
    words = [cell.get("op") or "", cell.get("placement") or ""]
    for key, text in (("row_bytes", "rows of {}"), ("table_bytes", "in {}")):
        if cell.get(key):
            words.append(text.format(bytes_text(cell[key])))
    if cell.get("rows") and cell.get("order"):
        words.append(f"{cell['rows']} per call")
    words += [cell["order"]] if cell.get("order") else []
    words += [f"{cell['threads']} thread{'s' if cell['threads'] > 1 else ''}"] if cell.get("threads") else []
    if cell.get("queue_depth"):
        words.append(f"depth {cell['queue_depth']}")
    if cell.get("prefetch") is not None:
        words.append(f"prefetch {cell['prefetch']}")
    if cell.get("huge_pages") is False:
        words.append("small pages")
    for key, yes, no in (("pinned", "pinned", "pageable"), ("cold", "", "hot")):
        if cell.get(key) is not None:
            words.append(yes if cell[key] else no)
    if cell.get("engine"):
        words.append(f"by {cell['engine']} engine" if cell["engine"] == "copy" else "by SMs")
    if cell.get("beside") not in (None, "nothing"):
        words.append(f"beside {cell['beside']}")
    if cell.get("memory_node") is not None:
        words.append(f"memory of node {cell['memory_node']}, CPUs of node {cell.get('cpu_node')}")
    return " ".join(w for w in words if w)


def row(cell: JsonCell) -> tuple[str, ...]:
    """A line of the table, as HEAD says."""
    if cell.get("median") is None:
        reason = cell.get("reason") or {"kind": "", "text": ", ".join(cell.get("flags", []))}
        return (cell["probe"], describe(cell), "-", f"{reason['kind']} {reason['text']}".strip(), "", "", cell["verdict"])
    rates = [f"{cell['rows_per_s'] / 1e6:.3g} M rows/s"] if cell.get("rows_per_s") and cell.get("order") else []
    rates += [f"{cell['bytes_per_s'] / 1e9:.3g} GB/s"] if cell.get("bytes_per_s") else []
    share = f"{cell['peak_share']:.0%} {cell['peak']}" if cell.get("peak_share") else ""
    return (cell["probe"], describe(cell), time_text(cell["median"]), f"{time_text(cell['low'])} to {time_text(cell['high'])}",
            ", ".join(rates), share, cell["verdict"])


def print_report(report: dict[str, Any], out: TextIO | None = None) -> None:
    """Prints what the machine can do for a table, the verdicts, then the cells. Plain with NO_COLOR, no terminal, or no rich."""
    printer = Printer(out)
    for text in headline(report):
        printer.say(text, "bold")
    printer.say()
    for text in summary_lines(report):
        printer.say(text)
    printer.say()
    # what there was no time for is counted above, and has no numbers
    rows = [row(c) for c in report["cells"] if (c.get("reason") or {}).get("kind") != "TIME_BUDGET"]
    styles = {"OK": None, "SKIPPED": "dim", "NOISY": "yellow"}
    printer.table(HEAD, rows, [styles.get(line[-1], "red") for line in rows])


def cut_text(probe: dict[str, Any]) -> str:
    """What the time of a probe has cost it; "" where it sufficed."""
    return f"{probe['cut']} of {probe['cells']} cells left out or made smaller: its time was used up" if probe["cut"] else ""


def summary_lines(report: dict[str, Any]) -> list[str]:
    """A verdict per probe with what to do, then the peaks."""
    lines = []
    for name, probe in report["probes"].items():
        said = "; ".join(text for text in (probe["advice"], cut_text(probe)) if text)
        lines.append(f"{probe['verdict']:<15} {name}" + (f": {said}" if said else ""))
    lines += [f"peak {name}: {peak['bytes_per_s'] / 1e9:.4g} GB/s, {peak['provenance']}, {peak['source']}"
              for name, peak in report["peaks"].items()]
    state = "" if report["complete"] else ", interrupted: what is there is valid"
    lines.append(f"{report['mode']} run, {report['seconds']:.0f} s, {len(report['cells'])} cells{state}")
    return lines
