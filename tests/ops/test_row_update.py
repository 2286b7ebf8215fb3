"""row_update: the bits of the reference, of any number of threads and of shards; what it refuses leaves every byte."""
import itertools

import pytest
import torch

import engram_kernels as ek

pytest_plugins = ["shared_worker"]
pytestmark = pytest.mark.usefixtures("compiled")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
R = 50
RULES = [("adam", second, first) for second in ("row", "element") for first in (None, "f32", "bf16")]
RULES += [("adagrad", "row", None), ("adagrad", "element", None), ("sgd", None, None), ("sgd", None, "f32")]


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_ids(*shape, num_rows=R, seed=0):
    return torch.randint(-1, num_rows, shape, generator=torch.Generator().manual_seed(seed))


def make_state(second, first, num_rows, row_dim, seed=0):
    shape = (num_rows,) if second == "row" else (num_rows, row_dim)
    return {"second": None if second is None else rand(*shape, seed=seed + 1).square(),
            "first": None if first is None else rand(num_rows, row_dim, seed=seed + 2).to(DTYPES[first]),
            "steps": torch.arange(num_rows, dtype=torch.int32) % 5}


def table_of(rows):
    return ek.RowTable.from_tensor(rows, row_format=next(name for name, dtype in DTYPES.items() if dtype == rows.dtype))


def updated(rows, state, ids, grads, rule, device="cpu", **options):
    """(squares, rows, moments ...) after one update of copies."""
    def copy(x):
        return None if x is None else x.to(device, copy=True)
    rows, state = copy(rows), {name: copy(x) for name, x in state.items()}
    out = ek.row_update(table_of(rows), ids.to(device), grads.to(device), rule, lr=0.1, **state, **options)
    ek.check_errors()
    return [x.cpu() for x in (out, rows, *state.values()) if x is not None]


@pytest.mark.parametrize("row_format", DTYPES)
@pytest.mark.parametrize(("rule", "second", "first"), RULES)
def test_bits_of_the_reference(rule, second, first, row_format, isa):
    for row_dim, rounding, step in itertools.product((1, 37, 160), ("stochastic", "nearest"), (None, 3)):
        rows, state = rand(R, row_dim).mul(1e-4 if row_format == "f16" else 1).to(DTYPES[row_format]), \
            make_state(second, first, R, row_dim)
        ids, grads = make_ids(3, 10), rand(3, 10, row_dim, seed=3).to(DTYPES["bf16" if row_dim == 160 else "f32"])
        options = dict(rounding=rounding, step=step, seed=5, grad_scale=0.7)
        got, want = (updated(rows, state, ids, grads, rule, backend=backend, **options) for backend in ("cpu", "reference"))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b), (row_dim, rounding, step)
        untouched = [r for r in range(R) if not (ids == r).any()]
        assert torch.equal(got[1][untouched], rows[untouched])


