"""The commands info and bench."""
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engram_kernels import EngramSpec, backends, capacity, info
from engram_kernels.cli import bench as bench_command
from engram_kernels.cli import info as info_command
from engram_kernels.cli import main as cli


def test_info_names_every_backend_and_reason(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for backend in backends.BACKENDS:
        assert f"\n{backend} " in text
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["backends"]) == set(backends.ops()) and found["versions"]["torch"]
    if Path("/proc/cpuinfo").exists():
        assert set(found["machine"]["cpu_features"]) <= set(Path("/proc/cpuinfo").read_text().split())
        assert "sse2" in found["machine"]["cpu_features"] or platform.machine() != "x86_64"


def test_info_says_what_a_memory_holds(capsys):
    assert cli.main(["info", "--spec", "deepseek_v41", "--json"]) == 0
    memory, spec = json.loads(capsys.readouterr().out)["memory"], EngramSpec.deepseek_v41()
    assert memory["table_parameters"] + memory["module_parameters"] == spec.num_parameters
    assert memory["flops_per_token"] == spec.flops_per_token() and memory["bytes"] == spec.bytes()
    assert memory["table_bytes"]["bf16"] == spec.bytes("bf16")
    text = "\n".join(info_command.memory_lines(memory))
    assert "196,613,849,600 parameters in rows" in text and "188.8 GiB as fp8_e4m3_block32" in text
    assert cli.main(["info", "--spec", "no_such_spec"]) == 2 and "no_such_spec" in capsys.readouterr().err


def test_info_exit_codes_are_in_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "3 regression" in said and "5 a required capability is absent" in said
    with pytest.raises(SystemExit) as stop:
        cli.main(["profile", "--no-such-option"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "usage: engram-kernels profile" in said and "--no-such-option" in said


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plan", "--help"], ["budget", "--help"],
                                       ["demo", "--no-such-option"]])
def test_commands_answer_before_torch_is_imported(tmp_path, arguments):
    """What the command needs to read its arguments takes half a second at most of a CPU, and imports neither torch nor numpy."""
    start = tmp_path / "start.py"
    start.write_text(f"""
import sys, time
sys.path.insert(0, {str(Path(info.__file__).parents[1])!r})
import engram_kernels_command
try:
    engram_kernels_command.main()
finally:
    heavy = {{"torch", "numpy", "rich", "triton"}} & set(sys.modules)
    print(f"SPENT {{time.process_time()}} {{sorted(heavy)}}")
""")
    run = subprocess.run([sys.executable, str(start), *arguments], capture_output=True, text=True)
    seconds, heavy = re.search(r"SPENT (\S+) (.*)", run.stdout).groups()
    assert run.returncode == (2 if "--no-such-option" in arguments else 0) and heavy == "[]" and float(seconds) < 0.5
    assert ("engram-kernels" in run.stdout) or "unrecognized arguments" in run.stderr


