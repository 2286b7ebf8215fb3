"""What an op that makes its output takes over the same call with `out=`, call by call in turn: the price of new memory.

    python bench/paired_outputs.py      a Markdown table of the medians of the per-pair ratios, with their quartiles

One thread. An output is dropped before the next call makes its own, as in a loop over batches; nothing else is in between.
EK_BENCH_TABLE_GIB (default 1) is the size of the table.
"""
import os
import statistics

import torch

import engram_kernels as ek
from bench_gather_rows import memory
from paired_gather_gate import ratios

GIB = int(os.environ.get("EK_BENCH_TABLE_GIB", "1"))
TOKENS, HIDDEN, BRANCHES, COLUMNS, ROW_DIM = (4096, 16_384, 65_536), 1024, 4, 24, 256
PAIRS = 21
BF16 = torch.bfloat16


def calls(tokens, table, layout):
    """(op, call of out) of every op that takes `out=`, for so many tokens; those of a hidden state for an eighth of them."""
    generator = torch.Generator().manual_seed(tokens)
    token_ids = torch.randint(0, layout.num_ids, (tokens,), generator=generator, dtype=torch.int32)
    cu = torch.tensor([0, tokens], dtype=torch.int32)
    row_ids = torch.randint(0, table.num_rows, (tokens, COLUMNS), generator=generator)
    few = tokens // 8
    hidden = torch.ones(few, BRANCHES, HIDDEN, dtype=BF16)
    value, weight, w_kv = hidden[:, 0].contiguous(), torch.ones(BRANCHES, HIDDEN), torch.ones(5 * HIDDEN, 4 * ROW_DIM, dtype=BF16)
    few_ids, few_cu = row_ids[:few, :4].contiguous(), torch.tensor([0, few], dtype=torch.int32)
    taps, norm = torch.ones(BRANCHES, HIDDEN, 4, dtype=BF16), weight.to(BF16)
    history = torch.zeros(1, layout.max_order - 1, dtype=torch.int32)
    yield "ngram_hash", lambda out: ek.ngram_hash(token_ids, cu, layout, out=out)
    yield "ngram_hash_and_commit", lambda out: ek.ngram_hash_and_commit(token_ids, cu, layout, history, out=out)
    yield "gather_rows", lambda out: ek.gather_rows(table, row_ids, out=out)
    yield "gate", lambda out: ek.gate(hidden, hidden, value, weight, weight, out=out)
    yield "gather_gate", lambda out: ek.gather_gate(hidden, table, few_ids, weight, weight, out=out)
    yield "short_conv", lambda out: ek.short_conv(hidden, taps, norm, few_cu, 3, out=out)
    if tokens == TOKENS[0]:  # a matrix product, beside which memory is nothing
        yield "engram_forward", lambda out: ek.engram_forward(hidden, table, few_ids, w_kv, weight, weight, out=out)


def main():
    torch.set_num_threads(1)
    table = ek.RowTable.from_tensor(memory(GIB << 30, True).view(BF16).view(-1, ROW_DIM))
    layout = ek.EngramSpec.deepseek_v41().layout()
    print("| op | tokens | output | its time over the call with `out=` (quartiles) |\n|---|---|---|---|")
    for tokens in TOKENS:
        for op, call in calls(tokens, table, layout):
            given = call(None).zero_()  # every page written
            found = ratios(lambda call=call, given=given: call(given), lambda call=call: call(None), PAIRS)
            low, middle, high = statistics.quantiles(found, n=4)
            rows, mib = given.shape[1 if "hash" in op else 0], given.nbytes / 2**20
            print(f"| {op} | {rows} | {mib:.0f} MiB | {middle:.2f}x ({low:.2f} to {high:.2f}) |", flush=True)


if __name__ == "__main__":
    main()
