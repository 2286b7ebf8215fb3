"""What a prefetcher's cache of hot rows costs where it never helps: rows that nobody asks for twice, staged to a device.

CPU threads stand for the device (an engine that has memory of its own), so the link is a copy in memory: what is measured is the
host's part, the directory and the places, beside the same without a cache. What a cache saves is in docs/dedup_and_cache.md.

    python bench/bench_device_cache.py      contenders in turn, round by round: what a machine that drifts does not tilt
"""
import json

import pytest
import torch

from bench_prefetch import quantiles, ratio, timed
from engram_kernels import RowPrefetcher, RowTable
from engram_kernels._library import COMPILE_ERROR
from harness import measure

pytestmark = pytest.mark.skipif(bool(COMPILE_ERROR), reason=COMPILE_ERROR or "")
COLUMNS, ROW_DIM, ROW_BYTES = 24, 256, 264
NUM_ROWS, TOKENS, REQUESTS = 1 << 22, 1024, 4  # 1.03 GiB of packed rows
SLOTS = {"small": 1 << 14, "large": 1 << 19}
GROUP = f"prefetch of {TOKENS} tokens of {COLUMNS} packed rows of {ROW_DIM} to device memory, next to no row again"


class Staged:
    """A table that rows are copied from, ids that do not repeat for long, and a prefetcher with each cache."""

    def __init__(self):
        from engram_kernels import _C
        rows = torch.randint(0, 120, (NUM_ROWS, ROW_BYTES), dtype=torch.uint8)
        table = RowTable.from_tensor(rows, row_format="fp8_e4m3_block32_packed", row_dim=ROW_DIM)
        self.order, self.at = torch.randperm(NUM_ROWS, dtype=torch.int32), {}
        self.prefetchers = {name: RowPrefetcher(table, depth=2, cache_bytes=slots * ROW_BYTES,
                                                _engine=_C.host_engine(1, has_device_memory=True))
                            for name, slots in {"none": 0, **SLOTS}.items()}
        for name in self.prefetchers:  # slots are written, and the caches are full
            for _ in range(NUM_ROWS // (TOKENS * COLUMNS * REQUESTS) // 2):
                self.run(name)

    def close(self):
        for pf in self.prefetchers.values():
            pf.close()

    def ids(self, name):
        """The next in an order that starts again once all rows have had their turn, when most of the first are long gone."""
        count, at = TOKENS * COLUMNS, self.at.get(name, 0)
        self.at[name] = at + count if at + 2 * count <= NUM_ROWS else 0
        return self.order[at:at + count].view(TOKENS, COLUMNS)

    def run(self, name):
        pf = self.prefetchers[name]
        tickets = [pf.submit(self.ids(name))]
        for i in range(1, REQUESTS + 1):
            if i < REQUESTS:
                tickets.append(pf.submit(self.ids(name)))
            pf.wait(tickets.pop(0))


@pytest.fixture(scope="module")
def staged():
    made = Staged()
    yield made
    made.close()


@pytest.mark.parametrize(("cache", "role"), [("large", "ours"), ("small", "peer"), ("none", "bound")])
def test_never_hit(benchmark, staged, cache, role):
    name = "no cache" if cache == "none" else f"cache of {SLOTS[cache]} rows, no hits"
    units = REQUESTS * TOKENS * COLUMNS
    measure(benchmark, lambda: staged.run(cache), group=GROUP, contender=name, role=role, units=units, unit="row")


def parts(staged, name):
    """ns per row of one request: of the host, which looks for rows and copies those that it must; and of the stand-in for the
    device, which copies, gathers and puts them into the cache. From the prefetcher's own trace."""
    pf = staged.prefetchers[name]
    ticket = pf.submit(staged.ids(name))
    pf.wait(ticket)
    spans = [e for e in json.loads(pf._runtime.chrome_trace())["traceEvents"] if e.get("args", {}).get("ticket") == ticket]
    return [sum(e["dur"] for e in spans if e["name"] == part) * 1e3 / (TOKENS * COLUMNS) for part in ("fetch", "gather")]


def main():
    """Medians of the ratios and their quartiles; where the time goes."""
    staged = Staged()
    rounds = [{name: timed(lambda name=name: staged.run(name))[0] for name in staged.prefetchers} for _ in range(25)]
    for name, slots in SLOTS.items():
        stats = staged.prefetchers[name].stats()
        ratio(f"{GROUP}: rows/s with a cache of {slots} rows over those without; {stats['hits']['device_cache']} hits of "
              f"{stats['unique']}", [times["none"] / times[name] for times in rounds])
    of_parts = [{name: parts(staged, name) for name in staged.prefetchers} for _ in range(40)]
    for name in staged.prefetchers:
        q = [quantiles([part[name][i] for part in of_parts]) for i in (0, 1)]
        host, device = (f"{of['median']:.0f} ns per row (quartiles {of['q1']:.0f} to {of['q3']:.0f})" for of in q)
        print(f"one request, cache of {SLOTS.get(name, 0)} rows: the host {host}, the stand-in for the device {device}")
    staged.close()


if __name__ == "__main__":
    main()
