"""The memory of a budget before its tables have a size: layers, orders, heads, width, row format."""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from engram_kernels._files import shorten
from engram_kernels.allocation.moe_model import MoeModel
from engram_kernels.allocation.number import Number
from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.spec import EngramSpec


def memory_shape(model: MoeModel, layers: Sequence[int] | None, orders: Sequence[int] | None, heads: int | None,
                 head_dim: int | None, row_format: str | None, inputs: dict[str, Number]) -> EngramSpec:
    """The memory without its sizes: what is given, else the configuration's own memory, else the paper's; notes it in `inputs`.

    Raises:
        ValueError: a layer is not there, orders have a gap, or a field that a spec refuses; names the nearest that works.
    """
    own = model.memory

    def pick(name: str, value: Any, of_own: Any, default: Any, why: str) -> Any:
        provenance, source = ("given", f"--{name.replace(' ', '-')}") if value is not None else (
            ("given", "the configuration's memory") if own is not None else ("assumed", f"default: {why}"))
        chosen = value if value is not None else of_own if own is not None else default
        text = ",".join(map(str, chosen)) if isinstance(chosen, tuple) else chosen if isinstance(chosen, str) else None
        inputs[f"memory: {name}"] = Number(0.0 if text is not None else chosen, "1", provenance, source, text)
        return chosen

    half = max(model.num_layers // 2 - 1, 0)
    last = model.num_layers - 1
    layers = pick("layers", _layers(layers, last), own and own.layer_ids,
                  tuple(sorted({min(1, last), half})), "1 and half of the layers less 1, as in the paper's 27B")
    orders = pick("orders", _orders(orders), own and tuple(range(2, own.max_order + 1)), (2, 3), "the paper's")
    heads = pick("heads", heads, own and own.heads, 8, "the paper's")
    row_format = pick("row format", row_format, own and own.row_format, "bf16", "as the weights of most models")
    if not isinstance(row_format, str) or row_format not in ROW_FORMATS:
        raise ValueError(f"budget: row_format is {shorten(repr(row_format))}, expected one of {', '.join(ROW_FORMATS)}")
    step = max(ROW_FORMATS[row_format].multiple, 16)
    wide = -(-(model.hidden_size // 2) // (len(orders) * heads * step)) * step
    head_dim = pick("head dim", head_dim, own and own.head_dim, wide, "half of the hidden size over the columns, rounded up")
    changes: dict[str, Any] = dict(layer_ids=layers, max_order=orders[-1], heads=heads, head_dim=head_dim, row_format=row_format,
                                   table_sizes=(2,) * len(orders), row_stride_bytes=None)
    try:
        if own is not None:
            return dataclasses.replace(own, **changes)
        return EngramSpec(name=f"{model.name}_memory", hash_family="xor_prime", boundary="pad", vocab_size=model.vocab_size,
                          pad_token_id=model.pad_token_id, variant="deepseek_v41", hidden_size=model.hidden_size,
                          branches=model.branches, **changes)
    except ValueError as error:
        raise ValueError(f"budget: {str(error).removeprefix('EngramSpec: ')}") from None


def _layers(layers: Sequence[int] | None, last: int) -> tuple[int, ...] | None:
    if layers is None:
        return None
    for layer in layers:
        if not 0 <= layer <= last:
            raise ValueError(f"budget: layer {layer} is none of the model's, which are 0..{last}; nearest: "
                             f"{last if layer > last else 0}")
    found = tuple(sorted(set(layers)))
    if len(found) != len(layers) or not found:
        raise ValueError(f"budget: layers are {','.join(map(str, layers)) or 'none'}, expected each layer once and at least one; "
                         f"nearest: {','.join(map(str, found)) or min(1, last)}")
    return found


def _orders(orders: Sequence[int] | None) -> tuple[int, ...] | None:
    if orders is None:
        return None
    found = tuple(orders)
    longest = max(found, default=2)
    wanted = tuple(range(2, min(max(longest, 2), 8) + 1))
    if found != wanted:
        raise ValueError(f"budget: orders are {','.join(map(str, found)) or 'none'}, expected 2 up to at most 8 without a gap; "
                         f"nearest: {','.join(map(str, wanted))}")
    return found
