"""engram_forward against gather_rows, a matrix product and gate, one after the other. V4.1 widths, all threads, bf16 weights.

The same product in both, torch's: oneDNN and, where the machine has them, bf16 or AMX instructions.
"""
import functools

import pytest
import torch

import engram_kernels as ek
from engram_kernels.testing.inputs import random_rows
from harness import measure

HIDDEN_SIZE, BRANCHES, COLUMNS, ROW_DIM, NUM_ROWS = 5120, 4, 24, 256, 65536


@functools.lru_cache(1)
def steps(tokens, row_format):
    """(engram_forward, the three steps) on the same tensors: where w_kv lies in memory decides the time of few tokens."""
    generator = torch.Generator().manual_seed(0)
    table = ek.RowTable.from_tensor(*random_rows(row_format, NUM_ROWS, ROW_DIM, generator), row_format, row_dim=ROW_DIM)
    hidden = torch.randn(tokens, BRANCHES, HIDDEN_SIZE, generator=generator).bfloat16()
    w_kv = (torch.randn((BRANCHES + 1) * HIDDEN_SIZE, COLUMNS * ROW_DIM, generator=generator) / 78).bfloat16()
    w_hidden, w_key = torch.rand(BRANCHES, HIDDEN_SIZE), torch.rand(BRANCHES, HIDDEN_SIZE)
    ids = torch.randint(0, NUM_ROWS, (tokens, COLUMNS), dtype=torch.int32)
    out, memory = torch.empty_like(hidden), torch.empty(tokens, COLUMNS, ROW_DIM, dtype=torch.bfloat16)
    product = torch.empty(tokens, w_kv.shape[0], dtype=torch.bfloat16)

    def run_fused():
        return ek.engram_forward(hidden, table, ids, w_kv, w_hidden, w_key, out=out)

    def run_three():
        ek.gather_rows(table, ids, out=memory)
        torch.matmul(memory.view(tokens, -1), w_kv.T, out=product)
        kv = product.view(tokens, BRANCHES + 1, HIDDEN_SIZE)
        return ek.gate(hidden, kv[:, :-1], kv[:, -1], w_hidden, w_key, out=out)

    return run_fused, run_three


@pytest.mark.parametrize("tokens", [1, 128])
@pytest.mark.parametrize("fused", [True, False], ids=["engram_forward", "three_steps"])
def test_bench_engram_forward(benchmark, fused, tokens):
    measure(benchmark, steps(tokens, "fp8_e4m3_block32")[0 if fused else 1],
            group=f"engram_forward, {tokens} tokens, M {BRANCHES}, H {HIDDEN_SIZE}, {COLUMNS} fp8_e4m3_block32 rows of {ROW_DIM}",
            contender="engram_forward" if fused else "gather_rows, torch.matmul, gate", role="ours" if fused else "peer",
            units=tokens, unit="token", rounds=5)
