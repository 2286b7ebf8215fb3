"""The command on real text: its checks hold, its numbers are there, bad input is one sentence."""
import json
import subprocess
import sys

import pytest

from engram_kernels.cli import main as cli
from engram_kernels.demo import pipeline, report
from engram_kernels.demo.main import SAMPLE, DemoOptions
from engram_kernels.spec import EngramSpec

SMALL = ["--rows", "4096", "--hidden", "64", "--tokens-per-step", "128"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(SAMPLE.read_text(encoding="utf-8")[:6000] + "\nÜmläuts, 漢字 and 🦜.\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("spec", ["deepseek_v41", "demo_v1", "qwen4_ple", "longcat"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_demo_agrees_with_the_reference(spec, backend, text, tmp_path, capsys):
    out = tmp_path / "numbers" / "demo.json"
    assert cli.main(["demo", str(text), "--spec", spec, "--backend", backend, "--json", str(out), *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "verdict: OK" in printed and "stored row = row id mod 4,096" in printed
    data = json.loads(out.read_text())
    result = data["result"]
    assert data["ok"] and all(result["checks"][c] for c in ("ids_equal", "rows_equal", "gate_ok", "run_repeats"))
    assert result["tokens"] > 1000 and result["provenance"] == "measured"
    assert 0 < result["distinct_rows"][0] < result["requested_rows"]
    assert result["compute_dtype"] in ("bfloat16", "float32") and result["hash_s"] > 0


def test_demo_knows_the_published_numbers(text, tmp_path):
    out = tmp_path / "demo.json"
    assert cli.main(["demo", str(text), "--json", str(out), *SMALL]) == 0
    result = json.loads(out.read_text())["result"]
    assert result["classes"] == 99_092
    assert result["true_rows"] == [384_006_168, 384_016_682]
    assert result["row_bytes"] == 264


def test_demo_takes_a_spec_file(text, tmp_path, capsys):
    path = tmp_path / "spec.json"
    EngramSpec.deepseek_v41(name="mine", row_format="fp8_e4m3_block32_packed", row_stride_bytes=288).to_json(path)
    assert cli.main(["demo", str(text), "--spec", str(path), *SMALL]) == 0
    assert "spec mine" in capsys.readouterr().out


@pytest.mark.parametrize("content, message", [
    (None, "cannot read"), (b"", "holds no token"), (b"abc\xff", "is not UTF-8: byte 3 is 0xff")])
def test_demo_rejects_bad_text(content, message, tmp_path, capsys):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["demo", str(path), *SMALL]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--rows", "0"], "table_rows is 0"), (["--hidden", "-1"], "hidden_size is -1"),
    (["--tokens-per-step", "0"], "tokens_per_step is 0"),
    (["--rows", "400000000"], "expected at most"), (["--tokens", "-1"], "tokens is -1")])
def test_demo_rejects_bad_options(arguments, message, capsys):
    assert cli.main(["demo", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_demo_of_no_spec_is_a_usage_error(capsys):
    assert cli.main(["demo", "--spec", "nothing.json"]) == 2
    assert "spec is 'nothing.json', expected deepseek_v41" in capsys.readouterr().err


@pytest.mark.parametrize("fetch_s, exposed_s, words", [
    (0.1, 0.0, "That shows no hiding: the stand-in computes 100 times as long"), (5.0, 0.05, "99.0% of it hidden"),
    (5.0, 2.0, "60.0% of it only, so it is NOT HIDDEN")])
def test_demo_says_hidden_only_where_the_compute_is_comparable(fetch_s, exposed_s, words):
    stats = [{"fetch_s": fetch_s, "exposed_wait_s": exposed_s}]
    assert words in report.prefetch_line({"prefetch": stats, "elapsed_s": 10.0 + exposed_s})


def test_demo_computes_in_the_faster_dtype():
    dtype, flops = pipeline.fastest_dtype(64, 32)
    assert set(flops) == {"bfloat16", "float32"} and flops[str(dtype).removeprefix("torch.")] == max(flops.values())


def test_demo_fails_when_a_stage_is_wrong(text, monkeypatch, capsys):
    """The verdict can say no: a gate that is off by 2 % is found."""
    monkeypatch.setattr(pipeline, "gate", lambda *args, **kwargs: 1.02 * GATE(*args, **kwargs))
    assert cli.main(["demo", str(text), *SMALL]) == 1
    assert "BEYOND" in capsys.readouterr().out


def test_demo_fails_when_the_convolution_is_wrong(text, monkeypatch, capsys):
    conv = pipeline.short_conv
    monkeypatch.setattr(pipeline, "short_conv", lambda *args, **kwargs: 2 * conv(*args, **kwargs))
    assert cli.main(["demo", str(text), "--spec", "demo_v1", *SMALL]) == 1
    assert "short_conv: largest error" in capsys.readouterr().out


def test_demo_takes_one_scale_a_table(text, tmp_path):
    path = tmp_path / "spec.json"
    EngramSpec.qwen4_ple(row_format="fp8_e4m3_tensor").to_json(path)
    assert cli.main(["demo", str(text), "--spec", str(path), "--rows", "65536", "--hidden", "64"]) == 0


def test_demo_is_installed_as_a_command():
    run = subprocess.run([sys.executable, "-m", "engram_kernels.cli", "demo", "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "--tokens-per-step" in run.stdout
    assert DemoOptions().spec.name == "deepseek_v41"


from engram_kernels.ops.gate import gate as GATE  # noqa: E402
