"""Gather rows of a table by id, dequantized to the dtype that the model computes in."""
from typing import Any

import torch
from torch import Tensor

from engram_kernels import _transforms, backends
from engram_kernels._checks import FLOAT_DTYPES, expect_one_device, expect_tensor, mark_written, refuse_forward_ad
from engram_kernels._library import LIB
from engram_kernels.reference.gather_rows import gather_rows as _reference
from engram_kernels.table.row_table import FLOAT_FORMATS, RowTable, expect_row_ids
from engram_kernels.triton_runtime.dispatch import register_autograd

_ARGS = ("Tensor rows, Tensor? scales, Tensor row_ids, str row_format, int row_dim, bool zero_scale_is_zero, "
         "ScalarType out_dtype")
LIB.define(f"gather_rows({_ARGS}) -> Tensor")
LIB.define(f"gather_rows.out({_ARGS}, *, Tensor(a!) out) -> ()")
LIB.define("gather_rows_bwd(Tensor grad, Tensor row_ids, int num_rows, ScalarType dtype) -> Tensor")


def readable_only_on(like, rows):
    """(rows,) unless a GPU may read them from host memory: what a fake compares devices of."""
    return () if like.is_cuda and rows.is_cpu else (rows,)


@torch.library.register_fake("engram_kernels::gather_rows", lib=LIB)
def _fake(rows, scales, row_ids, row_format, row_dim, zero_scale_is_zero, out_dtype):
    expect_one_device("gather_rows", row_ids, *readable_only_on(row_ids, rows))
    return row_ids.new_empty((*row_ids.shape, row_dim), dtype=out_dtype)


@torch.library.register_fake("engram_kernels::gather_rows.out", lib=LIB)
def _fake_out(rows, scales, row_ids, row_format, row_dim, zero_scale_is_zero, out_dtype, *, out):
    return None


@torch.library.register_fake("engram_kernels::gather_rows_bwd", lib=LIB)
def _fake_bwd(grad, row_ids, num_rows, dtype):
    return grad.new_empty((num_rows, grad.shape[-1]), dtype=dtype)


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
        sparse_grad: the gradient of ``table.rows`` is a sparse COO tensor with one entry per position, not a dense one of the
            table's size.
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
    op = "gather_rows"
    if not isinstance(table, RowTable):
        raise TypeError(f"{op}: table must be a RowTable, got {type(table).__name__}")
    device = table.device_for(row_ids)
    expect_row_ids(op, row_ids, device)
    if out_dtype not in FLOAT_DTYPES:
        raise ValueError(f"{op}: out_dtype is {out_dtype}, expected torch.float32, torch.bfloat16 or torch.float16")
    if out is not None:
        expect_tensor(op, "out", out, (out_dtype,), (*row_ids.shape, table.row_dim), device,
                      dense_dims=row_ids.dim() + 1)
    run = backends.select(op, device, backend)
    table, row_ids = table.stage(row_ids)
    rows = table.rows
    args = (rows, table.scales, row_ids, table.row_format, table.row_dim, table.zero_scale_is_zero, out_dtype)
    if not (torch.is_grad_enabled() and (rows.requires_grad or (out is not None and out.requires_grad))):
        return run(*args, out=out)
    if out is not None:
        raise ValueError(f"{op}: out= has no gradient, but table.rows or out requires one")
    if sparse_grad:
        return _SparseGrad.apply(rows, table, row_ids, out_dtype, run)
    return run(*args)


class _SparseGrad(torch.autograd.Function):
    """gather_rows of a table too large for a gradient of its own size."""

    @staticmethod
    def forward(ctx, rows, table, row_ids, out_dtype, run):
        ctx.save_for_backward(row_ids)
        ctx.rows_like = (rows.shape, rows.dtype)
        return run(rows.detach(), table.scales, row_ids, table.row_format, table.row_dim, table.zero_scale_is_zero, out_dtype)

    @staticmethod
    def backward(ctx, *grads: Any):
        (row_ids,), (shape, dtype) = ctx.saved_tensors, ctx.rows_like
        present = row_ids != -1
        return (torch.sparse_coo_tensor(row_ids[present].long()[None], grads[0][present].to(dtype), shape,
                                        check_invariants=False), None, None, None, None)


def _compiled(*args, out=None):
    rows, _, row_ids, _, row_dim, _, out_dtype = args
    refuse_forward_ad("gather_rows")
    if out is None:
        if _transforms.active():
            return _transforms.call(torch.ops.engram_kernels.gather_rows.default, *args)
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and rows.requires_grad):
            return torch.ops.engram_kernels.gather_rows.default(*args)
        # the Python autograd layer and an allocation through the stable ABI cost more than a decode step's rows
        out = torch.empty((*row_ids.shape, row_dim), dtype=out_dtype, device=row_ids.device)
    torch.ops.engram_kernels.gather_rows.out(*args, out=out)
    mark_written(out)
    return out


def _check_data(rows, scales, row_ids, *options):
    wrong = (row_ids < -1) | (row_ids >= rows.shape[0])
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise IndexError(f"gather_rows: row_ids{where} is {row_ids[tuple(where)].item()}, expected [0, {rows.shape[0]}) "
                         "or -1 (no row)")


def _checked_reference(*args, out=None):
    _check_data(*args)
    values = _reference(*args)
    return values if out is None else out.copy_(values)


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
    return grad_rows, None, None, None, None, None, None


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


register_autograd("gather_rows", _backward, _setup_context, LIB)
register_autograd("gather_rows_bwd", _double_backward, _setup_bwd_context, LIB)
backends.register_op("gather_rows", _checked_reference, _compiled, check_data=_check_data)
