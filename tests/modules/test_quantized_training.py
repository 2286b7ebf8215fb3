"""RowOptimizer and TrainableRows on rows of eight bits: decoded, updated in float32, encoded again."""
import json

import pytest
import torch
from safetensors.torch import save_file

from engram_kernels import RowOptimizer, RowTable, TrainableRows, gather_rows
from engram_kernels._library import COMPILE_ERROR
from engram_kernels.reference.row_update import encode as encode_again
from engram_kernels.row_format import FLOAT_FORMATS, ROW_FORMATS, TRAINED_FORMATS
from engram_kernels.table.quantize import encode

pytestmark = pytest.mark.skipif(bool(COMPILE_ERROR), reason=COMPILE_ERROR or "")
R, D = 40, 64
FORMATS = [name for name in TRAINED_FORMATS if name not in FLOAT_FORMATS]


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
        fmt = ROW_FORMATS[row_format]
        rows, scales = encode_again(plain.rows[named], fmt.dtype, fmt.block or D, None if before[1] is None else before[1][named],
                                    None)
        rows = torch.cat([rows, scales], 1) if fmt.is_packed else rows
        wanted = (before[0].index_copy(0, named, rows), None if fmt.is_packed else before[1].index_copy(0, named, scales))
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


def test_what_is_refused_has_written_nothing():
    table = table_of("fp8_e4m3_row")
    optimizer, before = RowOptimizer(table, "sgd", lr=1.0, first_moment="f32"), bytes_of(table)
    for ids, grads, words in ((torch.tensor([3]), torch.full((1, D), float("nan")), "of row 3, is nan"),
                              (torch.tensor([1, 1]), torch.full((2, D), 2e38), "sum up to more")):
        with pytest.raises(ValueError, match=words):
            optimizer.step(ids, grads)
        assert same(bytes_of(table), before) and not optimizer.first.any() and optimizer.num_steps == 0
    with pytest.raises(IndexError, match=f"row_ids.0. is {R}"):
        optimizer.step(torch.tensor([R]), torch.zeros(1, D))
    for row_format in ("nvfp4", "mxfp4", "fp8_e4m3_tensor"):
        rows, scales = encode(torch.ones(2, D), row_format, 1.0)
        refused = RowTable.from_tensor(rows, torch.ones(1) if row_format == "fp8_e4m3_tensor" else scales, row_format, row_dim=D,
                                       table_scale=1.0 if row_format == "nvfp4" else None)
        with pytest.raises(ValueError, match=f"row_format '{row_format}', expected 'f32' or .*'fp8_e4m3_row'"):
            RowOptimizer(refused)


# ---- in a file ------------------------------------------------------------------------------------------------------------


def opened(folder, row_format):
    """(table, optimizer) of the files in a folder, which are made where there are none."""
    path = folder / "rows.safetensors"
    if not path.exists():
        rows, scales = bytes_of(table_of(row_format))
        RowTable.create(path, rows, scales, row_format, row_dim=D)
    table = RowTable.open(path)
    return table, RowOptimizer(table, "adam", lr=0.05, seed=5, first_moment="bf16", state=folder / "state.safetensors")


@pytest.mark.parametrize("row_format", FORMATS)
def test_rows_of_eight_bits_in_a_file_have_the_bits_of_memory(row_format, tmp_path):
    memory = table_of(row_format)
    in_memory = RowOptimizer(memory, "adam", lr=0.05, seed=5, first_moment="bf16")
    table, optimizer = opened(tmp_path, row_format)
    for step in range(6):
        if step == 3:  # a process that ends without a word leaves the last steps in the journal
            optimizer.file.abandon()
            with pytest.warns(UserWarning, match="beside it is a journal of steps"):
                table, optimizer = opened(tmp_path, row_format)
            assert optimizer.num_steps == 3
        optimizer.step(*batch(step))
        in_memory.step(*batch(step))
        assert torch.equal(values_of(table), values_of(memory)), step
        assert optimizer.norm(*batch(step)) == in_memory.norm(*batch(step))
    optimizer.close()
    table, optimizer = opened(tmp_path, row_format)
    rows, scales = table.read_rows(torch.arange(R))
    assert same((rows, scales), bytes_of(memory)) and optimizer.num_steps == 6
    for name in ("second", "first", "steps"):
        assert torch.equal(torch.cat(list(optimizer.moment_pieces(name))), getattr(in_memory, name)), name
    before = values_of(table)
    with pytest.raises(ValueError, match="is nan"):
        optimizer.step(torch.tensor([3]), torch.full((1, D), float("nan")))
    assert torch.equal(values_of(table), before) and optimizer.num_steps == 6
    optimizer.close()


@pytest.mark.parametrize("row_format", ["fp8_e4m3_block32", "fp8_e4m3_block32_packed"])
def test_rows_of_eight_bits_in_a_file_are_trained_behind_the_backbone(row_format, tmp_path):
    plain = table_of(row_format)
    loop = RowOptimizer(plain, "adam", lr=0.05, seed=5, first_moment="bf16")
    table, optimizer = opened(tmp_path, row_format)
    with TrainableRows(table, optimizer, out_dtype=torch.float32) as mem:
        for step in range(4):
            ids, grads = batch(step)
            rows = mem.wait(mem.submit(ids))
            assert torch.equal(rows.detach(), gather_rows(plain, ids, torch.float32)), step
            rows.backward(grads)
            mem.step()
            loop.step(ids, grads)
    optimizer.close()
    assert torch.equal(values_of(RowTable.open(tmp_path / "rows.safetensors")), values_of(plain))


def test_scales_in_another_file_or_in_halves_are_not_trained(tmp_path):
    rows, scales = bytes_of(table_of("fp8_e4m3_row"))
    save_file({"rows": rows.view(torch.float8_e4m3fn), "halves": scales.bfloat16()}, tmp_path / "a.safetensors")
    save_file({"scales": scales}, tmp_path / "b.safetensors")
    places = {"rows": "a.safetensors", "halves": "a.safetensors", "scales": "b.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for name, words in (("halves", "the scales of table are BF16, expected F32"), ("scales", "another file than its rows")):
        table = RowTable.open(tmp_path, "rows", name, "fp8_e4m3_row")
        with pytest.raises(ValueError, match=words):
            RowOptimizer(table, state=tmp_path / "state")
    assert not (tmp_path / "state").exists()
