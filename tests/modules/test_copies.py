"""Copies of tables and modules: deepcopy, pickle, torch.save, torch.export. A file is opened again, a segment attached."""
import copy
import io
import os
import pickle

import pytest
import torch
from module_cases import CU, make_layer
from module_processes import Lookup

from engram_kernels import RowTable, gather_rows
from engram_kernels.testing import random_rows

FORMATS = ("f32", "bf16", "fp8_e4m3_block32", "fp8_e4m3_block32_packed", "fp8_e4m3_tensor", "int8_group32")
NUM_ROWS = 300


@pytest.fixture(params=FORMATS)
def tables(request, tmp_path):
    """The same rows by tensor, in a file, in memory of its own and shared; and ids."""
    rows, scales = random_rows(request.param, NUM_ROWS, 32, torch.Generator().manual_seed(0))
    plain = RowTable.from_tensor(rows, scales, request.param, row_dim=32)
    file = RowTable.create(tmp_path / "rows.safetensors", rows, scales, request.param, row_dim=32, zero_scale_is_zero=False)
    own = RowTable.from_tensor(rows, scales, request.param, row_dim=32, copy=True)
    ids = torch.randint(-1, NUM_ROWS, (6, 5), generator=torch.Generator().manual_seed(1))
    return dict(plain=plain, file=file, own=own, shared=plain.share(f"copies-{os.getpid()}-{tmp_path.name}")), ids


def saved(x):
    data = io.BytesIO()
    torch.save(x, data)
    data.seek(0)
    return torch.load(data, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, saved, lambda x: pickle.loads(pickle.dumps(x))],
                         ids=["deepcopy", "copy", "torch_save", "pickle"])
def test_copies_of_tables(copied, tables):
    tables, ids = tables
    want = gather_rows(tables["plain"], ids, torch.float32)
    for kind, table in tables.items():
        twin = copied(table)
        assert torch.equal(gather_rows(twin, ids, torch.float32), want)
        assert (twin.tier, twin.row_format, twin.path) == (table.tier, table.row_format, table.path)
        assert twin.memory_stats().get("name") == table.memory_stats().get("name")
        assert bool(twin.memory_stats()) == bool(table.memory_stats())
        if copied in (copy.deepcopy, copy.copy):  # what cannot be written needs no second copy
            assert (twin is table) == (copied is copy.copy or kind in ("file", "shared"))
            assert twin is table or twin.rows.data_ptr() != table.rows.data_ptr()


def test_a_copy_is_of_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = torch.randn(20, 32)
    table = RowTable.create("rows.safetensors", rows, row_format="f32")
    data = pickle.dumps(table)
    os.mkdir("elsewhere")
    monkeypatch.chdir("elsewhere")  # by its whole path
    assert torch.equal(pickle.loads(data).read_rows(torch.arange(20))[0], rows)
    RowTable.create(tmp_path / "rows.safetensors", rows + 1, row_format="f32")
    with pytest.raises(ValueError, match="rows.safetensors has rows with fingerprint .* it is another file by now"):
        pickle.loads(data)
    (tmp_path / "rows.safetensors").unlink()
    with pytest.raises(OSError, match="rows.safetensors"):
        pickle.loads(data)
    name = f"test-gone-{os.getpid()}"
    data = pickle.dumps(RowTable.from_tensor(rows, row_format="f32").share(name))
    with pytest.raises(FileNotFoundError, match=f"attached by its name, so a process must hold it until it is loaded.*{name}"):
        pickle.loads(data)


@pytest.mark.parametrize("kind", ["file", "shared", "own", "trained"])
def test_copies_of_modules(kind, tmp_path):
    layer, ids, hidden = make_layer("demo_v1", trained_rows=kind == "trained")
    want = layer(hidden, ids, CU)
    if kind == "file":
        layer.table = RowTable.create(tmp_path / "rows.safetensors", layer.table.rows, row_format="f32")
    elif kind != "trained":
        layer.table = RowTable.from_tensor(layer.table.rows, row_format="f32", copy=True)
        layer.table = layer.table.share(f"test-module-{os.getpid()}") if kind == "shared" else layer.table
    for copied in (copy.deepcopy, saved, lambda x: pickle.loads(pickle.dumps(x))):
        twin = copied(layer)
        assert torch.equal(twin(hidden, ids, CU), want)
        assert all(p.data_ptr() != q.data_ptr() for p, q in zip(twin.parameters(), layer.parameters(), strict=True))
        if kind == "trained":
            assert twin.table.rows is twin.rows


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_file(strict, tables):
    """The graph names the file; a program that is loaded where no table is open opens it."""
    tables, ids = tables
    want = gather_rows(tables["plain"], ids, torch.float32)
    dynamic = {"ids": {0: torch.export.Dim("n")}}
    program = torch.export.export(Lookup(tables["file"]), (ids,), strict=strict, dynamic_shapes=dynamic)
    assert torch.equal(program.module()(ids), want)
    data = io.BytesIO()
    torch.export.save(program, data)
    data.seek(0)
    del program
    tables.clear()
    assert torch.equal(torch.export.load(data).module()(ids[:4]), want[:4])
    with pytest.raises(IndexError, match=r"\[0, 300\) or -1"):
        torch.export.load(io.BytesIO(data.getvalue())).module()(ids + NUM_ROWS)


def test_fullgraph_with_a_file(tables):
    tables, ids = tables
    run = torch.compile(Lookup(tables["file"]), fullgraph=True, backend="aot_eager", dynamic=True)
    for some in (ids, ids[:3], torch.full_like(ids, -1)):
        assert torch.equal(run(some), gather_rows(tables["plain"], some, torch.float32))


@pytest.mark.parametrize("trained_rows", [False, True])
def test_export_of_a_module(trained_rows, tmp_path):
    layer, ids, hidden = make_layer("demo_v1", trained_rows=trained_rows)
    want = layer(hidden, ids, CU)
    if not trained_rows:
        layer.table = RowTable.create(tmp_path / "rows.safetensors", layer.table.rows, row_format="f32")
    for strict in (False, True):
        program = torch.export.export(layer, (hidden, ids, CU), strict=strict)
        torch.testing.assert_close(program.module()(hidden, ids, CU), want)
        assert ("rows" in program.state_dict) == trained_rows
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(hidden, ids, CU), want)
