"""What the benchmarks share: how a measurement is taken, and the table that is made of a run.

A benchmark function measures one contender of a group: ours, a peer or a bound (such as a memset of the same output). All
contenders of a group run in one process one after the other; ratios are between medians of that run.

    python bench/harness.py RUN.json [--page docs/performance.md] [--results FILE]      the table of a run of pytest-benchmark
"""
import argparse
import datetime
import functools
import itertools
import json
import mmap
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTROL_ROUNDS = 5  # of a benchmark, before which the controls are timed
# contenders of gather_gate differ by less than the machine drifts between them: bench/paired_gather_gate.py times them in turn;
# what a call costs beyond its work has a table of its own on the page
NOT_IN_SUMMARY = ("gather_gate", "dispatch of ", "gather of 24 rows ")


def seconds_of_loop() -> float:
    """A control: what the interpreter computes."""
    begin = time.perf_counter()
    sum(range(20_000))
    return time.perf_counter() - begin


def seconds_of_pages() -> float:
    """A control: 256 fresh pages, which the kernel clears."""
    begin = time.perf_counter()
    with mmap.mmap(-1, 1 << 20) as memory:
        for byte in range(0, 1 << 20, mmap.PAGESIZE):
            memory[byte] = 1
    return time.perf_counter() - begin


@functools.cache
def controls() -> dict[str, Callable[[], float]]:
    """Fixed pieces of work that tell a slow machine from slow code: computing, fresh pages, 8 MiB read from memory."""
    from engram_kernels import _C
    from engram_kernels.profile.arena import Arena
    memory = Arena(8 << 20, True, [-1]).data
    return {"loop": seconds_of_loop, "pages": seconds_of_pages,
            "read": lambda: float(_C.probe_stream("read", memory, memory, memory, [-1]))}


def measure(benchmark: Any, run: Callable[[], Any], *, group: str, contender: str, role: str = "peer", num_bytes: int = 0,
            units: int = 0, unit: str = "", rounds: int = 15, before: Callable[[], Any] | None = None) -> None:
    """Times `run` and files it under `group`; at five moments among the rounds the controls are timed too, and filed with it.

    Args:
        benchmark: pytest-benchmark's fixture.
        run: what is timed; it allocates nothing that is not part of the contender.
        group: op, workload and conditions.
        contender: name in the table.
        role: "ours", "peer" or "bound". Ratios are given to "ours".
        num_bytes: bytes that the op must move at least, for GB/s; 0: not given.
        units: how many `unit` one call produces, for ns per unit; 0: not given.
        rounds: timed calls; one untimed call goes before.
        before: called before each `run`, untimed.
    """
    benchmark.group = group
    benchmark.name = contender
    benchmark.extra_info.update(contender=contender, role=role, num_bytes=num_bytes, units=units, unit=unit)
    beside: dict[str, list[float]] = {name: [] for name in controls()}
    rounds_begun = itertools.count(-1)  # the first is not timed

    def before_round() -> None:
        number = next(rounds_begun)
        if number >= 0 and number * CONTROL_ROUNDS // rounds >= len(beside["loop"]):
            for name, seconds in controls().items():
                beside[name].append(seconds())
            if before is not None:
                before()
            run()  # the caches are as they were
        if before is not None:
            before()

    benchmark.extra_info["controls"] = beside
    benchmark.pedantic(run, setup=before_round, rounds=rounds, iterations=1, warmup_rounds=1)


def peak_bytes_per_s(num_bytes: int = 256 << 20, rounds: int = 9) -> float:
    """The most that one thread gets out of memory here: the faster of reading and of copying past the caches."""
    from engram_kernels import _C
    from engram_kernels.profile.arena import Arena
    a, b = Arena(num_bytes, True, [-1]).data, Arena(num_bytes, True, [-1]).data
    return max(arrays * num_bytes / min(_C.probe_stream(loop, a, b, b, [-1]) for _ in range(rounds))
               for loop, arrays in (("read", 1), ("copy", 2)))


