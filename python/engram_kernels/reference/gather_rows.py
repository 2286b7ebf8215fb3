"""Reference of gather_rows: plain PyTorch, written to be read. Contract: `engram_kernels.gather_rows`."""
import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # by the 4 bits


def gather_rows(rows: Tensor, scales: Tensor | None, row_ids: Tensor, row_format: str, row_dim: int,
                zero_scale_is_zero: bool, out_dtype: torch.dtype, table_scale: float = 1.0) -> Tensor:
    """Rows [*row_ids.shape, row_dim]; zeros for id -1. See `engram_kernels.gather_rows`; same result bit for bit."""
    present = row_ids != -1
    ids = row_ids[present].long()
    if scales is not None and row_format != "fp8_e4m3_tensor":
        scales = scales[ids]
    if rows.requires_grad and rows.element_size() < 4:
        rows = rows.float()  # so that the gradients of a row are summed in float32, and rounded once
    values = decode(rows[ids], scales, row_format, row_dim, zero_scale_is_zero, table_scale)
    out = values.new_zeros((*row_ids.shape, row_dim), dtype=out_dtype)
    return out.masked_scatter(present.unsqueeze(-1), values.to(out_dtype))


def decode(rows: Tensor, scales: Tensor | None, row_format: str, row_dim: int, zero_scale_is_zero: bool,
           table_scale: float = 1.0) -> Tensor:
    """Values [n, row_dim] of stored rows [n, ..] with their scales: as stored for the float formats, else float32."""
    if row_format in ("f32", "bf16", "f16"):
        return rows
    if row_format == "fp8_e4m3_block32_packed":
        rows, scales = rows[:, :row_dim], rows[:, row_dim:row_dim + row_dim // 32]
    assert scales is not None
    if row_format == "int8_group32":
        return _by_group(rows.float(), scales)
    if row_format == "nvfp4":
        return _by_group(_e2m1(rows), scales.contiguous().view(torch.float8_e4m3fn).float()) * table_scale
    values = _e2m1(rows) if row_format == "mxfp4" else rows.contiguous().view(torch.float8_e4m3fn).float()
    if row_format in ("fp8_e4m3_tensor", "fp8_e4m3_row"):
        return values * scales
    factors = scales.contiguous().view(torch.float8_e8m0fnu).float()
    if zero_scale_is_zero:
        factors = torch.where(scales == 0, 0.0, factors)
    return _by_group(values, factors)


def _by_group(values: Tensor, factors: Tensor) -> Tensor:
    return (values.unflatten(1, (factors.shape[1], -1)) * factors.unsqueeze(-1)).flatten(1)


def _e2m1(rows: Tensor) -> Tensor:
    """Two values of each byte, that in the lower 4 bits first."""
    values = torch.tensor(E2M1, device=rows.device)
    return values[torch.stack([rows & 15, rows >> 4], -1).flatten(1).long()]
