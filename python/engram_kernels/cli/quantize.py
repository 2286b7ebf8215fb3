"""`engram-kernels quantize`: a trained table written as fp8, int8 or four bits, with its error per row."""
from __future__ import annotations

import argparse
import errno
from pathlib import Path
from typing import Any

from engram_kernels.cli.options import HelpFormatter


def add_arguments(commands: Any) -> None:
    """Adds the command to the parser of `engram-kernels`."""
    quantize = commands.add_parser("quantize", help="write a trained table as fp8, int8 or four bits, and its error per row",
                                   formatter_class=HelpFormatter)
    quantize.add_argument("source", type=Path, help="a safetensors file with f32, bf16 or f16 rows")
    quantize.add_argument("target", type=Path, help="the new table, which must not exist; it appears whole or not at all")
    quantize.add_argument("--row-format", required=True, metavar="FORMAT",
                          help="fp8_e4m3_block32, fp8_e4m3_row, fp8_e4m3_tensor, int8_group32, nvfp4, mxfp4, ..")
    quantize.add_argument("--tensor", metavar="NAME", help='name of the rows; default: "rows"')
    quantize.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Quantizes a table."""
    from engram_kernels.table.row_table import RowTable
    if args.target.exists():
        raise FileExistsError(errno.EEXIST, "quantize: the target exists already", str(args.target))
    _, report = RowTable.open(args.source, args.tensor).quantize(args.row_format, args.target)
    print(f"{args.target}: {report}")
    return 0
