"""Reference of short_conv: plain PyTorch, written to be read. Contract: `engram_kernels.short_conv`."""
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv(x: Tensor, weight: Tensor, norm_weight: Tensor, cu_seqlens: Tensor, dilation: int, eps: float) -> Tensor:
    """x + silu(conv(norm(x))) [T, M, H]. See `engram_kernels.short_conv`; float64 inputs are computed in float64."""
    before = [x[:0] for _ in range(cu_seqlens.shape[0] - 1)]
    return _convolve(x, weight, norm_weight, cu_seqlens, before, dilation, eps)


def short_conv_update(x: Tensor, weight: Tensor, norm_weight: Tensor, cu_seqlens: Tensor, positions: Tensor, dilation: int,
                      eps: float, state: Tensor, state_indices: Tensor | None = None,
                      state_ends: Tensor | None = None) -> Tensor:
    """x + silu(conv(norm(x))) [T, M, H] for chunks that continue sequences; writes their last inputs into the rings."""
    reach, slots = (weight.shape[2] - 1) * dilation, state.shape[1]
    rings = list(range(len(positions))) if state_indices is None else state_indices.tolist()
    chunks = list(zip(rings, positions.tolist(), itertools.pairwise(cu_seqlens.tolist()), strict=True))
    before = []
    for ring, position, _ in chunks:
        inputs = [] if ring == -1 else [state[ring, q % slots] for q in range(max(0, position - reach), position)]
        before.append(torch.stack(inputs) if inputs else x[:0])
    out = _convolve(x, weight, norm_weight, cu_seqlens, before, dilation, eps)
    for ring, position, (begin, end) in chunks:
        if ring == -1:
            out[begin:end] = 0
        elif end > begin:
            for t in range(max(begin, end - slots), end):
                state[ring, (position + t - begin) % slots] = x[t]
            if state_ends is not None:
                furthest = 0 if position == 0 else int(state_ends[ring, 1])
                length = position + end - begin
                state_ends[ring] = torch.tensor([length, max(length, furthest)], device=state_ends.device)
    return out


def _convolve(x: Tensor, weight: Tensor, norm_weight: Tensor, cu_seqlens: Tensor, before: list[Tensor], dilation: int,
              eps: float) -> Tensor:
    """before[b]: the inputs of sequence b that precede its chunk, oldest first."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    width = weight.shape[2]
    pieces = [x[:0].to(dtype)]
    for sequence, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        line = torch.cat([before[sequence], x[begin:end]]).to(dtype)
        normed = line * torch.rsqrt(line.square().mean(-1, keepdim=True) + eps) * norm_weight.to(dtype)
        conv = torch.zeros_like(normed)
        for j in range(width):
            back = min((width - 1 - j) * dilation, line.shape[0])
            # nothing before the sequence start: not a zero times the weight, which may be Inf
            reached = weight[:, :, j].to(dtype) * normed[:line.shape[0] - back]
            conv = conv + F.pad(reached, (0, 0, 0, 0, back, 0))
        pieces.append((line + F.silu(conv))[line.shape[0] - (end - begin):])
    return torch.cat(pieces).to(x.dtype)
