"""Reference of engram_forward: plain PyTorch, written to be read. Contract: `engram_kernels.engram_forward`."""
import torch
from torch import Tensor

from .gate import gate
from .gather_rows import gather_rows


def engram_forward(hidden: Tensor, rows: Tensor, scales: Tensor | None, row_ids: Tensor, w_kv: Tensor, w_hidden: Tensor,
                   w_key: Tensor, mask: Tensor | None, row_format: str, row_dim: int, zero_scale_is_zero: bool, eps: float,
                   clamp: float, zero_sign: str, add_residual: bool, table_scale: float = 1.0) -> Tensor:
    """Gated hidden state [T, M, H]. See `engram_kernels.engram_forward`; float64 inputs are computed in float64."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    tokens, branches, size = hidden.shape
    ids = row_ids if mask is None else row_ids.masked_fill(mask[:, None], -1)
    memory = gather_rows(rows, scales, ids, row_format, row_dim, zero_scale_is_zero, hidden.dtype, table_scale)
    with torch.autocast(hidden.device.type, enabled=False):  # the dtypes of the tensors hold
        keys_and_value = memory.to(dtype).view(tokens, w_kv.shape[1]) @ w_kv.to(dtype).T  # [T, (M + 1) * H]
    kv = keys_and_value.view(tokens, branches + 1, size)
    out = gate(hidden.to(dtype), kv[:, :-1], kv[:, -1], w_hidden, w_key, mask, eps, clamp, zero_sign, add_residual)
    if mask is None or not add_residual:
        return out.to(hidden.dtype)
    return torch.where(mask[:, None, None], hidden, out.to(hidden.dtype))  # bit for bit
