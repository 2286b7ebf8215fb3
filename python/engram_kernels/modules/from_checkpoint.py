"""A memory layer of whichever published model lies in a folder."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engram_kernels.modules.engram import Engram
from engram_kernels.modules.longcat import LongcatEmbedding
from engram_kernels.modules.published_model import OF_FOLDER, PublishedModel
from engram_kernels.token_map import TokenMap


def from_checkpoint(source: str | os.PathLike[str], layer: int | None = None, *, token_map: TokenMap | str | None = OF_FOLDER,
                    dtype: torch.dtype | None = None, device: torch.device | str | None = None, rounding: str = "once",
                    ranks: str | Sequence[str] | None = None, overrides: Mapping[str, Any] | None = None,
                    **table_options: Any) -> Engram | LongcatEmbedding:
    """The memory layer of a published model: an `Engram`, or a `LongcatEmbedding` where the folder is a LongCat model's.

    Args:
        source: the folder, its index, or one safetensors file beside a config.json.
        layer: a decoder layer with a memory, zero based; None: the only one.
        token_map: "folder": made from the folder's tokenizer.json where the model compresses token ids; a TokenMap; None: token
            ids are classes already.
        dtype: of the parameters; None: as they are stored, bfloat16 where they are quantized.
        device: of the parameters.
        rounding: "once" or "published", as the module takes it.
        ranks: the files of ranks in the folder, over which the rows are split: their name with one {} for the number, or a
            list of names; None: model{}-mpN.safetensors, as convert.py writes them, where the folder has such and no index.
        overrides: fields of the spec that replace what config.json says.
        table_options: of `RowTable.open`: queue_depth, cache_bytes, io, zero_scale_is_zero.

    Returns:
        The module. Its table is opened in place, and no row is read.

    Raises:
        OSError: a file cannot be read.
        ValueError: something is missing or contradicts the configuration; says what, with the numbers.

    Source: docs/models.md.
    """
    model = PublishedModel(source, token_map, ranks, **(overrides or {}))
    cls = LongcatEmbedding if model.spec.variant == "longcat" else Engram
    return cls.from_model(model, layer, dtype, device, rounding, table_options)
