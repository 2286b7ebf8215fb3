"""gather_rows against torch.index_select and FBGEMM's CPU table-batched embedding, on the same table and output.

512-byte bf16 rows, a table of EK_BENCH_TABLE_GIB (default 4, in huge pages), 256k random ids, output preallocated where the
peer can. Contenders without huge pages read a table of the same size in small pages.
"""
import mmap
import os

import pytest
import torch

from engram_kernels import _C
from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.table.row_table import RowTable
from harness import measure

GIB = int(os.environ.get("EK_BENCH_TABLE_GIB", "4"))
NUM_ROWS, ROW_DIM, NUM_IDS = (GIB << 30) // 512, 256, 1 << 18
RANDOM = f"gather_rows, {NUM_IDS} random rows of {ROW_DIM} to bf16 from {NUM_ROWS} rows"
SMALL_PAGES = RANDOM + ", table in small pages"
DECODE = "gather_rows, deepseek_v41_decode, 24 rows of 256 to bf16, call included"
BACKWARD = f"gather_rows backward, {NUM_IDS} positions of {ROW_DIM} bf16 into 1M rows"


def memory(num_bytes, huge_pages):
    """Anonymous memory, touched, with or without huge pages."""
    mapping = mmap.mmap(-1, num_bytes + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -whole.data_ptr() % (2 << 20)
    piece = torch.randint(0x30, 0x60, (1 << 26,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = whole[start:start + num_bytes]
    for begin in range(0, num_bytes, piece.numel()):
        whole[begin:begin + piece.numel()] = piece[:num_bytes - begin]
    return whole


@pytest.fixture(scope="module", params=[True, False], ids=["huge_pages", "small_pages"])
def table_bytes(request):
    return memory(GIB << 30, request.param), RANDOM if request.param else SMALL_PAGES


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, NUM_ROWS, (NUM_IDS,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def out():
    return torch.zeros(NUM_IDS, ROW_DIM, dtype=torch.bfloat16)


def bf16_rows(table_bytes):
    return table_bytes.view(torch.bfloat16).view(NUM_ROWS, ROW_DIM)


def gather(benchmark, group, contender, run, row_bytes, role="peer"):
    measure(benchmark, run, group=group, contender=contender, role=role, units=NUM_IDS, unit="row",
            num_bytes=NUM_IDS * (row_bytes + 2 * ROW_DIM))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_ours(benchmark, table_bytes, ids, out, isa):
    try:
        _C.set_cpu_isa(isa)
    except ValueError as err:
        pytest.skip(str(err))
    table = RowTable.from_tensor(bf16_rows(table_bytes[0]))
    ours = isa == _C.best_cpu_isa()
    gather(benchmark, table_bytes[1], f"engram_kernels bf16 ({isa})", lambda: gather_rows(table, ids, out=out), 512,
           "ours" if ours else "peer")
    _C.set_cpu_isa(_C.best_cpu_isa())
    assert torch.equal(out[::999], table.rows[ids[::999]])


def test_ours_allocating(benchmark, table_bytes, ids):
    """What peers without out= do: a fresh output per call, whose pages the kernel must clear first."""
    table = RowTable.from_tensor(bf16_rows(table_bytes[0]))
    gather(benchmark, table_bytes[1], "engram_kernels bf16, output allocated", lambda: gather_rows(table, ids), 512)


def test_ours_fp8_block32(benchmark, table_bytes, ids, out):
    rows = table_bytes[0][:NUM_ROWS * 256].view(NUM_ROWS, 256)
    table = RowTable.from_tensor(rows, table_bytes[0][-NUM_ROWS * 8:].view(NUM_ROWS, 8), "fp8_e4m3_block32")
    gather(benchmark, table_bytes[1], "engram_kernels fp8_e4m3_block32", lambda: gather_rows(table, ids, out=out), 264)


def test_ours_fp8_packed(benchmark, table_bytes, ids, out):
    rows = table_bytes[0][:NUM_ROWS * 264].view(NUM_ROWS, 264)
    table = RowTable.from_tensor(rows, row_format="fp8_e4m3_block32_packed", row_dim=256)
    gather(benchmark, table_bytes[1], "engram_kernels fp8_e4m3_block32_packed", lambda: gather_rows(table, ids, out=out), 264)


def test_ours_int8(benchmark, table_bytes, ids, out):
    rows = table_bytes[0][:NUM_ROWS * 256].view(torch.int8).view(NUM_ROWS, 256)
    scales = table_bytes[0][-NUM_ROWS * 32:].view(torch.float32).view(NUM_ROWS, 8)
    table = RowTable.from_tensor(rows, scales, "int8_group32")
    gather(benchmark, table_bytes[1], "engram_kernels int8_group32", lambda: gather_rows(table, ids, out=out), 288)


@pytest.mark.parametrize("row_format, block", [("nvfp4", 16), ("mxfp4", 32)])
def test_ours_four_bits(benchmark, table_bytes, ids, out, row_format, block):
    """Rows of 128 bytes; units are rows, beside bf16 and fp8 of the same run."""
    rows = table_bytes[0][:NUM_ROWS * 128].view(NUM_ROWS, 128)
    scales = table_bytes[0][-NUM_ROWS * (256 // block):].view(NUM_ROWS, 256 // block)
    table = RowTable.from_tensor(rows, scales, row_format, table_scale=1.0 if row_format == "nvfp4" else None)
    gather(benchmark, table_bytes[1], f"engram_kernels {row_format}", lambda: gather_rows(table, ids, out=out), table.row_bytes)


def test_torch_index_select(benchmark, table_bytes, ids, out):
    rows = bf16_rows(table_bytes[0])
    gather(benchmark, table_bytes[1], "torch.index_select(out=)", lambda: torch.index_select(rows, 0, ids, out=out), 512)


def test_torch_embedding(benchmark, table_bytes, ids):
    rows = bf16_rows(table_bytes[0])
    gather(benchmark, table_bytes[1], "torch.nn.functional.embedding", lambda: torch.nn.functional.embedding(ids, rows), 512)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_fbgemm_table_batched_embedding(benchmark, table_bytes, ids, precision):
    """No pooling: one row per id. 512-byte rows in both precisions (CPU tables are fp16, fp32 or int8, not bf16)."""
    ops = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    common = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    sparse_type = pytest.importorskip("fbgemm_gpu.split_embedding_configs").SparseType
    dtype, dim = (torch.float16, 256) if precision == "fp16" else (torch.float32, 128)
    kernel = ops.SplitTableBatchedEmbeddingBagsCodegen(
        [(64, dim, common.EmbeddingLocation.HOST, ops.ComputeDevice.CPU)], weights_precision=sparse_type(precision),
        output_dtype=sparse_type(precision), pooling_mode=common.PoolingMode.NONE, device=torch.device("cpu"))
    # the table of the other contenders, not one of its own
    kernel.weights_host = torch.nn.Parameter(table_bytes[0].view(dtype), requires_grad=False)
    kernel.rows_per_table[0] = kernel.hash_size_cumsum[1] = NUM_ROWS
    offsets = torch.arange(NUM_IDS + 1)
    with torch.no_grad():
        got = kernel(ids, offsets)
        assert torch.equal(got[::999], table_bytes[0].view(dtype).view(NUM_ROWS, dim)[ids[::999]])
        gather(benchmark, table_bytes[1], f"FBGEMM CPU table-batched embedding ({precision}, 512-byte rows)",
               lambda: kernel(ids, offsets), 512)


def test_copy_of_the_output(benchmark, table_bytes, out):
    rows = bf16_rows(table_bytes[0])[:NUM_IDS]
    gather(benchmark, table_bytes[1], "copy of consecutive rows", lambda: out.copy_(rows), 512, "bound")


def decode_inputs():
    rows = torch.randn(10_000, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.randint(0, 10_000, (24,), generator=torch.Generator().manual_seed(1))
    return rows, ids, torch.empty(24, 256, dtype=torch.bfloat16)


def test_ours_decode(benchmark):
    rows, ids, out = decode_inputs()
    table = RowTable.from_tensor(rows)
    measure(benchmark, lambda: gather_rows(table, ids, out=out), group=DECODE, contender="engram_kernels", role="ours", units=24,
            unit="row", rounds=2000)


def test_torch_decode(benchmark):
    rows, ids, out = decode_inputs()
    measure(benchmark, lambda: torch.index_select(rows, 0, ids, out=out), group=DECODE, contender="torch.index_select(out=)",
            units=24, unit="row", rounds=2000)


def backward_inputs():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(NUM_IDS, ROW_DIM, generator=generator).bfloat16(),
            torch.randint(0, 1 << 20, (NUM_IDS,), generator=generator))


def test_ours_backward(benchmark):
    grad, ids = backward_inputs()
    measure(benchmark, lambda: torch.ops.engram_kernels.gather_rows_bwd(grad, ids, 1 << 20, torch.bfloat16), group=BACKWARD,
            contender="engram_kernels", role="ours", units=NUM_IDS, unit="row", num_bytes=grad.nbytes + (1 << 29))


def test_torch_backward(benchmark):
    grad, ids = backward_inputs()
    measure(benchmark, lambda: torch.ops.aten.embedding_dense_backward(grad, ids, 1 << 20, -1, False), group=BACKWARD,
            contender="torch embedding_dense_backward (sums in bf16)", units=NUM_IDS, unit="row",
            num_bytes=grad.nbytes + (1 << 29))
