"""gather_gate against gather_rows followed by gate. One thread, a 2 GiB table in huge pages, new random ids for every call."""
import functools

import pytest
import torch

from engram_kernels.ops.gate import gate
from engram_kernels.ops.gather_gate import gather_gate
from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.table.row_table import ROW_FORMATS, RowTable
from engram_kernels.testing.inputs import random_rows
from harness import measure

HIDDEN_SIZE, ROW_DIM = 5120, 256
COLUMNS = HIDDEN_SIZE // ROW_DIM
TABLE_BYTES = 2 << 30
TOKENS = 1024
FORMATS = ("bf16", "f32", "fp8_e4m3_block32_packed", "fp8_e4m3_tensor", "int8_group32")


@functools.lru_cache(maxsize=1)  # one table at a time
def make_table(row_format):
    block, scales = random_rows(row_format, 4096, ROW_DIM, torch.Generator().manual_seed(0))
    copies = TABLE_BYTES // (4096 * ROW_FORMATS[row_format].row_bytes(ROW_DIM))
    per_row = scales is not None and scales.dim() == 2
    return RowTable.from_tensor(block.repeat(copies, 1), scales.repeat(copies, 1) if per_row else scales, row_format,
                                copy=True, row_dim=ROW_DIM)


def steps(table, tokens, branches, fused):
    """A function that runs one step; ids are new in each, so that rows come from DRAM."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, branches, HIDDEN_SIZE).bfloat16()
    w_hidden, w_key = torch.rand(branches, HIDDEN_SIZE), torch.rand(branches, HIDDEN_SIZE)
    out, memory = torch.empty_like(hidden), torch.empty(tokens, COLUMNS, ROW_DIM, dtype=torch.bfloat16)
    ids = torch.randint(0, table.num_rows, (16, tokens, COLUMNS), dtype=torch.int32)
    turn = iter(range(10**9))

    def run_fused():
        return gather_gate(hidden, table, ids[next(turn) % 16], w_hidden, w_key, out=out)

    def run_two():
        gather_rows(table, ids[next(turn) % 16], out=memory)
        value = memory.view(tokens, HIDDEN_SIZE)
        return gate(hidden, value[:, None].expand(hidden.shape), value, w_hidden, w_key, out=out)

    return run_fused if fused else run_two


@pytest.mark.parametrize("fused", [True, False], ids=["gather_gate", "gather_rows_then_gate"])
@pytest.mark.parametrize("branches", [1, 2, 4])
@pytest.mark.parametrize("row_format", FORMATS)
def test_bench_gather_gate(benchmark, row_format, branches, fused):
    table = make_table(row_format)
    num_bytes = TOKENS * (branches * HIDDEN_SIZE * 4 + COLUMNS * table.row_bytes)
    measure(benchmark, steps(table, TOKENS, branches, fused),
            group=f"gather_gate, {TOKENS} tokens, M {branches}, H {HIDDEN_SIZE}, {row_format} rows of {ROW_DIM}, one thread",
            contender="gather_gate" if fused else "gather_rows then gate", role="ours" if fused else "peer",
            num_bytes=num_bytes, units=TOKENS, unit="token")


@pytest.mark.parametrize("fused", [True, False], ids=["gather_gate", "gather_rows_then_gate"])
def test_bench_gather_gate_decode(benchmark, fused):
    run = steps(make_table("bf16"), 1, 4, fused)
    measure(benchmark, lambda: [run() for _ in range(100)], units=100, unit="call", role="ours" if fused else "peer",
            group=f"gather_gate, 100 calls of 1 token, M 4, H {HIDDEN_SIZE}, bf16 rows",
            contender="gather_gate" if fused else "gather_rows then gate")
