"""The commands info and bench."""
import json

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


def test_bench_says_what_is_missing(tmp_path, capsys):
    assert cli.main(["bench", "--bench-dir", str(tmp_path)]) == 1
    assert "holds no benchmarks" in capsys.readouterr().err
    (tmp_path / "harness.py").touch()
    (tmp_path / "bench_gate.py").touch()
    assert cli.main(["bench", "nothing", "--bench-dir", str(tmp_path)]) == 1
    assert "no benchmark bench_nothing.py; there are gate" in capsys.readouterr().err
