"""Training of a table in a file: the bits of one in memory, kills at any moment, full disks, and who may open it."""
import contextlib
import multiprocessing
import os
import random
import resource
import signal
import time
import traceback

import pytest
import torch

import engram_kernels as ek
from engram_kernels import _files
from engram_kernels.training import file_rows, step_journal

pytestmark = pytest.mark.usefixtures("compiled")
R, D = 400, 32
OPTIONS = {"lr": 0.05, "first_moment": "bf16", "seed": 5}


def start(dtype=torch.bfloat16):
    return torch.randn(R, D, generator=torch.Generator().manual_seed(3)).to(dtype)


def batch(number, count=120):
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, R, (count,), generator=generator)
    ids[number % count] = -1
    return ids, torch.randn(count, D, generator=generator).bfloat16()


def opened(folder, **options):
    """(table, optimizer) of the files in a folder, which are made where there are none."""
    path = folder / "rows.safetensors"
    has_journal = (folder / "rows.safetensors.journal").exists()
    with pytest.warns(UserWarning, match="beside it is a journal of steps") if has_journal else contextlib.nullcontext():
        table = ek.RowTable.open(path) if path.exists() else ek.RowTable.create(path, start())
    return table, ek.RowOptimizer(table, "adam", state=folder / "state.safetensors", **{**OPTIONS, **options})


def in_memory(steps):
    """Rows, and an optimizer, after so many steps."""
    table = ek.RowTable.from_tensor(start(), row_format="bf16")
    optimizer = ek.RowOptimizer(table, "adam", **OPTIONS)
    for number in range(steps):
        optimizer.step(*batch(number))
    return table.rows, optimizer


def all_rows(table):
    return table.read_rows(torch.arange(R))[0]


def expect_as_in_memory(table, optimizer):
    rows, wanted = in_memory(optimizer.num_steps)
    assert torch.equal(all_rows(table).view(torch.int16), rows.view(torch.int16))
    for name in ("second", "first", "steps"):
        assert torch.equal(torch.cat(list(optimizer.moment_pieces(name))), getattr(wanted, name)), name


@pytest.mark.parametrize("io", ["io_uring_buffered", "preadv_buffered", "auto"])
def test_steps_have_the_bits_of_a_table_in_memory(tmp_path, io, monkeypatch):
    monkeypatch.setenv("EK_FILE_IO", io)
    table, optimizer = opened(tmp_path)
    for number in range(6):
        ids, grads = batch(number)
        if number == 2:
            wanted = in_memory(2)[1].norm(ids, grads)
            assert optimizer.norm(ids, grads) == wanted
        optimizer.step(ids, grads)
    expect_as_in_memory(table, optimizer)
    stats = optimizer.file.stats()
    assert stats["io"] == ("pwrite" if table.io_stats()["io"] == "preadv" else "io_uring") and stats["writes"] > 100
    optimizer.close()
    optimizer.close()
    assert sorted(os.listdir(tmp_path)) == ["rows.safetensors", "state.safetensors"]
    table, optimizer = opened(tmp_path, lr=9.0)
    assert optimizer.num_steps == 6 and optimizer.param_groups[0]["lr"] == 0.05
    for number in range(6, 9):
        optimizer.step(*batch(number))
    expect_as_in_memory(table, optimizer)


def test_trainable_rows_of_a_file(tmp_path):
    table, optimizer = opened(tmp_path)
    with ek.TrainableRows(table, optimizer) as mem:
        ticket = mem.submit(batch(0)[0])
        for number in range(8):
            following = mem.submit(batch(number + 1)[0])
            rows = mem.wait(ticket)
            present = batch(number)[0] != -1
            assert torch.equal(rows[present], in_memory(number)[0][batch(number)[0][present]])
            (rows * batch(number)[1]).sum().backward()
            mem.step()
            ticket = following
        mem.flush()
        stats = mem.stats()
        with pytest.raises(ValueError, match="held by a TrainableRows"):
            optimizer.close()
    assert stats["steps"] == 8 and stats["rows_regathered"] > 0 and stats["write_back"]["io"] in ("io_uring", "pwrite")
    expect_as_in_memory(table, optimizer)
    optimizer.close()


