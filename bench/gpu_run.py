"""The run that a GPU is borrowed for: `make gpu-run`, twelve minutes on one H200, in the order of what it settles.

Each step is a process with a limit of its own, prints as it goes and leaves NAME.txt (and its JSON) in the folder, so
that a run that is cut short still counts. `make gpu-results FOLDER=...` makes a page of it. With --dry every step runs
down to the launch on a machine without a GPU: the probe is compiled, the calls run on the CPU, the tests are collected.
"""
import argparse
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q"]
OPS = ("ngram_hash", "gather_rows", "gate", "gather_gate", "short_conv", "engram_forward", "row_update", "row_update_eight_bits")
OP_TESTS = [f"tests/ops/test_{op}.py" for op in OPS]
# together every kernel, and both ways to fetch less over the link
SANITIZED = "every_op_runs or few_tokens or fallback or gradients_match or row_optimizer or distinct_rows or scales_on_the_gpu"
OVERLAP = ["env", "ENGRAM_KERNELS_PDL=1"]  # programmatic dependent launch, for the steps that say what it is worth
DEVICE_TESTS = ["tests/gpu/test_cuda_device.py", "tests/gpu/test_model_device.py"]


class Step(NamedTuple):
    """What is run, for so many seconds at most, and what a dry run does instead."""

    name: str
    limit_s: int
    command: list[str]
    dry: list[str] | None = None  # None: the same
    needed: bool = False  # nothing after it makes sense without it


def bench(*sections: str, out: Path, host_gib: str = "1 32") -> tuple[list[str], list[str]]:
    """The command that times some sections, and its dry run."""
    command = [sys.executable, "bench/gpu.py", "--only", *sections, "--json", str(out / f"{sections[0]}.json"), "--host-gib",
               *host_gib.split()]
    return command, [*command, "--dry"]


def sanitize(tool: str) -> list[str]:
    return ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool, "--error-exitcode", "9",
            "--target-processes", "all", *PYTEST, *DEVICE_TESTS, "tests/gpu/test_cuda_host_table.py", "-k", SANITIZED]


def steps(out: Path) -> list[Step]:
    """Measurements first: they say what to change. Then whether everything is right."""
    probe, collect = str(out / "probe"), ["--collect-only", "-q"]
    compile_probe = ["nvcc", "-std=c++20", "-O3", "-arch=sm_90", "bench/gpu_probe.cu", "-o", probe]
    gpu_tests = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests/gpu").glob("test_*.py"))]
    every_gpu_test = [*PYTEST, *gpu_tests, *collect]
    cli = [sys.executable, "-c", "import sys; from engram_kernels.cli.main import main; sys.exit(main(sys.argv[1:]))"]
    in_twelve = ["-n", "12", "-k", "cuda or triton"]
    return [
        Step("machine", 20, [sys.executable, "bench/gpu_run.py", "--machine"]),
        Step("smoke", 90, [*PYTEST, "-x", *DEVICE_TESTS, "-k", "every_op_runs or few_tokens"], every_gpu_test,
             needed=True),
        Step("probe_build", 60, compile_probe),
        Step("probe", 90, [probe, "16"], [sys.executable, "-c", f"assert open({probe!r}, 'rb').read(4) == b'\\x7fELF'"]),
        Step("few", 90, *bench("few", "chain", out=out)),
        Step("overlap", 60, *([*OVERLAP, *command] for command in bench("chain", "few", out=out))),
        Step("overlap_tests", 60, [*OVERLAP, *PYTEST, *DEVICE_TESTS, "-k", "few_tokens or graph"], every_gpu_test),
        Step("engram_forward", 60, *bench("engram_forward", out=out)),
        Step("backward", 60, *bench("backward", "short_conv", out=out)),
        Step("host", 90, *bench("host", "staged", out=out)),
        Step("large", 60, *bench("large", out=out)),
        Step("profile", 90, [*cli, "profile", "--quick", "--json", str(out / "profile.json")], [*cli, "profile", "--help"]),
        Step("ops", 180, [*PYTEST, *in_twelve, *OP_TESTS], [*PYTEST, *collect, *OP_TESTS, "-k", "cpu or triton"]),
        Step("gpu_tests", 150, [*PYTEST, "-n", "4", *gpu_tests], every_gpu_test),
        Step("memcheck", 90, sanitize("memcheck"), every_gpu_test),
        Step("racecheck", 90, sanitize("racecheck"), every_gpu_test),
    ]


def describe_machine() -> None:
    """The driver, the clocks, and what the PCIe capability of each NVIDIA GPU says of tags and request sizes."""
    pcie = runpy.run_path(str(ROOT / "python/engram_kernels/profile/pcie.py"))  # by itself: importing the package takes seconds
    if shutil.which("nvidia-smi"):
        fields = "name,driver_version,pcie.link.gen.current,pcie.link.width.current,clocks.sm,clocks.mem,memory.total"
        subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"], check=False)
    for folder in sorted(pcie["PCI_DEVICES"].glob("*")):
        if (folder / "vendor").read_text().strip() == "0x10de":
            try:
                print(folder.name, pcie["pcie_of"](folder.name))
            except (OSError, ValueError) as err:
                print(folder.name, err)
    print(f"{os.cpu_count()} CPUs, kernel {os.uname().release}")


def run(step: Step, out: Path, dry: bool) -> tuple[str, float]:
    """("ok", "failed N", "cut off" or "cannot start", seconds). What it printed is in the folder."""
    command = step.dry if dry and step.dry is not None else step.command
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": os.pathsep.join(
        [str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])}
    begun = time.monotonic()
    with open(out / f"{step.name}.txt", "w") as log:
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                                  timeout=step.limit_s).returncode
            state = "ok" if code == 0 else f"failed {code}"
        except subprocess.TimeoutExpired:
            state = "cut off"
        except OSError as err:
            log.write(f"{err}\n")
            state = "cannot start"
    return state, time.monotonic() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build-gpu/run")),
                        help="folder of what comes back")
    parser.add_argument("--only", nargs="+", help="names of steps")
    parser.add_argument("--dry", action="store_true", help="without a GPU, down to the launch")
    parser.add_argument("--machine", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.machine:
        describe_machine()
        return 0
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    bad = 0
    for step in steps(out):
        if args.only and step.name not in args.only:
            continue
        state, took = run(step, out, args.dry)
        bad += state != "ok"
        line = f"{step.name:15} {state:13} {took:6.1f} s of {step.limit_s}"
        print(line, flush=True)
        with open(out / "steps.txt", "a") as log:
            log.write(f"{'dry: ' if args.dry else ''}{line}\n")
        if state != "ok":
            print("".join(f"    {text}\n" for text in (out / f"{step.name}.txt").read_text().splitlines()[-12:]), flush=True)
            if step.needed:
                break
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
