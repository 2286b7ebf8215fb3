"""`engram-kernels profile`: measures this machine's memory system and writes a report."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from engram_kernels._terminal import UsageError, expect_writable, expect_writable_folder, finite
from engram_kernels.cli.options import HelpFormatter

GROUPS = ("host", "disk", "gpu")


def add_arguments(commands: Any) -> None:
    """Adds the command to the parser of `engram-kernels`."""
    command = commands.add_parser("profile", help="measure memory, disk and GPU, and say what is wrong with them",
                                  formatter_class=HelpFormatter)
    length = command.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="under a minute; what is done without --full")
    length.add_argument("--full", action="store_true", help="under ten minutes: more sizes, tables up to 80 %% of what is free")
    command.add_argument("--json", type=Path, metavar="F",
                         help="write the report here, valid after every probe; -: print it at the end")
    command.add_argument("--html", type=Path, metavar="F", help="write it as one page with figures; needs matplotlib")
    command.add_argument("--plots", type=Path, metavar="DIR", help="write the figures here as PNG and SVG; needs matplotlib")
    command.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS),
                         help="which memory is measured; default: all")
    command.add_argument("--disk-dir", type=Path, default=Path(), metavar="DIR",
                         help="where the disk probe makes its file, which has no name; default: here")
    command.add_argument("--trace", type=Path, metavar="IDS.npy", help="row ids of a real run, as one more order")
    command.add_argument("--max-memory-gib", type=_gibibytes, metavar="GIB",
                         help="no table is larger; default: 80 %% of what is free")
    command.add_argument("--gpu", type=_index, default=0, metavar="N", help="index of the GPU")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures, after everything that would fail has failed."""
    from engram_kernels.profile.run import run_profile
    from engram_kernels.profile.session import Options
    _check_paths(args)
    most = None if args.max_memory_gib is None else int(args.max_memory_gib * 2**30)
    options = Options("full" if args.full else "quick", tuple(args.only), args.disk_dir, args.trace, most, args.gpu)
    return run_profile(options, args.json, args.html, args.plots, args.heed_interrupts)


def _gibibytes(text: str) -> float:
    value = finite(text)
    if not 0 <= value < 2**30:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: expected a number of GiB, at least 0")
    return value


def _index(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no index: expected 0 or more")
    return int(text)


def _check_paths(args: argparse.Namespace) -> None:
    """What would fail, fails before anything is measured."""
    if not args.disk_dir.is_dir():
        raise UsageError(f"--disk-dir {args.disk_dir} is no folder")
    expect_writable("--json", None if args.json == Path("-") else args.json)
    expect_writable("--html", args.html)
    if args.json is not None and args.html is not None and args.json.resolve() == args.html.resolve():
        raise UsageError(f"--json and --html are both {args.html}: one would overwrite the other")
    expect_writable_folder("--plots", args.plots)
    if args.trace is not None:
        from engram_kernels.profile.row_draws import load_trace
        try:
            load_trace(args.trace)
        except (OSError, ValueError, EOFError) as err:
            raise UsageError(f"--trace {args.trace}: {err}") from None
