"""The module Engram: both variants against straight-line restatements of the published formulas, in float64."""
import math

import pytest
import torch
import torch.nn.functional as F

from engram_kernels import Engram, EngramSpec, RowTable, TokenMap, gather_rows, ngram_hash

H, M, T = 32, 3, 23
CU = torch.tensor([0, 9, 9, 23], dtype=torch.int32)


def make_spec(variant, **overrides):
    """A small model with the published hash: 24 or 16 columns of 32 elements, tables of a few hundred rows."""
    preset = {"deepseek_v41": EngramSpec.deepseek_v41, "demo_v1": EngramSpec.demo_v1}[variant]
    orders = {"deepseek_v41": 3, "demo_v1": 2}[variant]
    return preset(**{**dict(head_dim=32, table_sizes=(20,) * orders, vocab_size=500, num_classes=400, hidden_size=H, branches=M,
                            row_format="f32"), **overrides})


def make_layer(variant, dtype=torch.float32, trained_rows=False):
    torch.manual_seed(0)
    spec = make_spec(variant)
    rows = torch.randn(spec.layout().num_rows[0], spec.row_dim)
    table = RowTable.from_tensor(torch.nn.Parameter(rows) if trained_rows else rows, row_format="f32")
    layer = Engram(spec, spec.layer_ids[0], table=table, dtype=dtype)
    with torch.no_grad():
        for name in ("w_hidden", "w_key", *(("conv_norm",) if variant == "demo_v1" else ())):
            getattr(layer, name).add_(0.2 * torch.randn(M, H))
    ids = torch.randint(0, 400, (T,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    return layer, ids, torch.randn(T, M, H, dtype=dtype)


def restated(layer, hidden, rows):
    """The published forward, branch by branch; nothing of ours but the parameters."""
    spec, e, h = layer.spec, rows.double().flatten(1), hidden.double()
    weight = layer.wkv.weight.double()
    bias = torch.zeros(weight.shape[0], dtype=torch.float64) if layer.wkv.bias is None else layer.wkv.bias.double()
    projected = [F.linear(e, weight[m * H:(m + 1) * H], bias[m * H:(m + 1) * H]) for m in range(M + 1)]
    outs = []
    for m in range(M):
        key = F.rms_norm(projected[m], (H,), layer.w_key[m].double(), spec.gate_eps)
        query = F.rms_norm(h[:, m], (H,), layer.w_hidden[m].double(), spec.gate_eps)
        x = (key * query).sum(-1) / math.sqrt(H)
        score = torch.sigmoid(x.abs().clamp_min(1e-6).sqrt() * x.sign())[:, None]
        outs.append(score * projected[M])
    out = torch.stack(outs, dim=1)
    if spec.variant == "deepseek_v41":
        return h + out
    normed = torch.stack([F.rms_norm(out[:, m], (H,), layer.conv_norm[m].double(), spec.conv_eps) for m in range(M)], dim=1)
    pieces = []
    for begin, end in zip(CU[:-1].tolist(), CU[1:].tolist(), strict=True):
        line = F.pad(normed[begin:end].flatten(1).T, ((spec.conv_width - 1) * spec.conv_dilation, 0))
        pieces.append(F.conv1d(line, layer.conv_weight.double().view(M * H, 1, -1), dilation=spec.conv_dilation, groups=M * H).T
                      if end > begin else line.T[:0])
    return out + F.silu(torch.cat(pieces).view(T, M, H))


@pytest.mark.parametrize("variant", ["deepseek_v41", "demo_v1"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_engram_matches_published_formulas(variant, backend):
    layer, ids, hidden = make_layer(variant)
    row_ids = ngram_hash(ids, CU, layer.spec.layout())[0]
    rows = gather_rows(layer.table, row_ids, torch.float32)
    want = restated(layer, hidden, rows)
    for arguments in (dict(token_ids=ids), dict(row_ids=row_ids), dict(rows=rows), dict(rows=rows.flatten(1))):
        got = layer(hidden, cu_seqlens=CU, backend=backend, **arguments)
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)  # float32 sums of 768 products


@pytest.mark.parametrize("variant", ["deepseek_v41", "demo_v1"])
def test_engram_dead_tokens_pass(variant):
    layer, ids, hidden = make_layer(variant)
    dead = torch.zeros(T, dtype=torch.bool)
    dead[[0, 5, 22]] = True
    out = layer(hidden, ids, CU, dead_mask=dead)
    kept = hidden if variant == "deepseek_v41" else torch.zeros_like(hidden)
    torch.testing.assert_close(out[dead], kept[dead], rtol=0, atol=0)
    assert (out[~dead] != kept[~dead]).any(-1).all()


@pytest.mark.parametrize("variant", ["deepseek_v41", "demo_v1"])
def test_engram_chunks_with_history_and_state_equal_whole(variant):
    layer, ids, hidden = make_layer(variant)
    spec, one = layer.spec, torch.tensor([0, T], dtype=torch.int32)
    with torch.no_grad():
        whole = layer(hidden, ids, one)
        state = torch.full((1, (spec.conv_width - 1) * spec.conv_dilation, M, H), float("nan")) if spec.conv_width else None
        pieces = []
        for begin, end in ((0, 7), (7, 8), (8, T)):
            history = torch.tensor([[ids[begin - s] if begin >= s else -1 for s in range(1, spec.max_order)]], dtype=torch.int32)
            cu = torch.tensor([0, end - begin], dtype=torch.int32)
            positions = None if state is None else torch.tensor([begin], dtype=torch.int32)
            pieces.append(layer(hidden[begin:end], ids[begin:end], cu, history=history, state=state, positions=positions))
    # the projection is torch's, and its blocking may depend on the number of tokens
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["deepseek_v41", "demo_v1"])
def test_engram_trains(variant):
    layer, ids, hidden = make_layer(variant, trained_rows=True)
    assert {"rows", "wkv.weight", "w_hidden", "w_key"} <= set(dict(layer.named_parameters()))
    target = torch.randn(T, M, H, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(hidden, ids, CU) - target).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_engram_loads_published_names():
    demo, _, _ = make_layer("demo_v1")
    weights = {"value_proj.weight": torch.randn(H, 512), "value_proj.bias": torch.randn(H),
               "short_conv.conv.weight": torch.randn(M * H, 1, 4)}
    for m in range(M):
        weights |= {f"key_projs.{m}.weight": torch.randn(H, 512), f"key_projs.{m}.bias": torch.randn(H),
                    f"norm1.{m}.weight": torch.randn(H), f"norm2.{m}.weight": torch.randn(H),
                    f"short_conv.norms.{m}.weight": torch.randn(H)}
    demo.load_published({f"x.{k}": v for k, v in weights.items()}, prefix="x.")
    torch.testing.assert_close(demo.wkv.weight[M * H:], weights["value_proj.weight"])
    torch.testing.assert_close(demo.w_key[1], weights["norm1.1.weight"])
    torch.testing.assert_close(demo.w_hidden[2], weights["norm2.2.weight"])
    torch.testing.assert_close(demo.conv_weight.reshape(M * H, 1, 4), weights["short_conv.conv.weight"])
    v41, _, _ = make_layer("deepseek_v41")
    published = {"wkv.weight": torch.randn(4 * H, 768), "q_weight": torch.randn(M, H), "k_weight": torch.randn(M, H)}
    v41.load_published(published)
    torch.testing.assert_close(v41.w_hidden, published["q_weight"])
    with pytest.raises(KeyError, match="q_weight"):
        v41.load_published({"wkv.weight": published["wkv.weight"]})
    with pytest.raises(ValueError, match=r"w_key has shape \[3, 32\], the published one \[3, 31\]"):
        v41.load_published(published | {"k_weight": torch.randn(M, H - 1)})


def test_engram_rejects_what_does_not_belong():
    spec = make_spec("deepseek_v41")
    with pytest.raises(ValueError, match="variant 'none'"):
        Engram(EngramSpec.longcat(), 0)
    with pytest.raises(ValueError, match=r"layer_id is 2, expected one of \[1, 14\]"):
        Engram(spec, 2)
    with pytest.raises(ValueError, match="rows of 16, spec"):
        Engram(spec, 1, table=RowTable.from_tensor(torch.zeros(9, 16), row_format="f32"))
    with pytest.raises(ValueError, match=r"9 rows, layer 1 needs"):
        Engram(spec, 1, table=RowTable.from_tensor(torch.zeros(9, 32), row_format="f32"))
    with pytest.raises(ValueError, match="500 classes"):
        Engram(spec, 1, token_map=TokenMap(torch.arange(500, dtype=torch.int32), 500, "x"))
    layer, ids, hidden = make_layer("demo_v1")
    with pytest.raises(ValueError, match="exactly one of token_ids, row_ids and rows is wanted, got none"):
        layer(hidden)
    with pytest.raises(ValueError, match="cu_seqlens is None"):
        layer(hidden, ids)
    bare = Engram(spec, 1)
    with pytest.raises(ValueError, match="token_ids needs a table"):
        bare(hidden, ids, CU)
