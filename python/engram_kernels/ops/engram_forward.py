"""The whole memory layer in one op: rows of a table, projected to keys and a value, gated into the hidden state."""
import torch
from torch import Tensor

from engram_kernels import _steps
from engram_kernels._checks import expect_tensor
from engram_kernels._library import LIB
from engram_kernels.ops._op import Op, refuse_table
from engram_kernels.ops.gate import check_options, empty_like_hidden, expect_hidden, expect_weights_mask_out
from engram_kernels.ops.gather_gate import dense, expect_ids_of_tokens, sum_rows
from engram_kernels.reference.engram_forward import engram_forward as _reference
from engram_kernels.table.row_ids import check_row_ids
from engram_kernels.table.row_table import RowTable

OPS = torch.ops.engram_kernels


def engram_forward(hidden: Tensor, table: RowTable, row_ids: Tensor, w_kv: Tensor, w_hidden: Tensor, w_key: Tensor,
                   mask: Tensor | None = None, *, eps: float = 1e-6, clamp: float = 1e-6, zero_sign: str = "copysign",
                   add_residual: bool = True, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Gathers each token's rows, projects them to a key a branch and a value, and gates the value into the hidden state.

    ``e[t] = concat(table[row_ids[t, 0]], ..., table[row_ids[t, C-1]])``, dequantized and rounded to the dtype of `hidden`;
    ``[key_0 .. key_{M-1}, value] = e @ w_kv.T`` in float32, and ``out = gate(hidden, key, value)`` with the formula of
    `gate`. Keys and value are rounded to the dtype of `hidden`, as a matrix product gives them, and held for some tokens at a
    time: 256 on the CPU, 1,664 on a GPU. The product is torch's, with torch's settings for products.

    Differentiable by recomputing: nothing but the inputs is saved, and the backward has keys and value of 1,664 tokens at a time.

    Args:
        hidden: [T, M, H] bfloat16, float16 or float32. The last dimension is dense, the strides of the others are free.
        table: rows of `table.row_dim` elements; any row format. From a file, the rows are read first.
        row_ids: [T, C] int32 or int64, any strides. -1 is a row of zeros. Those of masked tokens are not looked at.
        w_kv: [(M+1)*H, C*row_dim] contiguous, dtype of `hidden`: the weight of a Linear whose output is the M keys, then the
            value, as `Engram.wkv` has it.
        w_hidden: [M, H] contiguous, norm weight of hidden; float32 or the dtype of `hidden`.
        w_key: [M, H] contiguous, norm weight of the keys, of the dtype of `w_hidden`.
        mask: [T] bool, contiguous; True = masked (dead): hidden passes bit for bit, no row is read. None: no token is.
        eps: added to the mean squares; >= 0.
        clamp: least |x| under the square root; > 0.
        zero_sign: sign of the score where x is 0: "copysign" (that of the zero) or "sign" (the score is 0).
        add_residual: False gives the update alone; masked tokens are then zeros.
        out: [T, M, H] of the dtype of `hidden`, contiguous, written instead of a new tensor. May be `hidden` itself (in
            place); any other overlap with an input is an error. Not with inputs that require grad.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        [T, M, H] contiguous, dtype and device of `hidden`; `out` when given. T = 0 gives an empty tensor. Gradients reach
        hidden, w_kv, w_hidden, w_key and, in formats f32, bf16 and f16, `table.rows` (as in `gather_rows`).

    Raises:
        TypeError: an argument is no tensor, or `table` no RowTable.
        ValueError: a shape, dtype, device, stride or option is wrong, or `out` overlaps an input.
        IndexError: a row id is out of range; names the position and the value, nothing is written. On a GPU
            such an id gives zeros, and `check_errors` raises later, for `gather_rows`.
        RuntimeError: the named backend is not available.
        NotImplementedError: forward-mode or second derivatives of a compiled backend; the reference has both.

    Source: arXiv 2601.07372 section 2; the published DeepSeek-V4.1 model code (wkv without bias).
    """
    if not isinstance(table, RowTable):
        refuse_table("engram_forward", table)
    args = (hidden, table.rows, table.scales, dense(row_ids), w_kv, w_hidden, w_key, mask, table.row_format, table.row_dim,
            table.zero_scale_is_zero, eps, clamp, zero_sign, add_residual, table.table_scale)
    return _OP.call(backend, args, out, table)


def _check(args, out, table=None):
    op = "engram_forward"
    hidden, _, _, row_ids, w_kv, w_hidden, w_key, mask, _, row_dim, _, eps, clamp, zero_sign, add_residual, *_ = args
    _, branches, size = expect_hidden(op, hidden)
    columns = expect_ids_of_tokens(op, hidden, table, row_ids)
    if columns == 0:
        raise ValueError(f"{op}: row_ids has no column")
    if isinstance(w_kv, torch.Tensor) and w_kv.is_floating_point() and w_kv.element_size() == 1:
        raise ValueError(f"{op}: w_kv is {w_kv.dtype}, and no backend multiplies by a quantized projection; expected one "
                         f"decoded to {hidden.dtype}, as Engram.load_published does it")
    expect_tensor(op, "w_kv", w_kv, (hidden.dtype,), ((branches + 1) * size, columns * row_dim), hidden.device, dense_dims=2)
    expect_weights_mask_out(op, hidden, w_hidden, w_key, mask, out)
    check_options(op, eps, clamp, zero_sign, add_residual)


def _check_data(hidden, rows, scales, row_ids, w_kv, w_hidden, w_key, mask, *options):
    check_row_ids("engram_forward", row_ids, rows.shape[0], mask=mask)


# On a GPU it is the steps, since one kernel of the whole could save 5.5 % of their time at most: docs/triton.md
@torch.library.impl(LIB, "engram_forward", "CUDA")
def _on_cuda(*args):
    _OP.check(args, None)
    return _steps.forward(OPS.gather_rows.out, OPS.gate.out, *args, out=empty_like_hidden(args[0]))


@torch.library.impl(LIB, "engram_forward.out", "CUDA")
def _out_on_cuda(*args, out):
    _OP.check(args, out)
    _steps.forward(OPS.gather_rows.out, OPS.gate.out, *args, out=out)


@torch.library.impl(LIB, "engram_forward_bwd", "CPU")
@torch.library.impl(LIB, "engram_forward_bwd", "CUDA")
def _bwd(grad_out, *args):
    *checked, _, _ = args
    _OP.check(tuple(checked), None)
    hidden = args[0]
    expect_tensor("engram_forward", "grad_out", grad_out, (hidden.dtype,), hidden.shape, hidden.device, dense_dims=1)
    return _steps.backward(OPS.gather_rows.out, OPS.gate_bwd.default, grad_out, *args)


def _fake_bwd(grad_out, hidden, rows, scales, row_ids, w_kv, w_hidden, w_key, mask, row_format, row_dim, *options):
    *_, needs_rows, needs_w_kv = options
    return (hidden.new_empty(hidden.shape), hidden.new_empty((*row_ids.shape, row_dim) if needs_rows else (0,)),
            w_kv.new_empty(w_kv.shape if needs_w_kv else (0,)), w_hidden.new_empty(w_hidden.shape), w_key.new_empty(w_key.shape))


_OP = Op("engram_forward", "Tensor hidden, Tensor rows, Tensor? scales, Tensor row_ids, Tensor w_kv, Tensor w_hidden, "
         "Tensor w_key, Tensor? mask, str row_format, int row_dim, bool zero_scale_is_zero, float eps, float clamp, "
         "str zero_sign, bool add_residual, float table_scale=1.0", empty=empty_like_hidden, reference=_reference, check=_check,
         check_data=_check_data, differentiable=("hidden", "rows", "w_kv", "w_hidden", "w_key"), in_place="hidden")
_OP.derive("(Tensor, Tensor, Tensor, Tensor, Tensor)", _fake_bwd, finish=sum_rows, costly=("rows", "w_kv"))
