"""Row ids in the orders that a profile measures."""
from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ORDERS = ("uniform", "sorted", "deduplicated", "zipf", "trace")
_SCATTER = 0x9E3779B1  # odd: spreads the frequent rows over the table


def draw(order: str, num_rows: int, count: int, rng: np.random.Generator,
         trace: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Ids in [0, num_rows).

    Args:
        order: "uniform"; "sorted": the same, ascending; "zipf": the frequency of the k-th row is about 1 / k, its place random;
            "deduplicated": the distinct rows of such a draw, in the order of their first use, so there are fewer than `count`;
            "trace": the ids of `trace` from a random place on, modulo num_rows.
        num_rows, count: how many rows and ids.
        rng: the source of chance.
        trace: for the order "trace".

    Returns:
        int64 ids, contiguous.
    """
    if order == "uniform":
        return rng.integers(0, num_rows, count)
    if order == "sorted":
        return np.sort(rng.integers(0, num_rows, count))
    if order == "trace":
        assert trace is not None
        start = int(rng.integers(0, trace.size))
        return np.take(trace, np.arange(start, start + count), mode="wrap") % num_rows
    # log-uniform ranks: P(rank <= k) = log(k + 1) / log(num_rows + 1)
    ranks = np.minimum(np.exp(rng.random(count) * np.log(num_rows + 1.0)).astype(np.int64) - 1, num_rows - 1)
    ids = (ranks * _SCATTER) % num_rows
    if order == "zipf":
        return ids
    if order == "deduplicated":
        _, first = np.unique(ids, return_index=True)
        return ids[np.sort(first)]
    raise ValueError(f"draw: order is {order!r}, expected one of {', '.join(ORDERS)}")


def load_trace(path: Path) -> NDArray[np.int64]:
    """The ids of a .npy file.

    Raises:
        ValueError: it holds no ids, or negative ones.
    """
    ids = np.load(path, allow_pickle=False)
    if not isinstance(ids, np.ndarray) or ids.size == 0 or ids.dtype.kind not in "iu" or ids.min() < 0:
        raise ValueError(f"{path}: expected a .npy file of row ids, integers of at least 0")
    return ids.reshape(-1).astype(np.int64)
