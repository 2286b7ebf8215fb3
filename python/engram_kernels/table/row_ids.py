"""Checks of row ids."""
import torch
from torch import Tensor

from engram_kernels._checks import expect_tensor

_ID_DTYPES = (torch.int32, torch.int64)


def expect_row_ids(op: str, row_ids: object, device: torch.device) -> None:
    """Raises unless `row_ids` is a contiguous int32 or int64 tensor on `device`."""
    if not isinstance(row_ids, Tensor):
        raise TypeError(f"{op}: row_ids must be a tensor, got {type(row_ids).__name__}")
    if row_ids.dtype in _ID_DTYPES and row_ids.device == device and row_ids.is_contiguous():
        return  # the common case, kept cheap
    expect_tensor(op, "row_ids", row_ids, _ID_DTYPES, row_ids.shape, device, dense_dims=row_ids.dim())


def expect_in_range(op: str, row_ids: Tensor, num_rows: int, lowest: int) -> None:
    """Raises IndexError unless every id is in [lowest, num_rows); names the first that is not."""
    wrong = row_ids < lowest
    if num_rows <= torch.iinfo(row_ids.dtype).max:  # else no id of the dtype is too large, and the bound would wrap
        wrong |= row_ids >= num_rows
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise IndexError(f"{op}: row_ids{where} is {row_ids[tuple(where)].item()}, expected [0, {num_rows})"
                         + (" or -1 (no row)" if lowest == -1 else ""))
