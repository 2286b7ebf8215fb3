"""How Triton kernels are launched: no compilation for another number of tokens, warm-up, launch parameters, refusals."""
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton_sim import MISSING_TRITON

import engram_kernels as ek
from engram_kernels import backends
from engram_kernels.ops.gate import gate
from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.ops.ngram_hash import ngram_hash
from engram_kernels.ops.short_conv import short_conv
from engram_kernels.spec import EngramSpec
from engram_kernels.testing import random_rows
from engram_kernels.triton_runtime import dispatch

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(bool(MISSING_TRITON), reason=MISSING_TRITON)


def launch_all(num_tokens):
    """Every launch function at this many tokens, as the wrappers do it."""
    from engram_kernels.triton_runtime.warmup import calls
    return calls(EngramSpec.deepseek_v41(), num_tokens, torch.bfloat16, torch.bfloat16, True)


@needs_triton
def test_triton_compiles_nothing_for_other_token_counts():
    from engram_kernels.triton_runtime import launch
    from engram_kernels.triton_runtime.warmup import spec_variants
    warm = set(spec_variants(EngramSpec.deepseek_v41(), "sm_90", backward=True))
    for num_tokens in (1, 2, 3, 16, 63, 64, 65, 100, 128, 1000, 4096, 8191, 65536, 300_001):
        for call in launch_all(num_tokens):
            found = set(launch.variants_of(call, "sm_90"))
            assert found <= warm, num_tokens
            # a launch runs where its first tensor is, and a table may be in pinned host memory
            assert all(variant.kernel.arg_names[0] not in ("rows", "scales") for variant in found)


