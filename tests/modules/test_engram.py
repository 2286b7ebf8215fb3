"""The module Engram: each variant against straight-line restatements of the published formulas, in float64."""
import copy

import pytest
import torch
from module_cases import CU, VARIANTS, H, M, T, make_layer, make_spec, restated

from engram_kernels import Engram, EngramSpec, RowTable, TokenMap, gather_rows, ngram_hash


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_engram_matches_published_formulas(variant, backend):
    layer, ids, hidden = make_layer(variant)
    row_ids = ngram_hash(ids, CU, layer.spec.layout())[0]
    rows = gather_rows(layer.table, row_ids, torch.float32)
    want = restated(layer, hidden, rows)
    for arguments in (dict(token_ids=ids), dict(row_ids=row_ids), dict(rows=rows), dict(rows=rows.flatten(1))):
        got = layer(hidden, cu_seqlens=CU, backend=backend, **arguments)
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)  # float32 sums of 768 products


@pytest.mark.parametrize("variant", VARIANTS)
def test_engram_dead_tokens_pass(variant):
    layer, ids, hidden = make_layer(variant)
    dead = torch.zeros(T, dtype=torch.bool)
    dead[[0, 5, 22]] = True
    out = layer(hidden, ids, CU, dead_mask=dead)
    kept = hidden if variant == "deepseek_v41" else torch.zeros_like(hidden)
    torch.testing.assert_close(out[dead], kept[dead], rtol=0, atol=0)
    assert (out[~dead] != kept[~dead]).any(-1).all()


@pytest.mark.parametrize("variant", VARIANTS)
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


def test_engram_goes_back_over_rejected_drafts_in_a_pool_of_rings():
    layer, ids, hidden = make_layer("demo_v1")
    spec, cut = layer.spec, 7
    bad_ids = torch.cat([ids[:cut], ids[:2]])
    state = torch.full((4, (spec.conv_width - 1) * spec.conv_dilation + 2, M, H), float("nan"))
    ends, ring = torch.zeros(4, 2, dtype=torch.int64), torch.tensor([2])
    carried = dict(state=state, state_ends=ends, state_indices=ring)
    with torch.no_grad():
        whole = layer(hidden, ids, torch.tensor([0, T], dtype=torch.int32))
        drafted = torch.cat([hidden[:cut], hidden[:2] * 3])
        layer(drafted, bad_ids, torch.tensor([0, cut + 2], dtype=torch.int32), positions=torch.tensor([0]), **carried)
        history = ids[:cut].flip(0)[None, :spec.max_order - 1].contiguous()
        got = layer(hidden[cut:], ids[cut:], torch.tensor([0, T - cut], dtype=torch.int32), history=history,
                    positions=torch.tensor([cut]), **carried)
        torch.testing.assert_close(got, whole[cut:], rtol=1e-5, atol=1e-5)
        assert ends.tolist() == [[0, 0], [0, 0], [T, max(T, cut + 2)], [0, 0]] and state[[0, 1, 3]].isnan().all()
        with pytest.raises(ValueError, match=r"positions\[0\] is 5, .* before the furthest input, expected at most 2"):
            layer(hidden[5:], ids[5:], torch.tensor([0, T - 5], dtype=torch.int32), history=history, positions=torch.tensor([5]),
                  **carried)


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_engram_positions_without_history(compile_it):
    """A sequence with earlier tokens needs them to hash; one that begins does not."""
    layer, ids, hidden = make_layer("demo_v1")
    spec, cu = layer.spec, torch.tensor([0, 3, T], dtype=torch.int32)
    state = torch.zeros(2, (spec.conv_width - 1) * spec.conv_dilation, M, H)
    run = torch.compile(layer, backend="aot_eager") if compile_it else layer
    with torch.no_grad():
        torch.testing.assert_close(run(hidden, ids, cu, state=state, positions=torch.tensor([0, 0])), layer(hidden, ids, cu))
        message = r"history\[1, 0\] is -3" if compile_it else r"history is None, but positions\[1\] is 5"
        with pytest.raises(IndexError if compile_it else ValueError, match=message):
            run(hidden, ids, cu, state=state, positions=torch.tensor([0, 5]))


