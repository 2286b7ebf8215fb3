"""Update rows of a table in place by their gradients: one step of SGD, Adagrad or Adam for the rows that ids name."""
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor
from torch.compiler import is_compiling

from engram_kernels import _modes, _transforms
from engram_kernels._checks import FLOAT_DTYPES, expect_choice, expect_int, expect_tensor
from engram_kernels._files import shorten
from engram_kernels._library import LIB
from engram_kernels.ops._op import Op, refuse_table
from engram_kernels.reference.row_update import row_update as _reference
from engram_kernels.row_format import ROW_FORMATS, TRAINED_FORMATS
from engram_kernels.table.held_tables import expect_not_held
from engram_kernels.table.row_ids import check_row_ids, expect_row_ids
from engram_kernels.table.row_table import RowTable

RULES = ("adam", "adagrad", "sgd", "none")
ROUNDINGS = ("stochastic", "nearest")
FLOAT_MAX = torch.finfo(torch.float32).max
MAX_ROW = 2**62


def row_update(table: RowTable, row_ids: Tensor, grad_rows: Tensor, rule: str = "adam", *, lr: float,
               betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, second: Tensor | None = None,
               first: Tensor | None = None, steps: Tensor | None = None, step: int | None = None, rounding: str = "nearest",
               seed: int = 0, first_row: int = 0, grad_scale: float | Tensor = 1.0, out: Tensor | None = None,
               backend: str = "auto") -> Tensor:
    """One step of an optimizer, in place, on the rows of `table` that `row_ids` names, each once.

    The gradients of a row are summed in float32 in the order of the positions. Rows that no id names, and their moments, keep
    every bit. Arithmetic is in float32, and results are the same bits for any number of threads and on every instruction set.
    Everything is checked before the first write. `RowOptimizer` keeps the moments and calls this.

    A row of eight bits is decoded, updated in float32 and encoded again. A block of it that holds a value which is not finite
    after its update is NaN from then on.

    On a GPU the data is checked there: where it is wrong no row and no moment is written, every element that is returned is NaN,
    and `check_errors` raises later.

    Args:
        table: in memory, of format f32, bf16, f16, fp8_e4m3_block32, fp8_e4m3_block32_packed, fp8_e4m3_row or int8_group32,
            not shared and not in a file. Triton has the first three.
        row_ids: int32 or int64, any shape, contiguous; -1 (no row: its gradient is not looked at) or in [0, table.num_rows).
        grad_rows: [*row_ids.shape, D] float32, bfloat16 or float16, contiguous.
        rule: "adam", "adagrad" or "sgd", as docs/ops.md writes them; "none": nothing but `out` is written.
        lr: learning rate, at least 0.
        betas: of adam, each in [0, 1); the first is the momentum of sgd with `first`.
        eps: at least 0, added to the root of the second moment.
        second: float32 [R, D], or [R] for one second moment per row, updated. adam and adagrad need it.
        first: float32 or bfloat16 [R, D], updated; None: the gradient takes its place. Not with adagrad.
        steps: int32 [R], how many updates each row has had, updated. Needed for adam where `step` is None, and for stochastic
            rounding of rows or moments that are not float32.
        step: which step this is, from 1 on, for the bias correction of adam; None: each row's own.
        rounding: "stochastic" (up with the probability of what is cut off, by bits from seed, row, step and element), or
            "nearest".
        seed: of those bits, in [0, 2^63).
        first_row: number of row 0 in the whole table, where this one is a shard; then a shard rounds as the whole table.
        grad_scale: factor on the summed gradients, such as that of clipping: a number, or a tensor of one element.
        out: float32 [n], written instead of a new tensor; n: number of ids.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        float32 [n]: the sum of squares of the summed, scaled gradient of a row at the position of its first id; 0 elsewhere.

    Raises:
        TypeError: an argument is no tensor, no RowTable or no number.
        ValueError: a shape, dtype, device or stride is wrong, an option is out of range, a tensor that is written requires grad
            or shares memory with another, the table cannot be written, or a gradient is NaN or infinite, which names the row
            (not on a GPU).
        IndexError: an id is neither -1 nor in [0, num_rows) (not on a GPU).
        RuntimeError: the named backend is not available.

    Source: docs/ops.md, "row_update"; Adam as torch.optim.SparseAdam, Adagrad as torch.optim.Adagrad.
    """
    if not isinstance(table, RowTable):
        refuse_table("row_update", table)
    expect_writable("row_update", table)
    expect_choice("row_update", "rounding", rounding, ROUNDINGS)
    step = 0 if step is None else expect_int("row_update", "step", step, 1, MAX_ROW)
    expect_int("row_update", "seed", seed, 0, 2**63 - 1)
    expect_int("row_update", "first_row", first_row, 0, MAX_ROW)
    beta1, beta2 = check_rates("row_update", lr, betas, eps)
    grad_scale = _number("row_update", grad_scale)
    rows = table.rows.detach() if table.rows.requires_grad else table.rows
    return _OP.call(backend, (rows, table.scales, row_ids, grad_rows, second, first, steps, table.row_format,
                              table.row_dim, table.zero_scale_is_zero, rule, lr, beta1, beta2, eps, grad_scale, step,
                              rounding == "stochastic", seed, first_row), out)


