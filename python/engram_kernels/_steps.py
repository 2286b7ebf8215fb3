"""engram_forward in its steps, for backends without a kernel of its own: gather_rows, torch's product, gate, chunk by chunk.

What is between the steps is one chunk's, whatever the number of tokens. The products are `aten::mm(out=)`: torch's settings for
products hold (TF32, reductions), and autocast, which knows no `out=`, changes nothing.
"""
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# With the 25,600 columns of V4.1's projection 1,300 tiles of 128 x 256: 9.85 waves of an H200's 132 multiprocessors, 98 % full,
# where 1,024 tokens fill 87 %. Arithmetic on a tile size that is common there; no GPU was timed
CHUNK_TOKENS = 1664


def forward(gather_rows: Callable[..., Any], gate: Callable[..., Any], hidden: Tensor, rows: Tensor, scales: Tensor | None,
            row_ids: Tensor, w_kv: Tensor, w_hidden: Tensor, w_key: Tensor, mask: Tensor | None, row_format: str, row_dim: int,
            zero_scale_is_zero: bool, eps: float, clamp: float, zero_sign: str, add_residual: bool, table_scale: float = 1.0, *,
            out: Tensor) -> Tensor:
    """`out`, written: the gated hidden state [T, M, H] of `engram_kernels.engram_forward`, with two ops of one backend.

    Args:
        gather_rows: op of that name; takes its arguments and `out`.
        gate: likewise.
        hidden: and all that follows, as the op `engram_forward` takes them, checked.
    """
    memory, kv = _workspace(hidden, w_kv)
    for first, ids in _chunks(row_ids, mask):
        last, count = first + len(ids), len(ids)
        keys_and_value = kv[:count].view(count, -1, hidden.shape[2])
        gather_rows(rows, scales, ids, row_format, row_dim, zero_scale_is_zero, hidden.dtype, table_scale,
                    out=memory[:count].view(count, -1, row_dim))
        torch.mm(memory[:count], w_kv.t(), out=kv[:count])
        gate(hidden[first:last], keys_and_value[:, :-1], keys_and_value[:, -1], w_hidden, w_key,
             None if mask is None else mask[first:last], eps, clamp, zero_sign, add_residual, out=out[first:last])
    return out


def backward(gather_rows: Callable[..., Any], gate_bwd: Callable[..., Any], grad_out: Tensor, hidden: Tensor, rows: Tensor,
             scales: Tensor | None, row_ids: Tensor, w_kv: Tensor, w_hidden: Tensor, w_key: Tensor, mask: Tensor | None,
             row_format: str, row_dim: int, zero_scale_is_zero: bool, eps: float, clamp: float, zero_sign: str,
             add_residual: bool, table_scale: float, needs_rows: bool, needs_w_kv: bool) -> tuple[Tensor, ...]:
    """Gradients of hidden, of each position's row, of w_kv, w_hidden and w_key; keys and value are computed again.

    Those of the weights are summed over the chunks in float32. What is not needed is an empty tensor.
    """
    memory, kv = _workspace(hidden, w_kv)
    grad_hidden = hidden.new_empty(hidden.shape)
    grad_rows = hidden.new_empty((*row_ids.shape, row_dim) if needs_rows else (0,))
    weights: list[Tensor] | None = None
    for first, ids in _chunks(row_ids, mask):
        last, count = first + len(ids), len(ids)
        keys_and_value = kv[:count].view(count, -1, hidden.shape[2])
        known = (ids >= 0) & (ids.long() < rows.shape[0])  # forward has counted the others
        gather_rows(rows, scales, ids.where(known, -1), row_format, row_dim, zero_scale_is_zero, hidden.dtype, table_scale,
                    out=memory[:count].view(count, -1, row_dim))
        torch.mm(memory[:count], w_kv.t(), out=kv[:count])
        grad_hidden[first:last], grad_key, grad_value, *of_norms = gate_bwd(
            grad_out[first:last], hidden[first:last], keys_and_value[:, :-1], keys_and_value[:, -1], w_hidden, w_key,
            None if mask is None else mask[first:last], eps, clamp, zero_sign, add_residual)
        grad_kv = torch.cat((grad_key.flatten(1), grad_value), 1, out=kv[:count])
        if needs_rows:
            torch.mm(grad_kv, w_kv, out=grad_rows[first:last].view(count, -1))
        of_w_kv = w_kv.new_empty(w_kv.shape if needs_w_kv else (0,))
        if needs_w_kv:
            torch.mm(grad_kv.t(), memory[:count], out=of_w_kv)
        more = (of_w_kv, *of_norms)
        weights = list(more) if weights is None else [a.float().add_(b) for a, b in zip(weights, more, strict=True)]
    if weights is None:  # no token
        weights = [w_kv.new_zeros(w_kv.shape if needs_w_kv else (0,)), *(torch.zeros_like(w) for w in (w_hidden, w_key))]
    return (grad_hidden, grad_rows, weights[0].to(w_kv.dtype), *(a.to(w_key.dtype) for a in weights[1:]))


def _workspace(hidden: Tensor, w_kv: Tensor) -> tuple[Tensor, Tensor]:
    """Memory vectors [n, C * D] and keys and values [n, (M + 1) * H] of a chunk."""
    tokens, (kv_size, memory_size) = min(hidden.shape[0], CHUNK_TOKENS), w_kv.shape
    return hidden.new_empty((tokens, memory_size)), hidden.new_empty((tokens, kv_size))


def _chunks(row_ids: Tensor, mask: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """(first token, row ids of the chunk), contiguous, -1 where a token is masked."""
    for first in range(0, row_ids.shape[0], CHUNK_TOKENS):
        ids = row_ids[first:first + CHUNK_TOKENS]
        if mask is not None:
            ids = ids.masked_fill(mask[first:first + CHUNK_TOKENS, None], -1)
        yield first, ids.contiguous()
