"""gather_gate against gather_rows then gate, call by call in turn: the machine's speed drifts by more than they differ.

    python bench/paired_gather_gate.py      a Markdown table of the medians of the per-pair ratios, with their quartiles
"""
import statistics
import time

import torch

from bench_gather_gate import TOKENS, make_table, steps

PAIRS = 41


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(row_format, branches):
    """Time of the two steps over that of the fused op, pair by pair; which goes first alternates."""
    fused, two = (steps(make_table(row_format), TOKENS, branches, which) for which in (True, False))
    for _ in range(4):
        fused(), two()
    result = []
    for pair in range(PAIRS):
        first = seconds(fused if pair % 2 else two)
        second = seconds(two if pair % 2 else fused)
        result.append(second / first if pair % 2 else first / second)
    return result


def main():
    torch.set_num_threads(1)
    print("| rows | M 1 | M 2 | M 4 |\n|---|---|---|---|")
    for row_format in ("bf16", "int8_group32", "fp8_e4m3_block32_packed", "f32"):
        cells = []
        for branches in (1, 2, 4):
            low, middle, high = statistics.quantiles(ratios(row_format, branches), n=4)
            cells.append(f"{middle:.2f}x ({low:.2f} to {high:.2f})")
        print(f"| {row_format} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
