"""`engram-kernels demo`: the main job on a text, every result compared with the reference."""
from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import Any

from engram_kernels._names import BACKENDS
from engram_kernels._terminal import expect_writable, progress_bar
from engram_kernels.cli.options import SPEC_HELP, HelpFormatter, load_spec

NO_CAPABILITY = 5  # exit code
TOKENS = 2048  # of the sample: half a minute of work on two cores


def add_arguments(commands: Any) -> None:
    """Adds the command to the parser of `engram-kernels`."""
    demo = commands.add_parser("demo", help="the main job on a text: tokenize, hash, gather behind compute, gate, compare",
                               formatter_class=HelpFormatter)
    demo.add_argument("text", nargs="?", type=Path, metavar="FILE", help="a UTF-8 text; default: a sample")
    demo.add_argument("--spec", default="deepseek_v41", help=SPEC_HELP)
    demo.add_argument("--backend", default="auto", choices=("auto", *BACKENDS), help="which implementation runs")
    demo.add_argument("--json", type=Path, metavar="OUT", help="also write every number to this file")
    demo.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help="of the text, from its start; 0: all")
    demo.add_argument("--rows", type=int, default=1 << 18, metavar="N", help="rows per layer in the scaled-down table")
    demo.add_argument("--hidden", type=int, default=640, metavar="H", help="hidden size of the stand-in backbone")
    demo.add_argument("--tokens-per-step", type=int, default=256, metavar="N", help="tokens that are computed together")
    demo.add_argument("--table-dir", type=Path, metavar="DIR",
                      help="where the table files go; default: the system's temporary folder")
    demo.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the demo; 0 where everything agreed with the reference."""
    expect_writable("--json", args.json)
    try:
        from rich.console import Console
    except ImportError:
        print("engram-kernels demo: needs rich: pip install 'engram-kernels[demo]'", file=sys.stderr)
        return NO_CAPABILITY
    import torch

    from engram_kernels.demo.main import SAMPLE, DemoOptions, run_demo
    from engram_kernels.demo.report import print_report
    spec = load_spec(args.spec)
    options = DemoOptions(args.text or SAMPLE, spec, args.backend, args.rows, args.hidden, args.tokens_per_step, args.table_dir,
                          args.tokens)
    result = run_demo(options, progress_bar)
    ok = print_report(result, spec, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    if args.json:
        machine = {"platform": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
                   "threads": torch.get_num_threads()}
        text = json.dumps({"machine": machine, "spec": dataclasses.asdict(spec), "ok": ok, "result": result}, indent=2)
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0 if ok else 1
