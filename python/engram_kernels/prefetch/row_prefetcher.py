"""RowPrefetcher: rows of a table fetched behind the caller's compute."""
from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import numbers
import os
import weakref
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from engram_kernels._checks import FLOAT_DTYPES, expect_int, expect_tensor
from engram_kernels._library import need_compiled
from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.prefetch.errors import PrefetchCancelled, PrefetchQueueFull
from engram_kernels.prefetch.policy import check_cache, choose_policy
from engram_kernels.prefetch.runtime import CompiledRuntime, RuntimeOptions
from engram_kernels.prefetch.torch_ops import register_prefetcher
from engram_kernels.row_format import check_tensors
from engram_kernels.table.row_table import RowTable, expect_row_ids

__all__ = ["PrefetchCancelled", "PrefetchQueueFull", "RowPrefetcher"]

_SLOT_BYTES = 64 << 20      # of the default ring: 4096 tokens of 24 bf16 rows of 256 take 48 MiB
_STAGING_BYTES = 32 << 20
_IDS_STAGING_BYTES = 2 << 20  # where ids alone are staged
_BACKGROUND_BLOCKS = 16     # of a gather on a GPU
_LONGEST_S = 1e9
_EXIT_S = 5.0

_live: weakref.WeakSet[RowPrefetcher] = weakref.WeakSet()
_numbers = itertools.count()  # of tickets, in all prefetchers: the ticket of another one names no request of this one


@atexit.register
def _close_all() -> None:
    """Ends what threads wait for: one that came back into the interpreter after its end would abort the process."""
    for prefetcher in list(_live):
        prefetcher.close()
    for prefetcher in list(_live):
        prefetcher._runtime.others_left(_EXIT_S)


@dataclasses.dataclass
class _Submitted:
    shape: torch.Size
    row_ids: Tensor | None  # held: a device reads them; or verify does
    held: list[Tensor]  # others that a device reads
    written: Tensor | None = None  # the `out` that has the rows


