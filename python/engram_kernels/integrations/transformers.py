"""Hugging Face transformers models with a memory of this library: `attach` to a model, `load` from a saved folder."""
from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from engram_kernels.integrations.qwen4_exp import Qwen4ExpMemory
from engram_kernels.modules.memory_module import MemoryModule
from engram_kernels.modules.published_model import PublishedModel
from engram_kernels.row_format import FLOAT_FORMATS
from engram_kernels.spec import EngramSpec
from engram_kernels.table.row_table import RowTable
from engram_kernels.token_map import TokenMap

Tables = RowTable | Mapping[int, RowTable] | Sequence[RowTable] | str | os.PathLike[str] | None
_CONFIG_FIELD = "engram_kernels"  # of a model's configuration: what `load` needs to know to attach again
_PUBLISHED_ROWS = r"ple\.ple_embedding\.ngram_embedding\."


def attach(model: Any, *, table: Tables = None, spec: EngramSpec | None = None, layers: Sequence[int] | None = None,
           token_map: TokenMap | None = None, rounding: str = "once", backend: str = "auto") -> Any:
    """Gives a transformers model a memory of this library, in place.

    Without `spec` the model is a Qwen4Exp one: each of its PLE layers is replaced. Parameters keep their names; the rows leave
    the model, and `table` takes their place. With `spec` the model is any decoder, such as ``LlamaForCausalLM``: a new memory
    layer is put in front of `layers`. It becomes the decoder layer's child `memory`, with the dtype and device of the layer,
    and the model's configuration names it, so that `load` finds it again.

    The state of the sequences lies in the cache of the call, never in the model: it is reordered, cropped and reset with the
    cache, and generations may take turns.

    Args:
        model: a transformers model, with or without a head.
        table: rows of the memory layers, in any format and tier: one table for one layer, a sequence in the order of the
            layers, or a mapping from the decoder layer's number (from zero). For Qwen4Exp also the folder of a checkpoint, whose
            parts are found by name and opened in place: bfloat16, fp8 or NVFP4. None: the rows are a parameter and trained; those
            of Qwen4Exp are the model's own, others are drawn with the configuration's `initializer_range`.
        spec: what memory to add. Its `hidden_size` and `branches` give way to the model's hidden size and 1.
        layers: the decoder layers in front of which the memory runs, one for each of ``spec.layer_ids``, from zero; None: these.
        token_map: compression of token ids, with `spec` only.
        rounding: "once" or "published", as of `Engram`.
        backend: of every op.

    Returns:
        `model`.

    Raises:
        ImportError: transformers is not installed.
        TypeError: `model` is no transformers model, or a table no RowTable.
        ValueError: there is no PLE layer and no `spec`, a memory is attached already, a layer or its table is missing or does
            not fit, a folder is no checkpoint of this model, or the model cannot hand token ids to its layers.
        OSError: a file of the folder cannot be read.

    Source: docs/transformers.md; huggingface/transformers `models/qwen4_exp/modular_qwen4_exp.py`.
    """
    transformers = _imported()
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(f"attach: model is a {type(model).__name__}, expected a transformers PreTrainedModel")
    if any(isinstance(module, MemoryModule) for module in model.modules()):
        raise ValueError("attach: the model has a memory of this library already")
    if spec is None:
        for name, given in (("layers", layers), ("token_map", token_map)):
            if given is not None:
                raise ValueError(f"attach: {name} is given without spec")
        _replace_ple(model, table, rounding, backend)
    else:
        _add_memory(model, table, spec, layers, token_map, rounding, backend)
    return model


def load(model_class: type, folder: str | os.PathLike[str], *, table: Tables = None, token_map: TokenMap | None = None,
         rounding: str = "once", backend: str = "auto", **kwargs: Any) -> Any:
    """``model_class.from_pretrained(folder)`` with the memory attached before a weight is read.

    So rows that lie in `table` are neither allocated nor read: a Qwen4Exp checkpoint takes memory without its n-gram table. A
    model with a memory that `attach` added is read as ``save_pretrained`` wrote it.

    Args:
        model_class: such as ``Qwen4ExpForCausalLM`` or ``LlamaForCausalLM``; no Auto class.
        folder: what ``from_pretrained`` takes.
        table, token_map, rounding, backend: as of `attach`.
        kwargs: of ``from_pretrained``.

    Returns:
        The model, of class `model_class`.

    Raises:
        ImportError, TypeError, ValueError: as of `attach`.
        OSError: the folder cannot be read.
    """
    transformers = _imported()
    table = _opened(table)  # while no weight is on the meta device
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise TypeError(f"load: model_class is {model_class!r}, expected a class of models, such as LlamaForCausalLM")
    bases: Any = model_class

    class Attached(bases):
        def __init__(self, config: Any, *args: Any, **more: Any):
            super().__init__(config, *args, **more)
            added = getattr(config, _CONFIG_FIELD, None)
            memory = {} if added is None else {"spec": EngramSpec.from_json(json.dumps(added["spec"])),
                                               "layers": added["layers"], "token_map": token_map}
            attach(self, table=table, rounding=rounding, backend=backend, **memory)

    if table is not None:
        Attached._keys_to_ignore_on_load_unexpected = [*(bases._keys_to_ignore_on_load_unexpected or ()), _PUBLISHED_ROWS]
    Attached.__name__, Attached.__qualname__ = model_class.__name__, model_class.__qualname__
    model = Attached.from_pretrained(folder, **kwargs)
    model.__class__ = model_class
    return model


