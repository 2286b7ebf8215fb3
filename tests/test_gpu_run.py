"""The run for a GPU (bench/gpu_run.py) on a machine without one: every step down to the launch, and the pages made of a run."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import gpu_results  # noqa: E402
import gpu_run  # noqa: E402


def dry(out, *names):
    return subprocess.run([sys.executable, "bench/gpu_run.py", "--dry", "--out", str(out), "--only", *names], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {"EK_COLLECT_GPU": "1"})


@pytest.mark.parametrize("names", [
    ["machine", "host"], pytest.param(["few", "overlap", "engram_forward"], marks=pytest.mark.slow),
    pytest.param(["large", "backward", "profile"], marks=pytest.mark.slow)])
def test_gpu_run_dry_steps_that_time(tmp_path, names):
    run = dry(tmp_path, *names)
    assert run.returncode == 0, run.stdout
    for name in names:
        assert f"dry: {name} " in (tmp_path / "steps.txt").read_text()
        if (tmp_path / f"{name}.json").exists():
            found = json.loads((tmp_path / f"{name}.json").read_text())
            assert found["provenance"] == "dry run" and found["lines"]
            assert not [line for line in found["lines"] if line["failed"]]


@pytest.mark.slow
def test_gpu_run_dry_steps_that_test(tmp_path):
    """The tests are collected: their files can be read, and each selection selects something."""
    run = dry(tmp_path, "smoke", "overlap_tests", "ops", "gpu_tests", "memcheck", "racecheck")
    assert run.returncode == 0, run.stdout


@pytest.mark.slow
def test_gpu_run_builds_the_probe(tmp_path):
    if shutil.which("nvcc") is None:
        assert os.environ.get("EK_EXPECT_NVCC") != "1"
        pytest.skip("there is no nvcc")
    run = dry(tmp_path, "probe_build", "probe")
    assert run.returncode == 0, run.stdout


def test_gpu_run_fits_its_time_and_its_selections_name_tests(tmp_path):
    steps = gpu_run.steps(tmp_path)
    assert len({step.name for step in steps}) == len(steps)
    tests = "".join(path.read_text() for path in (ROOT / "tests/gpu").glob("test_*.py"))
    for word in gpu_run.SANITIZED.split(" or "):
        assert word in tests, word
    sizes = {path.name for path in (ROOT / "tests/gpu").glob("test_*.py")}
    named = {Path(part).name for step in steps for part in step.command if part.startswith("tests/gpu/")}
    assert sizes <= named


def test_gpu_run_a_step_that_hangs_or_cannot_start_is_one_line(tmp_path):
    assert gpu_run.run(gpu_run.Step("hangs", 1, ["sleep", "30"]), tmp_path, dry=False)[0] == "cut off"
    assert gpu_run.run(gpu_run.Step("absent", 1, ["no-such-program-here"]), tmp_path, dry=False)[0] == "cannot start"
    assert gpu_run.run(gpu_run.Step("fails", 5, ["false"]), tmp_path, dry=False)[0] == "failed 1"


def make_run(folder, provenance="measured", device="NVIDIA H200"):
    lines = [{"section": "few", "op": "gate", "tokens": t, "bytes": 1e6, "seconds": {"cuda": t * 1e-6, "triton": t * 2e-6},
              "failed": {"torch.compile": "a | b\nc"} if t == 1 else {}, "of_copy_rate": {"cuda": 0.5, "triton": 0.25}}
             for t in (1, 34, 16384)]
    folder.mkdir(exist_ok=True)
    (folder / "few.json").write_text(json.dumps({"provenance": provenance, "device": device, "torch": "2.14.1", "lines": lines,
                                                 "copy_bytes_per_s": {"device": 4e12, "link": 5e10}}))
    (folder / "steps.txt").write_text("few ok 12.0 s of 90\n")
    return folder


@pytest.fixture
def root(tmp_path):
    for folder in ("bench/results", "docs"):
        (tmp_path / "root" / folder).mkdir(parents=True)
    (tmp_path / "root/docs/performance.md").write_text("before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n")
    return tmp_path / "root"


def test_gpu_results_make_two_pages(tmp_path, root):
    page = gpu_results.make_pages(make_run(tmp_path / "run"), root, "2026-12-01")
    assert page.name == "2026-12-01_h200.md"
    assert "| gate | 34 | cuda | 34.0 | 29 | 50% | triton 2.00x |" in page.read_text()
    assert "torch.compile failed: a / b c" in page.read_text() and "few ok 12.0 s of 90" in page.read_text()
    text = (root / "docs/performance.md").read_text()
    assert text.startswith("before\n<!-- gpu -->\nMeasured 2026-12-01 on NVIDIA H200") and text.endswith("<!-- /gpu -->\nafter\n")
    assert "| gate (cuda) | 1.0 us | 34.0 us | - | 16,384 us | 50% | triton 2.00x |" in text and "old" not in text


@pytest.mark.parametrize("wrong, message", [
    (lambda folder: make_run(folder, "dry run"), "expected 'measured'"),
    (lambda folder: folder.mkdir(), "no JSON with a measured line"),
    (lambda folder: (make_run(folder, device="NVIDIA H100"), (folder / "few.json").rename(folder / "a.json"), make_run(folder)),
     "mixes NVIDIA H100"),
], ids=["dry", "empty", "mixed"])
def test_gpu_results_refuse_what_was_not_measured(tmp_path, root, wrong, message):
    wrong(tmp_path / "run")
    before = (root / "docs/performance.md").read_text()
    with pytest.raises(ValueError, match=message):
        gpu_results.make_pages(tmp_path / "run", root, "2026-12-01")
    assert (root / "docs/performance.md").read_text() == before and not list((root / "bench/results").iterdir())