class RowPrefetcher:
    """Fetches rows behind the caller's compute: `submit` ids, compute, `wait` for the rows.

    Scope: one table, requests in the order of their submission, a ring of ``depth + 1`` slots: ``depth`` requests in flight and
    the rows that the caller is reading. Rows equal ``gather_rows(table, row_ids, out_dtype)`` bit for bit, whatever the tier and
    policy. Rows of a request that cross a link do so once, however often their ids occur; with ``cache_bytes`` hot rows stay on
    the device from one request to the next.

    Ownership: the table must not change while a request is in flight (with ``cache_bytes``: unless `clear_cache` follows), and
    neither may ids on a GPU; ids in host memory are copied. The tensor that `wait` returns is valid until the next `wait` without
    ``out=``; pass ``out=`` to keep rows longer.
    Threads: every method may be called from several threads, `wait` without ``out=`` from one; a ticket is waited for once. Rows
    carry no gradient. After a fork the child must make its own. Failure: an error of a request is raised by the `wait` of its own
    ticket and leaves the others whole; docs/prefetch.md lists them.

    Args:
        table: where the rows are: in memory, on a device, in a file, or on other machines (`RowTable.connect`).
        device: where the rows are wanted.
        depth: requests that may be in flight, at least 1.
        out_dtype: dtype of the rows: float32, bfloat16 or float16.
        policy: "auto", "staged", "uva", "uva_distinct", "device", "file" or "remote"; `stats` tells which it became and why.
        ring_bytes: bytes of the ring; a request may have as many rows as fit into one of its depth + 1 slots. None: 64 MiB a
            slot. On the CPU memory is taken as slots are used, on a GPU at once.
        staging_bytes: memory for rows and ids on their way (registered host memory, and as much on a GPU). None: 32 MiB, or
            2 MiB where ids alone are staged.
        cache_bytes: memory on the device for hot rows, as stored, where rows cross a link to it: policies staged, file and remote
            on a GPU. Trimmed to the size of the table. Takes 29 bytes of host memory per row besides. 0: no cache.
        threads: CPU threads that gather; None: as many as torch uses.
        background: leave the machine to others: one CPU thread (unless `threads` says more), few blocks of a GPU.
        surface: JSON of `engram-kernels profile`, for "auto".
        verify_rows: rows of each request, drawn at random, that `wait` reads again through `gather_rows` and compares. 0: none.
        trace_spans: how many spans `trace` can show, the last ones.

    Raises:
        TypeError: `table` is no RowTable, or a number is no integer.
        ValueError: an argument is out of range, the policy cannot read the table, or there is no link that a cache would save.
        CapacityError: there is no room for the ring, the staging buffers and the cache. An OSError.
        RuntimeError: the device is not available.

    Source: docs/prefetch.md; the ids depend on tokens alone, so a step's rows can be fetched during the one before.
    """

    def __init__(self, table: RowTable, device: str | torch.device = "cpu", depth: int = 4,
                 out_dtype: torch.dtype = torch.bfloat16, *, policy: str = "auto", ring_bytes: int | None = None,
                 staging_bytes: int | None = None, cache_bytes: int = 0, threads: int | None = None, background: bool = False,
                 surface: str | os.PathLike[str] | None = None, verify_rows: int = 0, trace_spans: int = 4096,
                 _engine: Any = None):
        if not isinstance(table, RowTable):
            raise TypeError(f"RowPrefetcher: table must be a RowTable, got {type(table).__name__}")
        need_compiled("a RowPrefetcher")
        device = torch.device(device)
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        if table.in_memory:  # what they are now: a module may have converted them since the table was made
            check_tensors("RowPrefetcher: the table", table.rows, table.scales, table.row_format, table.row_dim, table.device)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"RowPrefetcher: device is {device}, expected cpu or cuda")
        if out_dtype not in FLOAT_DTYPES:
            raise ValueError(f"RowPrefetcher: out_dtype is {out_dtype}, expected torch.float32, torch.bfloat16 or torch.float16")
        for name, value, least, most in (("depth", depth, 1, 1 << 20), ("ring_bytes", ring_bytes, 0, None),
                                         ("threads", threads, 1, 4096), ("staging_bytes", staging_bytes, 1, None),
                                         ("cache_bytes", cache_bytes, 0, None), ("verify_rows", verify_rows, 0, None),
                                         ("trace_spans", trace_spans, 0, 1 << 24)):
            if value is not None:
                expect_int("RowPrefetcher", name, value, least, most)
        ring_bytes = (depth + 1) * _SLOT_BYTES if ring_bytes is None else ring_bytes
        self.table, self.device, self.out_dtype, self.row_dim = table, device, out_dtype, table.row_dim
        self._policy = choose_policy(policy, table, device, surface, cache_bytes > 0)
        check_cache(cache_bytes, self._policy, device.type != "cpu" if _engine is None else not _engine.reads_host_memory)
        if staging_bytes is None:
            staging_bytes = _IDS_STAGING_BYTES if self._policy.name in ("uva", "uva_distinct", "device") else _STAGING_BYTES
        threads = threads or (1 if background else torch.get_num_threads())
        self._options = RuntimeOptions(table, self._policy.name, device, out_dtype, depth, ring_bytes, staging_bytes, threads,
                                       _BACKGROUND_BLOCKS if background else 0, trace_spans, cache_bytes,
                                       self._policy.distinct_from, _engine)
        self._verify_rows, self._sampler = verify_rows, torch.Generator()  # not the caller's
        self._submitted: dict[int, _Submitted] = {}
        self._closed = False
        self._reading: Tensor | None = None  # what `wait` returned last, in a slot of the ring
        self._runtime: Any = CompiledRuntime(self._options)
        self._options = dataclasses.replace(self._options, engine=None)  # whose threads end with the runtime
        self._marks = _NvtxMarks() if device.type == "cuda" else contextlib.nullcontext
        self.handle = register_prefetcher(self)  # its number for the torch ops, [1] int64: no graph is made for a number
        _live.add(self)

    def submit(self, row_ids: Tensor, timeout_s: float | None = 0.0) -> int:
        """Starts fetching the rows of `row_ids`; returns a ticket without waiting for data.

        Args:
            row_ids: int32 or int64, any shape, contiguous, on the CPU or on `device`; -1 means zeros.
            timeout_s: seconds to wait for a place in the ring; 0: do not wait; None: no limit.

        Returns:
            A ticket for `wait`. Ids that name no row fail it.

        Raises:
            TypeError: `row_ids` is no tensor.
            ValueError: dtype, device or strides are wrong, or the rows do not fit into a slot.
            PrefetchQueueFull: `depth` requests are in flight, and none ended in time. A RuntimeError.
            RuntimeError: the prefetcher is closed, or was made before a fork; or the table's tensors were moved or converted
                since it was made.

        Source: docs/prefetch.md.
        """
        on_device = isinstance(row_ids, Tensor) and row_ids.device == self.device
        expect_row_ids("RowPrefetcher", row_ids, self.device if on_device else torch.device("cpu"))
        ticket = next(_numbers)  # known before anything is begun: a signal between two steps loses nothing
        try:
            kept = row_ids if row_ids.device.type != "cpu" else row_ids.clone() if self._verify_rows else None
            held: list[Tensor] = []
            self._submitted[ticket] = _Submitted(row_ids.shape, kept, held)
            with self._marks("prefetch submit"):
                self._runtime.submit(ticket, row_ids, _seconds(timeout_s), held)
        except BaseException:
            self.cancel(ticket)
            raise
        return ticket

    def wait(self, ticket: int, out: Tensor | None = None, timeout_s: float | None = None) -> Tensor:
        """The rows of a ticket, in the order of its ids, duplicates included; on a GPU in the order of the current stream.

        Args:
            ticket: what `submit` returned.
            out: [*row_ids.shape, D] on `device`, written and returned instead of the prefetcher's own slot.
            timeout_s: seconds to wait at most; None: no limit. Work that is queued on a GPU is not waited for.

        Returns:
            [*row_ids.shape, D] rows; without `out`, valid until the next `wait`, which counts as a change in place: autograd
            refuses a backward through rows that were overwritten. Rows for several forwards before one backward want `out`.

        Raises:
            TypeError: `ticket` is no number.
            ValueError: `out` has another shape or dtype; the ticket stays valid.
            KeyError: no ticket of this prefetcher, or it was cancelled or waited for before.
            TimeoutError: the rows did not come in time; the ticket stays valid.
            PrefetchCancelled: the ticket was cancelled meanwhile, or the prefetcher is closed. A RuntimeError.
            Exception: what went wrong with this request, such as IndexError for a bad id or OSError for a bad file. After an
                exception of another kind, such as KeyboardInterrupt or one of writing to `out`, the ticket stays valid.
        """
        if not isinstance(ticket, numbers.Integral):  # such as a tensor, or 5.0, which a dictionary takes for 5
            raise TypeError(f"RowPrefetcher.wait: ticket is {ticket!r}, expected the number that submit returned")
        request = self._submitted.get(ticket)
        if request is None:
            if self._closed:
                raise PrefetchCancelled(f"RowPrefetcher: it is closed, so ticket {ticket} has no rows any more")
            raise KeyError(f"RowPrefetcher: ticket {ticket} is unknown, was cancelled, or was waited for before")
        shape = (*request.shape, self.row_dim)
        if out is not None:
            expect_tensor("RowPrefetcher.wait", "out", out, (self.out_dtype,), shape, self.device)
        try:
            rows = self._take(ticket, request, shape, out, _seconds(timeout_s))
            del self._submitted[ticket]
        except BaseException:
            if self._runtime.restore(ticket):
                request.written, self._submitted[ticket] = None, request
                self._overwritten(out)
            elif request.written is not None:  # the slot is free again, but `out` has the rows
                self._submitted[ticket] = request
            elif not self._runtime.knows(ticket):
                self._submitted.pop(ticket, None)
            raise
        return rows

    def _take(self, ticket: int, request: _Submitted, shape: tuple[int, ...], out: Tensor | None, timeout_s: float) -> Tensor:
        """The rows of a ticket, and its slot given back where they are in `out`."""
        if request.written is not None:  # by a wait that was interrupted when all was done
            return request.written.clone() if out is None else out.copy_(request.written)
        with self._marks("prefetch wait"):
            slot = self._runtime.wait(ticket, timeout_s, out is not None)
        for ids in (request.row_ids, *request.held):
            if ids is not None and ids.is_cuda:
                ids.record_stream(torch.cuda.current_stream(self.device))  # behind the gather that reads them
        self._overwritten(out)
        rows = self._runtime.rows(slot, shape)
        self._verify(request, rows)
        if out is None:
            self._reading = rows
            return rows
        out.copy_(rows)
        request.written = out
        self._runtime.release(slot)  # only now: the next request may be written into it at once
        return out

    def _overwritten(self, out: Tensor | None) -> None:
        """After a wait without `out`: the slot that was read before is free to be written, which autograd must know."""
        if out is None and self._reading is not None:
            if not self._reading.is_inference():  # those have no version, and no gradient either
                torch.autograd.graph.increment_version(self._reading)
            self._reading = None

    def cancel(self, ticket: int) -> bool:
        """Gives a ticket up. Its slot is free once nothing writes to it; a `wait` for it in another thread ends. Returns at once;
        where the ids are on a GPU, once nothing reads them.

        Returns:
            False: there is no such ticket, or it was waited for before.
        """
        cancelled = bool(self._runtime.cancel(ticket))
        self._submitted.pop(ticket, None)
        return cancelled

    def drain(self, timeout_s: float | None = None) -> None:
        """Waits until every request that was submitted has arrived or failed; their tickets stay.

        Raises:
            TimeoutError: they did not in `timeout_s` seconds.
        """
        self._runtime.drain(_seconds(timeout_s))

    def stats(self) -> dict[str, Any]:
        """Counters since the start, all measured, of requests that were waited for.

        Returns:
            requests, failed, cancelled; requested (rows) and unique (that were looked up); hits (of `unique`, by tier: device,
            host, file, remote, and the caches: device_cache, that of `cache_bytes`, and cache, the table's own in RAM);
            distinct (requests whose ids a GPU made distinct since they were submitted, the rows these asked for and fetched);
            payload_bytes (of the rows requested, as stored) and moved_bytes (read from a file or copied to a device); fetch_s
            (busy), id_s (of it, sorting ids and making them distinct) and exposed_wait_s (time in `wait`); in_flight,
            max_in_flight, queued, depth; memory_bytes of the rings and
            the device's cache, and device_cache_slots, the rows that it has room for; tier, policy and policy_reason;
            provenance.
        """
        return {**self._runtime.counters(), "depth": self._options.depth, "tier": self.table.tier, "policy": self._policy.name,
                "policy_reason": self._policy.reason, "provenance": "measured"}

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the last `trace_spans` spans as a Chrome trace (Perfetto opens it): a track per tier, and one of the caller."""
        Path(path).write_text(self._runtime.chrome_trace())

    def clear_cache(self) -> None:
        """Empties the device's cache: requests that are submitted from here on read the table, which may have changed before.
        Nothing where there is no cache."""
        self._runtime.clear_cache()

    def close(self) -> None:
        """Drops requests that are in flight, ends the threads and gives the memory back. Rows that `wait` returned stay
        readable."""
        self._closed = True
        self._runtime.close()
        self._submitted.clear()
        self._reading = None

    def __del__(self) -> None:
        if hasattr(self, "_runtime"):  # else __init__ refused its arguments
            self.close()  # first: threads and a device write to memory that goes with this object

    def __enter__(self) -> RowPrefetcher:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _verify(self, request: _Submitted, rows: Tensor) -> None:
        """Compares some rows of a request with what gather_rows reads."""
        if not self._verify_rows or request.row_ids is None or request.row_ids.numel() == 0:
            return
        ids = request.row_ids.reshape(-1).cpu()
        count = ids.numel()
        sample = (torch.arange(count, device="cpu") if count <= self._verify_rows
                  else torch.randint(0, count, (self._verify_rows,), generator=self._sampler, device="cpu"))
        plain = ids[sample].to(self.table.device_for(rows))
        with torch.no_grad():
            expected = gather_rows(self.table, plain, self.out_dtype).to(rows.device)
        integers = torch.int32 if self.out_dtype == torch.float32 else torch.int16
        wrong = (rows.reshape(-1, self.row_dim)[sample].view(integers) != expected.view(integers)).any(-1).cpu()
        if wrong.any():
            where = f"tier {self.table.tier}" + (f": {self.table.path}" if self.table.path else "")
            raise RuntimeError(f"RowPrefetcher: verify: {where}: row {ids[sample][wrong][0].item()} of position "
                               f"{sample[wrong][0].item()} is not what gather_rows reads")

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Threads and requests in flight have no copy: pickle, `copy` and another process take the table instead."""
        raise TypeError("RowPrefetcher: it cannot be pickled or copied, since its threads and requests in flight belong to this "
                        "process; send its table (RowTable.share or a file: the rows are not copied) and make a RowPrefetcher "
                        "there, and leave it out of the __getstate__ of a module that holds it")


class _NvtxMarks:
    """Ranges that Nsight shows, around the calls of a prefetcher for a GPU."""

    def __call__(self, name: str) -> contextlib.AbstractContextManager[None]:
        return torch.cuda.nvtx.range(f"engram_kernels: {name}")


def _seconds(timeout_s: float | None) -> float:
    """Negative: no limit. Infinity is none either, and what a clock cannot count to."""
    if timeout_s is None:
        return -1.0
    if not isinstance(timeout_s, numbers.Real):
        raise TypeError(f"RowPrefetcher: timeout_s is {timeout_s!r}, expected seconds, or None for no limit")
    if timeout_s != timeout_s:
        raise ValueError("RowPrefetcher: timeout_s is nan, expected seconds, or None for no limit")
    return -1.0 if timeout_s > _LONGEST_S else float(max(timeout_s, 0.0))