@needs_triton
@pytest.mark.parametrize("variant", ["deepseek_v41", "demo_v1"])
def test_triton_warmup_compiles_what_the_module_launches(variant, monkeypatch):
    """Forward, with and without gradients, and backward of `Engram` at 1 to 65 tokens launch nothing that warmup lacks."""
    if not dispatch.INTERPRETED:
        pytest.skip("needs the interpreter's tensors on the CPU")
    from engram_kernels.triton_runtime import launch
    from engram_kernels.triton_runtime.warmup import spec_variants
    preset = EngramSpec.deepseek_v41 if variant == "deepseek_v41" else EngramSpec.demo_v1
    spec = preset(hidden_size=64, branches=2, table_sizes=(40,) * (preset().max_order - 1), head_dim=32)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)  # as on a GPU, which looks at no data
    warm, found = set(spec_variants(spec, "sm_90", torch.bfloat16, torch.bfloat16, True)), {}
    rows, scales = random_rows(spec.row_format, spec.layout().num_rows[0], 32, torch.Generator().manual_seed(0))
    table = ek.RowTable.from_tensor(rows, scales, spec.row_format, row_dim=32)
    layer = ek.Engram(spec, spec.layer_ids[0], table=table, dtype=torch.bfloat16)

    def step(num_tokens, dead):
        hidden = torch.zeros(num_tokens, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        ids = torch.zeros(num_tokens, dtype=torch.int64 if num_tokens % 2 else torch.int32)
        bounds = torch.tensor([0, num_tokens], dtype=torch.int32)
        with torch.no_grad():
            layer(hidden, ids, bounds, dead_mask=dead, backend="triton")
        rows = torch.zeros(num_tokens, spec.num_columns, 32, dtype=torch.bfloat16)
        layer(hidden, rows=rows, cu_seqlens=bounds, dead_mask=dead, backend="triton").sum().backward()
    with launch.executing_on(lambda variant, grid, args: found.setdefault(variant), "sm_90"):
        for num_tokens in (*range(1, 66), 128, 1000):
            step(num_tokens, None)
            step(num_tokens, torch.zeros(num_tokens, dtype=torch.bool))
    kernels = {made.kernel.__name__ for made in found}
    assert kernels >= {"ngram_hash_kernel", "gather_rows_kernel", "gate_kernel", "gate_bwd_kernel", "gate_weights_bwd_kernel"}
    assert not found.keys() - warm, [(made.kernel.__name__, *made[1:]) for made in found.keys() - warm]
    # the tokens make a small and a large batch of each; other kernels here have no more than these
    assert len(found) <= 2 * 2 * len(kernels)


@needs_triton
def test_triton_variants_do_not_depend_on_values_addresses_or_row_count():
    from engram_kernels.triton_kernels.gather_rows import gather_rows as run
    from engram_kernels.triton_runtime import launch
    found = set()
    for num_rows in (1, 7, 16, 4096):
        rows = torch.zeros(num_rows, 64, dtype=torch.bfloat16)
        for ids in (torch.zeros(5, dtype=torch.int64), torch.ones(48, dtype=torch.int64)):
            def call(rows=rows, ids=ids):
                run(rows, None, ids, "bf16", 64, False, torch.bfloat16)
            found |= set(launch.variants_of(call, "sm_90"))
    assert len(found) == 1


@needs_triton
def test_triton_caches_what_it_compiled(monkeypatch):
    """A second launch of a variant looks it up; the compiled kernel is given addresses and plain numbers."""
    from engram_kernels.triton_runtime import launch
    calls = []

    class Stub:
        def __getitem__(self, grid):
            return lambda *args: calls.append((grid, args))
    compiled = []
    monkeypatch.setattr(launch.Variant, "compile", lambda self, target: compiled.append(self) or Stub())
    monkeypatch.setattr(launch, "current_target", lambda: None)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # as tensors on the CPU say
    x, kernel = torch.zeros(32), SimpleNamespace(fn="kernel")
    for count in (1, 2, 3):
        launch.launch(kernel, (count, 1, 1), (x, None), (count, 0.5), (8,), 4)
    assert [(grid[0], args) for grid, args in calls] == [(n, (x.data_ptr(), 0, n, 0.5, 8)) for n in (1, 2, 3)]
    variant, = compiled
    assert variant.types == ("*fp32", launch.ABSENT, "i64", "fp32") and variant[3:] == ((8,), 4, True)
    launch.launch(kernel, (1, 1, 1), (x[1:], None), (1, 0.5), (8,), 4)
    launch.launch(kernel, (1, 1, 1), (x.half(), None), (1, 0.5), (8,), 4)
    launch.launch(kernel, (1, 1, 1), (x, x), (1, 0.5), (8,), 4)
    launch.launch(kernel, (1, 1, 1), (x, None), (1, 0.5), (9,), 4)
    assert len(compiled) == 5
    launch.compiled_for(variant, 1)
    assert len(compiled) == 6  # a module is loaded on one device


@needs_triton
def test_triton_errors_are_counted_once_and_cleared(monkeypatch):
    from engram_kernels.triton_runtime import launch
    counter = torch.tensor([3], dtype=torch.int32)
    monkeypatch.setattr(launch, "_errors", {("gather_rows", torch.device("cuda", 1)): counter})
    with pytest.raises(IndexError, match="gather_rows: 3 bad values .* on cuda:1"):
        backends.check_errors()
    backends.check_errors()
    assert counter.item() == 3  # never cleared: what a kernel adds meanwhile is not lost
    counter += 2
    with pytest.raises(IndexError, match="gather_rows: 2 bad values .* on cuda:1"):
        backends.check_errors()


@needs_triton
def test_triton_errors_counted_in_inference_mode_are_cleared_outside(monkeypatch):
    from engram_kernels.triton_runtime import launch
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **kwargs: zeros(*size, **kwargs))  # there is no GPU
    monkeypatch.setattr(launch, "_errors", {})
    with torch.inference_mode():
        counter = launch.error_counter("gather_rows", torch.device("cuda", 0))
        counter += 2
    assert launch.error_counter("gather_rows", torch.device("cuda", 0)) is counter
    assert launch.take_errors() == [("gather_rows", 0, 2)] and launch.take_errors() == []


