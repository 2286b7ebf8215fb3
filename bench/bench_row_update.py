"""row_update and RowOptimizer against torch.optim.SparseAdam, torch's sparse Adagrad and FBGEMM's exact row-wise Adagrad, on the
same table size and ids. `paired_row_update.py` times two of them in turn.

1M rows of 256 (EK_BENCH_TABLE_GIB: one million per GiB, at most one), 65,536 ids, two threads. The gradient of the peers is a
sparse COO tensor with one entry per position, as an embedding gives it; both start with the ids and gradients in memory.
FBGEMM updates in the backward pass of its lookup: the lookup before it is not timed.
"""
import os

import pytest
import torch

import engram_kernels as ek
from engram_kernels.row_format import FLOAT_FORMATS, TRAINED_FORMATS
from engram_kernels.table.quantize import encode
from harness import measure

CHECK = os.environ.get("EK_BENCH_TABLE_GIB") == "1"  # bench-check: that it runs
NUM_ROWS, ROW_DIM, NUM_IDS = (1 << 14, 256, 1 << 10) if CHECK else (1 << 20, 256, 1 << 16)
ADAM = f"Adam step, {NUM_IDS} ids of {NUM_ROWS} rows of {ROW_DIM} f32, two threads"
ADAGRAD = ADAM.replace("Adam", "Adagrad")
ROWWISE = ADAM.replace("Adam", "row-wise Adagrad")
EIGHT_BITS = [name for name in TRAINED_FORMATS if name not in FLOAT_FORMATS]
HALF = ADAM.replace("f32", "bf16").replace("Adam step", "Adam step with one second moment per row")


@pytest.fixture(autouse=True)
def two_threads(one_thread):
    torch.set_num_threads(2)


def inputs():
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(0, NUM_ROWS, (NUM_IDS,), generator=generator),
            torch.randn(NUM_IDS, ROW_DIM, generator=generator).mul_(0.01))


def table_of(row_format):
    if row_format in EIGHT_BITS:  # a table of random rows, repeated: rows of zeros would never look for a scale
        rows, scales = encode(torch.randn(1024, ROW_DIM, generator=torch.Generator().manual_seed(1)), row_format)
        times = NUM_ROWS // 1024
        return ek.RowTable.from_tensor(rows.repeat(times, 1), None if scales is None else scales.repeat(times, 1), row_format,
                                       row_dim=ROW_DIM)
    return ek.RowTable.from_tensor(torch.zeros(NUM_ROWS, ROW_DIM, dtype=FLOAT_FORMATS[row_format]), row_format=row_format)


def time_ours(benchmark, group, contender, optimizer, role="peer"):
    ids, grads = inputs()
    measure(benchmark, lambda: optimizer.step(ids, grads), group=group, contender=contender, role=role, units=NUM_IDS, unit="id")


def time_torch(benchmark, group, make):
    ids, grads = inputs()
    weight = torch.nn.Parameter(torch.zeros(NUM_ROWS, ROW_DIM))
    optimizer = make([weight])

    def step():
        weight.grad = torch.sparse_coo_tensor(ids[None], grads, weight.shape, check_invariants=False)
        optimizer.step()
    measure(benchmark, step, group=group, contender=f"torch.optim.{type(optimizer).__name__}, sparse", units=NUM_IDS, unit="id")


def test_ours_adam(benchmark):
    optimizer = ek.RowOptimizer(table_of("f32"), "adam", second_moment="element", bias_correction="step")
    time_ours(benchmark, ADAM, "engram_kernels, one second moment per element", optimizer, "ours")


def test_ours_adam_by_row(benchmark):
    time_ours(benchmark, ADAM, "engram_kernels, one second moment per row", ek.RowOptimizer(table_of("f32"), "adam"))


def test_torch_adam(benchmark):
    time_torch(benchmark, ADAM, torch.optim.SparseAdam)


