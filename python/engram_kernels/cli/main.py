"""The `engram-kernels` command."""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engram_kernels import backends, info
from engram_kernels._terminal import UsageError, expect_writable, no_progress, progress_bar
from engram_kernels.cli.bench import compare_files, run_benchmarks, tune_launches
from engram_kernels.demo import SAMPLE, DemoError, DemoOptions, run_demo
from engram_kernels.spec import EngramSpec

EXIT_CODES = ("Exit codes: 0 ok, 1 failure, 2 usage, 3 regression (bench --compare), 4 invalid measurement (profile), "
              "5 a required capability is absent, 130 interrupted, 141 nobody reads the output any more.")
PRESETS: dict[str, Callable[[], EngramSpec]] = {
    "deepseek_v41": EngramSpec.deepseek_v41, "demo_v1": EngramSpec.demo_v1, "qwen4_ple": EngramSpec.qwen4_ple,
    "longcat": EngramSpec.longcat}


def main(argv: list[str] | None = None, heed_interrupts: Callable[[], None] = lambda: None) -> int:
    """Runs the command; returns its exit code.

    Args:
        argv: the arguments; None: those of the process.
        heed_interrupts: raises KeyboardInterrupt where Ctrl-C was pressed before it came to this, and from then on Ctrl-C does.
    """
    parser = argparse.ArgumentParser(prog="engram-kernels", description="Conditional memory for language models.",
                                     epilog=EXIT_CODES)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands)
    _add_info(commands)
    _add_profile(commands)
    _add_bench(commands)
    _add_pack(commands)
    _add_plan(commands)
    args = parser.parse_args(argv)
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
    except (DemoError, ValueError, RuntimeError, OSError) as err:
        print(f"engram-kernels {args.command}: {str(err).removeprefix(f'{args.command}: ')}", file=sys.stderr)
        return 1
    except UsageError as err:
        print(f"engram-kernels {args.command}: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"engram-kernels {args.command}: interrupted", file=sys.stderr)
        return 130


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="the main job on a text: tokenize, hash, gather behind compute, gate, compare",
                               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    demo.add_argument("text", nargs="?", type=Path, default=SAMPLE, metavar="FILE", help="a UTF-8 text; default: a sample")
    demo.add_argument("--spec", default="deepseek_v41", help=f"{', '.join(PRESETS)}, or a JSON file of EngramSpec.to_json")
    demo.add_argument("--backend", default="auto", choices=("auto", *backends.BACKENDS))
    demo.add_argument("--json", type=Path, metavar="OUT", help="also write every number to this file")
    demo.add_argument("--rows", type=int, default=DemoOptions.table_rows, help="rows a layer in the scaled-down table")
    demo.add_argument("--hidden", type=int, default=DemoOptions.hidden_size, help="hidden size of the stand-in backbone")
    demo.add_argument("--tokens-per-step", type=int, default=DemoOptions.tokens_per_step)
    demo.add_argument("--table-dir", type=Path, help="where the table files go; default: the system's temporary folder")
    demo.set_defaults(run=_run_demo)


def _add_info(commands: Any) -> None:
    command = commands.add_parser("info", help="versions, machine, limits, and which backends run here and why not the others")
    command.add_argument("--json", action="store_true", help="print it as JSON")
    command.set_defaults(run=_run_info)


def _run_info(args: argparse.Namespace) -> int:
    found = info.collect()
    print(json.dumps(found, indent=2) if args.json else "\n".join(info.lines(found)))
    return 0


def _add_profile(commands: Any) -> None:
    from engram_kernels.cli import profile as profile_command
    profile_command.add_arguments(commands)


def _add_plan(commands: Any) -> None:
    from engram_kernels.cli import plan as command
    command.add_arguments(commands, PRESETS, progress_bar)


def _add_bench(commands: Any) -> None:
    command = commands.add_parser("bench", help="runs the benchmarks of a checkout beside their peers, or compares two runs",
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("ops", nargs="*", metavar="OP", help="such as gate; none: all")
    command.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"),
                         help="two files of --json: SAME, FASTER, SLOWER or UNCLEAR a cell; exit code 3 when ours is slower")
    command.add_argument("--quick", action="store_true", help="run each once, untimed")
    command.add_argument("--tune", action="store_true",
                         help="instead: try launch parameters of the Triton kernels on this GPU, keep the fastest for this user")
    command.add_argument("--spec", default="deepseek_v41", help=f"whose sizes --tune times: {', '.join(PRESETS)}, or a JSON file")
    command.add_argument("--json", type=Path, metavar="OUT", help="where the run is written; default: build/bench.json")
    command.add_argument("--bench-dir", type=Path, default=Path("bench"), help="the bench folder of a checkout")
    command.set_defaults(run=_run_bench)


def _run_bench(args: argparse.Namespace) -> int:
    if args.spec not in PRESETS and not Path(args.spec).is_file():
        raise UsageError(f"spec is {args.spec!r}, expected {', '.join(PRESETS)} or a JSON file of EngramSpec.to_json")
    if args.compare:
        before, after = args.compare
        return compare_files(before, after, args.ops)
    if args.tune:
        return tune_launches(_spec(args.spec), args.ops)
    if args.quick and args.json is not None:
        raise UsageError("--quick times nothing, so there is nothing to write to --json")
    out = args.json or Path("build/bench.json")
    if not args.quick:
        expect_writable("--json", out)
    bar = progress_bar if importlib.util.find_spec("rich") else no_progress
    return run_benchmarks(args.ops, args.bench_dir, out, args.quick, bar)


def _spec(name: str) -> EngramSpec:
    return PRESETS[name]() if name in PRESETS else EngramSpec.from_json(Path(name))


def _run_demo(args: argparse.Namespace) -> int:
    try:
        from rich.console import Console
    except ImportError:
        raise DemoError("the demo needs rich: pip install 'engram-kernels[demo]'") from None
    from engram_kernels.demo.report import print_report
    spec = _spec(args.spec)
    options = DemoOptions(args.text, spec, args.backend, args.rows, args.hidden, args.tokens_per_step, args.table_dir)
    console = Console(width=None if sys.stdout.isatty() else 120)
    result = run_demo(options, progress_bar)
    ok = print_report(result, spec, console)
    if args.json:
        machine = {"platform": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
                   "threads": torch.get_num_threads()}
        text = json.dumps({"machine": machine, "spec": dataclasses.asdict(spec), "ok": ok, "result": result}, indent=2)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0 if ok else 1


def _add_pack(commands: Any) -> None:
    pack = commands.add_parser("pack", help="rewrite fp8 values and scales into one packed extent a row, for one read a row",
                               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    pack.add_argument("source", type=Path, help="a safetensors file with fp8 rows and block scales apart")
    pack.add_argument("target", type=Path, help="the packed table; a run that was stopped goes on from TARGET.part")
    pack.add_argument("--tensor", help='name of the rows; default: "rows"')
    pack.add_argument("--scales", help='name of the scales; default: "scales" where --tensor is not given')
    pack.add_argument("--verify", default="sample", choices=("sample", "all"), help="rows compared with the source at the end")
    pack.set_defaults(run=_run_pack)


def _run_pack(args: argparse.Namespace) -> int:
    from engram_kernels.table.pack import pack_table
    has_rich = importlib.util.find_spec("rich") is not None
    result = pack_table(args.source, args.target, args.tensor, args.scales, verify_all=args.verify == "all",
                        progress=progress_bar if has_rich else None)
    resumed = f", {result.resumed_rows:,} of them by an earlier run" if result.resumed_rows else ""
    print(f"{args.target}: {result.num_rows:,} rows of {result.row_bytes} bytes{resumed}; {result.verified_rows:,} compared "
          "with the source")
    return 0
