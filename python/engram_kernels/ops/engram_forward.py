"""The whole memory layer in one op: rows of a table, projected to keys and a value, gated into the hidden state."""
import torch
from torch import Tensor

from engram_kernels import backends
from engram_kernels._checks import FLOAT_DTYPES, expect_one_device, expect_tensor, mark_written, refuse_forward_ad, wants_grad
from engram_kernels._library import LIB
from engram_kernels.ops.gate import check_options, check_out
from engram_kernels.ops.gather_rows import readable_only_on
from engram_kernels.reference.engram_forward import engram_forward as _reference
from engram_kernels.table.row_table import RowTable
from engram_kernels.triton_runtime.dispatch import register_autograd

_INPUTS = ("Tensor hidden, Tensor rows, Tensor? scales, Tensor row_ids, Tensor w_kv, Tensor w_hidden, Tensor w_key, "
           "Tensor? mask, str row_format, int row_dim, bool zero_scale_is_zero, float eps, float clamp, str zero_sign, "
           "bool add_residual")
LIB.define(f"engram_forward({_INPUTS}) -> Tensor")
LIB.define(f"engram_forward.out({_INPUTS}, *, Tensor(a!) out) -> ()")


@torch.library.register_fake("engram_kernels::engram_forward", lib=LIB)
def _fake(hidden, rows, scales, row_ids, w_kv, w_hidden, w_key, mask, *options):
    expect_one_device("engram_forward", hidden, row_ids, w_kv, w_hidden, w_key, mask, *readable_only_on(hidden, rows))
    return hidden.new_empty(hidden.shape)


@torch.library.register_fake("engram_kernels::engram_forward.out", lib=LIB)
def _fake_out(*args, out):
    return None


def engram_forward(hidden: Tensor, table: RowTable, row_ids: Tensor, w_kv: Tensor, w_hidden: Tensor, w_key: Tensor,
                   mask: Tensor | None = None, *, eps: float = 1e-6, clamp: float = 1e-6, zero_sign: str = "copysign",
                   add_residual: bool = True, out: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Gathers each token's rows, projects them to a key a branch and a value, and gates the value into the hidden state.

    ``e[t] = concat(table[row_ids[t, 0]], ..., table[row_ids[t, C-1]])``, dequantized and rounded to the dtype of `hidden`;
    ``[key_0 .. key_{M-1}, value] = e @ w_kv.T`` in float32, and ``out = gate(hidden, key, value)`` with the formula of
    `gate`. In Triton keys and value are neither rounded nor written; on the CPU they are rounded to the dtype of `hidden`, as a
    matrix product gives them, and held for a tile of 256 tokens. For inference: no gradients.

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
            place); any other overlap with an input is an error.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        [T, M, H] contiguous, dtype and device of `hidden`; `out` when given. T = 0 gives an empty tensor.

    Raises:
        TypeError: an argument is no tensor, or `table` no RowTable.
        ValueError: a shape, dtype, device, stride or option is wrong, or `out` overlaps an input.
        IndexError: a row id is out of range; names the position and the value, nothing is written.
        RuntimeError: the named backend is not available.
        NotImplementedError: an input requires grad, and the backend is not "reference".

    Source: arXiv 2601.07372 section 2; the published DeepSeek-V4.1 model code (wkv without bias).
    """
    if not isinstance(table, RowTable):
        raise TypeError(f"engram_forward: table must be a RowTable, got {type(table).__name__}")
    _check(hidden, table, row_ids, w_kv, w_hidden, w_key, mask, out)
    check_options("engram_forward", eps, clamp, zero_sign)
    run = backends.select("engram_forward", hidden.device, backend)
    if run is not _checked_reference and wants_grad(hidden, table.rows, w_kv, w_hidden, w_key):
        raise NotImplementedError(_NO_GRADIENT)
    if table.tier == "file" and mask is not None:
        row_ids = row_ids.masked_fill(mask[:, None], -1)
    table, row_ids = table.stage(row_ids.contiguous())
    return run(hidden, table.rows, table.scales, row_ids, w_kv, w_hidden, w_key, mask, table.row_format, table.row_dim,
               table.zero_scale_is_zero, eps, clamp, zero_sign, add_residual, out=out)


_NO_GRADIENT = ("engram_forward: the op is for inference and has no derivative; use torch.no_grad(), backend='reference', or "
                "gather_rows, a Linear and gate")


def _check(hidden, table, row_ids, w_kv, w_hidden, w_key, mask, out):
    op = "engram_forward"
    expect_tensor(op, "hidden", hidden, FLOAT_DTYPES, ("T", "M", "H"), dense_dims=1)
    tokens, branches, size = hidden.shape
    device, dtype = hidden.device, hidden.dtype
    if branches == 0 or size == 0:
        raise ValueError(f"{op}: hidden must have at least one branch of at least one element, got {list(hidden.shape)}")
    if table.device_for(hidden) != device:
        raise ValueError(f"{op}: table must be on {device}, got {table.device}")
    expect_tensor(op, "row_ids", row_ids, (torch.int32, torch.int64), (tokens, "C"), device)
    if row_ids.shape[1] == 0:
        raise ValueError(f"{op}: row_ids has no column")
    shape = ((branches + 1) * size, row_ids.shape[1] * table.row_dim)
    expect_tensor(op, "w_kv", w_kv, (dtype,), shape, device, dense_dims=2)
    expect_tensor(op, "w_hidden", w_hidden, (dtype, torch.float32), (branches, size), device, dense_dims=2)
    expect_tensor(op, "w_key", w_key, (w_hidden.dtype,), (branches, size), device, dense_dims=2)
    if mask is not None:
        expect_tensor(op, "mask", mask, (torch.bool,), (tokens,), device, dense_dims=1)
    if out is not None:
        expect_tensor(op, "out", out, (dtype,), (tokens, branches, size), device, dense_dims=3)


def _compiled(*args, out=None):
    refuse_forward_ad("engram_forward")
    op = torch.ops.engram_kernels.engram_forward
    if out is None:
        return op.default(*args)
    op.out(*args, out=out)
    mark_written(out)
    return out


def _check_data(*args):
    _, rows, _, row_ids, _, _, _, mask, *_ = args
    wrong = (row_ids < -1) | (row_ids >= rows.shape[0])
    wrong = wrong if mask is None else wrong & ~mask[:, None]
    if wrong.any():
        t, c = wrong.nonzero()[0].tolist()
        raise IndexError(f"engram_forward: row_ids[{t}, {c}] is {row_ids[t, c].item()}, expected [0, {rows.shape[0]}) or -1 "
                         "(no row)")


def _checked_reference(*args, out=None):
    check_out("engram_forward", out, (args[0], args[1], *args[4:7]))
    _check_data(*args)
    result = _reference(*args)
    return result if out is None else out.copy_(result)


def _backward(ops, ctx, grad_out):
    raise NotImplementedError(_NO_GRADIENT)


register_autograd("engram_forward", _backward, None, LIB)
backends.register_op("engram_forward", _checked_reference, _compiled, check_data=_check_data, in_place="hidden")
