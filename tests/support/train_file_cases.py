"""Tables in files that are trained, and the same training in memory."""
import contextlib

import pytest
import torch

import engram_kernels as ek

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
