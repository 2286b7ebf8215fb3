"""Compiles Triton variants: pickled (target, variant) lists on standard input, pickled results on standard output."""
import contextlib
import importlib
import io
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def compile_one(target, module, kernel, *rest):
    from triton.backends.compiler import GPUTarget

    from engram_kernels.triton_runtime.launch import Variant
    function = getattr(importlib.import_module(module), kernel)
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        made = Variant(function, *rest).compile(gpu)
    out = {"name": made.metadata.name, "shared": made.metadata.shared, "threads": gpu.warp_size * made.metadata.num_warps}
    if gpu.backend == "cuda":
        ptx = made.asm["ptx"]
        return out | {"code": ptx, "binary": made.asm["cubin"], **usage(log.getvalue() or ptxas(ptx, target))}
    code = made.asm["amdgcn"]

    # scalar registers spill into lanes of vector registers, not to memory; `stack` would show it
    def number(name):
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        return int(found[1])
    return out | {"code": code, "binary": b"", "registers": number("vgpr_count"), "stack": number("private_segment_fixed_size"),
                  "spills": number("vgpr_spill_count")}


def ptxas(ptx, target):
    """What ptxas says of `ptx`, for a kernel that came from Triton's cache."""
    from triton import knobs
    tool = knobs.nvidia.ptxas_blackwell if target == "sm_100" else knobs.nvidia.ptxas
    arch = re.search(r"^\.target (\S+)", ptx, re.M)[1].split(",")[0]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        return subprocess.run([tool.path, "-v", f"-arch={arch}", source, "-o", Path(folder) / "kernel.cubin"], check=True,
                             capture_output=True, text=True).stderr


def usage(log):
    def number(pattern):
        found = re.search(pattern, log)
        return int(found[1]) if found else 0
    return {"registers": number(r"Used (\d+) registers"), "stack": number(r"(\d+) bytes stack frame"),
            "spills": number(r"(\d+) bytes spill stores")}


def main():
    requests, results = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    while True:
        try:
            batch = pickle.load(requests)
        except EOFError:
            return
        done = []
        for request in batch:
            try:
                done.append(compile_one(*request))
            except Exception as err:  # the test that asked fails with it
                done.append(f"{type(err).__name__}: {err}")
        pickle.dump(done, results)
        results.flush()


if __name__ == "__main__":
    main()
