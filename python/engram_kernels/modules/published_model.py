"""A published model's folder: configuration, tokenizer, where the tensors of its memory lie, and what contradicts what."""
from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engram_kernels import presets
from engram_kernels._files import parse_json, shorten
from engram_kernels.modules.families import FAMILIES, Family, find_prefixes, format_of_rows, parts_of
from engram_kernels.modules.published import SCALE_NAMES, WORD_EMBEDDINGS, scale_block
from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.spec import EngramSpec
from engram_kernels.table.checkpoint import Checkpoint
from engram_kernels.table.row_table import RowTable
from engram_kernels.table.safetensors_file import Extent
from engram_kernels.token_map import TokenMap

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SCALES = ("F8_E8M0", "U8", "F32", "BF16", "F16")
_SHOWN = 4  # values of a tensor in a message
OF_FOLDER = "folder"


@dataclasses.dataclass
class PublishedLayer:
    """Where one memory layer lies in a checkpoint, and what contradicts its spec."""

    layer_id: int
    prefix: str = ""
    tables: tuple[str, ...] = ()  # in the order of their rows
    scales: tuple[str, ...] = ()
    table_scales: tuple[str, ...] = ()  # one value: that of each part, or of all
    row_format: str | None = None
    num_rows: int = 0
    num_bytes: int = 0  # of rows and scales
    used: set[str] = dataclasses.field(default_factory=set)
    unused: tuple[str, ...] = ()
    problems: list[str] = dataclasses.field(default_factory=list)


