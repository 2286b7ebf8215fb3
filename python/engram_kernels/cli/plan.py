"""`engram-kernels plan`: says where a memory's table should live on a machine, and what it costs there."""
from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_kernels._files import write_json
from engram_kernels._names import GPUS, KINDS, PAPER_ROWS, PHASES, PLACEMENTS, REMOTE_ENGINES
from engram_kernels._terminal import Printer, Progress, UsageError, expect_writable, finite, no_progress, progress_bar
from engram_kernels.cli.options import SPEC_HELP, check_spec, load_spec

if TYPE_CHECKING:
    from engram_kernels.plan.hardware import Hardware
    from engram_kernels.plan.workload import Workload

NO_CAPABILITY = 5  # exit code
_GIB = 2.0**30


def add_arguments(commands: Any) -> None:
    """Adds the command to the parser of `engram-kernels`."""
    plan = commands.add_parser("plan", help="say where the table should live on a machine, what it costs there and what would "
                                            "change that")
    plan.add_argument("--spec", default="deepseek_v41", help=f"{SPEC_HELP}; default: deepseek_v41")
    plan.add_argument("--preset", choices=("paper", *PAPER_ROWS), help="predict the paper's table of offloaded inference instead")
    _add_machine(plan)
    _add_workload(plan)
    output = plan.add_argument_group("output")
    output.add_argument("--explain", action="store_true", help="also print every input with its source, and what stays hidden")
    output.add_argument("--json", nargs="?", const="-", metavar="OUT",
                        help="write every number with its provenance; alone: print it")
    output.add_argument("--no-run", action="store_true", help="do not run the pick here")
    output.add_argument("--simulate", type=Path, metavar="TRACE", help="run the layer schedule as discrete events and write a "
                                                                       "Chrome trace (opens in Perfetto)")
    output.add_argument("--placement", choices=PLACEMENTS, help="what is simulated; default: the pick")
    output.add_argument("--steps", type=int, default=3, metavar="N", help="steps that are simulated; default: 3")
    output.add_argument("--early", type=int, metavar="N", help="layers between a lookup's submission and its layer in the "
                                                               "simulation; default: from the start of the step")
    plan.set_defaults(run=run)


def _add_machine(plan: argparse.ArgumentParser) -> None:
    machine = plan.add_argument_group("machine")
    machine.add_argument("--profile", action="append", type=Path, default=[], metavar="F",
                         help="what engram-kernels profile --json measured; several: the later ones win; default: this machine "
                              "is measured for a few seconds where it is the one planned for, or where the pick runs")
    machine.add_argument("--no-measure", action="store_true", help="without a profile, take published constants instead")
    machine.add_argument("--gpu", choices=("none", *GPUS, "here"), help="the GPU planned for, by published constants; here: this "
                         "machine's, as a profile measured it; default: the profile's GPU, else none: the CPU computes")
    for names, what in ((("--device-gib", "--hbm-gib"), "device memory left beside weights and KV cache"),
                        (("--host-gib",), "host memory"), (("--disk-gib",), "disk")):
        machine.add_argument(*names, type=finite, metavar="GIB", help=f"{what}, for tables")
    machine.add_argument("--remote-engine", choices=REMOTE_ENGINES, default="rdma", help="what brings rows from other machines: "
                         "rdma, the link at its rate (the default); ray or mooncake-tcp, as docs/remote.md measured them")
    machine.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs per node; default: 1")
    machine.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes that share the table; default: 1")


