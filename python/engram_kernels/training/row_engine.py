"""The thread behind a TrainableRows: it fetches rows and updates the table, never both at the same time."""
from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.prefetch.row_prefetcher import RowPrefetcher
from engram_kernels.table.held_tables import HeldTable
from engram_kernels.training.gradients import Gradient, Gradients

if TYPE_CHECKING:
    from engram_kernels.training.row_optimizer import RowOptimizer


@dataclasses.dataclass
class Fetch:
    """A ticket: ids, and the rows once they are here."""

    row_ids: Tensor  # int64 [n] in host memory, its own
    shape: torch.Size
    rows: Tensor | None = None
    distinct: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64, device="cpu"))  # ids, sorted
    error: BaseException | None = None
    steps: int = 0  # that the rows have seen
    is_patched: bool = False  # being patched: nobody may take it
    ready: Any = None  # an event of the device

    def is_there(self) -> bool:
        """Whether the ticket can be taken."""
        return not self.is_patched and (self.rows is not None or self.error is not None)


@dataclasses.dataclass
class Update:
    """What one step applies."""

    gradients: list[Gradient]
    rates: dict[str, Any]
    grad_scale: float | Tensor


@dataclasses.dataclass
class Counters:
    """What `TrainableRows.stats` counts: rows, unless the name says otherwise."""

    waits: int = 0
    requested: int = 0
    updated: int = 0
    regathered: int = 0  # distinct rows of a ticket that a step updated after they were fetched
    regathered_positions: int = 0
    regathered_tickets: int = 0
    steps_lagged: int = 0  # sum over the waits
    max_lag: int = 0
    wait_s: float = 0.0  # of the callers
    fetch_s: float = 0.0
    update_s: float = 0.0
    regather_s: float = 0.0


