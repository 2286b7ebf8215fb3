"""Benchmarks run on one thread unless they say otherwise: ratios between contenders then mean the kernels, not the pools."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # harness and workloads
import harness


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, benchmarks, output_json):
    """What the machine's memory did in this run: the table divides by it."""
    output_json["peak_bytes_per_s"] = harness.peak_bytes_per_s()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
