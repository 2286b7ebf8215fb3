"""Processes that share tables, for the tests: each runs the lines that it is sent."""
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

_LOOP = """
import gc, os, signal, sys, time, torch
from engram_kernels.memory import shared_segment, shared_table
from engram_kernels.memory.row_table import RowTable
from engram_kernels.ops.gather_rows import gather_rows
shm = sys.argv[1]
torch.set_num_threads(1)
for line in sys.stdin:
    try:
        code = line.rstrip().replace("\\\\n", "\\n")
        try:
            answer = repr(eval(code))
        except SyntaxError:
            exec(code)
            answer = "done"
    except Exception as err:
        answer = f"{type(err).__name__}: {err}".replace("\\n", " ")
    print(answer, flush=True)
"""


class Worker:
    """A process that evaluates or executes one line at a time."""

    def __init__(self, directory):
        self.process = subprocess.Popen([sys.executable, "-c", _LOOP, str(directory)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)

    def send(self, code):
        """Starts a line."""
        self.process.stdin.write(code.replace("\n", "\\n") + "\n")
        self.process.stdin.flush()

    def answer(self):
        """What the last line gave; "" where the process is gone."""
        return self.process.stdout.readline().rstrip("\n")

    def do(self, code):
        """Runs a line: its value as text, "done" for statements, or the exception."""
        self.send(code)
        return self.answer()

    def kill(self):
        """SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self):
        """Ends as a program does."""
        self.process.stdin.close()
        assert self.process.wait(60) == 0


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
        started.process.kill()
        started.process.wait()
        started.process.stdin.close()
        started.process.stdout.close()
