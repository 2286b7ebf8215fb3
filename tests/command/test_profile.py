"""`engram-kernels profile`: the report, and machines that lack something."""
import dataclasses
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jsonschema
import pytest
from profile_machine import MIB, SCHEMA, check, kinds, make_fast, ok, profile, quiet_machine  # noqa: F401  a fixture

from engram_kernels.cli import main as cli
from engram_kernels.profile import arena, cells, machine, probes_disk, probes_host, statistics
from engram_kernels.profile import run as profile_command
from engram_kernels.profile import session as session_module
from engram_kernels.profile.session import Options, Session


def test_profile_report_is_what_the_schema_says(tmp_path, fast, compiled, capsys):
    report = profile(tmp_path)
    assert report["complete"] and report["mode"] == "quick"
    assert set(report["probes"]) >= {"host_limits", "host_stream", "host_memcpy", "host_latency", "host_gather", "disk_read"}
    assert {c["op"] for c in ok(report, "host_stream")} == {"read", "copy", "triad"}
    rows = ok(report, "host_gather")
    assert {c["row_bytes"] for c in rows} == {64, 264, 512, 4096}
    assert {c["order"] for c in rows} == {"uniform", "sorted", "deduplicated", "zipf"}
    assert {c["prefetch"] for c in rows if c["op"] == "plain"} == {0, 4, 16, 64}
    for cell in (c for c in report["cells"] if c.get("median")):
        assert cell["least"] <= cell["low"] <= cell["median"] <= cell["high"] and len(cell["samples"]) >= 5
        assert cell["provenance"] == "measured" and (cell["status"] == "ok" or cell["verdict"] == "ABOVE_PEAK")
        assert cell["control"] > 0, cell["probe"]
    text = capsys.readouterr().out
    assert "\x1b[" not in text and "host_gather" in text and "NO_GPU" in text
    assert [f.name for f in tmp_path.iterdir()] == ["report.json"]  # the disk probe's file had no name, and no temporary is left


@pytest.mark.parametrize("change, message", [
    (lambda r: r["cells"][0].update(probe="other"), "is not one of"),
    (lambda r: r["cells"][0].update(extra=1), "Additional properties"),
    (lambda r: r["cells"].clear(), "should be non-empty|is too short"),
    (lambda r: next(c for c in r["cells"] if c.get("samples")).update(samples=[]), "should be non-empty|is too short"),
    (lambda r: next(c for c in r["cells"] if c.get("median")).update(median=None), "is not of type"),
    (lambda r: next(c for c in r["cells"] if c.get("median")).update(provenance="guessed"), "is not one of"),
])
def test_profile_schema_refuses(change, message):
    session = Session(Options(), quiet_machine())
    with session.probe("host_memcpy", 5):
        session.measure({"probe": "host_memcpy", "bytes": 8}, lambda: 1e-3)
    report = check(session.report())
    change(report)
    with pytest.raises(jsonschema.ValidationError, match=message):
        jsonschema.Draft202012Validator(SCHEMA).validate(report)


# machines that lack something: the run ends, with a valid report that says so

def test_profile_without_the_compiled_module(tmp_path, fast, monkeypatch):
    for module in (probes_host, probes_disk, arena):
        monkeypatch.setattr(module, "COMPILE_ERROR", "no compiler")
    report = profile(tmp_path)
    assert kinds(report, "host_stream") == kinds(report, "disk_read") == {"NO_COMPILED_MODULE"}
    assert any(c["op"] == "gather_rows" for c in ok(report, "host_gather"))


def test_profile_without_huge_pages(tmp_path, fast, monkeypatch, compiled):
    monkeypatch.setattr(arena, "huge_page_bytes", lambda address: 0)
    report = profile(tmp_path)
    assert report["probes"]["host_gather"]["verdict"] == "NO_HUGEPAGES" and "madvise" in report["probes"]["host_gather"]["advice"]
    assert {c["huge_pages"] for c in ok(report, "host_gather")} == {False}


def test_profile_without_smaps(monkeypatch, tmp_path):
    monkeypatch.setattr(arena, "_SMAPS", tmp_path / "none")
    assert arena.huge_page_bytes(1) == 0


