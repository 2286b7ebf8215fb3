"""The `engram-kernels` command: reads the arguments, runs the subcommand, and turns what it raises into a sentence and a code.

No file of this folder imports torch, or what does, before the arguments are read: `--help` and a typing error answer at once.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from engram_kernels._terminal import UsageError
from engram_kernels.cli import bench, budget, check, demo, info, pack, plan, profile, quantize

COMMANDS = (demo, info, check, profile, plan, budget, bench, pack, quantize)
EXIT_CODES = ("Exit codes: 0 ok, 1 failure, 2 usage, 3 regression (bench --compare), 4 invalid measurement (profile), "
              "5 a required capability is absent, 130 interrupted, 141 nobody reads the output any more.")


def main(argv: list[str] | None = None, run_package: Callable[[], None] = lambda: None,
         heed_interrupts: Callable[[], None] = lambda: None) -> int:
    """Runs the command; returns its exit code.

    Args:
        argv: the arguments; None: those of the process.
        run_package: runs engram_kernels/__init__.py where that was put off until the arguments are read.
        heed_interrupts: raises KeyboardInterrupt where Ctrl-C was pressed before it came to this, and from then on Ctrl-C does.
    """
    parser, subparsers = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # argparse itself would show the usage of the command without its subcommand
        subparsers[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    run_package()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this
            setattr(sys, name, io.StringIO())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may have letters that the locale lacks
    try:
        if args.command == "profile":  # which leaves a report
            args.heed_interrupts = heed_interrupts
        else:
            heed_interrupts()
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return 141
    except (ValueError, RuntimeError, OSError) as err:
        print(f"engram-kernels {args.command}: {str(err).removeprefix(f'{args.command}: ')}", file=sys.stderr)
        return 1
    except UsageError as err:
        print(f"engram-kernels {args.command}: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"engram-kernels {args.command}: interrupted", file=sys.stderr)
        return 130


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command, each subcommand's `run` among its defaults, and those of the subcommands by name."""
    parser = argparse.ArgumentParser(prog="engram-kernels", description="Conditional memory for language models.",
                                     epilog=EXIT_CODES)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_arguments(commands)
    return parser, commands.choices


class _Version(argparse.Action):
    """Looks the version up only where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version
        try:
            print(f"engram-kernels {version('engram-kernels')}")
        except PackageNotFoundError:
            print("engram-kernels, run from a checkout: it is not installed, so it has no version")
        parser.exit()
