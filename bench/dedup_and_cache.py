"""How often rows repeat in real text: unique ratio by batch, and hit rate by cache size. Writes docs/dedup_and_cache.{md,png}.

    python bench/dedup_and_cache.py HANDBOOK      html folder of the Debian package debian-handbook, unpacked (dpkg -x)

Rows of layer 1 of DeepSeek-V4.1's true layout (384,006,168 rows, 24 per token), hashed from tokens of its tokenizer. The cache is
the package's own RowCacheDirectory; LRU and the ideal (Belady's MIN, which knows the future) are in native_peers.cpp. The cache
on a device is counted by a RowPrefetcher that runs on an engine of CPU threads with memory of its own.
"""
import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch

from engram_kernels import EngramSpec, RowPrefetcher, RowTable, TokenMap, ngram_hash
from engram_kernels.demo.main import find_tokenizer
from engram_kernels.plan.repeats import (
    BATCHES,
    CACHE_BATCH,
    SEQUENCES,
    SLOTS,
    cache_hit_rates,
    cache_trace,
    unique_ratio,
    unique_ratio_of_sequences,
)
from native import peers
from texts import KINDS, token_ids

DOCS = Path(__file__).resolve().parents[1] / "docs"
REPEATS = DOCS.parent / "python/engram_kernels/data/repeats.json"
NUM_TOKENS = 200_000
ROW_BYTES = 264
SLOT_BYTES = ROW_BYTES + 25  # a row and its share of the directory
DEVICE_SLOTS = tuple(s for s in SLOTS if s >= 4096)
POLICIES = ("ours", "LRU", "ideal")


def row_ids(kind, handbook):
    """[T, 24] int64: the rows that each token of a text asks for."""
    spec = EngramSpec.deepseek_v41()
    tokens = token_ids(kind, handbook, NUM_TOKENS)
    cu_seqlens = torch.tensor([0, tokens.numel()], dtype=torch.int32)
    return ngram_hash(tokens, cu_seqlens, spec.layout(), TokenMap.from_tokenizer(find_tokenizer()))[0].numpy().astype(np.int64)


def hit_rates(rows):
    """(policy, slots) -> hits over distinct rows asked for, batch after batch from an empty cache; and the trace's length."""
    trace = cache_trace(rows)
    library, result = peers(), {("ours", slots): rate for slots, rate in cache_hit_rates(rows, SLOTS).items()}
    for slots in SLOTS:
        result["LRU", slots] = library.lru_hits(trace, trace.size, slots) / trace.size
        result["ideal", slots] = library.ideal_hits(trace, trace.size, slots) / trace.size
    return result, trace.size


def device_cache(rows):
    """Cache size in rows -> (hits over distinct rows asked for, bytes over the link over those without a cache), as a prefetcher
    counts them: a request per batch, each waited for before the next, from an empty cache."""
    from engram_kernels import _C
    named, rows = np.unique(rows, return_inverse=True)  # a table of the rows that occur; their order stays, and so do all counts
    rows = torch.from_numpy(rows.astype(np.int32).reshape(-1, 24))
    table = RowTable.from_tensor(torch.zeros(len(named), ROW_BYTES, dtype=torch.uint8), row_format="fp8_e4m3_block32_packed",
                                 row_dim=256)
    result, without = {}, 0
    for slots in (0, *DEVICE_SLOTS):
        with RowPrefetcher(table, cache_bytes=slots * ROW_BYTES, _engine=_C.host_engine(1, has_device_memory=True)) as pf:
            for batch in rows.split(CACHE_BATCH):
                pf.wait(pf.submit(batch))
            stats = pf.stats()
        without = without or stats["moved_bytes"]
        result[slots] = stats["hits"]["device_cache"] / stats["unique"], stats["moved_bytes"] / without
    return result


def plot(unique, sequences, hits, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    colors = dict(zip(KINDS, ("#0072B2", "#D55E00", "#009E73"), strict=True))  # told apart by colour-blind readers too
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True)
    for kind, color in colors.items():
        left.plot(BATCHES, [unique[kind, b] for b in BATCHES], color=color, marker="o", ms=4, label=kind)
        left.plot(SEQUENCES, [sequences[kind, b] for b in SEQUENCES], color=color, ls=":", marker="s", ms=3)
        for policy, style in zip(POLICIES, ("-", "--", ":"), strict=True):
            right.plot([s * SLOT_BYTES / 2**20 for s in SLOTS], [hits[kind][policy, s] for s in SLOTS], color=color, ls=style,
                       label=f"{kind}, {policy}", lw=2 if policy == "ours" else 1.2)
    left.set(xscale="log", ylim=(0, 1.02), xlabel="tokens in a batch", ylabel="distinct rows / rows asked for",
             title="In-batch duplicates (solid: consecutive tokens, dotted: a token of each sequence)")
    right.set(xscale="log", ylim=(0, 0.6), xlabel=f"cache, MiB ({SLOT_BYTES} bytes per row)",
              ylabel="hits / distinct rows asked for", title=f"Row cache behind batches of {CACHE_BATCH} tokens, cold start")
    left.title.set_fontsize(10)
    right.title.set_fontsize(10)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    right.legend(frameon=False, fontsize=8, ncol=3)
    figure.savefig(path, dpi=130)


def table(header, rows):
    return "\n".join(["| " + " | ".join(header) + " |", "|---" * len(header) + "|",
                      *("| " + " | ".join(row) + " |" for row in rows)])


