"""Makes pages of what `make gpu-run` left: `make gpu-results FOLDER=build-gpu/run`.

It writes a page into bench/results, with every line that was measured and how each step ended, and puts the table of
docs/performance.md between its marks. A folder of a dry run, or one without a measured line, is refused.
"""
import argparse
import datetime
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- gpu -->", "<!-- /gpu -->"
SHOWN_TOKENS = (1, 34, 512, 16384)


def read_folder(folder: Path) -> tuple[dict, list[dict]]:
    """(device, torch and copy rates, all lines). ValueError where something was not measured, or machines are mixed."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    results = [r for r in results if isinstance(r, dict) and "lines" in r]
    if not results or not any(r["lines"] for r in results):
        raise ValueError(f"gpu-results: {folder} has no JSON with a measured line; make gpu-run writes them")
    for r in results:
        if r["provenance"] != "measured":
            raise ValueError(f"gpu-results: {folder} holds a {r['provenance']!r}, expected 'measured': no other becomes a page")
    devices = {(r["device"], r["torch"]) for r in results}
    if len(devices) > 1:
        raise ValueError(f"gpu-results: {folder} mixes {' and '.join(' with torch '.join(d) for d in sorted(devices))}")
    return results[0], [line for r in results for line in r["lines"]]


def microseconds(value: float) -> str:
    return f"{value * 1e6:.1f}" if value < 1e-3 else f"{value * 1e6:,.0f}"


def whole_table(lines: list[dict]) -> list[str]:
    """A row per line: the first way's time, the others' over it."""
    rows = ["| op | tokens | way | us | GB/s | of the copy's rate | others' time over it |", "|---|---|---|---|---|---|---|"]
    for line in lines:
        ways = list(line["seconds"].items())
        failed = "; ".join(f"{way} failed: {why}" for way, why in line["failed"].items()).replace("|", "/").replace("\n", " ")
        if not ways:
            rows.append(f"| {line['op']} | {line['tokens']} | - | - | - | - | {failed} |")
            continue
        (first, took), *others = ways
        ratios = "; ".join([f"{way} {other / took:.2f}x" for way, other in others] + ([failed] if failed else []))
        rows.append(f"| {line['op']} | {line['tokens']} | {first} | {microseconds(took)} | {line['bytes'] / took / 1e9:.0f} | "
                    f"{line['of_copy_rate'][first]:.0%} | {ratios} |")
    return rows


def short_table(lines: list[dict]) -> list[str]:
    """The table of docs/performance.md: an op per row, times at some numbers of tokens."""
    ops = list(dict.fromkeys(line["op"] for line in lines if line["seconds"]))
    rows = ["| op | " + " | ".join(f"{t:,} token{'s' if t > 1 else ''}" for t in SHOWN_TOKENS) +
            " | of the copy's rate, at most | others' time over it, most tokens |", "|---" * (len(SHOWN_TOKENS) + 3) + "|"]
    for op in ops:
        own = {line["tokens"]: line for line in lines if line["op"] == op and line["seconds"]}
        first = next(iter(own[max(own)]["seconds"]))
        times = [microseconds(own[t]["seconds"][first]) + " us" if t in own and first in own[t]["seconds"] else "-"
                 for t in SHOWN_TOKENS]
        most = own[max(own)]
        others = "; ".join(f"{way} {took / most['seconds'][first]:.2f}x" for way, took in most["seconds"].items() if way != first)
        best = max(line["of_copy_rate"].get(first, 0.0) for line in own.values())
        rows.append(f"| {op} ({first}) | " + " | ".join(times) + f" | {best:.0%} | {others or '-'} |")
    return rows


def make_pages(folder: Path, root: Path, date: str) -> Path:
    """Writes both pages; the path of the one in bench/results. Nothing is written where the folder is refused."""
    about, lines = read_folder(folder)
    rates = about["copy_bytes_per_s"]
    name = re.sub(r"[^a-z0-9]+", "_", about["device"].lower().removeprefix("nvidia ")).strip("_")
    page = root / "bench" / "results" / f"{date}_{name}.md"
    conditions = (f"Measured {date} on {about['device']}, torch {about['torch']}, `make gpu-run`. A copy on the device moves "
                  f"{rates['device'] / 1e9:.0f} GB/s (reads and writes counted), one from pinned host memory "
                  f"{rates['link'] / 1e9:.1f} GB/s.")
    performance = root / "docs" / "performance.md"
    text = performance.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"gpu-results: {performance} has no {BEGIN} .. {END}")
    steps = (folder / "steps.txt").read_text().splitlines() if (folder / "steps.txt").exists() else []
    parts = [f"# {about['device']}, {date}", conditions, "\n".join(whole_table(lines)), "## How each step ended",
             "\n".join(f"    {step}" for step in steps)]
    for step in ("machine", "probe"):
        if (folder / f"{step}.txt").exists():
            parts += [f"## {step}", "\n".join(f"    {line}" for line in (folder / f"{step}.txt").read_text().splitlines())]
    page.write_text("\n\n".join(parts) + "\n")
    head, _, rest = text.partition(BEGIN)
    link = f"All of it: [bench/results/{page.name}](../bench/results/{page.name})."
    table = [head + BEGIN, f"{conditions} {link}", "", *short_table(lines), END + rest.partition(END)[2]]
    performance.write_text("\n".join(table))
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    try:
        print(make_pages(args.folder, ROOT, datetime.date.today().isoformat()).relative_to(ROOT))
    except (ValueError, OSError, KeyError) as err:
        print(f"{err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
