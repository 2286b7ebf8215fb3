"""Gate and convolution of Qwen's PLE with the published rounding: to the dtype of the hidden state after each operation.

In torch ops, so that they have derivatives of every order. The ops `gate` and `short_conv` compute in float32 and round once.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from engram_kernels.ops.short_conv import short_conv


def published_gate(hidden: Tensor, key: Tensor, value: Tensor, w_hidden: Tensor, w_key: Tensor, dead_mask: Tensor | None,
                  eps: float, clamp: float) -> Tensor:
    """``sigmoid(score) * value`` [T, M, H] without a residual, the root of the score being 0 at 0.

    Args:
        hidden, key: [T, M, H] of one float dtype.
        value: [T, H] of that dtype.
        w_hidden, w_key: [M, H] float32, what the norms multiply by.
        dead_mask: [T] bool, True = zeros.
        eps: added to the mean squares.
        clamp: lower bound of the score's magnitude under the root.

    Source: huggingface/transformers `models/qwen4_exp/modular_qwen4_exp.py` (`Qwen4ExpTextPLELayer.forward`).
    """
    if dead_mask is not None:  # what such a token holds must not reach a gradient either, and 0 * NaN is NaN
        dead = dead_mask[:, None, None]
        hidden, key, value = hidden.masked_fill(dead, 0), key.masked_fill(dead, 0), value.masked_fill(dead_mask[:, None], 0)
    score = (_norm(key, w_key, eps) * _norm(hidden, w_hidden, eps)).sum(-1, keepdim=True) / math.sqrt(hidden.shape[-1])
    score = score.abs().clamp_min(clamp).sqrt() * score.sign()
    return (torch.sigmoid(score) * value.unsqueeze(-2)).to(hidden.dtype)


def published_conv(x: Tensor, weight: Tensor, norm_weight: Tensor, cu_seqlens: Tensor, dilation: int, eps: float,
                  state: Tensor | None = None, positions: Tensor | None = None, state_indices: Tensor | None = None,
                  state_ends: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """What `short_conv` computes, rounded to the dtype of `x` after norm, convolution, SiLU and sum.

    Arguments and errors are those of `short_conv`; `weight` and `norm_weight` are float32. `backend` only checks the state and
    brings it up to date.

    Source: huggingface/transformers `models/qwen4_exp/modular_qwen4_exp.py` (`Qwen4ExpTextPLELayer._short_conv`).
    """
    tokens, branches, size = x.shape
    width = weight.shape[-1]
    index = torch.arange(tokens, device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), index.to(cu_seqlens.dtype), right=True)
    back = torch.arange(width - 1, -1, -1, device=x.device) * dilation
    offset = (index - cu_seqlens[sequence])[:, None] - back  # [T, W], from the first token of this chunk
    normed = _norm(x, norm_weight, eps)
    taps = normed[(index[:, None] - back).clamp_min(0)].masked_fill((offset < 0)[..., None, None], 0)
    if state is not None and positions is not None:
        earlier = positions[sequence].long()[:, None] + offset
        ring = sequence if state_indices is None else state_indices[sequence].long().clamp(0, state.shape[0] - 1)
        held = _norm(state[ring[:, None], earlier % state.shape[1]], norm_weight, eps)
        taps = torch.where(((offset < 0) & (earlier >= 0))[..., None, None], held, taps)
        short_conv(x, weight, norm_weight, cu_seqlens, dilation, eps, state, positions, state_indices, state_ends,
                   backend=backend)
    lines = taps.reshape(tokens, width, branches * size).transpose(1, 2)
    out = x + F.silu(F.conv1d(lines, weight.to(x.dtype).reshape(-1, 1, width), groups=branches * size)).view_as(x).to(x.dtype)
    return out if state_indices is None else out.masked_fill((state_indices[sequence] < 0)[:, None, None], 0)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm in float32, rounded to the dtype of `x`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)
