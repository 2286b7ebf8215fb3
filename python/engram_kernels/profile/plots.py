"""Figures of a report."""
from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engram_kernels.profile.cells import JsonCell
from engram_kernels.profile.show import bytes_text

# colours that are told apart by those who see no red and green (Okabe and Ito)
_LABEL_FACTOR = 1.4  # between two labels of an axis
_MAX_INSIDE = 6  # lines whose legend finds room among them
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """matplotlib figures by name; those that the report has no cells for are left out.

    Raises:
        ImportError: matplotlib is missing.
    """
    made = {name: draw(report) for name, draw in _FIGURES.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def svg_text(figure: Any) -> str:
    """The figure as an <svg> element that refers to nothing outside itself."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg"):]
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)


def write_figures(report: dict[str, Any], folder: Path) -> list[Path]:
    """Writes every figure as PNG and SVG; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures(report).items():
        for suffix in ("png", "svg"):
            files.append(folder / f"{name}.{suffix}")
            figure.savefig(files[-1], dpi=110)
    return files


def _chart(title: str, x_label: str, y_label: str, lines: dict[str, list[JsonCell]], x: str, y: Callable[[JsonCell], float],
           scales: tuple[str, str] = ("log", "log")) -> Any:
    """A line per name, with the 95 % interval of each point as its bar."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator
    lines = {name: sorted(cells, key=lambda c: c[x]) for name, cells in lines.items() if cells}
    if len({c[x] for cells in lines.values() for c in cells}) < 2:  # a figure of one value on its axis shows no course
        return None
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for i, (name, cells) in enumerate(lines.items()):
        values = [y(c) for c in cells]
        # a rate's interval is that of the time, upside down
        bars = [[v - v * c["median"] / c["high"] for v, c in zip(values, cells, strict=True)],
                [v * c["median"] / c["low"] - v for v, c in zip(values, cells, strict=True)]]
        axes.errorbar([c[x] for c in cells], values, yerr=bars, label=name, color=_COLOURS[i % len(_COLOURS)],
                      linestyle="-" if i < len(_COLOURS) else "--", marker="o", markersize=4, capsize=2, linewidth=1.3)
    axes.set_xscale(scales[0], **({"base": 2} if scales[0] == "log" else {}))
    axes.set_yscale(scales[1])
    ticks = _apart(sorted({c[x] for cells in lines.values() for c in cells}))
    axes.set_xticks(ticks, [bytes_text(t) if x.endswith("bytes") else str(t) for t in ticks], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())  # those of y stay: they are all that an axis of less than a decade may have
    figure.suptitle(f"{title}, measured")
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    if len(lines) > _MAX_INSIDE:
        figure.legend(loc="outside right center", fontsize=8)
    else:
        axes.legend(fontsize=8)
    return figure


def _apart(ticks: list[float]) -> list[float]:
    """The ticks whose labels do not touch on a logarithmic axis; the largest stays."""
    kept: list[float] = []
    for tick in reversed(ticks):
        if not kept or kept[-1] >= _LABEL_FACTOR * tick:
            kept.append(tick)
    return kept[::-1]


def _cells(report: dict[str, Any], **wanted: Any) -> list[JsonCell]:
    return [c for c in report["cells"]
            if c["status"] == "ok" and c.get("median") and all(c.get(k) == v for k, v in wanted.items())]


def _by(cells: list[JsonCell], key: str, name: Callable[[Any], str]) -> dict[str, list[JsonCell]]:
    return {name(value): [c for c in cells if c.get(key) == value] for value in sorted({c[key] for c in cells})}


def _million_rows(cell: JsonCell) -> float:
    return float(cell["rows_per_s"]) / 1e6


def _gigabytes(cell: JsonCell) -> float:
    return float(cell["bytes_per_s"]) / 1e9


def _large_calls(report: dict[str, Any], **wanted: Any) -> list[JsonCell]:
    cells = _cells(report, probe="host_gather", op="gather_rows", order="uniform", **wanted)
    return [c for c in cells if c["rows"] > 4096]


def _host_gather(report: dict[str, Any]) -> Any:
    cells = _large_calls(report, huge_pages=True)
    if not cells:
        return None
    threads = max(c["threads"] for c in cells)
    lines = {f"{bytes_text(row)}, {n} thread{'s' if n > 1 else ''}":
             [c for c in cells if (c["row_bytes"], c["threads"]) == (row, n)]
             for n in sorted({1, threads}) for row in sorted({c["row_bytes"] for c in cells})}
    return _chart("Random rows from host memory (huge pages)", "table", "million rows / s", lines, "table_bytes", _million_rows)


def _host_pages(report: dict[str, Any]) -> Any:
    cells = _large_calls(report, row_bytes=512)
    if not cells:
        return None
    cells = [c for c in cells if c["threads"] == max(c["threads"] for c in cells)]
    return _chart("512-byte rows: huge and small pages", "table", "million rows / s",
                  _by(cells, "huge_pages", _pages), "table_bytes", _million_rows)


def _pages(huge: bool) -> str:
    return "huge pages" if huge else "small pages"


def _latency(report: dict[str, Any]) -> Any:
    lines = _by(_cells(report, probe="host_latency"), "huge_pages", _pages)
    return _chart("Latency of a dependent load", "memory", "ns", lines, "table_bytes", lambda c: float(c["median"]) * 1e9,
                  ("log", "linear"))


def _stream(report: dict[str, Any]) -> Any:
    cells = [c for c in _cells(report, probe="host_stream") if c.get("memory_node") is None]
    return _chart("Host memory streams", "threads", "GB/s", _by(cells, "op", str), "threads", _gigabytes, ("log", "linear"))


def _disk(report: dict[str, Any]) -> Any:
    lines = _by(_cells(report, probe="disk_read"), "row_bytes", bytes_text)
    return _chart("Random reads of a file", "reads in flight", "thousand reads / s", lines, "queue_depth",
                  lambda c: float(c["rows_per_s"]) / 1e3)


def _gpu_gather(report: dict[str, Any]) -> Any:
    cells = [c for c in _cells(report, probe="gpu_gather", cold=True) if c["row_bytes"] in (264, 512)]
    lines = {}
    for placement in ("device", "uva", "staged"):
        mine = [c for c in cells if c["placement"] == placement]
        for row in sorted({c["row_bytes"] for c in mine}):
            largest = max(c["table_bytes"] for c in mine if c["row_bytes"] == row)
            lines[f"{placement}, {row} B"] = [c for c in mine if (c["row_bytes"], c["table_bytes"]) == (row, largest)]
    return _chart("Random rows to a GPU", "rows per call", "million rows / s", lines, "rows", _million_rows)


def _gpu_link(report: dict[str, Any]) -> Any:
    lines: dict[str, list[JsonCell]] = {}
    for cell in _cells(report, probe="gpu_link"):
        memory, engine = "pinned" if cell["pinned"] else "pageable", "copy engine" if cell["engine"] == "copy" else "SMs"
        lines.setdefault(f"{cell['op']}, {memory}, {engine}", []).append(cell)
    return _chart("Link of the GPU", "transfer", "GB/s", lines, "table_bytes", _gigabytes)


_FIGURES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "host_gather": _host_gather, "host_pages": _host_pages, "host_latency": _latency, "host_stream": _stream,
    "disk_read": _disk, "gpu_gather": _gpu_gather, "gpu_link": _gpu_link}
