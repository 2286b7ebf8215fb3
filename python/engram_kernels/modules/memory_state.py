"""MemoryState: what the memory layers of a model carry from call to call, for a pool of sequences."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from engram_kernels import _modes, _transforms
from engram_kernels._checks import FLOAT_DTYPES, expect_int, expect_tensor
from engram_kernels._layers import layer_id_of, memory_modules
from engram_kernels.ops.ngram_hash import ngram_hash_and_commit
from engram_kernels.spec import EngramSpec
from engram_kernels.token_map import TokenMap

_POSITION, _REJECTED, _DRAFTED = range(3)  # columns of the counters
_FREE = -1  # drafts of a slot that holds no sequence
_WRONG = ("slots that are none", "slots without a sequence", "steps before the commit of earlier drafts",
          "drafts that are more than max_drafts or the chunk", "commits of more than was drafted", "slots that are named twice")


@dataclasses.dataclass
class _Call:
    """The call whose layers run: which state each sequence has."""
    row_ids: Tensor  # [L, T, C]
    cu_seqlens: Tensor
    indices: Tensor  # [B] slots, -1 where a sequence is skipped
    at: Tensor  # [B] rows of the counters, the last one where a sequence is skipped
    positions: Tensor  # [B] tokens before the chunk
    dead_mask: Tensor | None


class MemoryState:
    """History and convolution rings of all memory layers of a model, for a pool of sequences that decode.

    A sequence has a *slot*, 0 .. num_slots - 1. `prefill` takes a chunk of any length for each of some slots, `step` one token
    each with up to `max_drafts` draft tokens behind it; both hash for all layers at once, and `arguments` gives each layer what
    it needs besides the hidden state. After a step with drafts, `commit` says how many were accepted. Any mix of these calls
    gives each sequence what one call on its accepted tokens gives: the same row ids, and outputs to the ops' own rounding.

    Everything that a call reads or writes is a tensor on the device: no call but `check_errors` waits for a GPU, so that steps
    can be captured in a graph or compiled. On the CPU bad use raises before anything is written. Where the data cannot be looked
    at (on a GPU, under torch.compile) such a sequence is skipped and counted, and `check_errors` raises.

    Ownership: the tensors are the object's own. The states of two calls must not overlap: one stream, one thread at a time.
    Not with autograd: call the layers under ``torch.no_grad()``.

    Args:
        layers: a model, whose memory modules are found, or a list of them; or an `EngramSpec`, for layers of another make.
        num_slots: S, sequences that can be held.
        max_drafts: K, draft tokens of a step that can be rejected.
        token_map: compression of token ids; None: that of the modules.
        token_dtype: of the token ids, int32 or int64.
        dtype: of the hidden states; None: of the modules' parameters, or bfloat16.
        device: None: that of the modules, or the CPU.
        backend: of the hash.

    Raises:
        TypeError: `layers` are no memory modules and no spec, or a number is no integer.
        ValueError: there is no memory module, two have different specs or token maps, or an argument is out of range.

    Source: docs/decoding.md.
    """

    def __init__(self, layers: nn.Module | Iterable[nn.Module] | EngramSpec, num_slots: int, *, max_drafts: int = 0,
                 token_map: TokenMap | None = None, token_dtype: torch.dtype = torch.int64, dtype: torch.dtype | None = None,
                 device: torch.device | str | None = None, backend: str = "auto"):
        modules = memory_modules("MemoryState", layers)
        spec = layers if isinstance(layers, EngramSpec) else modules[0].spec
        num_slots = expect_int("MemoryState", "num_slots", num_slots, 1)
        max_drafts = expect_int("MemoryState", "max_drafts", max_drafts, 0)
        if token_dtype not in (torch.int32, torch.int64):
            raise ValueError(f"MemoryState: token_dtype is {token_dtype}, expected torch.int32 or torch.int64")
        if not isinstance(token_map, TokenMap | None):
            raise TypeError(f"MemoryState: token_map is a {type(token_map).__name__}, expected a TokenMap or None")
        parameter = next((p for m in modules for p in m.parameters() if p.dtype in FLOAT_DTYPES), None)
        self.dtype = dtype or (torch.bfloat16 if parameter is None else parameter.dtype)
        if self.dtype not in FLOAT_DTYPES:
            raise ValueError(f"MemoryState: dtype is {self.dtype}, expected torch.float32, torch.bfloat16 or torch.float16")
        device = torch.device(device or ("cpu" if parameter is None else parameter.device))
        self.spec, self.num_slots, self.max_drafts, self.device, self.backend = spec, num_slots, max_drafts, device, backend
        self._layout, self._layer_ids = spec.layout().to(device), spec.layer_ids
        given = token_map or next((m.token_map for m in modules), None)
        self._map = None if given is None else given.to(device)
        shapes = {m.layer_id: (m.branches, m.hidden_size) for m in modules} if spec.conv_width is not None else {}
        if not modules and spec.conv_width is not None:
            shapes = {layer: (spec.branches, spec.hidden_size) for layer in spec.layer_ids}
        reach = 0 if spec.conv_width is None else (spec.conv_width - 1) * (spec.conv_dilation or 1)
        with torch.inference_mode(False):
            # a last row of everything takes what is written for sequences that are skipped; nothing reads it
            self.history = torch.full((num_slots + 1, spec.max_order - 1 + max_drafts), -1, dtype=token_dtype, device=device)
            self._counters = torch.zeros(num_slots + 1, 3, dtype=torch.int64, device=device)
            self._counters[:, _DRAFTED] = _FREE
            self._fresh = self._counters[0].clone()
            self.rings = {layer: torch.zeros(num_slots + 1, reach + max_drafts, *shape, dtype=self.dtype, device=device)
                          for layer, shape in shapes.items()}
            self._ends = {layer: torch.zeros(num_slots + 1, 2, dtype=torch.int64, device=device) for layer in shapes}
            self._errors = torch.zeros(len(_WRONG), dtype=torch.int64, device=device)
        self._call: _Call | None = None

    def prefill(self, token_ids: Tensor, cu_seqlens: Tensor, slots: Tensor, *, drafts: Tensor | None = None,
                dead_mask: Tensor | None = None) -> Tensor:
        """Takes a chunk of each sequence: the first of a new one, or a further one. Prompts and single steps may be mixed.

        Args:
            token_ids: [T] of `token_dtype`, chunks packed back to back.
            cu_seqlens: [B+1] int32, where each chunk begins and ends.
            slots: [B] int64, each at most once; -1 skips the sequence. A slot without a sequence begins one.
            drafts: [B] int64, how many of the last tokens of each chunk are drafts that `commit` will settle. None: none.
            dead_mask: [T] bool, tokens that the memory leaves alone.

        Returns:
            [L, T, C] int32 row ids of all layers of the spec; -1 for tokens of a skipped sequence, and where LongCat has no row.

        Raises:
            TypeError, ValueError, IndexError: a bad argument, a slot that is none or whose drafts nobody has committed, more
                drafts than `max_drafts`; nothing is changed.
        """
        return self._take("prefill", token_ids, cu_seqlens, slots, drafts, dead_mask, False)

    def step(self, token_ids: Tensor, slots: Tensor, *, dead_mask: Tensor | None = None) -> Tensor:
        """Takes the next token of each sequence and the drafts behind it.

        Args:
            token_ids: [B], or [B, 1 + k] with k draft tokens, k at most `max_drafts`; of `token_dtype`.
            slots: [B] int64, each at most once and with a sequence; -1 skips the sequence.
            dead_mask: of the shape of `token_ids`, bool.

        Returns:
            [L, B * (1 + k), C] int32 row ids of all layers; the tokens of a sequence lie one behind the other.

        Raises:
            As `prefill`; and a slot without a sequence (never filled, or removed).
        """
        if not isinstance(token_ids, Tensor) or token_ids.dim() not in (1, 2) or token_ids.shape[1:] == (0,):
            got = list(token_ids.shape) if isinstance(token_ids, Tensor) else type(token_ids).__name__
            raise ValueError(f"MemoryState.step: token_ids must have shape [B] or [B, 1 + drafts], got {got}")
        num, each = token_ids.shape[0], token_ids.shape[1] if token_ids.dim() == 2 else 1
        if each - 1 > self.max_drafts:
            raise ValueError(f"MemoryState.step: token_ids has {each - 1} drafts, expected at most {self.max_drafts}, max_drafts")
        bounds = torch.arange(num + 1, dtype=torch.int32, device=self.device) * each
        drafts = torch.full((num,), each - 1, dtype=torch.int64, device=self.device)
        return self._take("step", token_ids.flatten(), bounds, slots, drafts, None if dead_mask is None else dead_mask.flatten(),
                          True)

    def arguments(self, layer: nn.Module | int, rows: Tensor | None = None) -> dict[str, Any]:
        """What a layer takes besides the hidden state in this call: ``layer(hidden, **state.arguments(layer))``.

        Args:
            layer: a memory module, or its layer id.
            rows: the layer's rows [T, C, D] where they were prefetched; None: it gathers them by its row ids.

        Returns:
            Keyword arguments of `Engram.forward`: `row_ids` or `rows`, `cu_seqlens`, `dead_mask`, and with a convolution `state`,
            `positions`, `state_indices` and `state_ends`. `LongcatEmbedding.forward` takes them behind its token ids, those of
            the same call, flattened.

        Raises:
            TypeError: `layer` is no memory module and no id.
            ValueError: no `prefill` or `step` has come before, or there is no such layer.
        """
        call = self._current("arguments")
        layer_id = layer_id_of("MemoryState.arguments", layer, self._layer_ids)
        found: dict[str, Any] = {"cu_seqlens": call.cu_seqlens, "dead_mask": call.dead_mask}
        found |= {"row_ids": call.row_ids[self._layer_ids.index(layer_id)]} if rows is None else {"rows": rows}
        if layer_id in self.rings:
            found |= {"state": self.rings[layer_id], "positions": call.positions, "state_indices": call.indices,
                      "state_ends": self._ends[layer_id]}
        return found

    def commit(self, accepted: Tensor, slots: Tensor | None = None) -> None:
        """Keeps the first `accepted` drafts of each sequence; the others never were. The layers must have run.

        Args:
            accepted: [B] int64, 0 .. drafts of the sequence.
            slots: [B] int64, each at most once; None: those of the last `prefill` or `step`.

        Raises:
            ValueError: more is accepted than was drafted, a slot has no sequence or is named twice, or there was no step; nothing
                is changed.
        """
        at = self._current("commit").at if slots is None else self._distinct_rows_of("commit", slots)
        expect_tensor("MemoryState.commit", "accepted", accepted, (torch.int64,), (at.shape[0],), self.device)
        state = self._counters[at]
        drafted = state[:, _DRAFTED].clamp_min(0)
        wrong = ((accepted < 0) | (accepted > drafted)) & (at < self.num_slots)
        if self._can_look():
            for b, (bad, slot) in enumerate(zip(wrong.tolist(), at.tolist(), strict=True)):
                if bad:
                    raise ValueError(f"MemoryState.commit: accepted[{b}] is {int(accepted[b])}, expected [0, {int(drafted[b])}], "
                                     f"the drafts of slot {slot} that are open")
        else:
            self._count({4: wrong})
        back = torch.where(wrong, 0, drafted - accepted)
        held = state[:, _DRAFTED] != _FREE
        self._counters[at] = torch.stack([state[:, _POSITION] - back, state[:, _REJECTED] + back,
                                          torch.where(held, 0, state[:, _DRAFTED])], dim=1)

    def remove(self, slots: Tensor) -> None:
        """Ends the sequences of these slots, which are free for others; open drafts go with them. -1 is passed over.

        Args:
            slots: [B] int64.
        """
        at = self._rows_of("remove", slots)
        self.history[at] = -1
        self._counters[at] = self._fresh
        for ends in self._ends.values():
            ends[at] = 0

    def reorder(self, sources: Tensor, slots: Tensor | None = None) -> None:
        """Gives slot ``slots[i]`` a copy of the state that slot ``sources[i]`` has now, as beam search wants it.

        Args:
            sources: [B] int64, any number of times each. -1 leaves the slot as it is.
            slots: [B] int64, each at most once; None: those of the last `prefill` or `step`.

        Raises:
            ValueError: a slot is none or is named twice, or a source holds no sequence; nothing is changed.
        """
        to = self._current("reorder").at if slots is None else self._distinct_rows_of("reorder", slots)
        expect_tensor("MemoryState.reorder", "sources", sources, (torch.int64,), (to.shape[0],), self.device)
        source = self._rows_of("reorder", sources)
        wrong = (self._counters[source, _DRAFTED] == _FREE) & (source < self.num_slots)
        if self._can_look():
            self._expect_no(wrong, source, "reorder: sources", "has no sequence")
        else:
            self._count({1: wrong})
        to = torch.where(wrong | (source == self.num_slots), self.num_slots, to)
        for x in (self.history, self._counters, *self.rings.values(), *self._ends.values()):
            x[to] = x[source]

    def positions(self, slots: Tensor) -> Tensor:
        """How many tokens each sequence has had, open drafts included: [B] int64."""
        return self._counters[self._rows_of("positions", slots), _POSITION]

    def check_errors(self) -> None:
        """Raises if a call met bad use that it could not look at since the last check. Waits for the device.

        Raises:
            ValueError: names each kind and how often it came; the counts start again at 0.
        """
        counts = self._errors.tolist()
        self._errors.zero_()
        if any(counts):
            raise ValueError("MemoryState: " + "; ".join(f"{count} {what}" for count, what in zip(counts, _WRONG, strict=True)
                                                         if count))

    def _take(self, method: str, token_ids: Tensor, cu_seqlens: Tensor, slots: Tensor, drafts: Tensor | None,
              dead_mask: Tensor | None, must_hold: bool) -> Tensor:
        at = self._rows_of(method, slots)
        expect_tensor(f"MemoryState.{method}", "token_ids", token_ids, (self.history.dtype,), ("T",), self.device)
        expect_tensor(f"MemoryState.{method}", "cu_seqlens", cu_seqlens, (torch.int32,), (at.shape[0] + 1,), self.device)
        if drafts is None:
            drafts = torch.zeros_like(at)
        expect_tensor(f"MemoryState.{method}", "drafts", drafts, (torch.int64,), (at.shape[0],), self.device)
        state, lengths, real = self._counters[at], cu_seqlens.diff().long(), at < self.num_slots
        wrong = {1: (state[:, _DRAFTED] == _FREE) & real & must_hold, 2: (state[:, _DRAFTED] > 0) & real,
                 3: ((drafts < 0) | (drafts > self.max_drafts) | (drafts > lengths)) & real}
        if self._can_look():
            self._expect_no(wrong[1], at, f"{method}: slots", "has no sequence: it was removed, or never filled")
            self._expect_no(wrong[2], at, f"{method}: slots", "has drafts of an earlier step that no commit has settled")
            self._expect_no(wrong[3] & (lengths >= 0), drafts, f"{method}: drafts",  # the hash refuses chunks that end before
                            f"is not in [0, max_drafts = {self.max_drafts}], or more than the chunk")
        else:
            self._count(wrong)
        skipped = wrong[1] | wrong[2] | wrong[3] | ~real
        indices, at = torch.where(skipped, -1, at), torch.where(skipped, self.num_slots, at)
        dead = self.spec.dead_mask(token_ids, dead_mask)
        row_ids = ngram_hash_and_commit(token_ids, cu_seqlens, self._layout, self.history, self._map, dead, indices,
                                        torch.where(skipped, 0, state[:, _REJECTED]), backend=self.backend)
        row_ids = self.spec.without_absent(row_ids, self._layout.offsets, dead)
        positions = torch.where(skipped, 0, state[:, _POSITION])
        self._counters[at] = torch.stack([positions + lengths, torch.zeros_like(at), drafts], dim=1)
        self._call = _Call(row_ids, cu_seqlens, indices, at, positions, dead_mask)
        return row_ids

    def _current(self, method: str) -> _Call:
        if self._call is None:
            raise ValueError(f"MemoryState.{method}: there was no prefill and no step before")
        return self._call

    def _rows_of(self, method: str, slots: Tensor) -> Tensor:
        """Rows of the counters: the slots, and the last row for -1 and, where nobody can look, for what is no slot."""
        expect_tensor(f"MemoryState.{method}", "slots", slots, (torch.int64,), ("B",), self.device)
        wrong = (slots < -1) | (slots >= self.num_slots)
        if self._can_look():
            self._expect_no(wrong, slots, f"{method}: slots", f"is not in [0, {self.num_slots}), or -1 (skip the sequence)")
        else:
            self._count({0: wrong})
        return torch.where(wrong | (slots < 0), self.num_slots, slots)

    def _distinct_rows_of(self, method: str, slots: Tensor) -> Tensor:
        """As `_rows_of`; what names a slot again is refused, or counted and then as -1."""
        at = self._rows_of(method, slots)
        again = (at[:, None] == at[None]).triu(1).any(0) & (at < self.num_slots)
        if self._can_look():
            self._expect_no(again, slots, f"{method}: slots", "comes twice")
        else:
            self._count({5: again})
        return torch.where(again, self.num_slots, at)

    def _can_look(self) -> bool:
        """Whether the data lies in host memory and is there."""
        return (self.device.type == "cpu" and not is_compiling() and not _transforms.active()
                and _modes.fake_mode_of(self.history) is None)

    def _expect_no(self, wrong: Tensor, values: Tensor, what: str, why: str) -> None:
        for b, (bad, value) in enumerate(zip(wrong.tolist(), values.tolist(), strict=True)):
            if bad:
                raise ValueError(f"MemoryState.{what}[{b}] is {value}, which {why}")

    def _count(self, wrong: dict[int, Tensor]) -> None:
        for kind, found in wrong.items():
            self._errors[kind] += found.sum()
