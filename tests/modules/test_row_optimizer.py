"""RowOptimizer against torch's optimizers, its state, schedulers and clipping; param_groups."""
import copy
import io
import mmap
import pickle
import warnings

import accelerate
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
from torch import nn

import engram_kernels as ek

pytestmark = pytest.mark.usefixtures("compiled")
R, D, STEPS = 200, 24, 200


def batches(steps=STEPS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(0, R, (60,), generator=generator), torch.randn(60, D, generator=generator)


def start(dtype=torch.float32):
    return torch.randn(R, D, generator=torch.Generator().manual_seed(7)).to(dtype)


def table_of(rows):
    return ek.RowTable.from_tensor(rows, row_format={torch.float32: "f32", torch.bfloat16: "bf16"}[rows.dtype])


def run_torch(make):
    weight = nn.Parameter(start())
    optimizer = make([weight])
    for ids, grads in batches():
        weight.grad = torch.sparse_coo_tensor(ids[None], grads, weight.shape, check_invariants=False)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize(("rule", "options", "peer"), [
    ("adam", dict(lr=0.01, bias_correction="step"), lambda p: torch.optim.SparseAdam(p, lr=0.01)),
    ("adam", dict(lr=0.01, betas=(0.5, 0.9), eps=1e-3, bias_correction="step"),
     lambda p: torch.optim.SparseAdam(p, lr=0.01, betas=(0.5, 0.9), eps=1e-3)),
    ("adagrad", dict(lr=0.1), lambda p: torch.optim.Adagrad(p, lr=0.1)),
    ("sgd", dict(lr=0.1, second_moment=None), lambda p: torch.optim.SGD(p, lr=0.1))], ids=["adam", "adam2", "adagrad", "sgd"])
def test_agrees_with_torch_over_200_steps(rule, options, peer):
    rows = start()
    optimizer = ek.RowOptimizer(table_of(rows), rule, **{"second_moment": "element", **options})
    for ids, grads in batches():
        optimizer.step(ids, grads)
    torch.testing.assert_close(rows, run_torch(peer), rtol=1e-5, atol=1e-5)
    assert (rows - start()).abs().mean() > 0.05  # what both have moved


def test_bias_by_row_ignores_steps_of_other_rows():
    """A row that is met at steps 1 and 9 comes out as one that is met at steps 1 and 2."""
    grads, results = torch.randn(2, 1, D, generator=torch.Generator().manual_seed(1)), []
    for between in (0, 7):
        rows = start()
        optimizer = ek.RowOptimizer(table_of(rows), "adam", lr=0.1)
        optimizer.step(torch.tensor([3]), grads[0])
        for _ in range(between):
            optimizer.step(torch.tensor([4]), grads[1])
        optimizer.step(torch.tensor([3]), grads[1])
        results.append(rows[3].clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("first_moment", ["f32", "bf16", None])
def test_resume_gives_the_same_bits(first_moment, tmp_path):
    options = dict(lr=0.01, first_moment=first_moment, seed=3)
    rows = start(torch.bfloat16)
    optimizer, data = ek.RowOptimizer(table_of(rows), "adam", **options), list(batches(10))
    for step, (ids, grads) in enumerate(data):
        if step == 5:
            torch.save({"rows": rows, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
        optimizer.step(ids, grads)
    saved = torch.load(tmp_path / "state.pt")
    resumed = ek.RowOptimizer(table_of(saved["rows"]), "adam", **options)
    resumed.load_state_dict(saved["optimizer"])
    for ids, grads in data[5:]:
        resumed.step(ids, grads)
    assert torch.equal(saved["rows"], rows)
    assert set(optimizer.moments()) == {"second", "steps", *(["first"] if first_moment else [])}
    for name, x in optimizer.moments().items():
        assert torch.equal(x, resumed.moments()[name])


@pytest.mark.parametrize("options", [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True, "cpu_offload": True}])
@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_torch_s_distributed_checkpoint_takes_its_state(rule, options, tmp_path):
    """get_optimizer_state_dict, a checkpoint, set_optimizer_state_dict: also before the first step, and with no moments."""
    if rule == "sgd" and "full_state_dict" in options:  # torch wants a moment that has rows
        options = {"cpu_offload": True}
    options = dcp_state.StateDictOptions(**options)

    def make():
        torch.manual_seed(0)
        model = nn.ModuleDict({"memory": nn.Module(), "head": nn.Linear(2, 2)})
        model["memory"].rows = nn.Parameter(start())
        return model, ek.RowOptimizer(table_of(model["memory"].rows), rule, lr=0.1)

    model, optimizer = make()
    data = list(batches(6))
    for step, (ids, grads) in enumerate(data):
        if step == 3:
            state = {"optimizer": dcp_state.get_optimizer_state_dict(model, optimizer, options=options),
                     "rows": optimizer.table.rows.detach()}
            dcp.save(state, checkpoint_id=tmp_path / "state", no_dist=True)
        optimizer.step(ids, grads)
    other, resumed = make()
    resumed.param_groups[0]["lr"] = 0.3
    state = {"optimizer": dcp_state.get_optimizer_state_dict(other, resumed, options=options),
             "rows": resumed.table.rows.detach()}
    assert resumed.num_steps == 0 and resumed.table.rows.grad is None
    assert ("state.memory.rows.num_steps" in state["optimizer"] if options.flatten_optimizer_state_dict
            else list(state["optimizer"]["state"]) == ["memory.rows"])
    dcp.load(state, checkpoint_id=tmp_path / "state", no_dist=True)
    dcp_state.set_optimizer_state_dict(other, resumed, state["optimizer"], options=options)
    assert resumed.num_steps == 3 and resumed.param_groups[0]["lr"] == 0.1
    for ids, grads in data[3:]:
        resumed.step(ids, grads)
    assert torch.equal(resumed.table.rows, optimizer.table.rows) and not torch.equal(optimizer.table.rows, start())
    assert all(torch.equal(x, resumed.moments()[name]) for name, x in optimizer.moments().items())


def test_accelerate_prepares_saves_and_resumes_it(tmp_path):
    """Beside an optimizer of torch, with scaled gradients: prepare, save_state, load_state; the bits of an uninterrupted run."""
    def make():
        model = nn.Module()
        model.rows, model.head = nn.Parameter(start()), nn.Linear(D, 1)
        return model, ek.RowOptimizer(table_of(model.rows), "adam", lr=0.1), torch.optim.SGD(model.head.parameters(), lr=0.1)

    def step(accelerator, prepared, ids):
        model, *optimizers = prepared
        rows = ek.gather_rows(table_of(model.rows), ids, torch.float32, sparse_grad=True)
        accelerator.backward(model.head(rows).square().mean())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    accelerator, data = accelerate.Accelerator(cpu=True), [ids for ids, _ in batches(6)]
    try:
        one, other = (accelerator.prepare(*make()) for _ in range(2))
        other[0].load_state_dict(one[0].state_dict())
        accelerator._models, accelerator._optimizers = [one[0]], list(one[1:])
        for number, ids in enumerate(data):
            if number == 3:
                accelerator.save_state(tmp_path)
            step(accelerator, one, ids)
        accelerator._models, accelerator._optimizers = [other[0]], list(other[1:])
        accelerator.load_state(tmp_path)
        for ids in data[3:]:
            step(accelerator, other, ids)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert torch.equal(one[0].rows, other[0].rows) and not torch.equal(one[0].rows, start())


@pytest.mark.parametrize(("other", "message"), [
    (dict(rule="adagrad", first_moment=None), "rule is 'adagrad', expected 'adam'"), (dict(seed=4), "seed is 4, expected 0"),
    (dict(second_moment="element"), "second_moment is 'element', expected 'row'"),
    (dict(first_row=9), "first_row is 9, expected 0"), (dict(rows=torch.zeros(R + 1, D)), "num_rows is 201, expected 200"),
    (dict(rows=torch.zeros(R, D).bfloat16()), "row_format is 'bf16', expected 'f32'")])
def test_a_state_of_another_table_or_kind_is_refused(other, message):
    optimizer = ek.RowOptimizer(table_of(start()), "adam", lr=0.1)
    optimizer.step(torch.tensor([3]), torch.ones(1, D))
    before = copy.deepcopy(optimizer.moments())
    other = {"rule": "adam", "rows": start(), **other}
    state = ek.RowOptimizer(table_of(other.pop("rows")), **other).state_dict()
    with pytest.raises(ValueError, match=f"RowOptimizer.load_state_dict: .*{message}"):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="state is missing"):
        optimizer.load_state_dict({"a": 1})
    for name, x in before.items():
        assert torch.equal(x, optimizer.moments()[name])
    assert optimizer.num_steps == 1


def test_bad_step_changes_nothing_and_is_not_counted():
    rows = start()
    optimizer = ek.RowOptimizer(table_of(rows), "adam", bias_correction="step")
    with pytest.raises(ValueError, match=r"grad_rows\[1, 0\], of row 5, is nan"):
        optimizer.step(torch.tensor([3, 5]), torch.tensor([[1.0] * D, [float("nan")] * D]))
    assert torch.equal(rows, start()) and optimizer.num_steps == 0 and not optimizer.first.any() and not optimizer.second.any()


def test_learning_rate_schedulers_work():
    rows = torch.zeros(4, 2)
    optimizer = ek.RowOptimizer(table_of(rows), "sgd", lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(3):
        optimizer.step(torch.tensor([1]), torch.ones(1, 2))
        scheduler.step()
    assert rows.tolist() == [[0, 0], [-1.75, -1.75], [0, 0], [0, 0]]


def test_norm_and_clipping():
    ids, grads = torch.tensor([3, 5, 3, -1]), torch.tensor([[3.0, 0], [0, 12], [0, 4], [9, 9]])
    rows = nn.Parameter(torch.zeros(6, 2))
    optimizer = ek.RowOptimizer(table_of(rows), "sgd", lr=1.0)
    version = rows._version
    assert optimizer.norm(ids, grads).item() == 13 and rows._version == version and not rows.any()
    optimizer.step(ids, grads, grad_scale=0.5)
    assert rows[3].tolist() == [-1.5, -2] and rows[5].tolist() == [0, -6]


def test_norm_does_not_depend_on_threads():
    ids, grads = torch.randint(0, R, (70_000,)), torch.randn(70_000, 3)
    optimizer, threads = ek.RowOptimizer(table_of(torch.zeros(R, 3)), "sgd"), torch.get_num_threads()
    found = set()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.add(optimizer.norm(ids, grads).item())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_step_takes_the_sparse_gradient_of_the_rows():
    rows, ids = nn.Parameter(start()), torch.tensor([[3, 7, 3]])
    optimizer = ek.RowOptimizer(table_of(rows), "sgd", lr=1.0)
    with pytest.raises(ValueError, match="table.rows.grad is None, expected a sparse one"):
        optimizer.step()
    ek.gather_rows(optimizer.table, ids, torch.float32, sparse_grad=True).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    want = start()
    want[3] -= 2
    want[7] -= 1
    assert torch.equal(rows, want) and rows.grad is None


def test_bytes_of_the_state():
    """Bytes per parameter, rows of 256: those of the rows and of all that is kept beside them."""
    def cost(dtype, **options):
        rows = torch.zeros(64, 256, dtype=dtype)
        moments = ek.RowOptimizer(table_of(rows), "adam", **options).moments().values()
        return (rows.nbytes + sum(x.nbytes for x in moments)) / rows.numel()
    assert cost(torch.bfloat16, first_moment=None) <= 2.05
    assert cost(torch.bfloat16, first_moment="bf16") <= 4.05
    assert cost(torch.float32, second_moment="element") <= 12.05


def test_wrong_options_are_named(tmp_path):
    table = table_of(start())
    for options, message in ((dict(rule="x"), "rule is 'x'"), (dict(second_moment="x"), "second_moment is 'x'"),
                             (dict(rule="sgd", second_moment="row"), "sgd has none"),
                             (dict(rule="adagrad", first_moment="f32"), "adagrad has none"), (dict(lr=-1.0), "lr is -1.0"),
                             (dict(rounding="x"), "rounding is 'x'"), (dict(bias_correction="x"), "bias_correction is 'x'")):
        with pytest.raises(ValueError, match=f"RowOptimizer: .*{message}"):
            ek.RowOptimizer(table, **options)
    with pytest.raises(TypeError, match="table is a Tensor, expected a RowTable"):
        ek.RowOptimizer(start())


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_memory_that_is_mapped_read_only_is_refused(tmp_path):
    (tmp_path / "rows").write_bytes(bytes(4096))
    with (tmp_path / "rows").open("rb") as file:
        rows = torch.frombuffer(mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ), dtype=torch.float32).view(64, 16)
    with pytest.raises(ValueError, match="RowOptimizer: table.rows lies in memory that is mapped read-only"):
        ek.RowOptimizer(table_of(rows))


def test_param_groups():
    spec = ek.EngramSpec.deepseek_v41(vocab_size=64, num_classes=64, table_sizes=(50,) * 3, head_dim=32, hidden_size=32,
                                      branches=2, row_format="f32")
    rows = nn.Parameter(torch.zeros(spec.layout().num_rows[0], 32))
    memory = ek.Engram(spec, 1, table=table_of(rows), dtype=torch.float32)
    model = nn.ModuleDict({"memory": memory, "head": nn.Linear(4, 4), "frozen": nn.Linear(2, 2).requires_grad_(False)})
    rest, tables = ek.param_groups(model, 0.1)
    assert tables == {"params": [rows], "lr": 0.5, "weight_decay": 0.0} and rest["lr"] == 0.1 and "weight_decay" not in rest
    wanted = [x for name, x in model.named_parameters() if name != "memory.rows" and "frozen" not in name]
    assert [id(x) for x in rest["params"]] == [id(x) for x in wanted]
    optimizer = torch.optim.AdamW(ek.param_groups(model, 0.1), lr=0.1, weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert len(ek.param_groups(nn.Linear(2, 2), 0.1)) == 1
    trained = ek.RowOptimizer(memory.table)
    torch.optim.lr_scheduler.StepLR(trained, 1)  # a cycle
    (group,) = ek.param_groups(model, 0.1)
    assert [id(x) for x in group["params"]] == [id(x) for x in wanted]
    del trained
    assert ek.param_groups(model, 0.1)[1]["params"] == [rows]
    with pytest.raises(ValueError, match="no parameter of model needs a gradient"):
        ek.param_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)
    with pytest.raises(TypeError, match="model is a list, expected a torch.nn.Module"):
        ek.param_groups([rows], 0.1)


def test_it_is_neither_copied_nor_pickled():
    """Both would lose table, moments and steps: torch's optimizers keep their state elsewhere."""
    optimizer = ek.RowOptimizer(table_of(start()), "adam")
    for refused in (copy.deepcopy, pickle.dumps, lambda o: torch.save(o, io.BytesIO())):
        with pytest.raises(TypeError, match=r"neither copied nor pickled.*state_dict\(\)"):
            refused(optimizer)


def test_a_damaged_state_changes_nothing():
    optimizer = ek.RowOptimizer(table_of(start()), "adam", lr=0.1)
    other = ek.RowOptimizer(table_of(start()), "adam", lr=0.2)
    other.step(torch.tensor([3]), torch.ones(1, D))
    good = other.state_dict()
    group, moments = good["param_groups"][0], good["state"][0]
    for change, message in (({"param_groups": []}, "has 0 groups"), ({"param_groups": [dict(group, settings=3)]}, "rule is None"),
                            ({"param_groups": [{"lr": 1.0}]}, r"without \[\['betas', 'eps', 'params', 'settings'\]\]"),
                            ({"param_groups": [dict(group, lr=-1)]}, "lr is -1"),
                            ({"param_groups": [dict(group, params=[0, 1])]}, r"params of the group is \[0, 1\]"),
                            ({"state": None}, "state is missing"), ({"state": {}}, "no entry of parameter 0"),
                            ({"state": {0: dict(moments, num_steps="x")}}, "num_steps is 'x'"),
                            ({"state": {0: dict(moments, num_steps=torch.tensor([1, 2]))}}, r"num_steps is tensor\(\[1, 2\]\)"),
                            ({"state": {0: dict(moments, second=[1.0])}}, r"second is \[1.0\]"),
                            ({"state": {0: dict(moments, steps=moments["steps"] - 9)}}, "steps has a number below 0")):
        with pytest.raises(ValueError, match=f"RowOptimizer.load_state_dict: .*{message}"):
            optimizer.load_state_dict({**good, **change})
        assert optimizer.num_steps == 0 and not optimizer.second.any() and optimizer.param_groups[0]["lr"] == 0.1
    optimizer.load_state_dict(good)
    assert optimizer.num_steps == 1 and optimizer.param_groups[0]["lr"] == 0.2


def test_a_closure_and_a_second_group():
    rows = nn.Parameter(start())
    optimizer = ek.RowOptimizer(table_of(rows), "sgd", lr=1.0)

    def closure():
        loss = ek.gather_rows(optimizer.table, torch.tensor([5, 5]), torch.float32, sparse_grad=True).sum()
        loss.backward()
        return loss

    for call in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        before = rows.detach().clone()
        optimizer.zero_grad()
        assert call().item() == pytest.approx(2 * before[5].sum().item(), rel=1e-5)
        torch.testing.assert_close(rows[5].detach(), before[5] - 2)
    with pytest.raises(ValueError, match="second parameter group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_the_factor_of_clipping_may_be_a_tensor():
    ids, grads = next(batches())
    results = []
    for factor in (0.25, torch.tensor(0.25), torch.tensor([0.25], dtype=torch.float64), np.float32(0.25)):
        rows = start()
        ek.RowOptimizer(table_of(rows), "sgd", lr=1.0).step(ids, grads, grad_scale=factor)
        results.append(rows)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_row_update_refuses_memory_that_is_mapped_read_only(tmp_path):
    np.save(tmp_path / "rows.npy", start().numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's array is not writable, torch says
        rows = torch.from_numpy(np.load(tmp_path / "rows.npy", mmap_mode="r"))
    with pytest.raises(ValueError, match="row_update: table.rows lies in memory that is mapped read-only"):
        ek.row_update(table_of(rows), torch.tensor([1]), torch.ones(1, D), "sgd", lr=1.0)