def test_checkpoint_while_training(tmp_path):
    table, optimizer = opened(tmp_path)
    for number in range(4):
        optimizer.step(*batch(number))
    (tmp_path / "saved").mkdir()
    ek.RowTable.create(tmp_path / "saved/rows.safetensors", all_rows(table))
    optimizer.save(tmp_path / "saved/state.safetensors")
    optimizer.step(*batch(4))
    optimizer.close()
    saved, resumed = opened(tmp_path / "saved")  # in place
    assert resumed.num_steps == 4
    memory = ek.RowTable.from_tensor(all_rows(saved).clone(), row_format="bf16")
    loaded = ek.RowOptimizer(memory, "adam", **OPTIONS)
    resumed.close()
    loaded.load(tmp_path / "saved/state.safetensors")  # or in memory
    saved, resumed = opened(tmp_path / "saved")
    for optimizer in (resumed, loaded):
        optimizer.step(*batch(4))
    expect_as_in_memory(saved, resumed)
    assert torch.equal(memory.rows, all_rows(saved))


def test_a_short_journal_is_emptied_in_between(tmp_path):
    table, optimizer = opened(tmp_path, journal_bytes=20_000, durable=False)
    sizes = []
    for number in range(12):
        optimizer.step(*batch(number))
        sizes.append(os.path.getsize(tmp_path / "rows.safetensors.journal"))
    assert max(sizes) < 50_000 and optimizer.file.stats()["syncs"] > 3
    expect_as_in_memory(table, optimizer)


# ---- a process that dies ----------------------------------------------------------------------------------------------------


def serve(calls):
    """Runs each call in a fork of this process, which has started no thread; sends the child's number, and how it ended."""
    torch.set_num_threads(1)
    in_memory(1)  # imports what torch puts off until its first optimizer
    while True:
        function, *args = calls.recv()
        child = os.fork()
        if child == 0:
            try:
                function(*args)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        calls.send(child)
        calls.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.fixture(scope="module")
