"""The variant qwen4_ple of Engram: what it does not share with the others. tests/modules/test_transformers_qwen4.py holds it to
the published code itself."""
import pytest
import torch
from module_cases import CU, H, M, T, make_layer, make_spec, restated

from engram_kernels import Engram, gather_rows, ngram_hash

ONE = torch.tensor([0, T], dtype=torch.int32)


def with_rounding(layer, rounding):
    """The same layer with another rounding."""
    other = Engram(layer.spec, layer.layer_id, table=layer.table, dtype=layer.w_key.dtype, rounding=rounding)
    other.load_state_dict(layer.state_dict())
    return other


def ring_of(spec, rings, spare=0):
    """Rings full of what must not be read."""
    return torch.full((rings, (spec.conv_width - 1) * spec.conv_dilation + spare, M, H), float("nan"), dtype=torch.bfloat16)


def test_one_rounding_is_nearer_than_the_published_ones():
    """In bfloat16, against float64 from the same rows: at most 0.8 of the published mean error, and half of its bound."""
    layer, ids, hidden = make_layer("qwen4_ple", dtype=torch.bfloat16)
    rows = gather_rows(layer.table, ngram_hash(ids, CU, layer.spec.layout())[0], torch.bfloat16)
    exact = restated(layer, hidden, rows)
    once, published = ((with_rounding(layer, rounding)(hidden, ids, CU).double() - exact).abs() / exact.abs().max()
                       for rounding in ("once", "published"))
    assert once.mean() < 0.8 * published.mean() and once.max() < 2**-6
    assert published.max() < 2**-5  # six roundings of 2^-9 and the convolution's


def test_published_rounding_in_float32_is_the_same_formula():
    layer, ids, hidden = make_layer("qwen4_ple")
    torch.testing.assert_close(with_rounding(layer, "published")(hidden, ids, CU), layer(hidden, ids, CU), rtol=2e-6, atol=2e-6)


def test_published_rounding_in_chunks_has_the_bits_of_the_whole():
    """In chunks, with a rejected draft, in a pool, beside a skipped sequence; but for torch's projection, which is a batch's."""
    layer, _, hidden = make_layer("qwen4_ple", dtype=torch.bfloat16)
    layer, spec = with_rounding(layer, "published"), layer.spec
    rows = torch.randn(T, spec.num_columns, spec.row_dim, dtype=torch.bfloat16)
    state, ends = ring_of(spec, 3, spare=2), torch.zeros(3, 2, dtype=torch.int64)
    with torch.no_grad():
        whole = torch.cat([layer(hidden[t:t + 1], rows=rows[t:t + 1], cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
                                 state=state[:1], positions=torch.tensor([t])) for t in range(T)])
        carried = dict(state=state, state_ends=ends, state_indices=torch.tensor([2, -1]))
        pieces = []
        for begin, end, kept in ((0, 7, 7), (7, 11, 9), (9, 10, 10), (10, T, T)):
            junk = torch.randn(3, M, H, dtype=torch.bfloat16)
            cu = torch.tensor([0, end - begin, end - begin + 3], dtype=torch.int32)
            out = layer(torch.cat([hidden[begin:end], junk]), rows=torch.cat([rows[begin:end], rows[:3]]), cu_seqlens=cu,
                        positions=torch.tensor([begin, 5]), **carried)
            assert out[-3:].eq(0).all()
            pieces.append(out[:kept - begin])
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=2**-7, atol=2**-7)
    assert state[1].isnan().all() and ends[2].tolist() == [T, T]


def test_eos_resets_the_hash_but_not_the_convolution():
    """Behind an EOS the rows are those of a new sequence, and the outputs those of a convolution that goes on."""
    layer, ids, hidden = make_layer("qwen4_ple")
    ids[4] = layer.spec.eos_token_id
    row_ids, _ = ngram_hash(ids, ONE, layer.spec.layout())
    fresh, _ = ngram_hash(ids[5:].contiguous(), torch.tensor([0, T - 5], dtype=torch.int32), layer.spec.layout())
    torch.testing.assert_close(row_ids[5:], fresh, rtol=0, atol=0)
    with torch.no_grad():
        whole = layer(hidden, ids, ONE)[5:]
        alone = layer(hidden[5:], ids[5:].contiguous(), torch.tensor([0, T - 5], dtype=torch.int32))
    reach = (layer.spec.conv_width - 1) * layer.spec.conv_dilation
    assert (whole[:3] != alone[:3]).any(-1).all()
    torch.testing.assert_close(whole[reach:], alone[reach:], rtol=1e-5, atol=1e-5)


def test_published_names_load():
    layer = make_layer("qwen4_ple")[0]
    keys, columns = M * H, layer.wkv.in_features
    shapes = {"key_proj": (keys, columns), "value_proj": (H, columns), "norm_key": (keys,), "norm_query": (keys,),
              "norm_conv": (keys,), "conv1d": (keys, 1, 4)}
    published = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    layer.load_published({f"layers.1.ple.{name}": value for name, value in published.items()}, "layers.1.ple.")
    assert torch.equal(layer.wkv.weight, torch.cat([published["key_proj.weight"], published["value_proj.weight"]]))
    names = {"w_key": "norm_key", "w_hidden": "norm_query", "conv_norm": "norm_conv", "conv_weight": "conv1d"}
    for name, theirs in names.items():
        assert torch.equal(getattr(layer, name).flatten(), published[f"{theirs}.weight"].flatten()), name
    with pytest.raises(KeyError, match="norm_conv"):
        layer.load_published({name: value for name, value in published.items() if name != "norm_conv.weight"})


def test_rounding_is_refused_by_name():
    for variant, rounding in (("qwen4_ple", "twice"), ("qwen4_ple", None), ("demo_v1", "published")):
        with pytest.raises(ValueError, match=f"rounding is {rounding!r} with variant '{variant}', expected 'once', or 'publ"):
            Engram(make_spec(variant), 1, rounding=rounding)


@pytest.mark.parametrize("rounding", ["once", "published"])
def test_dead_rows_reach_no_gradient(rounding):
    """NaN in the rows and the hidden state of a dead token leaves every other gradient as zeros would."""
    layer, _, hidden = make_layer("qwen4_ple")
    layer, dead = with_rounding(layer, rounding), torch.zeros(T, dtype=torch.bool)
    dead[[2, 11]] = True
    rows, grads = torch.randn(T, layer.spec.num_columns, layer.spec.row_dim), []
    for filler in (0.0, float("nan")):
        leaf = rows.masked_fill(dead[:, None, None], filler).requires_grad_()
        out = layer(hidden.masked_fill(dead[:, None, None], filler), rows=leaf, cu_seqlens=CU, dead_mask=dead)
        assert out[dead].eq(0).all()
        out.square().sum().backward()
        grads.append([leaf.grad, *(p.grad.clone() for p in layer.parameters())])
        layer.zero_grad()
    for a, b in zip(*grads, strict=True):
        assert b.isfinite().all() and a.any()
        torch.testing.assert_close(a, b, rtol=0, atol=0)
