"""`engram-kernels budget`: how a model's sparse parameters split between routed experts and a memory, at the same size."""
from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

from engram_kernels._files import write_json
from engram_kernels._terminal import Printer, UsageError, expect_writable, expect_writable_folder, finite

NO_CAPABILITY = 5  # exit code
_MOST_ROWS = 1001
_SIZES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def add_arguments(commands: Any) -> None:
    """Adds the command to the parser of `engram-kernels`."""
    command = commands.add_parser("budget", help="split a model's parameters between routed experts and a memory: one row per "
                                                 "share, and the memory's spec")
    model = command.add_argument_group("model")
    model.add_argument("--config", type=Path, metavar="F", help="config.json of a MoE model, or its folder: DeepSeek, Qwen MoE "
                                                                "or Mixtral field names")
    model.add_argument("--total", type=_count, metavar="N", help="parameters, such as 26.7e9 or 26.7B; with --config: published "
                                                                 "instead of counted")
    model.add_argument("--active", type=_count, metavar="N", help="of them, those that a token uses")
    for name, what in (("--experts", "routed experts per layer; default: 72"),
                       ("--top-k", "of them, those of a token; default: 6"),
                       ("--hidden", "hidden size; default: 2560"), ("--num-layers", "decoder layers; default: 30"),
                       ("--vocab", "token ids; default: 129280")):
        model.add_argument(name, type=_positive, metavar="N", help=f"without --config: {what}, as the paper's 27B")
    model.add_argument("--branches", type=_positive, metavar="M", help="hyper-connection streams; default: the config's, else 1; "
                                                                       "4 without a config")
    split = command.add_argument_group("split")
    split.add_argument("--rho", type=_rhos, default="0.5:1:0.05", metavar="R", help="shares of the experts: FROM:TO:STEP, or "
                                                                                    "some with commas; default: 0.5:1:0.05")
    split.add_argument("--choose", type=finite, metavar="R", help="the row nearest to it is chosen; default: 0.75, or the "
                                                                  "only --rho")
    split.add_argument("--experts-multiple", type=_positive, default=1, metavar="N", help="experts are multiples of it, such as "
                                                                                          "the expert-parallel size; default: 1")
    memory = command.add_argument_group("memory")
    memory.add_argument("--layers", type=_integers, metavar="L,L", help="decoder layers with a memory, counted from 0; default: "
                                                                        "the config's, else 1 and half of the layers less 1")
    memory.add_argument("--orders", type=_integers, metavar="N,N", help="lengths of the n-grams; default: the config's, else 2,3")
    memory.add_argument("--heads", type=_positive, metavar="N", help="per order; default: the config's, else 8")
    memory.add_argument("--head-dim", type=_positive, metavar="D", help="elements of a row; default: the config's, else half of "
                                                                        "the hidden size over the columns")
    memory.add_argument("--row-format", metavar="F", help="of the tables at inference, as in docs/ops.md; default: the config's, "
                                                          "else bf16")
    machine = command.add_argument_group("machine")
    machine.add_argument("--profile", type=Path, metavar="F", help="what engram-kernels profile --json measured: adds where plan "
                                                                   "puts the tables, and what a step waits for rows")
    machine.add_argument("--tokens-per-step", type=_positive, metavar="N", help="of plan; default: 256, assumed")
    machine.add_argument("--step-ms", type=finite, metavar="MS", help="of plan; default: 10, assumed")
    output = command.add_argument_group("output")
    output.add_argument("--explain", action="store_true", help="also print every input with its source")
    output.add_argument("--json", nargs="?", const="-", metavar="OUT",
                        help="write every number with its provenance; alone: print it")
    output.add_argument("--write", type=Path, metavar="DIR", help="write the chosen row there: spec.json, which plan --spec and "
                                                                  "EngramSpec.from_json read, and choice.json with the experts")
    output.add_argument("--plot", type=Path, metavar="F", help="draw the rows beside the paper's curve; needs matplotlib")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0; 1: a file cannot be read or does not describe such a model; 5: matplotlib is missing.

    Raises:
        UsageError: an argument makes no sense.
    """
    _check_paths(args)
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        print("engram-kernels budget: --plot needs matplotlib: pip install 'engram-kernels[profile]'", file=sys.stderr)
        return NO_CAPABILITY
    if args.plot is not None:
        from matplotlib.backend_bases import FigureCanvasBase
        if (kind := args.plot.suffix[1:].lower()) not in FigureCanvasBase.get_supported_filetypes():
            raise UsageError(f"--plot {args.plot}: {kind or 'no suffix'} is no kind of figure; the nearest that works: .png")
    from engram_kernels.allocation import report
    from engram_kernels.allocation.budget import budget
    from engram_kernels.allocation.moe_model import InputError
    try:
        found = budget(args.config, total=args.total, active=args.active, rho=args.rho, choose=args.choose,
                       experts_multiple=args.experts_multiple, layers=args.layers, orders=args.orders, heads=args.heads,
                       head_dim=args.head_dim, row_format=args.row_format, branches=args.branches, profile=args.profile,
                       tokens_per_step=args.tokens_per_step, step_ms=args.step_ms, experts=args.experts, top_k=args.top_k,
                       hidden_size=args.hidden, num_layers=args.num_layers, vocab_size=args.vocab)
    except InputError:
        raise
    except ValueError as err:
        raise UsageError(str(err).removeprefix("budget: ")) from None
    if args.write is not None and found.chosen.spec is None:
        raise UsageError("--write: the chosen row has no memory, so there is no spec to write; nearest --rho that has one: 0.75")
    printer = Printer(sys.stderr if args.json == "-" else None)
    report.print_budget(found, printer, args.explain)
    if args.write is not None:
        _write_choice(args.write, found, report.choice_json(found), printer)
    if args.plot is not None:
        report.write_plot(found, args.plot)
        printer.say(f"figure: {args.plot}")
    write_json(args.json, report.budget_json(found))
    return 0


def _check_paths(args: argparse.Namespace) -> None:
    """What would fail, fails before anything is computed."""
    if args.config is None and (args.total is None or args.active is None):
        raise UsageError("neither --config nor both of --total and --active are given")
    for option, path in (("--config", args.config), ("--profile", args.profile)):
        if path is not None and not path.exists():
            raise UsageError(f"{option} {path} is no file")
    if args.config is not None and args.config.is_dir() and not (args.config / "config.json").is_file():
        raise UsageError(f"--config {args.config} is a folder without a config.json")
    for option, value in (("--tokens-per-step", args.tokens_per_step), ("--step-ms", args.step_ms)):
        if value is not None and args.profile is None:
            raise UsageError(f"{option} {value:g} says something to --profile alone, which is not given")
    _check_collisions(args)
    expect_writable("--json", None if args.json in (None, "-") else Path(args.json))
    expect_writable("--plot", args.plot)
    expect_writable_folder("--write", args.write)


def _check_collisions(args: argparse.Namespace) -> None:
    """What is written must not take the place of what is read, nor of something else that is written."""
    taken = {}
    for option, path in (("--config", args.config), ("--profile", args.profile)):
        if path is not None:
            taken[(path / "config.json" if path.is_dir() else path).resolve()] = f"{option} reads"
    if args.write is not None:
        taken |= {(args.write / name).resolve(): "--write writes" for name in ("spec.json", "choice.json")}
    for option, path in (("--plot", args.plot), ("--json", None if args.json in (None, "-") else Path(args.json))):
        if path is None or path.is_char_device():
            continue
        if (other := taken.setdefault(path.resolve(), f"{option} writes")) != f"{option} writes":
            raise UsageError(f"{option} {path} is the file that {other}, expected another")


def _write_choice(folder: Path, found: Any, choice: dict[str, Any], printer: Printer) -> None:
    from engram_kernels._files import write_atomic
    found.chosen.spec.to_json(folder / "spec.json")
    write_atomic("budget", folder / "choice.json", (json.dumps(choice, indent=2) + "\n").encode())
    printer.say(f"written: {folder / 'spec.json'}, {folder / 'choice.json'}")


def _count(text: str) -> float:
    """A number of parameters: 26.7e9 or 26.7B."""
    scale = _SIZES.get(text[-1:].upper(), 1.0)
    try:
        value = float(text[:-1] if scale != 1.0 else text) * scale
    except ValueError:
        value = math.nan
    if not 1 <= value <= 2.0**53:  # nan, too
        nearest = "; nearest: 1" if value < 1 else f"; nearest: {2**53}" if value > 1 else ", such as 26.7e9 or 26.7B"
        raise argparse.ArgumentTypeError(f"{text!r} is no number of parameters: expected 1 to {2**53}{nearest}")
    return value


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def _integers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() and len(part) < 16 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers with commas between, such as 1,14")
    return [int(part) for part in parts]


def _rhos(text: str) -> list[float]:
    """Shares: "0.5:1:0.05" with both ends, "0.75", or "0.6,0.75,1"."""
    if ":" not in text:
        return [_share(part) for part in text.split(",")]
    parts = text.split(":")
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"{text!r}: expected FROM:TO:STEP, such as 0.5:1:0.05")
    first, last, step = _share(parts[0]), _share(parts[1]), finite(parts[2])
    if step <= 0 or first > last or (last - first) / step >= _MOST_ROWS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected FROM up to TO by a STEP above 0, at most {_MOST_ROWS} shares; "
                                         "nearest: 0.5:1:0.05")
    return [min(round(first + i * step, 9), last) for i in range(math.floor((last - first) / step + 1e-9) + 1)]


def _share(text: str) -> float:
    value = finite(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"rho is {text}, expected a share in 0..1; nearest: {0 if value < 0 else 1}")
    return value
