"""How published checkpoints name the tensors of a memory layer, and what shapes they have."""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable

from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.spec import EngramSpec
from engram_kernels.table.safetensors_file import Extent

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of checkpoints. Names are those below the layer's prefix; {} stands for the number of a part."""

    title: str
    tables: tuple[str, ...]
    scales: tuple[str, ...]
    shapes: Callable[[EngramSpec], Shapes]  # of the tensors that become parameters
    constants: dict[str, str]  # tensors of the hash, and the attribute of `Layout` that they must equal
    own: str = ""  # what the memory's own names begin with, below the prefix
    has_layers: bool = True  # the prefix names a decoder layer
    may_be_bare: bool = False  # or there is no prefix: the state dict of one module
    needs_constants: bool = False
    padding: int = 0  # rows that may follow the last one
    ignored: tuple[str, ...] = ()  # names that hold nothing that is needed here
    table_scales: tuple[str, ...] = ()  # of formats that have a scale of the whole table beside those of the rows


def _v41(spec: EngramSpec) -> Shapes:
    m, h = spec.branches, spec.hidden_size
    return {"wkv.weight": ((m + 1) * h, spec.num_columns * spec.row_dim), "q_weight": (m, h), "k_weight": (m, h)}


def _qwen(spec: EngramSpec) -> Shapes:
    m, h, width = spec.branches, spec.hidden_size, spec.num_columns * spec.row_dim
    norms = {f"norm_{name}.weight": (m * h,) for name in ("key", "query", "conv")}
    return {"key_proj.weight": (m * h, width), "value_proj.weight": (h, width), **norms,
            "conv1d.weight": (m * h, 1, spec.conv_width or 0)}


def _demo(spec: EngramSpec) -> Shapes:
    m, h, width = spec.branches, spec.hidden_size, spec.num_columns * spec.row_dim
    names = [f"key_projs.{i}" for i in range(m)] + ["value_proj"]
    found: Shapes = {f"{name}.weight": (h, width) for name in names} | {f"{name}.bias": (h,) for name in names}
    for i in range(m):
        found |= {f"norm1.{i}.weight": (h,), f"norm2.{i}.weight": (h,), f"short_conv.norms.{i}.weight": (h,)}
    return found | {"short_conv.conv.weight": (m * h, 1, spec.conv_width or 0)}


def _longcat(spec: EngramSpec) -> Shapes:
    piece = (spec.hidden_size, spec.row_dim)
    pieces: Shapes = {f"ngram_embeddings.post_projs.{i}.weight": piece for i in range(spec.num_columns)}
    return pieces | {"embed_tokens.weight": (-1, spec.hidden_size)}  # as many words as there are


_NGRAMS = "ple_embedding.ngram_embedding"
FAMILIES = {
    "deepseek_v41": Family("DeepSeek-V4.1 Engram", ("embed.weight",),
                           ("embed.scale", "embed.weight_scale_inv", "embed.weight_scale"), _v41, {}),
    "qwen4_ple": Family("Qwen4Exp PLE", (f"{_NGRAMS}.shard_{{}}.weight", f"{_NGRAMS}.weight"),
                        (f"{_NGRAMS}.weight_scale", f"{_NGRAMS}.shard_{{}}.weight_scale"), _qwen,
                        {"ple_embedding.layer_multipliers": "multipliers", "ple_embedding.ngram_heads_vocab_sizes": "moduli",
                         "ple_embedding.ngram_heads_offsets": "offsets"}, needs_constants=True, padding=128,
                        table_scales=(f"{_NGRAMS}.weight_scale_2", f"{_NGRAMS}.shard_{{}}.weight_scale_2")),
    "demo_v1": Family("Engram demo", ("multi_head_embedding.embedding.weight",), (), _demo,
                      {"multi_head_embedding.offsets": "offsets"}, may_be_bare=True),
    "longcat": Family("LongCat n-gram embedding", ("ngram_embeddings.embedders.{}.weight",),
                      ("ngram_embeddings.embedders.{}.weight_scale",), _longcat, {}, own="ngram_embeddings.", has_layers=False,
                      ignored=("ngram_embeddings.word_embeddings.weight",)),
}


def find_prefixes(names: Iterable[str], family: Family, layer_id: int) -> dict[str, str]:
    """What the names of a layer begin with -> the pattern of its table: every place where rows of the family are."""
    found: dict[str, str] = {}
    patterns = [(table, re.compile("(.*?)" + re.escape(table).replace(r"\{\}", "[0-9]+"))) for table in family.tables]
    for name in names:
        for table, pattern in patterns:
            if (match := pattern.fullmatch(name)) and (not match[1] or match[1].endswith(".")):
                found.setdefault(match[1], table)
    numbered = {prefix: table for prefix, table in found.items() if re.search(rf"(^|\.)layers\.{layer_id}\.", prefix)}
    if numbered or not family.has_layers:
        return numbered or found
    return {"": found[""]} if family.may_be_bare and "" in found else {}


def parts_of(names: Iterable[str], pattern: str) -> dict[int, str]:
    """The names that a pattern with {} stands for, by number; without {}: the one name as part 0."""
    if "{}" not in pattern:
        return {0: pattern} if pattern in names else {}
    expression = re.compile(re.escape(pattern).replace(r"\{\}", "([0-9]{1,6})"))
    return dict(sorted((int(m[1]), name) for name in names if (m := expression.fullmatch(name))))


def format_of_rows(rows: Extent, scale: Extent | None, row_dim: int) -> str | None:
    """The row format of a part of a table and its scales, by dtypes and widths; None: none that is known here.

    Args:
        rows: a part, [R, width].
        scale: its scales, or those of the whole table; None: there are none.
        row_dim: D.
    """
    width, kind = rows.shape[1], rows.dtype
    if scale is None:
        name = {"F32": "f32", "BF16": "bf16", "F16": "f16"}.get(kind) if width == row_dim else None
    else:
        per_row = scale.shape[1] if len(scale.shape) == 2 else 1
        of_table = len(scale.shape) < 2 and all(n == 1 for n in scale.shape)
        blocks = row_dim // per_row if per_row and row_dim % per_row == 0 else 0
        by_blocks = {(True, "F8_E4M3", 32): "fp8_e4m3_block32", (True, "U8", 32): "fp8_e4m3_block32",
                     (True, "I8", 32): "int8_group32", (False, "U8", 16): "nvfp4", (False, "U8", 32): "mxfp4"}
        name = by_blocks.get((width == row_dim, kind, blocks)) if width in (row_dim, row_dim // 2) else None
        if scale.dtype not in {"nvfp4": ("F8_E4M3", "U8"), "mxfp4": ("F8_E8M0", "U8")}.get(str(name), (scale.dtype,)):
            name = None  # four bits with the other format's kind of scale
        if width == row_dim and kind in ("F8_E4M3", "U8") and scale.dtype in ("F32", "BF16", "F16"):
            name = "fp8_e4m3_tensor" if of_table else "fp8_e4m3_row" if per_row == 1 else None
    return name if name in ROW_FORMATS else None