@needs_triton
def test_triton_recording_a_thread_leaves_the_launches_of_others_alone():
    """`warmup` of one model, or a simulation, while another thread serves."""
    if not dispatch.INTERPRETED:
        pytest.skip("needs the interpreter")
    from engram_kernels.triton_runtime import launch, tuning
    table, ids = ek.RowTable.from_tensor(torch.ones(4, 8), row_format="f32"), torch.tensor([0, 1])
    recorded, served = [], []

    def serve():
        served.append(gather_rows(table, ids, torch.float32, backend="triton"))
        served.append(tuning.parameters("gather_rows", torch.device("cpu"), "large"))
    with launch.executing_on(lambda *made: recorded.append(made), "sm_90"):
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
        assert not recorded
        gather_rows(table, ids, torch.float32, backend="triton")
    assert len(recorded) == 1 and torch.equal(served[0], torch.ones(2, 8))
    assert served[1] == tuning.parameters("gather_rows", torch.device("cpu"), "large")


@pytest.fixture
def user_table(tmp_path, monkeypatch):
    from engram_kernels.triton_runtime import tuning
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    tuning.user_table.cache_clear()
    tuning._parameters.cache_clear()
    yield tuning
    monkeypatch.undo()
    tuning.user_table.cache_clear()
    tuning._parameters.cache_clear()


@needs_triton
def test_triton_parameters_of_a_kernel_that_is_gone_are_passed_over(user_table):
    path = user_table.user_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": 1, "parameters": {"engram_forward": {"sm_90": {"large": {"tokens": 64}}},
                                                             "gather_rows": {"cpu": {"small": {"tile": 512}}}}}))
    user_table.user_table.cache_clear()
    assert user_table.parameters("gather_rows", torch.device("cpu"), "small")["tile"] == 512


def test_triton_tune_writes_the_fastest_and_it_is_used(user_table):
    device = torch.device("cpu")
    before = dict(user_table.parameters("gather_rows", device, "small"))

    def time_us():
        chosen = user_table.parameters("gather_rows", device, "small")
        if chosen["num_warps"] == 8:
            raise RuntimeError("out of resources")
        return abs(chosen["tile"] - 2048) + chosen["num_warps"]
    assert user_table.tune("gather_rows", device, "small", time_us) == {"tile": 2048, "num_warps": 2}
    assert user_table.parameters("gather_rows", device, "small") == {"tile": 2048, "num_warps": 2} != before
    content = json.loads(user_table.user_file().read_text())
    assert content == {"version": 1, "parameters": {"gather_rows": {"cpu": {"small": {"tile": 2048, "num_warps": 2}}}}}
    with pytest.raises(ValueError, match="no candidate for gate runs on cpu"):
        user_table.tune("gate", device, "small", lambda: (_ for _ in ()).throw(RuntimeError))


@needs_triton
def test_triton_tune_times_what_will_run(user_table, monkeypatch):
    """A parameter that only the target's table sets stays while candidates are timed, and afterwards."""
    monkeypatch.setattr(user_table, "target_name", lambda device: "sm_100")
    timed = []

    def time_us():
        timed.append(user_table.parameters("gate_bwd", torch.device("cpu"), "large"))
        return timed[-1]["programs"]
    user_table.tune("gate_bwd", torch.device("cpu"), "large", time_us)
    assert {chosen["held"] for chosen in timed} == {40} != {user_table.DEFAULTS["gate_bwd"]["large"]["held"]}
    assert user_table.parameters("gate_bwd", torch.device("cpu"), "large") == timed[0]


@needs_triton
def test_triton_user_table_that_is_no_file(user_table, monkeypatch):
    user_table.user_file().mkdir(parents=True)
    with pytest.raises(ValueError, match="triton.json: cannot be read: Is a directory; mend it, or set XDG_CONFIG_HOME"):
        user_table.user_table()
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    assert user_table.user_table() == {}


@needs_triton
@pytest.mark.parametrize("text, words", [
    ("{", "Expecting"), ('{"version": 2, "parameters": {}}', "version is 2"), ("[]", "delete it or tune again"),
    ('{"version": 1, "parameters": {"gate": {"sm_90": {"huge": {}}}}}', "gate/huge"),
    ('{"version": 1, "parameters": {"gate": {"sm_90": {"small": {"num_warps": 3}}}}}', "num_warps is 3")])