def test_command_runs_the_package_once_the_arguments_are_read(tmp_path):
    """The ops are registered, and what a subcommand imports is the package itself."""
    start = tmp_path / "start.py"
    start.write_text(f"""
import sys
sys.path.insert(0, {str(Path(info.__file__).parents[1])!r})
sys.argv = ["engram-kernels", "info", "--json"]
import engram_kernels_command
assert engram_kernels_command.main() == 0
import torch, engram_kernels
assert engram_kernels.gate.__module__ == "engram_kernels.ops.gate" and torch.ops.engram_kernels.gate.default
""")
    run = subprocess.run([sys.executable, str(start)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["file_reads"]["way"] in ("io_uring", "preadv", "python")


def test_help_shows_a_default_only_where_there_is_one(capsys):
    for command in ("demo", "info", "check", "profile", "plan", "bench", "pack"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert not re.search(r"default: (None|False|\[)", said)
        assert not re.search(r"; default: [^;()]{,60}\(default", said), command  # one option, twice


def test_info_says_how_files_are_read_and_what_is_lost():
    for way, why, words in (("io_uring", None, "read by io_uring."), ("preadv", "liburing was not found", "82 % of the reads"),
                            ("python", "no compiler", "one read after the other")):
        said = info.file_reads_text({"way": way, "why": why})
        assert words in said and (why is None or said.endswith(f"The reason: {why}."))


def test_info_where_the_system_tells_nothing(monkeypatch):
    monkeypatch.setattr(info, "_read", lambda path: None)
    monkeypatch.setattr(capacity.SYSTEM, "read", lambda path: "")
    monkeypatch.setattr(capacity.SYSTEM, "limit", lambda name: None)
    found = info.collect()
    assert found["machine"]["memory_bytes"] is None and found["limits"]["cgroup_bytes"] is None
    assert found["limits"]["memory_room_bytes"] is None and info.memory_room(found) is None
    said = "\n".join(info_command.lines(found))
    assert "an unknown amount free" in said and "cgroup: none" in said and "free within all limits: an unknown amount" in said
    assert "None" not in said


def test_info_says_no_limit_where_there_is_none():
    found = info.collect()
    found["limits"].update(memlock_bytes=None, shm_free_bytes=None, open_files=None, cgroup_bytes=8 << 20)
    said = next(line for line in info_command.lines(found) if line.startswith("limits"))
    for text in ("cgroup: 8192 KiB", "(mlock and RDMA, not CUDA): none", "/dev/shm: not there", "open files: no limit"):
        assert text in said
    assert "not there free" not in said


def test_info_knows_the_limit_of_a_parent_cgroup(monkeypatch):
    files = {"/proc/self/cgroup": "0::/a/b\n", "/proc/meminfo": "MemAvailable: 4000 kB\n",
             "/proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
             "/sys/fs/cgroup/a/memory.max": "900000\n", "/sys/fs/cgroup/a/memory.current": "200000\n",
             "/sys/fs/cgroup/a/b/memory.max": "max\n"}
    monkeypatch.setattr(capacity.SYSTEM, "read", lambda path: files.get(path, ""))
    monkeypatch.setattr(capacity.SYSTEM, "limit", lambda name: None)
    found = info.collect()
    assert (found["limits"]["cgroup_bytes"], found["limits"]["memory_room_bytes"]) == (900_000, 700_000)
    assert info.memory_room(found) == 700_000
    assert info.memory_room({"machine": {"memory_free_bytes": 5}, "limits": {"cgroup_bytes": 3}}) == 3
    assert info.memory_room({}) is None


def run_file(path, seconds):
    path.write_text(json.dumps({"benchmarks": [{"group": "g", "name": "ours", "extra_info": {"contender": "ours", "role": "ours"},
                                                "stats": {"data": [seconds * (1 + i / 1000) for i in range(15)]}}]}))
    return str(path)


@pytest.mark.parametrize("arguments, message", [
    (["--spec", "nope"], "spec is 'nope', expected deepseek_v41"), (["--quick", "--json", "x.json"], "--quick times nothing"),
    (["--json", "/proc/none/run.json"], "--json /proc/none/run.json cannot be written")])
def test_bench_usage_errors(capsys, arguments, message):
    assert cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("change", [
    lambda e: e.update(group=["g"]), lambda e: e["extra_info"].update(contender=[1]), lambda e: e["extra_info"].update(role=None),
    lambda e: e.update(extra_info=[1]), lambda e: e["stats"].update(data=[]), lambda e: e["stats"].update(data=[0.0] * 15),
    lambda e: e["stats"].update(data=[-1.0] * 15), lambda e: e["stats"].update(data=[float("nan")]),
    lambda e: e["stats"].update(data=["1"] * 15), lambda e: e["stats"].update(data=[10**400]), lambda e: e.update(stats=None)])
def test_bench_compare_refuses_what_is_no_run(tmp_path, capsys, change):
    good, bad = run_file(tmp_path / "a.json", 1.0), run_file(tmp_path / "b.json", 1.0)
    run = json.loads(Path(bad).read_text())
    change(run["benchmarks"][0])
    Path(bad).write_text(json.dumps(run))
    assert cli.main(["bench", "--compare", good, bad]) == 1
    assert "b.json: no run of the benchmarks with its samples" in capsys.readouterr().err
    Path(bad).write_text("[]")
    assert cli.main(["bench", "--compare", bad, good]) == 1


def test_bench_compare_names_what_is_gone_and_other_machines(tmp_path, capsys):
    files = [Path(run_file(tmp_path / name, 1.0)) for name in ("a.json", "b.json")]
    assert cli.main(["bench", "--compare", *map(str, files)]) == 0
    assert "only in" not in (said := capsys.readouterr().out) and "not the same machine" not in said
    for file, cpu, extra in ((files[0], "a CPU", [{"group": "h"}]), (files[1], "another CPU", [])):
        run = json.loads(file.read_text())
        run["machine_info"] = {"cpu": {"brand_raw": cpu, "count": 2}, "node": "x"}
        run["benchmarks"] += [{**run["benchmarks"][0], **e} for e in extra]
        file.write_text(json.dumps(run))
    assert cli.main(["bench", "--compare", *map(str, files)]) == 0
    said = capsys.readouterr().out
    assert "a.json: h, ours" in said and "not the same machine: a CPU, 2 CPUs, x before, another CPU, 2 CPUs, x after" in said


def test_bench_compare_of_named_ops(tmp_path, capsys):
    files = []
    for name, gate in (("a.json", 1.0), ("b.json", 1.5)):
        run = json.loads(Path(run_file(tmp_path / name, 1.0)).read_text())
        entry = run["benchmarks"][0]
        slower = {**entry, "group": "h", "stats": {"data": [gate * s for s in entry["stats"]["data"]]}}
        run["benchmarks"] = [{**entry, "fullname": "bench/bench_gather_rows.py::test_ours"},
                             {**slower, "fullname": "bench/bench_gate.py::test_ours[1]"}]
        (tmp_path / name).write_text(json.dumps(run))
        files.append(str(tmp_path / name))
    assert cli.main(["bench", "gather_rows", "--compare", *files]) == 0
    assert "1 SAME" in (said := capsys.readouterr().out) and "0 SLOWER" in said
    assert cli.main(["bench", "gate", "--compare", *files]) == cli.main(["bench", "--compare", *files]) == 3
    assert cli.main(["bench", "hash", "--compare", *files]) == 2
    assert "has benchmarks of hash" in capsys.readouterr().err


@pytest.mark.parametrize("after, code, verdict", [(1.0, 0, "1 SAME"), (1.5, 3, "1 SLOWER"), (0.5, 0, "1 FASTER")])
def test_bench_compare_exit_codes(tmp_path, capsys, after, code, verdict):
    files = [run_file(tmp_path / "a.json", 1.0), run_file(tmp_path / "b.json", after)]
    assert cli.main(["bench", "--compare", *files]) == code
    assert verdict in capsys.readouterr().out


def test_bench_gives_rates_and_their_share_of_the_peak(tmp_path, capfd, monkeypatch):
    pytest.importorskip("pytest_benchmark")
    bench = Path(__file__).parents[2] / "bench"
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # with it pytest-benchmark times nothing
    monkeypatch.chdir(tmp_path.parents[1])  # what is relative is so to here, not to the checkout
    here = tmp_path.relative_to(tmp_path.parents[1])
    for name in ("harness.py", "conftest.py"):
        (tmp_path / name).write_text((bench / name).read_text())
    (tmp_path / "bench_tiny.py").write_text(
        "from harness import measure\n"
        "def test_ours(benchmark):\n"
        "    measure(benchmark, lambda: bytes(1 << 20), group='tiny', contender='ours', role='ours', num_bytes=1 << 20,\n"
        "            units=1)\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\naddopts = --import-mode=importlib\n")
    out = tmp_path / "run.json"
    assert cli.main(["bench", "tiny", "--bench-dir", str(here), "--json", str(here / "run.json")]) == 0
    run = json.loads(out.read_text())
    assert run["peak_bytes_per_s"] > 1e8
    header, line = (text.split(" | ") for text in capfd.readouterr().out.splitlines() if "workload" in text or "**ours**" in text)
    rate, share = float(line[header.index("GB/s")]), line[header.index("of peak")]
    assert float(share.rstrip("%")) == pytest.approx(100 * rate * 1e9 / run["peak_bytes_per_s"], abs=10)
    controls = run["benchmarks"][0]["extra_info"]["controls"]
    assert {name: len(times) for name, times in controls.items()} == {"loop": 5, "pages": 5, "read": 5}
    assert cli.main(["bench", "tiny", "--compare", str(out), str(out)]) == 0
    assert "tiny" in capfd.readouterr().out
    ours = run["benchmarks"][0]
    for name, seconds in (("fast.json", 1e-4), ("slow.json", 2e-4)):  # steady, like the controls: no noise hides that
        ours["stats"]["data"], ours["extra_info"]["controls"] = [seconds] * 20, {control: [1e-3] * 5 for control in controls}
        (tmp_path / name).write_text(json.dumps(run))
    assert cli.main(["bench", "tiny", "--compare", str(tmp_path / "fast.json"), str(here / "slow.json")]) == 3
    assert "1 SLOWER" in capfd.readouterr().out


def test_bench_counts_the_benchmarks_that_are_done(tmp_path):
    (tmp_path / "bench_x.py").write_text("import pytest\n"
                                         "@pytest.mark.parametrize('n', range(3))\n"
                                         "def test_ok(n): pass\n"
                                         "def test_skipped(): pytest.skip('x.s')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\n")
    done = []
    code, said = bench_command._run_pytest([str(tmp_path / "bench_x.py")], tmp_path, done.append)
    assert code == 0 and done == [1] * 4 and "3 passed, 1 skipped" in said


def test_bench_says_what_is_missing(tmp_path, capsys):
    assert cli.main(["bench", "--bench-dir", str(tmp_path)]) == 1
    assert "holds no benchmarks" in capsys.readouterr().err
    (tmp_path / "harness.py").touch()
    (tmp_path / "bench_gate.py").touch()
    assert cli.main(["bench", "nothing", "--bench-dir", str(tmp_path)]) == 2
    assert "no benchmark bench_nothing.py; there are gate" in capsys.readouterr().err
