"""Programmatic dependent launch: such a kernel waits for what is before it on the stream before it touches memory."""
import re

import numpy as np
import ptxsim
import pytest
import torch
from cuda_sim import MISSING_NVCC, MISSING_SASS, Device, build
from gather_gate_sim import Table
from gather_gate_sim import make_inputs as gather_gate_inputs
from op_cases import packed
from test_gate_cuda_sim import check as check_gate
from test_gate_cuda_sim import make_inputs as gate_inputs
from test_gather_gate_cuda_sim import check as check_gather_gate
from test_gather_rows_cuda_sim import simulate as gather_rows
from test_ngram_hash_cuda_sim import check as check_hash
from test_ngram_hash_cuda_sim import make_layout, random_ids

from engram_kernels.testing.inputs import random_rows

pytestmark = pytest.mark.skipif(bool(MISSING_NVCC), reason=MISSING_NVCC)
NAMES = {"ngram_hash_few_cuda": "ngram_hash_few_kernel", "gather_rows_direct_cuda": "gather_rows_warp_per_row_kernel",
         "gate_cuda": "gate_one_token_kernel", "gather_gate_cuda": "gather_gate_one_token_kernel"}
ACCESS = re.compile(r"(LDG|LD\.|STG|ST\.|ATOM|RED|LDGSTS)")


def hash_launches(device):
    return check_hash(make_layout(), random_ids(3, 9), packed([1, 2]), history=torch.full((2, 3), -1, dtype=torch.int32),
                      device=device)


def gather_launches(device):
    rows, scales = random_rows("fp8_e4m3_block32", 64, 256, torch.Generator().manual_seed(1))
    return gather_rows(rows, scales, torch.tensor([3, -1, 5]), "fp8_e4m3_block32", 256, device=device)[2]


def gate_launches(device):
    return check_gate(gate_inputs(2, 2, 520), torch.arange(2) == 1, device)


def gather_gate_launches(device):
    inputs = gather_gate_inputs(2, 2, 2, 256)
    return check_gather_gate(Table("fp8_e4m3_block32_packed", 256), inputs, torch.arange(2) == 1, device)


RUNS = {"ngram_hash_few_cuda": hash_launches, "gather_rows_direct_cuda": gather_launches, "gate_cuda": gate_launches,
        "gather_gate_cuda": gather_gate_launches}


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("asked", [None, "0", "1"])
@pytest.mark.parametrize("capability", [8, 9, 10, 12])
def test_launches_overlap_where_asked_for_and_safe(op, asked, capability, monkeypatch):
    """The simulator raises where a thread of an overlapping launch touches memory, or ends, before it has waited."""
    if asked is None:
        monkeypatch.delenv("ENGRAM_KERNELS_PDL", raising=False)
    else:
        monkeypatch.setenv("ENGRAM_KERNELS_PDL", asked)
    launch, = RUNS[op](Device(capability=capability))
    assert NAMES[op] in launch.kernel
    assert launch.overlaps == (asked == "1" and capability in (9, 10))
    waits, triggers = (launch.result.by_op[f"griddepcontrol.{name}"] for name in ("wait", "launch_dependents"))
    assert waits == triggers > 0


def test_a_launch_that_fills_the_gpu_does_not_overlap(monkeypatch):
    monkeypatch.setenv("ENGRAM_KERNELS_PDL", "1")
    launch, = check_gate(gate_inputs(3, 2, 520), device=Device(multiprocessors=1))
    assert not launch.overlaps and "one_token" not in launch.kernel


@pytest.mark.skipif(bool(MISSING_SASS), reason=MISSING_SASS)
@pytest.mark.parametrize("op", NAMES)
def test_machine_code_waits_before_it_touches_memory(op):
    """In the order of the code, of every variant; there is no jump in front of it."""
    variants = {name: code for name, code in build().sass(op).items() if NAMES[op] in name}
    assert variants
    for code in variants.values():
        ops = [name for _, _, name, _ in code]
        front = ops[:ops.index("ACQBULK")]
        assert not [name for name in front if ACCESS.match(name) or name.startswith(("BRA", "EXIT", "CALL"))]


PTX = """.version 8.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 pa)
{
  .reg .pred %p; .reg .b32 %r; .reg .b64 %a;
  ld.param.u64 %a, [pa];
  mov.u32 %r, %tid.x;
  FIRST
  st.global.u32 [%a], %r;
  LAST
  ret;
}
"""
WAIT = "griddepcontrol.wait; griddepcontrol.launch_dependents;"
WAIT_BUT_ONE = "setp.ne.u32 %p, %r, 5; @%p griddepcontrol.wait;"


@pytest.mark.parametrize("first, last, error", [
    (WAIT, "", None), ("", WAIT, "touched before griddepcontrol.wait"), (WAIT_BUT_ONE, "", r"touched before.*thread \(5,0,0\)"),
    ("@%p bra END; " + WAIT, "END: mov.u32 %r, 0;", "ends without griddepcontrol.wait")])
def test_the_simulator_sees_who_does_not_wait(first, last, error):
    first = first.replace("@%p bra", "setp.eq.u32 %p, %r, 5; @%p bra")
    text = PTX.replace("FIRST", first).replace("LAST", last)
    ptxsim.run(text, "k", 1, 32, [np.zeros(1, np.uint32)])  # not overlapping: whatever it does
    if error is None:
        ptxsim.run(text, "k", 1, 32, [np.zeros(1, np.uint32)], overlaps=True)
    else:
        with pytest.raises(ptxsim.SimError, match=error):
            ptxsim.run(text, "k", 1, 32, [np.zeros(1, np.uint32)], overlaps=True)
