"""What frameworks do to a module: they replace its parameters, move it, convert it, differentiate it, wrap its projection.

The measure is always the module itself: with the tensors that the framework put in place, or a straight loop.
"""
import copy

import pytest
import torch
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from module_cases import CU, VARIANTS, H, M, make_layer, make_spec, token_map_of
from torch import nn

from engram_kernels import Engram, RowTable, gather_rows, ngram_hash


def tenfold(layer):
    """What the layer computes with ten times its rows, by a layer that was made with them."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.rows.mul_(10)
    return other


class Times(nn.Module):
    def forward(self, rows):
        return 10 * rows


def by_assignment(layer):
    layer.rows = nn.Parameter(10 * layer.rows.detach())


def by_parametrize(layer):
    torch.nn.utils.parametrize.register_parametrization(layer, "rows", Times())


def by_prune(layer):
    torch.nn.utils.prune.custom_from_mask(layer, "rows", torch.full_like(layer.rows, 10))


def by_data(layer):
    layer.rows.data = 10 * layer.rows.data


def by_load(layer):
    layer.load_state_dict({**layer.state_dict(), "rows": 10 * layer.rows.detach()}, assign=True)


def by_accelerate(layer):
    from accelerate.utils import set_module_tensor_to_device
    set_module_tensor_to_device(layer, "rows", "cpu", value=10 * layer.rows.detach())


def by_vector(layer):
    with torch.no_grad():
        nn.utils.vector_to_parameters(10 * nn.utils.parameters_to_vector([layer.rows]), [layer.rows])


@pytest.mark.parametrize("replace", [by_assignment, by_parametrize, by_prune, by_data, by_load, by_accelerate, by_vector])
@pytest.mark.parametrize("compiled", [False, True])
def test_engram_reads_the_rows_that_it_has(replace, compiled):
    if replace is by_accelerate:
        pytest.importorskip("accelerate")
    layer, ids, hidden = make_layer("deepseek_v41", trained_rows=True)
    table = layer.table  # a table that was taken before follows too
    want = tenfold(layer)
    replace(layer)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    assert torch.equal(run(hidden, ids, CU), want(hidden, ids, CU))
    for got in (table, layer.table):
        assert torch.equal(gather_rows(got, torch.arange(5), torch.float32), want.rows[:5])


def test_engram_rows_minimal():
    """Rows of ones, key 0, value the row, hidden 0: the gate of score 0 is sigmoid(sqrt(1e-6)) = 0.50025."""
    spec = make_spec("deepseek_v41", branches=1)
    layer = Engram(spec, 1, table=RowTable.from_tensor(nn.Parameter(torch.ones(spec.layout().num_rows[0], 32)),
                                                       row_format="f32"), dtype=torch.float32)
    with torch.no_grad():
        layer.wkv.weight.zero_()
        layer.wkv.weight[H:, :H] = torch.eye(H)
    ask = dict(hidden=torch.zeros(1, 1, H), row_ids=torch.zeros(1, spec.num_columns, dtype=torch.int32))
    assert layer(**ask).flatten()[0].item() == pytest.approx(0.50025, abs=1e-6)
    layer.rows = nn.Parameter(torch.full_like(layer.rows, 10))
    assert layer(**ask).flatten()[0].item() == pytest.approx(5.0025, abs=1e-5)


def test_engram_functional_call_and_ensembles():
    layer, ids, hidden = make_layer("deepseek_v41", trained_rows=True)
    got = torch.func.functional_call(layer, {"rows": 10 * layer.rows.detach()}, (hidden, ids, CU))
    assert torch.equal(got, tenfold(layer)(hidden, ids, CU))
    layers = [copy.deepcopy(layer), tenfold(layer), tenfold(tenfold(layer))]
    params, buffers = torch.func.stack_module_state(layers)
    for backend in ("auto", "reference"):
        def run(p, b, backend=backend):
            return torch.func.functional_call(layer, (p, b), (hidden, ids, CU), dict(backend=backend))
        together = torch.vmap(run)(params, buffers)
        for out, each in zip(together, layers, strict=True):
            torch.testing.assert_close(out, each(hidden, ids, CU))
    torch.vmap(run)(params, buffers).square().sum().backward()  # the parameters are leaves outside of vmap
    assert all(p.grad.isfinite().all() and p.grad.any() for p in params.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_engram_gradients_of_torch_func(variant):
    """grad, per-sample gradients, a Jacobian: those of loss.backward(), in a loop."""
    layer, ids, hidden = make_layer(variant, trained_rows=True)
    cu, params = torch.tensor([0, 5], dtype=torch.int32), dict(layer.named_parameters())
    hiddens, tokens = hidden[:20].view(4, 5, M, H), ids[:20].view(4, 5)

    def loss(p, h, i, **options):
        return torch.func.functional_call(layer, p, (h, i, cu), options).square().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, hiddens, tokens)
    for k in range(4):
        layer.zero_grad()
        loss(params, hiddens[k], tokens[k]).backward()
        for backend in ("auto", "reference"):
            got = torch.func.grad(loss)(params, hiddens[k], tokens[k], backend=backend)
            for name, p in layer.named_parameters():
                least = 1e-5 * float(p.grad.abs().max())  # of the largest: the gate's root is steep where a score is near 0
                torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=least)
                torch.testing.assert_close(each[name][k], p.grad, rtol=1e-4, atol=least)
    jacobians = [torch.func.jacrev(lambda h, backend=backend: layer(h, ids[:5], cu, backend=backend).sum((1, 2)))(hidden[:5])
                 for backend in ("auto", "reference")]
    torch.testing.assert_close(*jacobians, rtol=1e-4, atol=1e-4)


def test_engram_says_which_backend_has_it():
    layer, ids, hidden = make_layer("deepseek_v41", trained_rows=True)
    with pytest.raises(NotImplementedError, match="forward-mode derivative; use backend='reference'"):
        torch.func.jvp(lambda h: layer(h, ids, CU), (hidden,), (hidden,))
    _, tangent = torch.func.jvp(lambda h: layer(h, ids, CU, backend="reference"), (hidden,), (hidden,))
    assert tangent.isfinite().all() and tangent.any()
    params, cu = dict(layer.named_parameters()), torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="reference' looks at its ids.* backend 'auto' takes them"):
        torch.vmap(lambda i: torch.func.functional_call(layer, params, (hidden[:5], i, cu), dict(backend="reference")))(
            ids[:20].view(4, 5))
    with pytest.raises(ValueError, match="hidden is torch.float64, but no backend computes in float64"):
        copy.deepcopy(layer).double()(hidden.double(), ids, CU)
    meta = [x.to("meta") for x in (hidden, ids, CU)]
    elsewhere = copy.deepcopy(layer).to("meta")
    out = elsewhere(*meta)
    out.sum().backward()
    assert out.is_meta and out.shape == hidden.shape and elsewhere.rows.grad.is_meta
    with pytest.raises(NotImplementedError, match="reference' looks at its ids.* meta device .* backend 'auto' takes them"):
        elsewhere(*meta, backend="reference")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("module_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained_rows", [False, True])
def test_engram_autocast_keeps_the_residual_stream(variant, module_dtype, trained_rows):
    """float32 in, float32 out; the projection is an nn.Linear's under autocast, and gradients have their parameters' dtype."""
    layer, ids, hidden = make_layer(variant, dtype=module_dtype, trained_rows=trained_rows)
    hidden = hidden.float()
    want = copy.deepcopy(layer).float()(hidden, ids, CU)
    seen = []
    layer.wkv.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(hidden, ids, CU)
        plain = nn.Linear(2, 2, dtype=module_dtype)(torch.zeros(1, 2))
        rows = gather_rows(layer.table, ngram_hash(ids, CU, layer.layout)[0], torch.float32)
        given = layer(hidden, rows=rows, cu_seqlens=CU)  # gathered before, in the dtype of hidden
    assert out.dtype == torch.float32 and seen[0] == (torch.bfloat16, plain.dtype) and torch.equal(out, given)
    torch.testing.assert_close(out, want, rtol=0.05, atol=0.05)
    out.square().sum().backward()
    for p in layer.parameters():
        assert p.grad.dtype == p.dtype and p.grad.isfinite().all() and p.grad.any()


def test_engram_hidden_of_a_wrong_dtype():
    layer, ids, hidden = make_layer("deepseek_v41")
    with pytest.raises(ValueError, match="hidden must be torch.float32, the dtype of wkv.weight, .*; got torch.float16"):
        layer(hidden.half(), ids, CU)
    layer.wkv.bfloat16()  # norm weights in float32 beside a projection in bfloat16
    assert layer(hidden.bfloat16(), ids, CU).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
def test_engram_with_a_quantized_projection(variant):
    layer, ids, hidden = make_layer(variant, trained_rows=True)
    quantized = torch.ao.quantization.quantize_dynamic(nn.ModuleDict({"memory": layer}), {nn.Linear})["memory"]
    assert not isinstance(quantized.wkv, nn.Linear)
    out = quantized(hidden, ids, CU)
    exact = layer(hidden, ids, CU)
    assert not torch.equal(out, exact)
    # int8 weights and activations: 2^-7 of the largest of each, over 768 products of random sign
    torch.testing.assert_close(out, exact, rtol=0.05, atol=0.05 * exact.abs().max().item())


class LowRank(nn.Module):
    """What LoRA puts in the place of a Linear: no `weight`, its own dtype."""

    def __init__(self, base):
        super().__init__()
        self.base, self.a = base.requires_grad_(False), nn.Parameter(torch.randn(2, base.in_features) * 0.1)
        self.b = nn.Parameter(torch.randn(base.out_features, 2) * 0.1)

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


def test_engram_with_an_adapted_projection():
    layer, ids, hidden = make_layer("deepseek_v41", trained_rows=True)
    merged = copy.deepcopy(layer)
    layer.wkv = LowRank(layer.wkv)
    with torch.no_grad():
        merged.wkv.weight += layer.wkv.b @ layer.wkv.a
    torch.testing.assert_close(layer(hidden, ids, CU), merged(hidden, ids, CU), rtol=1e-4, atol=1e-4)
    layer(hidden, ids, CU).sum().backward()
    assert layer.wkv.a.grad.any() and layer.wkv.base.weight.grad is None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(hidden, ids, CU).dtype == torch.float32


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_engram_offloaded_by_accelerate(variant, offload, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    layer, ids, hidden = make_layer(variant, trained_rows=True)
    with torch.no_grad():
        want = layer(hidden, ids, CU)
        if offload == "cpu":
            accelerate.cpu_offload(layer, execution_device="cpu")
        else:
            accelerate.disk_offload(layer, tmp_path, execution_device="cpu")
        assert layer.rows.is_meta and layer.wkv.weight.is_meta
        for _ in range(2):
            assert torch.equal(layer(hidden, ids, CU), want)


def test_engram_loaded_by_accelerate_into_an_empty_module(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    layer, ids, hidden = make_layer("demo_v1", trained_rows=True)
    accelerate.Accelerator(cpu=True).save_model(layer, tmp_path)
    for buffers in (False, True):
        with accelerate.init_empty_weights(include_buffers=buffers):
            empty = make_layer("demo_v1", trained_rows=True)[0]
        assert empty.wkv.weight.is_meta
        accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path), device_map={"": "cpu"})
        assert torch.equal(empty(hidden, ids, CU), layer(hidden, ids, CU))


def test_engram_shows_itself():
    layer = make_layer("demo_v1", trained_rows=True)[0]
    text = repr(layer)
    for part in ("spec='demo_v1'", "layer_id=1", f"hidden_size={H}", f"branches={M}", "trained rows [", "token_map=None"):
        assert part in text
    spec = make_spec("deepseek_v41")
    token_map = token_map_of()
    text = repr(Engram(spec, 1, table=make_layer("deepseek_v41")[0].table, token_map=token_map))
    assert "layer_id=1," in text and "table=RowTable(" in text and "token_map=500 ids to 400" in text


def test_engram_refuses_what_is_no_table():
    spec = make_spec("deepseek_v41")
    for table, message in ((torch.zeros(2, 2), "table is a Tensor, expected a RowTable; make one of it: RowTable.from_tensor"),
                           (nn.Parameter(torch.zeros(2, 2)), "table is a Parameter, .*from_tensor"),
                           (nn.Embedding(2, 2), "table is a Embedding, .*embedding.weight"),
                           ("rows.safetensors", r"table is a str, .*RowTable.open\(path\)"), (3, "table is a int, expected")):
        with pytest.raises(TypeError, match=message):
            Engram(spec, 1, table=table)
    with pytest.raises(TypeError, match="token_map is a dict, expected a TokenMap"):
        Engram(spec, 1, token_map={})
    layer = make_layer("deepseek_v41", trained_rows=True)[0]
    for rows, error, message in ((nn.Parameter(torch.zeros(9, 32)), ValueError, r"rows has shape \[9, 32\] now, expected"),
                                 (nn.Parameter(torch.zeros(1774, 31)), ValueError, r"rows has shape \[1774, 31\] now"),
                                 (None, TypeError, "rows is NoneType now")):
        layer.rows = rows
        with pytest.raises(error, match=message):
            _ = layer.table.rows


def test_engram_takes_another_table():
    layer, ids, hidden = make_layer("deepseek_v41", trained_rows=True)
    fixed = RowTable.from_tensor(10 * layer.rows.detach(), row_format="f32")
    want = tenfold(layer)(hidden, ids, CU)
    layer.table = fixed
    assert layer.table is fixed and "rows" not in dict(layer.named_parameters()) and torch.equal(layer(hidden, ids, CU), want)
    layer.table = RowTable.from_tensor(nn.Parameter(fixed.rows.clone()), row_format="f32")
    assert "rows" in dict(layer.named_parameters()) and torch.equal(layer(hidden, ids, CU), want)
    with pytest.raises(ValueError, match="the table has 9 rows, layer 1 needs 1774"):
        layer.table = RowTable.from_tensor(torch.zeros(9, 32), row_format="f32")
