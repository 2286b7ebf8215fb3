"""The memory layers of a model, for what serves all of them at once."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from engram_kernels.spec import EngramSpec


def memory_modules(op: str, layers: nn.Module | Iterable[nn.Module] | EngramSpec) -> list[Any]:
    """The memory modules of a model, or those that are given: of one spec, each layer once.

    Args:
        op: who asks, for the messages.
        layers: a model, a list of memory modules, or a spec, which has none.

    Returns:
        Modules with `spec`, `layer_id`, `layout`, `table` and `token_map`, in the order of their layers.

    Raises:
        TypeError: something else is given.
        ValueError: there is none, two have one layer, or different specs.
    """
    if isinstance(layers, EngramSpec):
        return []
    found: list[Any]
    if isinstance(layers, nn.Module):
        found = [m for m in layers.modules() if _is_memory(m)]
    else:
        if not isinstance(layers, Iterable):
            raise TypeError(f"{op}: layers is a {type(layers).__name__}, expected a model or its memory modules")
        found = list(layers)
        for x in found:
            if not _is_memory(x):
                raise TypeError(f"{op}: layers has a {type(x).__name__}, expected memory modules such as Engram")
    if not found:
        raise ValueError(f"{op}: there is no memory module such as Engram in layers")
    for module in found:
        if module.spec != found[0].spec:
            raise ValueError(f"{op}: layers {found[0].layer_id} and {module.layer_id} have different specs, "
                             f"{found[0].spec.name} and {module.spec.name}; make one for each")
    ids = [m.layer_id for m in found]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{op}: layers have the ids {ids}, expected each once")
    return sorted(found, key=lambda m: m.spec.layer_ids.index(m.layer_id))


def layer_id_of(op: str, layer: nn.Module | int, ids: Sequence[int]) -> int:
    """The id of a layer that is given as a memory module or by its id.

    Raises:
        TypeError: it is neither.
        ValueError: it is none of `ids`.
    """
    if not (type(layer) is int or _is_memory(layer)):
        raise TypeError(f"{op}: layer is a {type(layer).__name__}, expected a memory module or its layer id")
    layer_id = layer if isinstance(layer, int) else layer.layer_id
    if layer_id not in ids:
        raise ValueError(f"{op}: layer is {layer_id!r}, expected one of {list(ids)}")
    return layer_id  # type: ignore[return-value]


def _is_memory(x: object) -> bool:
    """Whether `x` is a memory module: by its attributes, since the classes stand on a higher floor."""
    return isinstance(x, nn.Module) and isinstance(getattr(x, "spec", None), EngramSpec) and hasattr(x, "layer_id")
