"""RowOptimizer and TrainableRows on rows of eight bits: decoded, updated in float32, encoded again."""
import pytest
import torch

from engram_kernels import RowOptimizer, RowTable, TrainableRows, gather_rows
from engram_kernels._library import COMPILE_ERROR
from engram_kernels.table.quantize import encode
from engram_kernels.training.quantized_rows import FORMATS

pytestmark = pytest.mark.skipif(bool(COMPILE_ERROR), reason=COMPILE_ERROR or "")
R, D = 40, 64


def table_of(row_format, begin=0, end=R):
    values = torch.randn(R, D, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, R)[:, None]
    rows, scales = encode(values[begin:end], row_format)
    return RowTable.from_tensor(rows.clone(), None if scales is None else scales.clone(), row_format, row_dim=D)


def bytes_of(table):
    return table.rows.clone(), None if table.scales is None else table.scales.clone()


def same(a, b):
    return torch.equal(a[0], b[0]) and (a[1] is None or torch.equal(a[1], b[1]))


def values_of(table):
    return gather_rows(table, torch.arange(table.num_rows), torch.float32)


def batch(step, count=30):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(-1, R, (count,), generator=generator), torch.randn(count, D, generator=generator)


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("rule", ["adam", "adagrad", "sgd"])
def test_a_step_is_that_of_float32_encoded_again(row_format, rule):
    """With rounding to nearest, against a table of the same values in float32, from step to step."""
    table = table_of(row_format)
    ours = RowOptimizer(table, rule, lr=0.1, rounding="nearest")
    plain = RowTable.from_tensor(values_of(table), row_format="f32")
    theirs = RowOptimizer(plain, rule, lr=0.1, rounding="nearest")
    for step in range(4):
        ids, grads = batch(step)
        before = bytes_of(table)
        plain.rows.copy_(values_of(table))
        ours.step(ids, grads)
        theirs.step(ids, grads)
        named = torch.unique(ids[ids != -1])
        rows, scales = encode(plain.rows[named], row_format, before=None if before[1] is None else before[1][named])
        wanted = (before[0].index_copy(0, named, rows), None if scales is None else before[1].index_copy(0, named, scales))
        assert same(bytes_of(table), wanted), step
        for name in ("second", "first", "steps"):
            x, y = getattr(ours, name), getattr(theirs, name)
            assert x is None or torch.equal(x, y), name
    assert not torch.equal(values_of(table), values_of(table_of(row_format)))


@pytest.mark.parametrize("row_format", FORMATS)
def test_what_a_step_leaves_alone_keeps_every_bit(row_format):
    table = table_of(row_format)
    optimizer = RowOptimizer(table, "sgd", lr=1e-3, seed=3)
    before, values = bytes_of(table), values_of(table)
    for step in range(20):  # one element of row 7 moves, and no other
        grad = torch.zeros(1, D)
        grad[0, 5] = values[7, 5].abs() * 0.1
        optimizer.step(torch.tensor([7]), grad)
        now = values_of(table)
        rest = torch.arange(D) != 5
        assert torch.equal(now[7, rest], values[7, rest]), step
    others = torch.arange(R) != 7
    assert same(tuple(None if x is None else x[others] for x in bytes_of(table)),
                tuple(None if x is None else x[others] for x in before))


@pytest.mark.parametrize("row_format", FORMATS)
def test_small_updates_are_not_lost(row_format):
    """300 steps that are each far less than what lies between two values: their sum arrives, where the nearest loses all."""
    moved = {}
    for rounding in ("stochastic", "nearest"):
        rows, scales = encode(torch.ones(1, D), row_format)
        table = RowTable.from_tensor(rows, scales, row_format, row_dim=D)
        optimizer = RowOptimizer(table, "sgd", lr=1.0, rounding=rounding)
        for _ in range(300):
            optimizer.step(torch.tensor([0]), torch.full((1, D), 6e-4))
        moved[rounding] = 1.0 - values_of(table)[0]
    assert moved["nearest"].abs().max() == 0
    assert 0.1 < moved["stochastic"].mean() < 0.26 and moved["stochastic"].std() > 0  # 0.18, less or more by chance


@pytest.mark.parametrize("row_format", FORMATS)
def test_bits_depend_on_neither_threads_nor_shards(row_format):
    def trained(begin, end, threads):
        known = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            table = table_of(row_format, begin, end)
            optimizer = RowOptimizer(table, "adam", lr=0.1, seed=9, first_row=begin, first_moment="bf16")
            for step in range(5):
                ids, grads = batch(step)
                optimizer.step(torch.where((ids >= begin) & (ids < end), ids - begin, -1), grads)
            return bytes_of(table)
        finally:
            torch.set_num_threads(known)
    whole = trained(0, R, 1)
    assert same(trained(0, R, 4), whole)
    for begin, end in ((0, 13), (13, R)):
        assert same(trained(begin, end, 2), tuple(None if x is None else x[begin:end] for x in whole))


@pytest.mark.parametrize("row_format", FORMATS)
def test_rows_are_trained_behind_the_backbone(row_format):
    plain, table = table_of(row_format), table_of(row_format)
    loop = RowOptimizer(plain, "adam", lr=0.05, seed=2)
    with TrainableRows(table, RowOptimizer(table, "adam", lr=0.05, seed=2), out_dtype=torch.float32) as mem:
        ticket = mem.submit(batch(0)[0])
        for step in range(6):
            following = mem.submit(batch(step + 1)[0])
            rows = mem.wait(ticket)
            ids, grads = batch(step)
            assert torch.equal(rows.detach(), gather_rows(plain, ids, torch.float32)), step
            rows.backward(grads)
            mem.step()
            loop.step(ids, grads)
            ticket = following
        mem.cancel(ticket)
        with pytest.raises(ValueError, match="held by a TrainableRows"):
            RowOptimizer(table, "sgd").step(*batch(0))
    assert same(bytes_of(table), bytes_of(plain))
    assert loop.norm(*batch(0)) == RowOptimizer(RowTable.from_tensor(torch.zeros(R, D), row_format="f32")).norm(*batch(0))


def test_a_state_goes_on_with_the_same_bits(tmp_path):
    table, copy = table_of("fp8_e4m3_block32"), table_of("fp8_e4m3_block32")
    optimizer, other = (RowOptimizer(x, "adam", lr=0.1, seed=4) for x in (table, copy))
    optimizer.step(*batch(0))
    copy.rows.copy_(table.rows)
    copy.scales.copy_(table.scales)
    optimizer.save(tmp_path / "state.safetensors")
    other.load(tmp_path / "state.safetensors")
    for one in (optimizer, other):
        one.step(*batch(1))
    assert same(bytes_of(table), bytes_of(copy))


def test_what_is_refused_has_written_nothing(tmp_path):
    table = table_of("fp8_e4m3_row")
    optimizer, before = RowOptimizer(table, "sgd", lr=1.0, first_moment="f32"), bytes_of(table)
    for ids, grads, words in ((torch.tensor([3]), torch.full((1, D), float("nan")), "of row 3, is nan"),
                              (torch.tensor([1, 1]), torch.full((2, D), 2e38), "sum up to more"),
                              (torch.tensor([2]), torch.full((1, D), -3e38), "sum up|row 2 is not finite")):
        optimizer.first[2].fill_(-3e38)
        with pytest.raises(ValueError, match=words):
            optimizer.step(ids, grads)
        assert same(bytes_of(table), before) and not optimizer.first[3].any() and optimizer.num_steps == 0
    with pytest.raises(IndexError, match=f"row_ids.0. is {R}"):
        optimizer.step(torch.tensor([R]), torch.zeros(1, D))
    for row_format in ("nvfp4", "mxfp4", "fp8_e4m3_tensor"):
        rows, scales = encode(torch.ones(2, D), row_format, 1.0)
        refused = RowTable.from_tensor(rows, torch.ones(1) if row_format == "fp8_e4m3_tensor" else scales, row_format, row_dim=D,
                                       table_scale=1.0 if row_format == "nvfp4" else None)
        with pytest.raises(ValueError, match=f"row_format '{row_format}', expected 'f32' or .*'int8_group32'"):
            RowOptimizer(refused)
    rows, scales = bytes_of(table)
    made = RowTable.create(tmp_path / "t.safetensors", rows, scales, "fp8_e4m3_row", row_dim=D)
    with pytest.raises(ValueError, match="row_format 'fp8_e4m3_row', expected 'f32'"):
        RowOptimizer(made, state=tmp_path / "s.safetensors")
