"""TrainableRows: rows as of the last step, whatever the threads do; the bits of a plain RowOptimizer loop."""
import os
import random
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from trainable_cases import D, R, ids_of, optimizer_of, same_bits, table_of

import engram_kernels as ek

pytestmark = pytest.mark.usefixtures("compiled")


def plain_loop(steps, table, optimizer, head, losses, start=0):
    """The same training with gather_rows and the optimizer's own step."""
    for number in range(start, start + steps):
        ids = ids_of(number)
        rows = ek.gather_rows(table, ids, table.rows.dtype).detach().requires_grad_()
        loss = head(rows.float()).square().mean()
        loss.backward()
        optimizer.step(ids, rows.grad)
        losses += [loss.item()]


def behind_loop(steps, mem, head, losses, start=0):
    ticket = mem.submit(ids_of(start))
    for number in range(start, start + steps):
        following = mem.submit(ids_of(number + 1))
        rows = mem.wait(ticket)
        loss = head(rows.float()).square().mean()
        loss.backward()
        mem.step()
        losses += [loss.item()]
        ticket = following
    mem.cancel(ticket)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_of_a_plain_loop(dtype):
    head = nn.Linear(D, 4)
    tables = [table_of(dtype), table_of(dtype)]
    optimizers = [optimizer_of(table) for table in tables]
    losses = [], []
    plain_loop(25, tables[0], optimizers[0], head, losses[0])
    with ek.TrainableRows(tables[1], optimizers[1]) as mem:
        behind_loop(25, mem, head, losses[1])
        mem.flush()
        stats = mem.stats()
    assert losses[0] == losses[1] and optimizers[1].num_steps == stats["steps"] == 25
    same_bits(tables[0].rows, tables[1].rows)
    same_bits(optimizers[0].first, optimizers[1].first)
    assert torch.equal(optimizers[0].steps, optimizers[1].steps)
    assert stats["rows_regathered"] > 100 and stats["steps_lagged"] == 0 and stats["waits"] == 25


@pytest.mark.parametrize("threads", [1, 2, 4, 8])
def test_same_bits_with_any_number_of_threads(threads):
    head, before = nn.Linear(D, 4), torch.get_num_threads()
    torch.manual_seed(0)
    nn.init.normal_(head.weight)
    tables = [table_of(torch.bfloat16, rows=4000), table_of(torch.bfloat16, rows=4000)]
    try:
        for table, count in zip(tables, (1, threads), strict=True):
            torch.set_num_threads(count)
            with ek.TrainableRows(table, optimizer_of(table)) as mem:
                for number in range(4):
                    rows = mem.wait(mem.submit(ids_of(number, 20_000, 4000)))
                    (rows.float() * (number + 1)).sin().sum().backward()
                    mem.step()
    finally:
        torch.set_num_threads(before)
    same_bits(tables[0].rows, tables[1].rows)


def count_stale_and_torn(steps, seed, num_rows, most_ids, delays):
    """Steps of sgd that add to each row how often a ticket names it: every row says how many updates it has seen.

    (rows that are not as of the last step, or not the same in all elements; rows that were waited for)
    """
    draw, depth = random.Random(seed), 3
    table = ek.RowTable.from_tensor(torch.zeros(num_rows, 32), row_format="f32")
    truth, wrong, waited, flying = torch.zeros(num_rows), 0, 0, []
    with ek.TrainableRows(table, ek.RowOptimizer(table, "sgd", lr=1.0), depth=depth) as mem:
        for _ in range(steps):
            while len(flying) < depth and draw.random() < 0.8:
                ids = torch.randint(0, num_rows, (draw.randrange(1, most_ids),))
                flying.append((mem.submit(ids), ids))
            if delays and draw.random() < 0.2:
                time.sleep(draw.random() * 1e-3)
            if flying:
                ticket, ids = flying.pop(draw.randrange(len(flying)))
                rows = mem.wait(ticket)
                waited += ids.numel()
                wrong += int((rows != truth[ids][:, None]).any(1).sum())
                (-rows).sum().backward()
                mem.step(wait=draw.random() < 0.1)
                truth.index_add_(0, ids, torch.ones(ids.numel()))
        assert mem.stats()["rows_regathered"] > 0
    assert torch.equal(table.rows, truth[:, None].expand(-1, 32))
    return wrong, waited


def test_no_row_is_stale_or_torn():
    wrong, waited = count_stale_and_torn(250, 1, 500, 1000, delays=True)
    assert wrong == 0 and waited > 50_000


@pytest.mark.slow
def test_no_row_of_a_million_is_stale_or_torn():
    wrong, waited = count_stale_and_torn(1000, 2, 2000, 5000, delays=True)
    assert wrong == 0 and waited > 1_000_000


