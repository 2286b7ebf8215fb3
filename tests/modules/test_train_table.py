"""Engram(train_table=True): its own table, sparse gradients, and steps with a RowOptimizer beside an optimizer of torch."""
import copy
import os
import threading

import pytest
import torch
from module_cases import H, M, T, make_spec
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import engram_kernels as ek

pytest_plugins = ["shared_worker"]
pytestmark = pytest.mark.usefixtures("compiled")
CU = torch.tensor([0, 9, 9, T], dtype=torch.int32)


def make(variant="deepseek_v41", dtype=torch.float32, **options):
    torch.manual_seed(0)
    spec = make_spec(variant)
    return ek.Engram(spec, spec.layer_ids[0], dtype=dtype, **{"train_table": True, **options})


def batch(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, M, H, generator=generator).to(dtype), torch.randint(0, 400, (T,), generator=generator)


def loss_of(memory, seed=0):
    hidden, ids = batch(seed, memory.w_key.dtype)
    return (memory(hidden, ids, CU).float() - 1).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_table_has_the_size_of_the_layer(dtype):
    memory = make(dtype=dtype)
    assert dict(memory.named_parameters())["rows"].shape == (memory.layout.num_rows[0], 32)
    assert memory.rows.dtype == dtype and memory.sparse_grad and 0.019 < memory.rows.float().std() < 0.021
    assert torch.equal(memory.rows, make(dtype=dtype).rows)  # drawn from torch's generator
    meta = make(dtype=dtype, device="meta")
    assert meta.rows.is_meta and meta.rows.shape == memory.rows.shape
    copied = copy.deepcopy(memory)
    copied.load_state_dict(memory.state_dict())
    assert torch.equal(loss_of(copied), loss_of(memory))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_gradients_are_the_dense_ones(dtype):
    sparse, dense = make(dtype=dtype), make(dtype=dtype, sparse_grad=False)
    for memory in (sparse, dense):
        loss_of(memory).backward()
    assert sparse.rows.grad.is_sparse and not dense.rows.grad.is_sparse
    assert torch.equal(sparse.rows.grad.to_dense(), dense.rows.grad) and dense.rows.grad.any()
    assert 0 < sparse.rows.grad._nnz() == dense.rows.grad.any(1).sum()
    for name, parameter in sparse.named_parameters():
        assert name == "rows" or torch.equal(parameter.grad, dense.get_parameter(name).grad), name


def test_transforms_of_torch_func_get_the_dense_gradient():
    sparse, dense = make(), make(sparse_grad=False)
    loss_of(dense).backward()
    hidden, ids = batch()
    found = torch.func.grad(lambda p: (torch.func.functional_call(sparse, p, (hidden, ids, CU)) - 1).square().mean())(
        dict(sparse.named_parameters()))
    for name, gradient in found.items():
        assert not gradient.is_sparse and torch.equal(gradient, dense.get_parameter(name).grad), name


@pytest.mark.parametrize("how", ["checkpoint", "compile"])
def test_gradients_under_checkpointing_and_compile(how):
    plain, other = make(), make()
    loss_of(plain).backward()
    if how == "checkpoint":
        checkpoint(loss_of, other, use_reentrant=False).backward()
    else:
        torch.compile(loss_of, backend="aot_eager")(other).backward()
    assert other.rows.grad.is_sparse and torch.equal(other.rows.grad.to_dense(), plain.rows.grad.to_dense())


def test_accumulated_gradients_step_once():
    memory = make()
    before, table = memory.rows.detach().clone(), memory.table
    optimizer = ek.RowOptimizer(table, "sgd", lr=0.5)
    for seed in (1, 2):
        loss_of(memory, seed).backward()
    want = before - 0.5 * memory.rows.grad.to_dense()
    optimizer.step()
    optimizer.zero_grad()
    torch.testing.assert_close(memory.rows.detach(), want, rtol=1e-6, atol=1e-7)
    assert memory.rows.grad is None and not torch.equal(memory.rows, before)


