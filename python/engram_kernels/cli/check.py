"""`engram-kernels check`: what memory a checkpoint has, whether its parts agree, and a fingerprint of its rows."""
from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_kernels.cli.options import HelpFormatter

if TYPE_CHECKING:
    from engram_kernels.modules.published_model import PublishedLayer, PublishedModel

SAMPLE = "The quick brown fox jumps over the lazy dog, and the quick brown fox jumps again."
_COLUMNS = 100


def add_arguments(commands: Any) -> None:
    """Adds the command to the parser of `engram-kernels`."""
    check = commands.add_parser("check", help="say what memory a checkpoint has, and whether its parts agree",
                                formatter_class=HelpFormatter)
    check.add_argument("folder", type=Path, help="a model's folder, its index, or a safetensors file beside a config.json")
    check.add_argument("--text", default=SAMPLE, help="whose rows are the fingerprint; default: a sentence")
    check.add_argument("--json", action="store_true", help="print it as JSON")
    check.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints what was found; 0 where everything agrees, else 1."""
    from engram_kernels.modules.published_model import PublishedModel
    try:
        model = PublishedModel(args.folder)
    except (ValueError, OSError, ImportError) as err:
        found: dict[str, Any] = {"folder": str(args.folder), "ok": False, "problems": [_sentence(str(err))], "layers": []}
    else:
        found = inspect(model, args.text)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for line in lines(found):
            print(textwrap.fill(line, _COLUMNS, subsequent_indent="    ", break_on_hyphens=False))
    return 0 if found["ok"] else 1


def inspect(model: PublishedModel, text: str) -> dict[str, Any]:
    """Everything that the command says of a model, as plain values."""
    spec = model.spec
    layers = [model.layer(layer_id) for layer_id in spec.layer_ids]
    for layer in layers:
        if not layer.problems:
            try:
                model.open_table(layer, {})  # which looks at all parts of rows and scales
            except (ValueError, OSError) as err:
                layer.problems.append(str(err))
    problems = [_sentence(p) for p in (*model.problems, *(p for layer in layers for p in layer.problems))]
    found: dict[str, Any] = {
        "folder": str(model.source), "ok": not problems, "family": model.family_name, "title": model.family.title,
        "spec": {"hash_family": spec.hash_family, "vocab_size": spec.vocab_size, "num_classes": spec.num_classes,
                 "max_order": spec.max_order, "heads": spec.heads, "row_dim": spec.row_dim, "hidden_size": spec.hidden_size,
                 "branches": spec.branches, "layer_ids": list(spec.layer_ids)},
        "tokenizer": None if model.token_map is None else {
            "vocab_size": model.token_map.vocab_size, "num_classes": model.token_map.num_classes,
            "fingerprint": model.token_map.fingerprint},
        "layers": [_layer(model, layer) for layer in layers], "problems": list(dict.fromkeys(problems))}
    if not problems:
        found["fingerprint"] = fingerprint(model, layers, text)
    return found


def _layer(model: PublishedModel, layer: PublishedLayer) -> dict[str, Any]:
    files = {path for name in (*layer.tables, *layer.scales, *layer.table_scales) if name in model.checkpoint
             for path in model.checkpoint.paths(name)}
    return {"layer_id": layer.layer_id, "prefix": layer.prefix, "rows": layer.num_rows, "row_format": layer.row_format,
            "bytes": layer.num_bytes, "parts": len(layer.tables), "tables": list(layer.tables[:1]),
            "scales": list(layer.scales[:1]), "files": len(files), "unused": list(layer.unused)}


def fingerprint(model: PublishedModel, layers: list[PublishedLayer], text: str) -> dict[str, Any]:
    """Row ids of a text and a checksum of the rows that they name, for two machines to compare.

    The text counts as token ids: by the folder's tokenizer.json where it and the package tokenizers are there, else its UTF-8
    bytes modulo the vocabulary.
    """
    import hashlib

    import torch

    from engram_kernels.ops.ngram_hash import ngram_hash
    ids, how = _token_ids(model, text)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    token_ids = torch.tensor(ids, dtype=torch.int32)
    row_ids = ngram_hash(token_ids, cu_seqlens, model.spec.layout(), model.token_map, dead_mask=model.spec.dead_mask(token_ids))
    by_layer = []
    for number, layer in enumerate(layers):
        of_layer = row_ids[number].contiguous()
        _, table = model.open_table(layer, {})
        rows, scales = table.read_rows(of_layer)
        digest = hashlib.sha256(rows.view(torch.uint8).numpy().tobytes())
        if scales is not None:
            digest.update(scales.contiguous().view(torch.uint8).numpy().tobytes())
        by_layer.append({"layer_id": layer.layer_id, "row_ids_of_last_token": of_layer[-1, :4].tolist(),
                         "row_ids_sha256": hashlib.sha256(of_layer.numpy().tobytes()).hexdigest(),
                         "rows_sha256": digest.hexdigest()})
    return {"tokens": len(ids), "token_ids": how, "layers": by_layer}


def _token_ids(model: PublishedModel, text: str) -> tuple[list[int], str]:
    if model.tokenizer is not None:
        try:
            from tokenizers import Tokenizer
            ids = Tokenizer.from_file(str(model.tokenizer)).encode(text).ids
        except ImportError:
            ids = []
        if ids:
            return [int(i) for i in ids], "tokenizer.json"
    return [byte % model.spec.vocab_size for byte in text.encode()] or [0], "bytes of the text"


def _sentence(problem: str) -> str:
    problem = problem.strip("'").removeprefix("RowTable.open: ").removeprefix("EngramSpec: ")
    return problem[:1].upper() + problem[1:] + ("" if problem.endswith(".") else ".")


def lines(found: dict[str, Any]) -> list[str]:
    """What was found, a line for each matter."""
    if "spec" not in found:
        return [f"{found['folder']}: not a checkpoint that can be read here.", *(f"problem: {p}" for p in found["problems"])]
    spec, tokenizer = found["spec"], found["tokenizer"]
    classes = "" if spec["num_classes"] is None else f" in {spec['num_classes']:,} classes"
    out = [f"{found['folder']}: {found['title']}",
           f"hash: {spec['hash_family']}, orders 2..{spec['max_order']}, {spec['heads']} heads, {spec['vocab_size']:,} token ids"
           f"{classes}; hidden size {spec['hidden_size']}, {spec['branches']} branches"]
    if tokenizer is not None:
        out.append(f"tokenizer: {tokenizer['vocab_size']:,} token ids in {tokenizer['num_classes']:,} classes, "
                   f"sha256 {tokenizer['fingerprint'][:16]}")
    for layer in found["layers"]:
        if not layer["tables"]:
            continue
        size = layer["bytes"]
        amount = f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size:,} bytes"
        out.append(f"layer {layer['layer_id']}: {layer['rows']:,} rows as {layer['row_format'] or 'an unknown format'}, {amount} "
                   f"in {layer['parts']} part{'s' if layer['parts'] > 1 else ''} and {layer['files']} "
                   f"file{'s' if layer['files'] > 1 else ''}, from {layer['tables'][0]}")
        if layer["unused"]:
            out.append(f"not used: {', '.join(layer['unused'][:4])}{', ..' if layer['unused'][4:] else ''}")
    if "fingerprint" in found:
        mark = found["fingerprint"]
        out.append(f"fingerprint of a text of {mark['tokens']} tokens ({mark['token_ids']}):")
        out += [f"layer {x['layer_id']}: row ids {x['row_ids_sha256'][:16]}, rows {x['rows_sha256'][:16]}, the last token's "
                f"first row ids {x['row_ids_of_last_token']}" for x in mark["layers"]]
    out += [f"problem: {p}" for p in found["problems"]]
    out.append("verdict: everything agrees." if found["ok"] else f"verdict: {len(found['problems'])} "
               f"disagreement{'s' if len(found['problems']) > 1 else ''}.")
    return out