def test_profile_without_dev_shm(tmp_path, monkeypatch):
    found = quiet_machine()
    found["limits"]["shm_free_bytes"] = None
    found["limits"]["memlock_bytes"] = 8 * MIB
    monkeypatch.setattr(machine, "collect", lambda folder: found)
    monkeypatch.setattr(probes_host, "SECONDS", {"host_limits": 1})
    report = profile(tmp_path, "--only", "host")
    flags = ok(report, "host_limits")[0]["flags"]
    assert any("/dev/shm" in f for f in flags)
    assert any(f.startswith("memlock is 8192 KiB") and "CUDA's pinned memory is not" in f for f in flags)


@pytest.mark.parametrize("number, kind", [(errno.EROFS, "READ_ONLY"), (errno.EACCES, "READ_ONLY"),
                                          (errno.ENOSPC, "NO_DISK_SPACE"), (errno.EIO, "ERROR")])
def test_profile_in_a_folder_that_cannot_be_written(tmp_path, fast, monkeypatch, compiled, number, kind):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(probes_disk.tempfile, "TemporaryFile", refuse)
    report = profile(tmp_path, "--only", "disk", code=1 if kind == "ERROR" else 5)
    assert kinds(report, "disk_read") == {kind} and not report["machine"]["disk"]["writable"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_profile_in_a_read_only_folder(tmp_path, fast, compiled):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    report = profile(tmp_path, "--only", "disk", "--disk-dir", str(folder), code=5)
    assert kinds(report, "disk_read") == {"READ_ONLY"}


def test_profile_with_one_gigabyte_of_disk(tmp_path, monkeypatch, compiled):
    monkeypatch.setattr(session_module, "_CELL_SECONDS", {"quick": 0.0})
    monkeypatch.setattr(probes_disk, "_WRITE_SECONDS", {"quick": 60.0})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 34, 0, 1 << 30))
    report = profile(tmp_path, "--only", "disk")
    assert {c["table_bytes"] for c in ok(report, "disk_read")} == {128 * MIB}  # an eighth
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 34, 0, 100 * MIB))
    assert kinds(profile(tmp_path, "--only", "disk", code=5), "disk_read") == {"NO_DISK_SPACE"}


def test_profile_where_the_file_system_has_no_direct_reads(tmp_path, fast, monkeypatch, compiled):
    class Buffered:
        def tier(self, *args):
            return self

        def stats(self):
            return {"io": "preadv", "direct": False}
    monkeypatch.setattr(probes_disk, "make_reader", lambda *args: Buffered())
    assert kinds(profile(tmp_path, "--only", "disk", code=5), "disk_read") == {"NO_DIRECT_IO"}


@pytest.mark.parametrize("gib", [0.001, 0.0])
def test_profile_with_little_memory(tmp_path, fast, compiled, gib):
    report = profile(tmp_path, "--only", "host", "--max-memory-gib", str(gib))
    assert "NO_MEMORY" in kinds(report, "host_gather") & kinds(report, "host_stream") & kinds(report, "host_latency")
    assert ("NO_MEMORY" in kinds(report, "host_memcpy")) == (gib == 0)


def test_profile_where_memory_comes_slowly(tmp_path, fast, monkeypatch, compiled):
    whole = arena.Arena

    class Slow(whole):
        def __init__(self, num_bytes, *args, **kwargs):
            super().__init__(num_bytes, *args, **{**kwargs, "max_seconds": 0})
    monkeypatch.setattr(probes_host, "Arena", Slow)
    report = profile(tmp_path, "--only", "host")
    assert max(c["table_bytes"] for c in ok(report, "host_gather")) == 64 * MIB
    assert "TIME_BUDGET" in kinds(report, "host_gather")


def test_profile_where_the_system_tells_nothing(tmp_path, fast, monkeypatch, compiled):
    from engram_kernels import info
    monkeypatch.setattr(info, "_read", lambda path: None)
    monkeypatch.setattr(machine, "_read", lambda path: None)
    monkeypatch.setattr(machine, "_NODES", tmp_path / "none")
    report = profile(tmp_path, "--only", "host")
    assert report["machine"]["numa"] == [] and ok(report, "host_gather")


