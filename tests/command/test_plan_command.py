"""`engram-kernels plan`: profiles read, exit codes, provenance of every number, the trial on this machine."""
import io
import json
import re
from pathlib import Path

import jsonschema
import pytest
import torch
from plan_cases import cpu_machine, machine, workload
from plan_profiles import DISK, GPU, HOST, gather, profile_of, write

from engram_kernels import EngramSpec, info
from engram_kernels._names import PRESETS
from engram_kernels._terminal import Printer
from engram_kernels.cli import main as cli
from engram_kernels.plan import Provenance, Surface, assumed_hardware, measure_here, trial
from engram_kernels.plan.inputs import machine_of, profiles_of_this_machine
from engram_kernels.plan.profile_input import apply_profile, load_profile
from engram_kernels.profile import session as session_module

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "python/engram_kernels/profile/profile.schema.json").read_text())
MIB, GIB = 2**20, 2**30


MEASURE_HERE = measure_here.measure_here


@pytest.fixture(autouse=True)
def measured_at_once(monkeypatch):
    """The few seconds of measuring are for the test that is about them."""
    monkeypatch.setattr(measure_here, "measure_here", lambda spec, tokens: profile_of([*HOST, *DISK]))


def numbers_without_provenance(node, where="$"):
    """Paths of the numbers that are not the value of an object with all four of its keys."""
    if isinstance(node, dict):
        if {"value", "unit", "provenance", "source"} <= set(node):
            assert node["provenance"] in ("given", "measured", "simulated", "assumed") and node["source"], where
            return []
        return [bad for key, value in node.items() if key != "schema_version" for bad in
                numbers_without_provenance(value, f"{where}.{key}")]
    if isinstance(node, list):
        return [bad for i, value in enumerate(node) for bad in numbers_without_provenance(value, f"{where}[{i}]")]
    return [where] if isinstance(node, int | float) and not isinstance(node, bool) else []


def test_profile_of_the_host_replaces_the_constants():
    node = apply_profile(assumed_hardware("none"), profile_of([*HOST, *DISK, *GPU]), "here.json", of_gpu=False)
    assert node.host_copy.at(256, GIB).value == pytest.approx(4e9) and node.host_copy.at(512, GIB).value == pytest.approx(6e9)
    assert node.host_copy.at(256, 16 * GIB).value == pytest.approx(2e9)
    assert node.host_copy.at(256, GIB).provenance is Provenance.MEASURED
    assert node.host_copy.at(256, 100 * GIB).provenance is Provenance.ASSUMED  # larger than any that was measured
    assert node.host_decode.at(264, GIB).value == pytest.approx(3e9)
    assert node.host_latency.value == pytest.approx(24 * 256 / 1e9)  # the call of 24 rows
    assert node.disk_reads.value == 80_000 and node.disk_latency.value == pytest.approx(1e-4)  # depth 64, depth 1
    assert node.host_bytes.value == 80 * GIB and node.disk_bytes.value == 500 * GIB
    assert not node.has_gpu and "here.json: host_gather (row_bytes 256" in node.host_copy.at(256, GIB).source


