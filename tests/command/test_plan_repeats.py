"""The counts of repeats that `plan` reads are those of the page that shows them: one run of the benchmark writes both."""
from pathlib import Path

import pytest

from engram_kernels.plan import repeats

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
