"""nvcc, ptxas and nvdisasm over csrc/kernels and the kernel of csrc/prefetch."""
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ptxsim import sassflow

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent
ARCH = 90


def _nvdisasm():
    """nvdisasm from PATH or from the PyPI package of that name."""
    packaged = [Path(p) / "nvidia/cu13/bin/nvdisasm" for p in sys.path]
    return shutil.which("nvdisasm") or next((str(p) for p in packaged if p.exists()), None)


MISSING_NVCC = "" if shutil.which("nvcc") else "nvcc is not installed"
MISSING_SASS = "" if _nvdisasm() else "nvdisasm is not installed (pip install nvidia-cuda-nvdisasm)"
if (MISSING_NVCC or MISSING_SASS) and os.environ.get("EK_EXPECT_NVCC") == "1":
    raise RuntimeError(f"EK_EXPECT_NVCC=1, but {MISSING_NVCC or MISSING_SASS}: the CUDA kernels would go untested")


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel."""
    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int


@dataclass(frozen=True)
class Build:
    """Where the products lie, one folder for all ops."""
    folder: Path
    ops: tuple[str, ...]

    @property
    def library(self) -> Path:
        return self.folder / "launchers.so"

    def ptx(self, op: str) -> str:
        return (self.folder / op / f"{op}.ptx").read_text()

    def usage(self, op: str) -> dict[str, Usage]:
        """Registers, spills and shared memory of every kernel of `op`, by mangled name."""
        out = {}
        log = (self.folder / op / "ptxas.log").read_text()
        for part in log.split("Compiling entry function '")[1:]:
            def number(pattern, part=part):
                found = re.search(pattern, part)
                return int(found[1]) if found else 0
            out[part[:part.index("'")]] = Usage(
                number(r"Used (\d+) registers"), number(r"(\d+) bytes stack frame"), number(r"(\d+) bytes spill stores"),
                number(r"(\d+) bytes smem"))
        return out

    def sass(self, op: str) -> dict[str, list]:
        """Machine instructions of every kernel of `op`, by mangled name; see ptxsim.sassflow."""
        cubin = next((self.folder / op).glob("*.cubin"))
        text = subprocess.run([_nvdisasm(), "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
        parts = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", text, flags=re.M)
        labelled = dict(zip(parts[1::2], parts[2::2], strict=True))
        return {name: sassflow.parse(_label_addresses(body)) for name, body in labelled.items()}


def _label_addresses(body):
    """nvdisasm names branch targets; sassflow wants addresses."""
    address, pending, out = {}, [], []
    for line in body.splitlines():
        label = re.match(r"^(\.L_\w+|\$\S+):", line)
        if label:
            pending.append(label[1])
        at = re.match(r"^\s+/\*([0-9a-f]{4,})\*/", line)
        if at:
            address.update({name: at[1] for name in pending})
            pending = []
        out.append(line)
    return re.sub(r"`\((\.L_\w+|\$[^)]+)\)", lambda m: f"0x{address.get(m[1], '0')}", "\n".join(out))


@functools.cache
def build(ops: tuple[str, ...] = ()) -> Build:
    """Compiles what has changed since the last call of any process: `ops` alone, all unless told. Needs nvcc."""
    kernels = [*sorted((ROOT / "csrc/kernels").glob("*/*_cuda.cu")), ROOT / "csrc/prefetch/place_rows_cuda.cu"]
    unknown = set(ops) - {kernel.stem for kernel in kernels}
    if unknown:
        raise ValueError(f"cuda_sim: ops has {', '.join(sorted(unknown))}, expected stems of *_cuda.cu")
    kernels = [kernel for kernel in kernels if not ops or kernel.stem in ops]
    checks = [path for path in (*sorted((ROOT / "csrc/kernels").glob("*/*_check.cpp")), ROOT / "csrc/prefetch/place_rows.cpp")
              if path.parent in {kernel.parent for kernel in kernels}] + sorted((ROOT / "csrc/common").glob("*.cpp"))
    headers = sorted((ROOT / "csrc").rglob("*.h"))
    shims = sorted(HERE.glob("*.cpp"))
    key = hashlib.sha256(repr(ops).encode())
    for path in (*kernels, *checks, *headers, *shims, Path(__file__)):
        key.update(path.read_bytes())
    folder = ROOT / "build/cuda_sim" / key.hexdigest()[:16]
    made = Build(folder, tuple(k.stem for k in kernels))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / "lock", "w") as lock:  # of the test processes, the first compiles and the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.library.exists():
            for old in folder.parent.glob("*/"):
                shutil.rmtree(old)
            _compile_all(made, kernels, [*checks, *shims])
    return made


def _compile_all(made, kernels, host_sources):
    flags = ["-std=c++20", f"-I{ROOT / 'csrc'}", "-DEK_WITH_CUDA", "-Xcompiler", "-fPIC", "--Werror", "all-warnings"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda kernel: _compile(kernel, made.folder / kernel.stem, flags), kernels))
    part = made.folder / "launchers.part.so"
    _run(["nvcc", *flags, "-shared", "-cudart", "none", *objects, *host_sources, "-o", part])
    part.rename(made.library)


def _compile(kernel, to, flags):
    to.mkdir(parents=True)
    log = _run(["nvcc", *flags, "-Xptxas", "-v", "-gencode", f"arch=compute_{ARCH},code=[compute_{ARCH},sm_{ARCH}]",
                "--keep", "--keep-dir", to, "-c", kernel, "-o", to / "kernel.o"])
    (to / "ptxas.log").write_text(log)
    return to / "kernel.o"


def _run(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(str(c) for c in command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr
