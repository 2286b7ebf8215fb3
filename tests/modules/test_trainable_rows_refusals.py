"""TrainableRows: what it refuses, and what an error leaves behind."""
import copy
import gc
import os
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
from trainable_cases import D, ids_of, optimizer_of, same_bits, table_of

import engram_kernels as ek
from engram_kernels.prefetch.errors import PrefetchQueueFull

pytestmark = pytest.mark.usefixtures("compiled")
pytest_plugins = ["shared_worker"]


def test_errors_of_a_step_leave_nothing_half_done():
    table = table_of()
    optimizer = optimizer_of(table)
    before = table.rows.clone()
    with ek.TrainableRows(table, optimizer) as mem:
        rows = mem.wait(mem.submit(torch.tensor([3, 4])))
        (rows * torch.tensor([[1.0], [float("nan")]])).sum().backward()
        ticket = mem.submit(torch.tensor([3, 4]))
        mem.step()
        with pytest.raises(ValueError, match=r"grad_rows\[1, 0\], of row 4, is nan"):
            mem.wait(ticket)
        same_bits(mem.wait(ticket), before[[3, 4]])
        mem.wait(mem.submit(torch.tensor([3]))).sum().backward()
        mem.step(wait=True)
        assert optimizer.num_steps == 1 and (table.rows != before).any(1).nonzero().flatten().tolist() == [3]
        with pytest.raises(IndexError, match=r"is 300, expected \[0, 300\)"):
            mem.wait(mem.submit(torch.tensor([300])))
        mem.wait(mem.submit(torch.tensor([3]))).mul(float("inf")).sum().backward()
        with pytest.raises(ValueError, match="of row 3"):
            mem.step(wait=True)


def test_steps_with_nan_are_skipped_by_option():
    table = table_of()
    optimizer = optimizer_of(table, nonfinite="skip")
    before = table.rows.clone()
    with ek.TrainableRows(table, optimizer) as mem:
        mem.wait(mem.submit(torch.tensor([3, -1]))).mul(float("nan")).sum().backward()
        mem.step(wait=True)
        assert mem.stats()["skipped_steps"] == 1 and mem.stats()["steps"] == 0
        mem.wait(mem.submit(torch.tensor([3, -1]))).sum().backward()
        mem.step(wait=True)
    same_bits(before[4:], table.rows[4:])
    assert optimizer.num_steps == 1 and not torch.equal(before[3], table.rows[3])


def test_nothing_else_writes_to_the_table():
    table = table_of()
    optimizer = optimizer_of(table)
    ids, grads = torch.tensor([1]), torch.ones(1, D)
    mem = ek.TrainableRows(table, optimizer)
    for write in (lambda: optimizer.step(ids, grads), lambda: optimizer.load_state_dict(optimizer.state_dict()),
                  lambda: ek.RowOptimizer(table, "sgd"), lambda: ek.TrainableRows(table, optimizer),
                  lambda: ek.row_update(table, ids, grads, "sgd", lr=0.1)):
        with pytest.raises(ValueError, match="held by a TrainableRows"):
            write()
    ticket = mem.submit(ids)
    mem.wait(mem.submit(ids)).sum().backward()
    mem.step(wait=True)  # its own writes are no writes of others
    mem.wait(ticket)
    ticket = mem.submit(ids)
    mem.wait(mem.submit(ids))
    table.rows[1] = 7.0
    with pytest.raises(RuntimeError, match="written to by something else"):
        mem.wait(ticket)
    assert mem.wait(mem.submit(ids)).eq(7).all()
    mem.close()
    mem.close()
    optimizer.step(ids, grads)
    with pytest.raises(RuntimeError, match="closed"):
        mem.submit(ids)


def test_bad_arguments_are_refused():
    table, other = table_of(), table_of(seed=8)
    optimizer = optimizer_of(table)
    with pytest.raises(ValueError, match="expected one of this table"):
        ek.TrainableRows(other, optimizer)
    with pytest.raises(TypeError, match="RowOptimizer"):
        ek.TrainableRows(table, torch.optim.SGD([torch.ones(1)]))
    with pytest.raises(ValueError, match="depth is 0"):
        ek.TrainableRows(table, optimizer, depth=0)
    with pytest.raises(ValueError, match="take no prefetcher"):
        ek.TrainableRows(table, optimizer, ring_bytes=1 << 20)
    with ek.TrainableRows(table, optimizer, depth=1) as mem:
        ticket = mem.submit(ids_of(0))
        with pytest.raises(PrefetchQueueFull, match="1 tickets are in flight"):
            mem.submit(ids_of(0))
        assert mem.cancel(ticket) and not mem.cancel(ticket)
        with pytest.raises(KeyError, match="unknown"):
            mem.wait(ticket)
        with pytest.raises(ValueError, match="out_dtype"):
            mem.gather(ids_of(0), torch.bfloat16)
        with pytest.raises(ValueError, match="int32 or torch.int64"):
            mem.submit(torch.zeros(3))
        with pytest.raises(TypeError, match="pickled"):
            copy.deepcopy(mem)


def test_a_backward_after_close_says_so():
    table = table_of()
    mem = ek.TrainableRows(table, optimizer_of(table))
    rows = mem.wait(mem.submit(ids_of(0)))
    mem.close()
    with pytest.raises(RuntimeError, match="their gradient is lost"):
        rows.sum().backward()


def test_a_child_after_a_fork_is_told():
    table = table_of()
    with ek.TrainableRows(table, optimizer_of(table)) as mem:
        child = os.fork()
        if child == 0:
            try:
                mem.submit(ids_of(0))
            except RuntimeError as err:
                os._exit(0 if "before a fork" in str(err) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_is_dropped_ends_its_thread():
    table = table_of()
    threads = threading.active_count()
    mem = ek.TrainableRows(table, optimizer_of(table))
    mem.submit(ids_of(0))
    del mem
    gc.collect()
    assert threading.active_count() == threads
    ek.TrainableRows(table, optimizer_of(table)).close()


def test_a_table_of_share_is_refused(shm):
    shared = table_of().share("held", directory=shm)
    with pytest.raises(ValueError, match="is shared as 'held', which is read-only"):
        ek.RowOptimizer(shared)


def test_one_rank_of_several_is_warned(tmp_path, monkeypatch):
    """DDP sums the gradients of parameters alone: the tables of the ranks would come apart without a word."""
    table = table_of()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ek.TrainableRows(table, optimizer_of(table)).close()
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        with pytest.warns(UserWarning, match="rank 0 of 2, and the rows get the gradients of this rank alone.*a ShardedRows"):
            ek.TrainableRows(table, optimizer_of(table)).close()
    finally:
        dist.destroy_process_group()