class PublishedModel:
    """What a folder says of its memory. Reads the configuration, the tokenizer and headers; no rows.

    Args:
        source: a folder, its index, or one safetensors file beside a config.json.
        ranks: the files of ranks in it, as `Checkpoint` takes them.
        token_map: "folder": made from the folder's tokenizer.json where the model compresses token ids; a TokenMap; or None:
            token ids are classes already.
        overrides: fields of the spec that replace what the configuration says.

    Raises:
        OSError: a file cannot be read.
        TypeError: `source` is no path.
        ValueError: there is no checkpoint, no configuration with a memory, or no tokenizer where one is needed.
    """

    def __init__(self, source: str | os.PathLike[str], token_map: TokenMap | str | None = OF_FOLDER,
                 ranks: str | Sequence[str] | None = None, **overrides: Any):
        if not isinstance(source, str | os.PathLike):
            raise TypeError(f"source is {shorten(repr(source))}, expected the path of a checkpoint's folder")
        self.source = Path(source)
        self.checkpoint = Checkpoint(source, ranks)
        self.problems: list[str] = []
        folder = self.checkpoint.folder
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json, which says what memory the model has")
        try:
            self.config: Any = parse_json((folder / "config.json").read_bytes())
        except ValueError as err:
            raise ValueError(f"{folder / 'config.json'} is not JSON: {shorten(str(err))}") from None
        self.family_name = presets.family_of(self.config)
        tokenizer = folder / "tokenizer.json"
        self.tokenizer = tokenizer if tokenizer.is_file() else None
        self.token_map = self._token_map_of(token_map, tokenizer)
        self.spec = self._spec_of(overrides)

    @property
    def family(self) -> Family:
        """How the checkpoint names its tensors."""
        return FAMILIES[self.family_name]

    @property
    def compresses(self) -> bool:
        """Whether the model hashes classes of token ids."""
        return self.family_name in ("deepseek_v41", "demo_v1")

    def _token_map_of(self, token_map: TokenMap | str | None, tokenizer: Path) -> TokenMap | None:
        if not self.compresses or token_map is None or isinstance(token_map, TokenMap):
            return token_map if self.compresses and isinstance(token_map, TokenMap) else None
        if token_map != OF_FOLDER:
            raise ValueError(f"token_map is {shorten(repr(token_map))}, expected 'folder', a TokenMap, or None")
        if self.tokenizer is None:
            raise ValueError(f"{tokenizer.parent} has no tokenizer.json, of which the classes of token ids are made: give a "
                             "token_map, or token_map=None where token ids are classes already")
        return TokenMap.from_tokenizer(tokenizer)

    def _spec_of(self, overrides: dict[str, Any]) -> EngramSpec:
        made = self.token_map
        if made is None:
            spec = EngramSpec.from_hf_config(self.config, **overrides)
            if self.tokenizer is not None and not self.compresses:
                self._check_raw_tokenizer(spec)
            return spec
        given: dict[str, Any] = {}
        if self.family_name == "demo_v1":  # its configuration names a tokenizer, and no count
            given = dict(num_classes=made.num_classes)
        draft = EngramSpec.from_hf_config(self.config, **dict(pad_class=0) | given | overrides)
        pad = made.class_of(draft.pad_token_id) if draft.pad_token_id < made.vocab_size else 0
        if (made.vocab_size, made.num_classes) != (draft.vocab_size, draft.num_classes):
            self.problems.append(f"the tokenizer has {made.vocab_size} token ids in {made.num_classes} classes, the "
                                 f"configuration says {draft.vocab_size} in {draft.num_classes}: with a tokenizer of another "
                                 "revision every row id is wrong")
            return draft
        return EngramSpec.from_hf_config(self.config, **dict(pad_class=pad) | given | overrides)

    def _check_raw_tokenizer(self, spec: EngramSpec) -> None:
        assert self.tokenizer is not None
        try:
            content: Any = parse_json(self.tokenizer.read_bytes())
            ids = [int(i) for i in content["model"]["vocab"].values()]
            ids += [int(token["id"]) for token in content.get("added_tokens", ())]
        except (ValueError, TypeError, KeyError, AttributeError) as err:
            self.problems.append(f"tokenizer.json is no tokenizer with a vocabulary: {shorten(str(err))}")
            return
        known = max(ids, default=-1) + 1
        if known > max((spec.vocab_size, *(i + 1 for i in spec.ignored_token_ids))):
            self.problems.append(f"the tokenizer has {known} token ids, the configuration says {spec.vocab_size}: it is that of "
                                 "another model")

    def layer(self, layer_id: int) -> PublishedLayer:
        """Looks a layer's tensors up and compares them with its spec. Everything that is wrong is in `problems`."""
        found = PublishedLayer(layer_id)
        prefixes = find_prefixes(self.checkpoint, self.family, layer_id)
        if len(prefixes) != 1:
            where = f"layers.{layer_id}." if self.family.has_layers else ""
            several = f"the rows of layer {layer_id} may be at {shorten(', '.join(prefixes))}: there are several"
            none = f"no tensor is called {where}..{self.family.tables[0]}: the rows of layer {layer_id} are missing"
            found.problems.append(several if prefixes else none)
            return found
        ((found.prefix, pattern),) = prefixes.items()
        self._find_rows(found, pattern)
        self._compare_constants(found)
        self._compare_shapes(found)
        own = found.prefix + self.family.own
        skipped = {found.prefix + name for name in self.family.ignored}
        found.unused = tuple(sorted(n for n in self.checkpoint if n.startswith(own) and n not in found.used | skipped))
        return found

    def _extent(self, found: PublishedLayer, name: str) -> Extent | None:
        """Where a tensor lies; a missing file or tensor becomes a problem."""
        found.used.add(name)
        try:
            return self.checkpoint.extent(name)
        except KeyError:
            found.problems.append(f"there is no tensor {name}")
        except (OSError, ValueError) as err:
            problem = str(err).removeprefix("RowTable.open: ")
            if problem not in found.problems:
                found.problems.append(problem)
        return None

    def _find_rows(self, found: PublishedLayer, pattern: str) -> None:
        parts = parts_of(self.checkpoint, found.prefix + pattern)
        expected = self.spec.num_columns if self.spec.variant == "longcat" else max(parts, default=0) + 1
        if gaps := [i for i in range(expected) if i not in parts]:
            found.problems.append(f"there is no tensor {found.prefix + pattern.format(gaps[0])}"
                                  + (f", and {len(gaps) - 1} more parts of {expected} are missing" if gaps[1:] else ""))
        if beyond := [name for i, name in parts.items() if i >= expected]:
            found.problems.append(f"{beyond[0]} is one part more than the {expected} of the configuration")
        found.tables = tuple(name for i, name in parts.items() if i < expected)
        if None in [self._extent(found, name) for name in found.tables] or not found.tables:
            return
        if self.checkpoint.ranks and len(found.tables) > 1:
            found.problems.append(f"{found.tables[0]} is one of {len(found.tables)} parts, in the files of "
                                  f"{len(self.checkpoint.ranks)} ranks: parts by name and parts by rank cannot be put in order")
            return
        rows = [(name, extent) for name in found.tables for _, extent in self.checkpoint.parts(name)]
        if len(self.checkpoint.ranks) not in (0, len(rows)):
            found.problems.append(f"{found.tables[0]} is in {len(rows)} of {len(self.checkpoint.ranks)} ranks: rows are missing")
            return
        if flat := next((f"{name} has shape {list(e.shape)}" for name, e in rows if len(e.shape) != 2), None):
            found.problems.append(f"{flat}, expected [rows, width]")
            return
        first = rows[0][1]
        if wrong := next((f"{name} has shape {list(e.shape)} of {e.dtype}, {rows[0][0]} has {list(first.shape)} of {first.dtype}"
                          for name, e in rows if (e.dtype, e.shape[1]) != (first.dtype, first.shape[1])), None):
            found.problems.append(f"{wrong}: parts of one table have one width and one dtype")
            return
        found.num_rows = sum(e.shape[0] for _, e in rows)
        found.num_bytes = sum(e.num_bytes for _, e in rows)
        self._find_scales(found, first)
        if not gaps:
            self._compare_rows(found, rows)

    def _first_of(self, found: PublishedLayer, patterns: tuple[str, ...]) -> tuple[tuple[str, ...], Extent | None]:
        """The parts of the first of these patterns that there are, which count as used, and what the first part is.

        A pattern with a part number has as many parts as the table.
        """
        pattern = next((found.prefix + name for name in patterns if parts_of(self.checkpoint, found.prefix + name)), None)
        if pattern is None:
            return (), None
        names = tuple(pattern.format(i) for i in range(len(found.tables) if "{}" in pattern else 1))
        extents = [self._extent(found, name) for name in names]
        if None in extents:
            return names, None
        found.num_bytes += sum(e.num_bytes for name in names for _, e in self.checkpoint.parts(name))
        return names, extents[0]

    def _find_scales(self, found: PublishedLayer, first: Extent) -> None:
        found.scales, scale = self._first_of(found, self.family.scales)
        if found.scales and scale is None:
            return
        biases = found.tables[0].removesuffix("weight") + "biases"
        what = "no scales" if scale is None else f"scales of {scale.dtype} {list(scale.shape)}"
        if biases in self.checkpoint:
            what = f"{biases}, as MLX's affine integers have them"
        found.row_format = format_of_rows(first, scale, self.spec.row_dim)
        if found.row_format is None:
            found.problems.append(f"{found.tables[0]} is {first.dtype} {list(first.shape)} with {what}: no row format here reads "
                                  f"that as rows of {self.spec.row_dim}")
        elif self.states_format and found.row_format != self.spec.row_format:
            found.problems.append(f"{found.tables[0]} holds rows of {found.row_format}, the configuration says "
                                  f"{self.spec.row_format}")
        elif ROW_FORMATS[found.row_format].has_table_scale:
            found.table_scales, _ = self._first_of(found, self.family.table_scales)
            if not found.table_scales:
                names = " nor ".join(found.prefix + name.format("..") for name in self.family.table_scales)
                found.problems.append(f"{found.tables[0]} holds rows of {found.row_format}, but there is no scale of the whole "
                                      f"table{': neither ' + names if names else ''}")

    @property
    def states_format(self) -> bool:
        """Whether the configuration says how rows are stored."""
        text = self.config.get("text_config") or self.config
        return self.family_name == "qwen4_ple" and text.get("ple_embedding_dtype") is not None

    def _compare_rows(self, found: PublishedLayer, rows: list[tuple[str, Extent]]) -> None:
        layout = self.spec.layout().of_layer(found.layer_id)
        if self.spec.variant == "longcat":
            for (name, extent), wanted in zip(rows, layout.moduli[0].tolist(), strict=True):
                if extent.shape[0] != wanted:
                    found.problems.append(f"{name} has {extent.shape[0]} rows, the configuration gives {wanted}")
            return
        each = rows[0][1].shape[0]
        if uneven := next((f"{name} has {e.shape[0]} rows" for name, e in rows[1:-1] if e.shape[0] != each), None):
            found.problems.append(f"{uneven}, {rows[0][0]} has {each}: parts of one table have equally many rows, but for the "
                                  "last")
            return
        wanted, ranks = layout.num_rows[0], len(self.checkpoint.ranks)  # which have equally many rows each
        if not wanted <= found.num_rows <= wanted + max(self.family.padding, ranks - 1):
            found.problems.append(f"the table of layer {found.layer_id}, {found.tables[0]}, has {found.num_rows} rows, the "
                                  f"configuration gives {wanted}")

    def _compare_constants(self, found: PublishedLayer) -> None:
        layout = self.spec.layout().of_layer(found.layer_id)
        for name, attribute in self.family.constants.items():
            full = found.prefix + name
            if full not in self.checkpoint and not self.family.needs_constants:
                continue
            if self._extent(found, full) is None:
                continue
            wanted, got = getattr(layout, attribute)[0].tolist(), self.checkpoint[full].flatten().tolist()
            if len(got) != len(wanted):
                found.problems.append(f"{full} has {len(got)} values, the configuration gives {len(wanted)}")
            elif got != wanted:
                at = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b))
                found.problems.append(f"{full} is {_shown(got, at)}, the configuration gives {_shown(wanted, at)}: "
                                      "every row id would name another row")

    def _compare_shapes(self, found: PublishedLayer) -> None:
        for name, shape in self.family.shapes(self.spec).items():
            full = found.prefix + name
            if name == WORD_EMBEDDINGS[0] and full not in self.checkpoint:
                full = found.prefix + WORD_EMBEDDINGS[1]
                if full not in self.checkpoint:
                    found.problems.append(f"there is neither {found.prefix + name} nor {full}")
                    continue
            extent = self._extent(found, full)
            if extent is None:
                continue
            if len(extent.shape) != len(shape) or any(w not in (-1, got) for got, w in zip(extent.shape, shape, strict=True)):
                ranks = len(self.checkpoint.paths(full)) if self.checkpoint.ranks else 0
                found.problems.append(f"{full} has shape {list(extent.shape)}" + (f" in each of {ranks} ranks" if ranks else "")
                                      + f", expected {[w for w in shape if w >= 0]}"
                                      + (" in its last dimensions" if -1 in shape else "")
                                      + (": only rows of the table may be split, since engines order the parts of other weights "
                                         "in ways of their own" if ranks else ""))
            elif name == WORD_EMBEDDINGS[0] and extent.shape[0] < self.spec.vocab_size:
                found.problems.append(f"{full} has {extent.shape[0]} rows, the configuration says {self.spec.vocab_size} ids")
            elif extent.dtype != "F8_E4M3" and extent.dtype not in _FLOATS:
                found.problems.append(f"{full} is {extent.dtype}, expected a float or F8_E4M3: this quantization is not "
                                      "known here")
            else:
                self._compare_scales(found, full, extent)

    def _compare_scales(self, found: PublishedLayer, full: str, weight: Extent) -> None:
        """The scales of a weight: it has them where it is quantized, and nowhere else."""
        base = full.removesuffix(".weight")
        names = [f"{base}.{s}" for s in SCALE_NAMES]
        scales = [name for name in names if full.endswith(".weight") and name in self.checkpoint]
        if weight.dtype != "F8_E4M3":
            if scales:
                found.problems.append(f"{full} is {weight.dtype}, but there is {scales[0]}: whether it is multiplied already "
                                      "is not said")
            return
        if len(scales) != 1:
            found.problems.append(f"{full} is F8_E4M3, but there is neither {' nor '.join(names)}" if not scales else
                                  f"{full} has scales of two names, {scales[0]} and {scales[1]}")
            return
        scale = self._extent(found, scales[0])
        if scale is None:
            return
        if scale.dtype not in _SCALES:
            found.problems.append(f"{scales[0]} is {scale.dtype}, expected one of {', '.join(_SCALES)}")
        elif scale_block(weight.shape, scale.shape, self.weight_block) is None:
            found.problems.append(f"{scales[0]} has shape {list(scale.shape)}, which does not divide {list(weight.shape)} into "
                                  "blocks")

    def open_layer(self, op: str, layer: int | None,
                   table_options: Mapping[str, Any]) -> tuple[PublishedLayer, EngramSpec, RowTable]:
        """Where a layer lies, its spec with the row format that is stored, and its table. ValueError says what is wrong first."""
        if layer is None and len(self.spec.layer_ids) == 1:
            layer = self.spec.layer_ids[0]
        if type(layer) is not int or layer not in self.spec.layer_ids:
            raise ValueError(f"{op}: layer is {layer!r}, expected one of {list(self.spec.layer_ids)}")
        found = self.layer(layer)
        if problems := self.problems + found.problems:
            more = f"; `engram-kernels check {self.source}` shows {len(problems) - 1} more" if problems[1:] else ""
            raise ValueError(f"{op}: {self.source}: {problems[0]}{more}")
        return found, *self.open_table(found, table_options)

    def open_table(self, found: PublishedLayer, table_options: Mapping[str, Any]) -> tuple[EngramSpec, RowTable]:
        """The spec with the row format that is stored, and the table, of a layer without problems."""
        assert found.row_format is not None
        spec = dataclasses.replace(self.spec, row_format=found.row_format)
        if found.table_scales:
            table_options = {"table_scale": _one_or_many(found.table_scales), **table_options}
        return spec, RowTable.open(self.checkpoint.ranks or self.source, _one_or_many(found.tables), _one_or_many(found.scales),
                                   found.row_format, row_dim=spec.row_dim, **table_options)

    def module_options(self, found: PublishedLayer) -> dict[str, Any]:
        """What the constructor of the module takes beside spec, layer and table."""
        if self.spec.variant != "longcat":
            return {} if self.token_map is None else {"token_map": self.token_map}
        words = next(n for n in WORD_EMBEDDINGS if found.prefix + n in self.checkpoint)
        return {"num_embeddings": self.checkpoint.extent(found.prefix + words).shape[0]}

    def stored_dtype(self, found: PublishedLayer) -> torch.dtype:
        """The dtype of the first parameter that is stored as floats; bfloat16 where none is."""
        kinds = [self.checkpoint.extent(n).dtype for n in sorted(found.used - {*found.tables, *found.scales, *found.table_scales})
                 if n in self.checkpoint]
        return next((_FLOATS[kind] for kind in kinds if kind in ("BF16", "F16", "F32")), torch.bfloat16)

    @property
    def weight_block(self) -> list[int] | None:
        """Rows and columns that share a scale in a quantized weight, where the configuration says so."""
        quantization = self.config.get("quantization_config")
        block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
        is_pair = isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
        return block if is_pair else None


def _one_or_many(names: tuple[str, ...]) -> Any:
    return None if not names else names[0] if len(names) == 1 else list(names)


def _shown(values: list[Any], at: int) -> str:
    """A few values around the first that differs."""
    shown = ", ".join(map(str, values[at:at + _SHOWN]))
    return f"[{'.., ' if at else ''}{shown}{', ..' if len(values) > at + _SHOWN else ''}]"