@pytest.mark.parametrize("variant", VARIANTS)
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_engram_dead_rows_reach_no_gradient(variant):
    """A dead token's rows may be anything, NaN too; all gradients are those of zeros in their place."""
    layer, ids, hidden = make_layer(variant)
    rows = gather_rows(layer.table, ngram_hash(ids, CU, layer.spec.layout())[0], torch.float32)
    dead = torch.zeros(T, dtype=torch.bool)
    dead[[2, 11]] = True
    grads = []
    for filler in (0.0, float("nan")):
        leaf = rows.masked_fill(dead[:, None, None], filler).requires_grad_()
        layer(hidden, rows=leaf, cu_seqlens=CU, dead_mask=dead).square().sum().backward()
        grads.append([leaf.grad, *(p.grad.clone() for p in layer.parameters())])
        layer.zero_grad()
    assert grads[0][0][dead].eq(0).all() and grads[0][0][~dead].ne(0).any()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_engram_trained_rows_follow_the_module():
    """To another dtype, through deepcopy and into load_state_dict, also with assign=True: the table is always the parameter."""
    layer, ids, hidden = make_layer("deepseek_v41", trained_rows=True)
    zeros = {name: torch.zeros_like(value) for name, value in layer.state_dict().items() if name == "rows"}
    twin = copy.deepcopy(layer)
    assert twin.table.rows is twin.rows and twin.rows is not layer.rows
    for assign in (False, True):
        loaded = copy.deepcopy(layer)
        loaded.load_state_dict(zeros, strict=False, assign=assign)
        assert loaded.table.rows is loaded.rows and not loaded.table.rows.any()
        torch.testing.assert_close(loaded(hidden, ids, CU), hidden)  # a value of zeros
    twin.to(torch.bfloat16)
    assert twin.table.row_format == "bf16"
    twin(hidden.bfloat16(), ids, CU).sum().backward()
    assert twin.rows.grad.dtype == torch.bfloat16 and twin.rows.grad.any()
    with pytest.raises(ValueError, match="hidden is torch.float64, but no backend computes in float64"):
        twin.double()(hidden.double(), ids, CU)
    with pytest.raises(ValueError, match="rows is torch.float64 now"):
        _ = twin.table.row_format
    torch.testing.assert_close(twin.float()(hidden, ids, CU), layer(hidden, ids, CU), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_engram_compiles_and_runs_in_bf16(variant):
    layer, ids, hidden = make_layer(variant, dtype=torch.bfloat16)
    rows = gather_rows(layer.table, ngram_hash(ids, CU, layer.spec.layout())[0], torch.bfloat16)
    want = layer(hidden, ids, CU)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(hidden, ids, CU), want)
    exact = restated(layer, hidden, rows)
    # the rounding of keys and value to bf16 between projection and gate, 2^-9 each; their sums are a few units large
    torch.testing.assert_close(want.double(), exact, rtol=2**-6, atol=2**-6 * exact.abs().max().item())


def test_engram_runs_under_autocast():
    layer, ids, hidden = make_layer("demo_v1")
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(hidden.bfloat16(), ids, CU)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(hidden, ids, CU), rtol=0.05, atol=0.05)


