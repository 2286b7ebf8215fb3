"""row_update on the PTX simulator: the launcher and its kernels against the CPU kernel, bit for bit, and what they cost."""
import itertools
import re

import pytest
import torch
from cuda_sim import MISSING_NVCC, Device, LaunchError, build
from cuda_sim.params import DTYPES, ROW_FORMATS, RowIds, RowSource, RowUpdateParams

import engram_kernels as ek
from engram_kernels.row_format import TRAINED_FORMATS
from engram_kernels.table.quantize import encode

pytestmark = pytest.mark.skipif(bool(MISSING_NVCC), reason=MISSING_NVCC)
OP = "row_update_cuda"
FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
EIGHT_BITS = [name for name in TRAINED_FORMATS if name not in FORMATS.values()]
RULES = ("none", "sgd", "adagrad", "adam")  # in the order of the C++ enum
STATES = [("adam", second, first) for second in ("row", "element") for first in (None, torch.float32, torch.bfloat16)]
STATES += [("adagrad", "row", None), ("adagrad", "element", None), ("sgd", None, None), ("sgd", None, torch.float32),
           ("sgd", None, torch.bfloat16), ("none", None, None)]
DEFAULTS = dict(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, grad_scale=0.7, step=0, stochastic=True, seed=5, first_row=3)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_ids(count, num_rows, dtype=torch.int64, seed=0):
    return torch.randint(-1, num_rows, (count,), generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_state(second, first, num_rows, row_dim, seed=0):
    """second, first and steps; beside them rows of which some are common, as a table in training has them."""
    shape = (num_rows,) if second == "row" else (num_rows, row_dim)
    return {"second": None if second is None else rand(*shape, seed=seed + 1).square(),
            "first": None if first is None else rand(num_rows, row_dim, seed=seed + 2).to(first),
            "steps": torch.arange(num_rows, dtype=torch.int32) * 7 % 5000}


def simulate(rows, ids, grads, rule, state, device=None, wide=None, row_format=None, scales=None, **options):
    """(squares, errors counted, launches); rows, scales and state are updated. wide: rows as they lie, with what is between."""
    device, options = device or Device(), DEFAULTS | options
    squares, refused, errors = torch.full((len(ids),), -1.0), torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    order, positions = ids.sort(stable=True)
    sizes = torch.full((len(ids),), float("nan"))
    at, second, first = device.address, state["second"], state["first"]
    lead = (rows.data_ptr() - wide.data_ptr()) if wide is not None else 0
    table = RowSource(
        rows=at(rows if wide is None else wide, "rows") + lead, scales=at(scales, "scales"), num_rows=len(rows),
        row_stride_bytes=rows.stride(0) * rows.element_size(),
        scale_stride_bytes=0 if scales is None else scales.stride(0) * scales.element_size(), row_dim=grads.shape[1],
        format=ROW_FORMATS.index(row_format or FORMATS[rows.dtype]), table_scale=1.0)
    params = RowUpdateParams(
        table=table, row_ids=RowIds(at(order, "ids", readonly=True), len(ids), ids.dtype == torch.int64),
        grad=at(grads, "grad", readonly=True), grad_dtype=DTYPES[grads.dtype], second=at(second, "second"),
        second_per_row=second is not None and second.dim() == 1, first=at(first, "first"),
        first_dtype=0 if first is None else DTYPES[first.dtype], steps=at(state["steps"], "steps"),
        squares=at(squares, "squares"), rule=RULES.index(rule), positions=at(positions, "positions", readonly=True),
        refused=at(refused, "refused"), sizes=at(sizes, "sizes"), error_count=at(errors, "errors"), **options)
    launches = device.run(OP, params)
    return squares, int(errors[0]), launches


def on_the_cpu(rows, ids, grads, rule, state, row_format=None, scales=None, **options):
    o = DEFAULTS | options
    table = ek.RowTable.from_tensor(rows, scales, row_format or FORMATS[rows.dtype], row_dim=grads.shape[1])
    return ek.row_update(table, ids, grads, rule, lr=o["lr"], betas=(o["beta1"], o["beta2"]), eps=o["eps"],
                         step=o["step"] or None, rounding="stochastic" if o["stochastic"] else "nearest", seed=o["seed"],
                         first_row=o["first_row"], grad_scale=o["grad_scale"], **state)


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def check(rows, ids, grads, rule, state, device=None, row_format=None, scales=None, **options):
    """Updates copies on both; asserts the same bits of everything, also of the rows that no id names."""
    def copy(x):
        return None if x is None else x.clone()
    (ours, our_scales, our_state), (theirs, their_scales, their_state) = (
        (copy(rows), copy(scales), {name: copy(x) for name, x in state.items()}) for _ in range(2))
    squares, errors, launches = simulate(ours, ids, grads, rule, our_state, device, row_format=row_format, scales=our_scales,
                                         **options)
    want = on_the_cpu(theirs, ids, grads, rule, their_state, row_format, their_scales, **options)
    pairs = {"squares": (squares, want), "rows": (ours, theirs), "scales": (our_scales, their_scales)}
    pairs |= {name: (our_state[name], their_state[name]) for name in state}
    for name, (a, b) in pairs.items():
        assert a is None or torch.equal(bits(a), bits(b)), name
    assert errors == 0
    return launches


@pytest.mark.parametrize("row_dtype", FORMATS, ids=FORMATS.values())
@pytest.mark.parametrize(("rule", "second", "first"), STATES, ids=lambda x: str(x).removeprefix("torch."))
def test_row_update_has_the_bits_of_the_cpu_kernel(rule, second, first, row_dtype):
    # groups of 8 lanes and of a warp, and by elements; gradients of every dtype
    for (row_dim, grad_dtype), stochastic in zip(((160, torch.bfloat16), (24, torch.float32), (37, torch.float16)),
                                                 (True, False, True), strict=True):
        rows = rand(30, row_dim).mul(1e-4 if row_dtype == torch.float16 else 1).to(row_dtype)
        ids, grads = make_ids(40, 30, torch.int32 if row_dim == 24 else torch.int64), rand(40, row_dim, seed=3).to(grad_dtype)
        check(rows, ids, grads, rule, make_state(second, first, 30, row_dim), stochastic=stochastic,
              device=Device(options={"cta_order": "random"}))


@pytest.mark.parametrize("row_format", EIGHT_BITS)
@pytest.mark.parametrize(("rule", "second", "first"), STATES[2:7:2] + STATES[8:10], ids=lambda x: str(x).removeprefix("torch."))
def test_row_update_encodes_rows_of_eight_bits_again(rule, second, first, row_format):
    # a row of few lanes, one of a warp and more, and one by elements, where packed rows lie apart and others have any width
    odd = 37 if row_format == "fp8_e4m3_row" else 64
    for row_dim, lead, stochastic in ((32, 0, False), (160, 0, True), (odd, 3, True)):
        values = rand(30, row_dim) * torch.logspace(-6, 6, 30)[:, None]
        values[0], values[1] = 0.0, values[1].sign() * 3.4e38
        rows, scales = encode(values, row_format)
        wide = torch.zeros(30, rows.shape[1] + lead, dtype=rows.dtype)
        wide[:, :rows.shape[1]] = rows
        apart = rows if not lead else wide if "packed" in row_format else wide[:, :rows.shape[1]]
        ids, grads = make_ids(40, 30), rand(40, row_dim, seed=3) * torch.logspace(-8, 3, 40)[:, None]
        ids[:2] = torch.arange(2)
        check(apart, ids, grads, rule, make_state(second, first, 30, row_dim), stochastic=stochastic, row_format=row_format,
              scales=scales, device=Device(options={"cta_order": "random"}))


def test_row_update_of_eight_bits_that_are_not_finite():
    for row_format in EIGHT_BITS:
        rows, scales = encode(rand(4, 64), row_format)
        state = make_state(None, torch.float32, 4, 64)
        state["first"][2, 40] = -3e38
        grads = rand(3, 64)
        grads[1, 40] = -3e38
        check(rows, torch.tensor([1, 2, 3]), grads, "sgd", state, lr=1.0, grad_scale=1.0, row_format=row_format, scales=scales)


@pytest.mark.parametrize("row_dim", [1, 4, 15, 16, 17, 32, 64, 68, 128, 260])
def test_row_update_of_every_width(row_dim):
    """The squares are summed in the same 16 parts, whatever the lanes of a group."""
    grads = rand(25, row_dim, seed=4)
    launches = check(rand(9, row_dim), make_ids(25, 9), grads, "adam", make_state("row", torch.float32, 9, row_dim))
    assert ("Li4E" in launches[0].kernel) == (row_dim % 4 == 0)


def test_row_update_sums_many_positions_of_a_row_in_their_order():
    ids = make_ids(300, 4)
    ids[:200] = 2
    check(rand(4, 64).bfloat16(), ids, rand(300, 64, seed=5), "adam", make_state("element", torch.bfloat16, 4, 64))


def test_row_update_on_few_multiprocessors_and_at_a_given_step():
    for step, rule in itertools.product((1, 12345), ("adam", "adagrad")):
        state = make_state("row", None, 400, 32)
        check(rand(400, 32).bfloat16(), make_ids(900, 400), rand(900, 32, seed=6), rule, state, step=step,
              device=Device(multiprocessors=1))


def test_row_update_of_rows_that_lie_apart_and_of_misaligned_ones():
    for begin, kind in ((8, "Li4E"), (3, "Li1E")):
        wide, state = rand(9, 40), make_state("row", torch.float32, 9, 8)
        ids, grads = make_ids(20, 9), rand(20, 8, seed=7)
        ours, theirs = wide.clone(), wide.clone()
        kept = {name: x.clone() for name, x in state.items()}
        _, errors, launches = simulate(ours[:, begin:begin + 8], ids, grads, "adam", state, wide=ours)
        on_the_cpu(theirs[:, begin:begin + 8], ids, grads, "adam", kept)
        assert torch.equal(ours, theirs) and errors == 0 and kind in launches[0].kernel
        assert all(torch.equal(state[name], kept[name]) for name in state)


def test_row_update_of_no_ids_launches_nothing_and_of_no_rows_writes_nothing():
    none = make_state(None, None, 3, 8)
    assert simulate(rand(3, 8), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 8), "sgd", none)[2] == []
    rows, before = rand(3, 8), rand(3, 8)
    squares, errors, _ = simulate(rows, torch.full((5,), -1), torch.full((5, 8), float("nan")), "sgd", none)
    assert torch.equal(rows, before) and squares.tolist() == [0.0] * 5 and errors == 0


