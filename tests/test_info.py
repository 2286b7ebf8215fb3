"""The commands info and bench."""
import json
import platform
from pathlib import Path

import pytest

from engram_kernels import backends, cli, info


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


def test_info_exit_codes_are_in_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "3 regression" in said and "5 a required capability is absent" in said
    with pytest.raises(SystemExit) as stop:
        cli.main(["profile", "--no-such-option"])
    assert stop.value.code == 2


def test_info_where_the_system_tells_nothing(monkeypatch):
    monkeypatch.setattr(info, "_read", lambda path: None)
    found = info.collect()
    assert found["machine"]["memory_bytes"] is None and found["limits"]["cgroup_bytes"] is None
    assert any("no limit known" in line for line in info.lines(found))


def run_file(path, seconds):
    path.write_text(json.dumps({"benchmarks": [{"group": "g", "name": "ours", "extra_info": {"contender": "ours", "role": "ours"},
                                                "stats": {"data": [seconds * (1 + i / 1000) for i in range(15)]}}]}))
    return str(path)


@pytest.mark.parametrize("after, code, verdict", [(1.0, 0, "1 SAME"), (1.5, 3, "1 SLOWER"), (0.5, 0, "1 FASTER")])
def test_bench_compare_exit_codes(tmp_path, capsys, after, code, verdict):
    files = [run_file(tmp_path / "a.json", 1.0), run_file(tmp_path / "b.json", after)]
    assert cli.main(["bench", "--compare", *files]) == code
    assert verdict in capsys.readouterr().out


def test_bench_gives_rates_and_their_share_of_the_peak(tmp_path, capfd):
    pytest.importorskip("pytest_benchmark")
    bench = Path(__file__).parents[1] / "bench"
    for name in ("harness.py", "conftest.py"):
        (tmp_path / name).write_text((bench / name).read_text())
    (tmp_path / "bench_tiny.py").write_text(
        "from harness import measure\n"
        "def test_ours(benchmark):\n"
        "    measure(benchmark, lambda: bytes(1 << 20), group='tiny', contender='ours', role='ours', num_bytes=1 << 20,\n"
        "            units=1)\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\naddopts = --import-mode=importlib\n")
    out = tmp_path / "run.json"
    assert cli.main(["bench", "tiny", "--bench-dir", str(tmp_path), "--json", str(out)]) == 0
    run = json.loads(out.read_text())
    assert run["peak_bytes_per_s"] > 1e8
    header, line = (text.split(" | ") for text in capfd.readouterr().out.splitlines() if "workload" in text or "**ours**" in text)
    rate, share = float(line[header.index("GB/s")]), line[header.index("of peak")]
    assert float(share.rstrip("%")) == pytest.approx(100 * rate * 1e9 / run["peak_bytes_per_s"], abs=10)
    assert cli.main(["bench", "--compare", str(out), str(out)]) == 0
    assert "tiny" in capfd.readouterr().out


def test_bench_says_what_is_missing(tmp_path, capsys):
    assert cli.main(["bench", "--bench-dir", str(tmp_path)]) == 1
    assert "holds no benchmarks" in capsys.readouterr().err
    (tmp_path / "harness.py").touch()
    (tmp_path / "bench_gate.py").touch()
    assert cli.main(["bench", "nothing", "--bench-dir", str(tmp_path)]) == 1
    assert "no benchmark bench_nothing.py; there are gate" in capsys.readouterr().err
