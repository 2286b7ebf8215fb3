"""`engram-kernels pack`: fp8 values and scales rewritten into one extent per row, so that a row is one read."""
from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from engram_kernels._terminal import progress_bar
from engram_kernels.cli.options import HelpFormatter


def add_arguments(commands: Any) -> None:
    """Adds the command to the parser of `engram-kernels`."""
    pack = commands.add_parser("pack", help="rewrite fp8 values and scales into one extent per row, for one read per row",
                               formatter_class=HelpFormatter)
    pack.add_argument("source", type=Path, help="a safetensors file, or the folder or index of a checkpoint, with fp8 "
                                                "rows and block scales apart")
    pack.add_argument("target", type=Path, help="the packed table; a run that was stopped goes on from TARGET.part")
    pack.add_argument("--tensor", metavar="NAME", help='name of the rows, with {} for the number of a part; default: "rows"')
    pack.add_argument("--scales", metavar="NAME", help='of the scales, likewise; default: "scales" where --tensor is not given')
    pack.add_argument("--verify", default="sample", choices=("sample", "all"), help="rows compared with the source at the end")
    pack.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Packs a table."""
    from engram_kernels.table.pack import pack_table
    has_rich = importlib.util.find_spec("rich") is not None
    result = pack_table(args.source, args.target, args.tensor, args.scales, verify_all=args.verify == "all",
                        progress=progress_bar if has_rich else None)
    resumed = f", {result.resumed_rows:,} of them by an earlier run" if result.resumed_rows else ""
    print(f"{args.target}: {result.num_rows:,} rows of {result.row_bytes} bytes{resumed}; {result.verified_rows:,} compared "
          "with the source")
    return 0