def _add_workload(plan: argparse.ArgumentParser) -> None:
    work = plan.add_argument_group("workload")
    work.add_argument("--row-format", metavar="FORMAT", help="of the rows, such as nvfp4; default: the spec's")
    work.add_argument("--tokens-per-step", type=int, metavar="N", help="of one GPU; default: 256, assumed")
    work.add_argument("--step-ms", type=finite, metavar="MS", help="compute of a step, no memory; default: 10, assumed")
    work.add_argument("--layers", type=int, metavar="N", help="of the model; default: at least 32, assumed")
    work.add_argument("--ahead-ms", type=finite, default=0.0, metavar="MS",
                      help="how long before a step its ids are known; default: 0")
    work.add_argument("--copies", type=int, default=1, metavar="N", help="of the table in a node's memory; default: 1, shared")
    work.add_argument("--cache-gib", type=finite, metavar="GIB", help="device memory of the row cache; default: half of the room")
    work.add_argument("--phase", choices=PHASES, default="decode",
                      help="a step has a token of each sequence (decode, the default) or consecutive ones")
    source = work.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, metavar="FILE", help="count repeats in this text, with the spec's true hash")
    source.add_argument("--zipf", type=finite, metavar="S", help="repeats of rows drawn from Zipf's law with this exponent")
    source.add_argument("--like", choices=KINDS, default="prose", help="repeats as published for such text; default: prose")
    work.add_argument("--unique-ratio", type=finite, metavar="R", help="distinct rows over rows, whatever the step")
    work.add_argument("--hit-rate", type=finite, metavar="R", help="of the hot-row cache, whatever its size")


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0; 1: a file cannot be read or nothing fits; 5: what was asked for is not here.

    Raises:
        UsageError: an argument makes no sense.
    """
    from engram_kernels.plan.inputs import CapabilityError
    expect_writable("--json", None if args.json in (None, "-") else Path(args.json))
    expect_writable("--simulate", args.simulate)
    try:
        return _paper(args) if args.preset else _plan(args)
    except CapabilityError as err:
        print(f"engram-kernels plan: {err}", file=sys.stderr)
        return NO_CAPABILITY


def _paper(args: argparse.Namespace) -> int:
    from engram_kernels.plan import report
    from engram_kernels.plan.presets import compare_with_paper
    comparisons = [compare_with_paper(name) for name in (PAPER_ROWS if args.preset == "paper" else [args.preset])]
    if args.json != "-":
        report.print_comparisons(comparisons, Printer())
    write_json(args.json, {"schema_version": report.SCHEMA_VERSION, "paper": [report.comparison_json(c) for c in comparisons]})
    return 0


def _plan(args: argparse.Namespace) -> int:
    from engram_kernels.plan import report
    from engram_kernels.plan.hardware import with_engine, with_room
    from engram_kernels.plan.inputs import machine_of, profiles_of_this_machine, workload_of
    from engram_kernels.plan.measure_here import measure_here
    from engram_kernels.plan.model import make_plan, winner_of
    from engram_kernels.plan.profile_input import load_profile
    from engram_kernels.plan.trial import run_trial
    check_spec(args.spec)
    spec = load_spec(args.spec)
    if args.row_format is not None:
        try:
            spec = dataclasses.replace(spec, row_format=args.row_format, row_stride_bytes=None)
        except ValueError as err:
            raise UsageError(f"--row-format: {err}") from None
    progress: Progress = progress_bar if importlib.util.find_spec("rich") else no_progress
    profiles = [(path, load_profile(path)) for path in args.profile]
    mine = profiles_of_this_machine(profiles)
    room = [None if gib is None else gib * _GIB for gib in (args.device_gib, args.host_gib, args.disk_gib)]
    try:
        node = with_engine(with_room(machine_of(args.gpu, profiles), *room), args.remote_engine)
        work = workload_of(args, spec, node)
    except ValueError as err:
        raise UsageError(str(err).removeprefix("plan: ")) from None
    # what fits does not depend on rates: where nothing does, none is asked for
    if not mine and not args.no_measure and (_plans_for_here(args) or not args.no_run) and winner_of(work, node) is not None:
        with progress("measures this machine", 1):
            mine = [(Path("this machine"), measure_here(spec, args.tokens_per_step))]
        if _plans_for_here(args):
            node = with_engine(with_room(machine_of(args.gpu, mine), *room), args.remote_engine)
    plan = make_plan(work, node)
    trial = None
    if plan.winner is not None and not args.no_run:
        with progress("runs the pick here", 1):
            trial = run_trial(plan.winner, work, machine_of(None, mine), node)
    printer = Printer(sys.stderr if args.json == "-" else None)
    report.print_plan(plan, work, node, printer, trial, args.explain)
    simulated = None
    if args.simulate:
        with progress("simulates the schedule", 1):
            simulated = _simulate(args, work, node, plan.winner, printer)
    write_json(args.json, report.plan_json(plan, work, node, trial, simulated))
    return 0 if plan.winner is not None else 1


def _plans_for_here(args: argparse.Namespace) -> bool:
    """Whether the machine planned for is this one: no profile and no GPU that is elsewhere."""
    return not args.profile and args.gpu in (None, "none")


def _simulate(args: argparse.Namespace, work: Workload, node: Hardware, winner: str | None, printer: Printer) -> Any:
    from engram_kernels.plan import report
    from engram_kernels.plan.schedule import Schedule, early_enough, ids_at_step_start, simulate, write_trace
    placement = args.placement or winner
    if placement is None:
        raise UsageError("nothing fits, so there is nothing to simulate: name a --placement")
    work = ids_at_step_start(work)
    try:
        simulated = simulate(work, node, Schedule(placement, args.steps, args.early))
        early = early_enough(work, node, placement) if args.early is None else None
    except ValueError as err:
        raise UsageError(str(err).removeprefix("plan: ")) from None
    write_trace(args.simulate, simulated, f"{work.spec.name}, {placement}")
    for line in report.simulated_lines(simulated, placement, early):
        printer.say(line)
    printer.say(f"trace: {args.simulate}, opens in https://ui.perfetto.dev")
    return simulated
