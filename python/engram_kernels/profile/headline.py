"""The sentences that a report opens with: what this machine can do for a table."""
from __future__ import annotations

from typing import Any

from engram_kernels.profile.cells import JsonCell

STEP_TOKENS, COLUMNS, LAYERS = 256, 24, 2  # a decode step of DeepSeek-V4.1-Flash: 256 sequences, 48 rows per token
ROW_BYTES, PAGE_BYTES, FILE_DEPTH = 264, 4096, 64
_WAYS = {"io_uring": "by io_uring", "preadv": "by pread in threads, not by io_uring"}


def headline(report: dict[str, Any]) -> list[str]:
    """A sentence of the fastest memory that was measured, a GPU's or the host's, one of the disk, and one of a GPU's link."""
    cells = report["cells"]
    gpu = _best([c for c in _gathers(cells, "gpu_gather") if c.get("placement") == "device"])
    host = _best(_gathers(cells, "host_gather"))
    if gpu is not None:
        memory = _memory_sentence(gpu, "From its own memory the GPU")
    elif host is not None:
        memory = _memory_sentence(host, "From host memory this machine")
    else:
        memory = f"Random rows of memory were not measured: {_why_not(cells, 'host_gather')}."
    return [memory, _disk_sentence(cells), *_link_sentence(report["peaks"], cells)]


def _link_sentence(peaks: dict[str, Any], cells: list[JsonCell]) -> list[str]:
    """What a gather over the link reaches of what loads over it, and the copy engine, reach; none where one was not measured."""
    best = _best([c for c in _gathers(cells, "gpu_gather") if c.get("placement") == "uva"])
    loads, copies = peaks.get("link_h2d_sm"), peaks.get("link_h2d_copy")
    if best is None or loads is None or copies is None:
        return []
    rate = best["bytes_per_s"]
    return [f"Over the link the copy engine moves {copies['bytes_per_s'] / 1e9:.3g} GB/s and a stream of loads "
            f"{loads['bytes_per_s'] / 1e9:.3g}; random rows of {ROW_BYTES} bytes get {rate / 1e9:.3g}, "
            f"{rate / loads['bytes_per_s']:.0%} of the loads and {rate / copies['bytes_per_s']:.0%} of the copies."]


def _gathers(cells: list[JsonCell], probe: str) -> list[JsonCell]:
    """Calls of gather_rows of many fresh random rows of V4.1."""
    return [c for c in cells if c["probe"] == probe and c["status"] == "ok" and c.get("op") == "gather_rows"
            and c.get("row_bytes") == ROW_BYTES and c.get("order") == "uniform" and c.get("cold") is not False
            and c.get("rows_per_s")]


def _best(cells: list[JsonCell]) -> JsonCell | None:
    """The call with the most rows from the largest table, by as many threads as are fastest."""
    return max(cells, key=lambda c: (c.get("table_bytes") or 0, c.get("rows") or 0, c["rows_per_s"]), default=None)


def _memory_sentence(cell: JsonCell, who: str) -> str:
    threads = f" with {cell['threads']} thread{'s' if cell['threads'] > 1 else ''}" if cell.get("threads") else ""
    share = f", {cell['peak_share']:.0%} of what a stream reaches" if cell.get("peak_share") else ""
    size = cell["table_bytes"] / 2**30
    table = f"{size:.2g} GiB" if size >= 1 else f"{cell['table_bytes'] >> 20} MiB"
    return (f"{who} gathers {cell['rows_per_s'] / 1e6:.3g} million random rows of {ROW_BYTES} bytes per second{threads} from a "
            f"table of {table} ({cell['bytes_per_s'] / 1e9:.3g} GB/s{share}): {_step_text(cell['rows_per_s'])}.")


def _disk_sentence(cells: list[JsonCell]) -> str:
    pages = [c for c in cells if c["probe"] == "disk_read" and c["status"] == "ok" and c.get("row_bytes") == PAGE_BYTES
             and (c.get("queue_depth") or 0) <= FILE_DEPTH and c.get("rows_per_s")]
    if not pages:
        return f"Reads of a file were not measured: {_why_not(cells, 'disk_read')}."
    best = max(pages, key=lambda c: c["queue_depth"])
    way = _WAYS.get(str(best.get("op")), str(best.get("op")))
    return (f"From a file it makes {best['rows_per_s'] / 1e3:.3g} thousand random reads of 4 KiB per second, {way}, "
            f"{best['queue_depth']} in flight: {_step_text(best['rows_per_s'])}.")


def _step_text(rows_per_s: float) -> str:
    seconds = STEP_TOKENS * COLUMNS * LAYERS / rows_per_s
    return f"{seconds * 1e3:.3g} ms for a step of {STEP_TOKENS} tokens with {COLUMNS * LAYERS} rows each"


def _why_not(cells: list[JsonCell], probe: str) -> str:
    reasons = [c["reason"]["text"] for c in cells if c["probe"] == probe and c.get("reason")]
    return reasons[0] if reasons else "the probe was not run"
