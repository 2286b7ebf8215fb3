"""RowOptimizer against its peers, step by step in turn: the machine's speed drifts by more than a peer's time may.

    python bench/paired_row_update.py      a Markdown table of the medians of the per-pair ratios, with their quartiles

1M rows of 256 float32, 65,536 ids per step, two threads. FBGEMM's step is the backward of its lookup, which updates the rows;
the lookup before it is not timed. The last pair of the first table is a table of ten times the rows, in bfloat16, which takes
5.3 GB with its moments: the ids of a step are as many, further apart. The second table is rows of eight bits beside bfloat16.
EK_BENCH_TABLE_GIB=1 takes a small table.

    python bench/paired_row_update.py eight_bits      the second table alone
"""
import statistics
import sys
import time

import torch

import engram_kernels as ek
from bench_row_update import EIGHT_BITS, NUM_IDS, NUM_ROWS, ROW_DIM, fbgemm_rowwise_adagrad, inputs, table_of

PAIRS = 21


def seconds(run, clock=time.perf_counter):
    start = clock()
    run()
    return clock() - start


def of_fbgemm(ids, grads):
    """A function that makes ready, and returns, a step of FBGEMM's exact row-wise Adagrad."""
    kernel, offsets = fbgemm_rowwise_adagrad(NUM_ROWS, ROW_DIM), torch.arange(NUM_IDS + 1)

    def ready():
        out = kernel(ids, offsets)
        return lambda: out.backward(grads)
    return ready


def of_torch(ids, grads):
    weight = torch.nn.Parameter(torch.zeros(NUM_ROWS, ROW_DIM))
    optimizer = torch.optim.SparseAdam([weight])

    def ready():
        weight.grad = torch.sparse_coo_tensor(ids[None], grads, weight.shape, check_invariants=False)
        return optimizer.step
    return ready


def bf16_adam(times):
    """A step on so many times the rows, in bf16, with one second moment per row and no first moment; and its table."""
    table = ek.RowTable.from_tensor(torch.zeros(times * NUM_ROWS, ROW_DIM, dtype=torch.bfloat16), row_format="bf16")
    optimizer = ek.RowOptimizer(table, "adam", first_moment=None)
    ids = torch.randint(0, times * NUM_ROWS, (NUM_IDS,), generator=torch.Generator().manual_seed(1))
    grads = inputs()[1]
    return lambda: optimizer.step(ids, grads)


def ratios(ours, peer, pairs=PAIRS, clock=time.perf_counter):
    """Time of the peer over ours, pair by pair; which goes first alternates."""
    result = []
    for pair in range(-2, pairs):  # two that do not count
        theirs = peer()
        first = seconds(ours if pair % 2 else theirs, clock)
        second = seconds(theirs if pair % 2 else ours, clock)
        result.append(second / first if pair % 2 else first / second)
    return result[2:]


def eight_bits():
    """Prints nanoseconds per id of each format and rounding, and their ratio to those of bf16 rows. One thread, CPU time."""
    torch.set_num_threads(1)
    ids, grads = inputs()
    print("| rows | rounding | ns per id | over bf16 rows, step by step in turn (quartiles) |\n|---|---|---|---|")
    for rounding in ("stochastic", "nearest"):
        bf16 = ek.RowOptimizer(table_of("bf16"), "adam", first_moment=None, rounding=rounding)
        for row_format in EIGHT_BITS:
            ours, times = ek.RowOptimizer(table_of(row_format), "adam", first_moment=None, rounding=rounding), []

            def step(ours=ours, times=times):
                times.append(seconds(lambda: ours.step(ids, grads), time.process_time))
            over = [1 / x for x in ratios(step, lambda o=bf16: lambda: o.step(ids, grads), clock=time.process_time)]
            low, middle, high = statistics.quantiles(over, n=4)
            print(f"| {row_format} | {rounding} | {1e9 * statistics.median(times) / NUM_IDS:.0f} | {middle:.2f}x ({low:.2f} to "
                  f"{high:.2f}) |", flush=True)


def ten_times():
    large = bf16_adam(10)
    low, middle, high = statistics.quantiles(ratios(bf16_adam(1), lambda: large), n=4)
    print(f"| Adam, bf16, a second moment per row | the same on 10 times the rows | {middle:.2f}x ({low:.2f} to {high:.2f}) |")


def main():
    torch.set_num_threads(2)
    if sys.argv[1:] == ["eight_bits"]:
        return eight_bits()
    ids, grads = inputs()
    adagrad = ek.RowOptimizer(table_of("f32"), "adagrad")
    adam = ek.RowOptimizer(table_of("f32"), "adam", second_moment="element", bias_correction="step")
    print("| step | peer | its time over ours, step by step in turn (quartiles) |\n|---|---|---|")
    for name, optimizer, peer_name, peer in (
            ("row-wise Adagrad", adagrad, "FBGEMM CPU, exact row-wise Adagrad", of_fbgemm),
            ("Adam, a second moment per element", adam, "torch.optim.SparseAdam", of_torch)):
        low, middle, high = statistics.quantiles(ratios(lambda o=optimizer: o.step(ids, grads), peer(ids, grads)), n=4)
        print(f"| {name} | {peer_name} | {middle:.2f}x ({low:.2f} to {high:.2f}) |", flush=True)
    del adagrad, adam, optimizer, peer
    ten_times()
    print()
    eight_bits()


if __name__ == "__main__":
    main()
