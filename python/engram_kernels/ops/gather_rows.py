"""Gather rows of a table by id, dequantized to the dtype that the model computes in."""
from typing import Any

import torch
from torch import Tensor

from engram_kernels import _transforms
from engram_kernels._checks import FLOAT_DTYPES, expect_tensor
from engram_kernels._library import LIB
from engram_kernels.ops._op import Op, refuse_table
from engram_kernels.reference.gather_rows import gather_rows as _reference
from engram_kernels.row_format import FLOAT_FORMATS
from engram_kernels.table.row_ids import check_row_ids, expect_row_ids
from engram_kernels.table.row_table import RowTable
from engram_kernels.triton_runtime.dispatch import NAMESPACE, register_autograd


def gather_rows(table: RowTable, row_ids: Tensor, out_dtype: torch.dtype = torch.bfloat16, *, out: Tensor | None = None,
                sparse_grad: bool = False, backend: str = "auto") -> Tensor:
    """Rows of `table` by id, dequantized.

    ``out[..., :] = decode(row row_ids[...])``, zeros where the id is -1: such a row is not read.

    Dequantization is in fp32 (``value * scale``) with one rounding, to nearest even, to `out_dtype`. Float rows of `out_dtype`
    are copied bit for bit, NaN payloads included. For a file table the distinct rows are read first, each once.

    Differentiable in ``table.rows`` for the float formats, twice: the gradient of a row is summed in fp32 in the order of the
    positions and rounded once, the same bits for any number of threads.

    Args:
        table: where the rows are, in memory or in a file.
        row_ids: int32 or int64, any shape, contiguous; -1 or in [0, table.num_rows). On the device of the table; on a GPU also
            for a table in pinned host memory, which the kernel then reads over the bus.
        out_dtype: float32, bfloat16 or float16.
        out: [*row_ids.shape, D] of `out_dtype`, contiguous, written instead of a new tensor. Not with gradients.
        sparse_grad: the gradient of ``table.rows`` is a sparse COO tensor of the distinct rows, ascending, not a dense one of the
            table's size. Its values are those of the dense one, to the bit. The transforms of `torch.func` get the dense one.
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Returns:
        [*row_ids.shape, D] of `out_dtype` on the device of the ids; `out` when given. No ids give an empty tensor.

    Raises:
        TypeError: an argument is no tensor, or `table` no RowTable.
        ValueError: a shape, dtype, device or stride is wrong.
        IndexError: an id is neither -1 nor in [0, num_rows); names the position and the value, nothing is written. On a GPU
            such an id gives zeros, and `check_errors` raises later.
        OSError: a file table cannot be read, or its file changed.
        RuntimeError: the named backend is not available.

    Source: docs/ops.md, "gather_rows" and "Row formats".
    """
    if not isinstance(table, RowTable):
        refuse_table("gather_rows", table)
    rows = table.rows
    args = (rows, table.scales, row_ids, table.row_format, table.row_dim, table.zero_scale_is_zero, out_dtype,
            table.table_scale)
    if sparse_grad and torch.is_grad_enabled() and rows.requires_grad and not _transforms.active():
        return _SparseGrad.apply(rows, row_ids, args, _OP.selected(backend, args, out, table))
    return _OP.call(backend, args, out, table)


class _SparseGrad(torch.autograd.Function):
    """gather_rows of a table too large for a gradient of its own size."""

    @staticmethod
    def forward(ctx, rows, row_ids, args, run):
        ctx.save_for_backward(row_ids)
        ctx.rows_like = (rows.shape, rows.dtype)
        return run(None)

    @staticmethod
    def backward(ctx, *grads: Any):
        (row_ids,), (shape, dtype) = ctx.saved_tensors, ctx.rows_like
        return sparse_gradient(grads[0], row_ids, shape, dtype), None, None, None


