"""EngramSpec.from_hf_config: what is read, what is refused, and files that nobody vouches for."""
import time

import pytest
from hf_configs import DEMO_CONFIG, LONGCAT_CONFIG, QWEN4_CONFIG, V41_CONFIG

from engram_kernels import EngramSpec

V41, QWEN4 = V41_CONFIG["text_config"], QWEN4_CONFIG["text_config"]


def test_presets_fields_of_the_inference_configuration_are_read():
    config = {k: v for k, v in V41.items() if k not in ("hidden_size", "rms_norm_eps")}
    assert EngramSpec.from_hf_config({**config, "dim": 4096, "norm_eps": 1e-7}) == EngramSpec.deepseek_v41(
        hidden_size=4096, gate_eps=1e-7)


@pytest.mark.parametrize(("dtype", "row_format", "gib"), [
    ("float8_e4m3fn", "fp8_e4m3_tensor", 47.68), ("fp8", "fp8_e4m3_tensor", 47.68), ("torch.bfloat16", "bf16", 95.37)])
def test_presets_embedding_dtype_decides_the_row_format(dtype, row_format, gib):
    spec = EngramSpec.from_hf_config({**QWEN4, "ple_embedding_dtype": dtype})
    assert spec.row_format == row_format
    assert spec.bytes_per_row * sum(spec.layout().num_rows) / 2**30 == pytest.approx(gib, abs=0.005)


def test_presets_fields_of_the_files_alone_are_passed_over():
    config = {**QWEN4, "make_ngram_vocab_size_divisible_by": 128, "split_ngram_parts": 128}
    assert EngramSpec.from_hf_config(config) == EngramSpec.qwen4_ple()


NOT_UNDERSTOOD = (
    "ngram_exclude_sp_token", "special_token_scope", "ngram_mod_force_prime", "ngram_compressed_tokenizer", "ngram_fused_mode",
    "insert_ngram_layer_idx", "ngram_embedding_hidden_size", "emb_tp_num", "ignored_token_ids", "vocab_size_text",
    "engram_of_tomorrow", "ple_of_tomorrow", "oe_of_tomorrow")
READ_BY_LONGCAT = ("ngram_exclude_sp_token", "ignored_token_ids", "vocab_size_text")  # test_longcat.py: what comes of them
REFUSED = [pytest.param(config, name, id=f"{family}-{name}") for family, config in (
    ("v41", V41), ("demo", DEMO_CONFIG), ("qwen4", QWEN4), ("longcat", LONGCAT_CONFIG))
    for name in NOT_UNDERSTOOD if family != "longcat" or name not in READ_BY_LONGCAT]


@pytest.mark.parametrize(("config", "name"), REFUSED)
def test_presets_a_field_that_is_not_understood_is_refused_by_name(config, name):
    EngramSpec.from_hf_config({**config, name: None})  # unset
    for value in (True, False, [3]):
        with pytest.raises(ValueError, match=name):
            EngramSpec.from_hf_config({**config, name: value})


@pytest.mark.parametrize(("config", "words"), [
    ({**V41, "engram_num_embeddings": 5}, "engram_num_embeddings is 5, expected a list"),
    ({**V41, "engram_num_embeddings": list(range(10**5))}, r"engram_num_embeddings is \[0, 1, 2.*\.\.\., but"),
    ({**V41, "hidden_size": "x" * 10**5}, r"hidden_size is 'xxx.*\.\.\., expected"),
    ({**QWEN4, "eos_token_id": []}, r"eos_token_id is \[\]"),
    ({**QWEN4, "ple_layer_ids": 3}, "ple_layer_ids is 3, expected a list of integers"),
    ({**QWEN4, "ple_embedding_dtype": "int4"}, "ple_embedding_dtype is 'int4'"),
    ({**LONGCAT_CONFIG, "ngram_vocab_size_ratio": 1e308}, r"ngram_vocab_size_ratio is 1e\+308, expected a ratio that makes"),
    ({**LONGCAT_CONFIG, "vocab_size": "many"}, "vocab_size is 'many', expected an integer"),
    ({**LONGCAT_CONFIG, "ngram_vocab_size_ratio": "78"}, "ngram_vocab_size_ratio is '78', expected a finite number"),
    ({**LONGCAT_CONFIG, "ngram_vocab_size_ratio": float("nan")}, "ngram_vocab_size_ratio is nan, expected a finite number"),
    ({**V41, "rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a finite number"),
    ({**V41, "ple_layer_ids": [2]}, "more than one memory: engram_layer_ids, ple_layer_ids"),
    (5, "no n-gram memory"), (None, "no n-gram memory"), ([1], "no n-gram memory")])
def test_presets_wrong_values_are_refused(config, words):
    with pytest.raises(ValueError, match=f"(?s){words}") as error:
        EngramSpec.from_hf_config(config)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("value", ["x", ["a"], {"a": 1}, 3.5, float("inf"), [[1]], -10**30, 10**400])
@pytest.mark.parametrize("config", [V41, DEMO_CONFIG, QWEN4, LONGCAT_CONFIG], ids=["v41", "demo", "qwen4", "longcat"])
def test_presets_a_value_of_the_wrong_type_is_refused_by_its_fields_name(config, value):
    for name, right in config.items():
        not_read = config is LONGCAT_CONFIG and name == "rms_norm_eps"  # its layers have no gate
        if right is not None and not not_read and not (value == 3.5 and ("eps" in name or "ratio" in name)):
            with pytest.raises(ValueError, match=f"{name} is"):
                EngramSpec.from_hf_config({**config, name: value})


@pytest.mark.parametrize(("text", "words"), [
    ("[" * 200_000, "nested too deeply"),
    ("{" + ",".join(f'"k{i}":1' for i in range(40_000)) + ',"k39999":2}', "it names 'k39999' twice"),
    ('{"a":' + "1" * 400_000 + "}", "is not JSON"),
    ('{"' + "x" * 400_000 + '":1,"' + "x" * 400_000 + '":1}', r"it names 'xxx.*\.\.\.")],
    ids=["deep", "last_name_twice", "long_number", "long_name"])
def test_presets_deep_and_huge_json_is_refused_at_once(text, words, tmp_path):
    (tmp_path / "config.json").write_text(text)
    before = time.process_time()
    with pytest.raises(ValueError, match=words) as error:
        EngramSpec.from_hf_config(tmp_path)
    assert time.process_time() - before < 5  # 418 KiB took 52 s
    assert len(str(error.value)) < 600
