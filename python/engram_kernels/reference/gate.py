"""Reference of gate: plain PyTorch, written to be read. Contract: `engram_kernels.gate`."""
import torch
from torch import Tensor


def gate(hidden: Tensor, key: Tensor, value: Tensor, w_hidden: Tensor, w_key: Tensor, mask: Tensor | None,
         eps: float, clamp: float, zero_sign: str, add_residual: bool) -> Tensor:
    """Gated hidden state [T, M, H]. See `engram_kernels.gate`; float64 inputs are computed in float64."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    h, k, v = hidden.to(dtype), key.to(dtype), value.to(dtype)[:, None]
    if mask is not None:  # what a masked token holds must not reach a gradient either, and 0 * NaN is NaN
        dead = mask[:, None, None]
        h, k, v = h.masked_fill(dead, 0), k.masked_fill(dead, 0), v.masked_fill(dead, 0)
    dot = (h * w_hidden.to(dtype) * k * w_key.to(dtype)).sum(-1, keepdim=True)
    rh = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    rk = torch.rsqrt(k.square().mean(-1, keepdim=True) + eps)
    x = dot * rh * rk / hidden.shape[-1] ** 0.5
    magnitude = x.abs().clamp_min(min(clamp, torch.finfo(torch.float32).max)).sqrt()  # the kernels take a float32
    score = torch.copysign(magnitude, x) if zero_sign == "copysign" else magnitude * x.sign()
    update = torch.sigmoid(score) * v
    out = (h + update if add_residual else update).to(hidden.dtype)
    if mask is None:
        return out
    return torch.where(dead, hidden if add_residual else torch.zeros_like(hidden), out)
