"""`engram-kernels check`: what it says of each miniature, and of damaged ones."""
import json

import pytest
import torch
from miniatures import MINIATURES, classes, pcg_multipliers, primes_from, qwen, v41, xor_rows

from engram_kernels.cli import check, main


def run(capsys, *arguments):
    code = main.main(["check", *map(str, arguments)])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("name", MINIATURES)
def test_check_of_a_whole_checkpoint(name, tmp_path, capsys):
    mini = MINIATURES[name]()
    folder = mini.write(tmp_path)
    code, out = run(capsys, folder)
    assert code == 0 and out.endswith("verdict: everything agrees.\n") and "problem" not in out
    assert max(map(len, out.splitlines())) <= 100 and "\x1b" not in out
    code, text = run(capsys, folder, "--json")
    found = json.loads(text)
    assert code == 0 and found["ok"] and [x["layer_id"] for x in found["layers"]] == list(mini.layers)
    table = {n: x for n, x in mini.tensors.items() if n in found["layers"][0]["tables"]}
    assert len(table) == 1 and found["layers"][0]["rows"] >= next(iter(table.values())).shape[0]
    assert [len(x["rows_sha256"]) for x in found["fingerprint"]["layers"]] == [64] * len(mini.layers)


def test_check_fingerprint_tells_rows_apart(tmp_path, capsys):
    """Equal on a copy; other rows with one value changed, other row ids with another text."""
    def marks(folder, *more):
        return json.loads(run(capsys, folder, "--json", *more)[1])["fingerprint"]["layers"]

    first = marks(v41().write(tmp_path / "a"))
    assert first == marks(v41().write(tmp_path / "b"))
    changed = v41().edit("layers.1.engram.embed.weight", lambda x: (x.float() + 1).to(torch.float8_e4m3fn))
    other = marks(changed.write(tmp_path / "c"))
    assert [a["row_ids_sha256"] == b["row_ids_sha256"] for a, b in zip(first, other, strict=True)] == [True, True]
    assert [a["rows_sha256"] == b["rows_sha256"] for a, b in zip(first, other, strict=True)] == [False, True]
    text = marks(tmp_path / "a", "--text", "a3b")  # one token
    ids = xor_rows([classes(3)], pcg_multipliers(1, 4, 48), primes_from((40,) * 3, 2, 2)[0], 2, 2)
    assert text[0]["row_ids_of_last_token"] == ids[-1, :4].tolist()


def test_check_names_every_disagreement(tmp_path, capsys):
    mini = qwen()
    ple = "model.language_model.layers.1.ple."
    mini.edit(ple + "ple_embedding.layer_multipliers", lambda x: x + 2).edit(ple + "norm_key.weight", lambda x: None)
    mini.edit(ple + "ple_embedding.ngram_embedding.shard_4.weight", lambda x: None)
    mini.tokenizer_ids = 70
    code, out = run(capsys, mini.write(tmp_path))
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert code == 1 and len(problems) == 4 and out.endswith("verdict: 4 disagreements.\n")
    for part in ("tokenizer has 70 token ids", "shard_4.weight", "layer_multipliers is", "norm_key.weight"):
        assert part in out.replace("\n    ", " ")
    assert max(map(len, out.splitlines())) <= 100
    code, text = run(capsys, tmp_path, "--json")
    found = json.loads(text)
    assert code == 1 and not found["ok"] and "fingerprint" not in found and all(p.endswith(".") for p in found["problems"])


V41, PARTS = "layers.1.engram.", "model.language_model.layers.1.ple.ple_embedding.ngram_embedding."


@pytest.mark.parametrize(("make", "name", "change", "part"), [
    (v41, V41 + "embed.scale", lambda x: x[1:], "scales are F8_E8M0 [303, 1], expected"),
    (v41, V41 + "embed.scale", lambda x: x.double(), "scales are F64"),
    (v41, V41 + "wkv.scale", lambda x: x[1:], "does not divide"),
    (lambda: v41("int8"), V41 + "embed.scale", lambda x: x.half(), "scales are F16"),
    (lambda: qwen("nvfp4"), PARTS + "shard_3.weight_scale", lambda x: None, "no tensor"),
    (lambda: qwen("nvfp4"), PARTS + "shard_3.weight_scale", lambda x: x.float(), "is F32 [20, 2]"),
    (lambda: qwen("nvfp4"), PARTS + "weight_scale_2", lambda x: x.double(), "is F64 []")])
def test_check_looks_at_scales(make, name, change, part, tmp_path, capsys):
    code, out = run(capsys, make().edit(name, change).write(tmp_path))
    assert code == 1 and part in " ".join(out.split()) and "verdict: 1 disagreement." in out


@pytest.mark.parametrize(("damage", "part"), [
    (lambda f: (f / "config.json").unlink(), "no config.json"),
    (lambda f: (f / "config.json").write_text("{}"), "no n-gram memory"),
    (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "no weight_map"),
    (lambda f: (f / "model-00047-of-00048.safetensors").write_bytes(b"short"), "no whole safetensors file"),
    (lambda f: (f / "model-00047-of-00048.safetensors").unlink(), "no such file")])
def test_check_of_a_folder_that_is_none(damage, part, tmp_path, capsys):
    folder = v41().write(tmp_path)
    damage(folder)
    code, out = run(capsys, folder)
    assert code == 1 and part in out.replace("\n    ", " ")


def test_check_of_nothing(tmp_path, capsys):
    code, out = run(capsys, tmp_path / "missing")
    assert code == 1 and "problem: " in out
    assert check.SAMPLE.endswith(".")