def test_profile_of_a_gpu_replaces_the_constants():
    report = profile_of([*HOST, *GPU], [{"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 10**9}])
    node = machine_of(None, [(Path("gpu.json"), report)])
    assert node.has_gpu and node.name.startswith("NVIDIA H100")
    assert node.uva.at(256, GIB).value == pytest.approx(30e9) and not node.uva_counts_sectors
    assert node.device_gather.at(256, GIB).value == pytest.approx(2e12) and node.device_stream.value == pytest.approx(3e12)
    assert node.link.value == pytest.approx(54e9) and node.copy_latency.value == 9e-6
    assert node.gpu_latency.value == pytest.approx(24 * 256 / 1e9) and node.gather_share.value == pytest.approx(0.2)
    assert node.nvlink.provenance is Provenance.ASSUMED  # not measured
    assert node.device_counts_traffic is False
    other = machine_of("a100", [(Path("gpu.json"), report)])
    assert other.name == "a100" and other.link.provenance is Provenance.ASSUMED
    assert other.host_copy.at(256, GIB).value == pytest.approx(4e9)


def test_profile_of_a_gpu_that_could_not_be_used_is_none(tmp_path, capsys):
    report = profile_of(HOST, [{"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 10**9}])
    assert not machine_of(None, [(Path("gpu.json"), report)]).has_gpu
    assert cli.main(["plan", "--profile", str(write(tmp_path / "p.json", report)), "--gpu", "here"]) == 5
    assert "needs a --profile that measured a GPU" in capsys.readouterr().err


def test_profile_of_the_second_gpu_is_that_one():
    gpus = [{"name": "NVIDIA T4", "memory_bytes": 16 * 10**9}, {"name": "NVIDIA A100-SXM4-80GB", "memory_bytes": 80 * 10**9}]
    node = machine_of("here", [(Path("gpu.json"), profile_of([{**c, "gpu": 1} for c in GPU], gpus))])
    assert node.name == gpus[1]["name"] and node.device_bytes.value == pytest.approx(8e9)


@pytest.mark.parametrize("name, is_planned", [("NVIDIA H200", True), ("NVIDIA GH200 480GB", False), ("NVIDIA H200 NVL", True)])
def test_a_gh200_is_no_h200(name, is_planned):
    report = profile_of(GPU, [{"name": name, "memory_bytes": 141 * 10**9}])
    assert isinstance(machine_of("h200", [(Path("gpu.json"), report)]).uva, Surface) == is_planned  # the profile's


def test_room_is_what_the_limits_leave(monkeypatch):
    report = profile_of(HOST)
    for limits, room in (({"cgroup_bytes": 50 * GIB}, 50), ({"cgroup_bytes": 50 * GIB, "memory_room_bytes": 10 * GIB}, 10)):
        report["machine"]["limits"] = limits
        assert machine_of("none", [(Path("p.json"), report)]).host_bytes.value == 0.8 * room * GIB
    found = info.collect()
    found["limits"]["memory_room_bytes"] = GIB
    monkeypatch.setattr(info, "collect", lambda: found)
    assert machine_of("none", []).host_bytes.value == 0.8 * GIB


def test_profile_where_everything_was_skipped_changes_nothing_but_room():
    skipped = {"probe": "host_gather", "status": "skipped", "verdict": "SKIPPED", "provenance": "measured",
               "reason": {"kind": "NO_MEMORY", "text": "none"}}
    before = assumed_hardware("none")
    node = apply_profile(before, profile_of([skipped]), "x", of_gpu=True)
    assert (node.host_copy, node.disk_reads, node.host_latency) == (before.host_copy, before.disk_reads, before.host_latency)
    assert node.host_bytes.provenance is Provenance.MEASURED


def test_numbers_that_a_profile_assumes_stay_assumed():
    report = profile_of([{**gather(4e9), "provenance": "simulated"}])
    node = apply_profile(assumed_hardware("none"), report, "x", of_gpu=False)
    assert node.host_copy.at(256, GIB).provenance is Provenance.SIMULATED


@pytest.mark.parametrize("text, message", [
    ("{", "is not JSON"), ("[]", "no report of engram-kernels profile: it has no schema_version"),
    ('{"schema_version": 3}', "has schema_version 3, expected one of .1, 2.: measure again"),
    ('{"schema_version": 1}', "no list of cells or no machine"),
    ('{"schema_version": 1, "machine": {}, "cells": [3]}', "cell 0 is '3', expected an object"),
    ('{"schema_version": 1, "machine": {}, "cells": [{"probe": "disk_read", "status": "ok"}]}', "cell 0 has provenance None"),
    ('{"schema_version": 1, "machine": {}, "cells": [{"probe": "disk_read", "status": "ok", "provenance": "measured", '
     '"rows_per_s": -5}]}', r"cell 0 \(disk_read\) has rows_per_s -5, expected a positive number"),
    ('{"schema_version": 1, "machine": {}, "cells": [{"probe": "disk_read", "status": "ok", "provenance": [1]}]}',
     r"cell 0 has provenance \[1\]"),
    ('{"schema_version": 1, "machine": {}, "cells": [{"probe": "gpu_link", "status": "ok", "provenance": "measured", "gpu": 1}]}',
     "cell 0 is of GPU 1, which the machine does not have"),
    ('{"schema_version": 1, "machine": {"gpu": [{}, {}]}, "cells": [{"probe": "gpu_link", "status": "ok", '
     '"provenance": "measured", "gpu": 1.0}]}', "cell 0 is of GPU 1.0, which"),
    ('{"schema_version": 1, "machine": {"machine": [1]}, "cells": []}', "machine of the machine is .*, expected an object"),
    ('{"schema_version": 1, "machine": {"disk": "big"}, "cells": []}', "disk of the machine is 'big', expected an object"),
    ('{"schema_version": 1, "machine": {"disk": {"free_bytes": "big"}}, "cells": []}', "disk of the machine has free_bytes"),
    ('{"schema_version": 1, "machine": {"machine": {"memory_free_bytes": NaN}}, "cells": []}', "has memory_free_bytes 'nan'"),
    ('{"schema_version": 1, "machine": {"gpu": {"name": "x"}}, "cells": []}', "gpu of the machine is .*, expected a list"),
    ('{"schema_version": 1, "machine": {"gpu": ["x"]}, "cells": []}', "gpu 0 of the machine is 'x', expected an object")])
def test_bad_profile_is_named(tmp_path, capsys, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as err:
        load_profile(path)
    assert str(path) in str(err.value)
    assert cli.main(["plan", "--profile", str(path)]) == 1
    assert "bad.json" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, code, message", [
    (["--tokens-per-step", "0"], 2, "tokens is 0, expected at least 1"), (["--step-ms", "-1"], 2, "expected a positive time"),
    (["--unique-ratio", "1.5"], 2, "unique ratio is 1.5"), (["--hit-rate", "-0.5"], 2, "hit rate is -0.5"),
    (["--zipf", "0"], 2, "Zipf exponent is 0.0"), (["--layers", "3"], 2, "the model has 3 layers"),
    (["--gpus", "0"], 2, "gpus is 0"), (["--spec", "nowhere"], 2, "spec is"),
    (["--device-gib", "4"], 2, "there is no GPU"), (["--host-gib", "-1"], 2, "host_bytes is -"),
    (["--text", "nowhere.txt"], 2, "nowhere.txt is no file"), (["--profile", "nowhere.json"], 1, "nowhere.json"),
    (["--tokens-per-step", "9" * 400], 2, "tokens are more than"), (["--copies", "9" * 400], 2, "are more than"),
    (["--gpu", "here"], 5, "--gpu here needs a --profile that measured a GPU"), (["--host-gib", "1", "--disk-gib", "1"], 1, None),
    (["--host-gib", "1", "--disk-gib", "1", "--simulate", "t.json"], 2, "nothing fits, so there is nothing to simulate"),
    (["--host-gib", "999", "--simulate", "t.json", "--placement", "uva"], 2, "UVA cannot be simulated: there is no GPU"),
    (["--gpu", "h100", "--no-run"], 0, None), (["--preset", "paper"], 0, None)])
def test_exit_codes_and_what_is_said(tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", *arguments]) == code
    printed = capsys.readouterr()
    assert message is None or message in printed.err
    assert message is not None or printed.err == ""


@pytest.mark.parametrize("arguments", [["--gpu", "tape"], ["--copies", "one"], ["--text", "a", "--zipf", "1"],
                                       ["--preset", "1b"]])
def test_usage_errors_of_the_parser(arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["plan", *arguments])
    assert exit_.value.code == 2


def test_json_has_no_number_without_provenance(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "TABLE_BYTES", 1 * MIB)
    profile = write(tmp_path / "p.json", profile_of([*HOST, *DISK]))
    out = tmp_path / "sub" / "plan.json"
    assert cli.main(["plan", "--profile", str(profile), "--gpu", "h100", "--host-gib", "512", "--nodes", "2", "--gpus", "2",
                     "--json", str(out), "--simulate", str(tmp_path / "t.json"), "--tokens-per-step", "64", "--steps", "1"]) == 0
    plan = json.loads(out.read_text())
    assert numbers_without_provenance(plan) == []
    assert numbers_without_provenance({"a": [{"b": 1}], "c": {"value": 1}}) == ["$.a[0].b", "$.c.value"]  # the check itself
    assert set(plan["placements"]) == {"device", "device_cache", "uva", "staged", "file", "remote"}
    assert plan["winner"] and plan["runner_up"] and plan["flip"]["input"]
    assert plan["trial"]["measured"]["provenance"] == "measured"
    assert plan["simulation"]["step_s"]["provenance"] == "assumed"  # the H100's constants are
    assert plan["inputs"]["disk reads per second"]["provenance"] == "measured"
    assert plan["inputs"]["room in host memory"]["provenance"] == "given"


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("gpu", ["none", "h100"])
def test_every_spec_is_planned_by_name_and_from_a_file(tmp_path, capsys, name, gpu):
    path = tmp_path / "spec.json"
    getattr(EngramSpec, name)().to_json(path)
    plans = []
    for spec in (name, str(path)):
        arguments = ["--gpu", gpu, "--host-gib", "512", "--disk-gib", "512", "--no-run", "--json"]
        assert cli.main(["plan", "--spec", spec, *arguments]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0] == plans[1] and plans[0]["spec"] == name
    rows = getattr(EngramSpec, name)().layout().num_rows
    assert plans[0]["inputs"]["table size"]["value"] == sum(rows) * getattr(EngramSpec, name)().bytes_per_row


def test_spec_is_read_from_the_config_of_a_model(tmp_path, capsys):
    config = {"vocab_size": 129280, "hidden_size": 5120, "hc_mult": 4, "rms_norm_eps": 1e-20, "engram_layer_ids": [1, 14],
              "engram_num_embeddings": [384006168, 384016682], "engram_max_ngram_size": 4, "engram_vocab_size": 16000000,
              "engram_n_heads": 8, "engram_head_dim": 256, "engram_pad_token_id": 2, "engram_compressed_vocab_size": 99092}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v41", "text_config": config}))
    plans = []
    for spec in ("deepseek_v41", str(tmp_path / "config.json"), str(tmp_path)):
        assert cli.main(["plan", "--spec", spec, "--gpu", "h100", "--no-run", "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
        plans[-1].pop("spec")
    assert plans[0]["inputs"]["table size"] == {**plans[1]["inputs"]["table size"], "source": "spec deepseek_v41"}
    assert plans[1] == plans[2]
    for content, message in (('{"vocab_size": 5}', "has no n-gram memory"), ("{", ""), ("[1]", "")):
        (tmp_path / "config.json").write_text(content)
        assert cli.main(["plan", "--spec", str(tmp_path / "config.json"), "--gpu", "h100", "--no-run"]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"engram-kernels plan: {tmp_path}/config.json: ") and message in said and "Traceback" not in said


def test_json_alone_is_all_that_is_printed(capsys):
    assert cli.main(["plan", "--gpu", "h100", "--no-run", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["winner"] and "pick: " in printed.err
    assert cli.main(["plan", "--preset", "paper_8b", "--json"]) == 0
    comparison = json.loads(capsys.readouterr().out)
    assert numbers_without_provenance(comparison) == [] and [c["preset"] for c in comparison["paper"]] == ["paper_8b"]


def test_table_tags_every_number(capsys):
    assert cli.main(["plan", "--gpu", "h100", "--no-run"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and "\u2502" not in text  # no terminal: plain
    assert re.match(r"pick: .+\nrunner-up: .+\nflip: ", text)  # first
    table = text.partition("placement  ")[2].splitlines()
    for line in table:
        if line.startswith(("device memory", "UVA", "staged", "file", "remote")):
            assert line.split()[-1] in ("given", "measured", "simulated", "assumed"), line
    assert max(map(len, table[:7])) <= 100 and "input  " not in text
    assert cli.main(["plan", "--gpu", "h100", "--no-run", "--explain"]) == 0
    text = capsys.readouterr().out
    assert "(g) given, (m) measured, (s) simulated, (a) assumed" in text
    explained = text.partition("input  ")[2].partition("(g) given")[0].splitlines()[1:]
    assert len(explained) > 20 and all(re.search(r" \([gmsa]\)  +\S", line) for line in explained)


def test_profile_of_version_1_is_read(tmp_path):
    """Device memory was called hbm there."""
    old = profile_of([*HOST, *GPU], [{"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 10**9}])
    old["schema_version"] = 1
    for c in old["cells"]:
        c["placement"] = {"device": "hbm"}.get(c.get("placement"), c.get("placement"))
    node = machine_of(None, [(Path("old.json"), load_profile(write(tmp_path / "old.json", old)))])
    assert node.device_gather.at(256, GIB).value == pytest.approx(2e12)


def test_plan_without_a_profile_measures_this_machine(tmp_path, monkeypatch, capsys):
    """With the probes of `profile`, through the prefetcher, so that its report is one; and only where that can matter."""
    monkeypatch.setattr(measure_here, "measure_here", MEASURE_HERE)
    monkeypatch.setattr(measure_here, "TABLE_BYTES", 32 * MIB)
    monkeypatch.setattr(measure_here, "_FILE_BYTES", 32 * MIB)
    monkeypatch.setattr(session_module, "_CELL_SECONDS", {"quick": 0.0})
    monkeypatch.setattr(trial, "TABLE_BYTES", 1 * MIB)
    report = measure_here.measure_here(EngramSpec.demo_v1(), 64)
    jsonschema.Draft202012Validator(SCHEMA).validate(report)
    assert {c["op"] for c in report["cells"] if c["probe"] == "host_gather" and c["status"] == "ok"} == {"prefetcher"}
    out = tmp_path / "plan.json"
    assert cli.main(["plan", "--spec", "demo_v1", "--host-gib", "64", "--json", str(out)]) == 0
    inputs = json.loads(out.read_text())["inputs"]
    assert inputs["host gather rate"]["source"].startswith("this machine: host_gather (row_bytes 256")
    assert inputs["host lookup latency"]["provenance"] == "measured"


@pytest.mark.parametrize("arguments, measures", [
    ([], 1), (["--no-run"], 1), (["--no-measure"], 0), (["--gpu", "h100"], 1), (["--gpu", "h100", "--no-run"], 0),
    (["--host-gib", "0", "--disk-gib", "0"], 0)])
def test_plan_measures_only_what_decides(monkeypatch, capsys, arguments, measures):
    monkeypatch.setattr(trial, "TABLE_BYTES", 1 * MIB)
    calls = []
    monkeypatch.setattr(measure_here, "measure_here", lambda spec, tokens: calls.append(1) or profile_of([*HOST, *DISK]))
    cli.main(["plan", "--spec", "demo_v1", "--host-gib", "64", *arguments])
    assert len(calls) == measures
    constants = "h100" in arguments or measures == 0
    capsys.readouterr()
    cli.main(["plan", "--spec", "demo_v1", "--host-gib", "64", *arguments, "--json"])
    source = json.loads(capsys.readouterr().out)["inputs"]["host gather rate"]["source"]
    assert ("README" in source or "performance" in source) == constants


def test_table_is_rich_on_a_terminal_and_plain_with_no_color(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    for no_color, rich in ((False, True), (True, False)):
        if no_color:
            monkeypatch.setenv("NO_COLOR", "1")
        out = Terminal()
        Printer(out).table(("a", "b"), [("1", "[2]")], [None])
        assert ("\u2502" in out.getvalue()) == rich and "[2]" in out.getvalue()


@pytest.mark.parametrize("pick", ["staged", "file", "uva", "remote", "device_cache"])
def test_trial_runs_the_pick_and_says_its_error(monkeypatch, pick):
    monkeypatch.setattr(trial, "TABLE_BYTES", 1 * MIB)
    if pick == "uva" and torch.cuda.is_available():
        pytest.skip("it can run here")
    result = trial.run_trial(pick, workload(tokens=10), cpu_machine(), machine(), 0.05)
    runs_here = pick in ("staged", "file")
    assert result.placement == (pick if runs_here else "staged") and (result.instead_of is None) == runs_here
    assert result.error.value == pytest.approx(result.predicted.value / result.actual.value - 1)
    assert result.actual.provenance is Provenance.MEASURED and result.actual.value > 0
    assert result.spread[0].value <= result.actual.value <= result.spread[1].value
    # 160 rows of 128 bytes at 2 GB/s, and for a file 160 pages at 1000 per second
    ms = 160 * 128 / 2e9 if pick != "file" else (160 * (1 - (1 - 1 / 8192) ** 160) / (160 / 8192)) / 1e3
    assert result.predicted.value == pytest.approx(ms, rel=0.05)


@pytest.mark.parametrize("spec", [EngramSpec.deepseek_v41(), EngramSpec.qwen4_ple(row_format="fp8_e4m3_tensor"),
                                  EngramSpec.demo_v1(row_format="int8_group32")])
def test_trial_makes_tables_of_every_format(monkeypatch, spec):
    monkeypatch.setattr(trial, "TABLE_BYTES", 1 * MIB)
    monkeypatch.setattr(trial, "_PIECE_ROWS", 1 << 10)
    for placement in ("staged", "file"):
        ran = trial.run_trial(placement, workload(spec, layers=32, tokens=4), cpu_machine(), machine(), 0.02)
        assert ran.placement == placement and ran.actual.value > 0


def test_trial_on_a_device_times_the_op(monkeypatch):
    """The path of a GPU, driven on the CPU: the table that a kernel reads, and the op called on it."""
    monkeypatch.setattr(trial, "TABLE_BYTES", 1 * MIB)
    small = trial._small(workload(tokens=8))
    table = trial._table(small.spec, 1 * MIB // 128, "staged", Path())
    median, q1, q3, samples = trial._time_gather(table, trial._requests(small), "cpu", 0.02)
    assert 0 < q1 <= median <= q3 and len(samples) >= 9


def test_trial_of_a_gpu_that_no_profile_measured_uses_what_was_planned(monkeypatch):
    monkeypatch.setattr(trial, "TABLE_BYTES", 1 * MIB)
    monkeypatch.setattr(trial, "runnable", lambda placement: None)
    monkeypatch.setattr(trial, "_table", lambda *_: None)
    monkeypatch.setattr(trial, "_time_gather", lambda *_: (2e-6, 1e-6, 3e-6, (2e-6,)))
    for here, rate in ((cpu_machine(), 1e9), (machine(uva=2e9), 2e9)):
        result = trial.run_trial("uva", workload(tokens=10), here, machine())
        assert result.placement == "uva" and result.predicted.value == pytest.approx(160 * 128 / rate)


@pytest.mark.parametrize("missing, message", [("tokenizers", "--text needs tokenizers: pip install"),
                                              (None, "--text needs the compiled module: no compiler")])
def test_text_without_what_it_needs_is_exit_code_5(tmp_path, monkeypatch, capsys, missing, message):
    from engram_kernels.plan import inputs as command
    (tmp_path / "a.txt").write_text("words")
    find = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    if missing is None:
        monkeypatch.setattr(command, "COMPILE_ERROR", "no compiler")
    assert cli.main(["plan", "--text", str(tmp_path / "a.txt")]) == 5
    assert message in capsys.readouterr().err


def test_empty_text_is_a_failure(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("")
    assert cli.main(["plan", "--text", str(tmp_path / "a.txt")]) == 1
    assert "a.txt holds no token" in capsys.readouterr().err


def test_trial_ignores_a_profile_of_another_machine(tmp_path):
    mine = info.collect()["machine"]
    other, same = profile_of(HOST, cpu="another CPU"), profile_of(HOST)
    same["machine"]["machine"] |= {"cpu": mine["cpu"], "cores": mine["cores"]}
    assert profiles_of_this_machine([(Path("o.json"), other)]) == []
    assert len(profiles_of_this_machine([(Path("s.json"), same)])) == 1


def test_row_format_of_the_plan(capsys):
    assert cli.main(["plan", "--spec", "qwen4_ple", "--row-format", "nvfp4", "--gpu", "h100", "--no-run"]) == 0
    assert "16 rows of 90 bytes per token" in capsys.readouterr().out
    assert cli.main(["plan", "--row-format", "fp9", "--gpu", "h100", "--no-run"]) == 2
    assert "--row-format: " in capsys.readouterr().err
