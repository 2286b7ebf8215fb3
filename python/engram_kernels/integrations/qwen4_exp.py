"""Qwen4Exp's PLE layer with the hash, gather, gate and convolution of this library. `transformers.attach` puts it in place."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from engram_kernels.integrations.convolution_state import conv_reach, convolve_behind, packed_bounds
from engram_kernels.modules.engram import Engram, checked_rounding
from engram_kernels.modules.memory_module import MemoryModule
from engram_kernels.modules.module_table import AnyTable
from engram_kernels.spec import EngramSpec
from engram_kernels.table.row_table import RowTable

_CONV_STATE, _TOKEN_STATE = 1, 2  # the states of a linear-attention cache layer that the published layer uses


class Qwen4ExpMemory(Engram):
    """`Engram` in the place of a ``Qwen4ExpTextPLELayer``: same arguments, same parameter names, same cache.

    It keeps the layer's projections, norms, convolution and hash buffers, so that checkpoints, optimizers and adapters find
    them, and leaves out ``ple_embedding.ngram_embedding``, whose rows come from `table`. Token ids and convolution inputs lie
    in the states 1 and 2 of the model's own cache, which reorders, crops and resets them. State 1 holds inputs before their
    norm, so a cache that the published layer has filled cannot be continued.

    Args:
        layer: the published layer.
        spec: of the model; its `layer_ids` count from zero.
        table: rows of this layer; None: the layer's own embedding, which stays a parameter.
        rounding: as of `Engram`.
        backend: of every op.

    Raises:
        ValueError: the table does not fit, or the layer's hash constants are not those of `spec`.
    """

    ple_embedding: Any
    key_proj: Any
    value_proj: Any
    norm_key: Any
    norm_query: Any
    norm_conv: Any
    conv1d: Any

    def __init__(self, layer: Any, spec: EngramSpec, table: RowTable | None, rounding: str = "once", backend: str = "auto"):
        MemoryModule.__init__(self, spec, layer.layer_idx, None, None)
        self.rounding, self.backend, self.layer_idx = checked_rounding(rounding, spec), backend, layer.layer_idx
        self.hidden_size, self.branches = layer.hidden_size, layer.hc_count
        self._check_constants(layer.ple_embedding)
        for name in ("ple_embedding", "key_proj", "value_proj", "norm_key", "norm_query", "norm_conv", "conv1d"):
            self.add_module(name, getattr(layer, name))
        if table is None:
            self._trains_rows = True
        else:
            self.table = table
        self._place_constants()

    def _check_constants(self, embedding: nn.Module) -> None:
        layout = self.spec.layout().of_layer(self.layer_id)
        for name, ours in (("layer_multipliers", layout.multipliers), ("ngram_heads_vocab_sizes", layout.moduli),
                           ("ngram_heads_offsets", layout.offsets)):
            theirs = getattr(embedding, name)
            if theirs.is_meta:
                continue
            if not torch.equal(theirs.cpu().flatten().long(), ours.flatten().long()):
                raise ValueError(f"attach: {name} of layer {self.layer_id} is {theirs.flatten()[:3].tolist()} .., but its "
                                 f"configuration gives {ours.flatten()[:3].tolist()} ..")

    @property
    def table(self) -> AnyTable | None:
        """The rows, wherever they lie."""
        return self._current_table()

    @table.setter
    def table(self, table: AnyTable | None) -> None:
        if isinstance(getattr(table, "rows", None), nn.Parameter):
            raise ValueError("attach: table is made of a parameter; table=None trains the model's own rows")
        Engram.table.fset(self, table)  # type: ignore[attr-defined]
        if table is not None:
            self.ple_embedding.ngram_embedding = None  # the model's own rows are freed

    @property
    def rows(self) -> Tensor:
        """The model's own rows, where they are trained."""
        return self.ple_embedding.ngram_embedding.weight

    @property
    def wkv(self) -> nn.Module:  # type: ignore[override]
        """The projection of the keys; the value has its own."""
        return self.key_proj

    @property
    def w_hidden(self) -> Tensor:  # type: ignore[override]
        """The hidden state's norm weight [M, H]."""
        return self.norm_query.weight.view(self.branches, self.hidden_size)

    @property
    def w_key(self) -> Tensor:  # type: ignore[override]
        """The keys' norm weight [M, H]."""
        return self.norm_key.weight.view(self.branches, self.hidden_size)

    @property
    def conv_norm(self) -> Tensor:  # type: ignore[override]
        """The convolution's norm weight [M, H]."""
        return self.norm_conv.weight.view(self.branches, self.hidden_size)

    @property
    def conv_weight(self) -> Tensor:  # type: ignore[override]
        """The convolution's taps [M, H, W]."""
        return self.conv1d.weight.view(self.branches, self.hidden_size, -1)

    def _projection_parameters(self) -> Iterator[Tensor]:
        yield from self.key_proj.parameters()
        yield from self.value_proj.parameters()

    def _project(self, rows: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        keys = self.key_proj(rows).to(hidden.dtype).unflatten(1, (self.branches, self.hidden_size))
        return keys, self.value_proj(rows).to(hidden.dtype)

    def forward(self, hidden_states: Tensor, input_ids: Tensor, cache: Any = None,  # type: ignore[override]
                conv_mask: Tensor | None = None) -> Tensor:
        """The update that the decoder layer adds, [B, n, M*H].

        Args:
            hidden_states: [B, n, M*H].
            input_ids: [B, n], EOS where `conv_mask` is 0, as the model passes them.
            cache: the model's cache; None: every sequence starts here.
            conv_mask: [B, n], 0 = padding: nothing is added there, and nothing of it is seen elsewhere.
        """
        batch, length = input_ids.shape
        hidden = hidden_states.reshape(batch * length, self.branches, self.hidden_size)
        dead = None if conv_mask is None else (conv_mask == 0).flatten()
        history = self._history(input_ids, cache)
        gated = self.gated(hidden, input_ids.flatten(), packed_bounds(batch, length, hidden.device), history=history,
                           dead_mask=dead, backend=self.backend)
        past = self._exchange_inputs(gated.detach().view(batch, length, -1), cache)
        return convolve_behind(self, gated, past, batch, dead, self.backend).view(batch, length, -1)

    def _history(self, input_ids: Tensor, cache: Any) -> Tensor | None:
        """[B, N-1], the ids before this chunk, nearest first; None: there are none. Hands the chunk's ids to the cache."""
        if cache is None:
            return None
        reach, eos = self.spec.max_order - 1, self.spec.canonical_eos
        held = _held_state(cache, self.layer_idx, _TOKEN_STATE)
        history = None if held is None else held[:, -reach:].to(input_ids.dtype).flip(1)
        ids = input_ids.long()
        if held is None and ids.shape[1] < reach:  # the cache would fill it up with zeros
            ids = nn.functional.pad(ids, (reach - ids.shape[1], 0), value=eos)
        cache.update_conv_state(ids, self.layer_idx, state_idx=_TOKEN_STATE, conv_kernel_size=reach)
        if history is not None and history.shape[1] < reach:
            history = nn.functional.pad(history, (0, reach - history.shape[1]), value=eos)
        return history

    def _exchange_inputs(self, new: Tensor, cache: Any) -> Tensor | None:
        """[B, p, M, H], the inputs before this chunk; None: there are none. Hands the chunk's inputs to the cache."""
        if cache is None:
            return None
        reach = conv_reach(self)
        held = _held_state(cache, self.layer_idx, _CONV_STATE)
        past = None if held is None else held.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        kept = new if getattr(cache.layers[self.layer_idx], "record_past", False) else new[:, -reach:]
        cache.update_conv_state(kept.transpose(1, 2), self.layer_idx, state_idx=_CONV_STATE, conv_kernel_size=reach)
        return None if past is None else past.unflatten(2, (self.branches, self.hidden_size))


def _held_state(cache: Any, layer: int, state: int) -> Tensor | None:
    """The convolution state of a layer of the cache; None: the sequences start here. Older releases have no method for it."""
    return cache.layers[layer].conv_states[state] if cache.has_previous_state(layer, state_idx=state) else None
