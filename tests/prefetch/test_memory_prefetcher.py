"""MemoryPrefetcher: one submit for all layers of a model, one wait in each; every tier, training, compiled, faults."""
import os

import pytest
import torch
from module_cases import CU, H, M, T, make_layer, make_spec
from torch import nn

from engram_kernels import Engram, MemoryPrefetcher, MemoryState, RowOptimizer, RowTable, gather_rows
from engram_kernels.prefetch.errors import PrefetchQueueFull

pytestmark = pytest.mark.usefixtures("compiled")


def model_of(tier, tmp_path, variant="deepseek_v41", shared=False):
    """Two layers; each with a table of its own in that tier, or one for both."""
    spec = make_spec(variant)
    first, ids, hidden = make_layer(variant, spec=spec)
    layers, num_rows = [], max(spec.layout().num_rows)
    for layer_id in spec.layer_ids:
        layer = Engram(spec, layer_id, dtype=torch.float32)
        layer.load_state_dict(first.state_dict())
        if shared and layers:
            layer.table = layers[0].table
        else:
            rows = torch.randn(num_rows, spec.row_dim, generator=torch.Generator().manual_seed(layer_id))
            layer.table = table_in(tier, rows, tmp_path / f"{layer_id}.safetensors")
        layers.append(layer)
    return nn.ModuleList(layers), ids, hidden


def table_in(tier, rows, path):
    if tier == "trained":
        return RowTable.from_tensor(nn.Parameter(rows), row_format="f32")
    if tier == "file":
        return RowTable.create(path, rows, row_format="f32")
    table = RowTable.from_tensor(rows, row_format="f32")
    return table.share(f"{path.parent.name}-{os.getpid()}-{path.stem}") if tier == "shared" else table


TIERS = ("host", "shared", "file", "trained")


@pytest.mark.parametrize("shared", [False, True], ids=["own_tables", "one_table"])
@pytest.mark.parametrize("tier", TIERS)
def test_memory_prefetcher_gives_each_layer_its_rows(tier, shared, tmp_path):
    model, ids, hidden = model_of(tier, tmp_path, shared=shared)
    with MemoryPrefetcher(model) as prefetcher, torch.no_grad():
        tickets = [prefetcher.submit(ids, CU), prefetcher.submit(ids.flip(0), CU)]
        for ticket, tokens in zip(tickets, (ids, ids.flip(0)), strict=True):
            for layer in model:
                got = layer(hidden, rows=prefetcher.wait(layer, ticket))
                assert torch.equal(got, layer(hidden, tokens, CU))
        assert list(prefetcher.stats()) == list(prefetcher.layer_ids) and len(prefetcher._made) == (1 if shared else 2)


def test_memory_prefetcher_trains_rows_as_gather_rows_does(tmp_path):
    """With a change of the table between the steps."""
    model, ids, hidden = model_of("trained", tmp_path)
    grads = []
    with MemoryPrefetcher(model) as prefetcher:
        for fetched in (True, False):
            for _ in range(2):
                model.zero_grad()
                ticket, out = prefetcher.submit(ids, CU), hidden
                for layer in model:
                    rows = prefetcher.wait(layer, ticket)
                    out = layer(out, rows=rows) if fetched else layer(out, ids, CU)
                out.square().mean().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and model[0].rows.grad.any()


def test_memory_prefetcher_gives_sparse_gradients_where_the_module_does():
    """They were dense: of the size of the table, and refused by the RowOptimizer that such a module is made for."""
    spec = make_spec("deepseek_v41")
    layer, hidden = Engram(spec, 1, dtype=torch.float32, train_table=True), torch.randn(T, M, H)
    ids, grads = torch.randint(0, 400, (T,)), []
    with MemoryPrefetcher(layer) as prefetcher:
        for fetched in (True, False):
            rows = dict(rows=prefetcher.wait(layer, prefetcher.submit(ids, CU)))
            rows = rows if fetched else dict(token_ids=ids, cu_seqlens=CU)
            layer(hidden, **rows).square().sum().backward()
            grads.append(layer.rows.grad)
            layer.zero_grad()
    assert grads[0].layout == torch.sparse_coo
    got, want = (grad.coalesce() for grad in grads)
    assert torch.equal(got.indices(), want.indices()) and torch.equal(got.values(), want.values())
    layer.rows.grad = grads[0]
    RowOptimizer(layer.table).step()


def test_memory_prefetcher_rows_that_are_not_trained_carry_no_gradient(tmp_path):
    model, ids, _ = model_of("host", tmp_path)
    with MemoryPrefetcher(model) as prefetcher:
        assert not prefetcher.wait(model[0], prefetcher.submit(ids, CU)).requires_grad
    model, ids, _ = model_of("trained", tmp_path)
    with MemoryPrefetcher(model) as prefetcher:
        ticket = prefetcher.submit(ids, CU)
        assert prefetcher.wait(model[0], ticket).requires_grad
        with torch.no_grad():
            assert not prefetcher.wait(model[1], ticket).requires_grad