def test_threads_that_wait_and_step_at_once_meet_whole_rows():
    """One thread trains; others read with tickets of their own: every row is of one step, and no older than the last one."""
    table = ek.RowTable.from_tensor(torch.zeros(50, 64), row_format="f32")
    mem = ek.TrainableRows(table, ek.RowOptimizer(table, "sgd", lr=1.0), depth=64)
    stop, wrong, ids = threading.Event(), [], torch.arange(50)
    floor = [0.0]

    def read():
        while not stop.is_set():
            least = floor[0]
            with torch.no_grad():
                rows = mem.wait(mem.submit(ids))
            if not (rows == rows[:1, :1]).all() or rows[0, 0] < least:
                wrong.append(rows)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(60):
        (-mem.wait(mem.submit(ids))).sum().backward()
        mem.step()
        floor[0] = number + 1.0
    stop.set()
    for reader in readers:
        reader.join()
    mem.close()
    assert not wrong and table.rows.eq(60).all()


@pytest.mark.parametrize("staleness", [0, 1])
def test_staleness_lets_steps_lag_and_counts_them(staleness):
    table = table_of()
    optimizer = optimizer_of(table)
    apply, gate, ids = optimizer.apply, threading.Event(), ids_of(0)
    present = ids != -1
    optimizer.apply = lambda *args, **options: gate.wait(30) and apply(*args, **options)
    with ek.TrainableRows(table, optimizer, staleness=staleness) as mem:
        first, before = mem.submit(ids), table.rows.clone()
        rows, second = mem.wait(first), mem.submit(ids)
        while mem._engine.flying[second].rows is None:
            time.sleep(0.001)
        rows.sum().backward()
        mem.step()
        try:
            if staleness:
                same_bits(mem.wait(second)[present], before[ids[present]])  # it did not wait for the step
                assert mem.stats()["steps_pending"] == 1
            else:
                with pytest.raises(TimeoutError, match=r"did not arrive in 0.05 s"):
                    mem.wait(second, timeout_s=0.05)
        finally:
            gate.set()
        if not staleness:
            same_bits(mem.wait(second)[present], table.rows[ids[present]])
        assert not torch.equal(table.rows, before) or staleness
        stats = mem.stats()
    assert stats["max_lag"] == stats["steps_lagged"] == staleness


def test_micro_batches_and_duplicates_are_one_update():
    tables = [table_of(), table_of()]
    optimizers = [optimizer_of(table) for table in tables]
    ids = torch.cat([ids_of(1), ids_of(1), ids_of(2)])
    rows = ek.gather_rows(tables[0], ids, torch.float32).requires_grad_()
    rows.square().sum().backward()
    optimizers[0].step(ids, rows.grad)
    with ek.TrainableRows(tables[1], optimizers[1], depth=3) as mem:
        for part in [mem.submit(i) for i in (ids_of(1), ids_of(1), ids_of(2))]:
            mem.wait(part).square().sum().backward()
        torch.testing.assert_close(mem.norm(), optimizers[0].norm(ids, rows.grad))
        mem.step()
    assert optimizers[1].num_steps == 1
    same_bits(tables[0].rows, tables[1].rows)
    assert torch.equal(optimizers[0].steps, optimizers[1].steps)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False], ids=["wait_inside", "wait_outside"])
def test_checkpointing_queues_a_gradient_once(reentrant, inside):
    tables, x = [table_of(), table_of()], torch.ones(1, requires_grad=True)
    rows = ek.gather_rows(tables[0], ids_of(4), torch.float32).requires_grad_()
    (rows.sin() * x).sum().backward()
    optimizer_of(tables[0]).step(ids_of(4), rows.grad)
    with ek.TrainableRows(tables[1], optimizer_of(tables[1])) as mem:
        ticket = mem.submit(ids_of(4))
        if inside:
            out = checkpoint(lambda x: mem.wait(ticket).sin() * x, x, use_reentrant=reentrant)
        else:
            out = checkpoint(lambda rows, x: rows.sin() * x, mem.wait(ticket), x, use_reentrant=reentrant)
        out.sum().backward()
        assert len(mem._engine.untaken()) == 1
        mem.step()
    same_bits(tables[0].rows, tables[1].rows)


