"""The examples run, and give the same on every backend."""
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engram_kernels import backends

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "examples/plain_model.py"


@pytest.fixture
def example():
    made = importlib.util.spec_from_file_location("plain_model", PATH)
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module


def run(example, name, device):
    model = example.build(name, device)
    tokens = torch.arange(3, 12, dtype=torch.int32, device=device)
    bounds = torch.tensor([0, 5, 9], dtype=torch.int32, device=device)
    loss = model(tokens, bounds).square().sum()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        return [model(tokens, bounds), *grads]


@pytest.mark.parametrize("name", [name for name in ("cpu", "cuda", "triton") if all(
    name in backends.available(op) for op in ("ngram_hash", "gather_rows", "gate"))])
def test_plain_model_is_the_same_on_every_backend(name, example):
    device = "cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda"
    for got, want in zip(run(example, name, device), run(example, "reference", device), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_plain_model_swaps_one_line():
    assert len(re.findall(r"^BACKEND = ", PATH.read_text(), re.M)) == 1


def test_plain_model_runs_as_a_script():
    env = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run([sys.executable, PATH, "reference"], capture_output=True, text=True, env=env, check=True)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 5 and losses[-1] < losses[0] and "logits of the last token" in done.stdout


def test_plain_model_puts_its_layout_on_the_device(example):
    assert example.build("auto", "meta").layout.moduli.device.type == "meta"


def test_hf_generate_says_the_same_with_its_rows_in_a_file():
    env = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run([sys.executable, ROOT / "examples/hf_generate.py"], capture_output=True, text=True, env=env, check=True)
    sizes = [float(size) for size in re.findall(r"([\d.]+) MiB of parameters", done.stdout)]
    assert done.stdout.endswith("the same tokens from both\n") and len(sizes) == 2
    rows = 16 * 20_000 * 8 * 2 / 2**20  # 16 heads of 20,000 rows of 8 bfloat16 values
    assert 0 <= sizes[0] - sizes[1] - rows < 0.1