def _imported() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("engram_kernels.integrations.transformers needs the package transformers (5.16 or newer for "
                          "Qwen4Exp), which is not installed or cannot be imported here") from error
    return transformers


def _replace_ple(model: Any, table: Tables, rounding: str, backend: str) -> None:
    found = {module.ple.layer_idx: module for module in model.modules()
             if type(getattr(module, "ple", None)).__name__ == "Qwen4ExpTextPLELayer"}
    if not found:
        raise ValueError(f"attach: {type(model).__name__} has no PLE layer to replace; spec= says what memory to add to it")
    spec = EngramSpec.from_hf_config(model.config.get_text_config())
    table = _opened(table)
    if isinstance(table, _FolderTables) and (differs := _difference(table.spec, spec)):
        raise ValueError(f"attach: {table.folder} holds the table of another model: {differs}")
    tables = _table_of_each(table, sorted(found))
    made = {layer: Qwen4ExpMemory(module.ple, spec, tables[layer], rounding, backend) for layer, module in found.items()}
    for layer, module in found.items():
        module.ple = made[layer].train(module.ple.training)


class _FolderTables(dict[int, RowTable]):
    """The tables of a checkpoint by decoder layer, and whose they are."""

    def __init__(self, folder: str | os.PathLike[str]):
        model = PublishedModel(folder)
        super().__init__((layer, model.open_layer("attach", layer, {})[2]) for layer in model.spec.layer_ids)
        self.folder, self.spec = folder, model.spec


def _opened(table: Tables) -> Any:
    return _FolderTables(table) if isinstance(table, str | os.PathLike) else table


def _difference(theirs: EngramSpec, ours: EngramSpec) -> str:
    """What makes the row ids of two models differ; "": nothing does."""
    for name in ("hash_family", "vocab_size", "max_order", "heads", "head_dim", "layer_ids", "eos_token_id", "seed",
                 "table_sizes"):
        a, b = getattr(theirs, name), getattr(ours, name)
        if a != b:
            return f"its {name} is {a!r}, the model's {b!r}"
    return ""


def _add_memory(model: Any, table: Tables, spec: EngramSpec, layers: Sequence[int] | None, token_map: TokenMap | None,
                rounding: str, backend: str) -> None:
    from engram_kernels.integrations.decoder import DecoderMemory, hook_model  # needs transformers

    if isinstance(table, str | os.PathLike):
        raise TypeError(f"attach: table is the path {os.fspath(table)!r}, expected with spec a RowTable: RowTable.open(path)")
    if not isinstance(spec, EngramSpec):
        raise TypeError(f"attach: spec is a {type(spec).__name__}, expected an EngramSpec")
    config, decoder = model.config.get_text_config(), _decoder_of(model)
    numbers = list(spec.layer_ids if layers is None else layers)
    if len(numbers) != len(spec.layer_ids) or len(set(numbers)) != len(numbers):
        raise ValueError(f"attach: layers is {numbers}, expected one decoder layer for each of the spec's {list(spec.layer_ids)}")
    for number in numbers:
        if not 0 <= number < len(decoder.layers):
            raise ValueError(f"attach: layers has {number}, expected a decoder layer in [0, {len(decoder.layers)})")
    tables = _table_of_each(table, numbers)
    made = {}
    for number, layer_id in zip(numbers, spec.layer_ids, strict=True):
        like = next(decoder.layers[number].parameters())
        rows = tables[number] or _drawn_rows(spec, layer_id, like, getattr(config, "initializer_range", 0.02))
        made[number] = DecoderMemory(spec, layer_id, config.hidden_size, 1, table=rows, token_map=token_map, dtype=like.dtype,
                                     device=like.device, rounding=rounding, layer=number, backend=backend)
    hook_model(decoder, decoder.layers)
    for number, memory in made.items():
        decoder.layers[number].memory = memory.train(model.training)
    setattr(model.config, _CONFIG_FIELD, {"spec": json.loads(spec.to_json()), "layers": numbers})


def _decoder_of(model: Any) -> Any:
    """The module that embeds token ids and runs `layers`, a ModuleList."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ValueError(f"attach: {type(model).__name__} has no decoder with layers to put a memory in front of")
    return decoder


def _table_of_each(table: Tables, layers: Sequence[int]) -> dict[int, RowTable | None]:
    """Decoder layer -> its table."""
    if table is None:
        return dict.fromkeys(layers)
    if isinstance(table, Mapping):
        if set(table) != set(layers):
            raise ValueError(f"attach: table has the layers {sorted(table)}, expected {sorted(layers)}, counted from zero")
        return dict(table)
    tables: list[Any] = [table] if isinstance(table, RowTable) or not isinstance(table, Sequence) else list(table)
    if len(tables) != len(layers):
        raise ValueError(f"attach: table has {len(tables)} table(s), expected one for each of the layers {list(layers)}")
    return dict(zip(layers, tables, strict=True))


def _drawn_rows(spec: EngramSpec, layer_id: int, like: torch.Tensor, deviation: float) -> RowTable:
    num_rows = spec.layout().of_layer(layer_id).num_rows[0]
    rows = nn.Parameter(torch.empty(num_rows, spec.row_dim, dtype=like.dtype, device=like.device).normal_(std=deviation))
    row_format = next(name for name, dtype in FLOAT_FORMATS.items() if dtype == like.dtype)
    return RowTable.from_tensor(rows, row_format=row_format)