def update_named(table: RowTable, row_ids: Tensor, grad_rows: Tensor, row_names: Tensor, rule: str, *, lr: float,
                 betas: tuple[float, float], eps: float, second: Tensor | None, first: Tensor | None, steps: Tensor | None,
                 step: int | None, rounding: str, seed: int, grad_scale: float | Tensor) -> Tensor:
    """`row_update` of n rows out of a larger table, on the CPU, in place: with the bits that it would give there.

    Args:
        table: those that the step updates, in memory.
        row_ids: places in `table`, or -1.
        row_names: int64 [n], what the rows are called in the table: it decides how they are rounded.

    The others are those of `row_update`; moments and steps are of these rows, n instead of R.

    Returns, Raises: as `row_update`.
    """
    beta1, beta2 = check_rates("row_update", lr, betas, eps)
    return torch.ops.engram_kernels.row_update_named(  # type: ignore[no-any-return]
        table.rows, table.scales, row_ids, grad_rows, row_names, second, first, steps, table.row_format, table.row_dim,
        table.zero_scale_is_zero, rule, lr, beta1, beta2, eps, _number("row_update", grad_scale), 0 if step is None else step,
        rounding == "stochastic", seed)


def _number(op: str, grad_scale: float | Tensor) -> float:
    if type(grad_scale) is not float:
        grad_scale = grad_scale.item() if isinstance(grad_scale, Tensor) and grad_scale.numel() == 1 else grad_scale
        if not isinstance(grad_scale, Real):
            raise TypeError(f"{op}: grad_scale is {grad_scale!r}, expected a number")
    if not abs(grad_scale) <= FLOAT_MAX:
        raise ValueError(f"{op}: grad_scale is {shorten(str(grad_scale))}, expected a number that float32 holds")
    return float(grad_scale)


def expect_trained_format(op: str, table: RowTable) -> None:
    """Raises ValueError where rows of such a format cannot be updated."""
    if table.row_format not in TRAINED_FORMATS:
        raise ValueError(f"{op}: table has row_format {table.row_format!r}, expected {' or '.join(map(repr, TRAINED_FORMATS))}")


