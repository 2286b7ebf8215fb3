"""Times the CUDA ops on a GPU against the measured peak of its memory and against plain PyTorch: `make bench-gpu`.

Every number is measured here: CUDA events around a queue of calls that was blocked until all were queued, so that launches
do not count; fresh ids in each call. Percent of peak: bytes that the op must move over its time, over the rate of a copy of
1 GiB in the same run (of 256 MiB from pinned host memory where the table lies there); small batches stay in the L2 cache and
may pass it. A row counts as its 264 or 512 bytes; memory moves whole 32-byte sectors.
"""
import argparse
import json
import statistics
from pathlib import Path

import torch

import engram_kernels as ek
from engram_kernels.reference.gate import gate as reference_gate

H, M, C, D = 5120, 4, 24, 256  # DeepSeek-V4.1-Flash
TOKENS = (1, 16, 128, 512, 4096, 16384)
ROUNDS, CALLS = 7, 20


def seconds(calls):
    """Median seconds of a call; `calls` are run one after the other, each once a round."""
    for call in calls[:3]:
        call()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # the queue fills behind this
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def copy_bytes_per_s(source):
    """Rate of copying `source` to another tensor on the device: bytes read and written there."""
    target = torch.empty_like(source, device="cuda")
    moved = source.numel() * (2 if source.is_cuda else 1)
    return moved / seconds([lambda: target.copy_(source, non_blocking=True)] * CALLS)


def randn(*shape, grad=False):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=grad)


# Each gives (bytes that must move, calls by backend, calls of a peer or None).

def hash_calls(tokens):
    layout = ek.EngramSpec.deepseek_v41().layout().to("cuda")
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    ids = [torch.randint(0, layout.num_ids, (tokens,), device="cuda") for _ in range(CALLS)]
    out = torch.empty(2, tokens, C, dtype=torch.int32, device="cuda")
    return (tokens * 2 * C * 4 + tokens * 8,
            lambda backend: [lambda i=i: ek.ngram_hash(i, cu_seqlens, layout, out=out, backend=backend) for i in ids], None)


def make_table(row_format, place):
    """Rows of V4.1 width: 8 million on the device, 4 million in pinned host memory."""
    row_bytes = 512 if row_format == "bf16" else 264
    rows = torch.randint(0, 120, (8_000_000 if place == "cuda" else 4_000_000, row_bytes), device=place, dtype=torch.uint8)
    rows = rows if place == "cuda" else rows.pin_memory()
    return ek.RowTable.from_tensor(rows.view(torch.bfloat16) if row_format == "bf16" else rows, row_format=row_format, row_dim=D)


def gather_calls(tokens, table):
    ids = [torch.randint(0, table.num_rows, (tokens, C), device="cuda") for _ in range(CALLS)]
    out = torch.empty(tokens, C, D, dtype=torch.bfloat16, device="cuda")
    peer = None
    if table.row_format == "bf16" and table.rows.is_cuda:
        flat = out.view(-1, D)
        peer = [lambda i=i: torch.index_select(table.rows, 0, i.view(-1), out=flat) for i in ids]
    num_bytes = tokens * C * table.row_bytes + (tokens * C * (2 * D + 8) if table.rows.is_cuda else 0)  # else the link's
    return num_bytes, lambda backend: [lambda i=i: ek.gather_rows(table, i, out=out, backend=backend) for i in ids], peer


def gate_calls(tokens):
    inputs = (randn(tokens, M, H), randn(tokens, M, H), randn(tokens, H), randn(M, H), randn(M, H))
    out = torch.empty_like(inputs[0])
    peer = torch.compile(lambda *x: reference_gate(*x, None, 1e-6, 1e-6, "copysign", True))
    return ((3 * M + 1) * tokens * H * 2, lambda backend: [lambda: ek.gate(*inputs, out=out, backend=backend)] * CALLS,
            [lambda: peer(*inputs)] * CALLS)


def gate_backward_calls(tokens):
    inputs = [randn(*shape, grad=True) for shape in ((tokens, M, H), (tokens, M, H), (tokens, H), (M, H), (M, H))]
    grad = randn(tokens, M, H)
    torch._functorch.config.donated_buffer = False  # the graph is gone through more than once
    peer = torch.compile(lambda *x: reference_gate(*x, None, 1e-6, 1e-6, "copysign", True))

    def backward(out):
        return [lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)] * CALLS
    return (5 * M + 2) * tokens * H * 2, lambda backend: backward(ek.gate(*inputs, backend=backend)), backward(peer(*inputs))


