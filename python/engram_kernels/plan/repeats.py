"""How often rows repeat: within a batch (unique ratio), and from batch to batch (hit rate of a row cache)."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram_kernels._names import KINDS, PHASES
from engram_kernels._terminal import no_progress
from engram_kernels.plan.quantity import Quantity, assumed, derived, given, interpolate, measured
from engram_kernels.spec import EngramSpec

CACHE_BATCH = 256
SLOT_BYTES = 25  # of a cache's directory, beside the row: RowCacheDirectory::kBytesPerSlot
_PAGE = "docs/dedup_and_cache.md"

# what bench/dedup_and_cache.py counted on real text and writes beside its page: layer 1 of DeepSeek-V4.1, 200,000 tokens
# per kind
_COUNTS = json.loads((Path(__file__).parents[1] / "data" / "repeats.json").read_text())
UNIQUE_PREFILL, UNIQUE_DECODE, HIT_RATES = (
    {kind: {int(size): ratio for size, ratio in curve.items()} for kind, curve in _COUNTS[name].items()}
    for name in ("unique_prefill", "unique_decode", "hit_rates"))
SEQUENCES = tuple(UNIQUE_DECODE[KINDS[0]])
BATCHES, SLOTS = tuple(UNIQUE_PREFILL[KINDS[0]]), tuple(HIT_RATES[KINDS[0]])


@dataclasses.dataclass(frozen=True)
class Repeats:
    """What a workload's repeats save.

    Attributes:
        unique: (tokens in a batch, distinct rows over rows asked for).
        hits: (rows in the cache, hits over distinct rows asked for).
        unique_factor, hit_factor: both are this many times the curves', at most 1.
    """
    unique: tuple[tuple[float, Quantity], ...]
    hits: tuple[tuple[float, Quantity], ...]
    unique_factor: float = 1.0
    hit_factor: float = 1.0

    def unique_ratio(self, tokens: float) -> Quantity:
        """Distinct rows over rows asked for in a batch of so many tokens."""
        ratio = interpolate(self.unique, max(tokens, 1.0), "batches of {:,.0f} tokens")
        return derived("1", lambda r: min(r * self.unique_factor, 1.0), ratio)

    def hit_rate(self, rows: float) -> Quantity:
        """Share of the distinct rows that a cache of so many rows holds."""
        if rows < 1:
            return given(0, "1", "a cache of no rows")
        rate = interpolate(self.hits, rows, "a cache of {:,.0f} rows")
        return derived("1", lambda r: min(r * self.hit_factor, 1.0), rate)


def published_repeats(spec: EngramSpec, kind: str, phase: str) -> Repeats:
    """Repeats of a kind of text, from docs/dedup_and_cache.md: measured on the hash of DeepSeek-V4.1, assumed for others.

    Raises:
        ValueError: no such kind or phase.
    """
    if kind not in KINDS:
        raise ValueError(f"plan: kind of text is {kind!r}, expected {', '.join(KINDS)}")
    if phase not in PHASES:
        raise ValueError(f"plan: phase is {phase!r}, expected {', '.join(PHASES)}")
    same_hash = _hash_of(spec) == _hash_of(EngramSpec.deepseek_v41())
    quantity = measured if same_hash else assumed
    source = f"{_PAGE}, {kind}, {phase}" + ("" if same_hash else ", of DeepSeek-V4.1's hash")
    ratios = UNIQUE_PREFILL[kind] if phase == "prefill" else {1: 1.0} | UNIQUE_DECODE[kind]
    hits = f"{_PAGE}, {kind}, batches of {CACHE_BATCH}" + ("" if same_hash else ", of DeepSeek-V4.1's hash")
    return Repeats(tuple((float(t), quantity(r, "1", source)) for t, r in ratios.items()),
                   tuple((float(s), quantity(h, "1", hits)) for s, h in HIT_RATES[kind].items()))


def constant_repeats(unique_ratio: float | None, hit_rate: float | None, otherwise: Repeats) -> Repeats:
    """`otherwise` with the unique ratio or the hit rate that the command line gives, whatever the size.

    Raises:
        ValueError: one is not a ratio.
    """
    changes: dict[str, Any] = {}
    for field, name, value, low in (("unique", "unique ratio", unique_ratio, 1e-6), ("hits", "hit rate", hit_rate, 0.0)):
        if value is not None:
            if not low <= value <= 1:
                raise ValueError(f"plan: {name} is {value}, expected a number in [{low:g}, 1]")
            fixed = given(value, "1", "command line")
            changes[field] = ((1.0, fixed), (2.0**40, fixed))
    return dataclasses.replace(otherwise, **changes)


def zipf_repeats(spec: EngramSpec, exponent: float) -> Repeats:
    """Repeats of rows drawn independently, the k-th most frequent with probability proportional to ``k**-exponent``.

    Expected values: ``sum_k 1 - (1 - p_k)**n`` distinct of n draws; a cache holds the most frequent rows. Assumed, because
    no text is drawn so.

    Raises:
        ValueError: the exponent is not in (0, 4].
    """
    if not 0 < exponent <= 4:
        raise ValueError(f"plan: Zipf exponent is {exponent}, expected a number in (0, 4]")
    rows = max(spec.layout().num_rows) // spec.num_columns  # a column draws from the table of its own head
    edges = np.unique(np.round(np.geomspace(1, rows + 1, 4000)))
    weight = np.diff(edges)  # ranks that share a bin, each as likely as the mean of the first and the last; the first are alone
    probability = np.sqrt(edges[:-1] * (edges[1:] - 1)) ** -exponent
    probability /= (probability * weight).sum()
    source = f"rows drawn independently from Zipf's law, exponent {exponent:g}"

    def distinct(draws: float) -> float:
        return float((weight * -np.expm1(draws * np.log1p(-np.minimum(probability, 1 - 1e-12)))).sum())

    cumulative = np.cumsum(weight)
    # of the distinct rows of a batch, those among the most frequent
    in_batch = weight * -np.expm1(CACHE_BATCH * np.log1p(-np.minimum(probability, 1 - 1e-12)))
    shares = np.cumsum(in_batch) / in_batch.sum()
    return Repeats(
        tuple((float(t), assumed(min(distinct(t) / t, 1.0), "1", source)) for t in (*BATCHES, 2**20, 2**24)),
        tuple((float(s), assumed(float(np.interp(s / spec.num_columns, cumulative, shares)), "1", source)) for s in SLOTS))


def text_repeats(spec: EngramSpec, text: Path, phase: str) -> Repeats:
    """Repeats of a text, hashed with the spec's true layout; the spec's first layer stands for all.

    Raises:
        DemoError: the text or the tokenizer cannot be used.
        ValueError: no such phase.
    """
    from engram_kernels.demo.main import DemoOptions, tokenize
    from engram_kernels.ops.ngram_hash import ngram_hash
    if phase not in PHASES:
        raise ValueError(f"plan: phase is {phase!r}, expected {', '.join(PHASES)}")
    tokens, token_map, _ = tokenize(DemoOptions(text=text, spec=spec), no_progress)
    ids = ngram_hash(tokens, torch.tensor([0, tokens.numel()], dtype=torch.int32), spec.layout(), token_map)[0].numpy()
    rows = ids.astype(np.int64)
    count = unique_ratio if phase == "prefill" else unique_ratio_of_sequences
    source = f"{text.name}, {len(rows):,} tokens, {phase}"
    unique = tuple((float(b), measured(count(rows, b), "1", source)) for b in BATCHES if b <= max(len(rows) // 4, 1))
    return Repeats(unique, tuple((float(s), measured(h, "1", f"{source}, batches of {CACHE_BATCH}, cold"))
                                 for s, h in cache_hit_rates(rows, SLOTS).items()))


def unique_ratio(rows: np.ndarray, batch: int) -> float:
    """Distinct rows over rows asked for ([T, C]), in batches of consecutive tokens; what is over at the end is left out."""
    whole = len(rows) // batch * batch
    return sum(np.unique(rows[i:i + batch]).size for i in range(0, whole, batch)) / rows[:whole].size


def unique_ratio_of_sequences(rows: np.ndarray, sequences: int) -> float:
    """Unique ratio where a batch is one token of each of so many sequences: the text cut into equal parts, read in step."""
    length = len(rows) // sequences
    steps = rows[:length * sequences].reshape(sequences, length, -1)
    at = range(0, length, max(length // 2000, 1))
    return sum(np.unique(steps[:, i]).size for i in at) / (len(at) * sequences * rows.shape[1])


def cache_trace(rows: np.ndarray) -> np.ndarray:
    """The distinct rows of batch after batch, as a cache sees them."""
    return np.concatenate([np.unique(rows[i:i + CACHE_BATCH]) for i in range(0, len(rows), CACHE_BATCH)])


def cache_hit_rates(rows: np.ndarray, slots: tuple[int, ...]) -> dict[int, float]:
    """Cache size in rows -> hits over distinct rows asked for, from an empty cache; counted by the compiled module's own."""
    from engram_kernels import _C
    trace = cache_trace(rows)
    return {size: _C.RowCacheDirectory(size).replay(trace) / trace.size for size in slots}


def _hash_of(spec: EngramSpec) -> tuple[object, ...]:
    return (spec.hash_family, spec.boundary, spec.num_classes, spec.max_order, spec.heads, spec.table_sizes)
