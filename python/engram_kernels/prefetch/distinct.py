"""Ids on a device, made distinct there: what policy uva_distinct fetches over the link."""
from __future__ import annotations

import contextlib
import threading

import torch
from torch import Tensor


def distinct_ids(row_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct ids of a batch, in memory whose size does not depend on the data: nobody waits for the device.

    Args:
        row_ids: int32 or int64, any shape, at least one; -1 means no row.

    Returns:
        ids [n] of the dtype, ascending, then -1; places [n] int32, which of them each position wants (-1: none); and how many
        there are, [] int64.
    """
    flat = row_ids.reshape(-1)
    ordered, order = flat.sort()
    begins = ordered != -1
    begins[1:] &= ordered[1:] != ordered[:-1]
    place = begins.cumsum(0, dtype=torch.int64) - 1
    ids = flat.new_full((len(flat) + 1,), -1)
    ids.scatter_(0, torch.where(begins, place, len(flat)), ordered)  # the last one takes what comes again
    places = torch.empty_like(place, dtype=torch.int32).scatter_(0, order, place.to(torch.int32))
    return ids[:-1], places, place[-1] + 1


class DistinctIds:
    """Makes ids distinct on a stream of its own, and counts what that saves.

    Args:
        device: of the ids.
        least: ids that a request must have; fewer are gathered as they are.
    """

    def __init__(self, device: torch.device, least: int):
        self.least, self.asked, self.requests = least, 0, 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lock = threading.Lock()
        self._fetched = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, row_ids: Tensor) -> tuple[Tensor, Tensor, int]:
        """ids and places, as `distinct_ids` gives them, and the stream that makes them (0: none)."""
        stream = self._stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext(), torch.no_grad():
            ids, places, count = distinct_ids(row_ids)
            with self._lock:
                self._fetched += count
        if stream is not None:
            row_ids.record_stream(stream)
        with self._lock:
            self.asked += row_ids.numel()
            self.requests += 1
        return ids, places, 0 if stream is None else int(stream.cuda_stream)

    def counters(self) -> dict[str, int]:
        """Requests whose ids were made distinct, the rows that these asked for, and those that were fetched. Waits for the
        stream."""
        if self._stream is not None:
            self._stream.synchronize()
        return {"requests": self.requests, "asked": self.asked, "fetched": int(self._fetched)}
