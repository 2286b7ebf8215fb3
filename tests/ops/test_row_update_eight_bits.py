"""row_update of rows that are decoded and encoded again: the bits of the reference, what is drawn, and what is not finite."""
import itertools

import pytest
import torch
from test_row_update import RULES, R, make_ids, make_state, rand

import engram_kernels as ek
from engram_kernels.row_format import FLOAT_FORMATS, TRAINED_FORMATS
from engram_kernels.table.quantize import encode

pytest_plugins = ["shared_worker"]
pytestmark = pytest.mark.usefixtures("compiled")
OP = "row_update"
EIGHT_BITS = [name for name in TRAINED_FORMATS if name not in FLOAT_FORMATS]


def encoded(values, row_format, padding=0):
    """A table of float32 rows, encoded; padding: bytes between packed rows."""
    rows, scales = encode(values, row_format)
    wide = torch.zeros(len(rows), rows.shape[1] + padding, dtype=rows.dtype)
    wide[:, :rows.shape[1]] = rows
    return ek.RowTable.from_tensor(wide, None if scales is None else scales.clone(), row_format, row_dim=values.shape[1])


def of_every_size(num_rows, row_dim, seed=0):
    """Rows with elements from far below to far above those that are common, zeros and rows of zeros among them."""
    rows = rand(num_rows, row_dim, seed=seed) * torch.logspace(-6, 6, num_rows)[:, None]
    rows *= torch.logspace(-5, 0, row_dim)[torch.randperm(row_dim, generator=torch.Generator().manual_seed(seed))]
    rows[0], rows[1], rows[2] = 0.0, rows[1] * 1e-36, rows[2].sign() * 3.4e38
    rows[:, row_dim // 2] = -0.0
    return rows


def updated_table(table, state, ids, grads, rule, device="cpu", **options):
    """(squares, rows, scales, moments ...) after one update of copies."""
    def copy(x):
        return None if x is None else x.to(device, copy=True)
    table = ek.RowTable.from_tensor(copy(table.rows), copy(table.scales), table.row_format, row_dim=table.row_dim,
                                    zero_scale_is_zero=table.zero_scale_is_zero)
    state = {name: copy(x) for name, x in state.items()}
    out = ek.row_update(table, ids.to(device), grads.to(device), rule, lr=0.1, **state, **options)
    ek.check_errors()
    return [x.cpu() for x in (out, table.rows, table.scales, *state.values()) if x is not None]


def same_bits(a, b):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("row_format", EIGHT_BITS)
@pytest.mark.parametrize(("rule", "second", "first"), RULES)
def test_eight_bits_have_the_bits_of_the_reference(rule, second, first, row_format, isa):
    dims = (1, 37, 160) if row_format == "fp8_e4m3_row" else (32, 160)
    for row_dim, (rounding, step) in itertools.product(dims, (("stochastic", None), ("nearest", 3))):
        values = of_every_size(R, row_dim)
        table, state = encoded(values, row_format, 3 if "packed" in row_format else 0), make_state(second, first, R, row_dim)
        ids, grads = make_ids(3, 10), rand(3, 10, row_dim, seed=3) * torch.logspace(-8, 3, 30).view(3, 10, 1)
        ids[0, :3] = torch.arange(3)
        options = dict(rounding=rounding, step=step, seed=5, grad_scale=0.7, first_row=9)
        got, want = (updated_table(table, state, ids, grads, rule, backend=name, **options) for name in ("cpu", "reference"))
        assert same_bits(got, want), (row_dim, rounding, step)
        untouched = [r for r in range(R) if not (ids == r).any()]
        assert torch.equal(got[1][untouched], table.rows[untouched]) and not torch.equal(got[1], table.rows)


@pytest.mark.parametrize("row_format", EIGHT_BITS)
def test_eight_bits_on_every_backend(row_format, backend, device):
    state, ids, grads = make_state("row", "bf16", R, 64), make_ids(40), rand(40, 64, seed=3)
    case = encoded(rand(R, 64), row_format), state, ids, grads, "adam"
    if backend == "triton":
        with pytest.raises(ValueError, match=f"row_format '{row_format}', which Triton does not encode"):
            updated_table(*case, device, backend=backend)
        return
    got, want = (updated_table(*case, where, backend=name, rounding="stochastic", seed=3)
                 for where, name in ((device, backend), ("cpu", "reference")))
    assert same_bits(got, want)


@pytest.mark.parametrize("row_format", EIGHT_BITS)
def test_eight_bits_depend_on_neither_threads_nor_shards(row_format):
    num_rows, threads, results = 2000, torch.get_num_threads(), []
    table, state = encoded(rand(num_rows, 96), row_format), make_state("element", "bf16", num_rows, 96)
    ids, grads = make_ids(3000, num_rows=num_rows), rand(3000, 96, seed=4)
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(updated_table(table, state, ids, grads, "adam", rounding="stochastic", seed=9))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(result, results[0]) for result in results[1:])
    parts = []
    for begin, end in ((0, 700), (700, 701), (701, num_rows)):
        shard = ek.RowTable.from_tensor(table.rows[begin:end], None if table.scales is None else table.scales[begin:end],
                                        row_format, row_dim=96)
        local = torch.where((ids >= begin) & (ids < end), ids - begin, -1)
        parts.append(updated_table(shard, {name: x[begin:end] for name, x in state.items()}, local, grads, "adam",
                                   rounding="stochastic", seed=9, first_row=begin)[1:])
    assert same_bits([torch.cat(pieces) for pieces in zip(*parts, strict=True)], results[0][1:])