def test_triton_broken_user_table_is_refused(text, words, user_table):
    user_table.user_file().parent.mkdir(parents=True)
    user_table.user_file().write_text(text)
    with pytest.raises(ValueError, match=words):
        user_table.parameters("gate", torch.device("cpu"), "small")


def test_triton_package_refuses_the_other_name():
    run = subprocess.run([sys.executable, "-c", "import triton_kernels"], capture_output=True, text=True,
                         env=dict(os.environ, PYTHONPATH=str(ROOT / "python/engram_kernels")))
    assert "import engram_kernels.triton_kernels instead" in run.stderr


def test_triton_missing_is_said(monkeypatch):
    monkeypatch.setattr(dispatch, "INSTALLED", False)
    assert dispatch.why_not("gate") == "Triton is not installed: pip install 'engram-kernels[triton]'"
    assert dispatch.why_not("no_such_op") is not None


NO_INTERPRETER = """
import torch, engram_kernels as ek
table = ek.RowTable.from_tensor(torch.randn(4, 8), row_format="f32")
try:
    ek.gather_rows(table, torch.tensor([1]), backend="triton")
except RuntimeError as err:
    print(err)
"""


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_without_a_gpu_and_without_the_interpreter_is_refused():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", NO_INTERPRETER], capture_output=True, text=True,
                         env=env | {"PYTHONPATH": str(ROOT / "python")})
    assert run.stdout.startswith("gather_rows: backend 'triton' is not available: the kernels are loaded, but torch finds no")


@pytest.mark.parametrize("capability, words", [((7, 5), "need sm_80 or later; the GPU is sm_75"), ((9, 0), None)])
def test_triton_unsupported_target_is_said(capability, words, monkeypatch):
    dispatch.why_not_on.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    said = dispatch.why_not_on(0)
    dispatch.why_not_on.cache_clear()
    assert said is None if words is None else words in said


@needs_triton
def test_triton_gradients_compile_and_opcheck():
    if not dispatch.INTERPRETED:
        pytest.skip("needs the interpreter")
    ops = torch.ops.engram_kernels_triton
    rows, _ = random_rows("bf16", 9, 32, torch.Generator().manual_seed(0))
    ids = torch.randint(-1, 9, (4, 3), generator=torch.Generator().manual_seed(1))
    options = ("bf16", 32, False, torch.float32)
    torch.library.opcheck(ops.gather_rows.default, (rows.requires_grad_(), None, ids, *options))
    torch.library.opcheck(ops.gather_rows.out, (rows.detach(), None, ids, *options), {"out": torch.empty(4, 3, 32)})
    shapes = ((3, 2, 40), (3, 2, 40), (3, 40), (2, 40), (2, 40))
    inputs = [torch.randn(s, generator=torch.Generator().manual_seed(2)) for s in shapes]
    mask = torch.tensor([False, True, False])
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.library.opcheck(ops.gate.default, (*leaves, mask, 1e-6, 1e-6, "copysign", True))
    fused = torch.compile(lambda *x: gate(*x, mask, backend="triton") * 2, fullgraph=True)
    got = torch.autograd.grad(fused(*leaves).sum(), leaves)
    want = torch.autograd.grad((gate(*leaves, mask, backend="reference") * 2).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_triton
def test_triton_decode_step_compiles():
    if not dispatch.INTERPRETED:
        pytest.skip("needs the interpreter")
    x, weight, norm_weight = torch.randn(2, 1, 8), torch.randn(1, 8, 3), torch.ones(1, 8)
    bounds, positions, ring = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([5, 0]), torch.randn(2, 4, 1, 8)

    def step(x, state):
        return short_conv(x * 2, weight, norm_weight, bounds, 2, 1e-5, state, positions, backend="triton") + 1
    eager, compiled = ring.clone(), ring.clone()
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(x, compiled), step(x, eager))
    assert torch.equal(eager, compiled) and not torch.equal(eager, ring)
    op = torch.ops.engram_kernels_triton.short_conv_update
    with pytest.raises(RuntimeError, match="has no derivative"):
        op(x.requires_grad_(), weight, norm_weight, bounds, positions, 2, 1e-5, ring)


