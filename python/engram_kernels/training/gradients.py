"""Gradients of rows that backward passes leave between two steps."""
from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class Gradient:
    """The gradient that one backward pass gave to the rows of one ticket."""

    row_ids: Tensor
    grad: Tensor  # [n, D]
    event: Any  # of a device, behind which `grad` is there; or None


class Gradients:
    """What backward passes left since the last step, in the order in which they came.

    Those of a step stay until it is in the table, and the first `count` of the steps that are queued are not given again. So an
    interrupt at any point of a call applies none of them twice.
    """

    def __init__(self) -> None:
        self._lock, self.is_open = threading.Lock(), True
        self._entries: list[Gradient] = []

    def take(self, rows: Tensor, row_ids: Tensor) -> None:
        """Takes the gradient of a leaf, which has none afterwards."""
        grad, rows.grad = rows.grad, None
        if grad is None:
            return
        if not self.is_open:
            raise RuntimeError("TrainableRows: a backward pass reached rows of a TrainableRows that is closed; their "
                               "gradient is lost")
        grad = grad.detach().reshape(row_ids.numel(), -1).contiguous()
        event = None
        if grad.is_cuda:
            event = torch.cuda.Event()
            event.record()
        with self._lock:
            self._entries.append(Gradient(row_ids, grad, event))

    def behind(self, count: int) -> list[Gradient]:
        """The gradients behind the first `count`."""
        with self._lock:
            return self._entries[count:]

    def drop(self, begin: int, end: int | None) -> None:
        """Forgets the gradients in [begin, end); an `end` of None means all from `begin` on."""
        with self._lock:
            del self._entries[begin:end]
