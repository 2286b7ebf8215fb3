"""engram_forward against gather_rows, a matrix product and gate on the same tensors, call by call in turn, in CPU time.

    python bench/paired_engram_forward.py      the median of the per-pair ratios, with their quartiles, for 1 and 16 tokens
"""
import statistics
import time

import torch

from bench_engram_forward import steps
from paired_gather_gate import ratios


def main():
    torch.set_num_threads(1)
    for tokens, pairs in ((1, 41), (16, 7)):
        found = ratios(*steps(tokens, "fp8_e4m3_block32"), pairs, time.process_time)
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"{tokens} tokens: the three steps took {middle:.2f}x its time ({low:.2f} to {high:.2f}, {pairs} pairs)")


if __name__ == "__main__":
    main()