def report(unique, sequences, hits, device, sizes, tokens):
    batches = table(["tokens in a batch", *KINDS],
                    [[f"{b:,}", *(f"{unique[kind, b]:.3f}" for kind in KINDS)] for b in BATCHES])
    in_step = table(["sequences in step", *KINDS],
                    [[f"{b:,}", *(f"{sequences[kind, b]:.3f}" for kind in KINDS)] for b in SEQUENCES])
    caches = table(["rows in cache", "MiB", *(f"{kind}: ours / LRU / ideal" for kind in KINDS)],
                   [[f"{s:,}", f"{s * SLOT_BYTES / 2**20:.1f}",
                     *(" / ".join(f"{hits[kind][policy, s]:.3f}" for policy in POLICIES) for kind in KINDS)] for s in SLOTS])
    on_device = table(["rows in cache", "MiB", *(f"{kind}: hits, link bytes" for kind in KINDS)],
                      [[f"{s:,}", f"{s * ROW_BYTES / 2**20:.1f}",
                        *(f"{device[kind][s][0]:.3f}, {device[kind][s][1]:.2f}x" for kind in KINDS)] for s in DEVICE_SLOTS])
    texts = "\n".join(f"- **{kind}**: {KINDS[kind]}; {tokens[kind]:,} tokens"
                      f" ask for {tokens[kind] * 24:,} rows, {sizes[kind]:,} of them distinct in batches of {CACHE_BATCH}"
                      for kind in KINDS)
    at, ceiling = 131_072, SLOTS[-1]
    shares = ", ".join(f"{hits[kind]['ours', at] / hits[kind]['ideal', ceiling]:.0%} ({kind})" for kind in KINDS)
    gains = [hits[kind]["ours", s] / hits[kind]["LRU", s] - 1 for kind in KINDS for s in SLOTS if s >= 8192]
    worst, best = min(gains), max(gains)
    return f"""# Duplicates and caching on real text

All numbers are counts on the rows of real text, not times: `python bench/dedup_and_cache.py` writes this page. Rows of layer 1
of DeepSeek-V4.1's true layout (24 rows per token), hashed from tokens of its tokenizer; Python {platform.python_version()}.

{texts}

![unique ratio by batch and hit rate by cache size](dedup_and_cache.png)

## Unique ratio: distinct rows over rows asked for

What is left to fetch after duplicates within a batch are dropped. Batches of consecutive tokens (prefill):

{batches}

Batches of one token of each of several sequences (decode), the sequences being equal parts of the text:

{in_step}

## Hit rate by cache size

Hits over distinct rows asked for, batches of {CACHE_BATCH} consecutive tokens one after the other, from an empty cache; the first
time that a row is asked for counts as a miss, so the ideal of the largest cache is the ceiling of these texts. "ours" is
`RowCacheDirectory` (csrc/table/row_cache.h), "LRU" is fully associative, "ideal" knows the future (Belady's MIN).
A cache takes {SLOT_BYTES} bytes per row of 264 bytes.

{caches}

## The cache on a device

`RowPrefetcher(cache_bytes=)`, what its own counters say of the same batches, a request each: hits over distinct rows asked for,
and bytes over the link (rows that missed, ids, and where rows go in the cache) over those without a cache. Run on an engine of
CPU threads that has memory of its own, on a table of the rows that occur. A request looks for all its rows before it admits those
that it lacks, and evicts none that it uses: in a cache not much larger than a batch that finds more than the table above has,
elsewhere it is the same. Of the device a row takes {ROW_BYTES} bytes, and 29 of the host.

{on_device}

## What follows

- Dropping duplicates within a batch saves {1 - unique["prose", 256]:.0%} (prose) to {1 - unique["code", 256]:.0%} (code) of the
  reads at 256 consecutive tokens, {1 - unique["prose", 4096]:.0%} to {1 - unique["code", 4096]:.0%} at 4,096; in decode, where a
  batch has one token of each sequence, next to nothing.
- A cache smaller than one batch (here about 5,000 rows) finds little. One of {at:,} rows ({at * SLOT_BYTES / 2**20:.0f} MiB) gets
  {shares} of what the ideal cache of any size could.
- `RowCacheDirectory` has {worst:+.0%} to {best:+.0%} hits against LRU from 8,192 rows on; below, LRU has next to none.
- These are one book, one library and two translations; nothing was extrapolated to the mix that a server sees.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("handbook", type=Path)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the page and the figure")
    args = parser.parse_args()
    unique, sequences, hits, device, sizes, tokens = {}, {}, {}, {}, {}, {}
    for kind in KINDS:
        rows = row_ids(kind, args.handbook)
        tokens[kind] = len(rows)
        unique.update({(kind, b): unique_ratio(rows, b) for b in BATCHES})
        sequences.update({(kind, b): unique_ratio_of_sequences(rows, b) for b in SEQUENCES})
        hits[kind], sizes[kind] = hit_rates(rows)
        device[kind] = device_cache(rows)
    args.out.mkdir(exist_ok=True)
    plot(unique, sequences, hits, args.out / "dedup_and_cache.png")
    counts = {"unique_prefill": {kind: {b: round(unique[kind, b], 3) for b in BATCHES} for kind in KINDS},
              "unique_decode": {kind: {b: round(sequences[kind, b], 3) for b in SEQUENCES} for kind in KINDS},
              "hit_rates": {kind: {s: round(hits[kind]["ours", s], 3) for s in SLOTS} for kind in KINDS}}
    REPEATS.write_text(json.dumps(counts, indent=1) + "\n")  # what `engram-kernels plan` reads
    (args.out / "dedup_and_cache.md").write_text(report(unique, sequences, hits, device, sizes, tokens))


if __name__ == "__main__":
    main()
