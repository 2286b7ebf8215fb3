"""What the CUDA report runs: the shapes of DeepSeek-V4.1-Flash, with as many tokens as a simulator can bear.

Each case is (op, shape, run, least bytes, units, unit); the runs are those of the tests, which also compare the results.
"""
import torch
from gather_gate_sim import Table
from gather_gate_sim import make_inputs as gather_gate_inputs
from gather_gate_sim import simulate as simulate_gather_gate
from op_cases import short_conv_inputs
from short_conv_sim import simulate as simulate_short_conv
from short_conv_sim import simulate_bwd as simulate_short_conv_bwd
from test_gate_bwd_cuda_sim import simulate as simulate_gate_bwd
from test_gate_cuda_sim import make_inputs as gate_inputs
from test_gate_cuda_sim import simulate as simulate_gate
from test_gather_gate_bwd_cuda_sim import random_grad
from test_gather_gate_bwd_cuda_sim import simulate as simulate_gather_gate_bwd
from test_gather_rows_bwd_cuda_sim import simulate as simulate_gather_rows_bwd
from test_gather_rows_cuda_sim import bytes_of
from test_gather_rows_cuda_sim import simulate as simulate_gather_rows
from test_ngram_hash_cuda_sim import run_v41
from test_place_rows_cuda_sim import random_bytes, random_places
from test_place_rows_cuda_sim import simulate as simulate_place_rows
from test_row_update_cuda_sim import make_state
from test_row_update_cuda_sim import simulate as simulate_row_update

from cuda_sim import Device
from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.table.quantize import encode
from engram_kernels.testing.inputs import random_rows

HIDDEN_SIZE, BRANCHES, ROW_DIM = 5120, 4, 256
NUM_ROWS = 960


def ngram_hash():
    tokens = 2048
    return ("ngram_hash", "2 layers, 48 ids per token", lambda: [run_v41(tokens, 1)], tokens * (4 + 48 * 4), tokens * 48, "id")


def gather_rows(row_format, as_stored=False):
    def case():
        rows, scales = random_rows(row_format, NUM_ROWS, ROW_DIM, torch.Generator().manual_seed(11))
        ids = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(12)).to(torch.int32)
        row_bytes = bytes_of(rows).shape[1] + (0 if scales is None else bytes_of(scales).shape[1])
        out_bytes = row_bytes if as_stored else 2 * ROW_DIM
        return ("gather_rows", f"{row_format} to {'packed' if as_stored else 'bf16'}",
                lambda: simulate_gather_rows(rows, scales, ids, row_format, ROW_DIM, as_stored=as_stored,
                                             device=Device(multiprocessors=1))[2],  # the tiles of a batch that fills a GPU
                NUM_ROWS * (4 + row_bytes + out_bytes), NUM_ROWS, "row")
    return case


def gate():
    tokens = 24
    inputs = gate_inputs(tokens, BRANCHES, HIDDEN_SIZE, weight_dtype=torch.bfloat16)
    least = (3 * BRANCHES + 1) * tokens * HIDDEN_SIZE * 2
    return ("gate", "bf16, M 4, H 5120", lambda: simulate_gate(inputs, device=Device(multiprocessors=2))[1], least,
            tokens * BRANCHES, "token and branch")


def gate_bwd():
    tokens = 24
    inputs = gate_inputs(tokens, BRANCHES, HIDDEN_SIZE, weight_dtype=torch.bfloat16)
    grad_out = torch.randn(tokens, BRANCHES, HIDDEN_SIZE).bfloat16()
    least = (5 * BRANCHES + 2) * tokens * HIDDEN_SIZE * 2
    return ("gate backward", "bf16, M 4, H 5120, 12 tokens per block",
            lambda: simulate_gate_bwd(inputs, grad_out, device=Device(multiprocessors=2))[1], least, tokens * BRANCHES,
            "token and branch")


def gather_gate(backward, tokens=24):
    def case():
        columns, row_bytes = HIDDEN_SIZE // ROW_DIM, 264
        rows, _ = random_rows("fp8_e4m3_block32_packed", tokens * columns, ROW_DIM, torch.Generator().manual_seed(11))
        table = Table("fp8_e4m3_block32_packed", ROW_DIM, rows)
        hidden, ids, *weights = gather_gate_inputs(tokens, BRANCHES, columns, ROW_DIM, weight_dtype=torch.bfloat16)
        ids = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(12)).int().reshape(ids.shape)
        inputs = [hidden, ids, *weights]
        least = tokens * (columns * (row_bytes + 4) + ((3 * BRANCHES + 1) if backward else 2 * BRANCHES) * HIDDEN_SIZE * 2)
        if backward:
            return ("gather_gate backward", "packed fp8, M 4, H 5120, 12 tokens per block",
                    lambda: simulate_gather_gate_bwd(table, inputs, random_grad(inputs), device=Device(multiprocessors=2))[1],
                    least, tokens * BRANCHES, "token and branch")
        return ("gather_gate", "packed fp8, M 4, H 5120",
                lambda: simulate_gather_gate(table, inputs, device=Device(multiprocessors=1))[2], least, tokens * BRANCHES,
                "token and branch")
    return case


