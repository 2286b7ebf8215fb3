"""A report as one HTML file that needs nothing else."""
from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from engram_kernels.profile.cells import JsonCell
from engram_kernels.profile.headline import headline
from engram_kernels.profile.plots import figures, svg_text
from engram_kernels.profile.show import HEAD, bytes_text, cut_text, row, time_text

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
body { color: #1a1a1a; background: #fff }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2rem }
table { border-collapse: collapse; font-size: 13px; width: 100% }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top }
th { position: sticky; top: 0; background: #f4f4f4 }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(28rem, 1fr)); gap: 1rem }
.figures svg { width: 100%; height: auto }
.verdict { font-weight: 600; white-space: nowrap } .OK { color: #00664d } .SKIPPED { color: #666 } .NOISY { color: #8a5a00 }
.LINK_DEGRADED, .NUMA_REMOTE, .NO_HUGEPAGES, .THROTTLED, .BELOW_REFERENCE, .ABOVE_PEAK, .FAILED { color: #b00020 }
.note { color: #555 }
"""


def page(report: dict[str, Any]) -> str:
    """The whole file.

    Raises:
        ImportError: matplotlib is missing.
    """
    state = f"{report['seconds']:.0f} s" + ("" if report["complete"] else ", interrupted: what is there is valid")
    charts = "".join(f'<figure id="{name}">{svg_text(figure)}</figure>' for name, figure in figures(report).items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>engram-kernels profile</title><style>{_STYLE}</style></head><body>
<h1>Memory profile</h1>
{"".join(f"<p><strong>{escape(text)}</strong></p>" for text in headline(report))}
<p class="note">engram-kernels profile --{escape(report["mode"])}, {escape(report["started"])}, {state}.
Every number is measured on this machine unless it says otherwise. Intervals hold the median with 95 % probability.</p>
<h2>Verdicts</h2>{_verdicts(report)}
<h2>Machine</h2>{_machine(report)}
<h2>Peaks</h2>{_peaks(report)}
<h2>Figures</h2><div class="figures">{charts}</div>
<h2>Measurements</h2>{_cells(report)}
</body></html>
"""


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], verdict_column: int | None = None) -> str:
    def cell(i: int, text: str) -> str:
        style = f' class="verdict {escape(text)}"' if i == verdict_column else ""
        return f"<td{style}>{escape(text)}</td>"
    lines = ("<tr>" + "".join(cell(i, text) for i, text in enumerate(line)) + "</tr>" for line in rows)
    return "<table><tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr>" + "".join(lines) + "</table>"


def _verdicts(report: dict[str, Any]) -> str:
    rows = [(name, p["verdict"], "; ".join(text for text in (p["advice"], cut_text(p)) if text), str(p["cells"]),
             f"{p['seconds']:.1f} s")
            for name, p in report["probes"].items()]
    return _table(("probe", "verdict", "what to do", "cells", "time"), rows, 1)


def _machine(report: dict[str, Any]) -> str:
    block = report["machine"]
    lines = [(f"{part}: {name.replace('_bytes', '').replace('_', ' ')}", _value(name, value))
             for part in ("machine", "limits", "caches", "disk") for name, value in block[part].items()]
    nodes = (f"{n['node']}: {len(n['cpus'])} CPUs, {_size(n['memory_bytes'])}" for n in block["numa"])
    lines.append(("NUMA nodes", "; ".join(nodes)))
    lines += [(f"GPU {i}", ", ".join(f"{k} {v}" for k, v in gpu.items() if k != "unread"))
              for i, gpu in enumerate(block["gpu"])]
    lines.append(("versions", ", ".join(f"{k} {v}" for k, v in block["versions"].items() if v)))
    return _table(("what", "value"), lines)


def _value(name: str, value: Any) -> str:
    if value is None:
        return "no limit" if name in ("memlock_bytes", "cgroup_bytes", "open_files") else "not known"
    return bytes_text(value) if name.endswith("_bytes") else " ".join(value) if isinstance(value, list) else str(value)


def _size(num_bytes: int | None) -> str:
    return "not known" if num_bytes is None else bytes_text(num_bytes)


def _peaks(report: dict[str, Any]) -> str:
    rows = [(name, f"{p['bytes_per_s'] / 1e9:.4g} GB/s", p["provenance"], p["source"])
            for name, p in report["peaks"].items()]
    return _table(("peak", "rate", "provenance", "source"), rows)


def _cells(report: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [(*row(cell)[:-1], _least_and_q3(cell), "; ".join(cell.get("flags", [])), cell["verdict"])
                                   for cell in report["cells"]]
    return _table((*HEAD[:-1], "least, upper quartile", "flags", HEAD[-1]), rows, len(HEAD) + 1)


def _least_and_q3(cell: JsonCell) -> str:
    return f"{time_text(cell['least'])}, {time_text(cell['q3'])}" if cell.get("median") else ""