def expect_writable(op: str, table: RowTable) -> None:
    """Raises ValueError unless the rows of `table` are in memory of this process that may be written, and of a trained format."""
    expect_trained_format(op, table)
    if not table.in_memory:
        where = f"in the file {table.path}" if table.tier == "file" else f"at {table.address}"
        raise ValueError(f"{op}: table is {where}, which is read-only; expected one in memory")
    if hasattr(table._memory, "num_users"):
        raise ValueError(f"{op}: table is shared as {table._memory.name!r}, which is read-only; expected one of this "
                         "process, or of a tensor after share_memory_(), whose rows other processes see change")
    rows, found_at = table.rows, getattr(table, "_writable_at", None)
    if is_compiling() or (found_at is None and (not rows.is_cpu or rows.numel() == 0 or _transforms.active()
                                                or _modes.fake_mode_of(rows) is not None)):
        return
    expect_not_held(op, rows)
    if found_at != rows.data_ptr():
        _expect_writable_memory(op, "rows", rows)
        if table.scales is not None:
            _expect_writable_memory(op, "scales", table.scales)
        object.__setattr__(table, "_writable_at", rows.data_ptr())  # looked up once


def _expect_writable_memory(op: str, name: str, stored: Tensor) -> None:
    """Raises ValueError where the memory of `stored` is mapped read-only, as that of a file is: a write would be a fault."""
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else ():
        begin, _, end = line.split(" ", 1)[0].partition("-")
        if int(begin, 16) <= stored.data_ptr() < int(end, 16):
            if line.split()[1][1] != "w":
                raise ValueError(f"{op}: table.{name} lies in memory that is mapped read-only ({line.split()[-1]}); expected "
                                 "rows that can be written, as RowTable.from_tensor(.., copy=True) makes them")
            return


def _check(args, out):
    op = "row_update"
    weight, scales, row_ids, grad_rows, second, first, steps, row_format, row_dim, _, rule = args[:11]
    step, stochastic = args[16:18]  # the other numbers are checked before the call
    fmt = ROW_FORMATS[row_format]
    expect_tensor(op, "table.rows", weight, (fmt.dtype,), ("R", "width" if fmt.is_packed else row_dim), dense_dims=1)
    num_rows = weight.shape[0]
    if row_dim == 0 or (num_rows > 1 and weight.stride(0) < weight.shape[1]):
        raise ValueError(f"{op}: table.rows has shape {list(weight.shape)} and strides {list(weight.stride())}, expected rows "
                         "that do not share memory, of at least one element")
    expect_row_ids(op, row_ids, weight.device)
    if (shape := fmt.scale_shape(num_rows, row_dim)) is not None:
        expect_tensor(op, "table.scales", scales, (fmt.scale_dtype,), shape, weight.device, dense_dims=1)
    expect_tensor(op, "grad_rows", grad_rows, FLOAT_DTYPES, (*row_ids.shape, row_dim), weight.device, row_ids.dim() + 1)
    expect_choice(op, "rule", rule, RULES)
    if second is not None:
        shape = (num_rows,) if isinstance(second, Tensor) and second.dim() == 1 else (num_rows, row_dim)
        expect_tensor(op, "second", second, (torch.float32,), shape, weight.device, len(shape))
    if first is not None:
        expect_tensor(op, "first", first, (torch.float32, torch.bfloat16), (num_rows, row_dim), weight.device, 2)
    if steps is not None:
        expect_tensor(op, "steps", steps, (torch.int32,), (num_rows,), weight.device, 1)
    if out is not None:
        expect_tensor(op, "out", out, (torch.float32,), (row_ids.numel(),), weight.device, 1)
    if rule == "none":
        return
    if (second is not None) != (rule in ("adam", "adagrad")):
        raise ValueError(f"{op}: second is {'given, but has no use' if second is not None else 'None, but is needed'} in {rule}")
    if first is not None and rule == "adagrad":
        raise ValueError(f"{op}: first is given, but has no use in adagrad")
    rounds = any(x is not None and x.dtype != torch.float32 for x in (weight, first))
    if steps is None and ((rule == "adam" and step == 0) or (stochastic and rounds)):
        raise ValueError(f"{op}: steps is None, expected the steps of each row: for the bias correction, or to round "
                         "stochastically")


