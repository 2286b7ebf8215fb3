"""Training of a table in a file: the bits of one in memory, a stop at each point of a step, and what is refused."""
import os
import random
import time

import pytest
import torch
from train_file_cases import OPTIONS, D, R, all_rows, batch, expect_as_in_memory, in_memory, opened, start

import engram_kernels as ek
from engram_kernels import _files
from engram_kernels.training import file_rows, step_journal

pytestmark = pytest.mark.usefixtures("compiled")


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
        array = file.stored[0] if at == "rows" else file.moments["first"]
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


def train_step(mem, number):
    (mem.wait(mem.submit(batch(number)[0])) * batch(number)[1]).sum().backward()
    mem.step(wait=True)


def test_a_disk_that_fails_behind_the_journal_is_made_up_for(tmp_path, monkeypatch):
    table, optimizer = opened(tmp_path)
    with ek.TrainableRows(table, optimizer) as mem:
        train_step(mem, 0)
        write = file_rows._Array.write

        def half(self, ids, data):
            write(self, ids[:5], memoryview(data)[:5 * self.row_bytes])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(file_rows._Array, "write", half)
        with pytest.raises(OSError, match="step 2 is in the journal, but could not be written to its files: No space left"):
            train_step(mem, 1)
        ticket = mem.submit(torch.arange(R))
        with pytest.raises(OSError, match="No space left"):
            mem.wait(ticket)  # rows that are half written are given to nobody
        monkeypatch.undo()
        assert optimizer.num_steps == 2
        assert torch.equal(mem.wait(mem.submit(torch.arange(R))), in_memory(2)[0])
        train_step(mem, 2)
    expect_as_in_memory(table, optimizer)
    optimizer.close()


@pytest.mark.parametrize("durable", [True, False])
def test_a_journal_that_fills_the_disk_makes_room(tmp_path, monkeypatch, durable):
    table, optimizer = opened(tmp_path, durable=durable)
    write_all, room = step_journal.write_all, [40_000]  # bytes of the journal

    def with_room(fd, data, at=0):
        if at + memoryview(data).nbytes > room[0]:
            write_all(fd, memoryview(data).cast("B")[:max(room[0] - at, 0)], at)
            raise OSError(28, "No space left on device")
        write_all(fd, data, at)

    monkeypatch.setattr(step_journal, "write_all", with_room)
    syncs = optimizer.file.syncs
    for number in range(8):
        optimizer.step(*batch(number))
    assert optimizer.file.syncs > syncs  # the files were brought to the disk, and the journal began again
    room[0] = 5000  # now something else fills the disk: a record does not fit even alone
    for _ in range(2):
        with pytest.raises(OSError, match="step 9 cannot be journaled, so the table and its state are those of step 8: No space"):
            optimizer.step(*batch(8))
    expect_as_in_memory(table, optimizer)
    room[0] = 1 << 20  # somebody made room
    optimizer.step(*batch(8))
    expect_as_in_memory(table, optimizer)
    optimizer.file.abandon()  # as if the process had been killed
    table, optimizer = opened(tmp_path)
    assert optimizer.num_steps == 9
    expect_as_in_memory(table, optimizer)
    optimizer.close()


def test_a_trainable_rows_goes_on_when_there_is_room_again(tmp_path, monkeypatch):
    table, optimizer = opened(tmp_path)
    with ek.TrainableRows(table, optimizer) as mem:
        train_step(mem, 0)

        def full(fd, data, at=0):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(step_journal, "write_all", full)
        with pytest.raises(OSError, match="step 2 cannot be journaled"):
            train_step(mem, 1)
        monkeypatch.undo()
        train_step(mem, 1)
        train_step(mem, 2)
    assert optimizer.num_steps == 3
    expect_as_in_memory(table, optimizer)
    optimizer.close()


def test_a_file_of_two_names_is_refused(tmp_path):
    opened(tmp_path)[1].close()
    other = tmp_path / "other.safetensors"
    for name in ("rows.safetensors", "state.safetensors"):
        os.link(tmp_path / name, other)
        with pytest.raises(ValueError, match=f"{name} has 2 names .hard links.. Its journal is found by its name"):
            opened(tmp_path)
        other.unlink()
    optimizer = opened(tmp_path)[1]
    optimizer.step(*batch(0))
    optimizer.close()


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
    four_bits = ek.RowTable.open(path).quantize("mxfp4", tmp_path / "mxfp4")[0]
    with pytest.raises(ValueError, match="table has row_format 'mxfp4', expected 'f32' or"):
        ek.RowOptimizer(four_bits, state=tmp_path / "new")
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
