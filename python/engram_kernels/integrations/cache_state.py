"""What a memory has seen of the sequences of a transformers cache: a layer of the cache, behind those of the model."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

_Dummy: Any = getattr(cache_utils, "DummyLayer", object)  # which masks and offloading pass over; 5.16 has none
MAX_DRAFTS = 64  # inputs of the convolution that `crop` may take back


class LayerState(_Dummy):
    """Token ids and convolution inputs of one memory layer. The cache reorders, crops, selects and resets it with its layers.

    Attributes:
        layer: the decoder layer's number.
        ids: [B, L] int64, every token so far, oldest first; -2 is padding. None: nothing yet.
        inputs: [B, p, M, H], the last inputs of the convolution, oldest first. None: nothing yet, or no convolution.
        reach: inputs that the convolution needs.
    """

    keys = values = None
    is_sliding = is_compileable = supports_early_init = False
    is_croppable = is_initialized = True

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.ids: Tensor | None = None
        self.inputs: Tensor | None = None
        self.reach = 0

    def append(self, ids: Tensor, inputs: Tensor | None, reach: int) -> None:
        """Takes over the tokens of a chunk, [B, n], and their convolution inputs, [B, n, M, H]."""
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        if inputs is not None:
            line = inputs if self.inputs is None else torch.cat([self.inputs, inputs], dim=1)
            self.inputs, self.reach = line[:, -(reach + MAX_DRAFTS):].clone(), reach

    def reset(self) -> None:
        """Forgets everything."""
        self.ids = self.inputs = None

    def crop(self, tokens: int) -> None:
        """Takes the last `-tokens` tokens back. Above 0, which transformers 5.16 knows: `tokens` are left."""
        if self.ids is None:
            return
        held = self.ids.shape[1]
        left = max(held + tokens, 0) if tokens <= 0 else min(tokens, held)
        if self.inputs is not None:
            count = held - left
            if self.inputs.shape[1] - count < min(self.reach, left):
                raise ValueError(f"engram_kernels: the cache is cropped by {count} tokens, but the memory's convolution can go "
                                 f"back by {self.inputs.shape[1] - self.reach}; expected at most {MAX_DRAFTS}")
            self.inputs = self.inputs[:, :self.inputs.shape[1] - count]
        self.ids = self.ids[:, :left]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b becomes what `beam_idx[b]` was."""
        if self.ids is not None:
            self.ids = self.ids[beam_idx.to(self.ids.device)]
        if self.inputs is not None:
            self.inputs = self.inputs[beam_idx.to(self.inputs.device)]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Sequence b becomes what `indices[b]` was; there may be fewer."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times, one behind the other."""
        if self.ids is not None:
            self.ids = self.ids.repeat_interleave(repeats, dim=0)
        if self.inputs is not None:
            self.inputs = self.inputs.repeat_interleave(repeats, dim=0)

    def get_max_length(self) -> int:
        """-1: there is none."""
        return -1

    def offload(self) -> None:
        """Does nothing: ids and inputs are small."""

    def prefetch(self) -> None:
        """Does nothing, as `offload`."""


def state_of(cache: Any, layer: int, num_layers: int) -> LayerState:
    """The memory's state for a decoder layer of `cache`, which it is put into where the cache has none yet.

    Args:
        cache: what the decoder layer is called with.
        layer: its number.
        num_layers: how many the decoder has: a cache that makes its layers as they come is given these first.

    Raises:
        TypeError: the cache is no DynamicCache.
        ValueError: the cache holds tokens that the memory has not seen.
    """
    state = next((x for x in cache.layers if isinstance(x, LayerState) and x.layer == layer), None)
    if state is None:
        if type(cache) is not cache_utils.DynamicCache:
            raise TypeError(f"engram_kernels: cache is a {type(cache).__name__}, expected a DynamicCache: the memory's state "
                            "follows no other")
        while len(cache.layers) < num_layers and cache.layer_class_to_replicate is not None:
            cache.layers.append(cache.layer_class_to_replicate())
        state = LayerState(layer)
        cache.layers.append(state)
    seen = 0 if state.ids is None else state.ids.shape[1]
    # layers of linear attention count no tokens; those before this one have this call's already
    held = next((x.get_seq_length() for x in cache.layers[layer:num_layers] if hasattr(x, "get_seq_length")), seen)
    if held != seen:
        raise ValueError(f"engram_kernels: layer {layer} of the cache holds {held} tokens, of which the memory has seen {seen}: "
                         "fill a cache with the model that has the memory, and change it with methods of the cache only")
    return state