def test_ours_adagrad(benchmark):
    optimizer = ek.RowOptimizer(table_of("f32"), "adagrad", second_moment="element")
    time_ours(benchmark, ADAGRAD, "engram_kernels, one second moment per element", optimizer, "ours")


def test_torch_adagrad(benchmark):
    time_torch(benchmark, ADAGRAD, torch.optim.Adagrad)


def test_ours_rowwise_adagrad(benchmark):
    optimizer = ek.RowOptimizer(table_of("f32"), "adagrad")
    time_ours(benchmark, ROWWISE, "engram_kernels, one second moment per row", optimizer, "ours")


def fbgemm_rowwise_adagrad(num_rows, row_dim, lr=1e-3, eps=1e-10):
    """FBGEMM's table on the CPU, of zeros; its backward pass updates the rows."""
    ops = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    common = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    configs = pytest.importorskip("fbgemm_gpu.split_embedding_configs")
    kernel = ops.SplitTableBatchedEmbeddingBagsCodegen(
        [(num_rows, row_dim, common.EmbeddingLocation.HOST, ops.ComputeDevice.CPU)], learning_rate=lr, eps=eps,
        optimizer=configs.EmbOptimType.EXACT_ROWWISE_ADAGRAD, weights_precision=configs.SparseType.FP32,
        pooling_mode=common.PoolingMode.SUM, device=torch.device("cpu"))
    kernel.split_embedding_weights()[0].data.zero_()
    return kernel


def test_agrees_with_fbgemm_over_200_steps():
    """Rows and second moments, with duplicate ids; largest difference measured: 4.8e-7 of 4.2, and 1e-7 of the moments."""
    generator = torch.Generator().manual_seed(0)
    kernel, offsets = fbgemm_rowwise_adagrad(500, 64, lr=0.1, eps=1e-8), torch.arange(301)
    theirs, rows = kernel.split_embedding_weights()[0], torch.randn(500, 64, generator=generator)
    theirs.data.copy_(rows)
    before = rows.clone()
    optimizer = ek.RowOptimizer(ek.RowTable.from_tensor(rows, row_format="f32"), "adagrad", lr=0.1, eps=1e-8)
    for _ in range(200):
        ids, grads = torch.randint(0, 500, (300,), generator=generator), torch.randn(300, 64, generator=generator)
        kernel(ids, offsets).backward(grads)
        optimizer.step(ids, grads)
    torch.testing.assert_close(rows, theirs.detach(), rtol=0, atol=5e-6)
    torch.testing.assert_close(optimizer.second, kernel.split_optimizer_states()[0][0], rtol=1e-6, atol=0)
    assert (rows - before).abs().mean() > 0.1  # what both have moved


def test_fbgemm_rowwise_adagrad(benchmark):
    kernel, offsets, (ids, grads) = fbgemm_rowwise_adagrad(NUM_ROWS, ROW_DIM), torch.arange(NUM_IDS + 1), inputs()
    ready = []

    def step():
        ready.pop().backward(grads)
    measure(benchmark, step, group=ROWWISE, contender="FBGEMM CPU, exact row-wise Adagrad", units=NUM_IDS, unit="id",
            before=lambda: ready.append(kernel(ids, offsets)))


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_ours_adam_bf16(benchmark, rounding):
    optimizer = ek.RowOptimizer(table_of("bf16"), "adam", first_moment=None, rounding=rounding)
    time_ours(benchmark, HALF, f"engram_kernels, no first moment, {rounding}", optimizer,
              "ours" if rounding == "stochastic" else "peer")


@pytest.mark.parametrize("row_format", EIGHT_BITS)
def test_ours_adam_eight_bits(benchmark, row_format):
    optimizer = ek.RowOptimizer(table_of(row_format), "adam", first_moment=None)
    time_ours(benchmark, HALF, f"engram_kernels, {row_format} rows instead, stochastic", optimizer)