def test_an_interrupt_behind_a_queued_step_does_not_take_it_twice(monkeypatch):
    """Ctrl-C at the worst moment: the step is queued, the call does not return, and the user calls it again."""
    tables = [table_of(), table_of()]
    rows = ek.gather_rows(tables[0], ids_of(4), torch.float32).requires_grad_()
    rows.sin().sum().backward()
    one = optimizer_of(tables[0])
    one.step(ids_of(4), rows.grad)
    with ek.TrainableRows(tables[1], optimizer_of(tables[1])) as mem:
        mem.wait(mem.submit(ids_of(4))).sin().sum().backward()
        real = mem._engine.update

        def interrupted(*args):
            real(*args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(mem._engine, "update", interrupted)
            with pytest.raises(KeyboardInterrupt):
                mem.step()
        mem.step()
        mem.flush()
        assert mem.norm() == 0 and mem.stats()["steps"] == mem._engine.returned == 1
    same_bits(tables[0].rows, tables[1].rows)


def test_without_autograd_rows_carry_no_gradient_and_grad_keeps_nothing():
    table = table_of()
    with ek.TrainableRows(table, optimizer_of(table)) as mem:
        with torch.no_grad():
            assert not mem.wait(mem.submit(ids_of(0))).requires_grad
        with torch.inference_mode():
            assert not mem.wait(mem.submit(ids_of(0))).requires_grad
        rows = mem.wait(mem.submit(ids_of(0)))
        torch.autograd.grad(rows.square().sum(), rows)
        mem.step(wait=True)
        assert mem.stats()["steps"] == 0 and rows.is_leaf
        rows.sum().backward()
        assert rows.grad is None
        mem.zero_grad()
        mem.step(wait=True)
        assert mem.stats()["steps"] == 0


def test_compiled_backbone():
    tables = [table_of(), table_of()]
    torch.manual_seed(1)
    head = nn.Linear(D, 4)
    plain_loop(3, tables[0], optimizer_of(tables[0]), head, [])
    compiled = torch.compile(head, backend="aot_eager")
    with ek.TrainableRows(tables[1], optimizer_of(tables[1])) as mem:
        behind_loop(3, mem, compiled, [])
    same_bits(tables[0].rows, tables[1].rows)


def test_schedulers_and_clipping():
    tables = [table_of(), table_of()]
    optimizers = [optimizer_of(table) for table in tables]
    schedulers = [torch.optim.lr_scheduler.StepLR(x, 1, gamma=0.5) for x in optimizers]
    with ek.TrainableRows(tables[1], optimizers[1]) as mem:
        for number in range(4):
            rows = ek.gather_rows(tables[0], ids_of(number), torch.float32).requires_grad_()
            rows.square().sum().backward()
            optimizers[0].step(ids_of(number), rows.grad, 1 / float(optimizers[0].norm(ids_of(number), rows.grad)))
            mem.wait(mem.submit(ids_of(number))).square().sum().backward()
            mem.step(1 / float(mem.norm()))
            for scheduler in schedulers:
                scheduler.step()
    same_bits(tables[0].rows, tables[1].rows)
    assert optimizers[1].param_groups[0]["lr"] == 0.05 / 16


def engram(table):
    torch.manual_seed(0)
    spec = ek.EngramSpec.deepseek_v41(vocab_size=64, num_classes=64, table_sizes=(R,) * 3, head_dim=D, hidden_size=32, branches=2,
                                      row_format="f32")
    if table is None:
        return spec.layout().num_rows[0]
    return ek.Engram(spec, layer_id=1, table=table, dtype=torch.float32)


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_engram_takes_it_as_its_table(compiles):
    tables = [table_of(rows=engram(None)) for _ in range(2)]
    optimizers = [optimizer_of(table) for table in tables]
    bounds, hidden = torch.tensor([0, 6, 10], dtype=torch.int32), torch.randn(10, 2, 32)
    plain, module = engram(tables[0]), None
    with ek.TrainableRows(tables[1], optimizers[1]) as mem:
        module = engram(mem)
        assert "rows" not in dict(module.named_parameters()) and module.table is mem
        call = torch.compile(module, backend="aot_eager") if compiles else module
        dense = [torch.optim.SGD(x.parameters(), lr=0.1) for x in (plain, module)]
        layout = plain.layout
        for number in range(3):
            tokens = torch.randint(0, 64, (10,), generator=torch.Generator().manual_seed(number), dtype=torch.int32)
            ids = ek.ngram_hash(tokens, bounds, layout)[0]
            rows = ek.gather_rows(tables[0], ids, torch.float32).requires_grad_()
            plain(hidden, cu_seqlens=bounds, rows=rows).square().mean().backward()
            optimizers[0].step(ids, rows.grad)
            call(hidden, tokens, bounds).square().mean().backward()
            mem.step()
            for optimizer in dense:
                optimizer.step()
                optimizer.zero_grad()
    same_bits(tables[0].rows, tables[1].rows)
    same_bits(plain.wkv.weight, module.wkv.weight)


def test_rows_in_shared_memory_change_for_all_processes():
    weight = torch.zeros(8, D).share_memory_()
    go = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(go[0], 1)
        os._exit(0 if weight[3].eq(-1).all() and weight[4].eq(0).all() else 1)
    table = ek.RowTable.from_tensor(weight, row_format="f32")
    with ek.TrainableRows(table, ek.RowOptimizer(table, "sgd", lr=1.0)) as mem:
        mem.wait(mem.submit(torch.tensor([3]))).sum().backward()
        mem.step()
        mem.flush()
        os.write(go[1], b".")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for end in go:
        os.close(end)