@pytest.mark.parametrize("variant", ["deepseek_v41", "demo_v1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_with_two_optimizers(variant, dtype):
    memory = make(variant, dtype)
    if variant == "demo_v1":
        assert not memory.conv_weight.any()
    dense = torch.optim.AdamW([x for name, x in memory.named_parameters() if name != "rows"], lr=3e-3)
    rows = ek.RowOptimizer(memory.table, "adam", lr=5 * 3e-3, seed=0)
    losses = []
    for _ in range(30):
        loss = loss_of(memory)
        loss.backward()
        for optimizer in (dense, rows):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    if variant == "demo_v1":
        assert memory.conv_weight.any()


def stored(table, num_rows=None):
    return table.read_rows(torch.arange(num_rows or table.num_rows))[0]


def trained(memory, **options):
    """Losses of 30 steps with the rows behind the backbone, and the rows that moved."""
    table = memory.table
    before = stored(table)
    optimizer = ek.RowOptimizer(table, "adam", lr=5 * 3e-3, seed=0, **options)
    dense = torch.optim.AdamW(ek.param_groups(memory, lr=3e-3))
    losses = []
    with ek.TrainableRows(table, optimizer) as rows:
        memory.table = rows
        for _ in range(30):
            loss = loss_of(memory)
            loss.backward()
            for one in (dense, rows):
                one.step()
                one.zero_grad()
            losses.append(loss.item())
        rows.flush()
        moved = (stored(table) != before).any(1).nonzero().flatten()
    optimizer.close()
    return losses, moved


@pytest.mark.parametrize("where", ["host", "file"])
def test_a_table_in_host_memory_or_in_a_file_trains_behind_the_backbone(where, tmp_path):
    """The right size, drawn as the parameter is, outside of the module's parameters; only rows that are read move."""
    path = tmp_path / "rows.safetensors"
    memory = make(train_table="host" if where == "host" else path)
    table = memory.table
    assert table.tier == where and (table.num_rows, table.row_dim) == (memory.layout.num_rows[0], 32)
    drawn = stored(table)
    assert drawn.dtype == torch.float32 and 0.019 < drawn.std() < 0.021 and abs(drawn.mean()) < 1e-3
    assert "rows" not in memory.state_dict() and all(name != "rows" for name, _ in memory.named_parameters())
    losses, moved = trained(memory, **({"state": tmp_path / "moments.safetensors"} if where == "file" else {}))
    assert losses[-1] < 0.5 * losses[0], losses
    used = ek.ngram_hash(batch()[1].int(), CU, memory.layout).unique()
    assert torch.equal(moved, used.long())


def test_a_file_that_is_there_is_opened_again(tmp_path):
    """The next run goes on with its rows; a file of another table is refused and left as it is."""
    path = tmp_path / "rows.safetensors"
    trained(make(train_table=str(path)), state=tmp_path / "moments.safetensors")
    rows = stored(ek.RowTable.open(path), 9)
    again = make(train_table=path)
    assert torch.equal(stored(again.table, 9), rows)
    optimizer = ek.RowOptimizer(again.table, "adam", lr=0.1, seed=0, state=tmp_path / "moments.safetensors")
    assert optimizer.num_steps == 30
    optimizer.close()
    with pytest.raises(ValueError, match=r"rows\.safetensors has \d+ rows of 32 in f32, layer 1 with dtype torch.bfloat16"):
        make(dtype=torch.bfloat16, train_table=path)
    assert torch.equal(stored(ek.RowTable.open(path), 9), rows)


def test_a_file_is_drawn_piece_by_piece(tmp_path, monkeypatch):
    """Unlike pieces, none of which repeats another, for a table larger than one."""
    monkeypatch.setattr("engram_kernels.modules.memory_module._ROWS_AT_ONCE", 1000)
    table = make(train_table=tmp_path / "rows.safetensors").table
    rows = stored(table)
    assert table.num_rows > 1000 and 0.019 < rows.std() < 0.021 and len(rows.unique(dim=0)) == table.num_rows


def test_what_it_refuses():
    rows = ek.RowTable.from_tensor(nn.Parameter(torch.zeros_like(make().rows)), row_format="f32")
    with pytest.raises(ValueError, match="Engram: table and train_table are given"):
        make(table=rows)
    with pytest.raises(TypeError, match="train_table is 1 and"):
        make(train_table=1)
    with pytest.raises(ValueError, match=r"train_table is 'file', expected True, 'host' or the path of a \.safetensors file"):
        make(train_table="file")
    with pytest.raises(ValueError, match="sparse_grad is True and train_table 'host', expected None"):
        make(train_table="host", sparse_grad=True)
    assert not make(train_table=False).sparse_grad and make(train_table=False).table is None
    given = make(train_table=False, table=rows, sparse_grad=True)
    loss_of(given).backward()
    assert given.rows.grad.is_sparse


def longcat(dtype=torch.float32, **options):
    torch.manual_seed(0)
    spec = ek.EngramSpec.longcat(vocab_size=60, max_order=3, heads=3, head_dim=8, hidden_size=48, table_sizes=(420,) * 2,
                                 row_format="f32", zero_is_dead=True, ignored_token_ids=(5,))
    return ek.LongcatEmbedding(spec, dtype=dtype, **{"train_table": True, **options})


def test_longcat_trains_a_table_of_its_own():
    """As Engram: sparse gradients that are the dense ones, and an optimizer for the rows beside one for the rest."""
    ids = torch.randint(0, 60, (T,), generator=torch.Generator().manual_seed(4))
    target = torch.randn(T, 48, generator=torch.Generator().manual_seed(5))

    def loss_of(embed):
        return (embed(ids, CU).float() - target).square().mean()

    for dtype in (torch.float32, torch.bfloat16):
        sparse, dense = longcat(dtype), longcat(dtype, sparse_grad=False)
        assert sparse.rows.dtype == dtype and sparse.rows.shape == (sparse.layout.num_rows[0], 8)
        assert 0.018 < sparse.rows.float().std() < 0.022 and torch.equal(sparse.rows, dense.rows)
        for embed in (sparse, dense):
            loss_of(embed).backward()
        assert sparse.rows.grad.is_sparse and torch.equal(sparse.rows.grad.to_dense(), dense.rows.grad) and dense.rows.grad.any()
    embed = longcat()
    rest = torch.optim.AdamW([x for name, x in embed.named_parameters() if name != "rows"], lr=3e-3)
    rows, before = ek.RowOptimizer(embed.table, "adam", lr=0.1, seed=0), embed.rows.detach().clone()
    losses = []
    for _ in range(30):
        losses.append(loss_of(embed))
        losses[-1].backward()
        for optimizer in (rest, rows):
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    used = embed.hash(ids, CU).unique()
    changed = (embed.rows != before).any(1).nonzero().flatten()
    assert torch.equal(changed, used[used >= 0].long()), "rows that no token reads are left alone"
    with pytest.raises(ValueError, match="LongcatEmbedding: table and train_table are given"):
        longcat(table=embed.table)
    with pytest.raises(TypeError, match="LongcatEmbedding: train_table is 3"):
        longcat(train_table=3)
    with pytest.raises(ValueError, match="LongcatEmbedding: dtype is torch.float64"):
        longcat(torch.float64)
    assert longcat(train_table=False).table is None and longcat(device="meta").rows.is_meta


def computed_by_parametrization(memory):
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    parametrize.register_parametrization(memory, "rows", Twice())


def computed_by_a_copy(memory):
    memory.rows = nn.Parameter(torch.randn(32, memory.layout.num_rows[0]).t())


@pytest.mark.parametrize("compute", [computed_by_parametrization, computed_by_a_copy,
                                     lambda memory: prune.random_unstructured(memory, "rows", 0.5)])
def test_rows_that_are_computed_have_no_row_optimizer(compute):
    """An update of them would be lost."""
    memory = make()
    optimizer = ek.RowOptimizer(memory.table, "sgd", lr=1.0)
    compute(memory)
    with pytest.raises(ValueError, match="computed f32 rows now, and had f32 rows that were a parameter; make a new"):
        optimizer.step(torch.tensor([1]), torch.ones(1, 32))
    with pytest.raises(ValueError, match="RowOptimizer: table.rows is computed from a parameter"):
        ek.RowOptimizer(memory.table, "sgd", lr=1.0)


def test_a_row_optimizer_follows_the_parameter():
    memory = make()
    optimizer = ek.RowOptimizer(memory.table, "sgd", lr=1.0)
    memory.load_state_dict(copy.deepcopy(memory.state_dict()), assign=True)
    for _ in range(2):
        optimizer.zero_grad()
        assert memory.rows.grad is None
        loss_of(memory).backward()
        before, grad = memory.rows.detach().clone(), memory.rows.grad.to_dense()
        optimizer.step()
        torch.testing.assert_close(memory.rows.detach(), before - grad, rtol=1e-5, atol=1e-7)
    memory.bfloat16()
    with pytest.raises(ValueError, match="table has bf16 rows now, and had f32 rows"):
        optimizer.step(torch.tensor([1]), torch.ones(1, 32))


def test_a_trained_table_is_quantized_and_shared(tmp_path, shm):
    memory = make()
    ids = torch.tensor([0, 7, 3])
    quantized, report = memory.table.quantize("int8_group32", tmp_path / "q.safetensors")
    assert report.num_rows == memory.layout.num_rows[0] and quantized.tier == "file"
    got = ek.gather_rows(quantized, ids, torch.float32)
    torch.testing.assert_close(got, memory.rows.detach()[ids], rtol=0, atol=1e-3)
    assert torch.equal(ek.gather_rows(memory.table.quantize("int8_group32")[0], ids, torch.float32), got)
    with pytest.raises(ValueError, match="the file of the table itself"):
        ek.RowTable.create(tmp_path / "t.safetensors", memory.rows.detach(), row_format="f32").quantize(
            "nvfp4", tmp_path / "t.safetensors")
    shared = memory.table.share("trained", directory=str(shm))
    assert torch.equal(shared.rows, memory.rows.detach()) and not shared.rows.requires_grad


def test_many_that_make_one_file_have_one_table(tmp_path):
    start, tables = threading.Barrier(4), []

    def make_one():
        start.wait()
        tables.append(make(train_table=tmp_path / "rows.safetensors").table)

    threads = [threading.Thread(target=make_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tables) == 4 and len({table._file.source for table in tables}) == 1  # of one inode, not of one path
    assert os.listdir(tmp_path) == ["rows.safetensors"]


def test_a_file_that_could_not_be_made_keeps_nobody_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr("engram_kernels.modules.memory_module.RowTable.create", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(train_table=tmp_path / "rows.safetensors")
    monkeypatch.undo()
    assert make(train_table=tmp_path / "rows.safetensors").table.tier == "file"
    assert os.listdir(tmp_path) == ["rows.safetensors"]
    with pytest.raises(OSError, match="cannot be created in its directory.*none/rows"):
        make(train_table=tmp_path / "none" / "rows.safetensors")