@needs_triton
def test_triton_refuses_overlap_and_gradients_of_out():
    if not dispatch.INTERPRETED:
        pytest.skip("needs the interpreter")
    buffer, inputs = torch.zeros(4, 2, 8), [torch.randn(3, 2, 8), torch.randn(3, 8), torch.randn(2, 8), torch.randn(2, 8)]
    with pytest.raises(ValueError, match="out shares memory with hidden, without being it"):
        gate(buffer[:3], *inputs, out=buffer[1:], backend="triton")
    with pytest.raises(ValueError, match="out shares memory with key"):
        gate(torch.zeros(3, 2, 8), *inputs, out=inputs[0], backend="triton")
    from engram_kernels.table.row_table import RowTable
    rows = torch.zeros(6, 8)
    with pytest.raises(ValueError, match="out shares memory with rows"):
        gather_rows(RowTable.from_tensor(rows, row_format="f32"), torch.tensor([0, 1]), torch.float32, out=rows[2:4],
                    backend="triton")
    layout = EngramSpec.deepseek_v41().layout()
    with pytest.raises(IndexError, match=r"token_ids\[1\] is -5"):
        ngram_hash(torch.tensor([3, -5]), torch.tensor([0, 2], dtype=torch.int32), layout, backend="triton")


def test_triton_kernels_use_what_the_oldest_triton_has():
    """pyproject says triton>=3.5: tests/golden/triton_3_5_language.txt is dir(triton.language) of 3.5.0."""
    oldest = set((ROOT / "tests/golden/triton_3_5_language.txt").read_text().split())
    sources = [path.read_text() for path in (ROOT / "triton_kernels").glob("*.py")]
    used = {name for text in sources for name in re.findall(r"\btl\.(\w+)", text)}
    assert len(used) > 20 and used - oldest == set()


@needs_triton
def test_triton_tune_ops_tries_every_candidate_that_fits(user_table):
    """On the interpreter, with a clock that likes many warps and finds the most of them too many."""
    if not dispatch.INTERPRETED:
        pytest.skip("needs the interpreter")
    from triton.runtime.errors import OutOfResources

    from engram_kernels.triton_runtime import tune
    spec = EngramSpec.demo_v1(hidden_size=64, branches=1, head_dim=4)
    device, tried = torch.device("cpu"), []

    def time_us(call):
        chosen = dict(user_table.parameters("gate", device, "small"))
        tried.append(chosen)
        if not tried[1:]:
            call()  # runs
        if chosen["num_warps"] == 16:
            raise RuntimeError("out of resources")
        return 100 - chosen["num_warps"] + chosen["programs"] / 1024
    results = list(tune.tune_ops(spec, ["gate"], device, num_rows=64, time_us=time_us))
    assert [r[:2] for r in results] == [("gate", "small"), ("gate", "large")]
    assert len(tried) == 2 * len(user_table.CANDIDATES["gate"])
    assert results[0][2] == {"programs": 128, "num_warps": 8} == user_table.parameters("gate", device, "small")

    def too_large():
        raise OutOfResources(1, 0, "shared memory")
    with pytest.raises(RuntimeError, match="shared memory"):
        tune.time_on_gpu(too_large)
    with pytest.raises(ValueError, match="no launch parameters for gat;"):
        next(tune.tune_ops(spec, ["gat"], device))
    calls = tune.typical_calls(spec, 3, device, 64)
    assert set(calls) == set(user_table.CANDIDATES)
    for call in calls.values():
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_tune_without_a_gpu_says_so(capsys):
    from engram_kernels.cli.main import main
    assert main(["bench", "--tune", "gate"]) == 5
    assert "no GPU" in capsys.readouterr().err or MISSING_TRITON
