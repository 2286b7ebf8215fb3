"""RowOptimizer.save and load: the bits of an uninterrupted run, and states that belong to something else."""
import os

import pytest
import torch

import engram_kernels as ek

pytestmark = pytest.mark.usefixtures("compiled")
R, D = 150, 12


def table_of(seed=3, dtype=torch.bfloat16):
    return ek.RowTable.from_tensor(torch.randn(R, D, generator=torch.Generator().manual_seed(seed)).to(dtype),
                                   row_format="bf16" if dtype == torch.bfloat16 else "f32")


def train(optimizer, steps):
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        optimizer.step(torch.randint(0, R, (40,), generator=generator), torch.randn(40, D, generator=generator))


@pytest.mark.parametrize("options", [
    {"first_moment": "bf16", "seed": 2}, {"second_moment": "element", "bias_correction": "step"}, {"rule": "adagrad"},
    {"rule": "sgd", "first_moment": "f32"}], ids=["adam", "adam_element", "adagrad", "sgd"])
def test_load_goes_on_with_the_same_bits(options, tmp_path):
    table = table_of()
    optimizer = ek.RowOptimizer(table, **{"rule": "adam", "lr": 0.02, **options})
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(optimizer, range(5))
    scheduler.step()
    optimizer.save(tmp_path / "state.safetensors")
    ek.RowTable.create(tmp_path / "rows.safetensors", table.rows)
    train(optimizer, range(5, 9))

    stored = ek.RowTable.open(tmp_path / "rows.safetensors").read_rows(torch.arange(R))[0]
    again = ek.RowTable.from_tensor(stored, row_format="bf16")
    resumed = ek.RowOptimizer(again, **{"rule": "adam", "lr": 7.0, **options})
    resumed.load(tmp_path / "state.safetensors", num_steps=5)
    assert resumed.num_steps == 5 and resumed.param_groups[0]["lr"] == pytest.approx(0.018)
    assert resumed.param_groups[0]["initial_lr"] == 0.02 and resumed.param_groups[0]["params"][0] is again.rows
    train(resumed, range(5, 9))
    assert torch.equal(again.rows.view(torch.int16), table.rows.view(torch.int16))
    for name in ("second", "first", "steps"):
        mine, its = getattr(optimizer, name), getattr(resumed, name)
        assert (mine is None) == (its is None) and (mine is None or torch.equal(mine, its))


def test_the_file_is_safetensors_with_moments_in_row_order(tmp_path):
    from safetensors.torch import safe_open
    optimizer = ek.RowOptimizer(table_of(), lr=0.02)
    train(optimizer, range(2))
    optimizer.save(tmp_path / "state.safetensors")
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["first", "progress", "second", "steps"] and "adam" in file.metadata()["settings"]
        for name in ("first", "second", "steps"):
            assert torch.equal(file.get_tensor(name), getattr(optimizer, name))


def test_states_of_something_else_are_refused(tmp_path):
    table = table_of()
    optimizer = ek.RowOptimizer(table, lr=0.02)
    train(optimizer, range(3))
    path = tmp_path / "state.safetensors"
    optimizer.save(path)
    first = optimizer.first.clone()

    def refused(of, match, **options):
        before = of.num_steps
        with pytest.raises(ValueError, match=match):
            of.load(path, **options)
        assert of.num_steps == before

    refused(optimizer, "is the state of step 3, expected that of step 4", num_steps=4)
    refused(ek.RowOptimizer(table, "adam", seed=1), "another optimizer or table: seed is 0, expected 1")
    refused(ek.RowOptimizer(table, "sgd"), "rule is 'adam', expected 'sgd'")
    refused(ek.RowOptimizer(table_of(dtype=torch.float32)), "row_format is 'bf16', expected 'f32'")
    refused(ek.RowOptimizer(table_of(seed=9)), "it is another table, or has the rows of another step")
    train(optimizer, [3])
    refused(optimizer, "it is another table, or has the rows of another step")  # the table went on
    assert not torch.equal(optimizer.first, first)


def test_a_change_outside_of_the_sampled_rows_is_seen(tmp_path):
    table = ek.RowTable.from_tensor(torch.randn(5000, 4), row_format="f32")
    optimizer = ek.RowOptimizer(table, lr=0.02)
    optimizer.save(tmp_path / "state")
    table.rows[1] += 1  # of 5,000 rows a fingerprint takes every fifth
    with pytest.raises(ValueError, match="with checksum"):
        optimizer.load(tmp_path / "state")


def test_files_that_are_no_states_are_refused(tmp_path):
    table = table_of()
    optimizer, path = ek.RowOptimizer(table), tmp_path / "state"
    with pytest.raises(OSError, match="No such file"):
        optimizer.load(path)
    ek.RowTable.create(path, table.rows)
    with pytest.raises(ValueError, match="is no state of a RowOptimizer"):
        optimizer.load(path)
    optimizer.save(path)
    whole = path.read_bytes()
    for cut in (4, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is no whole safetensors file"):
            optimizer.load(path)
    path.write_bytes(whole.replace(b'"num_steps": 0', b'"num_steps":-1'))
    with pytest.raises(ValueError, match="num_steps is -1"):
        optimizer.load(path)
    with pytest.raises(OSError, match="cannot be created in its directory"):
        optimizer.save(tmp_path / "missing" / "state")


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    optimizer = ek.RowOptimizer(table_of(), lr=0.02)
    optimizer.save(tmp_path / "state")
    old = (tmp_path / "state").read_bytes()
    optimizer.param_groups[0]["what"] = object()
    with pytest.raises(TypeError, match="what of the parameter group is a object"):
        optimizer.save(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == old and os.listdir(tmp_path) == ["state"]


def test_save_while_steps_are_pending_is_of_the_last_one(tmp_path):
    table = table_of()
    optimizer = ek.RowOptimizer(table, lr=0.02)
    with ek.TrainableRows(table, optimizer) as mem:
        mem.wait(mem.submit(torch.arange(20))).sum().backward()
        mem.step()
        optimizer.save(tmp_path / "state")
        with pytest.raises(ValueError, match="held by a TrainableRows"):
            optimizer.load(tmp_path / "state")
    optimizer.load(tmp_path / "state", num_steps=1)