@pytest.mark.parametrize("row_format", EIGHT_BITS)
def test_eight_bits_round_without_bias(row_format, isa):
    """The mean of many roundings of a value between two codes is the value, to five standard deviations."""
    n, row_dim = 4096, 64
    low, high, share = (64.0, 65.0, 0.3) if row_format == "int8_group32" else (64.0, 72.0, 0.3)
    values = torch.full((n, row_dim), low)
    values[:, ::32] = 127.0 if row_format == "int8_group32" else 448.0  # so that scales are 1
    table = encoded(values, row_format)
    grads = torch.full((n, row_dim), -share * (high - low))
    grads[:, ::32] = 0.0
    ek.row_update(table, torch.arange(n), grads, "sgd", lr=1.0, steps=torch.zeros(n, dtype=torch.int32), rounding="stochastic",
                  seed=1)
    now = ek.gather_rows(table, torch.arange(n), torch.float32).view(n, -1, 32)[:, :, 1:]
    assert set(now.unique().tolist()) == {low, high}
    ups = (now == high).float()
    assert abs(ups.mean() - share) < 5 * (share * (1 - share) / ups.numel()) ** 0.5
    assert ups.mean((0, 1)).std() < 0.02 and ups.mean((1, 2)).std() < 0.08  # neither rows nor columns have draws of their own


@pytest.mark.parametrize("row_format", EIGHT_BITS)
def test_eight_bits_that_are_decoded_keep_their_value(row_format, isa):
    """A row whose gradient is zero, whatever is drawn; where scales are floats, also its codes and scales."""
    n = 4096
    table = encoded(rand(n, 64) * torch.logspace(-30, 30, n)[:, None], row_format)
    steps, before = torch.zeros(n, dtype=torch.int32), table.rows.clone()
    values = ek.gather_rows(table, torch.arange(n), torch.float32)
    for _ in range(20):
        ek.row_update(table, torch.arange(n), torch.zeros(n, 64), "sgd", lr=1.0, steps=steps, rounding="stochastic", seed=1)
    assert torch.equal(ek.gather_rows(table, torch.arange(n), torch.float32), values)
    assert "block32" in row_format or torch.equal(table.rows, before)


@pytest.mark.parametrize("row_format", EIGHT_BITS)
def test_eight_bits_of_a_value_that_is_not_finite_are_nan(row_format, isa):
    """Its block alone; a byte of NaN in the table stays one."""
    table = encoded(rand(4, 64), row_format)
    first = torch.zeros(4, 64)
    first[2, 40] = -3e38
    ek.row_update(table, torch.tensor([2, 1]), torch.full((2, 64), -3e38), "sgd", lr=1.0, first=first, rounding="nearest")
    bad = ek.gather_rows(table, torch.arange(4), torch.float32).isnan()
    assert bad[2, 32:].all() and bad[2, :32].all() == (row_format == "fp8_e4m3_row") and not bad[[0, 1, 3]].any()
    again = updated_table(table, {}, torch.tensor([2]), torch.ones(1, 64), "sgd", rounding="nearest")
    want = updated_table(table, {}, torch.tensor([2]), torch.ones(1, 64), "sgd", rounding="nearest", backend="reference")
    assert same_bits(again, want)


def test_a_scale_byte_of_zero_is_read_as_the_table_says():
    codes = torch.full((2, 32), 0x38, dtype=torch.uint8)  # 1
    for zero_is_zero in (False, True):
        table = ek.RowTable.from_tensor(codes.clone(), torch.zeros(2, 1, dtype=torch.uint8), "fp8_e4m3_block32",
                                        zero_scale_is_zero=zero_is_zero)
        for backend in ("cpu", "reference"):
            got = updated_table(table, {}, torch.tensor([1]), torch.full((1, 32), -1e-38), "sgd", backend=backend)
            scale = 2.0 ** (got[2][1, 0].item() - 127)
            value = got[1][1].view(torch.float8_e4m3fn).double() * scale
            assert value[0].item() == pytest.approx(1e-39 + (0.0 if zero_is_zero else 2.0**-127), rel=0.07)
