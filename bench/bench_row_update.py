"""row_update and RowOptimizer against torch.optim.SparseAdam and torch's sparse Adagrad, on the same table size and ids.

1M rows of 256 (EK_BENCH_TABLE_GIB: one million per GiB, at most one), 65,536 ids, two threads. The gradient of the peers is a
sparse COO tensor with one entry per position, as an embedding gives it; both start with the ids and gradients in memory.
"""
import os

import pytest
import torch

import engram_kernels as ek
from harness import measure

CHECK = os.environ.get("EK_BENCH_TABLE_GIB") == "1"  # bench-check: that it runs
NUM_ROWS, ROW_DIM, NUM_IDS = (1 << 14, 256, 1 << 10) if CHECK else (1 << 20, 256, 1 << 16)
ADAM = f"Adam step, {NUM_IDS} ids of {NUM_ROWS} rows of {ROW_DIM} f32, two threads"
ADAGRAD = ADAM.replace("Adam", "Adagrad")
HALF = ADAM.replace("f32", "bf16").replace("Adam step", "Adam step with one second moment per row")


@pytest.fixture(autouse=True)
def two_threads(one_thread):
    torch.set_num_threads(2)


def inputs():
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(0, NUM_ROWS, (NUM_IDS,), generator=generator),
            torch.randn(NUM_IDS, ROW_DIM, generator=generator).mul_(0.01))


def table_of(row_format):
    dtype = torch.float32 if row_format == "f32" else torch.bfloat16
    return ek.RowTable.from_tensor(torch.zeros(NUM_ROWS, ROW_DIM, dtype=dtype), row_format=row_format)


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


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_ours_adam_bf16(benchmark, rounding):
    optimizer = ek.RowOptimizer(table_of("bf16"), "adam", first_moment=None, rounding=rounding)
    time_ours(benchmark, HALF, f"engram_kernels, no first moment, {rounding}", optimizer,
              "ours" if rounding == "stochastic" else "peer")