def test_engram_loads_fp8_projection_with_its_scales():
    """A scale to each block of 32 x 32, as published; without scales the weights would be wrong in silence."""
    layer, _, _ = make_layer("deepseek_v41")
    weight = torch.randn(4 * H, 768).to(torch.float8_e4m3fn)
    exponents = torch.randint(120, 134, (4 * H // 32, 768 // 32), dtype=torch.uint8)
    want = weight.float()
    for i in range(exponents.shape[0]):
        for j in range(exponents.shape[1]):
            want[32 * i:32 * i + 32, 32 * j:32 * j + 32] *= 2.0 ** (int(exponents[i, j]) - 127)
    rest = {"q_weight": torch.randn(M, H), "k_weight": torch.randn(M, H)}
    scales = {"wkv.scale": exponents.view(torch.float8_e8m0fnu), "wkv.weight_scale_inv": (exponents.float() - 127).exp2()}
    for name, scale in (*scales.items(), ("wkv.scale", exponents)):
        layer.wkv.weight.data.zero_()
        layer.load_published({"wkv.weight": weight, name: scale, **rest})
        torch.testing.assert_close(layer.wkv.weight, want, rtol=0, atol=0)
    with pytest.raises(KeyError, match="neither wkv.scale nor wkv.weight_scale_inv"):
        layer.load_published({"wkv.weight": weight, **rest})
    with pytest.raises(ValueError, match=r"wkv.scale has shape \[5, 24\]"):
        layer.load_published({"wkv.weight": weight, "wkv.scale": torch.ones(5, 24), **rest})


def test_engram_loads_all_published_tensors_or_none():
    layer, _, _ = make_layer("deepseek_v41")
    before = copy.deepcopy(layer.state_dict())
    good = {"wkv.weight": torch.randn(4 * H, 768), "q_weight": torch.randn(M, H), "k_weight": torch.randn(M, H)}
    for change in ({"k_weight": torch.randn(M, H - 1)}, {"k_weight": torch.ones(M, H, dtype=torch.uint8)}):
        with pytest.raises(ValueError, match="w_key"):
            layer.load_published(good | change)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name])


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
    with pytest.raises(TypeError, match="spec is a str, expected an EngramSpec"):
        Engram("deepseek_v41", 1)
    with pytest.raises(ValueError, match=r"layer_id is '1', expected one of \[1, 14\]"):
        Engram(spec, "1")
    for wrong, error, message in ((dict(branches=0), ValueError, "branches is 0, expected at least 1"),
                                  (dict(branches="a"), TypeError, "branches is 'a', expected an integer"),
                                  (dict(hidden_size=1.5), TypeError, "hidden_size is 1.5, expected an integer"),
                                  (dict(dtype=torch.float64), ValueError, "dtype is torch.float64, expected torch.float32")):
        with pytest.raises(error, match=message):
            Engram(spec, 1, **wrong)
    with pytest.raises(ValueError, match="variant 'none'"):
        Engram(EngramSpec.longcat(variant="none"), 0)
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
    bare = Engram(spec, 1, dtype=torch.float32)
    with pytest.raises(ValueError, match="token_ids needs a table"):
        bare(hidden, ids, CU)


BAD = {  # name: (variant, changed arguments, what the message says)
    "state_unused": ("deepseek_v41", dict(state=torch.zeros(3, 9, M, H)), "state is given, but variant 'deepseek_v41' has no"),
    "positions_unused": ("deepseek_v41", dict(positions=torch.zeros(3)), "positions is given, but variant"),
    "positions_alone": ("demo_v1", dict(positions=torch.zeros(3, dtype=torch.int32)), "positions is given without state"),
    "history_unused": ("demo_v1", dict(token_ids=None, rows=torch.zeros(T, 16, 32), history=torch.zeros(3, 2)),
                       "history is given"),
    "rows_columns": ("demo_v1", dict(token_ids=None, rows=torch.zeros(T, 15, 32)), r"rows must have shape \[23, 16, 32\]"),
    "rows_flat": ("demo_v1", dict(token_ids=None, rows=torch.zeros(T, 511)), r"rows must have shape \[23, 512\]"),
    "rows_tokens": ("demo_v1", dict(token_ids=None, rows=torch.zeros(T - 1, 16, 32)), r"rows must have shape \[23, 16, 32\]"),
    "rows_dtype": ("demo_v1", dict(token_ids=None, rows=torch.zeros(T, 16, 32).half()), "rows must be torch.float32"),
    "hidden_dtype": ("demo_v1", dict(hidden=torch.zeros(T, M, H).half()), "hidden must be torch.float32"),
    "hidden_shape": ("demo_v1", dict(hidden=torch.zeros(T, M + 1, H)), r"hidden must have shape \[T, 3, 32\]"),
    "dead_mask_shape": ("demo_v1", dict(dead_mask=torch.zeros(T - 1, dtype=torch.bool)), r"dead_mask must have shape \[23\]"),
    "two_sources": ("demo_v1", dict(rows=torch.zeros(T, 16, 32)), "exactly one of token_ids, row_ids and rows is wanted, got"),
}


@pytest.mark.parametrize("variant, change, message", BAD.values(), ids=BAD.keys())
def test_engram_rejects(variant, change, message):
    layer, ids, hidden = make_layer(variant)
    with pytest.raises(ValueError, match=message), torch.no_grad():
        layer(**{**dict(hidden=hidden, token_ids=ids, cu_seqlens=CU), **change})
