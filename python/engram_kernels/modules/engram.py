"""Engram: one memory layer as an nn.Module, thin over the ops."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engram_kernels.layout import Layout
from engram_kernels.memory.row_table import RowTable
from engram_kernels.ops.gate import gate
from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.ops.ngram_hash import ngram_hash
from engram_kernels.ops.short_conv import short_conv
from engram_kernels.spec import EngramSpec
from engram_kernels.token_map import TokenMap


class Engram(nn.Module):
    """One memory layer: rows -> keys and value -> gate (-> short convolution).

    ``key_m = W_k,m e (+ bias)``, ``value = W_v e (+ bias)`` with e the token's C rows one behind the other. Variants:
    `deepseek_v41` has no bias and no convolution, and the output is the new hidden state; `demo_v1` has biases and a short
    convolution, and the output is the update that the caller adds.

    Parameters: `wkv` (Linear, C*D -> (M+1)*H: the M keys, then the value), `w_hidden` and `w_key` [M, H] (norm weights of
    hidden state and key), and for `demo_v1` `conv_weight` [M, H, W] and `conv_norm` [M, H]. A table made of an
    ``nn.Parameter`` is registered as `rows` and trained.

    Args:
        spec: the descriptor; its `variant` must be "deepseek_v41" or "demo_v1".
        layer_id: which of ``spec.layer_ids``.
        hidden_size: H; None: the spec's.
        branches: M; None: the spec's.
        table: the layer's rows; None: only prefetched `rows` can be passed to `forward`.
        token_map: compression of token ids; None: token ids are canonical.
        dtype: of the parameters and activations.
        device: of the parameters.

    Raises:
        ValueError: the spec has no such layer or no module variant, or table or token map do not belong to it.

    Source: semantics 10; deepseek-ai/Engram `engram_demo_v1.py`; the published DeepSeek-V4.1 model code (keys before the value
    in wkv's output, q_weight and k_weight as norm weights).
    """

    def __init__(self, spec: EngramSpec, layer_id: int, hidden_size: int | None = None, branches: int | None = None, *,
                 table: RowTable | None = None, token_map: TokenMap | None = None, dtype: torch.dtype = torch.bfloat16,
                 device: torch.device | str | None = None):
        super().__init__()
        if spec.variant not in ("deepseek_v41", "demo_v1"):
            raise ValueError(f"Engram: spec {spec.name} has variant {spec.variant!r}, expected 'deepseek_v41' or 'demo_v1'")
        if layer_id not in spec.layer_ids:
            raise ValueError(f"Engram: layer_id is {layer_id}, expected one of {list(spec.layer_ids)}")
        self.spec, self.layer_id = spec, layer_id
        self.hidden_size = spec.hidden_size if hidden_size is None else hidden_size
        self.branches = spec.branches if branches is None else branches
        self.layout = _layout_of_layer(spec, layer_id)
        self.table, self.token_map = _checked(spec, self.layout, table, token_map)
        if table is not None and isinstance(table.rows, nn.Parameter):
            self.register_parameter("rows", table.rows)
        is_demo = spec.variant == "demo_v1"
        shape = (self.branches, self.hidden_size)
        self.wkv = nn.Linear(spec.num_columns * spec.row_dim, (self.branches + 1) * self.hidden_size, bias=is_demo, dtype=dtype,
                             device=device)
        self.w_hidden = nn.Parameter(torch.ones(shape, dtype=dtype, device=device))
        self.w_key = nn.Parameter(torch.ones(shape, dtype=dtype, device=device))
        if is_demo:
            assert spec.conv_width is not None  # the spec sees to it
            conv = torch.empty(self.branches * self.hidden_size, 1, spec.conv_width, dtype=dtype, device=device)
            nn.init.kaiming_uniform_(conv, a=5**0.5)  # as nn.Conv1d does
            self.conv_weight = nn.Parameter(conv.view(*shape, spec.conv_width))
            self.conv_norm = nn.Parameter(torch.ones(shape, dtype=dtype, device=device))

    def forward(self, hidden: Tensor, token_ids: Tensor | None = None, cu_seqlens: Tensor | None = None, *,
                row_ids: Tensor | None = None, rows: Tensor | None = None, history: Tensor | None = None,
                dead_mask: Tensor | None = None, state: Tensor | None = None, positions: Tensor | None = None,
                backend: str = "auto") -> Tensor:
        """The new hidden state (`deepseek_v41`) or the update to add (`demo_v1`).

        Args:
            hidden: [T, M, H], sequences packed back to back.
            token_ids: [T] int32 or int64, hashed here. Exactly one of `token_ids`, `row_ids` and `rows` is given.
            cu_seqlens: [B+1] int32; needed to hash and for the convolution.
            row_ids: [T, C] rows of this layer's table, gathered here.
            rows: [T, C, D] or [T, C*D], gathered before, as by `RowPrefetcher`.
            history: [B, N-1], as `ngram_hash` takes it.
            dead_mask: [T] bool, True = the memory leaves the token alone: its hidden state stays, its update is 0.
            state: [B, (W-1)*dilation, M, H], convolution state, as `short_conv` takes it.
            positions: [B], as `short_conv` takes it.
            backend: of every op.

        Returns:
            [T, M, H] in the dtype of `hidden`.

        Raises:
            ValueError: not exactly one source of rows, or what it needs is missing; and what the ops raise.

        Source: semantics 10.
        """
        rows = self._rows(hidden, token_ids, cu_seqlens, row_ids, rows, history, dead_mask, backend)
        spec = self.spec
        keys_and_value = self.wkv(rows.flatten(1)).unflatten(1, (self.branches + 1, self.hidden_size))
        out = gate(hidden, keys_and_value[:, :-1], keys_and_value[:, -1], self.w_hidden, self.w_key, dead_mask, eps=spec.gate_eps,
                   clamp=spec.gate_clamp, zero_sign=spec.zero_sign, add_residual=spec.add_residual, backend=backend)
        if spec.variant == "deepseek_v41":
            return out
        if cu_seqlens is None:
            raise ValueError("Engram: cu_seqlens is None, but the short convolution needs it")
        assert spec.conv_dilation is not None
        out = short_conv(out, self.conv_weight, self.conv_norm, cu_seqlens, spec.conv_dilation, spec.conv_eps, state, positions,
                         backend=backend)
        return out if dead_mask is None else out.masked_fill(dead_mask[:, None, None], 0)

    def _rows(self, hidden: Tensor, token_ids: Tensor | None, cu_seqlens: Tensor | None, row_ids: Tensor | None,
              rows: Tensor | None, history: Tensor | None, dead_mask: Tensor | None, backend: str) -> Tensor:
        given = [name for name, x in (("token_ids", token_ids), ("row_ids", row_ids), ("rows", rows)) if x is not None]
        if len(given) != 1:
            raise ValueError(f"Engram: exactly one of token_ids, row_ids and rows is wanted, got {given or 'none'}")
        if rows is not None:
            return rows
        if self.table is None:
            raise ValueError(f"Engram: {given[0]} needs a table, and the module was made without one")
        if token_ids is not None:
            if cu_seqlens is None:
                raise ValueError("Engram: cu_seqlens is None, but hashing needs it")
            row_ids = ngram_hash(token_ids, cu_seqlens, self.layout, self.token_map, history, dead_mask, backend=backend)[0]
        assert row_ids is not None
        return gather_rows(self.table, row_ids, hidden.dtype, backend=backend)

    @torch.no_grad()
    def load_published(self, weights: Mapping[str, Tensor], prefix: str = "") -> None:
        """Copies the projections, norms and convolution out of a published checkpoint's tensors.

        `deepseek_v41`: wkv.weight (dequantized), q_weight, k_weight. `demo_v1`: key_projs.{m}, value_proj, norm1.{m} (key),
        norm2.{m} (hidden state), short_conv.conv.weight, short_conv.norms.{m}.

        Args:
            weights: name -> tensor.
            prefix: what the names begin with, such as "layers.1.engram.".

        Raises:
            KeyError: a tensor is missing.
            ValueError: a tensor has the wrong shape.
        """
        def get(name: str) -> Tensor:
            return weights[prefix + name]

        each = range(self.branches)
        if self.spec.variant == "deepseek_v41":
            found = {"wkv.weight": get("wkv.weight"), "w_hidden": get("q_weight"), "w_key": get("k_weight")}
        else:
            projections = [f"key_projs.{m}" for m in each] + ["value_proj"]
            found = {"wkv.weight": torch.cat([get(f"{p}.weight") for p in projections]),
                     "wkv.bias": torch.cat([get(f"{p}.bias") for p in projections]),
                     "w_key": torch.stack([get(f"norm1.{m}.weight") for m in each]),
                     "w_hidden": torch.stack([get(f"norm2.{m}.weight") for m in each]),
                     "conv_weight": get("short_conv.conv.weight").view_as(self.conv_weight),
                     "conv_norm": torch.stack([get(f"short_conv.norms.{m}.weight") for m in each])}
        for name, value in found.items():
            target = self.get_parameter(name)
            if target.shape != value.shape:
                raise ValueError(f"Engram: {name} has shape {list(target.shape)}, the published one {list(value.shape)}")
            target.copy_(value)


def _layout_of_layer(spec: EngramSpec, layer_id: int) -> Layout:
    """The spec's layout with this layer alone."""
    layout, i = spec.layout(), spec.layer_ids.index(layer_id)
    return dataclasses.replace(layout, moduli=layout.moduli[i:i + 1], offsets=layout.offsets[i:i + 1],
                               multipliers=layout.multipliers[i:i + 1], num_rows=layout.num_rows[i:i + 1], layer_ids=(layer_id,))


def _checked(spec: EngramSpec, layout: Layout, table: RowTable | None,
             token_map: TokenMap | None) -> tuple[RowTable | None, TokenMap | None]:
    if table is not None and table.row_dim != spec.row_dim:
        raise ValueError(f"Engram: the table has rows of {table.row_dim}, spec {spec.name} has rows of {spec.row_dim}")
    if table is not None and table.num_rows < layout.num_rows[0]:
        raise ValueError(f"Engram: the table has {table.num_rows} rows, layer {layout.layer_ids[0]} needs {layout.num_rows[0]}")
    if token_map is not None:
        if token_map.num_classes != layout.num_ids:
            raise ValueError(f"Engram: token_map has {token_map.num_classes} classes, spec {spec.name} has {layout.num_ids}")
        pad_class = int(token_map.map[spec.pad_token_id])
        if pad_class != spec.canonical_pad:
            raise ValueError(f"Engram: token_map puts the pad in class {pad_class}, spec {spec.name} in {spec.canonical_pad}")
    return table, token_map
