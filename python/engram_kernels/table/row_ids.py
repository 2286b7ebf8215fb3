"""Checks of row ids."""
import torch
from torch import Tensor

from engram_kernels._checks import expect_tensor

ROW_ID_DTYPES = (torch.int32, torch.int64)


def expect_row_ids(op: str, row_ids: object, device: torch.device) -> None:
    """Raises unless `row_ids` is a contiguous int32 or int64 tensor on `device`. Its data is not looked at."""
    if not isinstance(row_ids, Tensor):
        raise TypeError(f"{op}: row_ids must be a tensor, got {type(row_ids).__name__}")
    if row_ids.dtype in ROW_ID_DTYPES and row_ids.device == device and row_ids.is_contiguous():
        return  # the common case, kept cheap
    expect_tensor(op, "row_ids", row_ids, ROW_ID_DTYPES, row_ids.shape, device, dense_dims=row_ids.dim())


def check_row_ids(op: str, row_ids: Tensor, num_rows: int, *, mask: Tensor | None = None, may_be_absent: bool = True) -> None:
    """Raises IndexError unless every id names a row.

    Args:
        op: op name, for the message.
        row_ids: int32 or int64, any shape; [T, ...] with `mask`.
        num_rows: R: ids are in [0, R).
        mask: [T] bool; the ids of tokens where it is True are not looked at. None: all are.
        may_be_absent: whether -1, which names no row, is allowed.

    Raises:
        IndexError: an id is out of range; names the position and the value of the first.
    """
    wrong = row_ids < (-1 if may_be_absent else 0)
    if num_rows <= torch.iinfo(row_ids.dtype).max:  # else no id of the dtype is too large, and the bound would wrap
        wrong |= row_ids >= num_rows
    if mask is not None:
        wrong &= ~mask[:, None]
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise IndexError(f"{op}: row_ids{where} is {row_ids[tuple(where)].item()}, expected [0, {num_rows})"
                         + (" or -1 (no row)" if may_be_absent else ""))
