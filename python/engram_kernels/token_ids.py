"""Which of many token ids are in a given set, in a few comparisons and without a synchronization."""
from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def mark_ids(token_ids: Tensor, wanted: Iterable[int], mask: Tensor | None = None) -> Tensor | None:
    """bool of the shape of `token_ids`, True where the id is wanted or `mask` is True; `mask` itself where none is wanted.

    Sets of special tokens are runs of ids, and a run is two comparisons, which a CUDA graph can hold; `torch.isin` would copy
    the set to the device at each call.
    """
    for low, high in _runs(wanted):
        inside = token_ids == low if low == high else (token_ids >= low) & (token_ids <= high)
        mask = inside if mask is None else mask | inside
    return mask


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """The numbers as runs without gaps: (first, last)."""
    runs: list[tuple[int, int]] = []
    for n in sorted(set(numbers)):
        if runs and runs[-1][1] == n - 1:
            runs[-1] = (runs[-1][0], n)
        else:
            runs.append((n, n))
    return runs
