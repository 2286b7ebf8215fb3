"""The stand-in for the compiled prefetcher where the compiled module is missing: one thread, gather_rows, the same errors."""
from __future__ import annotations

import collections
import os
import threading
import time
from typing import Any

import torch
from torch import Tensor

from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.prefetch.errors import PrefetchCancelled, PrefetchQueueFull
from engram_kernels.prefetch.runtime import RuntimeOptions


class _Request:
    def __init__(self, row_ids: Tensor, slot: int):
        self.row_ids, self.slot = row_ids.clone(), slot
        self.error: BaseException | None = None
        self.running = self.settled = self.gone = False


class PythonRuntime:
    """The methods of `CompiledRuntime`, on the CPU. No staging ring, no trace; counters of what it knows."""

    def __init__(self, options: RuntimeOptions):
        if options.device.type != "cpu":
            raise RuntimeError(f"RowPrefetcher: device {options.device} is not available without the compiled module")
        self._options, self._process = options, os.getpid()
        self._ring: list[Tensor] = [torch.empty(0, dtype=options.out_dtype) for _ in range(options.depth + 1)]
        self._free = collections.deque(range(options.depth + 1))
        self._tickets: dict[int, _Request] = {}
        self._queue: collections.deque[_Request] = collections.deque()
        self._changed = threading.Condition()
        self._next_ticket, self._in_flight, self._reading, self._closed = 0, 0, -1, False
        self._counts = collections.Counter[str]()
        self._fetch_s = self._wait_s = 0.0
        self._worker = threading.Thread(target=self._run, name="engram-row-prefetcher", daemon=True)
        self._worker.start()

    def submit(self, row_ids: Tensor, timeout_s: float) -> int:
        """A ticket."""
        options = self._options
        row_bytes = options.table.row_dim * options.out_dtype.itemsize
        if row_ids.numel() * row_bytes > options.slot_bytes:
            raise ValueError(f"RowPrefetcher: {row_ids.numel()} ids need {row_ids.numel() * row_bytes} bytes of rows, a slot of "
                             f"the ring has {options.slot_bytes}; raise ring_bytes or submit fewer")
        with self._changed:
            self._wait_for(lambda: self._closed or (self._in_flight < options.depth and bool(self._free)), timeout_s)
            if self._closed:
                raise RuntimeError("RowPrefetcher: submit after close")
            if self._in_flight >= options.depth or not self._free:
                raise PrefetchQueueFull(f"RowPrefetcher: {self._in_flight} requests are in flight, as many as depth allows "
                                        f"({options.depth}); wait for one first")
            request, number = _Request(row_ids, self._free.popleft()), self._next_ticket
            self._tickets[number] = request
            self._next_ticket += 1
            self._in_flight += 1
            self._queue.append(request)
            self._changed.notify_all()
        return number

    def wait(self, ticket: int, timeout_s: float, keep: bool) -> int:
        """The slot of a ticket."""
        start = time.perf_counter()
        with self._changed:
            request = self._tickets.get(ticket)
            if request is None:
                raise KeyError(f"RowPrefetcher: ticket {ticket} is unknown, was cancelled, or was waited for before")
            arrived = self._wait_for(lambda: request.settled or request.gone, timeout_s)
            self._wait_s += time.perf_counter() - start
            if request.gone:
                raise PrefetchCancelled(f"RowPrefetcher: ticket {ticket} was cancelled")
            if not arrived:
                raise TimeoutError(f"RowPrefetcher: ticket {ticket} did not arrive in {timeout_s} s")
            if self._tickets.pop(ticket, None) is None:
                raise KeyError(f"RowPrefetcher: ticket {ticket} was waited for by another thread")
            self._counts["requests"] += 1
            self._counts["requested"] += request.row_ids.numel()
            if request.error is not None:
                self._counts["failed"] += 1
                self._give(request.slot)
                raise request.error
            if not keep:
                if self._reading >= 0:
                    self._free.append(self._reading)
                self._reading = request.slot
                self._in_flight -= 1
                self._changed.notify_all()
            return request.slot

    def release(self, slot: int) -> None:
        """The slot may be written again."""
        with self._changed:
            self._give(slot)

    def rows(self, slot: int, count: int) -> Tensor:
        """The first `count` elements of a slot."""
        return self._ring[slot][:count]

    def knows(self, ticket: int) -> bool:
        """Whether the ticket can be waited for."""
        return ticket in self._tickets

    def cancel(self, ticket: int) -> bool:
        """Forgets a ticket; False: there is none."""
        with self._changed:
            request = self._tickets.pop(ticket, None)
            if request is None:
                return False
            self._counts["cancelled"] += 1
            self._drop(request)
            return True

    def drain(self, timeout_s: float) -> None:
        """Until every request that was submitted has arrived or failed."""
        with self._changed:
            requests = list(self._tickets.values())
            if not self._wait_for(lambda: all(r.settled or r.gone for r in requests), timeout_s):
                raise TimeoutError(f"RowPrefetcher: requests did not arrive in {timeout_s} s")

    def close(self) -> None:
        """Drops what is in flight and ends the thread. Nothing in a child after a fork, which has neither thread nor lock."""
        if os.getpid() != self._process:
            return
        with self._changed:
            self._closed = True
            while self._tickets:
                self._drop(self._tickets.popitem()[1])
            self._changed.notify_all()
        self._worker.join()

    def counters(self) -> dict[str, Any]:
        """Counters of the compiled runtime, without `unique` and hits, which this one does not know."""
        with self._changed:
            names = ("requests", "failed", "cancelled", "requested")
            return {**{name: self._counts[name] for name in names}, "fetch_s": self._fetch_s, "exposed_wait_s": self._wait_s,
                    "payload_bytes": self._counts["requested"] * self._options.table.row_bytes, "in_flight": self._in_flight,
                    "queued": len(self._queue), "memory_bytes": sum(slot.nbytes for slot in self._ring)}

    def clear_cache(self) -> None:
        """Nothing: there is no device that could have one."""

    def chrome_trace(self) -> str:
        """Refused: nothing is recorded."""
        raise RuntimeError("RowPrefetcher: a trace needs the compiled module")

    def _wait_for(self, ready: Any, timeout_s: float) -> bool:
        return bool(self._changed.wait_for(ready, None if timeout_s < 0 else timeout_s))

    def _give(self, slot: int) -> None:
        self._free.append(slot)
        self._in_flight -= 1
        self._changed.notify_all()

    def _drop(self, request: _Request) -> None:
        request.gone = True
        if request in self._queue:
            self._queue.remove(request)
        if not request.running:
            self._give(request.slot)
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._queue)
                if not self._queue:
                    return
                request = self._queue.popleft()
                request.running = True
            start = time.perf_counter()
            try:
                self._fetch(request)
            except BaseException as err:  # whatever it is belongs to the ticket's wait
                request.error = err
            with self._changed:
                request.running, request.settled = False, True
                self._fetch_s += time.perf_counter() - start
                if request.gone:
                    self._give(request.slot)
                self._changed.notify_all()

    def _fetch(self, request: _Request) -> None:
        table, ids = self._options.table, request.row_ids
        size = ids.numel() * table.row_dim
        if self._ring[request.slot].numel() < size:
            self._ring[request.slot] = torch.empty(size, dtype=self._options.out_dtype)
        with torch.no_grad():  # a thread of its own does not inherit the caller's grad mode
            gather_rows(table, ids, self._options.out_dtype, out=self._ring[request.slot][:size].view(*ids.shape, table.row_dim))