def test_memory_prefetcher_serves_a_memory_state(tmp_path):
    model, ids, hidden = model_of("file", tmp_path, "demo_v1")
    state, slots = MemoryState(model, 2, max_drafts=1, token_dtype=torch.int32), torch.tensor([1, 0])
    twin = MemoryState(model, 2, max_drafts=1, token_dtype=torch.int32)
    with MemoryPrefetcher(model) as prefetcher, torch.no_grad():
        for at in range(0, 8, 4):
            tokens = ids[at:at + 4].view(2, 2)
            ticket = prefetcher.submit(row_ids=state.prefill(tokens.flatten(), torch.tensor([0, 2, 4]).int(), slots))
            twin.prefill(tokens.flatten(), torch.tensor([0, 2, 4]).int(), slots)
            for layer in model:
                got = layer(hidden[:4], **state.arguments(layer, rows=prefetcher.wait(layer, ticket)))
                assert torch.equal(got, layer(hidden[:4], **twin.arguments(layer)))


@pytest.mark.parametrize("tier", ["host", "trained"])
def test_memory_prefetcher_in_a_compiled_graph(tier, tmp_path):
    model, ids, hidden = model_of(tier, tmp_path)
    with MemoryPrefetcher(model) as prefetcher:
        def step(hidden, ids):
            ticket = prefetcher.submit(ids, CU)
            for layer in model:
                hidden = torch.sin(hidden)
                hidden = layer(hidden, rows=prefetcher.wait(layer, ticket, after=hidden))
            return hidden

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        results = []
        for run in (compiled, step):
            model.zero_grad()
            out = run(hidden, ids)
            out.square().mean().backward()
            results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_memory_prefetcher_full_queue_starts_nothing(tmp_path):
    model, ids, _ = model_of("host", tmp_path)
    with MemoryPrefetcher(model, depth=1) as prefetcher:
        ticket = prefetcher.submit(ids, CU)
        prefetcher.wait(model[0], ticket)  # the second layer is still full
        with pytest.raises(PrefetchQueueFull):
            prefetcher.submit(ids, CU)
        prefetcher.wait(model[1], ticket)
        prefetcher.cancel(prefetcher.submit(ids, CU))
        again = prefetcher.submit(ids, CU)
        assert all(prefetcher.wait(layer, again).shape == (len(ids), 24, 32) for layer in model)


def test_memory_prefetcher_error_of_a_layer_leaves_the_others_whole(tmp_path):
    model = model_of("host", tmp_path)[0]
    with MemoryPrefetcher(model) as prefetcher:
        rows = torch.zeros(2, 3, 24, dtype=torch.int32)
        rows[0, 1, 5] = 10**6
        ticket = prefetcher.submit(row_ids=rows)
        with pytest.raises(IndexError, match="1000000") as raised:
            prefetcher.wait(model[0], ticket)
        assert getattr(raised.value, "__notes__", [f"layer {model[0].layer_id}"])[0].endswith(f"layer {model[0].layer_id}")
        assert torch.equal(prefetcher.wait(model[1], ticket), gather_rows(model[1].table, rows[1], torch.float32))
        with pytest.raises(KeyError):
            prefetcher.wait(model[1], ticket)


def test_memory_prefetcher_rejects(tmp_path):
    model, ids, _ = model_of("host", tmp_path)
    with MemoryPrefetcher(model) as prefetcher:
        for bad, message in ((dict(), "got none"), (dict(token_ids=ids, row_ids=ids), "got both"),
                             (dict(token_ids=ids), "cu_seqlens is None"), (dict(row_ids=ids), "row_ids must have shape")):
            with pytest.raises(ValueError, match=message):
                prefetcher.submit(**bad)
        with pytest.raises(ValueError, match="layer is 77, expected one of"):
            prefetcher.wait(77, prefetcher.submit(ids, CU))
        with pytest.raises(TypeError, match="layer is a Linear, expected a memory module or its layer id"):
            prefetcher.wait(torch.nn.Linear(1, 1), None)
        with pytest.raises(TypeError, match="ticket is a NoneType, expected what submit returned"):
            prefetcher.wait(model[0], None)
    with pytest.raises(RuntimeError, match="after close"):
        prefetcher.submit(ids, CU)
    model[1].table = None
    with pytest.raises(ValueError, match=f"layer {model[1].layer_id} has no table"):
        MemoryPrefetcher(model)
    with pytest.raises(TypeError, match="layers is an EngramSpec"):
        MemoryPrefetcher(model[0].spec)