def sparse_gradient(grad: Tensor, row_ids: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The gradient of rows of `shape` [R, D] and `dtype`, as a sparse COO tensor of the distinct rows among `row_ids`.

    `grad` [*row_ids.shape, D] has the gradient of each position.
    """
    distinct, summed = _sum_distinct(grad, row_ids, dtype)
    return torch.sparse_coo_tensor(distinct[None], summed, shape, is_coalesced=True, check_invariants=False)


def _sum_distinct(grad: Tensor, row_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The distinct ids, ascending, without -1, and their gradients [n, D], as `gather_rows_bwd` sums and rounds them."""
    distinct, inverse = torch.unique(row_ids.long(), return_inverse=True)
    if distinct.numel() and distinct[0] == -1:
        distinct, inverse = distinct[1:], inverse - 1
    for ops in (torch.ops.engram_kernels, getattr(torch.ops, NAMESPACE)):
        kernel = getattr(ops, "gather_rows_bwd", None)  # without Triton its namespace has none
        if kernel and torch._C._dispatch_has_kernel_for_dispatch_key(kernel._qualified_op_name, grad.device.type.upper()):
            return distinct, kernel(grad.contiguous(), inverse, distinct.numel(), dtype)
    present = inverse != -1
    return distinct, _sum_in_order(grad[present].float(), inverse[present], distinct.numel()).to(dtype)


def _sum_in_order(grad: Tensor, places: Tensor, count: int) -> Tensor:
    """Sums [count, D] of the gradients of each place in the order of the positions: index_add has no order on a GPU."""
    summed = grad.new_zeros(count, grad.shape[-1])
    order = places.argsort(stable=True)
    ordered = places[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
    for turn in range(int(rank.max()) + 1 if len(order) else 0):
        now = rank == turn
        summed[ordered[now]] += grad[order[now]]
    return summed


def _empty(rows, scales, row_ids, row_format, row_dim, zero_scale_is_zero, out_dtype, table_scale=1.0):
    return row_ids.new_empty((*row_ids.shape, row_dim), dtype=out_dtype)


def _check(args, out, table):
    _, _, row_ids, _, row_dim, _, out_dtype, *_ = args
    device = table.device_for(row_ids)
    expect_row_ids("gather_rows", row_ids, device)
    if out_dtype not in FLOAT_DTYPES:
        raise ValueError(f"gather_rows: out_dtype is {out_dtype}, expected torch.float32, torch.bfloat16 or torch.float16")
    if out is not None:
        expect_tensor("gather_rows", "out", out, (out_dtype,), (*row_ids.shape, row_dim), device, dense_dims=row_ids.dim() + 1)


def _check_data(rows, scales, row_ids, *options):
    check_row_ids("gather_rows", row_ids, rows.shape[0])


def _fake_bwd(grad, row_ids, num_rows, dtype):
    return grad.new_empty((num_rows, grad.shape[-1]), dtype=dtype)


def _setup_context(ctx, inputs, output):
    rows, _, row_ids, row_format, *_ = inputs
    ctx.save_for_backward(row_ids)
    ctx.rows_like = (rows.shape[0], rows.dtype)
    ctx.row_format = row_format


def _backward(ops, ctx, grad):
    (row_ids,), (num_rows, dtype) = ctx.saved_tensors, ctx.rows_like
    grad_rows = None
    if ctx.row_format in FLOAT_FORMATS and ctx.needs_input_grad[0]:
        grad_rows = ops.gather_rows_bwd.default(grad.contiguous(), row_ids, num_rows, dtype)
    return grad_rows, None, None, None, None, None, None, None


def _setup_bwd_context(ctx, inputs, output):
    grad, row_ids, _, dtype = inputs
    ctx.save_for_backward(row_ids)
    ctx.grad_dtype = grad.dtype
    ctx.row_format = next(name for name, stored in FLOAT_FORMATS.items() if stored == dtype)


def _double_backward(ops, ctx, grad_rows):
    (row_ids,) = ctx.saved_tensors
    rows = ops.gather_rows.default(grad_rows.contiguous(), None, row_ids, ctx.row_format, grad_rows.shape[1], False,
                                   ctx.grad_dtype)
    return rows, None, None, None


_OP = Op("gather_rows", "Tensor rows, Tensor? scales, Tensor row_ids, str row_format, int row_dim, bool zero_scale_is_zero, "
         "ScalarType out_dtype, float table_scale=1.0", empty=_empty, reference=_reference, check=_check, check_data=_check_data,
         differentiable=("rows",))
LIB.define("gather_rows_bwd(Tensor grad, Tensor row_ids, int num_rows, ScalarType dtype) -> Tensor")
torch.library.register_fake("engram_kernels::gather_rows_bwd", _fake_bwd, lib=LIB)
register_autograd("gather_rows", _backward, _setup_context, LIB)
register_autograd("gather_rows_bwd", _double_backward, _setup_bwd_context, LIB)