def gather_gate_calls(tokens, table):
    """Calls of gather_gate with 20 rows per token, and of its peer: our gather_rows, then our gate."""
    columns = H // D
    ids = [torch.randint(0, table.num_rows, (tokens, columns), device="cuda") for _ in range(CALLS)]
    hidden, w_hidden, w_key = randn(tokens, M, H), randn(M, H), randn(M, H)
    out, memory = torch.empty_like(hidden), torch.empty(tokens, columns, D, dtype=torch.bfloat16, device="cuda")
    value = memory.view(tokens, H)
    key = value[:, None].expand(tokens, M, H)

    def two_steps(i):
        ek.gather_rows(table, i, out=memory)
        ek.gate(hidden, key, value, w_hidden, w_key, out=out)

    def fused(backend):
        return [lambda i=i: ek.gather_gate(hidden, table, i, w_hidden, w_key, out=out, backend=backend) for i in ids]

    return tokens * (columns * (table.row_bytes + 8) + 2 * M * H * 2), fused, [lambda i=i: two_steps(i) for i in ids]


def short_conv_calls(tokens):
    x, weight, norm = randn(tokens, M, H), randn(M, H, 4), randn(M, H)
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    out = torch.empty_like(x)
    return (4 * tokens * M * H,
            lambda backend: [lambda: ek.short_conv(x, weight, norm, cu_seqlens, 4, out=out, backend=backend)] * CALLS, None)


def workloads():
    """(name, where the bytes that count move, function of tokens)."""
    yield "ngram_hash, both layers", "device", hash_calls
    for row_format, place in (("bf16", "cuda"), ("fp8_e4m3_block32_packed", "cuda"), ("fp8_e4m3_block32_packed", "cpu")):
        table = make_table(row_format, place)
        yield (f"gather_rows, {row_format} to bf16" + ("" if place == "cuda" else ", pinned host table"),
               "device" if place == "cuda" else "link", lambda tokens, table=table: gather_calls(tokens, table))
        if row_format != "bf16" and place == "cuda":
            yield (f"gather_gate, {row_format} (peer: gather_rows, then gate)", "device",
                   lambda tokens, table=table: gather_gate_calls(tokens, table))
        del table
    yield "gate (peer: torch.compile)", "device", gate_calls
    yield "gate backward (peer: torch.compile)", "device", gate_backward_calls
    yield "short_conv", "device", short_conv_calls


def measure(name, tokens, make, peak):
    """One line of the table; a backend that fails is a line that says so, not a lost run."""
    num_bytes, ours, peer = make(tokens)
    took = seconds(ours("cuda"))
    line = {"op": name, "tokens": tokens, "seconds": took, "bytes": num_bytes, "of_copy_rate": num_bytes / took / peak}
    for other, calls in (("peer", lambda: peer), ("triton", lambda: ours("triton"))):
        try:
            made = calls()
            line[f"{other}_over_ours"] = seconds(made) / took if made else None
        except Exception as err:  # whatever a compiler raises
            line |= {f"{other}_over_ours": None, f"{other}_failed": str(err)[:200]}
    ratios = [f"{r:.2f}x" if r else "" for r in (line["peer_over_ours"], line["triton_over_ours"])]
    print(f"| {name} | {tokens} | {took * 1e6:.1f} | {num_bytes / took / 1e9:.0f} | {num_bytes / took / peak:.0%} | "
          f"{ratios[0]} | {ratios[1]} |", flush=True)
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench-gpu: torch finds no CUDA device")
    peaks = {"device": copy_bytes_per_s(torch.empty(1 << 30, dtype=torch.uint8, device="cuda")),
             "link": copy_bytes_per_s(torch.empty(1 << 28, dtype=torch.uint8).pin_memory())}
    name = torch.cuda.get_device_name()
    print(f"Measured on {name}, torch {torch.__version__}. A copy on the device moves {peaks['device'] / 1e9:.0f} GB/s, reads "
          f"and writes counted; one from pinned host memory {peaks['link'] / 1e9:.1f} GB/s.\n")
    print("| op | tokens | us | GB/s | of the copy's rate | peer's time over ours | Triton's time over ours |\n"
          "|---|---|---|---|---|---|---|")
    result = {"provenance": "measured", "device": name, "torch": torch.__version__, "copy_bytes_per_s": peaks, "lines": []}
    for op, moves, make in workloads():
        for tokens in TOKENS:
            result["lines"].append(measure(op, tokens, make, peaks[moves]))
            if args.json:  # after each line, so that a run that ends early leaves what it measured
                args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