def gather_rows_bwd():
    positions, num_rows = 960, 480
    grad = torch.randn(positions, ROW_DIM).bfloat16()
    ids = torch.randint(0, num_rows, (positions,), generator=torch.Generator().manual_seed(12))
    least = positions * (2 * ROW_DIM + 16) + len(ids.unique()) * 2 * ROW_DIM  # sorted ids and their positions, 8 bytes each
    return ("gather_rows backward", "bf16, 2 positions per row, after the sort",
            lambda: simulate_gather_rows_bwd(grad, ids, num_rows, torch.bfloat16)[1], least, positions, "position")


def short_conv(tokens=84):
    args = short_conv_inputs([tokens], 1, HIDDEN_SIZE)
    return ("short_conv", "bf16, H 5120, 28 tokens per block",
            lambda: simulate_short_conv(*args, 3, device=Device(multiprocessors=1))[2],  # a block per phase, as in long chunks
            2 * tokens * HIDDEN_SIZE * 2, tokens, "token and branch")


def short_conv_decode(sequences=8):
    args = short_conv_inputs([1] * sequences, BRANCHES, HIDDEN_SIZE)
    state = torch.zeros(sequences, 9, BRANCHES, HIDDEN_SIZE, dtype=torch.bfloat16)
    row = BRANCHES * HIDDEN_SIZE * 2  # a token reads itself and three of the state, writes the output and its place in the state
    return ("short_conv", "decode step of 8 sequences",
            lambda: simulate_short_conv(*args, 3, state, torch.full((sequences,), 100))[2], sequences * 6 * row,
            sequences * BRANCHES, "token and branch")


def short_conv_bwd(tokens=40):
    args = short_conv_inputs([tokens], 1, HIDDEN_SIZE)
    grad_out = torch.randn(args[0].shape).bfloat16()
    return ("short_conv backward", "bf16, H 5120, 40 tokens per block",
            lambda: simulate_short_conv_bwd(grad_out, *args, 3, device=Device(multiprocessors=1))[2],
            3 * tokens * HIDDEN_SIZE * 2, tokens, "token and branch")


def place_rows(row_bytes=264):
    places = random_places(NUM_ROWS, NUM_ROWS, 3 * NUM_ROWS)
    return ("place_rows", "packed fp8, into the prefetcher's cache",
            lambda: simulate_place_rows(random_bytes(3 * NUM_ROWS, row_bytes), None, row_bytes, 0, places, 3 * NUM_ROWS),
            NUM_ROWS * (2 * row_bytes + 8), NUM_ROWS, "row")


def row_update(row_format, rows=256):
    def make():
        ids, state = torch.arange(2 * rows) % rows, make_state("row", torch.bfloat16, rows, ROW_DIM)
        grads = torch.randn(2 * rows, ROW_DIM, generator=torch.Generator().manual_seed(3)).bfloat16()
        table = torch.randn(rows, ROW_DIM, generator=torch.Generator().manual_seed(4))
        table, scales = (table.bfloat16(), None) if row_format == "bf16" else encode(table, row_format)
        # gradients of two positions; row, moments and count, both ways
        of_row = 2 * ROW_DIM * 2 + 2 * (ROW_FORMATS[row_format].row_bytes(ROW_DIM) + ROW_DIM * 2 + 4 + 4)
        return ("row_update", f"Adam, {row_format}, moments bf16 and per row, 2 positions per row, after the sort",
                lambda: simulate_row_update(table, ids, grads, "adam", state, row_format=row_format, scales=scales)[2],
                rows * (of_row + 2 * (8 + 8 + 4)), rows, "row")
    return make


CASES = (ngram_hash, gather_rows("bf16"), gather_rows("fp8_e4m3_block32_packed"), gather_rows("fp8_e4m3_block32"),
         gather_rows("int8_group32"), gather_rows("fp8_e4m3_block32_packed", as_stored=True),
         gather_rows_bwd, gate, gate_bwd, gather_gate(backward=False), gather_gate(backward=True), short_conv, short_conv_decode,
         short_conv_bwd, row_update("bf16"), row_update("fp8_e4m3_block32"), place_rows)
