"""`engram-kernels bench`: runs the repository's benchmarks, compares two runs of them, or tunes the Triton kernels."""
from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_kernels._terminal import Progress, UsageError, expect_writable, no_progress, progress_bar
from engram_kernels.cli.options import SPEC_HELP, HelpFormatter, check_spec, load_spec

if TYPE_CHECKING:
    from engram_kernels.spec import EngramSpec

REGRESSION, NO_CAPABILITY = 3, 5  # exit codes


def add_arguments(commands: Any) -> None:
    """Adds the command to the parser of `engram-kernels`."""
    command = commands.add_parser("bench", help="run the benchmarks of a checkout beside their peers, or compare two runs",
                                  formatter_class=HelpFormatter)
    command.add_argument("ops", nargs="*", metavar="OP", help="such as gate; none: all")
    command.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"),
                         help="two files of --json: SAME, FASTER, SLOWER or UNCLEAR per cell; exit code 3 when ours is slower")
    command.add_argument("--quick", action="store_true", help="run each once, untimed")
    command.add_argument("--tune", action="store_true",
                         help="instead: try launch parameters of the Triton kernels on this GPU, keep the fastest for this user")
    command.add_argument("--spec", default="deepseek_v41", help=f"whose sizes --tune times: {SPEC_HELP}")
    command.add_argument("--json", type=Path, metavar="OUT", help="where the run is written; default: build/bench.json")
    command.add_argument("--bench-dir", type=Path, default=Path("bench"), metavar="DIR", help="the bench folder of a checkout")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs, compares or tunes, as the arguments say."""
    check_spec(args.spec)
    if args.compare:
        before, after = args.compare
        return compare_files(before, after, args.ops)
    if args.tune:
        return tune_launches(load_spec(args.spec), args.ops)
    if args.quick and args.json is not None:
        raise UsageError("--quick times nothing, so there is nothing to write to --json")
    out = args.json or Path("build/bench.json")
    if not args.quick:
        expect_writable("--json", out)
    bar = progress_bar if importlib.util.find_spec("rich") else no_progress
    return run_benchmarks(args.ops, args.bench_dir, out, args.quick, bar)


def run_benchmarks(ops: Sequence[str], folder: Path, out: Path, quick: bool, progress: Progress) -> int:
    """Runs bench_<op>.py for the named ops (none: all) with pytest-benchmark; writes its JSON to `out` and prints the table.

    Args:
        ops: names of files, without bench_ and .py.
        folder: the repository's bench folder.
        out: where the run goes, in a folder that is there.
        quick: every benchmark once, untimed: that they run.
        progress: opens a bar of so many benchmarks, None: not known.

    Raises:
        ValueError: there is no such folder.
        UsageError: there is no such benchmark.
    """
    folder, out = folder.resolve(), out.resolve()  # the benchmarks run in the checkout
    if not (folder / "harness.py").is_file():
        raise ValueError(f"{folder} holds no benchmarks; they come with the source: run this in a checkout, or pass --bench-dir")
    files = [folder / f"bench_{op}.py" for op in ops] or [folder]
    missing = [f.name for f in files if not f.exists()]
    if missing:
        known = ", ".join(sorted(f.stem.removeprefix("bench_") for f in folder.glob("bench_*.py")))
        raise UsageError(f"no benchmark {', '.join(missing)}; there are {known}")
    try:
        import pytest_benchmark  # noqa: F401
    except ImportError:
        print("engram-kernels bench: needs pytest-benchmark: pip install 'engram-kernels[bench]'", file=sys.stderr)
        return NO_CAPABILITY
    timed = ["--benchmark-disable"] if quick else [f"--benchmark-json={out}"]
    with progress("benchmarks", None) as done:
        code, said = _run_pytest([*map(str, files), *timed], folder.parent, done)
    if code:
        print(said[-4000:], file=sys.stderr)
        return 1
    if quick:
        print(said.strip().splitlines()[-1])
        return 0
    return subprocess.run([sys.executable, str(folder / "harness.py"), str(out)]).returncode


def _run_pytest(arguments: list[str], folder: Path, done: Callable[[int], None]) -> tuple[int, str]:
    """(exit code, what it said); `done(1)` for each letter of pytest's line of results."""
    with subprocess.Popen([sys.executable, "-m", "pytest", "-q", *arguments], cwd=folder, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said, line = [], ""
        while letter := process.stdout.read(1):
            said.append(letter)
            line = "" if letter == "\n" else line + letter
            if line and not line.strip(".sFEx"):
                done(1)
    return process.returncode, "".join(said)


def tune_launches(spec: EngramSpec, ops: Sequence[str]) -> int:
    """Tries launch parameters of the Triton kernels on this GPU and writes the fastest to the user's table.

    Args:
        spec: whose sizes are timed.
        ops: names of ops; none: all that `spec` has.

    Returns:
        The exit code: NO_CAPABILITY where there is no GPU or no Triton.

    Raises:
        ValueError: an op has no launch parameters.
    """
    import torch

    from engram_kernels.triton_runtime import dispatch
    missing = None if dispatch.INSTALLED else dispatch.why_not("gate")
    if missing is None and not torch.cuda.is_available():
        missing = "torch finds no GPU"
    if missing is not None:
        print(f"engram-kernels bench --tune: {missing}", file=sys.stderr)
        return NO_CAPABILITY
    from engram_kernels.triton_runtime.tune import tune_ops
    from engram_kernels.triton_runtime.tuning import user_file
    for op, size, chosen in tune_ops(spec, ops):
        print(f"{op}, {size} batches: " + ", ".join(f"{name} {value}" for name, value in chosen.items()), flush=True)
    print(f"written to {user_file()}")
    return 0


def compare_files(before: Path, after: Path, ops: Sequence[str] = ()) -> int:
    """Prints the comparison of two runs as Markdown.

    Args:
        before, after: files of `run_benchmarks`.
        ops: names of files, without bench_ and .py: only their benchmarks; none: all.

    Returns:
        The exit code: REGRESSION when a cell of ours is slower.

    Raises:
        ValueError: a file is no such run, or the two have nothing in common.
        UsageError: neither run has benchmarks of an op.
    """
    from engram_kernels.profile.compare import Verdict, compare_runs, gone, load_machine, load_run, markdown
    old, new = load_run(before, ops), load_run(after, ops)
    if ops and not old and not new:
        raise UsageError(f"neither {before} nor {after} has benchmarks of {' or '.join(ops)}")
    cells = compare_runs(old, new)
    if not cells:
        raise ValueError(f"{before} and {after} have no benchmark in common")
    print(markdown(cells))
    if missing := gone(old, new):
        print(f"only in {before}: " + "; ".join(f"{group}, {contender}" for group, contender in missing))
    machines = load_machine(before), load_machine(after)
    if machines[0] != machines[1]:
        print(f"not the same machine: {machines[0] or 'unknown'} before, {machines[1] or 'unknown'} after")
    slower = [c for c in cells if c.verdict is Verdict.SLOWER and new[c.group, c.contender].role == "ours"]
    return REGRESSION if slower else 0