WRONG = {  # name: (position, its id or None, its gradient or None, steps of row 4 or None), values counted
    "id": ((1, 9, None, None), 1), "negative_id": ((1, -2, None, None), 1), "far_id": ((1, 2**40, None, None), 1),
    "nan": ((2, 4, float("nan"), None), 1), "infinity": ((2, 4, float("-inf"), None), 1), "sum": ((2, 4, 3e38, None), 1),
    "spent": ((2, 4, None, 2**31 - 1), 1), "negative_steps": ((2, 4, None, -1), 1), "two": ((1, 9, float("nan"), -1), 2)}


@pytest.mark.parametrize("case", WRONG)
def test_row_update_refuses_before_it_writes(case):
    (position, row, value, steps), count = WRONG[case]
    rows, state = rand(9, 32), make_state("row", torch.float32, 9, 32)
    ids, grads = torch.tensor([0, 3, 4, 4, -1]), rand(5, 32, seed=8)
    if value is not None:
        grads[position:position + 2, 5] = value
    ids[position] = row
    state["steps"][8 if case == "two" else 4] = steps if steps is not None else 7
    kept = [rows.clone(), *(x.clone() for x in state.values())]
    squares, errors, _ = simulate(rows, ids, grads, "adam", state)
    assert errors == count and squares.isnan().all()
    assert all(torch.equal(a, b) for a, b in zip((rows, *state.values()), kept, strict=True))


