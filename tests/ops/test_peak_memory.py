"""Peak extra memory of every op is its output plus a constant: measured as resident memory of a fresh process, since torch does
not see what a kernel allocates for itself. Inputs are expanded from one row, so that a hidden copy of them would show."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engram_kernels import RowTable, gather_rows

HEAD = """
import torch, engram_kernels as ek
ops, bf16 = torch.ops.engram_kernels, torch.bfloat16
def peak_kib():
    with open("/proc/self/status") as status:  # ru_maxrss begins with the peak of the process that started this one
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
def touched(*shape, dtype=bf16):
    return torch.empty(shape, dtype=dtype).fill_(1)
def cu(*ends):
    return torch.tensor([0, *ends], dtype=torch.int32)
row, weight = torch.ones(1, 4, 5120, dtype=bf16), torch.ones(4, 5120)
def rows_of(tokens):
    return row.expand(tokens, -1, -1)
"""
FORWARD = """
table, out = ek.RowTable.from_tensor(touched(1000, 16), row_format="bf16"), touched(4000, 4, 5120)
ids, w_kv = torch.arange(8000, dtype=torch.int32).view(4000, 2) % 1000, touched(5 * 5120, 32)
"""
OPS = {  # name: what prepares `run(tokens)` with outputs that are there already, and how many tokens
    "ngram_hash": ("""
layout = ek.EngramSpec.deepseek_v41().layout()
ids, out = torch.ones(1, dtype=torch.int32).expand(2_400_000), touched(2 * 2_400_000 * 24, dtype=torch.int32)
def run(tokens):
    ek.ngram_hash(ids[:tokens], cu(tokens), layout, out=out[:2 * tokens * 24].view(2, tokens, 24))
""", 2_400_000),
    "gather_rows": ("""
table, out = ek.RowTable.from_tensor(touched(1000, 256), row_format="bf16"), touched(2_400_000, 256)
ids = torch.arange(2_400_000, dtype=torch.int32) % 1000
def run(tokens):
    ek.gather_rows(table, ids[:tokens], out=out[:tokens])
""", 2_400_000),
    "gate": ("""
out = touched(4000, 4, 5120)
def run(tokens):
    x = rows_of(tokens)
    ek.gate(x, x, x[:, 0], weight, weight, out=out[:tokens])
""", 4000),
    "gather_gate": ("""
table, out = ek.RowTable.from_tensor(touched(1000, 256), row_format="bf16"), touched(4000, 4, 5120)
ids = torch.arange(4000 * 20, dtype=torch.int32).view(4000, 20) % 1000
def run(tokens):
    ek.gather_gate(rows_of(tokens), table, ids[:tokens], weight, weight, out=out[:tokens])
""", 4000),
    "engram_forward": (f"""{FORWARD}
def run(tokens):
    ek.engram_forward(rows_of(tokens), table, ids[:tokens], w_kv, weight, weight, out=out[:tokens])
""", 4000),
    "engram_forward in chunks, as on a GPU": (f"""{FORWARD}
from engram_kernels import _steps
_steps.CHUNK_TOKENS = 16
def run(tokens):
    args = (table.rows, None, ids[:tokens], w_kv, weight, weight, None, "bf16", 16, False, 1e-6, 1e-6, "copysign", True)
    _steps.forward(ops.gather_rows.out, ops.gate.out, rows_of(tokens), *args, out=out[:tokens])
""", 4000),
    "short_conv": ("""
out, taps = touched(4000, 4, 5120), torch.ones(4, 5120, 4)
def run(tokens):
    ek.short_conv(rows_of(tokens), taps, weight, cu(tokens), 3, out=out[:tokens])
""", 4000),
    "row_update": ("""
table = ek.RowTable.from_tensor(touched(300_000, 256), row_format="bf16")
ids, grads, out = torch.arange(300_000).flip(0), touched(300_000, 256).mul_(1e-3), touched(300_000, dtype=torch.float32)
moments = dict(second=touched(300_000, dtype=torch.float32), first=touched(300_000, 256))
moments["steps"] = touched(300_000, dtype=torch.int32)
def run(tokens):
    ek.row_update(table, ids[:tokens], grads[:tokens], lr=0.1, rounding="stochastic", out=out[:tokens], **moments)
""", 300_000),
}
# backward allocates its gradients, which are counted and taken off: (op, bytes of gradients a token)
BACKWARD = {
    "gate_bwd": ("""
def run(tokens):
    x = rows_of(tokens)
    ops.gate_bwd(x, x, x, x[:, 0], weight, weight, None, 1e-6, 1e-6, "copysign", True)
""", 4000, 9 * 5120 * 2),
    "short_conv_bwd": ("""
taps = torch.ones(4, 5120, 4)
def run(tokens):
    x = rows_of(tokens)
    ops.short_conv_bwd(x, x, taps, weight, cu(tokens), 3, 1e-5)
""", 4000, 4 * 5120 * 2),
}
CONSTANT_KIB = 8 << 10


def growth_kib(setup, tokens, warm_tokens):
    script = f"{HEAD}{setup}\nrun({warm_tokens})\nbefore = peak_kib()\nrun({tokens})\nprint(peak_kib() - before)\n"
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("op", OPS)
def test_peak_memory_of_forward_is_constant(op, compiled):
    setup, tokens = OPS[op]
    # warm with a tile of engram_forward; the outputs alone are 160 MiB and more
    assert growth_kib(setup, tokens, 256) < CONSTANT_KIB


@pytest.mark.parametrize("op", BACKWARD)
def test_peak_memory_of_backward_is_its_gradients(op, compiled):
    setup, tokens, grad_bytes = BACKWARD[op]
    warm = 1100  # past the fixed number of partial sums
    assert growth_kib(setup, tokens, warm) < (tokens - warm) * grad_bytes // 1024 + CONSTANT_KIB


def flags_of(address):
    """The kernel's VmFlags of the mapping around `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            begin, end = (int(x, 16) for x in words[0].split("-"))
            inside = begin <= address < end
        elif inside and words[0] == "VmFlags:":
            return words[1:]
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no transparent huge pages")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_large_output_is_asked_for_in_huge_pages(mode):
    """64 MiB, which malloc maps afresh: without them, the faults of small pages took three times the gather's own time."""
    table = RowTable.from_tensor(torch.zeros(9, 256, dtype=torch.bfloat16))
    with mode():
        out = gather_rows(table, torch.zeros(1 << 17, dtype=torch.int64), backend="cpu")
    assert "hg" in flags_of(out.data_ptr() + out.nbytes // 2)
