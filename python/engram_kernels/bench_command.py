"""`engram-kernels bench`: runs the repository's benchmarks, or compares two runs of them."""
from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from engram_kernels.profile.compare import Verdict, compare_runs, load_run, markdown

REGRESSION, NO_CAPABILITY = 3, 5  # exit codes


def run_benchmarks(ops: Sequence[str], folder: Path, out: Path, quick: bool) -> int:
    """Runs bench_<op>.py for the named ops (none: all) with pytest-benchmark; writes its JSON to `out` and prints the table.

    Args:
        ops: names of files, without bench_ and .py.
        folder: the repository's bench folder.
        out: where the run goes.
        quick: every benchmark once, untimed: that they run.

    Raises:
        ValueError: there is no such folder or benchmark.
    """
    if not (folder / "harness.py").is_file():
        raise ValueError(f"{folder} holds no benchmarks; they come with the source: run this in a checkout, or pass --bench-dir")
    files = [folder / f"bench_{op}.py" for op in ops] or [folder]
    missing = [f.name for f in files if not f.exists()]
    if missing:
        known = ", ".join(sorted(f.stem.removeprefix("bench_") for f in folder.glob("bench_*.py")))
        raise ValueError(f"no benchmark {', '.join(missing)}; there are {known}")
    try:
        import pytest_benchmark  # noqa: F401
    except ImportError:
        print("engram-kernels bench: needs pytest-benchmark: pip install 'engram-kernels[bench]'", file=sys.stderr)
        return NO_CAPABILITY
    out.parent.mkdir(parents=True, exist_ok=True)
    timed = ["--benchmark-disable"] if quick else [f"--benchmark-json={out}"]
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", *map(str, files), *timed], cwd=folder.parent,
                         capture_output=True, text=True)
    if ran.returncode:
        print(ran.stdout[-4000:] + ran.stderr[-4000:], file=sys.stderr)
        return 1
    if quick:
        print(ran.stdout.strip().splitlines()[-1])
        return 0
    return subprocess.run([sys.executable, str(folder / "harness.py"), str(out)]).returncode


def compare_files(before: Path, after: Path) -> int:
    """Prints the comparison of two runs as Markdown; 3 when a cell of ours is slower."""
    old, new = load_run(before), load_run(after)
    cells = compare_runs(old, new)
    if not cells:
        raise ValueError(f"{before} and {after} have no benchmark in common")
    print(markdown(cells))
    slower = [c for c in cells if c.verdict is Verdict.SLOWER and new[c.group, c.contender][0] == "ours"]
    return REGRESSION if slower else 0
