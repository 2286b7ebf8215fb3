"""Reference of ngram_hash: plain PyTorch, written to be read. Contract: `engram_kernels.ngram_hash`."""
import itertools

import torch
from torch import Tensor


def ngram_hash(token_ids: Tensor, cu_seqlens: Tensor, moduli: Tensor, offsets: Tensor, multipliers: Tensor,
               token_map: Tensor | None, history: Tensor | None, dead_mask: Tensor | None,
               num_ids: int, boundary_id: int, eos_id: int) -> Tensor:
    """Row ids [L, T, C] int32. See `engram_kernels.ngram_hash`; same result bit for bit."""
    max_order = multipliers.shape[-1]
    heads = moduli.shape[1] // (max_order - 1)
    windows = _windows(token_ids, cu_seqlens, token_map, history, dead_mask, max_order, boundary_id, eos_id)
    columns = []
    for order in range(2, max_order + 1):
        for head in range(heads):
            column = (order - 2) * heads + head
            if multipliers.dim() == 3:
                mix = (windows[None, :, :order] * multipliers[:, column, None, :order]).sum(-1)  # [L, T]
            else:
                mix = torch.zeros(moduli.shape[0], windows.shape[0], dtype=torch.int64, device=windows.device)
                for back in range(order):
                    mix = mix ^ (windows[None, :, back] * multipliers[:, back, None])
            # torch's % has the sign of the divisor: never negative
            columns.append(mix % moduli[:, column, None] + offsets[:, column, None])
    return torch.stack(columns, dim=-1).to(torch.int32)


def ngram_hash_update(token_ids: Tensor, cu_seqlens: Tensor, moduli: Tensor, offsets: Tensor, multipliers: Tensor,
                      history: Tensor, token_map: Tensor | None, dead_mask: Tensor | None, state_indices: Tensor | None,
                      rejected: Tensor | None, num_ids: int, boundary_id: int, eos_id: int) -> Tensor:
    """Row ids [L, T, C] int32; leaves in the rows of `history` what the sequences' next chunks need."""
    reach, width = multipliers.shape[-1] - 1, history.shape[1]
    bounds = list(itertools.pairwise(cu_seqlens.tolist()))
    rows = list(range(len(bounds))) if state_indices is None else state_indices.tolist()
    dropped = [0] * len(bounds) if rejected is None else rejected.tolist()
    before = [history.new_full((reach,), -1) if row == -1 else history[row, drop:drop + reach]
              for row, drop in zip(rows, dropped, strict=True)]
    skipped = torch.zeros_like(token_ids, dtype=torch.bool)
    for row, (begin, end) in zip(rows, bounds, strict=True):
        skipped[begin:end] = row == -1
    dead = skipped if dead_mask is None else skipped | dead_mask
    ids = ngram_hash(token_ids, cu_seqlens, moduli, offsets, multipliers, token_map,
                     torch.stack(before) if before else history.new_empty(0, reach), dead, num_ids, boundary_id, eos_id)
    for row, drop, (begin, end) in zip(rows, dropped, bounds, strict=True):
        if row != -1:
            chunk = torch.where(dead[begin:end], -2, token_ids[begin:end]).flip(0).to(history.dtype)
            lost = -1 if history[row, -1] == -1 else -3  # what nobody can know any more
            line = torch.cat([chunk, history[row, drop:], history.new_full((drop,), lost)])
            history[row] = line[:width]
    return ids.masked_fill(skipped[:, None], -1)


def _windows(token_ids: Tensor, cu_seqlens: Tensor, token_map: Tensor | None, history: Tensor | None,
             dead_mask: Tensor | None, max_order: int, boundary_id: int, eos_id: int) -> Tensor:
    """Canonical id of every token and its lookbacks [T, max_order], boundary_id where blocked."""
    reach = max_order - 1
    ids = token_ids if dead_mask is None else torch.where(dead_mask, -2, token_ids)
    # each sequence behind its lookback, oldest first, so that position t - s is s elements before t
    pieces, starts = [], cu_seqlens.tolist()
    for sequence, (begin, end) in enumerate(itertools.pairwise(starts)):
        before = ids.new_full((reach,), -1) if history is None else history[sequence].flip(0)
        line = torch.cat([before, ids[begin:end]]).long()
        pieces.append(torch.stack([line[reach - s:line.numel() - s] for s in range(max_order)], dim=1))  # [length, N]
    raw = torch.cat(pieces) if pieces else torch.empty(0, max_order, dtype=torch.int64, device=token_ids.device)
    blocked = raw < 0
    canonical = raw.clamp_min(0) if token_map is None else token_map[raw.clamp_min(0)].long()
    blocked[:, 1:] |= canonical[:, 1:] == eos_id
    blocked = blocked.cumsum(1) > 0  # sticky: what is older than a blocked position is blocked
    return torch.where(blocked, boundary_id, canonical)
