"""The timed part of the demo: a stand-in backbone with the memory layers in it, rows fetched one step ahead."""
from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engram_kernels.ops.gate import gate
from engram_kernels.ops.short_conv import short_conv
from engram_kernels.prefetch.row_prefetcher import RowPrefetcher
from engram_kernels.reference.gate import gate as reference_gate
from engram_kernels.reference.gather_rows import gather_rows as reference_gather_rows
from engram_kernels.reference.short_conv import short_conv as reference_short_conv
from engram_kernels.spec import EngramSpec
from engram_kernels.table.row_table import RowTable

# a gate output may be off from float64 by this share of the largest value of its row: one unit in the last place of bf16
TOLERANCE = 2.0**-7
_CHECKED_STEPS = 4
_TRIAL_TOKENS = 16


@dataclasses.dataclass
class MemoryLayer:
    """Weights of one memory layer at the demo's width: W projects C*D to M keys and one value."""

    table: RowTable
    wkv: Tensor      # [(M + 1) * H, C * D]
    w_hidden: Tensor  # [M, H]
    w_key: Tensor     # [M, H]
    conv_weight: Tensor | None  # [M, H, W]
    conv_norm: Tensor | None    # [M, H]


class Pipeline:
    """Steps of `tokens_per_step` tokens through backbone block and memory layer, for every memory layer of the spec."""

    def __init__(self, spec: EngramSpec, tables: Sequence[RowTable], hidden_size: int, tokens_per_step: int, backend: str):
        self.spec, self.backend, self.tokens_per_step = spec, backend, tokens_per_step
        self.seconds: dict[str, float] = {}
        generator = torch.Generator().manual_seed(0)
        width, branches = spec.num_columns * spec.row_dim, spec.branches

        def weights(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

        def norms() -> Tensor:
            return (1 + 0.1 * torch.randn(branches, hidden_size, generator=generator)).bfloat16()

        self.dtype, self.trial_flops = fastest_dtype(width, (branches + 1) * hidden_size)

        def product(*shape: int) -> Tensor:
            return weights(*shape).to(self.dtype)

        self.embedding = torch.randn(4096, branches, hidden_size, generator=generator).bfloat16()  # by token id mod 4096
        self.blocks = [(product(2 * hidden_size, hidden_size), product(hidden_size, 2 * hidden_size)) for _ in tables]
        conv_width = spec.conv_width
        self.layers = [MemoryLayer(table, product((branches + 1) * hidden_size, width), norms(), norms(),
                                   None if conv_width is None else weights(branches, hidden_size, conv_width),
                                   None if conv_width is None else norms()) for table in tables]

    def num_steps(self, num_tokens: int) -> int:
        """How many steps a text takes; the last one may be shorter."""
        return -(-num_tokens // self.tokens_per_step)

    def run(self, token_ids: Tensor, row_ids: Tensor, advance: Callable[[int], None]) -> dict[str, Any]:
        """Runs the whole text, fetching each step's rows during the step before it.

        Args:
            token_ids: [T].
            row_ids: [L, T, C] into the tables.
            advance: called with the tokens of each step.

        Returns:
            seconds by stage, elapsed_s, the prefetchers' stats, and the hidden states of the steps that `check` looks at.
        """
        steps = self._steps(token_ids.numel())
        checked = self.checked_steps(token_ids.numel())
        prefetchers = [RowPrefetcher(layer.table, depth=1) for layer in self.layers]
        kept: dict[int, Tensor] = {}
        self.seconds = {}
        start = time.perf_counter()
        try:
            tickets = [p.submit(row_ids[i, steps[0]]) for i, p in enumerate(prefetchers)]
            for number, step in enumerate(steps):
                hidden = self._embed(token_ids[step])
                for i, prefetcher in enumerate(prefetchers):
                    hidden = self._backbone(i, hidden)
                    rows = prefetcher.wait(tickets[i])
                    if number + 1 < len(steps):
                        tickets[i] = prefetcher.submit(row_ids[i, steps[number + 1]])
                    hidden = self._memory(i, hidden, rows)
                if number in checked:
                    kept[number] = hidden
                advance(hidden.shape[0])
            elapsed = time.perf_counter() - start
            stats = [p.stats() for p in prefetchers]
        finally:
            for prefetcher in prefetchers:
                prefetcher.close()
        return {"elapsed_s": elapsed, "seconds": dict(self.seconds), "prefetch": stats, "kept": kept, "steps": len(steps)}

    def checked_steps(self, num_tokens: int) -> tuple[int, ...]:
        """Steps that `check` recomputes: first, last, and between."""
        last = self.num_steps(num_tokens) - 1
        return tuple(sorted({last * i // (_CHECKED_STEPS - 1) for i in range(_CHECKED_STEPS)}))

    def check(self, token_ids: Tensor, row_ids: Tensor, kept: dict[int, Tensor]) -> dict[str, Any]:
        """Recomputes the kept steps and compares: rows bit for bit with the reference gather, gates with float64.

        Returns:
            rows_equal and run_repeats (bool), gate_error (largest error, as a share of the row's largest value), checked
            tokens, and gate_ok: the error is within `TOLERANCE` in every row.
        """
        rows_equal, repeats, worst, tokens = True, True, 0.0, 0
        conv_error: float | None = None
        steps = self._steps(token_ids.numel())
        for number, final in kept.items():
            hidden = self._embed(token_ids[steps[number]])
            for i, layer in enumerate(self.layers):
                hidden = self._backbone(i, hidden)
                ids = row_ids[i, steps[number]]
                with RowPrefetcher(layer.table) as prefetcher:
                    rows = prefetcher.wait(prefetcher.submit(ids))
                    expected = self._reference_rows(layer, ids)
                    rows_equal = rows_equal and torch.equal(rows.view(torch.int16), expected.view(torch.int16))
                    key, value = self._project(layer, rows)
                    got = self._gate(layer, hidden, key, value)
                    worst = max(worst, self._gate_error(layer, hidden, key, value, got))
                    if layer.conv_weight is not None:
                        conv_error = max(conv_error or 0.0, self._conv_error(layer, got))
                    hidden = self._memory(i, hidden, rows)
            repeats = repeats and torch.equal(hidden, final)
            tokens += hidden.shape[0]
        return {"rows_equal": rows_equal, "run_repeats": repeats, "gate_error": worst, "gate_ok": worst <= TOLERANCE,
                "conv_error": conv_error, "conv_ok": conv_error is None or conv_error <= TOLERANCE,
                "checked_tokens": tokens}

    def _steps(self, num_tokens: int) -> list[slice]:
        return [slice(begin, min(begin + self.tokens_per_step, num_tokens))
                for begin in range(0, num_tokens, self.tokens_per_step)]

    def _timed(self, stage: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
        return result

    def _embed(self, token_ids: Tensor) -> Tensor:
        return self.embedding[token_ids.long() % self.embedding.shape[0]]

    def _backbone(self, i: int, hidden: Tensor) -> Tensor:
        up, down = self.blocks[i]
        return self._timed("backbone", lambda: hidden + F.linear(F.silu(F.linear(hidden.to(self.dtype), up)), down).bfloat16())

    def _project(self, layer: MemoryLayer, rows: Tensor) -> tuple[Tensor, Tensor]:
        projected = F.linear(rows.flatten(1).to(self.dtype), layer.wkv).bfloat16()
        keys_and_value = projected.view(rows.shape[0], self.spec.branches + 1, -1)
        return keys_and_value[:, :-1], keys_and_value[:, -1]

    def _gate(self, layer: MemoryLayer, hidden: Tensor, key: Tensor, value: Tensor) -> Tensor:
        spec = self.spec
        return gate(hidden, key, value, layer.w_hidden, layer.w_key, eps=spec.gate_eps, clamp=spec.gate_clamp,
                    zero_sign=spec.zero_sign, add_residual=spec.add_residual, backend=self.backend)

    def _memory(self, i: int, hidden: Tensor, rows: Tensor) -> Tensor:
        layer, spec = self.layers[i], self.spec
        key, value = self._timed("project", lambda: self._project(layer, rows))
        out = self._timed("gate", lambda: self._gate(layer, hidden, key, value))
        if layer.conv_weight is not None:
            gated = out
            out = self._timed("short_conv", lambda: self._conv(layer, gated))
        return out if spec.add_residual else hidden + out

    def _conv(self, layer: MemoryLayer, gated: Tensor, reference: bool = False) -> Tensor:
        """Each step is a sequence of its own here. reference: in float64."""
        weight, norm, dilation = layer.conv_weight, layer.conv_norm, self.spec.conv_dilation
        assert weight is not None and norm is not None and dilation is not None  # the spec sees to it
        cu_seqlens = torch.tensor([0, gated.shape[0]], dtype=torch.int32)
        if reference:
            return reference_short_conv(gated.double(), weight.double(), norm.double(), cu_seqlens, dilation, self.spec.conv_eps)
        return short_conv(gated, weight, norm, cu_seqlens, dilation, self.spec.conv_eps, backend=self.backend)

    def _conv_error(self, layer: MemoryLayer, gated: Tensor) -> float:
        return _relative_error(self._conv(layer, gated), self._conv(layer, gated, reference=True))

    def _reference_rows(self, layer: MemoryLayer, ids: Tensor) -> Tensor:
        table, local_ids = layer.table.stage(ids)
        return reference_gather_rows(table.rows, table.scales, local_ids, table.row_format, table.row_dim,
                                     table.zero_scale_is_zero, torch.bfloat16, table.table_scale)

    def _gate_error(self, layer: MemoryLayer, hidden: Tensor, key: Tensor, value: Tensor, got: Tensor) -> float:
        spec = self.spec
        exact = reference_gate(hidden.double(), key.double(), value.double(), layer.w_hidden.double(), layer.w_key.double(), None,
                               spec.gate_eps, spec.gate_clamp, spec.zero_sign, spec.add_residual)
        return _relative_error(got, exact)


def fastest_dtype(inputs: int, outputs: int) -> tuple[torch.dtype, dict[str, float]]:
    """The dtype in which this CPU multiplies by a matrix of these sizes fastest, by a trial; and the flop/s of each
    per second of CPU time.

    A CPU without bfloat16 instructions is several times slower in it than in float32; one that has them is faster.
    """
    flops: dict[str, float] = {}
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = torch.ones(_TRIAL_TOKENS, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
        times = []
        for _ in range(3):  # the first also sets up
            start = time.process_time()  # of all threads: what else runs here slows both dtypes, but must not choose
            F.linear(x, weight)
            times.append(max(time.process_time() - start, 1e-9))
        flops[str(dtype).removeprefix("torch.")] = 2 * _TRIAL_TOKENS * inputs * outputs / min(times)
    best = max(flops, key=flops.__getitem__)
    return getattr(torch, best), flops


def _relative_error(got: Tensor, exact: Tensor) -> float:
    """The largest error of a row, as a share of the row's largest value."""
    return float(((got.double() - exact).abs().amax(-1) / exact.abs().amax(-1).clamp_min(1e-30)).max())
