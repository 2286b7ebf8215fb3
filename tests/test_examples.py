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


def output_of(name, *arguments):
    """What an example prints."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    return subprocess.run([sys.executable, ROOT / "examples" / name, *arguments], capture_output=True, text=True, env=env,
                          check=True, timeout=300).stdout


def test_serve_serves_every_request(compiled):
    out = output_of("serve.py", "5")
    assert re.search(r"5 requests, \d+ tokens in \d+ steps: \d+ tokens per second", out)
    assert re.search(r"exposed wait for rows: \d+ us per step, [\d.]+% of the time", out)


def test_speculative_decoding_says_the_same_in_fewer_steps():
    out = output_of("speculative.py")
    plain, drafted = map(int, re.search(r"plain: (\d+) steps; with 3 drafts: (\d+) steps", out).groups())
    assert "same tokens" in out and drafted < plain


def test_train_and_generate_recites_the_text(compiled):
    out = output_of("train_and_generate.py")
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 3 and losses[-1] < 0.05
    assert out.endswith("ows are hashed, fetched and gated into the hidden state.\n")


@pytest.mark.slow
def test_train_text_learns_more_with_a_memory(compiled):
    out = output_of("train_text.py", "60")
    losses = [tuple(map(float, pair)) for pair in re.findall(r"loss ([\d.]+) without a memory, ([\d.]+) with one", out)]
    assert len(losses) == 5 and abs(losses[0][0] - losses[0][1]) < 0.1
    assert losses[-1][1] < losses[-1][0] - 0.05 < losses[0][0] - 1