def children():
    """Makes children one after the other: start(function, ..) gives the number of one, end() how it ended."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(there,), daemon=True)
    server.start()

    class Children:
        def start(self, *call):
            here.send(call)
            assert here.poll(60)
            return here.recv()

        def end(self):
            assert here.poll(60)
            return here.recv()

    yield Children()
    server.kill()
    server.join()


def train_until_killed(folder):
    table, optimizer = opened(folder, journal_bytes=60_000, durable=False)
    with ek.TrainableRows(table, optimizer) as mem:
        while True:
            ids, grads = batch(optimizer.num_steps)
            (mem.wait(mem.submit(ids)) * grads).sum().backward()
            mem.step()
            mem.flush()
            (folder / "begun").touch()


def killed_rounds(children, folder, rounds, seed):
    """(steps after each kill; how many kills left records in the journal)"""
    draw, steps, unfinished = random.Random(seed), [], 0
    for _ in range(rounds):
        (folder / "begun").unlink(missing_ok=True)
        child, waits = children.start(train_until_killed, folder), draw.random() < 0.8
        while waits and not (folder / "begun").exists():  # the others are killed while they open the files
            time.sleep(0.001)
        time.sleep(draw.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        assert children.end() == -signal.SIGKILL
        journal = folder / "rows.safetensors.journal"
        unfinished += journal.exists() and journal.stat().st_size > step_journal.HEADER_BYTES
        table, optimizer = opened(folder)
        expect_as_in_memory(table, optimizer)
        steps.append(optimizer.num_steps)
        optimizer.file.abandon()  # the next one finds a journal, too
    return steps, unfinished


def test_a_killed_process_leaves_a_step_boundary(children, tmp_path):
    steps, unfinished = killed_rounds(children, tmp_path, 6, 1)
    assert steps == sorted(steps) and steps[-1] > 5 and unfinished > 2


@pytest.mark.slow
def test_many_killed_processes_leave_step_boundaries(children, tmp_path):
    unfinished = 0
    for seed in range(3):  # of a table that has few steps, whose expected rows are made quickly
        (tmp_path / str(seed)).mkdir()
        steps, of_these = killed_rounds(children, tmp_path / str(seed), 12, seed)
        assert steps == sorted(steps)
        unfinished += of_these
    assert unfinished > 18


@pytest.mark.parametrize("at", ["journal", "rows", "moments", "progress", "sync"])
def test_a_stop_at_each_point_of_a_step_is_one_of_two_boundaries(tmp_path, at, monkeypatch):
    """The process ends at a chosen point: in the middle of a record, of the rows, of the moments, before the progress, before the
    journal is emptied."""
    table, optimizer = opened(tmp_path)
    for number in range(3):
        optimizer.step(*batch(number))

    class Ended(BaseException):
        pass

    def end(*args):
        raise Ended

    file = optimizer.file
    if at == "journal":
        def half(fd, data, where=0):
            _files.write_all(fd, memoryview(data)[:memoryview(data).nbytes // 2], where)
            raise Ended
        monkeypatch.setattr(step_journal, "write_all", half)
        monkeypatch.setattr(step_journal.os, "ftruncate", end)
    elif at in ("rows", "moments"):
        array = file.rows if at == "rows" else file.moments["first"]
        write = array.write
        monkeypatch.setattr(array, "write", lambda ids, data: (write(ids[:40], memoryview(data)[:40 * array.row_bytes]), end()))
    elif at == "progress":
        monkeypatch.setattr(file_rows, "write_all", end)
    with pytest.raises(Ended):
        if at == "sync":
            optimizer.step(*batch(3))
            monkeypatch.setattr(file.journal, "clear", end)
            file.checkpoint()
        optimizer.step(*batch(3))
    monkeypatch.undo()
    file.abandon()
    table, optimizer = opened(tmp_path)
    assert optimizer.num_steps == (3 if at == "journal" else 4)
    expect_as_in_memory(table, optimizer)


def test_a_journal_that_is_cut_or_flipped_ends_at_the_last_whole_record(tmp_path):
    optimizer = opened(tmp_path)[1]
    for number in range(3):
        optimizer.step(*batch(number))
    path = tmp_path / "rows.safetensors.journal"
    ends, whole = [], path.read_bytes()
    records = optimizer.file.journal.records()
    for _ in records:
        ends.append(optimizer.file.journal.end)
    assert len(ends) == 3 and ends[-1] == len(whole)
    optimizer.file.abandon()
    journal = step_journal.StepJournal("test", path, step_journal.parse_json(whole[:step_journal.HEADER_BYTES])["state"])
    draw = random.Random(0)
    for _ in range(40):
        where = draw.randrange(ends[1], ends[2])
        broken = bytearray(whole)
        broken[where] ^= 1 << draw.randrange(8)
        # the three bytes of padding behind the checksum are nobody's
        path.write_bytes(bytes(broken) if draw.random() < 0.5 else whole[:where])
        found = [step for step, _, _ in journal.records()]
        assert found == [1, 2] or ends[1] + 36 <= where < ends[1] + 40
    os.close(journal.fd)


# ---- what goes wrong --------------------------------------------------------------------------------------------------------


def train_on_a_full_disk(folder):
    """Writes beyond a size fail, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    table, optimizer = opened(folder, journal_bytes=1 << 30)
    optimizer.step(*batch(0))
    size = os.path.getsize(folder / "rows.safetensors.journal")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match="step 2 cannot be journaled, so the table and its state are those of step 1"):
        optimizer.step(*batch(1))
    assert optimizer.num_steps == 1
    expect_as_in_memory(table, optimizer)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    optimizer.step(*batch(1))
    expect_as_in_memory(table, optimizer)
    optimizer.close()


def test_a_disk_too_full_for_the_journal_loses_nothing(children, tmp_path):
    children.start(train_on_a_full_disk, tmp_path)
    assert children.end() == 0
    table, optimizer = opened(tmp_path)
    assert optimizer.num_steps == 2
    expect_as_in_memory(table, optimizer)
    optimizer.close()


def test_a_disk_that_fails_behind_the_journal_is_made_up_for(tmp_path, monkeypatch):
    table, optimizer = opened(tmp_path)
    with ek.TrainableRows(table, optimizer) as mem:
        def step(number):
            (mem.wait(mem.submit(batch(number)[0])) * batch(number)[1]).sum().backward()
            mem.step(wait=True)

        step(0)
        write = file_rows._Array.write

        def half(self, ids, data):
            write(self, ids[:5], memoryview(data)[:5 * self.row_bytes])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(file_rows._Array, "write", half)
        with pytest.raises(OSError, match="step 2 is in the journal, but could not be written to its files: No space left"):
            step(1)
        ticket = mem.submit(torch.arange(R))
        with pytest.raises(OSError, match="No space left"):
            mem.wait(ticket)  # rows that are half written are given to nobody
        monkeypatch.undo()
        assert optimizer.num_steps == 2
        assert torch.equal(mem.wait(mem.submit(torch.arange(R))), in_memory(2)[0])
        step(2)
    expect_as_in_memory(table, optimizer)
    optimizer.close()


