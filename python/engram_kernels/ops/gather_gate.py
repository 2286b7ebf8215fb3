"""Gather and gate in one pass: rows of a table straight into the hidden state."""
from torch import Tensor

from engram_kernels._checks import expect_tensor
from engram_kernels.ops._op import Op, refuse_table
from engram_kernels.ops.gate import check_options, empty_like_hidden, expect_hidden, expect_weights_mask_out
from engram_kernels.reference.gather_gate import gather_gate as _reference
from engram_kernels.table.row_ids import ROW_ID_DTYPES, check_row_ids
from engram_kernels.table.row_table import RowTable


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
        refuse_table("gather_gate", table)
    args = (hidden, table.rows, table.scales, dense(row_ids), w_hidden, w_key, mask, table.row_format, table.row_dim,
            table.zero_scale_is_zero, eps, clamp, zero_sign, add_residual, table.table_scale)
    return _OP.call(backend, args, out, table)


def dense(row_ids: Tensor) -> Tensor:
    """`row_ids`, contiguous as the kernels read them; what is no tensor as it is, for `check` to refuse."""
    return row_ids.contiguous() if isinstance(row_ids, Tensor) and not row_ids.is_contiguous() else row_ids


def expect_ids_of_tokens(op: str, hidden: Tensor, table: RowTable | None, row_ids: Tensor) -> int:
    """C; raises unless `row_ids` is [T, C] on the device of `hidden`, which can read `table` if there is one."""
    if table is not None and table.device_for(hidden) != hidden.device:
        raise ValueError(f"{op}: table must be on {hidden.device}, got {table.device}")
    expect_tensor(op, "row_ids", row_ids, ROW_ID_DTYPES, (hidden.shape[0], "C"), hidden.device)
    return row_ids.shape[1]


def _check(args, out, table):
    op = "gather_gate"
    hidden, _, _, row_ids, w_hidden, w_key, mask, _, row_dim, _, eps, clamp, zero_sign, add_residual, *_ = args
    size = expect_hidden(op, hidden)[2]
    columns = expect_ids_of_tokens(op, hidden, table, row_ids)
    if columns * row_dim != size:
        raise ValueError(f"{op}: row_ids has {columns} columns of rows of {row_dim} elements, which do not make the hidden size, "
                         f"{size}")
    expect_weights_mask_out(op, hidden, w_hidden, w_key, mask, out)
    check_options(op, eps, clamp, zero_sign, add_residual)


def _check_data(hidden, rows, scales, row_ids, w_hidden, w_key, mask, *options):
    check_row_ids("gather_gate", row_ids, rows.shape[0], mask=mask)


def _fake_bwd(grad_out, hidden, rows, scales, row_ids, w_hidden, w_key, mask, row_format, row_dim, *options):
    return (hidden.new_empty(hidden.shape), hidden.new_empty((*row_ids.shape, row_dim)), w_hidden.new_empty(w_hidden.shape),
            w_key.new_empty(w_key.shape))


def sum_rows(ops, ctx, grad_hidden, grad_rows, *grads):
    """The gradients, those of each position's row summed to that of the table where it is needed."""
    _, rows, _, row_ids, *_, mask = ctx.saved_tensors
    if ctx.needs_input_grad[1]:
        ids = row_ids if mask is None else row_ids.masked_fill(mask[:, None], -1)
        grad_rows = ops.gather_rows_bwd.default(grad_rows, ids.contiguous(), rows.shape[0], rows.dtype)
    return grad_hidden, grad_rows, *grads


_OP = Op("gather_gate", "Tensor hidden, Tensor rows, Tensor? scales, Tensor row_ids, Tensor w_hidden, Tensor w_key, "
         "Tensor? mask, str row_format, int row_dim, bool zero_scale_is_zero, float eps, float clamp, str zero_sign, "
         "bool add_residual, float table_scale=1.0",
         empty=empty_like_hidden, reference=_reference, check=_check, check_data=_check_data,
         differentiable=("hidden", "rows", "w_hidden", "w_key"), in_place="hidden")
_OP.derive("(Tensor, Tensor, Tensor, Tensor)", _fake_bwd, finish=sum_rows)
