"""What scripts do with a table that is trained: they fork, end without close, change directory, and open it by a link."""
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from train_file_cases import batch, expect_as_in_memory, opened
from trainable_cases import D, optimizer_of, table_of

import engram_kernels as ek
from engram_kernels.ops import _op
from engram_kernels.table.held_tables import HeldTable

pytestmark = pytest.mark.usefixtures("compiled")

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {support!r})
from train_file_cases import batch, opened
import engram_kernels as ek
table, optimizer = opened(Path({folder!r}))
optimizer.me = optimizer
optimizer.step(*batch(0))
{more}
"""
MEM = """
mem = ek.TrainableRows(table, optimizer)
ids, grads = batch(1)
(mem.wait(mem.submit(ids)) * grads).sum().backward()
mem.step()
mem.submit(ids)
"""


@pytest.mark.parametrize(("more", "steps", "code"), [("", 1, 0), (MEM, 2, 0), ("raise SystemExit(3)", 1, 3)])
def test_a_script_that_ends_without_close_loses_nothing(tmp_path, more, steps, code):
    support = os.path.dirname(sys.modules["train_file_cases"].__file__)
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(support=support, folder=str(tmp_path), more=more)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert not (tmp_path / "rows.safetensors.journal").exists()
    table, optimizer = opened(tmp_path)
    assert optimizer.num_steps == steps
    expect_as_in_memory(table, optimizer)
    optimizer.close()


def in_child(function):
    """Starts a fork that calls it and stays until it is told; (end it, which gives its exit code)."""
    told, tell = os.pipe()
    done, say = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(tell)
            function()
            code = 0
        finally:
            os.write(say, b"x")
            os.read(told, 1)
            os._exit(code)
    os.close(told)
    os.read(done, 1)

    def end():
        os.close(tell)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return end


def test_a_forked_child_neither_writes_nor_keeps_the_lock(tmp_path):
    table, optimizer = opened(tmp_path)
    optimizer.step(*batch(0))
    journal = (tmp_path / "rows.safetensors.journal").read_bytes()

    def child():
        with pytest.raises(RuntimeError, match="it was made before a fork"):
            optimizer.step(*batch(1))
        optimizer.close()
        optimizer.__del__()

    end = in_child(child)
    assert (tmp_path / "rows.safetensors.journal").read_bytes() == journal
    with pytest.raises(OSError, match="has it open for training"):
        HeldTable("second", None, tmp_path / "rows.safetensors")
    optimizer.step(*batch(1))
    for fd in (optimizer.file._held.fd, optimizer.file._state_fd):  # as the system does it where the trainer is killed
        os.dup2(os.open(os.devnull, os.O_RDONLY), fd)
    held, state = optimizer.file._held, optimizer.file._state_held
    optimizer.file._writers.clear()
    optimizer.file._readers = ()
    optimizer.file.moments.clear()
    optimizer.file.stored.clear()
    held.fd = state.fd = optimizer.file._state_fd = -1
    optimizer.file.abandon()
    table, optimizer = opened(tmp_path)  # while the child lives
    expect_as_in_memory(table, optimizer)
    assert optimizer.num_steps == 2 and end() == 0
    optimizer.close()


def test_a_forked_child_trains_its_own_copy_of_memory():
    table = table_of()
    with ek.TrainableRows(table, optimizer_of(table)) as mem:
        def child():
            torch.set_num_threads(1)
            mem.optimizer.step(torch.tensor([1]), torch.ones(1, D))
            assert mem.optimizer.num_steps == 1
        assert in_child(child)() == 0
        assert mem.optimizer.num_steps == 0


def test_a_link_and_another_directory_are_the_same_table(tmp_path, monkeypatch):
    opened(tmp_path)[1].close()
    (tmp_path / "link").mkdir()
    os.symlink(tmp_path / "rows.safetensors", tmp_path / "link" / "other.safetensors")
    monkeypatch.chdir(tmp_path / "link")
    table = ek.RowTable.open("other.safetensors")
    monkeypatch.chdir(tmp_path)
    optimizer = ek.RowOptimizer(table, "adam", lr=0.05, first_moment="bf16", seed=5, state="state.safetensors")
    monkeypatch.chdir("/")
    optimizer.step(*batch(0))
    assert (tmp_path / "rows.safetensors.journal").exists() and not list((tmp_path / "link").glob("*.journal"))
    with pytest.warns(UserWarning, match="journal of steps"):
        ek.RowTable.open(tmp_path / "link" / "other.safetensors")
    optimizer.close()
    with pytest.raises(RuntimeError, match="it is closed; make another one"):
        optimizer.step(*batch(1))
    assert optimizer.file.io in ("io_uring", "pwrite") and optimizer.file.stats()["writes"] > 0
    assert not (tmp_path / "rows.safetensors.journal").exists()


def test_norm_and_step_with_gradients_that_are_not_finite():
    table = table_of()
    optimizer = optimizer_of(table, nonfinite="skip")
    ids, grads = torch.tensor([1, -1, 2]), torch.ones(3, D)
    grads[1] = float("inf")  # of no row
    assert optimizer.norm(ids, grads).isfinite()
    grads[2, 3] = float("inf")
    before = table.rows.clone()
    assert optimizer.norm(ids, grads).isnan()
    optimizer.step(ids, grads)
    optimizer.step(ids, torch.ones(3, D), grad_scale=float("nan"))
    optimizer.step(ids, torch.ones(3, D), grad_scale=torch.tensor(float("inf")))
    assert optimizer.skipped_steps == 3 and optimizer.num_steps == 0 and torch.equal(table.rows, before)


def test_an_interrupted_close_leaves_the_table_held(monkeypatch):
    table = table_of()
    mem = ek.TrainableRows(table, optimizer_of(table))
    mem.wait(mem.submit(torch.tensor([1]))).sum().backward()
    mem.step()
    thread = mem._engine._thread
    with monkeypatch.context() as patch:
        def interrupted(*_):
            raise KeyboardInterrupt
        patch.setattr(thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mem.close()
    with pytest.raises(ValueError, match="held by a TrainableRows"):
        ek.row_update(table, torch.tensor([1]), torch.ones(1, D), "sgd", lr=0.1)
    with pytest.raises(RuntimeError, match="it is closed"):
        mem.step()
    mem.close()
    assert not thread.is_alive() and mem.optimizer.num_steps == 1
    ek.row_update(table, torch.tensor([1]), torch.ones(1, D), "sgd", lr=0.1)


@pytest.mark.parametrize("num_ids", [8, _op._LARGE_BYTES // D // 4])
def test_large_outputs_without_memory_are_left_alone(num_ids):
    """What a mode makes has no address: however large it is, the op writes that."""
    table, ids = table_of(), torch.zeros(num_ids, dtype=torch.int64)

    def gather(ids):
        return ek.gather_rows(table, ids, torch.float32)
    traced = make_fx(gather, tracing_mode="fake", _allow_non_fake_inputs=True)(ids)
    assert torch.ops.engram_kernels.gather_rows.out in [node.target for node in traced.graph.nodes]
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert gather(ids).shape == (num_ids, D)
    assert torch.equal(traced(ids), gather(ids))
