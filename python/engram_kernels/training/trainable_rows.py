"""TrainableRows: rows of a table that is trained, fetched ahead of the backbone and updated behind it."""
from __future__ import annotations

import atexit
import collections
import itertools
import os
import warnings
import weakref
from typing import Any, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports dynamo at once, two seconds
from torch.utils.weak import TensorWeakRef

from engram_kernels._checks import FLOAT_DTYPES, expect_int
from engram_kernels._library import need_compiled
from engram_kernels.prefetch.row_prefetcher import PrefetchQueueFull, RowPrefetcher
from engram_kernels.row_format import FLOAT_FORMATS
from engram_kernels.table.held_tables import HeldTable
from engram_kernels.table.row_table import RowTable, expect_row_ids
from engram_kernels.training.row_engine import Fetch, RowEngine
from engram_kernels.training.row_optimizer import RowOptimizer

_OP = "TrainableRows"
_MOST_TAKEN = 256  # tickets that can be waited for again
_live: weakref.WeakSet[TrainableRows] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for rows in list(_live):
        rows.close()


class TrainableRows:
    """Rows of a table in host memory or in a file that is trained: fetched ahead of the backbone, updated behind it.

    ``ticket = mem.submit(next_ids)`` while the model computes, ``rows = mem.wait(ticket)`` where it needs them: a leaf tensor
    whose backward keeps (ids, gradient) here; ``mem.step()`` applies what was kept since the last step. One thread of its own
    fetches and updates, so a step costs the caller little: the table is updated while the dense optimizer, the data loader and
    the first layers of the next forward run.

    Exact: with staleness=0 `wait` gives the rows as of the last `step` that returned before it, bit for bit, as if every call
    had been made in turn. Rows that were fetched before that step and belong to it are gathered again, and those alone. A fetch
    and an update never overlap, so no row is torn. With staleness=k `wait` does not wait for the last k steps: rows are then as
    of one of the last k + 1 steps, whole, and results depend on timing.

    One update per step: the gradients of all backward passes since the last step, of all tickets, are summed row by row in the
    order in which they came, and each row is updated once. `optimizer` keeps its learning rate schedulers, `state_dict`, `save`.

    Ownership: holds the table and the optimizer. Until `close` nothing else may write to the rows: `row_update`, another
    optimizer and the optimizer's own `step` refuse; writes by torch make the tickets in flight fail. Writes that torch does not
    count (through ``rows.data``, numpy, another process) are not seen. Threads: every method from any; a ticket is waited for
    once, and again until the next step (checkpointing runs a forward twice). After a fork the child must make its own. Failure:
    of a fetch: raised by the `wait` of its ticket. Of a step: nothing of that step was written, and the next `step`, `wait`,
    `flush` or `close` raises it, once.

    Args:
        table: rows in host memory, or in a file that `optimizer` has opened for training; of a format that it takes.
        optimizer: a `RowOptimizer` of this table.
        depth: tickets that may be in flight, at least 1.
        staleness: steps that rows may be behind.
        device: where rows are wanted.
        out_dtype: dtype of the rows: float32, bfloat16 or float16; None: that of the table.
        options: of the `RowPrefetcher` that fetches for a GPU or from a file: policy, ring_bytes, staging_bytes, threads,
            background, surface, trace_spans.

    Attributes:
        table: the table.
        optimizer: the optimizer.
        num_rows: R.
        row_dim: D.

    Raises:
        TypeError: `table` is no RowTable, or `optimizer` no RowOptimizer.
        ValueError: an argument is out of range, the optimizer is of another table, or the table is on a device or held already.
        OSError: another process has the file open for training.

    Source: docs/training.md, "Rows behind the backbone".
    """

    def __init__(self, table: RowTable, optimizer: RowOptimizer, depth: int = 2, staleness: int = 0, *,
                 device: str | torch.device = "cpu", out_dtype: torch.dtype | None = None, **options: Any):
        if not isinstance(table, RowTable) or not isinstance(optimizer, RowOptimizer):
            raise TypeError(f"{_OP}: table is a {type(table).__name__} and optimizer a {type(optimizer).__name__}, expected a "
                            "RowTable and a RowOptimizer")
        need_compiled("a TrainableRows")
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(f"{_OP}: this is rank {dist.get_rank()} of {dist.get_world_size()}, and the rows get the gradients of "
                          "this rank alone: where others train the same layer on other tokens, their tables come apart; a "
                          "ShardedRows sums over the ranks", stacklevel=2)
        own = optimizer.table
        if own is not table and (own.tier == "file" or table.tier == "file" or own.rows.data_ptr() != table.rows.data_ptr()
                                 or own.rows.shape != table.rows.shape):
            raise ValueError(f"{_OP}: optimizer is of {own!r}, expected one of this table, {table!r}")
        if table.tier not in ("host", "file"):
            raise ValueError(f"{_OP}: table is on {table.device}, expected one in host memory or in a file: rows on the device "
                             "need no prefetch, a RowOptimizer updates them there")
        out_dtype = FLOAT_FORMATS.get(table.row_format, torch.bfloat16) if out_dtype is None else out_dtype
        if out_dtype not in FLOAT_DTYPES:
            raise ValueError(f"{_OP}: out_dtype is {out_dtype}, expected torch.float32, torch.bfloat16 or torch.float16")
        self.depth = expect_int(_OP, "depth", depth, 1, 1 << 20)
        self.staleness = expect_int(_OP, "staleness", staleness, 0, 1 << 20)
        self.table, self.optimizer, self.out_dtype = table, optimizer, out_dtype
        self.num_rows, self.row_dim, self.device = table.num_rows, table.row_dim, torch.device(device)
        optimizer._expect_free("TrainableRows")
        fetches_itself = self.device.type == "cpu" and table.tier == "host"
        if fetches_itself and options:
            raise ValueError(f"{_OP}: {', '.join(options)} is given, but rows in host memory that are wanted there take no "
                             "prefetcher")
        prefetcher = None if fetches_itself else RowPrefetcher(table, self.device, 1, out_dtype, **options)
        try:
            self._held = HeldTable(_OP, None if table.tier == "file" else table.rows)
        except BaseException:
            if prefetcher is not None:
                prefetcher.close()
            raise
        self._engine = RowEngine(table, optimizer, self._held, out_dtype, self.device, prefetcher)
        self._tickets = itertools.count()
        self._taken: collections.OrderedDict[int, tuple[Fetch, TensorWeakRef | None]] = collections.OrderedDict()
        self._process, self._is_closed = os.getpid(), False
        optimizer._holder = weakref.ref(self)
        _live.add(self)

    def __repr__(self) -> str:
        return (f"TrainableRows({self.table!r}, depth={self.depth}, staleness={self.staleness}, device={str(self.device)!r}, "
                f"num_steps={self.optimizer.num_steps})")

    @_disable_dynamo
    def submit(self, row_ids: Tensor) -> int:
        """Starts fetching the rows of `row_ids`; returns a ticket without waiting for data.

        Args:
            row_ids: int32 or int64, any shape, contiguous, on the CPU or on `device` (then this waits for them); -1 means zeros
                and no gradient. Copied.

        Returns:
            A ticket for `wait`. Ids that name no row fail it.

        Raises:
            TypeError: `row_ids` is no tensor.
            ValueError: dtype, device or strides are wrong.
            PrefetchQueueFull: `depth` tickets are in flight; wait for one first. A RuntimeError.
            RuntimeError: it is closed, or was made before a fork.
        """
        self._expect_open()
        on_device = isinstance(row_ids, Tensor) and row_ids.device == self.device
        expect_row_ids(_OP, row_ids, self.device if on_device else torch.device("cpu"))
        ids = row_ids.detach().to("cpu", torch.int64, copy=True).view(-1)
        if len(self._engine.flying) >= self.depth:
            raise PrefetchQueueFull(f"{_OP}: {len(self._engine.flying)} tickets are in flight, as many as depth allows "
                                    f"({self.depth}); wait for one first")
        ticket = next(self._tickets)
        self._engine.fetch(ticket, Fetch(ids, row_ids.shape))
        return ticket

    @_disable_dynamo
    def wait(self, ticket: int, timeout_s: float | None = None) -> Tensor:
        """The rows of a ticket, in the order of its ids, duplicates included, as of the last step that returned before.

        Args:
            ticket: what `submit` returned.
            timeout_s: seconds to wait at most; None: no limit.

        Returns:
            [*row_ids.shape, D] of `out_dtype` on `device`, a tensor of its own: a leaf with a gradient where autograd is on.
            ``backward`` moves the gradient here, so ``rows.grad`` is None after it; ``torch.autograd.grad`` keeps nothing. A
            ticket that was waited for since the last step gives the same rows again.

        Raises:
            KeyError: there is no such ticket, or it was cancelled, or waited for before the last step.
            TimeoutError: the rows did not come in time; the ticket stays valid.
            IndexError: an id is out of range.
            RuntimeError: something else wrote to the table after `submit`; or it is closed, or was made before a fork.
            Exception: what an earlier step failed with; the ticket stays valid. Or what went wrong with this fetch.
        """
        self._expect_open()
        if ticket in self._taken:
            return self._again(ticket)
        if ticket not in self._engine.flying:
            raise KeyError(f"{_OP}: ticket {ticket} is unknown, was cancelled, or was waited for before the last step")
        fetch = self._engine.take(ticket, self.staleness, timeout_s)
        if fetch is None:
            raise TimeoutError(f"{_OP}: ticket {ticket} did not arrive in {timeout_s} s")
        if fetch.error is not None:
            raise fetch.error
        assert fetch.rows is not None
        rows = self._given(fetch)
        fetch.rows = None
        self._taken[ticket] = (fetch, TensorWeakRef(rows) if rows.requires_grad else None)
        while len(self._taken) > _MOST_TAKEN:
            self._taken.popitem(last=False)
        return rows

    def _given(self, fetch: Fetch) -> Tensor:
        rows = fetch.rows
        assert rows is not None
        if fetch.ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(fetch.ready)
            rows.record_stream(stream)
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            gradients, row_ids = self._engine.gradients, fetch.row_ids
            rows.requires_grad_()
            rows.register_post_accumulate_grad_hook(lambda leaf: gradients.take(leaf, row_ids))
        return rows

    def _again(self, ticket: int) -> Tensor:
        """Rows that were taken since the last step, for a forward that runs again."""
        fetch, known = self._taken[ticket]
        rows: Tensor | None = None if known is None else known()
        if rows is not None:
            return rows
        again = self._fetched(fetch.row_ids.view(fetch.shape))
        rows = self._given(again)
        if rows.requires_grad:
            self._taken[ticket] = (fetch, TensorWeakRef(rows))
        return rows

    def _fetched(self, row_ids: Tensor) -> Fetch:
        """Rows that no ticket is held for, past `depth`."""
        ticket, fetch = next(self._tickets), Fetch(row_ids.detach().to("cpu", torch.int64, copy=True).view(-1), row_ids.shape)
        self._engine.fetch(ticket, fetch)
        self._engine.take(ticket, self.staleness, None)
        if fetch.error is not None:
            raise fetch.error
        return fetch

    @_disable_dynamo
    def gather(self, row_ids: Tensor, out_dtype: torch.dtype | None = None, *, backend: str = "auto") -> Tensor:
        """`submit` and `wait` in one, whatever `depth` says: what `Engram` calls where it hashes itself.

        Args:
            row_ids: as for `submit`.
            out_dtype: that of this object, or None.
            backend: not looked at: all of them gather the same bits.

        Returns:
            As `wait`.

        Raises:
            ValueError: `out_dtype` is another.
            Exception: as of `submit` and `wait`.
        """
        self._expect_open()
        if out_dtype not in (None, self.out_dtype):
            raise ValueError(f"{_OP}: out_dtype is {out_dtype}, this one gives {self.out_dtype}; make it with "
                             f"out_dtype={out_dtype}")
        on_device = isinstance(row_ids, Tensor) and row_ids.device == self.device
        expect_row_ids(_OP, row_ids, self.device if on_device else torch.device("cpu"))
        return self._given(self._fetched(row_ids))

    @_disable_dynamo
    def step(self, grad_scale: float | Tensor = 1.0, *, wait: bool = False) -> None:
        """Updates the rows that have a gradient since the last step, each once; returns before the table is updated.

        Every later `wait` sees the update. The learning rate is that of this call: a scheduler may go on at once.

        Args:
            grad_scale: factor on the summed gradients, as `RowOptimizer.step` takes it.
            wait: return when the table is updated, and raise here what went wrong.

        Raises:
            Exception: what the step before failed with (ValueError: a gradient is NaN or infinite, which names the row); nothing
                of this one was begun, and its gradients stay. With `wait` also of this step.
        """
        self._expect_open()
        if self._engine.update(self.optimizer.rates(), grad_scale, max(1, self.staleness)):
            self._taken.clear()
            self.optimizer.__dict__["_opt_called"] = True  # what torch's schedulers look at
        if wait:
            self._engine.flush()

    def zero_grad(self) -> None:
        """Drops the gradients that backward passes left since the last step."""
        self._engine.drop_untaken()

    def norm(self) -> Tensor:
        """The norm of the gradient that the next `step` applies, for clipping by the global norm; as `RowOptimizer.norm`."""
        self._expect_open()
        with self._engine.changed:
            gradients = self._engine.untaken()
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device="cpu")
        with self._held.writing():  # it reads the gradients alone
            return self.optimizer.norm(torch.cat([one.row_ids for one in gradients]),
                                       torch.cat([one.grad for one in gradients]).cpu())

    def flush(self) -> None:
        """Waits until every step that returned is in the table.

        Raises:
            Exception: what a step failed with.
        """
        self._engine.flush()

    def cancel(self, ticket: int) -> bool:
        """Gives a ticket up. False: there is no such ticket in flight."""
        self._expect_open()
        with self._engine.changed:
            found = self._engine.flying.pop(ticket, None)
            self._engine.changed.notify_all()
        return found is not None

    def stats(self) -> dict[str, Any]:
        """Counters since the start, all measured.

        Returns:
            steps (that the optimizer has taken) and steps_pending; skipped_steps; rows_updated; waits, rows_requested (of them);
            rows_regathered (distinct rows of a ticket that a step updated after they were fetched), positions_regathered and
            tickets_regathered; steps_lagged (sum over the waits of how many steps the rows were behind) and max_lag; seconds:
            exposed_wait_s (in `wait`), fetch_s, update_s, regather_s (of the thread); in_flight, depth, staleness; prefetcher:
            `RowPrefetcher.stats`, or None where rows are gathered where they are; write_back: of a table in a file: io
            ("io_uring" or "pwrite"), writes, bytes, syncs, durable, journal_bytes; or None.
        """
        engine, c = self._engine, self._engine.counters
        return {"steps": self.optimizer.num_steps, "steps_pending": engine.pending(),
                "skipped_steps": self.optimizer.skipped_steps, "rows_updated": c.updated, "waits": c.waits,
                "rows_requested": c.requested, "rows_regathered": c.regathered,
                "positions_regathered": c.regathered_positions, "tickets_regathered": c.regathered_tickets,
                "steps_lagged": c.steps_lagged, "max_lag": c.max_lag, "exposed_wait_s": c.wait_s, "fetch_s": c.fetch_s,
                "update_s": c.update_s, "regather_s": c.regather_s, "in_flight": len(engine.flying), "depth": self.depth,
                "staleness": self.staleness, "prefetcher": engine.prefetcher.stats() if engine.prefetcher is not None else None,
                "write_back": self.optimizer.file.stats() if self.optimizer.file is not None else None}

    def close(self) -> None:
        """Takes the steps that returned, drops tickets and gradients, lets others write to the table. May be called again.

        Raises:
            Exception: what a step failed with.
        """
        if self._is_closed or os.getpid() != self._process:
            return
        self._engine.gradients.is_open = False
        self._engine.close()  # an interrupt while the thread takes its steps leaves the table held: it may be called again
        self._is_closed = True
        try:
            self._engine.raise_failure()
        finally:
            if self._engine.prefetcher is not None:
                self._engine.prefetcher.close()
            self._held.release()
            self.optimizer._holder = None
            self._engine.gradients.drop(0, None)
            self._taken.clear()

    def __enter__(self) -> TrainableRows:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_is_closed"):
            self.close()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        raise TypeError(f"{_OP}: it cannot be pickled or copied, since its thread and rows in flight belong to this process; "
                        "save the table and the optimizer's state, and make one there")

    def _expect_open(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(f"{_OP}: it was made before a fork and its thread stayed with the parent; make one here")
        if self._is_closed or not self._engine.gradients.is_open:
            raise RuntimeError(f"{_OP}: it is closed")
