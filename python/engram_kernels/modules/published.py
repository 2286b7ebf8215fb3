"""The tensors of published checkpoints by the names that `Engram` has for its parameters."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram_kernels._checks import FLOAT_DTYPES

if TYPE_CHECKING:
    from engram_kernels.modules.memory_module import MemoryModule

ROUNDINGS = ("once", "published")
# one parameter, which the published model has under both names
WORD_EMBEDDINGS = ("embed_tokens.weight", "ngram_embeddings.word_embeddings.weight")
SCALE_NAMES = ("scale", "weight_scale_inv", "weight_scale")
_SCALE_DTYPES = (torch.float8_e8m0fnu, torch.uint8, *FLOAT_DTYPES)


@torch.no_grad()
def assign_published(module: MemoryModule, weights: Mapping[str, Tensor], prefix: str,
                     block: Sequence[int] | None = None) -> None:
    """Copies published tensors into the parameters of a module, all of them or none. Arguments and errors: `load_published`.

    Args:
        block: rows and columns that share a scale in most quantized weights, where the configuration says so.
    """
    found = published_tensors(module, weights, prefix, block)
    for name, value in found.items():
        target = module.get_parameter(name)
        if target.shape != value.shape:
            raise ValueError(f"{module.op}: {name} has shape {list(target.shape)}, the published one {list(value.shape)}")
        if value.dtype not in (*FLOAT_DTYPES, torch.float64):
            raise ValueError(f"{module.op}: the published {name} is {value.dtype}, expected a float tensor")
    for name, value in found.items():
        module.get_parameter(name).copy_(value)


def published_tensors(module: Any, weights: Mapping[str, Tensor], prefix: str,
                      block: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Name of a parameter of `module` -> its value. Arguments and errors: `assign_published`."""
    def get(name: str) -> Tensor:
        if not name.endswith(".weight"):
            return weights[prefix + name]
        return dequantized(module.op, weights, prefix + name.removesuffix(".weight"), block)

    if module.spec.variant == "longcat":
        return _longcat_tensors(module, get, weights, prefix)
    each = range(module.branches)
    if module.spec.variant == "deepseek_v41":
        return {"wkv.weight": get("wkv.weight"), "w_hidden": get("q_weight"), "w_key": get("k_weight")}
    if module.spec.variant == "qwen4_ple":
        shape = module.w_key.shape
        return {"wkv.weight": torch.cat([get("key_proj.weight"), get("value_proj.weight")]),
                "w_key": get("norm_key.weight").view(shape), "w_hidden": get("norm_query.weight").view(shape),
                "conv_norm": get("norm_conv.weight").view(shape), "conv_weight": get("conv1d.weight").view_as(module.conv_weight)}
    projections = [f"key_projs.{m}" for m in each] + ["value_proj"]
    return {"wkv.weight": torch.cat([get(f"{p}.weight") for p in projections]),
            "wkv.bias": torch.cat([get(f"{p}.bias") for p in projections]),
            "w_key": torch.stack([get(f"norm1.{m}.weight") for m in each]),
            "w_hidden": torch.stack([get(f"norm2.{m}.weight") for m in each]),
            "conv_weight": get("short_conv.conv.weight").view_as(module.conv_weight),
            "conv_norm": torch.stack([get(f"short_conv.norms.{m}.weight") for m in each])}


def _longcat_tensors(module: Any, get: Callable[[str], Tensor], weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    pieces = [get(f"ngram_embeddings.post_projs.{i}.weight") for i in range(module.spec.num_columns)]
    found = {"post_proj.weight": torch.cat(pieces, dim=1)}
    if module.word_embeddings is not None:
        found["word_embeddings.weight"] = get(next((n for n in WORD_EMBEDDINGS if prefix + n in weights), WORD_EMBEDDINGS[0]))
    return found


def dequantized(op: str, weights: Mapping[str, Tensor], name: str, block: Sequence[int] | None = None) -> Tensor:
    """weights[name.weight], times its scales where it is fp8: one for the tensor, one per row, or one per block.

    The last block of a row or a column may be partial; which elements share a scale: `scale_block`.

    Raises:
        KeyError: a tensor is missing.
        ValueError: the weight is neither a float nor fp8, or the scales are no scales of it.
    """
    weight = weights[f"{name}.weight"]
    if weight.dtype in (*FLOAT_DTYPES, torch.float64):
        return weight
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{op}: the published {name}.weight is {weight.dtype}, expected a float tensor or float8_e4m3fn: this "
                         "quantization is not known here")
    key = next((k for k in (f"{name}.{s}" for s in SCALE_NAMES) if k in weights), None)
    if key is None:
        raise KeyError(f"{op}: {name}.weight is float8_e4m3fn, but there is neither {name}.scale nor {name}.weight_scale_inv nor "
                       f"{name}.weight_scale")
    scale = weights[key]
    if scale.dtype not in _SCALE_DTYPES:
        raise ValueError(f"{op}: {key} is {scale.dtype}, expected {', '.join(str(d) for d in _SCALE_DTYPES)}")
    scale = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
    sizes = scale_block(list(weight.shape), list(scale.shape), block)
    if sizes is None:
        raise ValueError(f"{op}: {key} has shape {list(scale.shape)}, which does not divide {list(weight.shape)} into blocks")
    if sizes == tuple(weight.shape):
        return weight.float().mul_(scale.view(()))
    rows, columns = sizes
    scale = scale.view(scale.shape[0], -1)
    result = weight.float()
    for i in range(scale.shape[0]):  # a row of blocks at a time: no second copy of the whole weight
        factors = scale[i].repeat_interleave(columns)[:weight.shape[1]]
        result[i * rows:(i + 1) * rows].mul_(factors)
    return result


def scale_block(weight: Sequence[int], scale: Sequence[int], block: Sequence[int] | None = None) -> tuple[int, int] | None:
    """Rows and columns of a quantized weight that share a scale; None: scales of this shape are none of it.

    Args:
        weight: its shape.
        scale: that of its scales: one for all, one per row, groups of a row, or square blocks, the last of which are partial.
        block: what the configuration says; what gives another number of scales is passed over.
    """
    if len(weight) != 2 or 0 in (*weight, *scale) or len(scale) > 2:
        return None
    rows, columns = weight
    if math.prod(scale) == 1:
        return rows, columns
    down, across = scale if len(scale) == 2 else (scale[0], 1)
    sizes = [(block[0], block[1])] if block is not None else []
    sizes += [(2**e, 2**e) for e in range(31)] + [(1, -(-columns // across))]
    if rows * across == columns * down and rows % down == 0:
        sizes.append((rows // down, rows // down))
    return next((size for size in sizes if all(size) and (-(-rows // size[0]), -(-columns // size[1])) == (down, across)), None)
