"""The commands `profile`, `plan` and `bench` where the terminal, the files or the user are odd."""
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from profile_machine import check, quiet_machine

from engram_kernels import _terminal
from engram_kernels._terminal import UsageError, expect_writable
from engram_kernels.cli import main as cli
from engram_kernels.profile import machine
from engram_kernels.profile import run as profile_command
from engram_kernels.profile import session as session_module
from engram_kernels.profile.session import Options, Session
from engram_kernels.profile.show import print_report

ROOT = Path(__file__).resolve().parents[2]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def one_cell(monkeypatch):
    """A run of a single cell."""
    ran = []

    def run(session):
        ran.append(1)
        with session.probe("gpu_link", 5):
            session.measure({"probe": "gpu_link", "op": "h2d", "engine": "copy", "pinned": True, "bytes": 64, "table_bytes": 64},
                            lambda: 1e-3)
    monkeypatch.setitem(profile_command.GROUPS, "gpu", run)
    return ran


# what cannot be written is found before anything is measured

@pytest.mark.parametrize("option", ["--json", "--html", "--plots"])
@pytest.mark.parametrize("where", ["/proc/none/x", "file/x"])
def test_profile_says_at_once_what_cannot_be_written(tmp_path, one_cell, monkeypatch, capsys, option, where):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert cli.main(["profile", "--only", "gpu", option, where]) == 2
    assert f"engram-kernels profile: {option} {where} cannot be written: " in capsys.readouterr().err and not one_cell


@pytest.mark.parametrize("option", ["--json", "--simulate"])
def test_plan_says_at_once_what_cannot_be_written(capsys, option):
    assert cli.main(["plan", "--gpu", "h100", option, "/proc/none/x"]) == 2
    printed = capsys.readouterr()
    assert f"{option} /proc/none/x cannot be written: " in printed.err and printed.out == ""


def test_expect_writable_leaves_nothing_behind(tmp_path):
    expect_writable("--json", tmp_path / "a" / "b" / "x.json")
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "b"]
    expect_writable("--json", Path("/dev/null"))
    os.mkfifo(tmp_path / "pipe")
    expect_writable("--json", tmp_path / "pipe")
    with pytest.raises(UsageError, match="is a folder"):
        expect_writable("--json", tmp_path)


# Ctrl-C at any time leaves a valid file

def test_profile_interrupted_while_it_looks_at_the_machine(tmp_path, one_cell, monkeypatch):
    def stop(folder):
        raise KeyboardInterrupt
    monkeypatch.setattr(machine, "collect", stop)
    out = tmp_path / "r.json"
    assert cli.main(["profile", "--json", str(out)]) == 130
    report = check(json.loads(out.read_text()))
    assert not report["complete"] and [c["reason"]["kind"] for c in report["cells"]] == ["INTERRUPTED"] and not one_cell


def test_profile_interrupted_before_the_first_cell(tmp_path, monkeypatch):
    def stop(session):
        raise KeyboardInterrupt
    monkeypatch.setitem(profile_command.GROUPS, "disk", stop)
    out = tmp_path / "r.json"
    assert cli.main(["profile", "--only", "disk", "--json", str(out)]) == 130
    report = check(json.loads(out.read_text()))
    assert [(c["probe"], c["reason"]["kind"]) for c in report["cells"]] == [("disk_read", "INTERRUPTED")]


def test_profile_interrupted_while_torch_is_imported(tmp_path):
    """The command as it is installed; the signal comes while a module that it needs is loaded."""
    start = (tmp_path / "start.py")
    start.write_text(f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(ROOT / 'python')!r})
