"""`engram-kernels info`: what this installation can do here, and why not the rest."""
from __future__ import annotations

import argparse
import json
import sys
import textwrap
from typing import Any

from engram_kernels._names import BACKENDS
from engram_kernels._terminal import terminal_columns
from engram_kernels.cli.options import SPEC_HELP, load_spec

_INDENT = 11  # of what follows the name of a line


def add_arguments(commands: Any) -> None:
    """Adds the command to the parser of `engram-kernels`."""
    command = commands.add_parser("info", help="say which versions, machine and limits there are, and which backends run here")
    command.add_argument("--json", action="store_true", help="print it as JSON")
    command.add_argument("--spec", help=f"also say what a memory holds and costs: {SPEC_HELP}")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints what was found."""
    from engram_kernels import info
    spec = None if args.spec is None else load_spec(args.spec)
    found = info.collect() | ({} if spec is None else {"memory": info.memory_of(spec)})
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    width = terminal_columns(sys.stdout)
    for line in [*([] if spec is None else memory_lines(found["memory"])), *lines(found)]:
        print(line if width is None else textwrap.fill(line, max(width, 40), subsequent_indent=" " * _INDENT))
    return 0


def memory_lines(memory: dict[str, Any]) -> list[str]:
    """What `engram_kernels.info.memory_of` found, as two lines."""
    formats = ", ".join(f"{name} {_gib(num_bytes)}" for name, num_bytes in memory["table_bytes"].items())
    return [f"spec       {memory['name']}: {memory['table_parameters']:,} parameters in rows, {memory['module_parameters']:,} in "
            f"modules, {memory['flops_per_token']:,} flop per token, {memory['rows_per_token']} rows of "
            f"{memory['bytes_per_row']} bytes per token",
            f"tables     {_gib(memory['bytes'])} as {memory['row_format']}; by row format: {formats}"]


def lines(found: dict[str, Any]) -> list[str]:
    """What `engram_kernels.info.collect` found, a line for each matter."""
    from engram_kernels.info import file_reads_text
    machine, limits = found["machine"], found["limits"]
    out = ["versions   " + ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version),
           f"machine    {machine['cpu']}, {machine['cores']} cores, kernels run as {machine['cpu_kernels']}",
           f"features   {' '.join(machine['cpu_features']) or 'not known'}",
           f"memory     {_gib(machine['memory_bytes'])} in all, {_gib(machine['memory_free_bytes'])} free, "
           f"transparent huge pages: {machine['huge_pages'] or 'none in this kernel'}",
           f"limits     cgroup: {_gib(limits['cgroup_bytes'], 'none')}, "
           f"free within all limits: {_gib(limits['memory_room_bytes'])}, "
           f"memlock (mlock and RDMA, not CUDA): {_gib(limits['memlock_bytes'], 'none')}, "
           f"/dev/shm: {_gib(limits['shm_free_bytes'], 'not there')}{'' if limits['shm_free_bytes'] is None else ' free'}, "
           f"open files: {limits['open_files'] or 'no limit'}",
           f"files      {file_reads_text(found['file_reads'])}"]
    out += [f"gpu        {gpu['name']}, {_gib(gpu['memory_bytes'])}, capability {gpu['capability']}" for gpu in found["gpu"]]
    if not found["gpu"]:
        out.append("gpu        none that torch can use")
    for name in BACKENDS:
        by_reason: dict[str, list[str]] = {}
        for op, of_op in found["backends"].items():
            by_reason.setdefault(of_op[name], []).append(op)
        for reason, ops in by_reason.items():
            out.append(f"{name:<10} {reason}" + ("" if len(by_reason) == 1 else f": {', '.join(ops)}"))
    return out


def _gib(num_bytes: int | None, otherwise: str = "an unknown amount") -> str:
    if num_bytes is None:
        return otherwise
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 1 << 27 else f"{num_bytes >> 10} KiB"