def check_rate(op: str, name: str, value: object, below_one: bool = False) -> None:
    """Raises TypeError or ValueError unless `value` is a number of at least 0 that float32 holds, or in [0, 1)."""
    if not isinstance(value, (float, int)):
        raise TypeError(f"{op}: {name} is {value!r}, expected a number")
    if not 0 <= value <= FLOAT_MAX or (below_one and value >= 1):
        raise ValueError(f"{op}: {name} is {value}, expected "
                         f"{'[0, 1)' if below_one else 'a finite number of at least 0 that float32 holds'}")


def check_rates(op: str, lr: object, betas: object, eps: object) -> tuple[float, float]:
    """Raises TypeError or ValueError unless these are the rates of an optimizer; returns both betas."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{op}: betas is {betas!r}, expected two numbers")
    beta1, beta2 = betas
    if not (type(lr) is type(eps) is type(beta1) is type(beta2) is float
            and 0 <= lr <= FLOAT_MAX and 0 <= eps <= FLOAT_MAX and 0 <= beta1 < 1 and 0 <= beta2 < 1):
        check_rate(op, "lr", lr)  # a microsecond, which a small step would notice
        check_rate(op, "eps", eps)
        check_rate(op, "betas[0]", beta1, below_one=True)
        check_rate(op, "betas[1]", beta2, below_one=True)
    return beta1, beta2


def _check_data(weight, scales, row_ids, grad_rows, second, first, steps, row_format, row_dim, zero_scale_is_zero, rule,
                *options):
    op, ids = "row_update", row_ids.flatten()
    check_row_ids(op, row_ids, weight.shape[0])
    grads = grad_rows.reshape(ids.numel(), row_dim)
    wrong = ~grads.isfinite() & (ids != -1)[:, None]
    if wrong.any():
        position, element = wrong.nonzero()[0].tolist()
        raise ValueError(f"{op}: grad_rows[{position}, {element}], of row {ids[position].item()}, is "
                         f"{grads[position, element].item()}, expected a finite number")
    present = ids[ids != -1].long()
    rows, inverse = torch.unique(present, return_inverse=True)
    sums = grads.new_zeros(rows.numel(), row_dim, dtype=torch.float32)
    grad_scale = options[4]
    sums = sums.index_add_(0, inverse, grads[ids != -1].float()) * grad_scale
    if not sums.isfinite().all():
        row = rows[(~sums.isfinite()).any(1)][0].item()
        raise ValueError(f"{op}: the gradients of row {row} sum up to more than float32 holds")
    if steps is not None and rule != "none":
        spent = (steps[rows] < 0) | (steps[rows] == 2**31 - 1)
        if spent.any():
            row = rows[spent][0].item()
            raise ValueError(f"{op}: steps[{row}] is {steps[row].item()}, expected [0, {2**31 - 1})")


def _empty(weight, scales, row_ids, *options):
    return weight.new_empty(row_ids.numel(), dtype=torch.float32)


_NUMBERS = ("str row_format, int row_dim, bool zero_scale_is_zero, str rule, float lr, float beta1, float beta2, float eps, "
            "float grad_scale, int step, bool stochastic, int seed")
LIB.define("row_update_named(Tensor(a!) weight, Tensor(b!)? scales, Tensor row_ids, Tensor grad_rows, Tensor row_names, "
           f"Tensor(c!)? second, Tensor(d!)? first, Tensor(e!)? steps, {_NUMBERS}) -> Tensor")
torch.library.register_fake("engram_kernels::row_update_named", _empty, lib=LIB)
_OP = Op("row_update", "Tensor(a!) weight, Tensor(b!)? scales, Tensor row_ids, Tensor grad_rows, Tensor(c!)? second, "
         f"Tensor(d!)? first, Tensor(e!)? steps, {_NUMBERS}, int first_row", empty=_empty, reference=_reference, check=_check,
         check_data=_check_data, differentiable=("weight", "grad_rows"),
         writes=("weight", "scales", "second", "first", "steps"))
