"""transformers' Qwen4Exp against itself with this library's PLE layers, forward by forward in turn; then the update of a history.

    python bench/paired_transformers.py      Markdown tables of the medians of the per-pair ratios, with their quartiles

The model is that of bench_transformers.py, and what its loading takes is measured there.
"""
import statistics

import torch

import engram_kernels as ek
from bench_ngram_hash import committing, torch_hash_and_commit
from bench_transformers import make
from paired_gather_gate import ratios

PAIRS = {1: 151, 512: 31}  # tokens: pairs of forwards
CALLS, CALL_PAIRS = 100, 41  # of the hash, in each half of a pair


def forward(contender, tokens):
    """A forward of so many tokens without a cache."""
    model, ids = make(contender), torch.randint(4, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    return lambda: model(ids, use_cache=False)


def hashes(batch):
    """`ngram_hash_and_commit` of one token of each of so many sequences, and what it stands beside."""
    ids, cu, layout, history = committing(batch)
    peers = {"`ngram_hash` alone": lambda: ek.ngram_hash(ids, cu, layout, history=history),
             "torch ops": lambda: torch_hash_and_commit(ids, layout, history)}
    return lambda: ek.ngram_hash_and_commit(ids, cu, layout, history), peers


def row(name, found):
    """Prints a line of a table."""
    low, middle, high = statistics.quantiles(found, n=4)
    print(f"| {name} | {middle:.2f}x ({low:.2f} to {high:.2f}) |", flush=True)


def often(call):
    """`call` so often that the clock does not count."""
    return lambda: [call() for _ in range(CALLS)]


@torch.inference_mode()
def main():
    print("| tokens | transformers' time over ours (quartiles) |\n|---|---|")
    for tokens, pairs in PAIRS.items():
        row(tokens, ratios(forward("engram_kernels", tokens), forward("transformers", tokens), pairs))
    print("\n| sequences, and what is timed | its time over `ngram_hash_and_commit` (quartiles) |\n|---|---|")
    for batch in (1, 8, 64):
        ours, peers = hashes(batch)
        for name, peer in peers.items():
            row(f"{batch}, {name}", ratios(often(ours), often(peer), CALL_PAIRS))


if __name__ == "__main__":
    main()
