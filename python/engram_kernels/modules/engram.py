"""Engram: one memory layer as an nn.Module, thin over the ops."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from engram_kernels import _transforms
from engram_kernels._checks import FLOAT_DTYPES, expect_int, expect_tensor, wants_grad
from engram_kernels.modules.history import history_of_new_sequences
from engram_kernels.modules.memory_module import MemoryModule, TrainTable, autocast_dtype
from engram_kernels.modules.module_table import AnyTable
from engram_kernels.modules.published import ROUNDINGS, assign_published
from engram_kernels.modules.published_rounding import published_conv, published_gate
from engram_kernels.ops.gate import gate
from engram_kernels.ops.short_conv import short_conv
from engram_kernels.spec import EngramSpec
from engram_kernels.token_map import TokenMap


class Engram(MemoryModule):
    """One memory layer: rows -> keys and value -> gate (-> short convolution).

    ``key_m = W_k,m e (+ bias)``, ``value = W_v e (+ bias)`` with e the token's C rows one behind the other. Variants:
    `deepseek_v41` has no bias and no convolution, and the output is the new hidden state; `demo_v1` has biases and a short
    convolution, and the output is the update that the caller adds; `qwen4_ple` is `demo_v1` without biases and with norms that
    multiply by 1 + w. EOS resets its hash, not its convolution.

    Parameters, which are the names in the state dict: `wkv` (Linear, C*D -> (M+1)*H: the M keys, then the value), `w_hidden`
    and `w_key` [M, H] (norm weights of hidden state and key), and with a convolution `conv_weight` [M, H, W] and `conv_norm`
    [M, H]. A table made of an ``nn.Parameter`` is registered as `rows` and trained. `forward` and `table` read that parameter
    when they are called, so whatever a framework puts in its place counts: another dtype or device, FSDP's gathered tensor,
    `functional_call`, a parametrization. Any other table stays where it is, such as a `ShardedRows`, whose `parameter` an
    optimizer is given beside the module's, or a `TrainableRows`, whose `step` updates it. `load_published` reads the
    published names.

    The constants of the hash (`layout`) and `token_map` follow the module to another device. They are no buffers: they are
    derived or given, so that a module made on the meta device has them right after `to_empty`.

    Under autocast the projection runs in autocast's dtype, as that of an ``nn.Linear``; the rows are gathered in it, and keys
    and value are brought to the dtype of `hidden`. So the output has the dtype of `hidden`, and a float32 residual stream
    stays float32. Outside of autocast `hidden` has the dtype that `wkv` takes. No backend computes in float64.

    Args:
        spec: the descriptor; its `variant` must be "deepseek_v41", "demo_v1" or "qwen4_ple".
        layer_id: which of ``spec.layer_ids``.
        hidden_size: H; None: the spec's.
        branches: M; None: the spec's.
        table: the layer's rows; None: only prefetched `rows` can be passed to `forward`. May be set later.
        token_map: compression of token ids; None: token ids are canonical.
        dtype: of the parameters and activations: float32, bfloat16 or float16.
        device: of the parameters.
        rounding: "once": gate and convolution compute in float32 and each rounds its output. "published", only for `qwen4_ple`:
            they round to the dtype of `hidden` after each norm, product, sum, division, root and sigmoid and after the
            convolution, as the published code does. That is further from the exact result, slower, and equal to it.
        train_table: the module makes its own table [R, D] of `dtype` on `device`, R being what the layer's hash needs: the
            parameter `rows`, normally distributed with a deviation of 0.02. "host": the same in host memory, wherever the
            parameters are; the path of a .safetensors file: in that file, which is made piece by piece, or opened where it is
            there. Those are no parameter and in no state dict: a `TrainableRows` trains them. The convolution begins with zeros.
        sparse_grad: the gradient of `rows` is sparse, of the distinct rows of a step, as a `RowOptimizer` takes it; False: it has
            the size of the table, as ``torch.optim.AdamW`` and FSDP take it. None: True with ``train_table=True``, else False.

    Raises:
        TypeError: `spec` is no EngramSpec, `table` no RowTable, ShardedRows or TrainableRows, `token_map` no TokenMap,
            `train_table` no bool, str or path, or `sparse_grad` no bool.
        ValueError: the spec has no such layer or no module variant, table or token map do not belong to it, a table is given
            with `train_table`, the file of `train_table` holds another table, or `rounding` is neither word or not for this
            variant.

    Source: docs/ops.md, "The module"; deepseek-ai/Engram `engram_demo_v1.py`; the published DeepSeek-V4.1 model code (keys
    before the value in wkv's output, q_weight and k_weight as norm weights); huggingface/transformers
    `models/qwen4_exp/modular_qwen4_exp.py` (`Qwen4ExpTextPLELayer`).
    """

    op = "Engram"
    variants = ("deepseek_v41", "demo_v1", "qwen4_ple")

    def __init__(self, spec: EngramSpec, layer_id: int, hidden_size: int | None = None, branches: int | None = None, *,
                 table: AnyTable | None = None, token_map: TokenMap | None = None,
                 dtype: torch.dtype = torch.bfloat16, device: torch.device | str | None = None, rounding: str = "once",
                 train_table: TrainTable = False, sparse_grad: bool | None = None):
        super().__init__(spec, layer_id, table, token_map)
        self.rounding = checked_rounding(rounding, spec)
        self.sparse_grad = self.checked_sparse_grad(train_table, sparse_grad)
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"Engram: dtype is {dtype!r}, expected torch.float32, torch.bfloat16 or torch.float16")
        self.hidden_size = expect_int("Engram", "hidden_size", spec.hidden_size if hidden_size is None else hidden_size, 1)
        self.branches = expect_int("Engram", "branches", spec.branches if branches is None else branches, 1, 64)
        if train_table:
            self.table = self.made_table(train_table, dtype, device)
        is_centred = spec.variant == "qwen4_ple"  # its norms multiply by 1 + w
        norm_weight = torch.zeros if is_centred else torch.ones
        shape = (self.branches, self.hidden_size)
        self.wkv = nn.Linear(spec.num_columns * spec.row_dim, (self.branches + 1) * self.hidden_size, dtype=dtype, device=device,
                             bias=spec.variant == "demo_v1")
        self.w_hidden = nn.Parameter(norm_weight(shape, dtype=dtype, device=device))
        self.w_key = nn.Parameter(norm_weight(shape, dtype=dtype, device=device))
        if spec.conv_width is not None:
            conv = torch.empty(self.branches * self.hidden_size, 1, spec.conv_width, dtype=dtype, device=device)
            if is_centred or train_table:
                nn.init.zeros_(conv)  # as the published model does, and the paper where it trains
            else:
                nn.init.kaiming_uniform_(conv, a=5**0.5)  # as nn.Conv1d does
            self.conv_weight = nn.Parameter(conv.view(*shape, spec.conv_width))
            self.conv_norm = nn.Parameter(norm_weight(shape, dtype=dtype, device=device))
        self._place_constants()

    def device_of_parameters(self) -> torch.device | None:
        """Where the parameters are; None: there are none yet."""
        return self.w_hidden.device if hasattr(self, "w_hidden") else None

    def extra_repr(self) -> str:
        """What `repr` shows of the module itself."""
        rows = getattr(self, "rows", None)
        table = f"trained rows {list(rows.shape)}" if isinstance(rows, Tensor) else repr(self._table)
        tokens = "None" if self._map is None else f"{self._map.vocab_size} ids to {self._map.num_classes}"
        return (f"spec={self.spec.name!r}, variant={self.spec.variant!r}, layer_id={self.layer_id}, "
                f"hidden_size={self.hidden_size}, branches={self.branches}, table={table}, token_map={tokens}")

    def forward(self, hidden: Tensor, token_ids: Tensor | None = None, cu_seqlens: Tensor | None = None, *,
                row_ids: Tensor | None = None, rows: Tensor | None = None, history: Tensor | None = None,
                dead_mask: Tensor | None = None, state: Tensor | None = None, positions: Tensor | None = None,
                state_indices: Tensor | None = None, state_ends: Tensor | None = None, backend: str = "auto") -> Tensor:
        """The new hidden state (`deepseek_v41`) or the update to add (`demo_v1`, `qwen4_ple`).

        Args:
            hidden: [T, M, H], sequences packed back to back.
            token_ids: [T] int32 or int64, hashed here. Exactly one of `token_ids`, `row_ids` and `rows` is given.
            cu_seqlens: [B+1] int32; needed to hash and for the convolution.
            row_ids: [T, C] rows of this layer's table, gathered here.
            rows: [T, C, D] or [T, C*D] of the dtype of `hidden` (or autocast's), gathered before, as by `RowPrefetcher`.
            history: [B, N-1], as `ngram_hash` takes it; only with `token_ids`. None: every sequence starts here, which
                `positions` above 0 contradict.
            dead_mask: [T] bool, True = the memory leaves the token alone: its hidden state stays, its update is 0, and what its
                rows hold reaches no gradient.
            state: [B, (W-1)*dilation + K, M, H], convolution state, as `short_conv` takes it; only with a convolution.
            positions: [B], as `short_conv` takes it; given with `state` and only then.
            state_indices: [B], as `short_conv` takes it: the ring of each sequence in a pool of rings.
            state_ends: [R, 2], as `short_conv` takes it, so that positions which a ring cannot follow are refused.
            backend: of every op.

        Returns:
            [T, M, H] in the dtype of `hidden`.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: not exactly one source of rows, what it needs is missing, an argument that would not be used, or a wrong
                shape, dtype or device; and what the ops raise.

        Source: docs/ops.md, "The module".
        """
        carried = {"state": state, "positions": positions, "state_indices": state_indices, "state_ends": state_ends}
        self._check_hidden(hidden, carried)
        if history is None and token_ids is not None and state is not None and positions is not None and cu_seqlens is not None:
            history = history_of_new_sequences(token_ids, positions, cu_seqlens.shape[0] - 1, self.layout.max_order)
        out = self.gated(hidden, token_ids, cu_seqlens, row_ids, rows, history, dead_mask, backend)
        return out if self.spec.conv_width is None else self.convolved(out, cu_seqlens, dead_mask, backend, **carried)

    def gated(self, hidden: Tensor, token_ids: Tensor | None, cu_seqlens: Tensor | None, row_ids: Tensor | None = None,
              rows: Tensor | None = None, history: Tensor | None = None, dead_mask: Tensor | None = None,
              backend: str = "auto") -> Tensor:
        """What the gate gives, [T, M, H]: the new hidden state, or what the convolution takes. Arguments as of `forward`."""
        self._check_hidden(hidden, {})
        if dead_mask is not None:
            expect_tensor("Engram", "dead_mask", dead_mask, (torch.bool,), hidden.shape[:1], hidden.device, dense_dims=1)
        rows = self._rows(hidden, token_ids, cu_seqlens, row_ids, rows, history, dead_mask, backend)
        if dead_mask is not None and (_transforms.active() or wants_grad(rows, *self._projection_parameters())):
            rows = rows.masked_fill(dead_mask[:, None], 0)  # its gradient is 0, but 0 * NaN in that of wkv is not
        keys, value = self._project(rows, hidden)
        spec = self.spec
        w_hidden, w_key = self._norm_weights(hidden, self.w_hidden, self.w_key)
        if self.rounding == "published":
            return published_gate(hidden, keys, value, w_hidden, w_key, dead_mask, spec.gate_eps, spec.gate_clamp)
        return gate(hidden, keys, value, w_hidden, w_key, dead_mask, eps=spec.gate_eps, clamp=spec.gate_clamp,
                    zero_sign=spec.zero_sign, add_residual=spec.add_residual, backend=backend)

    def convolved(self, gated: Tensor, cu_seqlens: Tensor | None, dead_mask: Tensor | None = None, backend: str = "auto",
                  **carried: Tensor | None) -> Tensor:
        """`gated` and the short convolution of it, [T, M, H]. Arguments as of `forward`, `carried` being what `state` needs."""
        if cu_seqlens is None:
            raise ValueError("Engram: cu_seqlens is None, but the short convolution needs it")
        spec = self.spec
        assert spec.conv_dilation is not None
        conv_weight = self.conv_weight.float() if spec.variant == "qwen4_ple" else self._weights_for(gated, self.conv_weight)[0]
        conv: Callable[..., Tensor] = published_conv if self.rounding == "published" else short_conv
        out = conv(gated, conv_weight, *self._norm_weights(gated, self.conv_norm), cu_seqlens, spec.conv_dilation, spec.conv_eps,
                   **carried, backend=backend)
        return out if dead_mask is None else out.masked_fill(dead_mask[:, None, None], 0)

    def _rows(self, hidden: Tensor, token_ids: Tensor | None, cu_seqlens: Tensor | None, row_ids: Tensor | None,
              rows: Tensor | None, history: Tensor | None, dead_mask: Tensor | None, backend: str) -> Tensor:
        given = [name for name, x in (("token_ids", token_ids), ("row_ids", row_ids), ("rows", rows)) if x is not None]
        if len(given) != 1:
            raise ValueError(f"Engram: exactly one of token_ids, row_ids and rows is wanted, got {given or 'none'}")
        if history is not None and token_ids is None:
            raise ValueError(f"Engram: history is given, but {given[0]} are not hashed here")
        dtype = self._row_dtype(hidden)
        if rows is None:
            try:
                if token_ids is not None:
                    row_ids = self._hash(hidden, token_ids, cu_seqlens, history, dead_mask, backend)
                assert row_ids is not None
                rows = self._gather(given[0], row_ids, dtype, backend)
            except RuntimeError as err:
                if backend != "reference" or not (hidden.is_meta or _transforms.active()):
                    raise
                raise NotImplementedError("Engram: backend 'reference' looks at its ids, and ids on the meta device or under "
                                          "vmap cannot be looked at; backend 'auto' takes them") from err
        columns, row_dim = self.spec.num_columns, self.spec.row_dim
        flat = isinstance(rows, Tensor) and rows.dim() == 2
        shape = (hidden.shape[0], columns * row_dim) if flat else (hidden.shape[0], columns, row_dim)
        expect_tensor("Engram", "rows", rows, tuple({hidden.dtype, dtype}), shape, hidden.device)
        return rows if flat else rows.flatten(1)

    def _projection_parameters(self) -> Iterator[Tensor]:
        return self.wkv.parameters()

    def _project(self, rows: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [T, M, H] and value [T, H] in the dtype of `hidden`. `wkv` may be quantized, adapted or offloaded."""
        try:
            projected = self.wkv(rows)
        except RuntimeError as err:
            weight = getattr(self.wkv, "weight", None)
            if not isinstance(weight, Tensor) or "dtype" not in str(err) or weight.dtype == rows.dtype:
                raise
            raise ValueError(f"Engram: hidden must be {weight.dtype}, the dtype of wkv.weight, outside of autocast; got "
                             f"{hidden.dtype}") from err
        keys_and_value = projected.to(hidden.dtype).unflatten(1, (self.branches + 1, self.hidden_size))
        return keys_and_value[:, :-1], keys_and_value[:, -1]

    def _weights_for(self, hidden: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """Weights in a dtype that the ops take beside `hidden`: under autocast they are brought to float32."""
        if autocast_dtype(hidden) is None or weights[0].dtype in (hidden.dtype, torch.float32):
            return weights
        return tuple(weight.float() for weight in weights)

    def _norm_weights(self, hidden: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        """What the norms multiply by: the weights themselves, or 1 + w in float32."""
        if self.spec.variant != "qwen4_ple":
            return self._weights_for(hidden, *weights)
        return tuple(1 + weight.float() for weight in weights)

    def _row_dtype(self, hidden: Tensor) -> torch.dtype:
        """What rows are gathered in: the dtype that autocast would bring them to, where it does; else that of `hidden`."""
        dtype = autocast_dtype(hidden)
        return hidden.dtype if dtype is None or not isinstance(self.wkv, nn.Linear) else dtype

    def _check_hidden(self, hidden: Tensor, carried: Mapping[str, Tensor | None]) -> None:
        if isinstance(hidden, Tensor) and hidden.dtype == torch.float64:
            raise ValueError("Engram: hidden is torch.float64, but no backend computes in float64; expected torch.float32, "
                             "torch.bfloat16 or torch.float16, and a module of that dtype")
        expect_tensor("Engram", "hidden", hidden, FLOAT_DTYPES, ("T", self.branches, self.hidden_size), self.w_hidden.device)
        name = next((name for name, x in carried.items() if x is not None), None)
        if self.spec.conv_width is None and name is not None:
            raise ValueError(f"Engram: {name} is given, but variant {self.spec.variant!r} has no convolution")

    def load_published(self, weights: Mapping[str, Tensor], prefix: str = "") -> None:
        """Copies the projections, norms and convolution out of a published checkpoint's tensors.

        `deepseek_v41`: wkv.weight, q_weight, k_weight; where wkv.weight is float8_e4m3fn also its scales, as wkv.scale,
        wkv.weight_scale_inv or wkv.weight_scale. `demo_v1`: key_projs.{m}, value_proj, norm1.{m} (key), norm2.{m} (hidden state),
        short_conv.conv.weight, short_conv.norms.{m}. `qwen4_ple`: key_proj, value_proj, norm_query (hidden state), norm_key,
        norm_conv, conv1d. Rows are not loaded: open the file as a `RowTable` and name the tensors
        (embed.weight and embed.scale in V4.1).

        Args:
            weights: name -> tensor.
            prefix: what the names begin with, such as "layers.1.engram.".

        Raises:
            KeyError: a tensor is missing; nothing is written.
            ValueError: a tensor has the wrong shape or is no float tensor; nothing is written.
        """
        assign_published(self, weights, prefix)


def checked_rounding(rounding: str, spec: EngramSpec) -> str:
    """`rounding`, where a module of `spec` has it; ValueError elsewhere."""
    if rounding not in ROUNDINGS or (rounding == "published" and spec.variant != "qwen4_ple"):
        raise ValueError(f"Engram: rounding is {rounding!r} with variant {spec.variant!r}, expected 'once', or 'published' with "
                         "variant 'qwen4_ple'")
    return rounding
