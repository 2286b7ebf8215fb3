"""What training loops do to a module: checkpointing, accumulation, optimizers, checkpoints in files, hooks, averaging."""
import copy

import pytest
import torch
import torch.distributed.checkpoint
from module_cases import CU, make_layer, make_spec
from torch import nn
from torch.utils.checkpoint import checkpoint

from engram_kernels import Engram, RowTable


def gradients(layer, run):
    layer.zero_grad()
    run().square().sum().backward()
    return [p.grad.clone() for p in layer.parameters()]


def test_engram_under_checkpointing_hooks_and_accumulation():
    layer, ids, hidden = make_layer("demo_v1", trained_rows=True)
    want = gradients(layer, lambda: layer(hidden, ids, CU))
    hidden.requires_grad_()
    for reentrant in (True, False):
        got = gradients(layer, lambda r=reentrant: checkpoint(layer, hidden, ids, CU, use_reentrant=r))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    seen = []
    layer.register_full_backward_hook(lambda *args: seen.append(1))
    layer(hidden, ids, CU).square().sum().backward()  # on top of those of the last run
    torch.testing.assert_close([p.grad for p in layer.parameters()], [2 * g for g in want], rtol=1e-4, atol=1e-4)
    assert seen == [1]


@pytest.mark.parametrize("options", [dict(foreach=True), dict(fused=True)])
def test_engram_with_optimizers(options):
    layer, ids, hidden = make_layer("demo_v1", trained_rows=True)
    before = [p.detach().clone() for p in layer.parameters()]
    layer(hidden, ids, CU).sum().backward()
    norm = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    torch.optim.AdamW(layer.parameters(), **options).step()
    assert norm.isfinite() and all(not torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True))


def by_safetensors(layer, other, folder):
    from safetensors.torch import load_model, save_model
    save_model(layer, folder / "model")
    load_model(other, folder / "model")


def by_distributed_checkpoint(layer, other, folder):
    torch.distributed.checkpoint.save({"m": layer.state_dict()}, checkpoint_id=folder, no_dist=True)
    state = {"m": other.state_dict()}
    torch.distributed.checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    other.load_state_dict(state["m"])


def by_averaging(layer, other, folder):
    average = torch.optim.swa_utils.AveragedModel(layer)
    average.update_parameters(layer)
    other.load_state_dict(average.module.state_dict(), strict=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("through", [by_safetensors, by_distributed_checkpoint, by_averaging])
def test_engram_state_goes_through(through, tmp_path):
    layer, ids, hidden = make_layer("demo_v1", trained_rows=True)
    other = copy.deepcopy(layer)
    for p in other.parameters():
        nn.init.zeros_(p)
    through(layer, other, tmp_path)
    assert torch.equal(other(hidden, ids, CU), layer(hidden, ids, CU))


def test_engram_skip_init_data_parallel_and_strict_loading():
    layer, ids, hidden = make_layer("demo_v1", trained_rows=True)
    spec = make_spec("demo_v1")
    table = RowTable.from_tensor(nn.Parameter(torch.zeros_like(layer.rows)), row_format="f32")
    empty = nn.utils.skip_init(Engram, spec, 1, table=table, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="Missing key.*rows"):
        empty.load_state_dict({name: x for name, x in layer.state_dict().items() if name != "rows"})
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(nn.DataParallel(empty)(hidden, ids, CU), layer(hidden, ids, CU))


def test_two_layers_compile_with_dynamic_shapes():
    layers = nn.ModuleList([make_layer("demo_v1", trained_rows=True)[0] for _ in range(2)])
    _, ids, hidden = make_layer("demo_v1")

    def run(h, i, cu):
        for layer in layers:
            h = h + layer(h, i, cu)
        return h

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for x in (hidden, ids):
        torch._dynamo.mark_dynamic(x, 0)
    want = gradients(layers, lambda: run(hidden, ids, CU))
    torch.testing.assert_close(gradients(layers, lambda: compiled(hidden, ids, CU)), want, rtol=1e-4, atol=1e-4)
    fewer = (hidden[:11], ids[:11], torch.tensor([0, 4, 9, 11], dtype=torch.int32))
    torch.testing.assert_close(compiled(*fewer), run(*fewer))
