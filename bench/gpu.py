"""Times the ops on a GPU against the measured peak of its memory and against plain PyTorch: `make bench-gpu`.

Every number is measured here: CUDA events around a queue of calls that was blocked until all were queued, so that launches
do not count; fresh ids in each call. Percent of peak: bytes that the op must move over its time, over the rate of a copy of
1 GiB in the same run (of 256 MiB from pinned host memory where the table lies there); small batches stay in the L2 cache and
may pass it. A row counts as its 264 or 512 bytes; memory moves whole 32-byte sectors.
"""
import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch

import engram_kernels as ek
import gpu_calls

ROUNDS = 5
SECTIONS = ("few", "chain", "large", "backward", "short_conv", "engram_forward", "host", "staged")


def seconds(calls, on_host=False):
    """Median seconds per call; `calls` are run one after the other, each once per round."""
    for call in calls[:3]:
        call()
    if gpu_calls.DRY:
        return math.nan
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if on_host:  # the host's own work belongs to it
            begun = time.perf_counter()
            for call in calls:
                call()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begun) / len(calls))
            continue
        torch.cuda._sleep(20_000_000)  # the queue fills behind this
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def copy_bytes_per_s(pinned):
    """Rate of a copy to the device: bytes read and written on a device, bytes over the link from pinned host memory."""
    if gpu_calls.DRY:
        return math.nan
    source = torch.empty(1 << (28 if pinned else 30), dtype=torch.uint8, device="cpu" if pinned else "cuda")
    source = source.pin_memory() if pinned else source
    target = torch.empty_like(source, device="cuda")
    return source.numel() * (1 if pinned else 2) / seconds([lambda: target.copy_(source, non_blocking=True)] * 20)


def measure(section, name, tokens, calls, peak):
    """The record of one line; a backend or peer that fails is a field that says so, not a lost run."""
    if os.environ.get("ENGRAM_KERNELS_PDL") == "1":
        name += ", overlapping launches"
    line = {"section": section, "op": name, "tokens": tokens, "bytes": calls.num_bytes, "seconds": {}, "failed": {}}
    backends = ("cpu",) if gpu_calls.DRY else ("cuda", "triton")
    ways = {} if calls.ours is None else {b: lambda b=b: calls.ours(b) for b in backends}
    for way, make in (ways | calls.others).items():
        try:
            line["seconds"][way] = seconds(make(), on_host=section == "staged")
        except Exception as err:  # whatever a compiler raises
            if gpu_calls.DRY:
                raise
            line["failed"][way] = str(err)[:200]
    line["of_copy_rate"] = {way: calls.num_bytes / took / peak for way, took in line["seconds"].items()}
    return line


def shown(line):
    """One row of the table: the first way's time, and the others' over it."""
    if gpu_calls.DRY:
        return f"| {line['op']} | {line['tokens']} | ran on the CPU: {', '.join(line['seconds'])} |"
    if not line["seconds"]:
        return f"| {line['op']} | {line['tokens']} | FAILED: {line['failed']} |"
    first, *others = line["seconds"].items()
    ratios = ", ".join([f"{way} {took / first[1]:.2f}x" for way, took in others] +
                       [f"{way} FAILED ({why})" for way, why in line["failed"].items()])
    return (f"| {line['op']} | {line['tokens']} | {first[0]} {first[1] * 1e6:.1f} | {line['bytes'] / first[1] / 1e9:.0f} | "
            f"{line['of_copy_rate'][first[0]]:.0%} | {ratios} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file, after each line")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections; all by default")
    parser.add_argument("--host-gib", nargs="+", type=float, default=(1.0, 32.0), help="sizes of the tables in host memory")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny: shows that every call is right and measures nothing")
    args = parser.parse_args()
    gpu_calls.DRY = args.dry
    if not args.dry and not torch.cuda.is_available():
        raise SystemExit("bench-gpu: torch finds no CUDA device")
    name = "no GPU: a dry run, nothing is measured" if args.dry else torch.cuda.get_device_name()
    peaks = {"device": copy_bytes_per_s(pinned=False), "link": copy_bytes_per_s(pinned=True)}
    result = {"provenance": "dry run" if args.dry else "measured", "device": name, "torch": torch.__version__,
              "copy_bytes_per_s": peaks, "lines": []}
    print(f"{name}, torch {torch.__version__}.")
    if not args.dry:
        print(f"A copy on the device moves {peaks['device'] / 1e9:.0f} GB/s, reads and writes counted; one from pinned host "
              f"memory {peaks['link'] / 1e9:.1f} GB/s.\n\n| op | tokens | us | GB/s | of the copy's rate | others' time over "
              "it |\n|---|---|---|---|---|---|", flush=True)
    for section, op, moves, sizes, make in gpu_calls.sections(args.only, args.host_gib):
        for tokens in (1, 5) if args.dry else sizes:
            line = measure(section, op, tokens, make(tokens), peaks[moves])
            result["lines"].append(line)
            print(shown(line), flush=True)
            if args.json:
                args.json.write_text(json.dumps(result, indent=2) + "\n")
    ek.check_errors()


if __name__ == "__main__":
    main()
