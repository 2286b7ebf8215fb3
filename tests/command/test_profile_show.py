"""How `profile` shows a report: table, figures, page."""
import io
import itertools
import re
import shutil
import subprocess
import sys
import time

import pytest
from profile_machine import check, profile, quiet_machine

from engram_kernels.profile import run as profile_command
from engram_kernels.profile import show
from engram_kernels.profile.cells import Skip
from engram_kernels.profile.headline import headline
from engram_kernels.profile.session import Options, Session


class Terminal:
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_profile_table_is_plain_with_no_color(monkeypatch):
    session = Session(Options(), quiet_machine())
    with session.probe("host_memcpy", 5):
        session.measure({"probe": "host_memcpy", "op": "memcpy", "bytes": 10**6, "table_bytes": 1 << 20}, lambda: 1e-3)
        raise Skip("NO_MEMORY", "too little")
    coloured, plain = Terminal(), Terminal()
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    show.print_report(session.report(), coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    show.print_report(session.report(), plain)
    assert "\x1b[" in coloured.text and "\x1b[" not in plain.text and "━" not in plain.text
    assert "1 GB/s" in plain.text and "NO_MEMORY too little" in plain.text
    assert show.bytes_text(64 << 20) == "64 MiB" and show.bytes_text(None) == "-" and show.time_text(1.5e-7) == "150 ns"


@pytest.mark.parametrize("terminal", [True, False])
def test_profile_progress_is_for_terminals(monkeypatch, terminal):
    rich_console = pytest.importorskip("rich.console")
    out = io.StringIO()
    real = rich_console.Console
    monkeypatch.setattr(rich_console, "Console", lambda stderr: real(file=out, force_terminal=terminal, width=120))
    session = Session(Options(), quiet_machine())
    with profile_command._progress(session), session.probe("host_memcpy", 5):
        session.measure({"probe": "host_memcpy"}, lambda: 1e-3)
        time.sleep(0.6)  # the bar is drawn twice per second
    assert ("host_memcpy, 1 cells" in out.getvalue()) == terminal and (out.getvalue() == "") != terminal


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(report, page) of a run with every kind of figure."""
    pytest.importorskip("matplotlib")
    from engram_kernels.profile.html import page
    session = Session(Options(), quiet_machine())
    for probe, points in {
        "host_gather": [{"op": "gather_rows", "order": "uniform", "row_bytes": 512, "table_bytes": n << 26, "threads": 1,
                         "rows": 65536, "bytes": 1 << 25, "huge_pages": h} for n in (1, 2) for h in (True, False)],
        "host_latency": [{"table_bytes": n << 20, "huge_pages": True} for n in (1, 4)],
        "host_stream": [{"op": "read", "threads": n, "bytes": 100} for n in (1, 2)],
        "disk_read": [{"row_bytes": 4096, "queue_depth": d, "rows": 64} for d in (1, 64)],
        "gpu_gather": [{"placement": p, "row_bytes": 264, "rows": r, "cold": True, "table_bytes": 1 << 30}
                       for p in ("device", "uva", "staged") for r in (24, 384)],
        "gpu_link": [{"op": "h2d", "pinned": True, "engine": "copy", "table_bytes": 1 << n, "bytes": 1 << n} for n in (16, 20)],
    }.items():
        with session.probe(probe, 50):
            for i, point in enumerate(points):
                noise = itertools.cycle([1.0, 1.1])
                session.measure({"probe": probe, **point}, lambda i=i, noise=noise: (i + 1) * 1e-3 * next(noise))
    session.machine["gpu"].append({"name": "<script>alert(1)</script>", "unread": {}})
    report = check(session.report())
    return report, page(report)


def test_profile_has_no_figure_of_a_single_point(drawn):
    from engram_kernels.profile.plots import figures
    cells = [c for c in drawn[0]["cells"] if c["probe"] != "host_stream" or c["threads"] == 1]
    report = {**drawn[0], "cells": cells}
    assert set(figures(drawn[0])) - set(figures(report)) == {"host_stream"}


def test_profile_opens_with_what_the_machine_can_do_for_a_table():
    session = Session(Options(), quiet_machine())
    assert headline(session.report()) == ["Random rows of memory were not measured: the probe was not run.",
                                          "Reads of a file were not measured: the probe was not run."]
    with session.probe("host_gather", 50):
        for rows_per_s, table, order, threads in ((3e6, 1 << 31, "uniform", 4), (4e6, 1 << 31, "uniform", 2),
                                                  (9e6, 64 << 20, "uniform", 2), (8e6, 1 << 31, "sorted", 2)):
            session.measure({"probe": "host_gather", "op": "gather_rows", "row_bytes": 264, "table_bytes": table, "rows": 65536,
                             "bytes": 65536 * 264, "order": order, "threads": threads, "huge_pages": True},
                            lambda rows_per_s=rows_per_s: 65536 / rows_per_s)
    with session.probe("disk_read", 50):
        for depth, rate in ((1, 1e4), (64, 5e4), (256, 6e4)):
            session.measure({"probe": "disk_read", "op": "preadv", "row_bytes": 4096, "rows": 100, "bytes": 409600,
                             "queue_depth": depth}, lambda rate=rate: 100 / rate)
    memory, disk = headline(check(session.report()))
    assert memory == ("From host memory this machine gathers 4 million random rows of 264 bytes per second with 2 threads from a "
                      "table of 2 GiB (1.06 GB/s): 3.07 ms for a step of 256 tokens with 48 rows each.")
    assert disk == ("From a file it makes 50 thousand random reads of 4 KiB per second, by pread in threads, not by io_uring, 64 "
                    "in flight: 246 ms for a step of 256 tokens with 48 rows each.")
    out = io.StringIO()
    show.print_report(session.report(), out)
    assert out.getvalue().startswith(f"{memory}\n{disk}\n")
    session.skip({"probe": "host_gather"}, "NO_MEMORY", why := "too little memory, " + "and that at length, " * 9)
    assert why in " ".join(show.row(session.cells[-1]))  # whole


def test_profile_page_is_whole_and_needs_no_network(drawn):
    _, text = drawn
    for name in ("host_gather", "host_pages", "host_latency", "host_stream", "disk_read", "gpu_gather", "gpu_link"):
        assert f'<figure id="{name}"><svg' in text
    outside = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?!#|data:)[^"'\s>)]+""", text)
    assert outside == [] and "@import" not in text and "<script" not in text and "&lt;script&gt;" in text


