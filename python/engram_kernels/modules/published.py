"""The tensors of published checkpoints by the names that `Engram` has for its parameters."""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from engram_kernels.modules.engram import Engram


def published_tensors(module: Engram, weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Name of a parameter of `module` -> its value. Arguments and errors: `Engram.load_published`."""
    def get(name: str) -> Tensor:
        return weights[prefix + name]

    each = range(module.branches)
    if module.spec.variant == "deepseek_v41":
        return {"wkv.weight": _dequantized(weights, prefix + "wkv"), "w_hidden": get("q_weight"), "w_key": get("k_weight")}
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
