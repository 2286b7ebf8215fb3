"""Gather and gate in one pass: rows of a table straight into the hidden state."""
import torch
from torch import Tensor

from engram_kernels import _transforms, backends
from engram_kernels._checks import (
    FLOAT_DTYPES,
    expect_one_device,
    expect_tensor,
    mark_written,
    no_second_derivative,
    refuse_forward_ad,
    wants_grad,
)
from engram_kernels._library import LIB
from engram_kernels.ops.gate import check_options, check_out, is_compiling, runs_compiled
from engram_kernels.ops.gather_rows import readable_only_on
from engram_kernels.reference.gather_gate import gather_gate as _reference
from engram_kernels.table.row_table import FLOAT_FORMATS, RowTable
from engram_kernels.triton_runtime.dispatch import register_autograd

_INPUTS = ("Tensor hidden, Tensor rows, Tensor? scales, Tensor row_ids, Tensor w_hidden, Tensor w_key, Tensor? mask, "
           "str row_format, int row_dim, bool zero_scale_is_zero, float eps, float clamp, str zero_sign, bool add_residual")
LIB.define(f"gather_gate({_INPUTS}) -> Tensor")
LIB.define(f"gather_gate.out({_INPUTS}, *, Tensor(a!) out) -> ()")
LIB.define(f"gather_gate_bwd(Tensor grad_out, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")

@torch.library.register_fake("engram_kernels::gather_gate", lib=LIB)
def _fake(hidden, rows, scales, row_ids, w_hidden, w_key, mask, *options):
    expect_one_device("gather_gate", hidden, row_ids, w_hidden, w_key, mask, *readable_only_on(hidden, rows))
    return hidden.new_empty(hidden.shape)


@torch.library.register_fake("engram_kernels::gather_gate.out", lib=LIB)
def _fake_out(*args, out):
    return None


@torch.library.register_fake("engram_kernels::gather_gate_bwd", lib=LIB)
def _fake_bwd(grad_out, hidden, rows, scales, row_ids, w_hidden, w_key, mask, row_format, row_dim, *options):
    return (hidden.new_empty(hidden.shape), hidden.new_empty((*row_ids.shape, row_dim)), w_hidden.new_empty(w_hidden.shape),
            w_key.new_empty(w_key.shape))


