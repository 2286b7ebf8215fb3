"""Rows per second of every small format beside those of bf16 rows, call by call in turn, into a given bf16 output.

    python bench/paired_row_formats.py [ISA]     a Markdown table for each isa: nanoseconds per row, and the medians of the
                                                 per-pair ratios to bf16 rows, with their quartiles

One thread, rows of 256, tables of EK_BENCH_TABLE_GIB (default 4) of bf16 rows in huge pages, all formats with as many rows and
scales that are no powers of two. Every call has ids of its own, so that no row of an earlier call is in a cache.
"""
import statistics
import sys
import time

import torch

import engram_kernels as ek
from bench_gather_rows import NUM_ROWS, memory
from engram_kernels import _C
from paired_gather_gate import ratios, seconds

ROW_DIM, ALL_IDS = 256, 1 << 20  # of all calls before one gets ids that were there
COUNTS = {4096: 101, 65_536: 21}  # ids of a call: pairs


def tables():
    """{format: table}, all of them views of the same memory."""
    values = memory(NUM_ROWS * 512, True)  # bytes from 0x30 to 0x5f: neither NaN nor subnormal
    scales = memory(NUM_ROWS * 32, True)
    f32 = scales.view(torch.float32)
    f32.copy_(torch.rand(1 << 20, generator=torch.Generator().manual_seed(2)).add_(0.5).mul_(2e-5).repeat(f32.numel() >> 20))
    fp8, int8 = values[:NUM_ROWS * 256].view(NUM_ROWS, 256), values[:NUM_ROWS * 256].view(torch.int8).view(NUM_ROWS, 256)
    nibbles = values[:NUM_ROWS * 128].view(NUM_ROWS, 128)
    small = {n: values[NUM_ROWS * 256:NUM_ROWS * (256 + n)].view(NUM_ROWS, n) for n in (8, 16)}
    of = ek.RowTable.from_tensor
    return {
        "bf16": of(values.view(torch.bfloat16).view(NUM_ROWS, 256)),
        "fp8_e4m3_block32_packed": of(values[:NUM_ROWS * 264].view(NUM_ROWS, 264), row_format="fp8_e4m3_block32_packed",
                                      row_dim=256),
        "fp8_e4m3_block32": of(fp8, small[8], "fp8_e4m3_block32"),
        "fp8_e4m3_tensor": of(fp8, torch.tensor(3.1e-5), "fp8_e4m3_tensor"),
        "fp8_e4m3_row": of(fp8, f32[:NUM_ROWS], "fp8_e4m3_row"),
        "int8_group32": of(int8, f32.view(NUM_ROWS, 8), "int8_group32"),
        "nvfp4": of(nibbles, small[16], "nvfp4", table_scale=3.1e-5),
        "mxfp4": of(nibbles, small[8], "mxfp4"),
    }


def main():
    torch.set_num_threads(1)
    every, generator = tables(), torch.Generator().manual_seed(1)
    for isa in sys.argv[1:] or ("avx2", "avx512"):
        _C.set_cpu_isa(isa)
        print(f"| rows, {isa} | ids | ns per row | bf16 | its rows per second over bf16's (quartiles) |\n|---|---|---|---|---|")
        for count, pairs in COUNTS.items():
            out = torch.zeros(count, ROW_DIM, dtype=torch.bfloat16)
            sets = torch.randint(0, NUM_ROWS, (ALL_IDS // count, count), generator=generator)
            calls = iter(range(1 << 30))

            def gather(table, out=out, sets=sets, calls=calls):
                ek.gather_rows(table, sets[next(calls) % len(sets)], out=out)

            for name, table in list(every.items())[1:]:
                low, middle, high = statistics.quantiles(
                    ratios(lambda table=table: gather(table), lambda: gather(every["bf16"]), pairs), n=4)
                ns = [statistics.median(seconds(lambda t=t: gather(t), time.perf_counter) for _ in range(pairs)) / count * 1e9
                      for t in (table, every["bf16"])]
                print(f"| {name} | {count} | {ns[0]:.1f} | {ns[1]:.1f} | {middle:.2f}x ({low:.2f} to {high:.2f}) |", flush=True)


if __name__ == "__main__":
    main()
