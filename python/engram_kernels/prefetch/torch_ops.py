"""torch ops of the prefetcher, for compiled graphs: `prefetch_submit` and `prefetch_wait`, by the number of a prefetcher."""
from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from engram_kernels._library import LIB

_PREFETCHERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()

# the ticket is data, so that a graph keeps the order of the two calls
LIB.define("prefetch_submit(Tensor row_ids, int prefetcher) -> Tensor")
LIB.define("prefetch_wait(Tensor ticket, Tensor row_ids, int prefetcher) -> Tensor")


def register_prefetcher(prefetcher: Any) -> int:
    """The number that the ops know `prefetcher` by, while it lives."""
    number = next(_numbers)
    _PREFETCHERS[number] = prefetcher
    return number


def _prefetcher(number: int) -> Any:
    if number not in _PREFETCHERS:
        raise ValueError(f"engram_kernels: there is no prefetcher {number} (any more)")
    return _PREFETCHERS[number]


@torch.library.impl(LIB, "prefetch_submit", "CompositeExplicitAutograd")
def prefetch_submit(row_ids: Tensor, prefetcher: int) -> Tensor:
    """`RowPrefetcher.submit` as a torch op.

    Args:
        row_ids: as for `RowPrefetcher.submit`.
        prefetcher: `RowPrefetcher.handle`.

    Returns:
        [1] int64 on the CPU, the ticket.

    Raises:
        PrefetchQueueFull: as many requests are in flight as `depth` allows.
    """
    return torch.tensor([_prefetcher(prefetcher).submit(row_ids)])


@torch.library.impl(LIB, "prefetch_wait", "CompositeExplicitAutograd")
def prefetch_wait(ticket: Tensor, row_ids: Tensor, prefetcher: int) -> Tensor:
    """`RowPrefetcher.wait` as a torch op.

    Args:
        ticket: what `prefetch_submit` returned.
        row_ids: the same ids, for the shape.
        prefetcher: `RowPrefetcher.handle`.

    Returns:
        [*row_ids.shape, D] rows, a tensor of their own.
    """
    owner = _prefetcher(prefetcher)
    out = torch.empty((*row_ids.shape, owner.row_dim), dtype=owner.out_dtype, device=owner.device)
    return owner.wait(int(ticket), out=out)


@torch.library.register_fake("engram_kernels::prefetch_submit", lib=LIB)
def _fake_submit(row_ids: Tensor, prefetcher: int) -> Tensor:
    return torch.empty(1, dtype=torch.int64)


@torch.library.register_fake("engram_kernels::prefetch_wait", lib=LIB)
def _fake_wait(ticket: Tensor, row_ids: Tensor, prefetcher: int) -> Tensor:
    owner = _prefetcher(prefetcher)
    return torch.empty((*row_ids.shape, owner.row_dim), dtype=owner.out_dtype, device=owner.device)