def test_profile_figures_are_files(drawn, tmp_path):
    from engram_kernels.profile.plots import write_figures
    files = write_figures(drawn[0], tmp_path)
    assert {f.suffix for f in files} == {".png", ".svg"} and len(files) == 14 and all(f.stat().st_size > 2000 for f in files)


def test_profile_axis_of_less_than_a_decade_has_labels(drawn):
    from engram_kernels.profile.plots import figures
    for name, figure in figures(drawn[0]).items():
        figure.draw_without_rendering()
        axis = figure.axes[0].yaxis
        low, high = figure.axes[0].get_ylim()
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        assert any(t.label1.get_text() and low <= t.get_loc() <= high for t in ticks), name


def test_profile_labels_of_an_axis_do_not_touch():
    pytest.importorskip("matplotlib")
    from engram_kernels.profile.plots import _apart
    assert _apart([64, 512, 1792, 2048]) == [64, 512, 2048] and _apart([1, 2, 4]) == [1, 2, 4] and _apart([5]) == [5]


def test_profile_page_in_a_browser(drawn, tmp_path):
    browser = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None)
    if browser is None:
        pytest.skip("no Chromium was found")
    (tmp_path / "page.html").write_text(drawn[1])
    run = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
                          f"--user-data-dir={tmp_path / 'user'}", "--enable-logging=stderr", "--virtual-time-budget=2000",
                          "--dump-dom", f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0
    assert run.stdout.count("<figure") == 7 and run.stdout.count("</svg>") == 7 and "Measurements" in run.stdout
    assert "CONSOLE" not in run.stderr and "net::ERR" not in run.stderr


def test_profile_without_matplotlib(tmp_path, monkeypatch, capsys):
    def run(session):
        with session.probe("gpu_link", 5):
            for size in (64, 128):
                session.measure({"probe": "gpu_link", "op": "h2d", "engine": "copy", "pinned": True, "bytes": size,
                                 "table_bytes": size}, lambda: 1e-3)
    monkeypatch.setitem(profile_command.GROUPS, "gpu", run)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert profile(tmp_path, "--only", "gpu", "--html", str(tmp_path / "x.html"), code=5)["complete"]
    assert "pip install 'engram-kernels[profile]'" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setitem(profile_command.GROUPS, "gpu", run)
    pytest.importorskip("matplotlib")
    profile(tmp_path, "--only", "gpu", "--html", str(tmp_path / "x.html"), "--plots", str(tmp_path / "plots"))
    assert "<svg" in (tmp_path / "x.html").read_text() and (tmp_path / "plots" / "gpu_link.png").exists()
