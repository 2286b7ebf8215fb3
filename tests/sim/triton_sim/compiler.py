"""The worker process that compiles variants, and what it returns."""
import atexit
import importlib.util
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import engram_kernels

ROOT = Path(__file__).resolve().parents[3]
MISSING_TRITON = "" if importlib.util.find_spec("triton") else "Triton is not installed"


@dataclass(frozen=True)
class Compiled:
    """One variant for one target."""
    name: str
    shared: int  # bytes
    threads: int
    code: str  # PTX or AMD assembly
    binary: bytes  # cubin
    registers: int
    stack: int  # bytes
    spills: int  # bytes, or vector registers on AMD


_known: dict[tuple, Compiled] = {}
_worker: subprocess.Popen | None = None


def _start():
    global _worker
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(Path(engram_kernels.__file__).parents[1]), "TRITON_CACHE_DIR": str(ROOT / "build/triton_cache"),
            "TRITON_DUMP_PTXAS_LOG": "1"}
    _worker = subprocess.Popen([sys.executable, str(Path(__file__).with_name("worker.py"))], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, env=env)
    atexit.register(_worker.stdin.close)


def compile_variants(variants, target) -> list[Compiled]:
    """Compiles for `target`, such as "sm_90" or "gfx942"; raises what the compiler said for the first that fails."""
    requests = [(target, v.kernel.fn.__module__, v.kernel.__name__, *v[1:]) for v in variants]
    new = list(dict.fromkeys(r for r in requests if r not in _known))
    if new:
        if _worker is None:
            _start()
        pickle.dump(new, _worker.stdin)
        _worker.stdin.flush()
        for request, made in zip(new, pickle.load(_worker.stdout), strict=True):
            if isinstance(made, str):
                raise RuntimeError(f"{request}: {made}")
            _known[request] = Compiled(**made)
    return [_known[r] for r in requests]
