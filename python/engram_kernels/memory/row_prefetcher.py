"""RowPrefetcher: rows of a table fetched behind the caller's compute."""
import queue
import threading
import time
from typing import Any

import torch
from torch import Tensor

from engram_kernels._checks import expect_tensor
from engram_kernels.memory.row_table import RowTable
from engram_kernels.ops.gather_rows import gather_rows


class _Ticket:
    """One submitted request and the buffer that its rows go to."""

    def __init__(self, row_ids: Tensor, buffer: Tensor):
        self.row_ids = row_ids
        self.rows = buffer
        self.done = threading.Event()
        self.error: BaseException | None = None


class RowPrefetcher:
    """Gathers rows on a worker thread while the caller computes.

    Scope: one table, one worker, requests in the order of their submission, a ring of ``depth + 1`` buffers: ``depth``
    requests in flight and the rows that the caller is reading. It does not cache rows between requests.

    Rows equal ``gather_rows(table, row_ids, out_dtype)`` bit for bit. An error of a request is raised by the `wait` of its
    own ticket and leaves the others whole.

    Ownership: `table` and `row_ids` must not change while a request is in flight. The tensor that `wait` returns is valid
    until the next `wait` without ``out=``; pass ``out=`` to keep rows longer. Threads: `submit` and `wait(out=)` may be called
    from several threads, `wait` without ``out=`` from one; a ticket is waited for once. Rows carry no gradient. Not to be used
    in a child after a fork: the worker stays with the parent.

    Args:
        table: where the rows are, in memory or in a file.
        device: where the rows are wanted; "cpu".
        depth: requests that may be in flight, at least 1.
        out_dtype: dtype of the rows.

    Raises:
        TypeError: `table` is no RowTable.
        ValueError: `depth` is less than 1, or `device` is not "cpu".

    Source: `spec/semantics.md` section 11; the ids depend on tokens alone, so a step's rows can be fetched during the one before.
    """

    def __init__(self, table: RowTable, device: str | torch.device = "cpu", depth: int = 1,
                 out_dtype: torch.dtype = torch.bfloat16):
        if not isinstance(table, RowTable):
            raise TypeError(f"RowPrefetcher: table must be a RowTable, got {type(table).__name__}")
        if depth < 1:
            raise ValueError(f"RowPrefetcher: depth is {depth}, expected at least 1")
        if torch.device(device).type != "cpu":
            raise ValueError(f"RowPrefetcher: device is {device}, expected cpu")
        self._table, self._out_dtype, self._depth = table, out_dtype, depth
        self._tickets: dict[int, _Ticket] = {}
        self._free = [torch.empty(0, dtype=out_dtype) for _ in range(depth + 1)]
        self._reading: Tensor | None = None  # the buffer that the last wait returned
        self._next_ticket = 0
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[_Ticket | None] = queue.SimpleQueue()
        self._closed = False
        self._counts = {"requests": 0, "rows": 0, "payload_bytes": 0, "fetch_s": 0.0, "exposed_wait_s": 0.0}
        self._worker = threading.Thread(target=self._run, name="engram-row-prefetcher", daemon=True)
        self._worker.start()

    def submit(self, row_ids: Tensor) -> int:
        """Starts fetching the rows of `row_ids`; returns a ticket without waiting for data.

        Args:
            row_ids: int32 or int64, any shape, on the CPU; -1 means zeros.

        Returns:
            A ticket for `wait`.

        Raises:
            RuntimeError: the prefetcher is closed, or `depth` requests are in flight and none was waited for.

        Source: semantics 11. Bad ids are reported by `wait`.
        """
        if not isinstance(row_ids, Tensor):
            raise TypeError(f"RowPrefetcher: row_ids must be a tensor, got {type(row_ids).__name__}")
        with self._lock:
            if self._closed:
                raise RuntimeError("RowPrefetcher: submit after close")
            if len(self._tickets) >= self._depth:
                raise RuntimeError(f"RowPrefetcher: {self._depth} requests are in flight, as many as depth allows; "
                                   "wait for one first")
            ticket, number = _Ticket(row_ids, self._free.pop()), self._next_ticket
            self._tickets[number] = ticket
            self._next_ticket += 1
            self._work.put(ticket)
        return number

    def wait(self, ticket: int, out: Tensor | None = None, timeout_s: float | None = None) -> Tensor:
        """The rows of a ticket, in the order of its ids, duplicates included.

        Args:
            ticket: what `submit` returned.
            out: [*row_ids.shape, D], written and returned instead of the prefetcher's own buffer.
            timeout_s: seconds to wait at most; None: no limit.

        Returns:
            [*row_ids.shape, D] rows; without `out`, valid until the next `wait`.

        Raises:
            ValueError: `out` has another shape or dtype; the ticket stays valid.
            KeyError: no such ticket, or it was waited for before.
            TimeoutError: the rows did not come in time; the ticket stays valid.
            Exception: what went wrong with this request, such as IndexError for a bad id or OSError for a bad file.
        """
        with self._lock:
            if ticket not in self._tickets:
                raise KeyError(f"RowPrefetcher: ticket {ticket} is unknown or was waited for before")
            request = self._tickets[ticket]
        shape = (*request.row_ids.shape, self._table.row_dim)
        if out is not None:
            expect_tensor("RowPrefetcher.wait", "out", out, (self._out_dtype,), shape, torch.device("cpu"))
        start = time.perf_counter()
        arrived = request.done.wait(timeout_s)
        waited = time.perf_counter() - start
        with self._lock:
            self._counts["exposed_wait_s"] += waited
            if not arrived:
                raise TimeoutError(f"RowPrefetcher: ticket {ticket} did not arrive in {timeout_s} s")
            if self._tickets.pop(ticket, None) is None:
                raise KeyError(f"RowPrefetcher: ticket {ticket} was waited for by another thread")
            if request.error is not None:
                self._free.append(request.rows)
                raise request.error
            if out is None:
                if self._reading is not None:
                    self._free.append(self._reading)
                self._reading = request.rows
        rows = request.rows[:request.row_ids.numel() * self._table.row_dim].view(shape)
        if out is None:
            return rows
        out.copy_(rows)
        with self._lock:
            self._free.append(request.rows)  # only now: the worker may write into it at once
        return out

    def stats(self) -> dict[str, Any]:
        """Counters since the start: requests, rows, payload_bytes (as stored), fetch_s (worker busy), exposed_wait_s."""
        with self._lock:
            return dict(self._counts, depth=self._depth, in_flight=len(self._tickets))

    def close(self) -> None:
        """Finishes what is in flight and stops the worker. Tickets that were not waited for are dropped."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._work.put(None)
        self._worker.join()
        self._tickets.clear()

    def __enter__(self) -> "RowPrefetcher":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self) -> None:
        while (request := self._work.get()) is not None:
            start = time.perf_counter()
            try:
                self._fetch(request)
            except BaseException as err:  # whatever it is belongs to the ticket's wait
                request.error = err
            with self._lock:
                self._counts["requests"] += 1
                self._counts["fetch_s"] += time.perf_counter() - start
                if request.error is None:
                    self._counts["rows"] += request.row_ids.numel()
                    self._counts["payload_bytes"] += request.row_ids.numel() * self._table.row_bytes
            request.done.set()

    def _fetch(self, request: _Ticket) -> None:
        size = request.row_ids.numel() * self._table.row_dim
        if request.rows.numel() < size:
            request.rows = torch.empty(size, dtype=self._out_dtype)
        out = request.rows[:size].view(*request.row_ids.shape, self._table.row_dim)
        with torch.no_grad():  # a thread of its own does not inherit the caller's grad mode
            gather_rows(self._table, request.row_ids, self._out_dtype, out=out)
