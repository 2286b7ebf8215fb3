"""Large outputs on the host: their memory is used again once the last tensor in it is gone, and never before."""
import os
import resource
import subprocess
import sys
import threading

import pytest
import torch

import engram_kernels as ek
from engram_kernels import _C
from engram_kernels.ops._op import _LARGE_BYTES

pytestmark = pytest.mark.skipif(not hasattr(_C, "kept_output_bytes"), reason="no compiled module")
D = 256
NUM_IDS = 2 * _LARGE_BYTES // (2 * D)  # 8 MiB of output
MIB = 1 << 20


@pytest.fixture
def table():
    return ek.RowTable.from_tensor(torch.randn(100, D, generator=torch.Generator().manual_seed(0)).bfloat16())


def ids_of(count, start=0):
    return torch.arange(start, start + count) % 100


@pytest.mark.parametrize("how", ["public", "inference mode", "torch.ops"])
def test_memory_is_used_again_when_the_last_tensor_is_gone(table, how):
    ids = ids_of(NUM_IDS)

    def gather():
        if how == "torch.ops":
            return torch.ops.engram_kernels.gather_rows(table.rows, None, ids, "bf16", D, False, torch.bfloat16)
        with torch.inference_mode(how == "inference mode"):
            return ek.gather_rows(table, ids)
    first = gather()
    address, part = first.data_ptr(), first[5:7]
    assert address % (2 << 20) == 0 and first.is_contiguous() and not first.requires_grad and first._base is None
    assert first.is_inference() == (how == "inference mode")
    del first  # `part` is left
    second = gather()
    assert second.data_ptr() != address and torch.equal(part, table.rows[5:7])
    kept = _C.kept_output_bytes()
    del part
    assert 8 * MIB <= _C.kept_output_bytes() - kept <= 16 * MIB  # a block that was kept may be up to twice as large
    third = gather()
    assert third.data_ptr() == address and torch.equal(third, table.rows[ids]) and torch.equal(second, third)


def test_no_page_is_fresh_the_second_time(table, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # what torch allocates would be written
    ids = ids_of(16 * NUM_IDS)  # 128 MiB
    ek.gather_rows(table, ids)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        ek.gather_rows(table, ids)
    # fresh memory: 1,280 faults where huge pages serve, 655,360 where they do not; some are Python's own
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 400


def test_every_op_makes_its_large_output_there():
    layout, hidden = ek.EngramSpec.deepseek_v41().layout(), torch.ones(2048, 4, 512)
    cu, weight = torch.tensor([0, 2048], dtype=torch.int32), torch.ones(4, 512)
    tokens = torch.ones(1 << 15, dtype=torch.int32)
    table = ek.RowTable.from_tensor(torch.ones(10, D), row_format="f32")
    ids = torch.zeros(2048, 2, dtype=torch.int64)
    calls = {
        "ngram_hash": lambda: ek.ngram_hash(tokens, torch.tensor([0, 1 << 15], dtype=torch.int32), layout),
        "gate": lambda: ek.gate(hidden, hidden, hidden[:, 0].contiguous(), weight, weight),
        "gather_gate": lambda: ek.gather_gate(hidden, table, ids, weight, weight),
        "engram_forward": lambda: ek.engram_forward(hidden, table, ids, torch.ones(5 * 512, 2 * D), weight, weight),
        "short_conv": lambda: ek.short_conv(hidden, torch.ones(4, 512, 4), weight, cu, 3),
    }
    for name, call in calls.items():
        out = call()
        address, copy = out.data_ptr(), out.clone()
        del out
        again = call()
        assert again.data_ptr() == address, name
        torch.testing.assert_close(again, copy, rtol=0, atol=0, equal_nan=True)


def test_gradients_are_as_without_it(table):
    hidden = torch.randn(2048, 4, 512, generator=torch.Generator().manual_seed(1))
    weight = torch.ones(4, 512)
    for _ in range(2):  # the second time in memory of the first
        leaf = hidden.clone().requires_grad_()
        saved = ek.gate(leaf, hidden, hidden[:, 0].contiguous(), weight, weight)
        noise = [ek.gate(hidden, hidden, hidden[:, 1].contiguous(), weight, weight) for _ in range(3)]
        (saved * saved).sum().backward()
        want = hidden.clone().requires_grad_()
        out = ek.gate(want, hidden, hidden[:, 0].contiguous(), weight, weight, backend="reference")
        (out * out).sum().backward()
        torch.testing.assert_close(leaf.grad, want.grad, rtol=1e-4, atol=1e-5)
        del noise


def test_what_is_kept_has_a_bound(table):
    """Never more than was in use at one time, nor than a GiB; larger or smaller ones make room for others."""
    program = """
import torch, engram_kernels as ek
from engram_kernels import _C
table = ek.RowTable.from_tensor(torch.ones(10, 256, dtype=torch.bfloat16))
mib = lambda n: ek.gather_rows(table, torch.zeros(n * 2048, dtype=torch.int64))
kept = lambda: _C.kept_output_bytes() >> 20
for n in (8, 20, 50):  # each alone in its time
    mib(n)
print(kept())
both = mib(50), mib(30)
print(kept()); del both; print(kept())
small = mib(20)  # half of a kept block may stay unused, no more
print(kept()); del small
mib(6)  # the oldest makes room for it
print(kept())
x = mib(1100); del x  # too large to be kept
print(kept())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [int(x) for x in run.stdout.split()] == [50, 0, 80, 50, 36, 0]


def test_threads_and_children_share_no_memory(table):
    wrong = []

    def work(seed):
        ids = ids_of(NUM_IDS, seed)
        want = table.rows[ids]
        for _ in range(20):
            if not torch.equal(ek.gather_rows(table, ids), want):
                wrong.append(seed)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_after_fork_has_its_own(table):
    program = """
import os, torch, engram_kernels as ek
torch.set_num_threads(1)
table = ek.RowTable.from_tensor(torch.randn(100, 256).bfloat16())
ids = torch.arange(16384) % 100
alive, gone = ek.gather_rows(table, ids), ek.gather_rows(table, ids)
address = gone.data_ptr(); del gone
child = os.fork()
if child == 0:
    mine = ek.gather_rows(table, ids)
    mine.zero_(); alive.zero_()
    os._exit(0 if mine.data_ptr() == address else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(ek.gather_rows(table, ids), alive) and alive.any()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)
