"""Training of a table in a file by processes that are killed at any moment, meet a full disk, or come second."""
import multiprocessing
import os
import random
import resource
import signal
import time
import traceback

import pytest
import torch
from train_file_cases import batch, expect_as_in_memory, in_memory, opened

import engram_kernels as ek
from engram_kernels.training import step_journal

pytestmark = pytest.mark.usefixtures("compiled")


def serve(calls):
    """Runs each call in a fork of this process, which has started no thread; sends the child's number, and how it ended."""
    torch.set_num_threads(1)
    in_memory(1)  # imports what torch puts off until its first optimizer
    while True:
        function, *args = calls.recv()
        child = os.fork()
        if child == 0:
            try:
                function(*args)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        calls.send(child)
        calls.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.fixture(scope="module")
def children():
    """Makes children one after the other: start(function, ..) gives the number of one, end() how it ended."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(there,), daemon=True)
    server.start()

    class Children:
        def start(self, *call):
            here.send(call)
            assert here.poll(60)
            return here.recv()

        def end(self):
            assert here.poll(60)
            return here.recv()

    yield Children()
    server.kill()
    server.join()


def train_until_killed(folder):
    table, optimizer = opened(folder, journal_bytes=60_000, durable=False)
    with ek.TrainableRows(table, optimizer) as mem:
        while True:
            ids, grads = batch(optimizer.num_steps)
            (mem.wait(mem.submit(ids)) * grads).sum().backward()
            mem.step()
            mem.flush()
            (folder / "begun").touch()


def killed_rounds(children, folder, rounds, seed):
    """(steps after each kill; how many kills left records in the journal)"""
    draw, steps, unfinished = random.Random(seed), [], 0
    for _ in range(rounds):
        (folder / "begun").unlink(missing_ok=True)
        child, waits = children.start(train_until_killed, folder), draw.random() < 0.8
        while waits and not (folder / "begun").exists():  # the others are killed while they open the files
            time.sleep(0.001)
        time.sleep(draw.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        assert children.end() == -signal.SIGKILL
        journal = folder / "rows.safetensors.journal"
        unfinished += journal.exists() and journal.stat().st_size > step_journal.HEADER_BYTES
        table, optimizer = opened(folder)
        expect_as_in_memory(table, optimizer)
        steps.append(optimizer.num_steps)
        optimizer.file.abandon()  # the next one finds a journal, too
    return steps, unfinished


def test_a_killed_process_leaves_a_step_boundary(children, tmp_path):
    steps, unfinished = killed_rounds(children, tmp_path, 6, 1)
    assert steps == sorted(steps) and steps[-1] > 5 and unfinished > 2


@pytest.mark.slow
def test_many_killed_processes_leave_step_boundaries(children, tmp_path):
    unfinished = 0
    for seed in range(3):  # of a table that has few steps, whose expected rows are made quickly
        (tmp_path / str(seed)).mkdir()
        steps, of_these = killed_rounds(children, tmp_path / str(seed), 12, seed)
        assert steps == sorted(steps)
        unfinished += of_these
    assert unfinished > 18


def train_on_a_full_disk(folder):
    """Writes beyond a size fail, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    table, optimizer = opened(folder, journal_bytes=1 << 30)
    optimizer.step(*batch(0))
    size = os.path.getsize(folder / "rows.safetensors.journal")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match="step 2 cannot be journaled, so the table and its state are those of step 1"):
        optimizer.step(*batch(1))
    assert optimizer.num_steps == 1
    expect_as_in_memory(table, optimizer)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    optimizer.step(*batch(1))
    expect_as_in_memory(table, optimizer)
    optimizer.close()


def test_a_disk_too_full_for_the_journal_loses_nothing(children, tmp_path):
    children.start(train_on_a_full_disk, tmp_path)
    assert children.end() == 0
    table, optimizer = opened(tmp_path)
    assert optimizer.num_steps == 2
    expect_as_in_memory(table, optimizer)
    optimizer.close()


def expect_refused(folder):
    with pytest.raises(OSError, match="has it open for training"):
        opened(folder)


def test_one_process_trains_a_table(children, tmp_path):
    optimizer = opened(tmp_path)[1]
    expect_refused(tmp_path)
    children.start(expect_refused, tmp_path)
    assert children.end() == 0
    optimizer.close()
    opened(tmp_path)[1].close()
