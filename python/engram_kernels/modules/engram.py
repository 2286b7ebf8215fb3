"""Engram: one memory layer as an nn.Module, thin over the ops."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engram_kernels._checks import FLOAT_DTYPES, expect_tensor, wants_grad
from engram_kernels.layout import Layout
from engram_kernels.ops.gate import gate
from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.ops.ngram_hash import ngram_hash
from engram_kernels.ops.short_conv import short_conv
from engram_kernels.spec import EngramSpec
from engram_kernels.table.row_table import FLOAT_FORMATS, RowTable
from engram_kernels.token_map import TokenMap


class Engram(nn.Module):
    """One memory layer: rows -> keys and value -> gate (-> short convolution).

    ``key_m = W_k,m e (+ bias)``, ``value = W_v e (+ bias)`` with e the token's C rows one behind the other. Variants:
    `deepseek_v41` has no bias and no convolution, and the output is the new hidden state; `demo_v1` has biases and a short
    convolution, and the output is the update that the caller adds.

    Parameters, which are the names in the state dict: `wkv` (Linear, C*D -> (M+1)*H: the M keys, then the value), `w_hidden`
    and `w_key` [M, H] (norm weights of hidden state and key), and for `demo_v1` `conv_weight` [M, H, W] and `conv_norm`
    [M, H]. A table made of an ``nn.Parameter`` is registered as `rows`, trained, and follows the module to another dtype or
    device; any other table stays where it is. `load_published` reads the published names.

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

    Source: docs/ops.md, "The module"; deepseek-ai/Engram `engram_demo_v1.py`; the published DeepSeek-V4.1 model code (keys
    before the value in wkv's output, q_weight and k_weight as norm weights).
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
            self.register_load_state_dict_post_hook(_after_load)
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
            rows: [T, C, D] or [T, C*D] of the dtype of `hidden`, gathered before, as by `RowPrefetcher`.
            history: [B, N-1], as `ngram_hash` takes it; only with `token_ids`.
            dead_mask: [T] bool, True = the memory leaves the token alone: its hidden state stays, its update is 0, and what its
                rows hold reaches no gradient.
            state: [B, (W-1)*dilation, M, H], convolution state, as `short_conv` takes it; only for `demo_v1`.
            positions: [B], as `short_conv` takes it; given with `state` and only then.
            backend: of every op.

        Returns:
            [T, M, H] in the dtype of `hidden`.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: not exactly one source of rows, what it needs is missing, an argument that would not be used, or a wrong
                shape, dtype or device; and what the ops raise.

        Source: docs/ops.md, "The module".
        """
        self._check_hidden(hidden, state, positions)
        if dead_mask is not None:
            expect_tensor("Engram", "dead_mask", dead_mask, (torch.bool,), hidden.shape[:1], hidden.device, dense_dims=1)
        rows = self._rows(hidden, token_ids, cu_seqlens, row_ids, rows, history, dead_mask, backend)
        spec = self.spec
        if dead_mask is not None and wants_grad(rows, *self.wkv.parameters()):
            rows = rows.masked_fill(dead_mask[:, None], 0)  # its gradient is 0, but 0 * NaN in that of wkv is not
        keys_and_value = self.wkv(rows).unflatten(1, (self.branches + 1, self.hidden_size))
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
        if history is not None and token_ids is None:
            raise ValueError(f"Engram: history is given, but {given[0]} are not hashed here")
        if rows is None:
            if self.table is None:
                raise ValueError(f"Engram: {given[0]} needs a table, and the module was made without one")
            if token_ids is not None:
                if cu_seqlens is None:
                    raise ValueError("Engram: cu_seqlens is None, but hashing needs it")
                row_ids = ngram_hash(token_ids, cu_seqlens, self.layout, self.token_map, history, dead_mask, backend=backend)[0]
            assert row_ids is not None
            rows = gather_rows(self.table, row_ids, hidden.dtype, backend=backend)
        columns, row_dim = self.spec.num_columns, self.spec.row_dim
        flat = isinstance(rows, Tensor) and rows.dim() == 2
        shape = (hidden.shape[0], columns * row_dim) if flat else (hidden.shape[0], columns, row_dim)
        expect_tensor("Engram", "rows", rows, (hidden.dtype,), shape, hidden.device)
        return rows if flat else rows.flatten(1)

    def _check_hidden(self, hidden: Tensor, state: Tensor | None, positions: Tensor | None) -> None:
        weight = self.wkv.weight
        # under autocast torch brings the projection's operands together
        dtypes = FLOAT_DTYPES if torch.is_autocast_enabled(weight.device.type) else (weight.dtype,)
        expect_tensor("Engram", "hidden", hidden, dtypes, ("T", self.branches, self.hidden_size), weight.device)
        if self.spec.variant == "deepseek_v41" and (state is not None or positions is not None):
            name = "positions" if state is None else "state"
            raise ValueError(f"Engram: {name} is given, but variant 'deepseek_v41' has no convolution")

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._follow_rows()
        return self

    def _follow_rows(self) -> None:
        """Makes the table of the parameter `rows`, which may be another tensor, or of another dtype, than it was."""
        rows = self._parameters.get("rows")
        if rows is None:
            return
        formats = {dtype: name for name, dtype in FLOAT_FORMATS.items()}
        if rows.dtype not in formats:
            raise ValueError(f"Engram: rows is {rows.dtype} now, expected {', '.join(str(d) for d in formats)}")
        self.table = RowTable.from_tensor(rows, row_format=formats[rows.dtype])

    @torch.no_grad()
    def load_published(self, weights: Mapping[str, Tensor], prefix: str = "") -> None:
        """Copies the projections, norms and convolution out of a published checkpoint's tensors.

        `deepseek_v41`: wkv.weight, q_weight, k_weight; where wkv.weight is float8_e4m3fn also its block scales, as wkv.scale or
        wkv.weight_scale_inv. `demo_v1`: key_projs.{m}, value_proj, norm1.{m} (key), norm2.{m} (hidden state),
        short_conv.conv.weight, short_conv.norms.{m}. Rows are not loaded: open the file as a `RowTable` and name the tensors
        (embed.weight and embed.scale in V4.1).

        Args:
            weights: name -> tensor.
            prefix: what the names begin with, such as "layers.1.engram.".

        Raises:
            KeyError: a tensor is missing; nothing is written.
            ValueError: a tensor has the wrong shape or is no float tensor; nothing is written.
        """
        def get(name: str) -> Tensor:
            return weights[prefix + name]

        each = range(self.branches)
        if self.spec.variant == "deepseek_v41":
            found = {"wkv.weight": _dequantized(weights, prefix + "wkv"), "w_hidden": get("q_weight"), "w_key": get("k_weight")}
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
            if value.dtype not in (*FLOAT_DTYPES, torch.float64):
                raise ValueError(f"Engram: the published {name} is {value.dtype}, expected a float tensor")
        for name, value in found.items():
            self.get_parameter(name).copy_(value)


def _after_load(module: nn.Module, _keys: object) -> None:
    assert isinstance(module, Engram)
    module._follow_rows()  # load_state_dict(assign=True) puts another tensor in its place


def _dequantized(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """weights[name.weight], times its block scales where it is fp8 (32 x 32 elements share one in the published checkpoint)."""
    weight = weights[f"{name}.weight"]
    if weight.dtype != torch.float8_e4m3fn:
        return weight
    key = next((k for k in (f"{name}.scale", f"{name}.weight_scale_inv") if k in weights), None)
    if key is None:
        raise KeyError(f"Engram: {name}.weight is float8_e4m3fn, but there is neither {name}.scale nor {name}.weight_scale_inv")
    scale = weights[key].view(torch.float8_e8m0fnu) if weights[key].dtype == torch.uint8 else weights[key]
    if scale.dim() != 2 or 0 in scale.shape or any(n % blocks for n, blocks in zip(weight.shape, scale.shape, strict=True)):
        raise ValueError(f"Engram: {key} has shape {list(scale.shape)}, which does not divide {list(weight.shape)} into blocks")
    (rows, columns), (row_blocks, column_blocks) = weight.shape, scale.shape
    blocks = weight.float().view(row_blocks, rows // row_blocks, column_blocks, columns // column_blocks)
    return blocks.mul_(scale.float()[:, None, :, None]).view(rows, columns)


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
