"""EngramSpec and Layout: presets against published numbers, validation, JSON, model configurations."""
import dataclasses
import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
import sympy
import torch
from hf_configs import DEMO_CONFIG, LONGCAT_CONFIG, QWEN4_CONFIG, V41_CONFIG
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_kernels.layout import is_prime, splitmix64
from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.spec import EngramSpec

GOLDEN = Path(__file__).parents[1] / "golden"
PRESETS = ("deepseek_v41", "demo_v1", "qwen4_ple", "longcat")


@pytest.fixture
def v41():
    return EngramSpec.deepseek_v41()


def small(**fields):
    """A valid spec of few rows."""
    base = dict(name="small", hash_family="xor_prime", boundary="pad", vocab_size=50, num_classes=20, pad_token_id=1,
                pad_class=1, max_order=3, heads=2, head_dim=32, layer_ids=(0, 3), table_sizes=(10, 16), hidden_size=64)
    return EngramSpec(**{**base, **fields})


@st.composite
def specs(draw):
    """Any small valid spec."""
    order, vocab = draw(st.integers(2, 6)), draw(st.integers(1, 2**31 - 1))
    fields = dict(
        name=draw(st.text()), hash_family=draw(st.sampled_from(["xor_prime", "xor_prime_int32", "xor_splitmix", "polynomial"])),
        boundary=draw(st.sampled_from(["pad", "eos_reset", "stop"])), vocab_size=vocab, max_order=order,
        heads=draw(st.integers(1, 5)), head_dim=32 * draw(st.integers(1, 8)), seed=draw(st.integers(0, 2**62)),
        layer_ids=draw(st.lists(st.integers(0, 100), min_size=1, max_size=3, unique=True)),
        table_sizes=draw(st.lists(st.integers(1, 10**6), min_size=order - 1, max_size=order - 1)),
        pad_token_id=draw(st.integers(0, vocab - 1)), hidden_size=draw(st.integers(1, 9000)),
        row_format=draw(st.sampled_from(sorted(ROW_FORMATS))), zero_scale_is_zero=draw(st.booleans()),
        gate_eps=draw(st.floats(0, 1)), branches=draw(st.integers(1, 8)))
    if fields["boundary"] != "pad":
        fields["eos_token_id"] = draw(st.integers(0, vocab - 1))
    elif draw(st.booleans()):
        fields["num_classes"] = draw(st.integers(1, vocab))
        fields["pad_class"] = draw(st.integers(0, fields["num_classes"] - 1))
    return EngramSpec(**fields)


