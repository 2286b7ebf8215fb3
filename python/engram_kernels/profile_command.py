"""`engram-kernels profile`: measures this machine's memory system and writes a report."""
from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engram_kernels.profile import machine
from engram_kernels.profile.probes_disk import run_disk_probes
from engram_kernels.profile.probes_host import run_host_probes
from engram_kernels.profile.session import Options, Session
from engram_kernels.profile.show import print_report

GROUPS = ("host", "disk", "gpu")
INVALID, INTERRUPTED = 4, 130  # exit codes


def add_arguments(commands: Any) -> None:
    """Adds the command to the parser of `engram-kernels`."""
    command = commands.add_parser("profile", help="measures memory, disk and GPU, and says what is wrong with them",
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    length = command.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="under a minute; the default")
    length.add_argument("--full", action="store_true", help="under ten minutes: more sizes, and tables up to 80 %% of the free memory")
    command.add_argument("--json", type=Path, metavar="F", help="write the report here; valid after every probe")
    command.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="which memory is measured")
    command.add_argument("--disk-dir", type=Path, default=Path(), help="where the disk probe makes its file, which has no name")
    command.add_argument("--trace", type=Path, metavar="IDS.npy", help="row ids of a real run, as one more order")
    command.add_argument("--max-memory-gib", type=float, metavar="GIB", help="no table is larger; default: 80 %% of what is free")
    command.add_argument("--gpu", type=int, default=0, help="index of the GPU")
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    most = None if args.max_memory_gib is None else int(args.max_memory_gib * 2**30)
    return run_profile(Options("full" if args.full else "quick", tuple(args.only), args.disk_dir, args.trace, most, args.gpu),
                       args.json)


def run_profile(options: Options, json_path: Path | None) -> int:
    """Runs the probes, prints the table, writes what was asked for.

    Args:
        options: of the run.
        json_path: where the report goes as JSON; it is there, and valid, after every probe.

    Returns:
        0; 4 where a measurement is invalid; 130 after Ctrl-C, with what was measured until then.
    """
    session = Session(options, machine.collect(options.disk_folder), json_path)
    interrupted = False
    try:
        with _progress(session):
            _run_probes(session)
        session.complete = True
    except KeyboardInterrupt:
        interrupted = True
        print("engram-kernels profile: interrupted", file=sys.stderr)
    session.write()
    report = session.report()
    print_report(report)
    if interrupted:
        return INTERRUPTED
    return INVALID if any(c["status"] == "invalid" for c in report["cells"]) else 0


def _run_probes(session: Session) -> None:
    groups: dict[str, Callable[[Session], None]] = {"host": run_host_probes, "disk": run_disk_probes}
    for name, run in groups.items():
        if name in session.options.groups:
            run(session)


@contextlib.contextmanager
def _progress(session: Session) -> Iterator[Any]:
    """A line on a terminal that tells what is measured and how much of the time is used."""
    yield None