def test_row_update_of_no_rule_says_that_a_gradient_is_not_finite():
    grads = torch.ones(3, 8)
    grads[1, 7] = float("inf")
    squares, errors, _ = simulate(rand(3, 8), torch.tensor([0, 1, 2]), grads, "none", make_state(None, None, 3, 8))
    assert errors == 1 and squares.isnan().all()


def test_row_update_rejects():
    with pytest.raises(LaunchError, match="second is needed"):
        simulate(rand(3, 8), torch.tensor([0]), rand(1, 8), "adam", make_state(None, None, 3, 8))


# ---- what it costs ---------------------------------------------------------------------------------------------------

ROWS, DIM = 400, 256


@pytest.fixture(scope="module")
def cost():
    """Launches of one update of distinct rows in random order, and of twelve again; and the ids."""
    ids = torch.cat([torch.randperm(ROWS, generator=torch.Generator().manual_seed(12)), torch.arange(12)])
    state = make_state("row", torch.bfloat16, ROWS, DIM)
    return simulate(rand(ROWS, DIM).bfloat16(), ids, rand(len(ids), DIM, seed=9), "adam", state)[2], ids


def test_row_update_moves_each_byte_once_a_kernel(cost):
    (sums, update), ids = cost
    for launch in (sums, update):
        read = launch.result.buffers["grad"]
        assert read["load_bytes"] == len(ids) * DIM * 4 and read["load_sectors"] == read["load_bytes"] // 32
    for name in ("rows", "first"):
        moved = update.result.buffers[name]
        assert moved["load_bytes"] == moved["store_bytes"] == ROWS * DIM * 2
        assert moved["load_sectors"] == moved["store_sectors"] == ROWS * DIM * 2 // 32
        assert name not in sums.result.buffers
    assert update.result.buffers["second"]["store_bytes"] == update.result.buffers["steps"]["store_bytes"] == ROWS * 4


def test_row_update_loads_and_stores_vectors(cost):
    (_, update), _ = cost
    wide = [line for line in update.result.lines if line["space"] == "global" and line["bytes"] in
            (16 * line["threads"], 8 * line["threads"]) and "v" in line["text"]]
    moved = sum(update.result.buffers[name][kind] for name in ("rows", "first") for kind in ("load_bytes", "store_bytes"))
    assert sum(line["bytes"] for line in wide) == moved + update.result.buffers["grad"]["load_bytes"]


def test_row_update_uses_no_local_and_no_shared_memory():
    usages = build().usage(OP)
    assert len(usages) == 6 + 36
    for name, usage in usages.items():
        assert (usage.stack_bytes, usage.spill_bytes, usage.static_shared_bytes) == (0, 0, 0), name
        assert usage.registers <= (80 if re.search("row_update_kernel", name) else 64), name
