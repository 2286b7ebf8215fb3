"""An Engram memory in front of decoder layers of any transformers model. `transformers.attach` puts it in place."""
from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from engram_kernels.integrations.cache_state import state_of
from engram_kernels.integrations.convolution_state import conv_reach, convolve_behind, packed_bounds
from engram_kernels.modules.engram import Engram

_ARGUMENT = "engram_kernels_tokens"  # the model hands it to its layers among its other keyword arguments
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


@dataclasses.dataclass
class Tokens:
    """Token ids [B, n] of a forward, which of them are padding, [B, n] bool, and how many layers the decoder has."""
    ids: Tensor
    dead: Tensor | None
    num_layers: int


class DecoderMemory(Engram):
    """`Engram` in front of a decoder layer: ``hidden + update``, in the shape of the layer's hidden states [B, n, H].

    Its state lies in the cache that the layer is called with. Arguments as of `Engram`, `layer` being the decoder layer's
    number and `backend` that of every op.
    """

    def __init__(self, *args: Any, layer: int, backend: str = "auto", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.layer, self.backend = layer, backend

    def add_to(self, hidden: Tensor, tokens: Tokens, cache: Any) -> Tensor:
        """[B, n, H], what the decoder layer is to see instead of `hidden`."""
        batch, length, size = hidden.shape
        state = None if cache is None else state_of(cache, self.layer, tokens.num_layers)
        streams = hidden.reshape(batch * length, 1, size)
        dead = None if tokens.dead is None else tokens.dead.flatten()
        gated = self.gated(streams, tokens.ids.flatten(), packed_bounds(batch, length, hidden.device), dead_mask=dead,
                           history=self._history(None if state is None else state.ids, tokens.ids), backend=self.backend)
        has_conv = self.spec.conv_width is not None
        past = None if state is None else state.inputs
        if state is not None:
            ids = tokens.ids.long() if tokens.dead is None else tokens.ids.long().masked_fill(tokens.dead, -2)
            inputs = gated.detach().unflatten(0, (batch, length)) if has_conv else None
            state.append(ids, inputs, conv_reach(self) if has_conv else 0)
        out = convolve_behind(self, gated, past, batch, dead, self.backend) if has_conv else gated
        return (out if self.spec.add_residual else streams + out).view(batch, length, size)

    def _history(self, seen: Tensor | None, ids: Tensor) -> Tensor | None:
        """[B, N-1], nearest first, -1 before a sequence's start."""
        if seen is None:
            return None
        reach = self.spec.max_order - 1
        history = seen[:, -reach:].flip(1).to(ids.dtype)
        return nn.functional.pad(history, (0, reach - history.shape[1]), value=-1).contiguous()


def hook_model(model: Any, layers: Any) -> None:
    """Lets `model` (the decoder without its head) hand token ids to `layers`, and each layer run its `memory` first."""
    for name, module in (("model", model), (f"layer {type(layers[0]).__name__}", layers[0])):
        kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            raise ValueError(f"attach: the forward of the {name} takes no **kwargs, by which token ids reach the layers")
    model.register_forward_pre_hook(_add_tokens, with_kwargs=True)
    for layer in layers:
        layer.register_forward_pre_hook(_run_memory, with_kwargs=True)


def _add_tokens(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    ids = given.get("input_ids")
    if ids is None:
        raise ValueError("engram_kernels: input_ids is None, but the memory hashes token ids; inputs_embeds are no substitute")
    packed = next((name for name in _PACKED if given.get(name) is not None), None)
    if packed is not None:
        raise ValueError(f"engram_kernels: {packed} is given, but sequences packed into one row are not supported; pad them")
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is None and isinstance(positions, Tensor) and positions.dim() == 2 and (positions.diff() != 1).any():
        raise ValueError("engram_kernels: position_ids start anew within a row, but sequences packed into one row are not "
                         "supported; pad them")
    return args, {**kwargs, _ARGUMENT: Tokens(ids, _dead_tokens(mask, ids), len(model.layers))}


def _dead_tokens(mask: Any, ids: Tensor) -> Tensor | None:
    """[B, n] bool, True = padding; None: there is none."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"engram_kernels: attention_mask is {shape}, expected [batch, tokens]: padding shows in no other (a "
                         "static cache makes other masks; use a DynamicCache)")
    if mask.shape[1] < ids.shape[1]:
        raise ValueError(f"engram_kernels: attention_mask has {mask.shape[1]} columns, expected at least {ids.shape[1]}")
    dead = mask[:, -ids.shape[1]:] == 0
    return dead if dead.device.type != "cpu" or torch.compiler.is_compiling() or dead.any() else None


def _run_memory(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs = dict(kwargs)
    tokens = kwargs.pop(_ARGUMENT, None)
    memory: Any = getattr(layer, "memory", None)
    if memory is None:
        return args, kwargs
    if tokens is None:
        raise ValueError(f"engram_kernels: layer {memory.layer} was called without its model, which hands it the token ids")
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    if args:
        return (memory.add_to(args[0], tokens, cache), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": memory.add_to(kwargs["hidden_states"], tokens, cache)}
