"""The prefetcher's torch ops in compiled graphs: the fetch stays hidden, no graph knows a prefetcher or its dtype by heart."""
import os
import subprocess
import sys
import warnings

import pytest
import torch
from prefetch_cases import TIMEOUT_S, Tables, make_ids
from torch._dynamo.testing import CompileCounter

from engram_kernels import RowPrefetcher, gather_rows

pytestmark = pytest.mark.usefixtures("compiled")
OPS = torch.ops.engram_kernels


@pytest.fixture
def tables(tmp_path, monkeypatch):
    return Tables(tmp_path, monkeypatch)


def made_by(pf):
    return pf.row_dim, pf.out_dtype, pf.device


def rows_first(x, rows):
    return rows.float(), x


def rows_last(x, rows):
    return x, rows.float()


def rows_added(x, rows):
    return x + rows.float(), x


def order_of_calls(run):
    """The calls of a run, in the order in which they began: submit, mm, wait."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = {"engram_kernels::prefetch_submit": "submit", "engram_kernels::prefetch_wait": "wait", "aten::mm": "mm"}
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return [names[event.name] for event in events if event.name in names]


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("result", [rows_first, rows_last, rows_added])
def test_prefetch_inductor_keeps_the_compute_between_submit_and_wait(result, with_grad, tables):
    """It moved the submit down to its wait, or the wait up to its submit, and the fetch hid behind nothing."""
    table, ids = tables.make("host"), make_ids(64)
    with RowPrefetcher(table, out_dtype=torch.float32) as pf:
        made_for = made_by(pf)

        def step(x, ids, handle):
            x = torch.sin(x @ x / 64)
            ids = ids + 0 * x[0, 0].int()  # so that the submit has no reason to come first
            ticket = OPS.prefetch_submit(ids, handle)
            for _ in range(3):
                x = torch.sin(x @ x / 64)
            return result(x, OPS.prefetch_wait(ticket, ids, handle, *made_for, after=x))

        torch.manual_seed(0)
        x = torch.randn(64, 64, requires_grad=with_grad)
        compiled = torch.compile(step, fullgraph=True, backend="inductor")
        of_compiled, of_eager = ([t.float() for t in run(x, ids, pf.handle)] for run in (compiled, step))
        torch.testing.assert_close(of_compiled, of_eager)
        assert order_of_calls(lambda: compiled(x, ids, pf.handle)) == ["mm", "submit", "mm", "mm", "mm", "wait"]
        if with_grad:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # that an op has no derivative
                grads = [torch.autograd.grad(sum(t.sum() for t in out if t.requires_grad), x)[0]
                         for out in (of_compiled, of_eager)]
            torch.testing.assert_close(*grads)


@pytest.mark.parametrize("with_grad", [False, True])
def test_prefetch_inductor_keeps_a_submit_behind_the_wait_before(with_grad, tables):
    """Two steps in one graph: the second submit overtook the first wait, and found a queue of depth 1 full."""
    table, ids = tables.make("host"), make_ids(64, num_rows=2000)
    with RowPrefetcher(table, depth=1, out_dtype=torch.float32) as pf:
        def steps(x, ids, handle):
            rows = None
            for i in range(2):
                ticket = OPS.prefetch_submit(ids + i, handle, after=rows)
                x = torch.sin(x @ x / 64)
                rows = OPS.prefetch_wait(ticket, ids + i, handle, *made_by(pf), after=x)
                x = x / 2 + rows
            return x

        torch.manual_seed(0)
        x = torch.randn(64, 64, requires_grad=with_grad)
        compiled = torch.compile(steps, fullgraph=True, backend="inductor")
        torch.testing.assert_close(compiled(x, ids, pf.handle), steps(x, ids, pf.handle))
        assert order_of_calls(lambda: compiled(x, ids, pf.handle)) == 2 * ["submit", "mm", "wait"]


def test_prefetch_a_prefetcher_per_epoch_costs_no_graph(tables):
    table, counter = tables.make("host"), CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def step(ids, handle):
        return OPS.prefetch_wait(OPS.prefetch_submit(ids, handle), ids, handle, 64, torch.float32, torch.device("cpu")) * 2

    for seed in range(12):
        with RowPrefetcher(table, out_dtype=torch.float32) as pf:
            ids = make_ids(30, seed=seed)
            torch.testing.assert_close(step(ids, pf.handle), 2 * gather_rows(table, ids, torch.float32))
    assert counter.frame_count == 1


def test_prefetch_op_refuses_what_the_prefetcher_does_not_make(tables):
    with RowPrefetcher(tables.make("host")) as pf:
        ids = make_ids(5)
        ticket = OPS.prefetch_submit(ids, pf.handle)
        row_dim, out_dtype, device = made_by(pf)
        for wrong, message in (((32, out_dtype, device), "row_dim is 32, that of the prefetcher is 64"),
                               ((row_dim, torch.float32, device), "out_dtype is torch.float32, that of the prefetcher is torch"),
                               ((row_dim, out_dtype, torch.device("meta")), "device is meta, that of the prefetcher is cpu")):
            with pytest.raises(ValueError, match=f"prefetch_wait: {message}"):
                OPS.prefetch_wait(ticket, ids, pf.handle, *wrong)
        torch.testing.assert_close(pf.wait(int(ticket), timeout_s=TIMEOUT_S), gather_rows(pf.table, ids), rtol=0, atol=0)


CACHED = """
import sys; sys.path[:0] = [sys.argv[1]]
import torch
from prefetch_cases import make_ids
from engram_kernels import RowPrefetcher, RowTable, gather_rows
dtype, dim = getattr(torch, sys.argv[2]), int(sys.argv[3])
table, ids = RowTable.from_tensor(torch.randn(3000, dim), row_format="f32"), make_ids(50)
pf = RowPrefetcher(table, out_dtype=dtype)
@torch.compile(fullgraph=True)
def step(ids, handle):
    rows = torch.ops.engram_kernels.prefetch_wait(torch.ops.engram_kernels.prefetch_submit(ids, handle), ids, handle, dim, dtype,
                                                  torch.device("cpu"))
    return rows.float() * 2
assert torch.equal(step(ids, pf.handle), gather_rows(table, ids, dtype).float() * 2)
"""


def test_prefetch_cached_graphs_know_dtype_and_width(tmp_path):
    """Inductor keeps compiled graphs on disk: the next run, with another dtype, got the old one."""
    support = os.path.join(os.path.dirname(__file__), "../support")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    for dtype, dim in (("float32", 64), ("bfloat16", 64), ("float32", 32)):
        run = subprocess.run([sys.executable, "-c", CACHED, support, dtype, str(dim)], env=environment, capture_output=True,
                             text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-2000:]
