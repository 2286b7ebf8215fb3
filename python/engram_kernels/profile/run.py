"""One run of `engram-kernels profile`: the groups of probes, the report, the files and the exit code."""
from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engram_kernels._terminal import is_stream
from engram_kernels.profile import machine
from engram_kernels.profile.probes_disk import run_disk_probes
from engram_kernels.profile.probes_gpu import run_gpu_probes
from engram_kernels.profile.probes_host import run_host_probes
from engram_kernels.profile.session import BUDGET_SECONDS, Options, Session, write_whole
from engram_kernels.profile.show import print_report

FIRST_PROBE = {"host": "host_limits", "disk": "disk_read", "gpu": "gpu_link"}
GROUPS: dict[str, Callable[[Session], None]] = {"host": run_host_probes, "disk": run_disk_probes, "gpu": run_gpu_probes}
FAILURE, INVALID, NO_CAPABILITY, INTERRUPTED = 1, 4, 5, 130  # exit codes


def run_profile(options: Options, json_path: Path | None = None, html_path: Path | None = None, plots: Path | None = None,
                heed_interrupts: Callable[[], None] = lambda: None) -> int:
    """Runs the probes, prints the table, writes what was asked for.

    Args:
        options: of the run.
        json_path: where the report goes as JSON; a file is there, and valid, after every probe. "-" is the standard output,
            which gets it at the end, as a device or a pipe does; the table then goes to standard error.
        html_path: where it goes as one page.
        plots: the folder of its figures.
        heed_interrupts: raises KeyboardInterrupt where Ctrl-C was pressed already.

    Returns:
        0; 1 where a probe broke; 4 where a measurement is invalid; 5 where nothing that was asked for can be measured here, or
        figures were asked for and matplotlib is missing (the JSON is written); 130 after Ctrl-C, with what was measured until
        then written too.
    """
    printed = json_path is not None and str(json_path) == "-"
    at_end = json_path is not None and (printed or is_stream(json_path))
    session = Session(options, machine.nothing_known(), None if at_end else json_path)
    interrupted = False
    try:
        heed_interrupts()
        session.machine = machine.collect(options.disk_folder)
        with _progress(session):
            for name in options.groups:
                _run_group(session, name)
        session.complete = True
    except KeyboardInterrupt:
        interrupted = True
        if not session.cells:
            _skip_first(session, options.groups[0], "INTERRUPTED", "Ctrl-C before the first probe")
        print("engram-kernels profile: interrupted; what was measured is kept", file=sys.stderr)
    session.write()
    report = session.report()
    drawn = _draw(report, html_path, plots)  # files first: who reads the table may go away
    if at_end and not printed and json_path is not None:
        write_whole(json_path, json.dumps(report, indent=1) + "\n")
    print_report(report, sys.stderr if printed else None)
    if printed:
        print(json.dumps(report, indent=1))
    if interrupted:
        return INTERRUPTED
    if any(c["status"] == "invalid" for c in report["cells"]):
        return INVALID
    if any(c["status"] == "failed" for c in report["cells"]):
        return FAILURE
    return NO_CAPABILITY if all(p["verdict"] == "SKIPPED" for p in report["probes"].values()) else drawn


def _run_group(session: Session, name: str) -> None:
    """What breaks outside a probe costs the rest of its group, not the report."""
    try:
        GROUPS[name](session)
    except Exception as err:
        _skip_first(session, name, "ERROR", f"{type(err).__name__}: {err}")


def _skip_first(session: Session, group: str, kind: str, text: str) -> None:
    """Files that the first probe of a group was not run."""
    with session.probe(FIRST_PROBE[group], 1):
        session.skip({"probe": FIRST_PROBE[group]}, kind, text)


def _draw(report: dict[str, Any], html_path: Path | None, plots: Path | None) -> int:
    if html_path is None and plots is None:
        return 0
    try:
        from engram_kernels.profile.html import page
        from engram_kernels.profile.plots import write_figures
        if plots is not None:
            write_figures(report, plots)
        if html_path is not None:
            write_whole(html_path, page(report))
    except ImportError as err:
        print(f"engram-kernels profile: figures need matplotlib: pip install 'engram-kernels[profile]' ({err})", file=sys.stderr)
        return NO_CAPABILITY
    return 0


@contextlib.contextmanager
def _progress(session: Session) -> Iterator[None]:
    """A bar on a terminal: what is measured, and how much of the longest time is used."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield
        return
    console = Console(stderr=True)
    longest = BUDGET_SECONDS[session.options.mode]
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("of at most {task.total:.0f} s"),
                  console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal) as bar:
        task = bar.add_task("profile", total=longest)

        def tick() -> None:
            bar.update(task, completed=min(session.seconds(), longest),
                       description=f"{session.cells[-1]['probe']}, {len(session.cells)} cells")
        session.tick = tick
        yield

