"""Reference of gather_rows: plain PyTorch, written to be read. Contract: `engram_kernels.gather_rows`."""
import torch
from torch import Tensor


def gather_rows(rows: Tensor, scales: Tensor | None, row_ids: Tensor, row_format: str, row_dim: int,
                zero_scale_is_zero: bool, out_dtype: torch.dtype) -> Tensor:
    """Rows [*row_ids.shape, row_dim]; zeros for id -1. See `engram_kernels.gather_rows`; same result bit for bit."""
    present = row_ids != -1
    ids = row_ids[present].long()
    if scales is not None and row_format != "fp8_e4m3_tensor":
        scales = scales[ids]
    values = decode(rows[ids], scales, row_format, row_dim, zero_scale_is_zero)
    out = values.new_zeros((*row_ids.shape, row_dim), dtype=out_dtype)
    return out.masked_scatter(present.unsqueeze(-1), values.to(out_dtype))


def decode(rows: Tensor, scales: Tensor | None, row_format: str, row_dim: int, zero_scale_is_zero: bool) -> Tensor:
    """Values [n, row_dim] of stored rows [n, ..] with their scales: as stored for the float formats, else float32."""
    if row_format in ("f32", "bf16", "f16"):
        return rows
    if row_format == "fp8_e4m3_block32_packed":
        rows, scales = rows[:, :row_dim], rows[:, row_dim:row_dim + row_dim // 32]
    assert scales is not None
    if row_format == "int8_group32":
        return _by_group(rows.float(), scales)
    values = rows.contiguous().view(torch.float8_e4m3fn).float()
    if row_format == "fp8_e4m3_tensor":
        return values * scales
    factors = scales.contiguous().view(torch.float8_e8m0fnu).float()
    if zero_scale_is_zero:
        factors = torch.where(scales == 0, 0.0, factors)
    return _by_group(values, factors)


def _by_group(values: Tensor, factors: Tensor) -> Tensor:
    return (values.unflatten(1, (-1, 32)) * factors.unsqueeze(-1)).flatten(1)
