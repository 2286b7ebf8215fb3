"""Reference of gather_gate: plain PyTorch, written to be read. Contract: `engram_kernels.gather_gate`."""
import torch
from torch import Tensor

from .gate import gate
from .gather_rows import gather_rows


def gather_gate(hidden: Tensor, rows: Tensor, scales: Tensor | None, row_ids: Tensor, w_hidden: Tensor, w_key: Tensor,
                mask: Tensor | None, row_format: str, row_dim: int, zero_scale_is_zero: bool, eps: float, clamp: float,
                zero_sign: str, add_residual: bool, table_scale: float = 1.0) -> Tensor:
    """Gated hidden state [T, M, H]. See `engram_kernels.gather_gate`; float64 inputs are computed in float64."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    ids = row_ids if mask is None else row_ids.masked_fill(mask[:, None], -1)
    memory = gather_rows(rows, scales, ids, row_format, row_dim, zero_scale_is_zero, dtype, table_scale).flatten(-2)  # [T, H]
    key = memory[:, None].expand(hidden.shape)
    out = gate(hidden.to(dtype), key, memory, w_hidden, w_key, mask, eps, clamp, zero_sign, add_residual)
    if mask is None or not add_residual:
        return out.to(hidden.dtype)
    return torch.where(mask[:, None, None], hidden, out.to(hidden.dtype))  # bit for bit
