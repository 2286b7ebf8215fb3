"""MemoryPrefetcher: the rows of all memory layers of a model, fetched behind its compute."""
from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from engram_kernels._checks import FLOAT_DTYPES, expect_tensor
from engram_kernels._layers import layer_id_of, memory_modules
from engram_kernels.ops.gather_rows import sparse_gradient
from engram_kernels.ops.ngram_hash import ngram_hash
from engram_kernels.prefetch.row_prefetcher import RowPrefetcher


class MemoryTicket(NamedTuple):
    """What `MemoryPrefetcher.submit` started: a ticket for each layer."""
    row_ids: Tensor  # [L, T, C] of the layers of the prefetcher, in their order
    tickets: tuple[Any, ...]  # of the prefetcher of each layer; tensors in a compiled graph


class MemoryPrefetcher:
    """Fetches the rows of every memory layer of a model: one `submit` when token ids are known, one `wait` in each layer.

    Each table has a `RowPrefetcher`; layers that share a table share it. Rows equal those that the layer gathers itself, bit for
    bit. ``layer(hidden, cu_seqlens=cu_seqlens, rows=prefetcher.wait(layer, ticket))`` runs a layer on them, and with a
    `MemoryState` it is ``layer(hidden, **state.arguments(layer, rows=prefetcher.wait(layer, ticket)))``.

    Gradients: rows that a module trains get theirs as from `gather_rows`, sparse where its `sparse_grad` says so, since the
    backward needs the ids alone. Any other rows carry none. A table that is trained may change between a `wait` and the next
    `submit`, not while a request is in flight.
    Ownership, threads and failure: as `RowPrefetcher`. An error of one layer is raised by the `wait` of that layer, and leaves
    the others whole.

    Args:
        layers: a model, whose memory modules are found, or a list of them. Each has a table.
        device: where the rows are wanted; None: that of the modules.
        depth: submits that may be in flight.
        out_dtype: dtype of the rows; None: that of the modules' parameters.
        backend: of the hash.
        options: of every `RowPrefetcher`: policy, ring_bytes, staging_bytes, cache_bytes, threads, background, surface,
            verify_rows, trace_spans. Bytes and threads are those of each table's.

    Raises:
        TypeError: `layers` are no memory modules.
        ValueError: there is none, one has no table, or an option is out of range.

    Source: docs/prefetch.md.
    """

    def __init__(self, layers: nn.Module | Iterable[nn.Module], device: torch.device | str | None = None, depth: int = 2,
                 out_dtype: torch.dtype | None = None, *, backend: str = "auto", **options: Any):
        self._modules = memory_modules("MemoryPrefetcher", layers)
        if not self._modules:
            raise TypeError("MemoryPrefetcher: layers is an EngramSpec, expected a model or its memory modules")
        parameter = next((p for m in self._modules for n, p in m.named_parameters() if p.dtype in FLOAT_DTYPES and n != "rows"),
                         None)
        self.device = torch.device(device or ("cpu" if parameter is None else parameter.device))
        self.out_dtype = out_dtype or (torch.bfloat16 if parameter is None else parameter.dtype)
        self.backend, self.layer_ids = backend, tuple(m.layer_id for m in self._modules)
        self._spec = spec = self._modules[0].spec
        self._places = [spec.layer_ids.index(layer_id) for layer_id in self.layer_ids]
        self._layout, self._map = spec.layout(), self._modules[0].token_map
        self._of_layer: list[RowPrefetcher] = []
        made: dict[Any, RowPrefetcher] = {}
        users = [_key(m) for m in self._modules]
        try:
            for module, key in zip(self._modules, users, strict=True):
                if key not in made:
                    made[key] = RowPrefetcher(module.table, self.device, depth * users.count(key), self.out_dtype, **options)
                self._of_layer.append(made[key])
        except BaseException:
            for prefetcher in made.values():
                prefetcher.close()
            raise
        self._made = tuple(made.values())

    def submit(self, token_ids: Tensor | None = None, cu_seqlens: Tensor | None = None, *, history: Tensor | None = None,
               dead_mask: Tensor | None = None, row_ids: Tensor | None = None, after: Tensor | None = None) -> MemoryTicket:
        """Hashes the tokens for every layer and starts fetching their rows; returns without waiting for data.

        Args:
            token_ids: [T] int32 or int64, as `ngram_hash` takes them; exactly one of `token_ids` and `row_ids` is given.
            cu_seqlens: [B+1] int32, with `token_ids`.
            history: [B, N-1], as `ngram_hash` takes it.
            dead_mask: [T] bool; rows of dead tokens are fetched for the pad, as the layer does; for LongCat there are none.
            row_ids: [L, T, C] of all layers of the spec, as `MemoryState.step` returns them; hashed before, not here.
            after: in a compiled graph of several steps, the rows of an earlier wait that must come before (see docs/prefetch.md).

        Returns:
            A ticket for `wait`.

        Raises:
            ValueError: not exactly one source of row ids, or a wrong shape, dtype or device.
            PrefetchQueueFull: `depth` submits are in flight; nothing was started. A RuntimeError.
            IndexError: a token id is out of range.
        """
        if (token_ids is None) == (row_ids is None):
            raise ValueError("MemoryPrefetcher.submit: exactly one of token_ids and row_ids is wanted, got "
                             + ("none" if token_ids is None else "both"))
        if token_ids is not None:
            if cu_seqlens is None:
                raise ValueError("MemoryPrefetcher.submit: cu_seqlens is None, but hashing needs it")
            token_map = None if self._map is None else self._map.to(token_ids.device)
            layout, dead = self._layout.to(token_ids.device), self._spec.dead_mask(token_ids, dead_mask)
            row_ids = ngram_hash(token_ids, cu_seqlens, layout, token_map, history, dead, backend=self.backend)
            row_ids = self._spec.without_absent(row_ids, layout.offsets, dead)
        assert row_ids is not None
        layers, columns = len(self._layout.layer_ids), self._layout.num_columns
        expect_tensor("MemoryPrefetcher.submit", "row_ids", row_ids, (torch.int32, torch.int64), (layers, "T", columns))
        row_ids = row_ids.contiguous()
        tickets: list[Any] = []
        try:
            for place, prefetcher in zip(self._places, self._of_layer, strict=True):
                if is_compiling():
                    tickets.append(torch.ops.engram_kernels.prefetch_submit(row_ids[place], prefetcher.handle, after))
                else:
                    tickets.append(prefetcher.submit(row_ids[place]))
        except BaseException:
            for prefetcher, ticket in zip(self._of_layer, tickets, strict=False):
                if not is_compiling():
                    prefetcher.cancel(ticket)
            raise
        return MemoryTicket(row_ids, tuple(tickets))

    def wait(self, layer: nn.Module | int, ticket: MemoryTicket, *, after: Tensor | None = None,
             timeout_s: float | None = None) -> Tensor:
        """The rows of one layer, in a tensor of their own.

        Args:
            layer: the memory module, or its layer id.
            ticket: what `submit` returned; each layer takes its rows once.
            after: in a compiled graph, the last tensor of the compute that the fetch hides behind (see docs/prefetch.md).
            timeout_s: seconds to wait at most; None: no limit. Not in a compiled graph.

        Returns:
            [T, C, D] of `out_dtype` on `device`, with a gradient where the module trains its rows and autograd is on.

        Raises:
            TypeError: `layer` is no memory module and no id, or `ticket` no ticket.
            ValueError: there is no such layer.
            KeyError: the layer has taken these rows, or they were cancelled.
            TimeoutError: they did not come in time; the ticket stays valid.
            Exception: what went wrong with this layer's rows; in Python 3.11 and later a note names the layer.
        """
        layer_id = layer_id_of("MemoryPrefetcher.wait", layer, self.layer_ids)
        if not isinstance(ticket, MemoryTicket):
            raise TypeError(f"MemoryPrefetcher.wait: ticket is a {type(ticket).__name__}, expected what submit returned")
        at = self.layer_ids.index(layer_id)
        prefetcher, row_ids = self._of_layer[at], ticket.row_ids[self._places[at]]
        if is_compiling():
            rows = torch.ops.engram_kernels.prefetch_wait(ticket.tickets[at], row_ids, prefetcher.handle, prefetcher.row_dim,
                                                          self.out_dtype, self.device, after)
        else:
            out = torch.empty(*row_ids.shape, prefetcher.row_dim, dtype=self.out_dtype, device=self.device)
            try:
                rows = prefetcher.wait(int(ticket.tickets[at]), out=out, timeout_s=timeout_s)
            except Exception as error:
                if hasattr(error, "add_note"):
                    error.add_note(f"MemoryPrefetcher: the rows of layer {layer_id}")
                raise
        trained = getattr(self._modules[at], "rows", None)
        if isinstance(trained, Tensor) and trained.requires_grad and torch.is_grad_enabled():
            is_sparse = getattr(self._modules[at], "sparse_grad", False)
            rows = _Trained.apply(trained, row_ids.to(trained.device), rows, is_sparse)
        return rows

    def cancel(self, ticket: MemoryTicket) -> None:
        """Gives up what no layer has taken of a submit."""
        for prefetcher, of_layer in zip(self._of_layer, ticket.tickets, strict=True):
            prefetcher.cancel(int(of_layer))

    def stats(self) -> dict[int, dict[str, Any]]:
        """`RowPrefetcher.stats` by layer id; layers that share a table have the same."""
        return {layer_id: prefetcher.stats() for layer_id, prefetcher in zip(self.layer_ids, self._of_layer, strict=True)}

    def close(self) -> None:
        """Drops what is in flight and ends the threads. May be called again."""
        for prefetcher in self._made:
            prefetcher.close()

    def __enter__(self) -> MemoryPrefetcher:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(AttributeError):  # a constructor that failed
            self.close()


class _Trained(torch.autograd.Function):
    """Rows that were fetched, with the gradient that `gather_rows` would give to the table."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, row_ids: Tensor, rows: Tensor, is_sparse: bool) -> Tensor:
        ctx.save_for_backward(row_ids)
        ctx.like, ctx.is_sparse = (table.shape, table.dtype), is_sparse
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (row_ids,), (shape, dtype) = ctx.saved_tensors, ctx.like
        if ctx.is_sparse:
            grad = sparse_gradient(grads[0], row_ids, shape, dtype)
        else:
            grad = torch.ops.engram_kernels.gather_rows_bwd(grads[0].contiguous(), row_ids, shape[0], dtype)
        return grad, None, None, None


def _key(module: Any) -> Any:
    """Equal for layers whose rows are one table."""
    if module.table is None:
        raise ValueError(f"MemoryPrefetcher: layer {module.layer_id} has no table")
    rows = getattr(module, "rows", None)
    return id(rows) if isinstance(rows, nn.Parameter) else id(module.table)