@pytest.mark.parametrize("row_format", DTYPES)
@pytest.mark.parametrize(("rule", "second", "first"), [*RULES, ("none", None, None)])
def test_bits_of_the_reference_on_every_backend(rule, second, first, row_format, backend, device):
    rows, state = rand(R, 37).mul(1e-4 if row_format == "f16" else 1).to(DTYPES[row_format]), make_state(second, first, R, 37)
    ids, grads = make_ids(3, 10), rand(3, 10, 37, seed=3)
    ids[0, :6] = 17
    options = dict(rounding="nearest" if rule == "sgd" else "stochastic", step=3 if rule == "adagrad" else None, seed=5,
                   grad_scale=0.7, first_row=9)
    got = updated(rows, state, ids, grads, rule, device, backend=backend, **options)
    want = updated(rows, state, ids, grads, rule, backend="reference", **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("row_dim", [1, 16, 68])
def test_any_width_on_every_backend(row_dim, backend, device):
    state = make_state("row", "bf16", R, row_dim)
    case = rand(R, row_dim).bfloat16(), state, make_ids(40), rand(40, row_dim, seed=3).half(), "adam"
    options = dict(rounding="stochastic", step=2**31, betas=(0.0, 0.99999))
    got, want = updated(*case, device, backend=backend, **options), updated(*case, backend="reference", **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_sums_of_squares_stand_at_the_first_position():
    ids, grads = torch.tensor([[4, -1], [7, 4]]), torch.tensor([[[3.0, 0], [9, 9]], [[1, 2], [0, 4]]])
    out = ek.row_update(table_of(torch.zeros(9, 2)), ids, grads, "none", lr=0.0)
    assert out.tolist() == [25, 0, 5, 0]


@pytest.mark.parametrize("rows_apart", [1, 3])
def test_rows_that_lie_apart(rows_apart):
    rows = rand(R, rows_apart * 8)
    table = ek.RowTable.from_tensor(rows[:, :8], row_format="f32")
    before = rows.clone()
    ek.row_update(table, torch.tensor([3, 3, 49]), torch.ones(3, 8), "sgd", lr=1.0)
    before[3, :8] -= 2
    before[49, :8] -= 1
    assert torch.equal(rows, before)


@pytest.mark.parametrize("row_format", DTYPES)
def test_same_bits_for_every_number_of_threads_and_shards(row_format):
    rows, state = rand(4000, 24).to(DTYPES[row_format]), make_state("element", "bf16", 4000, 24)
    ids, grads = make_ids(9000, num_rows=4000), rand(9000, 24, seed=4)
    ids[:3000] = 17  # one row of many positions, across the parts of several threads
    threads, results = torch.get_num_threads(), []
    try:
        for count in range(1, 9):
            torch.set_num_threads(count)
            results.append(updated(rows, state, ids, grads, "adam", rounding="stochastic", seed=9))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    for bounds in ((0, 4000), (0, 1, 17, 3999, 4000), (0, 1500, 4000)):
        parts = []
        for begin, end in itertools.pairwise(bounds):
            local = torch.where((ids >= begin) & (ids < end), ids - begin, -1)
            parts.append(updated(rows[begin:end], {name: x[begin:end] for name, x in state.items()}, local, grads, "adam",
                                 rounding="stochastic", seed=9, first_row=begin)[1:])
        for whole, pieces in zip(results[0][1:], zip(*parts, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(pieces))


@pytest.mark.parametrize("row_format", ["bf16", "f16"])
@pytest.mark.parametrize("value", [1.0, -3.1e-5, 700.0, 2.3e-7])
def test_stochastic_rounding_is_unbiased(row_format, value):
    """The mean of many roundings is the value, to five standard deviations; each is one of its two neighbours."""
    dtype, n = DTYPES[row_format], 4096
    stored = torch.tensor(value).to(dtype)
    spacing = (torch.nextafter(stored, torch.tensor(float("inf"), dtype=dtype)) - stored).float().abs()
    exact = stored.float() + 0.3 * spacing
    rows = stored.expand(n, 64).clone()
    ek.row_update(table_of(rows), torch.arange(n), (stored.float() - exact).expand(n, 64).contiguous(), "sgd", lr=1.0,
                  steps=torch.zeros(n, dtype=torch.int32), rounding="stochastic", seed=1)
    ups = ((rows.float() - stored.float()) / spacing).round()
    assert set(ups.unique().tolist()) == {0.0, 1.0}
    assert abs(ups.mean() - 0.3) < 5 * (0.3 * 0.7 / ups.numel()) ** 0.5
    assert ups.mean(0).std() < 0.02 and ups.mean(1).std() < 0.08  # neither rows nor columns have draws of their own


def test_draws_differ_by_step_and_seed():
    rows = torch.ones(1, 512, dtype=torch.bfloat16)
    seen = []
    for seed, step in ((0, 0), (0, 1), (1, 0)):
        copy = rows.clone()
        ek.row_update(table_of(copy), torch.tensor([0]), torch.full((1, 512), -2**-9), "sgd", lr=1.0, seed=seed,
                      steps=torch.tensor([step], dtype=torch.int32), rounding="stochastic")
        seen.append(copy)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


BAD = {
    "id": (dict(row_ids=torch.tensor([1, R])), IndexError, r"row_ids\[1\] is 50, expected \[0, 50\) or -1"),
    "nan": (dict(grad_rows=torch.tensor([[0.0] * 8, [0, 0, float("nan"), *[0] * 5]])), ValueError,
            r"grad_rows\[1, 2\], of row 4, is nan, expected a finite number"),
    "inf": (dict(grad_rows=torch.tensor([[0.0] * 7 + [float("-inf")], [0.0] * 8])), ValueError,
            r"grad_rows\[0, 7\], of row 1, is -inf"),
    "sum": (dict(row_ids=torch.tensor([4, 4]), grad_rows=torch.full((2, 8), 3e38)), ValueError, "gradients of row 4 sum up"),
    "spent": (dict(steps=torch.full((R,), 2**31 - 1, dtype=torch.int32)), ValueError, r"steps\[1\] is 2147483647"),
    "negative_steps": (dict(steps=torch.full((R,), -1, dtype=torch.int32)), ValueError, r"steps\[1\] is -1, expected"),
    "no_steps": (dict(steps=None), ValueError, "steps is None"),
    "no_second": (dict(second=None), ValueError, "second is None, but is needed in adam"),
    "second_shape": (dict(second=torch.zeros(R, 7)), ValueError, r"second must have shape \[50, 8\]"),
    "second_dtype": (dict(second=torch.zeros(R).double()), ValueError, "second must be torch.float32"),
    "first_dtype": (dict(first=torch.zeros(R, 8).half()), ValueError, "first must be torch.float32 or torch.bfloat16"),
    "first_of_adagrad": (dict(rule="adagrad", first=torch.zeros(R, 8)), ValueError, "no use in adagrad"),
    "grad_shape": (dict(grad_rows=torch.zeros(2, 7)), ValueError, r"grad_rows must have shape \[2, 8\]"),
    "grad_dtype": (dict(grad_rows=torch.zeros(2, 8).double()), ValueError, "grad_rows must be torch.float32"),
    "rule": (dict(rule="adamw"), ValueError, "rule is 'adamw', expected"),
    "rounding": (dict(rounding="up"), ValueError, "rounding is 'up', expected 'stochastic' or 'nearest'"),
    "lr": (dict(lr=-1.0), ValueError, "lr is -1.0, expected"), "lr_nan": (dict(lr=float("nan")), ValueError, "lr is nan"),
    "beta": (dict(betas=(0.9, 1.0)), ValueError, r"betas\[1\] is 1.0, expected \[0, 1\)"),
    "step": (dict(step=0), ValueError, "step is 0, expected at least 1"),
    "overlap": (dict(first="rows"), ValueError, "shares memory"),
    "wants_grad": (dict(grad_rows=torch.zeros(2, 8, requires_grad=True)), ValueError, "requires grad"),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_leaves_every_byte(case, backend):
    change, error, message = BAD[case]
    rows = rand(R, 8)
    state = make_state("row", "f32", R, 8)
    args = dict(row_ids=torch.tensor([1, 4]), grad_rows=rand(2, 8), rule="adam", lr=0.1, **state) | change
    if isinstance(args["first"], str):
        args["first"] = rows
    kept = [x for x in (rows, *(args[name] for name in ("second", "first", "steps"))) if x is not None]
    before = [x.clone() for x in kept]
    with pytest.raises(error, match=message):
        ek.row_update(table_of(rows), **args, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


def test_gradients_of_no_row_are_not_looked_at():
    rows = torch.zeros(3, 2)
    ek.row_update(table_of(rows), torch.tensor([-1, 2]), torch.tensor([[float("nan"), 0], [1, 1]]), "sgd", lr=1.0)
    assert rows.tolist() == [[0, 0], [0, 0], [-1, -1]]
    assert ek.row_update(table_of(rows), torch.empty(0, dtype=torch.int32), torch.empty(0, 2), "sgd", lr=1.0).shape == (0,)


def test_tables_that_cannot_be_written_are_refused(tmp_path, shm):
    args = torch.tensor([0]), torch.ones(1, 32), "sgd"
    file = ek.RowTable.create(tmp_path / "t", torch.zeros(4, 32), row_format="f32")
    with pytest.raises(ValueError, match=r"row_update: table is in the file .*read-only"):
        ek.row_update(file, *args, lr=1.0)
    shared = ek.RowTable.from_tensor(torch.zeros(4, 32), row_format="f32").share("x", directory=shm)
    with pytest.raises(ValueError, match="row_update: table is shared as 'x', which is read-only"):
        ek.row_update(shared, *args, lr=1.0)
    four = ek.RowTable.from_tensor(torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4, 1, dtype=torch.uint8), "mxfp4")
    with pytest.raises(ValueError, match="row_format 'mxfp4', expected 'f32' or .*'fp8_e4m3_row'"):
        ek.row_update(four, *args, lr=1.0)
    with pytest.raises(TypeError, match="row_update: table must be a RowTable"):
        ek.row_update(torch.zeros(4, 32), *args, lr=1.0)


def test_autograd_sees_the_write():
    rows = torch.nn.Parameter(torch.ones(3, 2))
    loss = rows.square().sum()
    ek.row_update(table_of(rows), torch.tensor([1]), torch.ones(1, 2), "sgd", lr=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    raw = torch.ops.engram_kernels.row_update
    with pytest.raises(RuntimeError, match="has no derivative"):
        raw(rows, None, torch.tensor([1]), torch.ones(1, 2), None, None, None, "f32", 2, False, "sgd", 1.0, 0.9, 0.9, 0.0, 1.0, 0,
            False, 0, 0)


def test_direct_call_is_checked():
    rows, ids, grads = torch.zeros(4, 3), torch.tensor([1]), torch.ones(1, 3)

    def call(rows=rows, ids=ids, grads=grads, second=None, first=None, steps=None, rule="sgd", lr=1.0, seed=0, scales=None,
             row_format="f32"):
        torch.ops.engram_kernels.row_update(rows, scales, ids, grads, second, first, steps, row_format, 3, False, rule, lr, 0.9,
                                            0.9, 0.0, 1.0, 0, False, seed, 0)

    for wrong in (dict(rows=rows.double()), dict(rows=rows[0]), dict(rows=rows[:1].expand(4, 3)), dict(ids=torch.tensor([4])),
                  dict(grads=grads[:, :2]), dict(second=torch.zeros(4)), dict(first=torch.zeros(3, 3)), dict(first=rows),
                  dict(steps=torch.zeros(4)), dict(rule="adam"), dict(rule="adam", second=torch.zeros(4)), dict(rule="x"),
                  dict(lr=float("nan")), dict(grads=grads * float("inf")), dict(row_format="bf16"), dict(row_format="x"),
                  dict(scales=torch.ones(4, 1)), dict(row_format="fp8_e4m3_row"),
                  dict(row_format="fp8_e4m3_tensor", rows=rows.byte(), scales=torch.ones(1)),
                  dict(row_format="fp8_e4m3_row", rows=rows.byte(), scales=torch.ones(3, 1)),
                  dict(row_format="fp8_e4m3_row", rows=rows.byte(), scales=torch.ones(4, 1).double())):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            call(**wrong)
    assert not rows.any()


def test_fakes_and_schema():
    rows, ids, grads = torch.zeros(4, 3), torch.tensor([1]), torch.ones(1, 3)
    args = (rows, None, ids, grads, torch.zeros(4), None, torch.zeros(4, dtype=torch.int32), "f32", 3, False, "adam", 1.0, 0.9,
            0.9, 0.0, 1.0, 0, False, 0, 0)
    torch.library.opcheck(torch.ops.engram_kernels.row_update.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("options", "error", "words"), [
    (dict(grad_scale=10**400), ValueError, "grad_scale is 1000"), (dict(step=torch.tensor(1.5)), TypeError, "step is tensor"),
    (dict(seed=torch.tensor(0.5)), TypeError, "seed is tensor")], ids=["scale", "step", "seed"])
def test_numbers_that_are_none_are_named(options, error, words):
    table = ek.RowTable.from_tensor(torch.ones(4, 8), row_format="f32")
    with pytest.raises(error, match=words):
        ek.row_update(table, torch.tensor([1]), torch.ones(1, 8), "sgd", lr=0.1, second=None, **options)
