"""Times the CUDA ops on a GPU against the measured peak of its memory and against plain PyTorch: `make bench-gpu`.

Every number is measured here: CUDA events around a queue of calls that was blocked until all were queued, so that launches
do not count; fresh ids in each call. Percent of peak: bytes that the op must move over its time, over the rate of a copy of
1 GiB in the same run; small batches stay in the L2 cache and may pass it.
"""
import argparse
import json
import statistics
from pathlib import Path

import torch

import engram_kernels as ek
from engram_kernels.reference.gate import gate as reference_gate

H, M, C, D = 5120, 4, 24, 256  # DeepSeek-V4.1-Flash
ROUNDS, CALLS = 7, 20


def seconds(calls):
    """Median seconds of a call; `calls` are run one after the other, each once a round."""
    for call in calls[:3]:
        call()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(50_000_000)  # the queue fills behind this
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def peak_bytes_a_second():
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds([lambda: target.copy_(source)] * CALLS)


def randn(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def hash_calls(tokens):
    spec = ek.EngramSpec.deepseek_v41()
    layout = spec.layout().to("cuda")
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    ids = [torch.randint(0, layout.num_ids, (tokens,), device="cuda") for _ in range(CALLS)]
    out = torch.empty(2, tokens, C, dtype=torch.int32, device="cuda")
    return tokens * 2 * C * 4 + tokens * 8, [lambda i=i: ek.ngram_hash(i, cu_seqlens, layout, out=out) for i in ids], None


def gather_calls(tokens, row_format, row_bytes):
    rows = torch.randint(0, 120, (8_000_000, row_bytes), device="cuda", dtype=torch.uint8)
    table = ek.RowTable.from_tensor(rows.view(torch.bfloat16) if row_format == "bf16" else rows, row_format=row_format, row_dim=D)
    ids = [torch.randint(0, 8_000_000, (tokens, C), device="cuda") for _ in range(CALLS)]
    out = torch.empty(tokens, C, D, dtype=torch.bfloat16, device="cuda")
    peer = None
    if row_format == "bf16":
        flat = out.view(-1, D)
        peer = [lambda i=i: torch.index_select(table.rows, 0, i.view(-1), out=flat) for i in ids]
    return tokens * C * (row_bytes + 2 * D + 8), [lambda i=i: ek.gather_rows(table, i, out=out) for i in ids], peer


def gate_calls(tokens):
    inputs = (randn(tokens, M, H), randn(tokens, M, H), randn(tokens, H), randn(M, H), randn(M, H))
    out = torch.empty_like(inputs[0])
    peer = torch.compile(lambda *x: reference_gate(*x, None, 1e-6, 1e-6, "copysign", True))
    return (3 * M + 1) * tokens * H * 2, [lambda: ek.gate(*inputs, out=out)] * CALLS, [lambda: peer(*inputs)] * CALLS


def gather_gate_calls(tokens):
    """20 packed rows a token; the peer: our gather_rows, then our gate."""
    columns = H // D
    rows = torch.randint(0, 120, (8_000_000, 264), device="cuda", dtype=torch.uint8)
    table = ek.RowTable.from_tensor(rows, row_format="fp8_e4m3_block32_packed", row_dim=D)
    ids = [torch.randint(0, 8_000_000, (tokens, columns), device="cuda") for _ in range(CALLS)]
    hidden, w_hidden, w_key = randn(tokens, M, H), randn(M, H), randn(M, H)
    out, memory = torch.empty_like(hidden), torch.empty(tokens, columns, D, dtype=torch.bfloat16, device="cuda")
    value = memory.view(tokens, H)
    key = value[:, None].expand(tokens, M, H)

    def two_steps(i):
        ek.gather_rows(table, i, out=memory)
        ek.gate(hidden, key, value, w_hidden, w_key, out=out)

    return (tokens * (columns * (264 + 8) + 2 * M * H * 2),
            [lambda i=i: ek.gather_gate(hidden, table, i, w_hidden, w_key, out=out) for i in ids],
            [lambda i=i: two_steps(i) for i in ids])


def short_conv_calls(tokens):
    x, weight, norm = randn(tokens, M, H), randn(M, H, 4), randn(M, H)
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    out = torch.empty_like(x)
    return 4 * tokens * M * H, [lambda: ek.short_conv(x, weight, norm, cu_seqlens, 4, out=out)] * CALLS, None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench-gpu: torch finds no CUDA device")
    peak = peak_bytes_a_second()
    name = torch.cuda.get_device_name()
    print(f"measured on {name}, torch {torch.__version__}; a copy moves {peak / 1e9:.0f} GB/s\n")
    print("| op | tokens | us | GB/s | of the copy's rate | peer's time over ours |\n|---|---|---|---|---|---|")
    lines = []
    for op, make in {"ngram_hash, both layers": hash_calls, "gather_rows bf16": lambda t: gather_calls(t, "bf16", 512),
                     "gather_rows packed fp8 to bf16": lambda t: gather_calls(t, "fp8_e4m3_block32_packed", 264),
                     "gate (peer: torch.compile)": gate_calls,
                     "gather_gate packed fp8 (peer: gather_rows, gate)": gather_gate_calls,
                     "short_conv": short_conv_calls}.items():
        for tokens in (1, 16, 512, 4096):
            num_bytes, ours, peer = make(tokens)
            took = seconds(ours)
            ratio = seconds(peer) / took if peer else None
            lines.append({"op": op, "tokens": tokens, "seconds": took, "bytes": num_bytes, "peer_over_ours": ratio})
            print(f"| {op} | {tokens} | {took * 1e6:.1f} | {num_bytes / took / 1e9:.0f} | {num_bytes / took / peak:.0%} | "
                  f"{f'{ratio:.2f}x' if ratio else ''} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"provenance": "measured", "device": name, "torch": torch.__version__,
                                         "copy_bytes_a_second": peak, "lines": lines}, indent=2) + "\n")


if __name__ == "__main__":
    main()