class Finder:
    def find_spec(self, name, *rest):
        if name in ("engram_kernels", "torch"):  # the former before the arguments are read
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
import engram_kernels_command
sys.exit(engram_kernels_command.main())
""")
    for arguments, said in ((["profile", "--json", "r.json"], "what was measured is kept"), (["info"], "info: interrupted")):
        run = subprocess.run([sys.executable, str(start), *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 130 and said in run.stderr and "Traceback" not in run.stderr
    report = check(json.loads((tmp_path / "r.json").read_text()))
    assert [c["reason"]["kind"] for c in report["cells"]] == ["INTERRUPTED"]


# what a time budget costs is said

def test_profile_says_what_its_budget_has_cut():
    now = iter(range(10**6))
    session = Session(Options(), quiet_machine(), clock=lambda: float(next(now)))
    with session.probe("host_memcpy", 12):
        for _ in range(6):
            session.measure({"probe": "host_memcpy"}, lambda: 1e-3)
    report = check(session.report())
    cut = sum(c["status"] == "skipped" for c in report["cells"])
    assert report["probes"]["host_memcpy"]["cut"] == cut > 0
    out = io.StringIO()
    print_report(report, out)
    assert f"{cut} of 6 cells left out or made smaller: its time was used up" in out.getvalue()
    assert any(re.fullmatch(r"only \d samples: out of time", f) for c in session.cells for f in c.get("flags", ()))


def test_profile_share_of_a_budget_leaves_something():
    now = [0.0]
    session = Session(Options(), quiet_machine(), clock=lambda: now[0])
    with session.probe("host_memcpy", 10):
        session.skip({"probe": "host_memcpy"}, "NOT_SUPPORTED", "x")
        with session.at_most(0.4):
            assert session.seconds_left() == pytest.approx(4)
            now[0] = 5
            assert session.time_is_up()
        assert session.seconds_left() == 5
        with session.at_most(1.0):
            assert session.seconds_left() == 5


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_profile_budgets_of_all_probes_fit_the_run(mode):
    from engram_kernels.profile import probes_disk, probes_gpu, probes_host
    quick, longest = mode == "quick", session_module.BUDGET_SECONDS[mode]
    disk = probes_disk.SECONDS[mode]
    host = {gpu: probes_host.host_share(quick, gpu) * sum(probes_host.SECONDS.values()) for gpu in (True, False)}
    gpu = probes_gpu.gpu_share(quick) * sum(probes_gpu.SECONDS.values())
    assert host[False] + disk <= longest and host[True] + disk + gpu <= longest
    assert {"quick": 60, "full": 600}[mode] - longest >= 15  # for starting up and drawing


def test_profile_flags_the_cells_of_a_slow_machine():
    session = Session(Options(), quiet_machine())
    with session.probe("host_memcpy", 5):
        for slow in (1.0, 1.2, 1.3):
            session.control = lambda slow=slow: slow
            session.measure({"probe": "host_memcpy"}, lambda: 1e-3)
    assert [c["verdict"] for c in check(session.report())["cells"]] == ["OK", "OK", "NOISY"]
    assert session.cells[2]["flags"] == ["control 1.3x its least"] and session.probes["host_memcpy"]["verdict"] == "NOISY"


@pytest.mark.parametrize("err", [MemoryError("std::bad_alloc"), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_profile_memory_that_is_not_there_is_no_fault(err):
    session = Session(Options(), quiet_machine())

    def sample():
        raise err
    with session.probe("gpu_gather", 5):
        session.measure({"probe": "gpu_gather"}, sample)
        raise err
    assert {(c["status"], c["reason"]["kind"]) for c in session.cells} == {("skipped", "NO_MEMORY")}


# terminals

def wide_table(out):
    printer = _terminal.Printer(out)
    printer.table(("name", "value", "source"), [("rate", "35 GB/s (a)", "measured by others " * 9), ("latency", "-", "")],
                  [None, None])
    return out.getvalue()


@pytest.mark.parametrize("columns", [1, 20, 50])
@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_table_is_not_shredded_where_there_is_little_room(monkeypatch, columns, environment):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"COLUMNS": str(columns), "TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    text = wide_table(Terminal())
    assert "\u2502" not in text and "\x1b" not in text
    if columns == 50:
        assert text.startswith("rate\n  value: 35 GB/s (a)\n  source: measured by others")
        assert max(map(len, text.splitlines())) <= 50 and "latency\n" in text and "latency\n  " not in text


def test_table_is_one_where_there_is_room(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "250")
    assert "\u2502" in wide_table(Terminal())
    monkeypatch.setenv("COLUMNS", "60")
    assert "\u2502" in wide_table(Terminal())  # the long source is folded
    plain = wide_table(io.StringIO())  # no terminal: a line stays one, however long
    assert len(plain.splitlines()) == 3 and max(map(len, plain.splitlines())) > 180


def test_sentence_is_broken_between_words_without_colour(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    words = "a sentence of several words that is longer than a line of the terminal"
    for out, lines in ((Terminal(), 2), (io.StringIO(), 1)):
        _terminal.Printer(out).say(words)
        said = out.getvalue().splitlines()
        assert len(said) == lines and " ".join(said) == words


def test_table_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "250")
    assert wide_table(Terminal()).splitlines()[0].split() == ["name", "value", "source"]


def test_profile_progress_without_rich(monkeypatch, one_cell):
    for name in ("rich", "rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["profile", "--only", "gpu"]) == 0 and one_cell


# who starts the command

def test_output_in_a_locale_without_the_letters(tmp_path, monkeypatch, capsys):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    out = tmp_path / "pl\u00e4ne" / "t.json"
    assert cli.main(["plan", "--gpu", "h100", "--no-run", "--simulate", str(out), "--steps", "1"]) == 0
    sys.stdout.flush()
    assert b"pl\\xe4ne" in raw.getvalue() and out.exists()


def test_output_that_is_closed(monkeypatch, one_cell):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["profile", "--only", "gpu"]) == 0
    assert cli.main(["plan", "--host-gib", "-1"]) == 2


def test_output_that_nobody_reads(tmp_path):
    """Files are written all the same, and no traceback is."""
    run = subprocess.run(f"{sys.executable} -m engram_kernels.cli profile --only gpu --json {tmp_path}/r.json | true; "
                         "echo ${PIPESTATUS[0]}", shell=True, executable="/bin/bash", capture_output=True, text=True,
                         env={k: v for k, v in os.environ.items() if k != "HOME"}, cwd=tmp_path)
    assert run.stdout.strip() == "141" and run.stderr == ""
    assert check(json.loads((tmp_path / "r.json").read_text()))["complete"]


@pytest.mark.parametrize("arguments", [["profile", "--gpu", "-1"], ["profile", "--gpu", "x"], ["plan", "--step-ms", "nan"],
                                       ["plan", "--ahead-ms", "inf"], ["plan", "--cache-gib", "nan"], ["plan", "--zipf", "nan"],
                                       ["plan", "--step-ms", "soon"]])
def test_numbers_that_are_none_are_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and f"argument {arguments[1]}: '{arguments[2]}' is no " in capsys.readouterr().err


def test_messages_name_the_command_once(tmp_path, capsys):
    (tmp_path / "p.json").write_bytes(b"\x00\xff")
    assert cli.main(["plan", "--profile", str(tmp_path / "p.json")]) == 1
    assert capsys.readouterr().err.startswith(f"engram-kernels plan: {tmp_path}/p.json is not JSON: ")