def expect_refused(folder):
    with pytest.raises(OSError, match="has it open for training"):
        opened(folder)


def test_one_process_trains_a_table(children, tmp_path):
    optimizer = opened(tmp_path)[1]
    expect_refused(tmp_path)
    children.start(expect_refused, tmp_path)
    assert children.end() == 0
    optimizer.close()
    opened(tmp_path)[1].close()


def test_bad_gradients_and_ids_leave_the_files_as_they_are(tmp_path):
    table, optimizer = opened(tmp_path)
    optimizer.step(*batch(0))
    ids, grads = torch.tensor([7, 300]), torch.ones(2, D)
    grads[1, 3] = float("nan")
    with pytest.raises(ValueError, match=r"grad_rows\[1, 3\], of row 300, is nan"):
        optimizer.step(ids, grads)
    with pytest.raises(IndexError, match=r"is 400, expected \[0, 400\)"):
        optimizer.step(torch.tensor([400]), torch.ones(1, D))
    assert optimizer.num_steps == 1
    expect_as_in_memory(table, optimizer)
    optimizer.step(torch.tensor([-1]), torch.ones(1, D))  # a step of no row
    assert optimizer.num_steps == 2
    optimizer.file.abandon()
    table, optimizer = opened(tmp_path)
    assert optimizer.num_steps == 2
    optimizer.close()


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    optimizer = opened(tmp_path)[1]
    optimizer.step(*batch(0))
    optimizer.close()
    path, state = tmp_path / "rows.safetensors", tmp_path / "state.safetensors"
    with pytest.raises(ValueError, match="seed is 5, expected 6"):
        ek.RowOptimizer(ek.RowTable.open(path), "adam", state=state, **{**OPTIONS, "seed": 6})
    other = ek.RowTable.create(tmp_path / "other", torch.zeros(R, D).bfloat16())
    with pytest.raises(ValueError, match="it is another table, or has the rows of another step"):
        ek.RowOptimizer(other, "adam", state=state, **OPTIONS)
    with pytest.raises(ValueError, match="state is None; expected the file of its moments"):
        ek.RowOptimizer(ek.RowTable.open(path))
    with pytest.raises(ValueError, match="state is given, but table is in memory"):
        ek.RowOptimizer(ek.RowTable.from_tensor(start()), state=state)
    with pytest.raises(ValueError, match="opened with cache_bytes"):
        ek.RowOptimizer(ek.RowTable.open(path, cache_bytes=1 << 20), state=state, **OPTIONS)
    eight_bits = ek.RowTable.open(path).quantize("int8_group32", tmp_path / "int8")[0]
    with pytest.raises(ValueError, match="table has row_format 'int8_group32', expected 'f32' or"):
        ek.RowOptimizer(eight_bits, state=tmp_path / "new")
    optimizer = opened(tmp_path)[1]
    optimizer.step(*batch(1))
    optimizer.file.abandon()
    with pytest.raises(ValueError, match="journal of a run with another state file"):
        with pytest.warns(UserWarning, match="journal of steps"):
            table = ek.RowTable.open(path)
        ek.RowOptimizer(table, "adam", state=tmp_path / "new", **OPTIONS)
    opened(tmp_path)[1].close()


def test_a_read_only_file_is_refused(tmp_path, monkeypatch):
    ek.RowTable.create(tmp_path / "rows.safetensors", start())
    os_open = os.open

    def read_only(path, flags, *args, **kwargs):  # root may write to any file
        if flags & os.O_RDWR and str(path).endswith("rows.safetensors"):
            raise PermissionError(13, "Permission denied")
        return os_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(PermissionError, match="it cannot be opened for writing: Permission denied"):
        opened(tmp_path)
    assert os.listdir(tmp_path) == ["rows.safetensors"]


def test_a_write_by_something_else_is_seen(tmp_path):
    optimizer = opened(tmp_path)[1]
    optimizer.step(*batch(0))
    time.sleep(0.02)
    os.utime(tmp_path / "rows.safetensors")
    with pytest.raises(OSError, match="was written to after it was opened"):
        optimizer.step(*batch(1))
    optimizer.file.abandon()