def table(run: dict[str, Any]) -> str:
    """Markdown table of a run: median, ns per unit, GB/s, its share of the memory's peak, each contender's ratio to ours."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in run["benchmarks"]:
        groups.setdefault(entry["group"], []).append(entry)
    cpu, peak = run["machine_info"].get("cpu", {}), run.get("peak_bytes_per_s")
    lines = [f"Measured {datetime.datetime.fromisoformat(run['datetime']).date()} on {cpu.get('brand_raw', platform.machine())}, "
             f"{cpu.get('count', '?')} cores, Python {run['machine_info']['python_version']}. Medians of one run; "
             "\"ours is\" is the time of the contender over the time of ours."
             + (f" Of peak: of the {peak / 1e9:.1f} GB/s that one thread read or copied here; what fits a cache may pass it."
                if peak else ""), "",
             "| workload | contender | median | per unit | GB/s | of peak | ours is |", "|---|---|---|---|---|---|---|"]
    for group, entries in groups.items():
        ours = [e["stats"]["median"] for e in entries if e["extra_info"].get("role") == "ours"]
        for entry in sorted(entries, key=lambda e: e["stats"]["median"]):
            info, median = entry["extra_info"], entry["stats"]["median"]
            per_unit = f"{median / info['units'] * 1e9:.2f} ns / {info['unit']}" if info.get("units") else ""
            rate = f"{info['num_bytes'] / median / 1e9:.1f}" if info.get("num_bytes") else ""
            share = f"{info['num_bytes'] / median / peak:.0%}" if peak and info.get("num_bytes") else ""
            ratio = _faster(median / ours[0]) if ours and info["role"] == "peer" else \
                f"{median / ours[0]:.0%} of this bound" if ours and info["role"] == "bound" else ""
            name = f"**{info['contender']}**" if info["role"] == "ours" else info["contender"]
            lines.append(f"| {group} | {name} | {median * 1e6:.1f} us | {per_unit} | {rate} | {share} | {ratio} |")
    return "\n".join(lines) + "\n"


def _faster(ratio: float) -> str:
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def summary(run: dict[str, Any]) -> str:
    """Markdown of a run, a line for each contender: our time where a workload begins, and how many times as long it takes."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in run["benchmarks"]:
        if not entry["group"].startswith(NOT_IN_SUMMARY):
            groups.setdefault(entry["group"], []).append(entry)
    lines = ["| workload | ours | contender | its time over ours |", "|---|---|---|---|"]
    for group, entries in groups.items():
        ours = next(e for e in entries if e["extra_info"]["role"] == "ours")
        median, info = ours["stats"]["median"], ours["extra_info"]
        per_unit = f"{median / info['units'] * 1e9:.2f} ns / {info['unit']}" if info["units"] > 1 else f"{median * 1e6:.1f} us"
        begin = (group, per_unit)
        for entry in sorted(entries, key=lambda e: -e["stats"]["median"]):
            if entry is not ours:
                ratio, contender = entry["stats"]["median"] / median, entry["extra_info"]["contender"]
                lines.append(f"| {begin[0]} | {begin[1]} | {contender} | {ratio:.2f}x |")
                begin = ("", "")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--page", type=Path, help="write the summary between its bench markers")
    parser.add_argument("--results", type=Path, help="write the whole table to this file")
    args = parser.parse_args()
    text = table(json.loads(args.run.read_text()))
    print(text)
    if args.results:
        args.results.write_text(text)
    if args.page:
        before, _, rest = args.page.read_text().partition("<!-- bench -->\n")
        _, marker, after = rest.partition("<!-- /bench -->")
        if not marker:
            raise SystemExit(f"{args.page} has no <!-- bench --> ... <!-- /bench --> block")
        headline = text.partition("; ")[0] + "."
        short = summary(json.loads(args.run.read_text()))
        args.page.write_text(f"{before}<!-- bench -->\n{headline}\n\n{short}{marker}{after}")


if __name__ == "__main__":
    main()
