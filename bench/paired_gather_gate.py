"""gather_gate against gather_rows then gate, call by call in turn: the machine's speed drifts by more than they differ.

    python bench/paired_gather_gate.py      a Markdown table of the medians of the per-pair ratios, with their quartiles
"""
import statistics
import time

import torch

from bench_gather_gate import TOKENS, make_table, steps

PAIRS = 41


def seconds(run, clock):
    start = clock()
    run()
    return clock() - start


def ratios(fused, apart, pairs=PAIRS, clock=time.perf_counter):
    """Time of the steps apart over that of the fused op, pair by pair; which goes first alternates."""
    for _ in range(4):
        fused(), apart()
    result = []
    for pair in range(pairs):
        first = seconds(fused if pair % 2 else apart, clock)
        second = seconds(apart if pair % 2 else fused, clock)
        result.append(second / first if pair % 2 else first / second)
    return result


def main():
    torch.set_num_threads(1)
    print("| rows | M 1 | M 2 | M 4 |\n|---|---|---|---|")
    for row_format in ("bf16", "int8_group32", "fp8_e4m3_block32_packed", "f32"):
        cells = []
        for branches in (1, 2, 4):
            fused, two = (steps(make_table(row_format), TOKENS, branches, which) for which in (True, False))
            low, middle, high = statistics.quantiles(ratios(fused, two), n=4)
            cells.append(f"{middle:.2f}x ({low:.2f} to {high:.2f})")
        print(f"| {row_format} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
