"""Collectives of torch.distributed whose failures, of this rank or of another, are errors on every rank."""
from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_Result = TypeVar("_Result")
KINDS = ("ids", "rows", "gradients", "state")  # of exchanges
HEADER = 4  # numbers that each rank tells each other one before a payload: how many, which kind, which ticket, whether it failed
_ERRORS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (IndexError, ValueError, TypeError, OSError, KeyError,
                                                                        MemoryError, NotImplementedError)}


class Channel:
    """A process group and a thread that does its collectives, one after the other, in the order in which they are asked for.

    Scope: bytes; what they mean is the caller's. Ownership: it destroys the group if it made it. Threads: `submit` from any; the
    rest on the channel's own. Failure: an error that one rank reports is raised on all of them, and the channel goes on; a rank
    that does not come is a ConnectionError on all others within `timeout_s`, and from then on for every call.

    Args:
        group: of torch.distributed; None: one of its own, of all ranks.
        timeout_s: seconds that a collective may take.
    """

    def __init__(self, group: Any, timeout_s: float):
        self._is_own = group is None
        timeout = datetime.timedelta(seconds=timeout_s)
        if group is None:
            group = dist.new_group(timeout=timeout, group_desc="engram_kernels ShardedRows")
        else:
            dist.distributed_c10d._set_pg_timeout(timeout, group)
        self.group: Any = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        uses_gpu = str(dist.get_backend(group)) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if uses_gpu else torch.device("cpu")
        self.timeout_s = timeout_s
        self.broken: ConnectionError | None = None
        self.sent_bytes = {"header": 0, **dict.fromkeys(KINDS, 0)}
        self._worker = ThreadPoolExecutor(1, "engram_kernels shards")

    def submit(self, function: Callable[..., _Result], *args: Any) -> Future[_Result]:
        """Has the channel's thread call `function`, after what was submitted before. ConnectionError where nothing can come."""
        if self.broken is not None:
            raise ConnectionError(str(self.broken)) from self.broken
        return self._worker.submit(function, *args)

    def agree(self, kind: str, ticket: int, error: Exception | None, counts: Sequence[int] | None = None) -> list[int]:
        """Tells every rank how much will come; raises on all ranks where one has an error or another ticket.

        Args:
            kind: of the exchange, one of `KINDS`.
            ticket: what the exchange is for.
            error: what went wrong here; None: nothing.
            counts: [n] rows that go to each rank; None: none.

        Returns:
            [n] rows that come from each rank.

        Raises:
            Exception: `error` here; on the other ranks one of the same kind that names the rank.
            ValueError: the ranks are at different exchanges.
            ConnectionError: a rank did not come.
        """
        mine = torch.zeros(self.ranks, HEADER, dtype=torch.int64, device="cpu")
        if counts is not None and error is None:
            mine[:, 0] = torch.tensor(counts, dtype=torch.int64, device="cpu")
        mine[:, 1], mine[:, 2], mine[:, 3] = KINDS.index(kind), ticket, int(error is not None)
        theirs = self._all_to_all(mine.to(self.device), None, None, "header").cpu()
        if theirs[:, 3].any():
            self._raise_together(error)
        at = theirs[:, 1:3].tolist()
        if any(one != at[0] for one in at):
            where = ", ".join(f"rank {k} those of {KINDS[number]} for ticket {t}" for k, (number, t) in enumerate(at))
            raise ValueError(f"ShardedRows: the ranks are at different exchanges: {where}; expected the same order of submit, "
                             "wait and backward on every rank")
        return theirs[:, 0].tolist()

    def _raise_together(self, error: Exception | None) -> None:
        found: list[Any] = [None] * self.ranks
        text = None if error is None else (type(error).__name__, str(error))
        self._guarded(lambda: dist.all_gather_object(found, text, group=self.group))
        if error is not None:
            raise error
        rank, (kind, words) = next((k, said) for k, said in enumerate(found) if said is not None)
        raise _ERRORS.get(kind, RuntimeError)(f"rank {rank} of {self.ranks}: {words}")

    def exchange(self, kind: str, rows: Tensor, counts: Sequence[int], coming: Sequence[int]) -> Tensor:
        """Rows in the order of their destination, as bytes; returns those that came, in the order of their source.

        Args:
            kind: of the exchange, which counts the bytes.
            rows: [sum of counts, width], contiguous.
            counts: [n] rows that go to each rank.
            coming: [n] rows that come from each rank, as `agree` told.

        Returns:
            [sum of coming, width] of the dtype of `rows`, on their device.

        Raises:
            ConnectionError: a rank did not come.
        """
        width = rows.shape[1] * rows.element_size()
        sent = rows.contiguous().view(torch.uint8).flatten().to(self.device)
        got = self._all_to_all(sent, [n * width for n in counts], [n * width for n in coming], kind)
        return got.to(rows.device).view(rows.dtype).view(-1, rows.shape[1]) if width else rows.new_empty(sum(coming), 0)

    def _all_to_all(self, sent: Tensor, out_bytes: list[int] | None, in_bytes: list[int] | None, kind: str) -> Tensor:
        got = torch.empty_like(sent) if in_bytes is None else sent.new_empty(sum(in_bytes))
        self._guarded(lambda: dist.all_to_all_single(got, sent, in_bytes, out_bytes, group=self.group))
        to_itself = sent[self.rank].nbytes if out_bytes is None else out_bytes[self.rank]
        self.sent_bytes[kind] += sent.nbytes - to_itself
        return got

    def _guarded(self, collective: Any) -> None:
        if self.broken is not None:
            raise ConnectionError(str(self.broken)) from self.broken
        try:
            collective()
        except RuntimeError as err:
            self.broken = ConnectionError(
                f"ShardedRows: an exchange failed on rank {self.rank} of {self.ranks}: another rank died, left, "
                f"or did not come within timeout_s={self.timeout_s:g}; the ranks have to be started again ({err})")
            raise self.broken from err

    def close(self) -> None:
        """Ends the thread, and destroys a group of its own. May be called again."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        if self._is_own and self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None
        if self.broken is None:
            self.broken = ConnectionError("ShardedRows: it is closed")