def rows_of_window(layout, layer, window):
    """Row ids of one n-gram window in exact Python integers; -1 is before the start. Written from docs/ops.md, ngram_hash."""
    ids, blocked = [], False
    for s, token in enumerate(window):
        blocked = blocked or token < 0 or (s > 0 and token == layout.eos_id)
        ids.append(layout.boundary_id if blocked else token)
    rows = []
    for column in range(layout.moduli.shape[1]):
        mix = 0
        for s in range(column // layout.heads + 2):
            mix ^= ids[s] * int(layout.multipliers[layer, s])
        rows.append(mix % int(layout.moduli[layer, column]) + int(layout.offsets[layer, column]))
    return rows


def test_layout_golden_deepseek_v41(v41):
    golden, layout = json.loads((GOLDEN / "layout_deepseek_v41.json").read_text()), v41.layout()
    assert layout.moduli.tolist() == golden["moduli"]
    assert layout.multipliers.tolist() == golden["multipliers"]
    assert list(layout.num_rows) == golden["num_rows"] == [384_006_168, 384_016_682]
    assert layout.num_ids == golden["num_classes"]
    assert (layout.boundary_id, layout.eos_id, layout.pad_token_id) == (2, -1, 2)
    assert (v41.bytes_per_row, v41.num_columns, v41.rows_per_token) == (264, 24, 48)


def test_layout_golden_qwen4_ple():
    golden, layout = json.loads((GOLDEN / "layout_qwen4_ple.json").read_text()), EngramSpec.qwen4_ple().layout()
    for name in ("moduli", "offsets", "multipliers"):
        assert getattr(layout, name).tolist() == golden[name]
    assert list(layout.num_rows) == golden["num_rows"]
    for case in golden["windows"]:
        assert rows_of_window(layout, 0, case["window"]) == case["rows"]


def test_layout_golden_demo_v1():
    # the rule of the published demo, with sympy's primes: nothing of ours
    spec, taken = EngramSpec.demo_v1(), set()
    layout = spec.layout()
    for index, layer_id in enumerate((1, 15)):
        moduli = []
        for _ in (2, 3):
            prime = 129_280 * 5 - 1
            for _ in range(8):
                prime = sympy.nextprime(prime)
                while prime in taken:
                    prime = sympy.nextprime(prime)
                taken.add(prime)
                moduli.append(prime)
        assert layout.moduli[index].tolist() == moduli
        draws = np.random.default_rng(10007 * layer_id).integers(0, (2**63 - 1) // 99_092 // 2, size=3)
        assert layout.multipliers[index].tolist() == (draws * 2 + 1).tolist()
    assert (spec.num_columns, spec.bytes_per_row, spec.conv_dilation, spec.add_residual) == (16, 256, 3, False)
    assert spec.gate_eps == torch.finfo(torch.float32).eps


def test_layout_golden_longcat():
    # published: embedder i has 78 * 131072 + 2 i + 1 rows; the hash is a number in base vocab, newest digit lowest
    spec = EngramSpec.longcat()
    layout = spec.layout()
    assert layout.moduli.tolist() == [[78 * 131_072 + 2 * i + 1 for i in range(12)]]
    assert layout.num_rows == (122_683_536,)
    assert (layout.boundary_id, layout.eos_id, layout.multipliers.shape) == (0, 2, (1, 12, 4))
    window = (131_071, 5, 0, 77_777)
    for column in range(12):
        order, modulus = column // 4 + 2, int(layout.moduli[0, column])
        exact = sum(token * 131_072**s for s, token in enumerate(window[:order]))
        hashed = sum(token * int(m) for token, m in zip(window, layout.multipliers[0, column], strict=True))
        assert hashed % modulus == exact % modulus
        assert layout.multipliers[0, column, order:].tolist() == [0] * (4 - order)


@settings(max_examples=60, deadline=None)
@given(specs())
def test_layout_obeys_the_rules(spec):
    layout, shape = spec.layout(), (len(spec.layer_ids), spec.num_columns)
    assert layout.moduli.shape == layout.offsets.shape == shape
    assert layout.moduli.dtype == layout.offsets.dtype == layout.multipliers.dtype == torch.int64
    assert layout.num_rows == tuple(layout.moduli.sum(1).tolist())
    assert torch.equal(layout.offsets, layout.moduli.cumsum(1) - layout.moduli)
    moduli, reciprocals = layout.moduli.flatten().tolist(), layout.reciprocals.flatten().tolist()
    assert [r % 2**64 for r in reciprocals] == [(2**64 - 1) // m for m in moduli]
    assert 0 <= layout.boundary_id < layout.num_ids == (spec.num_classes or spec.vocab_size)
    bases = torch.tensor(spec.table_sizes).repeat_interleave(spec.heads)
    assert (layout.moduli >= bases).all()
    if spec.hash_family == "polynomial":
        assert layout.multipliers.shape == (*shape, spec.max_order)
        assert (layout.multipliers < layout.moduli[..., None]).all() and (layout.multipliers >= 0).all()
        largest = max(sum(c) for layer in layout.multipliers.tolist() for c in layer) * (spec.num_ids - 1)
    else:
        assert layout.multipliers.shape == (shape[0], spec.max_order)
        assert (layout.multipliers % 2 == 1).all() and (layout.multipliers > 0).all()
        moduli = layout.moduli.flatten().tolist()
        assert len(set(moduli)) == len(moduli) and all(map(sympy.isprime, moduli))
        largest = max(layout.multipliers.flatten().tolist()) * (spec.num_ids - 1)
    assert largest < 2**63  # in exact Python integers


@settings(max_examples=60, deadline=None)
@given(specs())
def test_spec_json_round_trip(spec):
    again = EngramSpec.from_json(spec.to_json())
    assert again == spec and hash(again) == hash(spec)
    assert again.layout() is spec.layout()


@pytest.mark.parametrize("name", PRESETS)
def test_spec_json_file_round_trip(name, tmp_path):
    spec, path = getattr(EngramSpec, name)(), tmp_path / "spec.json"
    path.write_text("old")
    assert spec.to_json(path) == path.read_text()
    assert EngramSpec.from_json(path) == EngramSpec.from_json(str(path)) == spec
    assert [p.name for p in tmp_path.iterdir()] == ["spec.json"]


def test_primes_match_sympy():
    for start in (0, 10**4, 2**31 - 200, 2**63 - 400, 10**18):
        assert [n for n in range(start, start + 300) if is_prime(n)] == list(sympy.primerange(start, start + 300))
    for pseudoprime in (2047, 3215031751, 341550071728321, 3825123056546413051):  # to the first 1, 4, 7, 9 bases
        assert not is_prime(pseudoprime)


def test_splitmix64_golden():
    # first outputs of the published generator for seed 1234567 (rosettacode.org, Pseudo-random numbers/Splitmix64)
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix64(1234567 + 0x9E3779B97F4A7C15 * i) for i in range(4)] == outputs


def test_layout_moves_to_a_device(v41):
    layout = v41.layout()
    moved = layout.to("meta")
    assert {t.device.type for t in (moved.moduli, moved.offsets, moved.multipliers, moved.reciprocals)} == {"meta"}
    assert moved.num_rows == layout.num_rows and layout.to("cpu") is layout and moved.spec == v41


def test_layout_moduli_do_not_depend_on_the_number_of_later_layers():
    one, two = small(layer_ids=(0,)).layout(), small(layer_ids=(0, 3)).layout()
    assert torch.equal(one.moduli[0], two.moduli[0])
    assert small(layer_ids=(3, 0)).layout().moduli.tolist() == two.moduli.tolist()  # handed out in order, not by id


BAD_FIELDS = {  # name: (overrides of small(), field that the message names)
    "name_no_string": (dict(name=3), "name"),
    "family_unknown": (dict(hash_family="md5"), "hash_family"),
    "boundary_unknown": (dict(boundary="wrap"), "boundary"),
    "vocab_zero": (dict(vocab_size=0), "vocab_size"),
    "vocab_float": (dict(vocab_size=50.0), "vocab_size"),
    "classes_beyond_vocab": (dict(num_classes=51), "num_classes"),
    "order_one": (dict(max_order=1), "max_order"),
    "order_nine": (dict(max_order=9), "max_order"),
    "heads_zero": (dict(heads=0), "heads"),
    "heads_bool": (dict(heads=True), "heads"),
    "head_dim_negative": (dict(head_dim=-1), "head_dim"),
    "layers_none": (dict(layer_ids=()), "layer_ids"),
    "layers_repeated": (dict(layer_ids=(1, 1)), "layer_ids"),
    "layers_negative": (dict(layer_ids=(-1,)), "layer_ids"),
    "layers_one_number": (dict(layer_ids=1), "layer_ids"),
    "table_sizes_too_few": (dict(table_sizes=(10,)), "table_sizes"),
    "table_sizes_zero": (dict(table_sizes=(10, 0)), "table_sizes"),
    "seed_negative": (dict(seed=-1), "seed"),
    "pad_token_beyond_vocab": (dict(pad_token_id=50), "pad_token_id"),
    "pad_class_missing": (dict(pad_class=None), "pad_class"),
    "pad_class_beyond": (dict(pad_class=20), "pad_class"),
    "pad_class_of_raw_ids": (dict(num_classes=None), "pad_class"),
    "eos_with_pad": (dict(eos_token_id=3), "eos_token_id"),
    "eos_missing": (dict(boundary="eos_reset", num_classes=None, pad_class=None), "eos_token_id"),
    "eos_of_classes": (dict(boundary="eos_reset", eos_token_id=3), "num_classes"),
    "format_unknown": (dict(row_format="fp4"), "row_format"),
    "format_needs_blocks": (dict(row_format="int8_group32", head_dim=40), "head_dim"),
    "stride_of_plain_rows": (dict(row_stride_bytes=64), "row_stride_bytes"),
    "stride_too_small": (dict(row_format="fp8_e4m3_block32_packed", row_stride_bytes=32), "row_stride_bytes"),
    "zero_scale_number": (dict(zero_scale_is_zero=1), "zero_scale_is_zero"),
    "variant_unknown": (dict(variant="v2"), "variant"),
    "variant_wants_conv": (dict(variant="demo_v1"), "conv_width"),
    "variant_has_no_conv": (dict(variant="deepseek_v41", conv_width=4, conv_dilation=3), "conv_width"),
    "zero_sign_unknown": (dict(zero_sign="abs"), "zero_sign"),
    "residual_number": (dict(add_residual=0), "add_residual"),
    "eps_negative": (dict(gate_eps=-1e-6), "gate_eps"),
    "clamp_nan": (dict(gate_clamp=math.nan), "gate_clamp"),
    "conv_eps_text": (dict(conv_eps="1e-5"), "conv_eps"),
    "conv_without_dilation": (dict(conv_width=4), "conv_dilation"),
    "dilation_without_conv": (dict(conv_dilation=3), "conv_dilation"),
    "hidden_zero": (dict(hidden_size=0), "hidden_size"),
    "branches_zero": (dict(branches=0), "branches"),
    "branches_of_longcat": (dict(variant="longcat", branches=2), "branches"),
    "average_unknown": (dict(variant="longcat", average="sum"), "average"),
    "average_without_longcat": (dict(average="root"), "average"),
    "ignored_negative": (dict(ignored_token_ids=(3, -1)), "ignored_token_ids"),
    "zero_of_primes": (dict(zero_is_dead=True), "zero_is_dead"),
}


@pytest.mark.parametrize(("overrides", "field"), BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_spec_rejects_bad_fields(overrides, field):
    value = overrides.get(field, getattr(small(), field))
    with pytest.raises(ValueError, match=rf"^EngramSpec: {field} is ") as error:
        small(**overrides)
    assert f"{field} is {value!r}, expected " in str(error.value)


def test_spec_every_field_has_a_bad_case():
    assert {f.name for f in dataclasses.fields(EngramSpec)} == {field for _, field in BAD_FIELDS.values()}


def test_spec_takes_lists_and_numpy_integers():
    spec = small(layer_ids=[0, np.int64(3)], heads=np.int32(2), gate_eps=1)
    assert spec == small(gate_eps=1.0) and type(spec.heads) is int and type(spec.layer_ids[1]) is int
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.heads = 3


def test_layout_rejects_rows_beyond_int32():
    spec = EngramSpec.deepseek_v41(table_sizes=(100_000_000,) * 3)
    with pytest.raises(ValueError, match=r"Layout: layer 1 has \d+ rows, expected at most 2147483647"):
        spec.layout()


def test_layout_rejects_polynomial_overflow():
    spec = EngramSpec.longcat(vocab_size=2**31 - 1, max_order=8, heads=1, table_sizes=(1,) * 6 + (2**31 - 5000,))
    with pytest.raises(ValueError, match=r"Layout: column 6 .* would overflow int64"):
        spec.layout()


@pytest.mark.parametrize(("row_format", "expected"), [
    ("f32", 1024), ("bf16", 512), ("f16", 512), ("fp8_e4m3_block32", 264), ("fp8_e4m3_block32_packed", 264),
    ("fp8_e4m3_tensor", 256), ("int8_group32", 288)])
def test_spec_bytes_per_row(row_format, expected):
    assert EngramSpec.deepseek_v41(row_format=row_format).bytes_per_row == expected


def test_spec_bytes_per_row_padded():
    spec = EngramSpec.deepseek_v41(row_format="fp8_e4m3_block32_packed", row_stride_bytes=288)
    assert spec.bytes_per_row == 288 and spec.row_dim == 256


def test_spec_json_rejects_damage(v41, tmp_path):
    data = json.loads(v41.to_json())
    with pytest.raises(ValueError, match="unknown field head_dims in the text"):
        EngramSpec.from_json(json.dumps({**data, "head_dims": 3}))
    with pytest.raises(ValueError, match="missing field heads in the text"):
        EngramSpec.from_json(json.dumps({k: v for k, v in data.items() if k != "heads"}))
    with pytest.raises(ValueError, match="heads is '8', expected an integer"):
        EngramSpec.from_json(json.dumps({**data, "heads": "8"}))
    with pytest.raises(ValueError, match="the text is not JSON"):
        EngramSpec.from_json(v41.to_json()[:50])
    path = tmp_path / "spec.json"
    for content, message in ((b"[]", "holds a list, expected an object"), (b"", "not JSON"), (b"\xff{}", "not JSON")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            EngramSpec.from_json(path)
        assert str(path) in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"no_such\.json"):
        EngramSpec.from_json(tmp_path / "no_such.json")


def _text(**changes):
    """The V4.1 configuration with fields of its text_config changed; None removes one."""
    text = {**V41_CONFIG["text_config"], **changes}
    return {**V41_CONFIG, "text_config": {k: v for k, v in text.items() if v is not None}}


def test_spec_from_hf_config_deepseek_v41(v41, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V41_CONFIG))
    as_object = types.SimpleNamespace(text_config=types.SimpleNamespace(**V41_CONFIG["text_config"]))
    other_spelling = _text(engram_pad_token_id=None, engram_pad_id=2)
    for config in (V41_CONFIG, V41_CONFIG["text_config"], as_object, other_spelling, _text(engram_pad_id=2),
                   tmp_path, str(tmp_path / "config.json")):
        assert EngramSpec.from_hf_config(config) == v41
    assert EngramSpec.from_hf_config(V41_CONFIG, name="mine").name == "mine"


def test_spec_from_hf_config_demo():
    holder = types.SimpleNamespace(**DEMO_CONFIG)
    assert EngramSpec.from_hf_config(DEMO_CONFIG) == EngramSpec.from_hf_config(holder) == EngramSpec.demo_v1()


def test_spec_from_hf_config_qwen4():
    assert EngramSpec.from_hf_config(QWEN4_CONFIG) == EngramSpec.qwen4_ple()
    text = {**QWEN4_CONFIG["text_config"], "eos_token_id": [248044, 248046], "ple_layer_ids": [9, 2]}
    spec = EngramSpec.from_hf_config(text)
    assert spec.layer_ids == (1, 8) and spec.eos_token_id == 248044
    # the seed and the primes go by the position of the layer, so the first one is as if alone
    assert torch.equal(spec.layout().moduli[0], EngramSpec.qwen4_ple().layout().moduli[0])
    assert torch.equal(spec.layout().multipliers[0], EngramSpec.qwen4_ple().layout().multipliers[0])


def test_spec_from_hf_config_longcat():
    assert EngramSpec.from_hf_config(LONGCAT_CONFIG) == EngramSpec.longcat()
    renamed = {"oe_neighbor_num": 5, "oe_split_num": 4, "oe_vocab_size_ratio": 100.567, "vocab_size": 163840,
               "hidden_size": 8192, "eos_token_id": 2}
    assert EngramSpec.from_hf_config(renamed).table_sizes == (16476897,) * 4


BAD_CONFIGS = {  # name: (configuration, part of the message)
    "no_memory": ({"hidden_size": 5}, "no n-gram memory"),
    "empty_layers": (_text(engram_layer_ids=[]), "no n-gram memory"),
    "two_pads": (_text(engram_pad_id=3), "engram_pad_id is 3, engram_pad_token_id is 2"),
    "pad_missing": (_text(engram_pad_token_id=None), "no field engram_pad_id or engram_pad_token_id"),
    "heads_missing": (_text(engram_n_heads=None), "no field engram_n_heads"),
    "rows_differ": (_text(engram_num_embeddings=[384006168, 384016680]),
                    r"\[384006168, 384016680\].*\[384006168, 384016682\]"),
    "pad_class_unknown": (_text(engram_compressed_vocab_size=90000), r"pad_class=int\(token_map\.map\[pad\]\)"),
    "order_text": (_text(engram_max_ngram_size="4"), "engram_max_ngram_size is '4'"),
    "order_absurd": (_text(engram_max_ngram_size=10**12), "engram_max_ngram_size is 1000000000000"),
    "row_not_divisible": ({**DEMO_CONFIG, "n_embed_per_ngram": 500}, "n_embed_per_ngram is 500, expected a multiple"),
    "heads_negative": ({**DEMO_CONFIG, "n_head_per_ngram": -1}, "n_head_per_ngram is -1, expected an integer"),
}


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_spec_from_hf_config_rejects(config, message):
    with pytest.raises(ValueError, match=message):
        EngramSpec.from_hf_config(config)


def test_spec_from_hf_config_rejects_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        EngramSpec.from_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        EngramSpec.from_hf_config(tmp_path)


def test_spec_from_hf_config_pad_class_by_hand():
    config = _text(engram_compressed_vocab_size=90000, engram_num_embeddings=None)
    spec = EngramSpec.from_hf_config(config, pad_class=7)
    assert (spec.num_classes, spec.pad_class, spec.layout().boundary_id) == (90000, 7, 7)