def gather_gate(hidden: Tensor, table: RowTable, row_ids: Tensor, w_hidden: Tensor, w_key: Tensor,
                mask: Tensor | None = None, *, eps: float = 1e-6, clamp: float = 1e-6, zero_sign: str = "copysign",
                add_residual: bool = True, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Gathers each token's rows and gates them into every branch of its hidden state, in one pass.

    ``e[t] = concat(table[row_ids[t, 0]], ..., table[row_ids[t, C-1]])``, dequantized to float32, and
    ``out[t] = gate(hidden[t], key=e[t], value=e[t])`` with the formula of `gate`. The rows are read once and `e` is not
    rounded: the one rounding is that of the output. `gather_rows` then `gate` differ by the rounding of `e` to the dtype
    of `hidden`, which is none for rows of that dtype.

    Args:
        hidden: [T, M, H] bfloat16, float16 or float32. The last dimension is dense, the strides of the others are free.
        table: rows of `table.row_dim` elements, C * row_dim == H; any row format. From a file, the rows are read first.
        row_ids: [T, C] int32 or int64, any strides. -1 is a row of zeros. Those of masked tokens are not looked at.
        w_hidden: [M, H] contiguous, norm weight of hidden; float32 or the dtype of `hidden`.
        w_key: [M, H] contiguous, norm weight of `e` in each branch, of the dtype of `w_hidden`.
        mask: [T] bool, contiguous; True = masked (dead): hidden passes bit for bit, no row is read. None: no token is.
        eps: added to the mean squares; >= 0.
        clamp: least |x| under the square root; > 0. Inside the clamp the derivative of the score is 0.
        zero_sign: sign of the score where x is 0: "copysign" (that of the zero) or "sign" (the score is 0).
        add_residual: False gives the update alone; masked tokens are then zeros.
        out: [T, M, H] of the dtype of `hidden`, contiguous, written instead of a new tensor. May be `hidden` itself (in
            place); any other overlap with an input is an error. Not with inputs that require grad.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        [T, M, H] contiguous, dtype and device of `hidden`; `out` when given. T = 0 gives an empty tensor. Gradients reach
        hidden, w_hidden, w_key and, in formats f32, bf16 and f16, `table.rows` (rounded to the dtype of `hidden`, then
        summed by `gather_rows_bwd`).

    Raises:
        TypeError: an argument is no tensor, or `table` no RowTable.
        ValueError: a shape, dtype, device, stride or option is wrong, or `out` overlaps an input.
        IndexError: a row id is out of range; names the position and the value, nothing is written.
        RuntimeError: the named backend is not available.
        NotImplementedError: forward-mode or second derivatives of a compiled backend; the reference has both.

    Source: arXiv 2601.07372 section 2.
    """
    if not isinstance(table, RowTable):
        raise TypeError(f"gather_gate: table must be a RowTable, got {type(table).__name__}")
    options = (eps, clamp, zero_sign, add_residual)
    if backend in ("auto", "cpu") and table.tier != "file" and runs_compiled(hidden, table.rows, row_ids, w_hidden, w_key, mask):
        try:  # the binding checks all that _check does
            return _compiled(*_op_args(hidden, table, row_ids, w_hidden, w_key, mask), *options, out=out)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            pass  # below, in better words
    _check(hidden, table, row_ids, w_hidden, w_key, mask, out)
    check_options("gather_gate", eps, clamp, zero_sign)
    run = backends.select("gather_gate", hidden.device, backend)
    if table.tier == "file" and mask is not None:
        row_ids = row_ids.masked_fill(mask[:, None], -1)
    table, row_ids = table.stage(row_ids.contiguous())
    return run(*_op_args(hidden, table, row_ids, w_hidden, w_key, mask), *options, out=out)


def _op_args(hidden, table, row_ids, w_hidden, w_key, mask):
    rows = table.rows
    if rows.requires_grad and table.row_format not in FLOAT_FORMATS:
        raise ValueError(f"gather_gate: rows of format {table.row_format} have no gradient, but table.rows requires it")
    return (hidden, rows, table.scales, row_ids, w_hidden, w_key, mask, table.row_format, table.row_dim,
            table.zero_scale_is_zero)


def _check(hidden, table, row_ids, w_hidden, w_key, mask, out):
    op = "gather_gate"
    expect_tensor(op, "hidden", hidden, FLOAT_DTYPES, ("T", "M", "H"), dense_dims=1)
    tokens, branches, size = hidden.shape
    device, dtype = hidden.device, hidden.dtype
    if branches == 0 or size == 0:
        raise ValueError(f"{op}: hidden must have at least one branch of at least one element, got {list(hidden.shape)}")
    if table.device_for(hidden) != device:
        raise ValueError(f"{op}: table must be on {device}, got {table.device}")
    expect_tensor(op, "row_ids", row_ids, (torch.int32, torch.int64), (tokens, "C"), device)
    if row_ids.shape[1] * table.row_dim != size:
        raise ValueError(f"{op}: row_ids has {row_ids.shape[1]} columns of rows of {table.row_dim} elements, which do not make "
                         f"the hidden size, {size}")
    expect_tensor(op, "w_hidden", w_hidden, (dtype, torch.float32), (branches, size), device, dense_dims=2)
    expect_tensor(op, "w_key", w_key, (w_hidden.dtype,), (branches, size), device, dense_dims=2)
    if mask is not None:
        expect_tensor(op, "mask", mask, (torch.bool,), (tokens,), device, dense_dims=1)
    if out is not None:
        expect_tensor(op, "out", out, (dtype,), (tokens, branches, size), device, dense_dims=3)


def _compiled(*args, out=None):
    inputs = (args[0], args[1], args[4], args[5])
    refuse_forward_ad("gather_gate")
    if out is not None:
        check_out("gather_gate", out, inputs)
        torch.ops.engram_kernels.gather_gate.out(*args, out=out)
        mark_written(out)
        return out
    if _transforms.active():
        return _transforms.call(torch.ops.engram_kernels.gather_gate.default, *args)
    if is_compiling() or wants_grad(*inputs):
        return torch.ops.engram_kernels.gather_gate.default(*args)
    with torch._C._AutoDispatchBelowAutograd():  # the Python autograd wrapper costs as much as the rest of the dispatch
        return torch.ops.engram_kernels.gather_gate.default(*args)


def _check_data(*args):
    _, rows, _, row_ids, _, _, mask, *_ = args
    wrong = (row_ids < -1) | (row_ids >= rows.shape[0])
    wrong = wrong if mask is None else wrong & ~mask[:, None]
    if wrong.any():
        t, c = wrong.nonzero()[0].tolist()
        raise IndexError(f"gather_gate: row_ids[{t}, {c}] is {row_ids[t, c].item()}, expected [0, {rows.shape[0]}) or -1 "
                         "(no row)")


def _checked_reference(*args, out=None):
    check_out("gather_gate", out, (args[0], args[1], args[4], args[5]))
    _check_data(*args)
    result = _reference(*args)
    return result if out is None else out.copy_(result)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _backward(ops, ctx, grad_out):
    if grad_out.stride(-1) != 1:  # as from .sum(), whose gradient is one element with strides 0
        grad_out = grad_out.contiguous()
    _, rows, _, row_ids, _, _, mask = ctx.saved_tensors
    grad_hidden, grad_rows, grad_w_hidden, grad_w_key = ops.gather_gate_bwd.default(grad_out, *ctx.saved_tensors, *ctx.options)
    grad_table = None
    if ctx.needs_input_grad[1]:
        ids = row_ids if mask is None else row_ids.masked_fill(mask[:, None], -1)
        grad_table = ops.gather_rows_bwd.default(grad_rows, ids.contiguous(), rows.shape[0], rows.dtype)
    return (grad_hidden, grad_table, None, None, grad_w_hidden, grad_w_key, *(None,) * 8)


register_autograd("gather_gate", _backward, _setup_context, LIB)
register_autograd("gather_gate_bwd", no_second_derivative("gather_gate"), None, LIB)
backends.register_op("gather_gate", _checked_reference, _compiled, check_data=_check_data, in_place="hidden")
