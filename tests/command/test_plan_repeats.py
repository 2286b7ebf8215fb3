"""The counts of repeats that `plan` reads: those of the page that shows them, of a text, and of draws."""
from pathlib import Path

import pytest
import torch
from plan_cases import SPEC

from engram_kernels import EngramSpec
from engram_kernels.plan import Provenance, repeats

PAGE = Path(__file__).parents[2] / "docs/dedup_and_cache.md"


def table(head):
    """{first cell: other cells} of the page's table that begins with `head`."""
    lines = iter(PAGE.read_text().splitlines())
    next(line for line in lines if line.startswith(f"| {head} "))
    next(lines)  # the rule below the head
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            return rows
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[int(first.replace(",", ""))] = cells
    return rows


@pytest.mark.parametrize(("head", "curves", "skip"), [
    ("tokens in a batch", repeats.UNIQUE_PREFILL, 0), ("sequences in step", repeats.UNIQUE_DECODE, 0),
    ("rows in cache", repeats.HIT_RATES, 1)])
def test_plan_reads_the_counts_that_the_page_shows(head, curves, skip):
    shown = table(head)
    for column, kind in enumerate(repeats.KINDS):
        assert {size: float(cells[skip + column].split(" / ")[0]) for size, cells in shown.items()} == curves[kind]


def test_repeats_of_a_text_are_counted_with_the_true_hash(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the cat. " * 40)
    found = repeats.text_repeats(EngramSpec.deepseek_v41(), text, "prefill")
    ratios = [q.value for _, q in found.unique]
    assert ratios[0] == pytest.approx(1.0) and ratios == sorted(ratios, reverse=True) and ratios[-1] < 0.5
    assert found.unique[0][1].provenance is Provenance.MEASURED and "text.txt" in found.unique[0][1].source
    assert found.hit_rate(1 << 20).value > 0.3
    assert found.unique_ratio(10**6).provenance is Provenance.ASSUMED  # no such batch was counted


def test_repeats_of_zipf_draws_are_the_expected_ones():
    """Against draws: rows of one head's table, the most frequent first."""
    spec = EngramSpec.demo_v1(table_sizes=(1000, 1000), layer_ids=(0,))
    found = repeats.zipf_repeats(spec, 1.0)
    ranks = torch.arange(1, 1001, dtype=torch.float64)
    draws = torch.multinomial((1 / ranks).expand(200, -1), 256, replacement=True, generator=torch.Generator().manual_seed(1))
    counted = sum(row.unique().numel() for row in draws) / draws.numel()
    assert found.unique_ratio(256).value == pytest.approx(counted, rel=0.02)
    assert found.unique_ratio(256).provenance is Provenance.ASSUMED
    assert repeats.zipf_repeats(spec, 2.0).unique_ratio(256).value < found.unique_ratio(256).value
    assert found.hit_rate(1 << 21).value == pytest.approx(1.0)  # the whole table


def test_published_repeats_of_another_hash_are_assumed():
    for spec, provenance in ((EngramSpec.deepseek_v41(), Provenance.MEASURED), (SPEC, Provenance.ASSUMED)):
        assert repeats.published_repeats(spec, "code", "decode").unique_ratio(64).provenance is provenance
