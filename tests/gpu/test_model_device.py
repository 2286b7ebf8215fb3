"""What a user holds on a GPU: modules, examples, the few tokens of a decode step, capture at first use, threads with streams."""
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import engram_kernels as ek

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ROOT = Path(__file__).resolve().parents[2]
SPEC = dict(layer_ids=(0,), table_sizes=(400, 500), hidden_size=320, vocab_size=1000, num_classes=None, pad_class=None, heads=2,
            head_dim=32)


def make_layer(device, variant="demo_v1"):
    torch.manual_seed(0)
    extra = dict(conv_width=None, conv_dilation=None) if variant == "deepseek_v41" else {}
    spec = ek.EngramSpec.demo_v1(**SPEC, variant=variant, branches=2, **extra)
    layer = ek.Engram(spec, 0, dtype=torch.bfloat16)
    rows = torch.nn.Parameter(torch.randn(spec.layout().num_rows[0], 32).bfloat16() * 0.1)
    layer.table = ek.RowTable.from_tensor(rows)
    return layer.to(device)


def few_token_calls(device, tokens, size=5120, dtype=torch.bfloat16):
    """op -> its output; the inputs are the same on every device."""
    rand = torch.Generator().manual_seed(tokens)

    def randn(*shape):
        return torch.randn(*shape, generator=rand).to(device, dtype)
    hidden, key, value = randn(tokens, 4, size), randn(tokens, 4, size), randn(tokens, size)
    weights = randn(4, size), randn(4, size)
    columns = size // 64 if size % 64 == 0 else 1
    rows = randn(500, size // columns)
    row_format = {torch.bfloat16: "bf16", torch.float32: "f32"}[dtype]
    table = ek.RowTable.from_tensor(rows, row_format=row_format)
    ids = torch.randint(-1, 500, (tokens, columns), generator=rand).to(device)
    layout = ek.EngramSpec.deepseek_v41(vocab_size=5000, num_classes=5000, table_sizes=(1000,) * 3).layout().to(device)
    tokens_in = torch.randint(0, 5000, (tokens,), generator=rand).to(device)
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    conv, norm = randn(4, size, 4), randn(4, size)
    return {"ngram_hash": ek.ngram_hash(tokens_in, cu_seqlens, layout), "gather_rows": ek.gather_rows(table, ids, dtype),
            "gate": ek.gate(hidden, key, value, *weights), "gather_gate": ek.gather_gate(hidden, table, ids, *weights),
            "short_conv": ek.short_conv(hidden, conv, norm, cu_seqlens, 3)}


def assert_close(got, want):
    for op, x in got.items():
        if want[op].dtype == torch.int32:
            assert torch.equal(x.cpu(), want[op]), op
        else:
            torch.testing.assert_close(x.cpu().float(), want[op].float(), rtol=2**-7, atol=1e-2,
                                       msg=lambda m, op=op: f"{op}: {m}")


@pytest.mark.parametrize("tokens", [1, 2, 8, 33, 34, 66, 67])
def test_few_tokens_match_the_cpu(tokens):
    assert_close(few_token_calls("cuda", tokens), few_token_calls("cpu", tokens))
    ek.check_errors()


@pytest.mark.parametrize("size, dtype", [(323, torch.bfloat16), (5120, torch.float32), (20480, torch.bfloat16)])
def test_fallback_kernels_match_the_cpu(size, dtype):
    """Rows that no vector fits, and rows that registers do not hold."""
    assert_close(few_token_calls("cuda", 5, size, dtype), few_token_calls("cpu", 5, size, dtype))
    ek.check_errors()


@pytest.mark.parametrize("variant", ["demo_v1", "deepseek_v41"])
def test_engram_layer_trains_as_on_the_cpu(variant):
    def run(device):
        layer = make_layer(device, variant)
        tokens = torch.randint(0, 1000, (40,), generator=torch.Generator().manual_seed(1)).to(device)
        hidden = torch.randn(40, 2, 320, generator=torch.Generator().manual_seed(2)).to(device, torch.bfloat16).requires_grad_()
        out = layer(hidden, tokens, torch.tensor([0, 11, 40], dtype=torch.int32, device=device))
        out.float().square().sum().backward()
        return [x.detach().float().cpu() for x in (out, hidden.grad, *(p.grad for p in layer.parameters()))]
    for got, want in zip(run("cuda"), run("cpu"), strict=True):
        torch.testing.assert_close(got, want, rtol=2**-5, atol=2**-6 * want.abs().max().item())
    ek.check_errors()


@pytest.mark.parametrize("path", sorted(p.name for p in (ROOT / "examples").glob("*.py") if "cuda" in p.read_text()))
def test_examples_run(path):
    run = subprocess.run([sys.executable, ROOT / "examples" / path, "cuda"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]


FIRST_USE = """
import sys; sys.path[:0] = [{folder!r}]
import torch, engram_kernels as ek
table = ek.RowTable.from_tensor(torch.arange(640.0, device="cuda").view(10, 64).bfloat16())
ids = torch.tensor([3, 10, -1], device="cuda")
out = torch.empty(3, 64, device="cuda", dtype=torch.bfloat16)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):  # nothing has run before: kernels are loaded and counters made here
    ek.gather_rows(table, ids, out=out, backend={backend!r})
for _ in range(3):
    graph.replay()
torch.cuda.synchronize()
assert torch.equal(out[0], table.rows[3]) and out[1:].count_nonzero() == 0
try:
    ek.check_errors()
except IndexError as err:
    assert "3 bad values" in str(err), err  # one per replay: no replay forgets what an earlier one counted
else:
    raise SystemExit("a bad id inside a graph was not counted")
"""


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_first_use_inside_a_graph_capture(backend):
    code = FIRST_USE.format(folder=str(ROOT / "python"), backend=backend)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]


def test_two_threads_with_streams_of_their_own():
    """Other sizes take other amounts of shared memory: an attribute that each launch set used to fail the other's launch."""
    failed = []

    def work(tokens, size):
        want = few_token_calls("cpu", tokens, size)
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(30):
                    assert_close(few_token_calls("cuda", tokens, size), want)
        except BaseException as err:
            failed.append(err)
    threads = [threading.Thread(target=work, args=shape) for shape in ((7, 5120), (50, 1280), (3, 2560))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failed, failed
    ek.check_errors()
