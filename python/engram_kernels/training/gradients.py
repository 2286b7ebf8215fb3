"""Gradients of rows that backward passes leave between two steps."""
from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor


class Gradients:
    """What backward passes left since the last step: ids and gradients, in the order in which they came."""

    def __init__(self) -> None:
        self.lock, self.is_open = threading.Lock(), True
        self.clear()

    def clear(self) -> None:
        self.row_ids: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.events: list[Any] = []

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
        with self.lock:
            self.row_ids.append(row_ids)
            self.grads.append(grad)
            self.events += [] if event is None else [event]