class RowEngine:
    """Fetches and updates in one thread of its own: updates first, fetches in the order of submission.

    So a fetch sees the table as a step left it, and no row is torn. Of a step the rows come first that tickets which are here
    have, and those are gathered again; so such a ticket can be taken while the step's other rows are updated.

    Ownership: holds table and optimizer. Threads: every method from any. Failure: that of an update is raised by the next call
    that asks (`raise_failure`), that of a fetch is the ticket's.
    """

    def __init__(self, table: Any, optimizer: RowOptimizer, held: HeldTable, out_dtype: torch.dtype, device: torch.device,
                 prefetcher: RowPrefetcher | None):
        self.table, self.optimizer, self._held, self.out_dtype, self.device = table, optimizer, held, out_dtype, device
        self.prefetcher = prefetcher
        self.gradients = Gradients()
        self.changed = threading.Condition()
        self.counters = Counters()
        self.patched = self.done = 0  # steps that tickets have seen which are here, and those that the table has seen
        self.flying: dict[int, Fetch] = {}
        self._fetches: deque[Fetch] = deque()
        self._updates: deque[Update] = deque()
        self._failure: BaseException | None = None
        self._closed = False
        self._version = _version(table)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = threading.Thread(target=self._work, name="engram_kernels: trainable rows", daemon=True)
        self._thread.start()

    # ---- callers ------------------------------------------------------------------------------------------------------

    def fetch(self, ticket: int, fetch: Fetch) -> None:
        """Queues a fetch."""
        with self.changed:
            self._notice_writes()
            self.flying[ticket] = fetch
            self._fetches.append(fetch)
            self.changed.notify_all()

    def take(self, ticket: int, staleness: int, timeout_s: float | None) -> Fetch | None:
        """The ticket once its rows are here and no more than `staleness` steps behind; None: not in time."""
        begin = time.perf_counter()
        with self.changed:
            fetch = self.flying[ticket]
            wanted = self.returned - staleness
            arrived = self.changed.wait_for(
                lambda: self._closed or self._failure is not None or ticket not in self.flying
                or (self.patched >= wanted and fetch.is_there()), timeout_s)
            self.raise_failure()
            if not arrived:
                return None
            if self._closed or ticket not in self.flying:
                fetch.error = RuntimeError(f"TrainableRows: ticket {ticket} was cancelled, or all was closed")
                return fetch
            self._notice_writes()
            del self.flying[ticket]
            counters, lag = self.counters, self.returned - fetch.steps
            counters.waits += 1
            counters.requested += fetch.row_ids.numel()
            counters.steps_lagged += lag
            counters.max_lag = max(counters.max_lag, lag)
            counters.wait_s += time.perf_counter() - begin
        return fetch

    @property
    def returned(self) -> int:
        """Steps that `update` took."""
        return self.done + len(self._updates)

    def untaken(self) -> list[Gradient]:
        """Under the lock: the gradients that no step took."""
        return self.gradients.behind(self._taken())

    def _taken(self) -> int:
        return sum(len(update.gradients) for update in self._updates)

    def drop_untaken(self) -> None:
        """Forgets the gradients that no step took."""
        with self.changed:
            self.gradients.drop(self._taken(), None)

    def update(self, rates: dict[str, Any], grad_scale: float | Tensor, most_pending: int) -> bool:
        """Queues a step of the gradients that no step took, once fewer than `most_pending` are queued. False: there are none."""
        with self.changed:
            if not self.untaken():
                return False
            self.changed.wait_for(lambda: self._closed or self._failure is not None or len(self._updates) < most_pending)
            self.raise_failure()
            self._notice_writes()
            self._updates.append(Update(self.untaken(), rates, grad_scale))  # from here on they are taken
            self.changed.notify_all()
        return True

    def flush(self) -> None:
        """Waits until no step is queued; raises what one of them failed with."""
        with self.changed:
            self.changed.wait_for(lambda: not self._updates)
            self.raise_failure()

    def raise_failure(self) -> None:
        """Under the lock: raises what a step failed with, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def pending(self) -> int:
        """Steps that are queued or running."""
        return len(self._updates)

    def close(self) -> None:
        """Takes the steps that are queued, drops the fetches, ends the thread."""
        with self.changed:
            self._closed = True
            self._fetches.clear()
            self.flying.clear()
            self.changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # ---- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        with torch.no_grad(), torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self._closed or self._updates or self._fetches)
                    if not self._updates and not self._fetches:
                        return
                    job: Any = self._updates[0] if self._updates else self._fetches.popleft()
                if isinstance(job, Update):
                    self._run_update(job)
                else:
                    self._run_fetch(job)
                del job  # its tensors

    def _run_fetch(self, fetch: Fetch) -> None:
        begin = time.perf_counter()
        rows = error = None
        try:
            if self.optimizer.file is not None:
                self.optimizer.file.make_whole()
            rows, fetch.distinct = self._fetched(fetch), torch.unique(fetch.row_ids)
        except BaseException as err:
            error = err
        with self.changed:
            fetch.rows, fetch.error, fetch.steps = rows, fetch.error or error, self.done
            fetch.ready = self._record()
            self.counters.fetch_s += time.perf_counter() - begin
            self.changed.notify_all()

    def _fetched(self, fetch: Fetch) -> Tensor:
        if self.prefetcher is None:
            return gather_rows(self.table, fetch.row_ids.view(fetch.shape), self.out_dtype).detach()
        out = torch.empty(*fetch.shape, self.table.row_dim, dtype=self.out_dtype, device=self.device)
        ticket = self.prefetcher.submit(fetch.row_ids.view(fetch.shape))
        return self.prefetcher.wait(ticket, out=out)

    def _run_update(self, update: Update) -> None:
        begin = time.perf_counter()
        failure, updated = None, 0
        with self.changed:
            here = [fetch for fetch in self.flying.values() if fetch.rows is not None]
        try:
            row_ids, grads = _joined([one.row_ids for one in update.gradients]), self._grads_here(update.gradients)
            touched = torch.zeros(row_ids.shape, dtype=torch.bool, device="cpu")
            for fetch in here:
                touched |= _places(fetch.distinct, row_ids)[1]
            urgent = torch.unique(row_ids[touched & (row_ids != -1)])
            steps = self.optimizer.num_steps
            with self._held.writing():  # rows that tickets wait for come first: their `wait` need not wait for the others
                self.optimizer.apply(row_ids, grads, update.rates, update.grad_scale, first=touched,
                                     then=lambda: self._patch(here, urgent))
            if self.optimizer.num_steps > steps:
                updated = torch.unique(row_ids[row_ids != -1]).numel()
        except BaseException as err:
            failure = err
        with self.changed:
            self._version = _version(self.table)
            self.gradients.drop(0, len(update.gradients))
            self._updates.popleft()
            self.done += 1
            self._release(here, self.done)
            self.counters.updated += updated
            self.counters.update_s += time.perf_counter() - begin
            self._failure = self._failure or failure
            self.changed.notify_all()

    def _release(self, here: list[Fetch], number: int) -> None:
        """Under the lock: the tickets are as of step `number`; they may be already."""
        if self.patched >= number:
            return
        self.patched = number
        for fetch in here:
            fetch.is_patched, fetch.steps = False, number
        self.changed.notify_all()

    def _grads_here(self, gradients: list[Gradient]) -> Tensor:
        """The gradients of all micro-batches, one behind the other, where the table's rows are updated."""
        for one in gradients:
            if one.event is not None:
                torch.cuda.current_stream(self.device).wait_event(one.event)
        grads = _joined([one.grad for one in gradients])
        if grads.is_cuda:
            for one in gradients:
                one.grad.record_stream(torch.cuda.current_stream(self.device))
            host = torch.empty(grads.shape, dtype=grads.dtype, device="cpu", pin_memory=True)
            host.copy_(grads, non_blocking=True)
            torch.cuda.current_stream(self.device).synchronize()
            return host
        return grads

    def _patch(self, here: list[Fetch], urgent: Tensor) -> None:
        """Gathers again what tickets that are here have of these rows, which are updated."""
        begin = time.perf_counter()
        with self.changed:  # with staleness one may have been taken meanwhile
            here = [fetch for fetch in self.flying.values() if any(fetch is one for one in here)]
            for fetch in here:
                fetch.is_patched = True
        for fetch in here if urgent.numel() else ():
            try:
                self._regather(fetch, urgent)
            except BaseException as err:  # its rows are of before the step
                fetch.error = fetch.error or err
        with self.changed:
            self._release(here, self.done + 1)
            self.counters.regather_s += time.perf_counter() - begin

    def _regather(self, fetch: Fetch, distinct: Tensor) -> None:
        place, is_hit = _places(distinct, fetch.row_ids)
        positions = is_hit.nonzero().flatten()
        if not positions.numel():
            return
        assert fetch.rows is not None
        rows = gather_rows(self.table, fetch.row_ids[positions], self.out_dtype).detach()
        flat = fetch.rows.view(-1, self.table.row_dim)
        flat.index_copy_(0, positions.to(flat.device), rows.to(flat.device))
        fetch.ready = self._record()
        hit = torch.zeros(distinct.numel(), dtype=torch.bool, device="cpu")
        hit[place[positions]] = True
        self.counters.regathered += int(hit.sum())
        self.counters.regathered_positions += positions.numel()
        self.counters.regathered_tickets += 1

    def _record(self) -> Any:
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def _notice_writes(self) -> None:
        """Under the lock: where something else wrote to the rows, what was fetched before is no good."""
        if self._updates:
            return  # the thread writes just now
        version = _version(self.table)
        if version == self._version:
            return
        self._version = version
        for ticket, fetch in self.flying.items():
            fetch.error = RuntimeError(f"TrainableRows: ticket {ticket}: the table's rows were written to by something else "
                                       "after it was submitted, so its rows may be of before; submit it again")


def _joined(pieces: list[Tensor]) -> Tensor:
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _places(distinct: Tensor, row_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where each id would stand in a sorted vector, and whether it does."""
    if not distinct.numel():
        return torch.zeros_like(row_ids), torch.zeros(row_ids.shape, dtype=torch.bool, device="cpu")
    place = torch.searchsorted(distinct, row_ids).clamp_(max=distinct.numel() - 1)
    return place, distinct[place] == row_ids


def _version(table: Any) -> int:
    """What torch counts of the writes to the rows."""
    rows = table.rows
    return 0 if rows.is_meta or rows.is_inference() else rows._version


