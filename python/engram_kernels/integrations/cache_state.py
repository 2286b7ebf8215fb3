"""What a memory has seen of the sequences of a transformers cache: it is held by the cache and does what the cache does."""
from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

MAX_DRAFTS = 64  # inputs of the convolution that `crop` may take back


class LayerState:
    """Token ids and convolution inputs of one memory layer.

    Attributes:
        ids: [B, L] int64, every token so far, oldest first; -2 is padding. None: nothing yet.
        inputs: [B, p, M, H], the last inputs of the convolution, oldest first. None: nothing yet, or no convolution.
        reach: inputs that the convolution needs.
    """

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.inputs: Tensor | None = None
        self.reach = 0

    def append(self, ids: Tensor, inputs: Tensor | None, reach: int) -> None:
        """Takes over the tokens of a chunk, [B, n], and their convolution inputs, [B, n, M, H]."""
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        if inputs is not None:
            line = inputs if self.inputs is None else torch.cat([self.inputs, inputs], dim=1)
            self.inputs, self.reach = line[:, -(reach + MAX_DRAFTS):].clone(), reach

    def crop(self, count: int) -> None:
        """Takes the last `count` tokens back."""
        if self.ids is None or count == 0:
            return
        left = self.ids.shape[1] - count
        if self.inputs is not None:
            if self.inputs.shape[1] - count < min(self.reach, left):
                raise ValueError(f"engram_kernels: the cache is cropped by {count} tokens, but the memory's convolution can go "
                                 f"back by {self.inputs.shape[1] - self.reach}; expected at most {MAX_DRAFTS}")
            self.inputs = self.inputs[:, :self.inputs.shape[1] - count]
        self.ids = self.ids[:, :left]

    def select(self, index: Tensor) -> None:
        """Sequence b becomes what `index[b]` was."""
        if self.ids is not None:
            self.ids = self.ids[index.to(self.ids.device)]
        if self.inputs is not None:
            self.inputs = self.inputs[index.to(self.inputs.device)]

    def repeat(self, repeats: int) -> None:
        """Each sequence `repeats` times, one behind the other."""
        if self.ids is not None:
            self.ids = self.ids.repeat_interleave(repeats, dim=0)
        if self.inputs is not None:
            self.inputs = self.inputs.repeat_interleave(repeats, dim=0)


class _Following:
    """Methods of a cache whose class `follow` has changed: each does to the memory's state what it does to the cache."""

    memory_states: dict[int, LayerState]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        for state in self.memory_states.values():
            state.select(beam_idx)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        before = {layer: int(self.get_seq_length(layer)) for layer in self.memory_states}  # type: ignore[attr-defined]
        super().crop(*args, **kwargs)  # type: ignore[misc]
        for layer, state in self.memory_states.items():
            state.crop(before[layer] - int(self.get_seq_length(layer)))  # type: ignore[attr-defined]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.memory_states.clear()

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        for state in self.memory_states.values():
            state.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        for state in self.memory_states.values():
            state.select(indices)


@functools.cache
def _following_class(kind: Any) -> type:
    made = type(kind.__name__, (_Following, kind), {"__module__": kind.__module__})
    made.__qualname__ = kind.__qualname__
    return made


def state_of(cache: Any, layer: int) -> LayerState:
    """The memory's state for a decoder layer of `cache`, which from now on follows it.

    Raises:
        TypeError: the cache is no DynamicCache.
        ValueError: the cache holds tokens that the memory has not seen.
    """
    if not isinstance(cache, _Following):
        kind = type(cache)
        if (kind.__module__, kind.__name__) != ("transformers.cache_utils", "DynamicCache"):
            raise TypeError(f"engram_kernels: cache is a {kind.__name__}, expected a DynamicCache: the memory's state follows no "
                            "other")
        cache.__class__ = _following_class(kind)  # type: ignore[arg-type]
        cache.memory_states = {}
    state = cache.memory_states.setdefault(layer, LayerState())
    held = cache.get_seq_length(layer)
    seen = 0 if state.ids is None else state.ids.shape[1]
    if held != seen:
        raise ValueError(f"engram_kernels: layer {layer} of the cache holds {held} tokens, of which the memory has seen {seen}: "
                         "fill a cache with the model that has the memory, and change it with methods of the cache only")
    return state