@pytest.mark.parametrize("kind", ["tmpfs", "ramfs"])
def test_profile_does_not_call_memory_a_disk(tmp_path, fast, monkeypatch, compiled, kind):
    found = quiet_machine()
    found["disk"]["file_system"] = kind
    monkeypatch.setattr(machine, "collect", lambda folder: found)
    report = profile(tmp_path, "--only", "disk", code=5)
    assert kinds(report, "disk_read") == {"NOT_SUPPORTED"} and kind in report["probes"]["disk_read"]["advice"]


# the run

@pytest.fixture
def one_cell(monkeypatch):
    """A run of a single cell."""
    def run(session):
        with session.probe("gpu_link", 5):
            session.measure({"probe": "gpu_link", "op": "h2d", "engine": "copy", "pinned": True, "bytes": 64, "table_bytes": 64},
                            lambda: 1e-3)
    monkeypatch.setitem(profile_command.GROUPS, "gpu", run)


def test_profile_report_goes_through_links_and_into_pipes(tmp_path, one_cell, capsys):
    target, link, pipe = tmp_path / "target.json", tmp_path / "link.json", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    assert cli.main(["profile", "--only", "gpu", "--json", str(link)]) == 0
    assert link.is_symlink() and check(json.loads(target.read_text()))["complete"]
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    assert cli.main(["profile", "--only", "gpu", "--json", str(pipe)]) == 0
    reader.join(20)
    assert pipe.is_fifo() and check(json.loads(got[0]))["complete"]  # once, not after every probe
    session_module.write_whole(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()
    capsys.readouterr()
    assert cli.main(["profile", "--only", "gpu", "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert check(json.loads(printed.out))["complete"] and "gpu_link" in printed.err


@pytest.mark.parametrize("arguments, message", [
    (["--disk-dir", "nowhere"], "--disk-dir nowhere is no folder"), (["--disk-dir", "file"], "--disk-dir file is no folder"),
    (["--trace", "nowhere.npy"], "--trace nowhere.npy: "), (["--trace", "file"], "--trace file: "),
    (["--json", "."], "--json . is a folder"), (["--json", "x", "--html", "./x"], "--json and --html are both x"),
    (["--plots", "file"], "--plots file is no folder"), (["--max-memory-gib", "inf"], "'inf' is no number"),
    (["--max-memory-gib", "nan"], "'nan' is no number"), (["--max-memory-gib", "-1"], "'-1' is no size"),
    (["--max-memory-gib", "much"], "'much' is no number")])
def test_profile_usage_errors(tmp_path, one_cell, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    try:
        code = cli.main(["profile", "--only", "gpu", *arguments])
    except SystemExit as stop:  # the parser's
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err


def test_profile_a_probe_that_breaks_costs_its_own_cells(tmp_path, fast, monkeypatch, compiled):
    monkeypatch.setattr(probes_host, "latency", lambda session: 1 / 0)
    monkeypatch.setattr(probes_host, "memcpy", lambda session: None)
    report = profile(tmp_path, "--only", "host", code=1)
    assert report["probes"]["host_latency"]["verdict"] == report["probes"]["host_memcpy"]["verdict"] == "FAILED"
    assert "ZeroDivisionError" in str([c for c in report["cells"] if c["probe"] == "host_latency"])
    assert ok(report, "host_gather")  # the next one


def test_profile_what_breaks_outside_a_probe_leaves_a_report(tmp_path, monkeypatch):
    monkeypatch.setitem(profile_command.GROUPS, "gpu", lambda session: 1 / 0)
    report = profile(tmp_path, "--only", "gpu", code=1)
    assert report["complete"] and "ZeroDivisionError" in report["cells"][0]["reason"]["text"]


def test_profile_interrupted_leaves_a_valid_partial_file(tmp_path, fast, monkeypatch, compiled):
    def stop(session):
        session.measure({"probe": "host_latency"}, lambda: 1e-3)
        raise KeyboardInterrupt
    monkeypatch.setattr(probes_host, "latency", stop)
    report = profile(tmp_path, "--only", "host", code=130)
    assert not report["complete"] and ok(report, "host_stream") and len(ok(report, "host_latency")) == 1
    assert kinds(report, "host_latency") == {"INTERRUPTED"} and "host_gather" not in report["probes"]


def test_profile_ctrl_c_and_kill(tmp_path, compiled):
    out = tmp_path / "report.json"
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        out.unlink(missing_ok=True)
        run = subprocess.Popen([sys.executable, "-m", "engram_kernels.cli", "profile", "--json", str(out), "--only", "host",
                                "--max-memory-gib", "0.25"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               # a job that a shell put in the background ignores it
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        try:
            deadline = time.monotonic() + 120
            while not out.exists():
                assert time.monotonic() < deadline and run.poll() is None
                time.sleep(0.05)
            run.send_signal(number)
            assert run.wait(60) == code
        finally:
            run.kill()
        report = check(json.loads(out.read_text()))
        assert not report["complete"] and report["cells"]
        assert not list(tmp_path.glob(".*.tmp")) or number == signal.SIGKILL


def test_profile_time_is_bounded():
    now = itertools.count()
    session = Session(Options(), quiet_machine(), clock=lambda: float(next(now)))
    with session.probe("host_memcpy", 5):
        for _ in range(20):
            session.measure({"probe": "host_memcpy"}, lambda: 1e-3)
    with session.probe("host_latency", 1000):  # no probe can have more than the whole run
        for _ in range(500):
            if session.measure({"probe": "host_latency"}, lambda: 1e-3)["status"] != "ok":
                break
    states = [c["status"] for c in session.cells]
    assert states[0] == "ok" and states[-1] == "skipped" and session.cells[-1]["reason"]["kind"] == "TIME_BUDGET"
    assert session.seconds() <= session_module.BUDGET_SECONDS["quick"] + 10
    assert session_module.BUDGET_SECONDS["quick"] < 60 and session_module.BUDGET_SECONDS["full"] < 600


def test_profile_results_above_the_peak_are_invalid(tmp_path, monkeypatch):
    def run(session):
        session.set_peak("link_h2d", 1e9, "test", "assumed", physical=True)
        with session.probe("gpu_link", 5):
            session.measure({"probe": "gpu_link", "bytes": 10**6}, lambda: 0.99e-3, peak="link_h2d")  # 1.01 of it
            session.measure({"probe": "gpu_link", "bytes": 10**6}, lambda: 0.5e-3, peak="link_h2d")
            session.measure({"probe": "gpu_link", "bytes": 10**6}, lambda: 0.5e-3, peak="link_h2d", may_be_cached=True)
    monkeypatch.setitem(profile_command.GROUPS, "gpu", run)
    report = profile(tmp_path, "--only", "gpu", code=4)
    assert [c["status"] for c in report["cells"]] == ["ok", "invalid", "ok"]
    assert "peak_share" not in report["cells"][2]  # what a cache may answer is not compared with memory
    assert report["probes"]["gpu_link"]["verdict"] == "ABOVE_PEAK"


def test_profile_measures_a_peak_again_before_it_fails_a_cell():
    session = Session(Options(), quiet_machine())
    session.set_peak("host_read", 1e9, "in a bad moment")
    session.peak_again["host_read"] = lambda: 1.9e9
    with session.probe("host_gather", 5):
        fine, still = (session.measure({"probe": "host_gather", "bytes": 10**6}, lambda s=s: s, peak="host_read")
                       for s in (5e-4, 4e-4))
    assert (fine["status"], still["status"]) == ("ok", "invalid") and session.peaks["host_read"]["bytes_per_s"] == 1.9e9
    assert session.peaks["host_read"]["source"].endswith("measured again")


def test_profile_verdicts_by_weight_and_noise():
    cell = {"probe": "gpu_link", "bytes": 1}
    quiet, wild = statistics.summarize([1.0] * 9), statistics.summarize([1.0, 2.0, 3.0] * 3)
    assert cells.measured(cell, quiet)["verdict"] == "OK" and cells.measured(cell, wild)["verdict"] == "NOISY"
    disturbed = ("steal 7%", "3 major faults", "preempted 40 times", "control 1.4x its least")
    for flag in disturbed:  # told, and no warning where the interval is narrow all the same
        told = cells.measured(cell, dataclasses.replace(quiet, flags=(flag,)))
        assert told["verdict"] == "OK" and told["flags"] == [flag]
    text = cells.verdict_of([cells.measured(cell, dataclasses.replace(wild, flags=disturbed))])[1]
    for cause in ("1 of 1 cells", "steal of up to 7 %", "page faults", "other processes", "1.4 times as slow", "up to 100%"):
        assert cause in text, cause
    assert "nothing that the system tells of" in cells.verdict_of([cells.measured(cell, wild)])[1]
    drifted = [{**cells.measured(cell, quiet, control=statistics.summarize([slow] * 9)), "flags": []} for slow in (1.0, 1.3)]
    cells.flag_drift(drifted)
    said = "1 of 2 cells were measured while the machine was slower; the cause: a machine up to 1.3 times as slow as at its best"
    assert cells.verdict_of(drifted)[1].startswith(said)
    noisy = cells.measured(cell, wild)
    cells.give_verdict(noisy, "LINK_DEGRADED")
    cells.give_verdict(noisy, "NO_HUGEPAGES")
    assert noisy["verdict"] == "LINK_DEGRADED" and noisy["advice"]
    calm = [cells.measured(cell, quiet) for _ in range(4)]
    assert cells.verdict_of(calm)[0] == "OK" and cells.verdict_of([*calm, cells.measured(cell, wild)])[0] == "OK"
    assert cells.verdict_of([*calm[:3], cells.measured(cell, wild)])[0] == "NOISY"
    assert cells.verdict_of([*calm, noisy])[0] == "LINK_DEGRADED"
    assert set(cells.ADVICE) == set(SCHEMA["$defs"]["verdict"]["enum"])
    for share, at_most, verdict in ((0.5, None, "BELOW_REFERENCE"), (0.74, 0.8, "OK"), (0.8, None, "OK")):
        low = cells.measured({"probe": "gpu_link"}, quiet)
        cells.expect_share(low, share, "link", at_most)
        assert low["verdict"] == verdict and low["facts"] == {"share_of_link": share}


def test_profile_preemption_is_flagged():
    with statistics.Conditions() as conditions:
        conditions._usage = _Usage(conditions._usage, ru_nivcsw=conditions._usage.ru_nivcsw - 1000)
        conditions.rounds = 100
    assert any(f.startswith("preempted 1") for f in conditions.flags)


def test_profile_throttling_is_flagged(tmp_path, monkeypatch):
    for cpu in (0, 1):
        (tmp_path / f"cpu{cpu}/thermal_throttle").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/thermal_throttle/core_throttle_count").write_text("5\n")
    (tmp_path / "cpu.stat").write_text("usage_usec 7\nnr_throttled 3\n")
    monkeypatch.setattr(statistics, "_CPUS", tmp_path)
    monkeypatch.setattr(statistics, "_CPU_STAT", tmp_path / "cpu.stat")
    with statistics.Conditions() as quiet:
        pass
    with statistics.Conditions() as conditions:
        (tmp_path / "cpu1/thermal_throttle/core_throttle_count").write_text("9\n")
        (tmp_path / "cpu.stat").write_text("usage_usec 7\nnr_throttled 4\n")
    assert not any("throttled" in f for f in quiet.flags)
    assert {"throttled for heat 4 times", "throttled by the CPU quota 1 times"} <= set(conditions.flags)
    cell = cells.measured({"probe": "host_stream"}, statistics.summarize([1.0] * 9, flags=conditions.flags))
    assert cell["verdict"] == "THROTTLED"


class _Usage:
    def __init__(self, real, **changed):
        self.ru_majflt, self.ru_nivcsw = real.ru_majflt, changed["ru_nivcsw"]
