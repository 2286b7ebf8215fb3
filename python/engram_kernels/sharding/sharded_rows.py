"""ShardedRows: the rows of one table, spread over the ranks of torch.distributed."""
from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports dynamo at once, two seconds
from torch.autograd.function import once_differentiable

from engram_kernels._checks import FLOAT_DTYPES
from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.row_format import FLOAT_FORMATS, ROW_FORMATS
from engram_kernels.sharding.agreement import agreed_facts, checked_facts, checked_partition, table_of
from engram_kernels.sharding.channel import Channel
from engram_kernels.sharding.exchange import Arrived, Exchange, Wanted
from engram_kernels.sharding.partition import range_of
from engram_kernels.sharding.shard_state import copy_state, dtensor_of
from engram_kernels.sharding.shard_training import load_optimizer_numbers, optimizer_state, parts_of_norm, refusal, sum_kept
from engram_kernels.table.row_table import RowTable

if TYPE_CHECKING:
    from engram_kernels.training.row_optimizer import RowOptimizer


class ShardedRows:
    """A table of which every rank has a range of rows; any rank gets any rows, and gradients go to the ranks that have them.

    `submit` sends distinct ids to their owners, behind the caller's compute; `wait` gives the rows in the order of the ids. Rows
    equal ``gather_rows(whole table, row_ids, out_dtype)`` bit for bit, for any number of ranks. `Engram` and `LongcatEmbedding`
    take it as their table.

    Order: every rank makes it, submits, waits, runs backward and saves in the same order, with as many ids as it has, or none.
    Rows of a table that is trained are read during `wait`, so that they are those of the last step; only ids are exchanged ahead.
    Rows of any other table are exchanged ahead, too.

    Gradients: those of a row are summed in float32, on each rank in the order of the positions, then at the owner in the order of
    the ranks. With gradients="rows" they are kept as they come and summed when they are taken: the ranks one after the other, of
    each its backward passes one after the other. The bits are then those of one process that takes the same micro-batches one
    after the other, however many ranks share them; memory grows with each backward.

    Ownership: holds the shard. Threads: one of its own, which does every collective; every method from one thread. Failure: an
    error of a request is raised by the `wait` of its ticket, on every rank, and leaves the others whole. A rank that died or does
    not come is a ConnectionError on every other one within `timeout_s`, and from then on.

    Args:
        shard: rows of this rank: a RowTable in memory or in a file, a float tensor or nn.Parameter [r, D], or such a DTensor with
            Shard(0). May have no rows. The ranges of the ranks follow one another; `range_of` says how to cut a table.
        group: of torch.distributed, for this table alone: nobody else runs collectives on it until `close`. None: a new group
            of all ranks.
        by: "rows": ranges may end anywhere; "heads": between two hash heads, so that a rank has whole heads.
        num_rows: R that the shards must add up to; None: that of the DTensor, or their sum.
        heads: rows of each head, such as ``layout.moduli[0]``; with by="heads" and only then.
        gradients: "sparse": `parameter.grad` is a sparse tensor of the shard's rows; "rows": `take_gradients` gives them, `step`
            passes them to an optimizer; "none". None: "sparse" for an nn.Parameter that requires a gradient, else "none".
        reduce: "sum" of the ranks' gradients, or their "mean", as DistributedDataParallel and fully_shard take it.
        timeout_s: seconds that a rank waits for the others.

    Attributes:
        table: RowTable of this rank's rows.
        parameter: the nn.Parameter [r, D] whose gradient is sparse, or None; what an optimizer takes.
        first_row: the first row of this rank in the whole table.
        num_rows: R.
        row_dim: D.

    Raises:
        TypeError: `shard` is nothing of these.
        ValueError: an argument is out of range, or the shards of the ranks do not belong together: other dtypes, widths, formats
            or arguments, or rows that do not add up. On every rank; names the rank, the value and what was expected.
        RuntimeError: torch.distributed is not initialized, or gradients are wanted without the compiled module.

    Source: docs/sharding.md; the owner-sorted exchange of Megatron-LM's and FlagScale's Engram.
    """

    def __init__(self, shard: RowTable | Tensor, group: Any = None, by: str = "rows", *, num_rows: int | None = None,
                 heads: Sequence[int] | Tensor | None = None, gradients: str | None = None, reduce: str = "sum",
                 timeout_s: float = 300.0):
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("ShardedRows: torch.distributed is not initialized; call init_process_group first, with "
                               "world_size=1 for one process")
        if group is not None and dist.get_rank(group) < 0:
            raise ValueError("ShardedRows: group does not have this rank as a member")
        error: Exception | None = None
        facts: dict[str, Any] = {}
        try:
            self.table, self.parameter, whole = table_of(shard)
            facts = checked_facts(self.table, self.parameter, num_rows if whole is None else whole, by, heads, gradients, reduce,
                                  timeout_s)
        except Exception as err:
            error = err
        partition = checked_partition(agreed_facts(group, facts, error))
        self.by, self.reduce, self.gradients, self.timeout_s = by, reduce, facts["gradients"], facts["timeout_s"]
        self.parameter = self.parameter if self.gradients == "sparse" else None
        self.num_rows, self.row_dim = partition.num_rows, self.table.row_dim
        self._exchange = Exchange(self.table, partition, Channel(group, self.timeout_s))
        self._channel, self.first_row = self._exchange.channel, self._exchange.first_row
        self._numbers = itertools.count()
        self._flying: dict[int, tuple[Future[Wanted], Future[Arrived] | None]] = {}
        self._kept: list[tuple[Wanted, Tensor]] = []
        self._sums: tuple[Tensor, Tensor] | None = None  # of what is kept
        self._lock = threading.Lock()
        self._anchor = (self.parameter if self.parameter is not None
                        else torch.zeros(0, device="cpu", requires_grad=self.gradients == "rows"))

    range_of = staticmethod(range_of)

    def __repr__(self) -> str:
        end = self.first_row + self.table.num_rows
        return (f"ShardedRows({self.num_rows} rows of {self.row_dim} by {self.by} on {self._exchange.ranks} ranks, of which rank "
                f"{self._exchange.rank} has [{self.first_row}, {end}), {self.table.row_format}, gradients={self.gradients!r})")

    @property
    def trains(self) -> bool:
        """Whether rows carry a gradient."""
        return self.gradients != "none"

    @_disable_dynamo
    def submit(self, row_ids: Tensor) -> int:
        """Starts the exchange of `row_ids` behind the caller's compute; returns a ticket.

        Args:
            row_ids: int32 or int64, any shape, contiguous; -1 (no row) or in [0, R) of the whole table; copied. May have no
                elements.

        Returns:
            A ticket for `wait`. Ids that name no row fail it, on every rank.

        Raises:
            ConnectionError: a rank died before, or this was closed.
        """
        ticket = next(self._numbers)
        kept = row_ids.clone() if isinstance(row_ids, Tensor) else row_ids
        wanted = self._channel.submit(self._exchange.ids, ticket, kept)
        rows = None if self.trains else self._channel.submit(self._exchange.rows, wanted)
        self._flying[ticket] = (wanted, rows)
        return ticket

    @_disable_dynamo
    def wait(self, ticket: int, out_dtype: torch.dtype | None = None, timeout_s: float | None = None, *,
             backend: str = "auto") -> Tensor:
        """The rows of a ticket, in the order of its ids, duplicates included.

        Args:
            ticket: what `submit` returned.
            out_dtype: float32, bfloat16 or float16; None: that of the rows where they are floats, else bfloat16.
            timeout_s: seconds to wait at most; None: as long as the ranks may take.
            backend: of the gather that puts them in place.

        Returns:
            [*row_ids.shape, D] of `out_dtype` on the device of the ids, zeros where the id is -1. With a gradient where the table
            is trained and autograd is on: then every rank has to run backward through it.

        Raises:
            KeyError: there is no such ticket, or it was waited for before.
            ValueError: `out_dtype` is none of these, or the ranks wait for different tickets.
            TimeoutError: the rows did not come in time; the ticket stays valid.
            IndexError: an id of some rank is out of range.
            OSError: the file of some rank's shard cannot be read.
            ConnectionError: a rank died or did not come; the ranks have to be started again.
        """
        out_dtype = out_dtype or FLOAT_FORMATS.get(self.table.row_format, torch.bfloat16)
        if out_dtype not in FLOAT_DTYPES:
            raise ValueError(f"ShardedRows: out_dtype is {out_dtype}, expected torch.float32, torch.bfloat16 or torch.float16")
        if ticket not in self._flying:
            raise KeyError(f"ShardedRows: ticket {ticket} is unknown, or was waited for before")
        wanted, rows = self._flying[ticket]
        if rows is None:
            rows = self._channel.submit(self._exchange.rows, wanted)
            self._flying[ticket] = (wanted, rows)
        try:
            arrived = rows.result(timeout_s)
        except FutureTimeout as err:
            if rows.done():  # the exchange's own error
                self._flying.pop(ticket, None)
                raise
            raise TimeoutError(f"ShardedRows: ticket {ticket} did not come in {timeout_s} s") from err
        except CancelledError as err:
            raise ConnectionError("ShardedRows: it is closed") from err
        except Exception:
            self._flying.pop(ticket, None)
            raise
        del self._flying[ticket]
        table, inverse = self.table, arrived.wanted.inverse
        with torch.no_grad():
            of_table = table.table_scale if ROW_FORMATS[table.row_format].has_table_scale else None
            distinct = RowTable.from_tensor(arrived.rows, arrived.scales, table.row_format, row_dim=table.row_dim,
                                            zero_scale_is_zero=table.zero_scale_is_zero, table_scale=of_table)
            out = gather_rows(distinct, inverse.to(distinct.device), out_dtype, backend=backend).to(inverse.device)
        if self.trains and torch.is_grad_enabled():
            out = _Gathered.apply(self._anchor, out, self, arrived.wanted)
        return out

    @_disable_dynamo
    def gather(self, row_ids: Tensor, out_dtype: torch.dtype | None = None, *, backend: str = "auto") -> Tensor:
        """`submit` and `wait` in one: as ``gather_rows(whole table, row_ids, out_dtype)``."""
        return self.wait(self.submit(row_ids), out_dtype, backend=backend)

    def _add_gradients(self, wanted: Wanted, grad: Tensor) -> Tensor | None:
        """Sends the gradients of a backward to their owners; what autograd gives to `parameter`."""
        received = self._channel.submit(self._exchange.gradients, wanted, grad).result()
        if self.gradients == "rows":
            with self._lock:
                self._kept.append((wanted, received))
                self._sums = None
            return None
        row_ids, summed = self._sums_of([(wanted, received)])
        assert self.parameter is not None
        return torch.sparse_coo_tensor(row_ids[None], summed.to(self.parameter.dtype), self.parameter.shape, is_coalesced=True,
                                       check_invariants=False)

    def take_gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients of this rank's rows since they were last taken; only with gradients="rows".

        Returns:
            (row_ids, grad_rows): int64 [n], distinct and ascending, counted from the shard's first row, and float32 [n, D].

        Raises:
            ValueError: gradients are not kept.
        """
        if self.gradients != "rows":
            raise ValueError(f"ShardedRows.take_gradients: gradients is {self.gradients!r}, expected 'rows'")
        with self._lock:
            sums, self._kept, self._sums = self._summed_once(), [], None
            return sums

    def _summed_once(self) -> tuple[Tensor, Tensor]:
        self._sums = self._sums or self._sums_of(self._kept)
        return self._sums

    def _sums_of(self, kept: Sequence[tuple[Wanted, Tensor]]) -> tuple[Tensor, Tensor]:
        row_ids, summed = sum_kept(kept, self._exchange.ranks, self.row_dim, self.table.device)
        return row_ids, summed / self._exchange.ranks if self.reduce == "mean" else summed

    def norm(self) -> Tensor:
        """The norm of the whole table's gradient, of all ranks: for clipping by the global norm. Every rank has to call it.

        ``total = torch.sqrt(dense**2 + rows.norm()**2)``, then ``rows.step(optimizer, grad_scale=min(1, max_norm / total))``.
        With gradients="rows" it is of what `take_gradients` will give; with "sparse" of `parameter.grad`.

        Returns:
            float64 [] on the device of the shard: the same bits on every rank, for any number of ranks with the same gradients,
            and those of `RowOptimizer.norm`. NaN where a gradient is NaN or infinite: what `step` then does is the optimizer's.

        Raises:
            ValueError: rows carry no gradient here, or `parameter.grad` is a dense tensor. On every rank.
            ConnectionError: a rank died or did not come.
        """
        with self._lock:
            parts, error = parts_of_norm(self.gradients, self.parameter, self._summed_once)
        found = self._channel.submit(self._exchange.everywhere, next(self._numbers), error, parts).result()
        return torch.tensor(math.sqrt(math.fsum(found)), dtype=torch.float64, device=self.table.device)

    def step(self, optimizer: Any, grad_scale: float | Tensor | None = None) -> Any:
        """``optimizer.step(row_ids, grad_rows)`` with what `take_gradients` gives, such as a `RowOptimizer` of `table`; returns
        what that returns. With ``nonfinite="skip"`` every rank has to call it, and all skip what one has to; else none is asked.

        Args:
            optimizer: takes the step.
            grad_scale: third argument of its step where it is given, such as that of clipping by `norm`.
        """
        kept = list(self._kept)
        given = (*self.take_gradients(), *(() if grad_scale is None else (grad_scale,)))
        try:
            if getattr(optimizer, "nonfinite", None) == "skip" and self._one_skips(optimizer.skips(*given)):
                optimizer.skipped_steps += 1
                return None
            return optimizer.step(*given)
        except BaseException:
            self._kept[:0] = kept  # for another try
            raise

    def dtensor(self, local: Tensor) -> Any:
        """A DTensor [R, ...] with Shard(0) of what each rank has for its rows [r, ...], such as an optimizer's moments.

        Shares memory with `local` where the rows are spread as by `range_of` without heads. Elsewhere rows move: then every rank
        has to call it.

        Raises:
            ValueError: `local` has not as many rows as the shard.
        """
        if local.shape[0] != self.table.num_rows:
            raise ValueError(f"ShardedRows.dtensor: local has {local.shape[0]} rows, expected {self.table.num_rows}, the shard's")
        return self._channel.submit(dtensor_of, local, self._exchange.partition, self._channel).result()

    def state_dict(self, optimizer: RowOptimizer | None = None) -> dict[str, Any]:
        """The rows, and scales where there are any, as DTensors with Shard(0), for torch.distributed.checkpoint. As `dtensor`.

        The `table_scale` of nvfp4 is the table's own, which a state is loaded into.

        Args:
            optimizer: of the rows of this rank, with ``first_row=rows.first_row``: its moments, steps and settings are part of
                the state then, and go to any number of ranks as the rows do.

        Raises:
            TypeError: `optimizer` is no RowOptimizer, on any rank.
            ValueError: the shard is in a file, which is its own checkpoint; or the optimizer is of another table. On every rank.
        """
        if not self.table.in_memory:
            where = self.table.path if self.table.tier == "file" else self.table.address
            raise ValueError(f"ShardedRows.state_dict: the shard is at {where}, which is its own checkpoint")
        if optimizer is not None:
            self._agree(refusal("ShardedRows.state_dict", optimizer, self.table, self.first_row))
        state = {"rows": self.dtensor(self.table.rows)}
        if self.table.scales is not None:
            state["scales"] = self.dtensor(self.table.scales) if self.table.scales.dim() == 2 else self.table.scales
        if optimizer is not None:
            state["optimizer"] = optimizer_state(optimizer, self.dtensor)
        return state

    def load_state_dict(self, state: Mapping[str, Any], optimizer: RowOptimizer | None = None) -> None:
        """Copies a state into the shard. Every rank has to call it.

        Args:
            state: what `state_dict` gave, filled by torch.distributed.checkpoint; or tensors of all R rows.
            optimizer: of the rows of this rank, of the kind that the state was taken with; it goes on where that stood.

        Raises:
            KeyError: a tensor is missing.
            TypeError: one is no tensor, or `optimizer` no RowOptimizer.
            ValueError: a shape or dtype differs, it is the state of another number of ranks, or the optimizer's settings are
                others. On every rank.
        """
        wanted = {"rows": self.table.rows.detach(), **({} if self.table.scales is None else {"scales": self.table.scales})}
        given = dict(state)
        if optimizer is not None:
            self._agree(load_optimizer_numbers(optimizer, state.get("optimizer"), self.table, self.first_row))
            given |= {f"optimizer.{name}": x for name, x in state["optimizer"].items()}
            wanted |= {f"optimizer.{name}": x for name, x in optimizer.moments().items()}
        for name, local in wanted.items():
            if name == "scales" and local.dim() != 2:
                local.copy_(state[name])
            else:
                self._channel.submit(copy_state, name, given.get(name), local, self._exchange.partition, self._channel,
                                     next(self._numbers)).result()

    def _one_skips(self, skips: bool) -> bool:
        return any(self._channel.submit(self._exchange.everywhere, next(self._numbers), None, [float(skips)]).result())

    def _agree(self, error: Exception | None) -> None:  # raises that of any rank on every rank
        self._channel.submit(self._channel.agree, "state", next(self._numbers), error).result()

    def stats(self) -> dict[str, Any]:
        """Counters since the start, all measured.

        Returns:
            requested (ids), distinct (rows wanted by this rank), remote_rows (of these, from other ranks), served_rows (that this
            rank sent to others); header_bytes, ids_bytes, rows_bytes, gradients_bytes, state_bytes and their sum, sent_bytes:
            what this rank gave to the collectives for other ranks; in_flight; provenance.
        """
        return {**self._exchange.stats(), "in_flight": len(self._flying), "provenance": "measured"}

    def close(self) -> None:
        """Ends the thread, and destroys the process group where it was made here; on every rank."""
        self._channel.close()
        self._flying.clear()

    def __enter__(self) -> ShardedRows:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedRows:
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        raise TypeError("ShardedRows: it cannot be pickled, since its process groups belong to this process; make one in each "
                        "rank, and save rows with state_dict and torch.distributed.checkpoint")


class _Gathered(torch.autograd.Function):
    """Rows that came from all ranks; their gradients go back there."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: Tensor, sharded: ShardedRows, wanted: Wanted) -> Tensor:
        ctx.sharded, ctx.wanted = sharded, wanted
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.sharded._add_gradients(ctx.wanted, grads[0]), None, None, None
