"""torch ops of the prefetcher, for compiled graphs: `prefetch_submit` and `prefetch_wait`, by the number of a prefetcher."""
from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from engram_kernels._library import LIB
from engram_kernels._modes import plain_tensors

_PREFETCHERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()

# The ticket is data, so that a graph keeps the order of the two calls. The prefetcher is data too: a number in the graph would
# cost a graph for each prefetcher. What the shape and dtype of the rows follow from are arguments, since a graph that is cached
# on disk knows nothing of the prefetcher of another process.
# The tag says that a call has effects of its own: without it Inductor moves a submit down to its wait, and nothing is hidden.
# It does not keep a wait behind the compute: Inductor moves the operands of what follows (reorder_for_locality) past a tagged
# op, and a later submit in front of an earlier wait. `after` keeps the order, since it makes it data.
_TAGS = (torch.Tag.nondeterministic_seeded,)
LIB.define("prefetch_submit(Tensor row_ids, Tensor prefetcher, Tensor? after=None) -> Tensor", tags=_TAGS)
LIB.define("prefetch_wait(Tensor ticket, Tensor row_ids, Tensor prefetcher, int row_dim, ScalarType out_dtype, Device device,"
           " Tensor? after=None) -> Tensor", tags=_TAGS)


def register_prefetcher(prefetcher: Any) -> Tensor:
    """The number that the ops know `prefetcher` by, while it lives: [1] int64 on the CPU."""
    number = next(_numbers)
    _PREFETCHERS[number] = prefetcher
    with plain_tensors():  # a mode, or a default device, would make another number of it
        return torch.tensor([number], device="cpu")


def _prefetcher(handle: Tensor) -> Any:
    number = int(handle)
    if number not in _PREFETCHERS:
        raise ValueError(f"engram_kernels: there is no prefetcher {number} (any more)")
    return _PREFETCHERS[number]


@torch.library.impl(LIB, "prefetch_submit", "CompositeExplicitAutograd")
def prefetch_submit(row_ids: Tensor, prefetcher: Tensor, after: Tensor | None = None) -> Tensor:
    """`RowPrefetcher.submit` as a torch op.

    Args:
        row_ids: as for `RowPrefetcher.submit`.
        prefetcher: `RowPrefetcher.handle`.
        after: what must be there before, such as the rows of the last wait; it is not read. Without it a compiler may submit
            before an earlier wait, and one request more is in flight.

    Returns:
        [1] int64 on the CPU, the ticket.

    Raises:
        PrefetchQueueFull: as many requests are in flight as `depth` allows.
    """
    return torch.tensor([_prefetcher(prefetcher).submit(row_ids)], device="cpu")


@torch.library.impl(LIB, "prefetch_wait", "CompositeExplicitAutograd")
def prefetch_wait(ticket: Tensor, row_ids: Tensor, prefetcher: Tensor, row_dim: int, out_dtype: torch.dtype,
                  device: torch.device, after: Tensor | None = None) -> Tensor:
    """`RowPrefetcher.wait` as a torch op.

    Args:
        ticket: what `prefetch_submit` returned.
        row_ids: the same ids, for the shape.
        prefetcher: `RowPrefetcher.handle`.
        row_dim: `RowPrefetcher.row_dim`.
        out_dtype: `RowPrefetcher.out_dtype`.
        device: `RowPrefetcher.device`.
        after: what the compute made that the fetch is to hide behind, such as its last tensor; it is not read. Without it a
            compiler may move that compute behind the wait.

    Returns:
        [*row_ids.shape, row_dim] rows, a tensor of their own.

    Raises:
        ValueError: the prefetcher has another row_dim, out_dtype or device.
    """
    owner = _prefetcher(prefetcher)
    for name, got in (("row_dim", row_dim), ("out_dtype", out_dtype), ("device", device)):
        if got != getattr(owner, name):
            raise ValueError(f"prefetch_wait: {name} is {got}, that of the prefetcher is {getattr(owner, name)}")
    out = torch.empty((*row_ids.shape, row_dim), dtype=out_dtype, device=device)
    rows: Tensor = owner.wait(int(ticket), out=out)
    return rows


@torch.library.impl(LIB, "prefetch_submit", "Autograd")
def _submit_without_grad(*args: Any, **kwargs: Any) -> Tensor:
    """A ticket carries no gradient, whether or not `after` does."""
    with torch._C._AutoDispatchBelowAutograd():
        ticket: Tensor = torch.ops.engram_kernels.prefetch_submit.default(*args, **kwargs)
    return ticket


@torch.library.impl(LIB, "prefetch_wait", "Autograd")
def _wait_without_grad(*args: Any, **kwargs: Any) -> Tensor:
    """Rows carry no gradient, whether or not `after` does."""
    with torch._C._AutoDispatchBelowAutograd():
        rows: Tensor = torch.ops.engram_kernels.prefetch_wait.default(*args, **kwargs)
    return rows


@torch.library.register_fake("engram_kernels::prefetch_submit", lib=LIB)
def _fake_submit(row_ids: Tensor, prefetcher: Tensor, after: Tensor | None = None) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device="cpu")


@torch.library.register_fake("engram_kernels::prefetch_wait", lib=LIB)
def _fake_wait(ticket: Tensor, row_ids: Tensor, prefetcher: Tensor, row_dim: int, out_dtype: torch.dtype,
               device: torch.device, after: Tensor | None = None) -> Tensor:
    return torch.empty((*row_ids.shape, row_dim), dtype=out_dtype, device=device)
