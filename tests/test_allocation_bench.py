"""bench/allocation.py trains, measures and reports; what it claims follows from the losses."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))


@pytest.mark.slow
def test_allocation_quick(tmp_path):
    """Three splits of one budget train for a few steps; a second call finds its runs in the file and trains nothing."""
    args = [sys.executable, ROOT / "bench/allocation.py", "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png", "--table",
            tmp_path / "a.md", "--quick"]
    first, second = (subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first.count("small, rho") == 3 and second.count("small, rho") == 0 and first.endswith(second)
    runs = json.loads((tmp_path / "a.json").read_text())["runs"]
    assert [run["experts"] for run in runs] == [32, 17, 2] and len((tmp_path / "a.md").read_text().splitlines()) == 5
    for run in runs:
        assert abs(run["total_parameters"] / runs[0]["total_parameters"] - 1) <= 5e-4
        assert abs(run["active_parameters"] / runs[0]["active_parameters"] - 1) <= 2e-3
        assert run["loss"] < 7.8 and run["loss"] != run.get("loss_off")
        local = run["share_local"]
        assert run["loss"] == pytest.approx(local * run["loss_local"] + (1 - local) * run["loss_other"])
    lookups = runs[1]["rows"]["lookups"]
    assert 0.9 < lookups["1"] <= 1 and lookups["1"] > lookups["16"] > lookups["1024"] and runs[1]["rows"]["rank"][0] == 1
    trained = runs[1]["rows"]["trained"]
    assert trained == sorted(trained, reverse=True) and trained[0] > 12  # more than one lookup per step
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize("losses, words", [
    ({1.0: (3.5, 3.52), 0.5: (3.2, 3.21), 0.0: (3.3, 3.33)}, ("at rho 0.50, lies 0.3050 +- 0.0050 below rho 1.00 (more than",
                                                              "below rho 0.00 (more than")),
    ({1.0: (3.5, 3.52), 0.5: (3.2, 3.3), 0.0: (3.29, 3.24)}, ("below rho 0.00 (within two",)),
    ({1.0: (3.5, 3.52), 0.5: (3.2, 3.3), 0.0: (3.1, 3.1)}, ("no split between experts and memory beats both ends",))])
def test_allocation_paragraph_claims_what_was_seen(losses, words):
    from allocation_report import paragraph
    runs = [{"size": "small", "asked": rho, "rho": rho, "seed": seed, "steps": 9, "loss": loss, "total_parameters": 1,
             "active_parameters": 1} for rho, of in losses.items() for seed, loss in enumerate(of)]
    text = paragraph({"runs": runs})
    assert all(word in text for word in words) and "says nothing of larger models" in text


def test_allocation_page_shows_the_results_that_are_kept():
    """docs/allocation.md has table and paragraph of docs/allocation.json: six splits, three seeds, two sizes."""
    from allocation_report import paragraph, table
    report = json.loads((ROOT / "docs/allocation.json").read_text())
    assert len({(run["size"], run["asked"], run["seed"]) for run in report["runs"]}) == len(report["runs"]) == 36
    page = (ROOT / "docs/allocation.md").read_text()
    assert table(report) in page and paragraph(report) in " ".join(line.removeprefix("> ") for line in page.splitlines())
