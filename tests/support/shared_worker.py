"""Processes that share tables, for the tests: each runs the lines that it is sent."""
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import weakref
from pathlib import Path

import pytest
import torch

from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.table import shared_segment, shared_table
from engram_kernels.table.row_table import RowTable

# forked from a process that has done the imports and nothing else
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["torch", "engram_kernels.table.row_table", "engram_kernels.ops.gather_rows"])
_NAMES = {"RowTable": RowTable, "gather_rows": gather_rows, "gc": gc, "os": os, "shared_segment": shared_segment,
          "shared_table": shared_table, "signal": signal, "sys": sys, "time": time, "torch": torch, "weakref": weakref}


def _answer_lines(connection, directory):
    gc.freeze()  # what the imports made: a collection takes long with it, and lines that are sent ask for many
    torch.set_num_threads(1)
    names = dict(_NAMES, shm=str(directory))
    while (code := connection.recv()) is not None:
        try:
            try:
                answer = repr(eval(code, names))
            except SyntaxError:
                exec(code, names)
                answer = "done"
        except Exception as err:
            answer = f"{type(err).__name__}: {err}"
        connection.send(answer)
    names.clear()
    gc.collect()


class Worker:
    """A process that evaluates or executes what it is sent."""

    def __init__(self, directory):
        self._connection, theirs = _PROCESSES.Pipe()
        self.process = _PROCESSES.Process(target=_answer_lines, args=(theirs, directory), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, code):
        """Starts it."""
        self._connection.send(code)

    def answer(self):
        """What it gave: the value as text, "done" for statements, or the exception; "" where the process is gone."""
        try:
            return self._connection.recv() if self._connection.poll(120) else "no answer"
        except (EOFError, ConnectionError):
            return ""

    def do(self, code):
        """Runs it and waits."""
        self.send(code)
        return self.answer()

    def exit_code(self):
        """Waits for its end."""
        self.process.join(60)
        return self.process.exitcode

    def kill(self):
        """SIGKILL."""
        self.process.kill()
        self.process.join()

    def end(self):
        """Drops its tables and ends."""
        self._connection.send(None)
        assert self.exit_code() == 0

    def close(self):
        """At the end of a test, whatever state it is in."""
        self.kill()
        self._connection.close()


@pytest.fixture
def shm():
    """A directory of its own in memory; what is left in it fails the test."""
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no /dev/shm here")
    directory = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="engram-test-"))
    yield directory
    left = sorted(os.listdir(directory))
    for name in left:
        os.unlink(directory / name) if not (directory / name).is_dir() else os.rmdir(directory / name)
    os.rmdir(directory)
    assert left == []


@pytest.fixture
def worker(shm):
    """Starts processes; those that are left are killed at the end."""
    workers = []

    def start():
        workers.append(Worker(shm))
        return workers[-1]
    yield start
    for started in workers:
        started.close()
