"""Layout: the constants of a spec's n-gram hash (moduli, row offsets, multipliers), derived, never stored."""
from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from engram_kernels import _modes
from engram_kernels.presets import LAYER_SEED_STEP

if TYPE_CHECKING:
    from engram_kernels.spec import EngramSpec

_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1
_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, the step of splitmix64
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # decide primality of every n < 3.3e24


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """What `ngram_hash` needs to know of a spec. L layers, C = (max_order-1)*heads columns, N = max_order.

    ``row = (XOR or sum over s < order of id[t-s] * multipliers[s]) mod moduli[c] + offsets[c]``; column c is
    ``(order-2)*heads + head``. A position is blocked when it lies before the sequence, is dead, or is a lookback
    (s >= 1) equal to ``eos_id``; everything older is blocked too. Blocked positions count as ``boundary_id``.

    Tensors are int64, contiguous, and shared by all users of one spec: do not write into them.

    Attributes:
        moduli: [L, C] rows of each head's table.
        offsets: [L, C] first row of each head in its layer's joint table: exclusive prefix sums of `moduli`.
        reciprocals: [L, C] floor((2**64 - 1) / modulus), the bits of an unsigned number: the kernels divide by them.
        multipliers: [L, N] for the xor families; [L, C, N] for the polynomial one, 0 for s past the column's order.
        num_rows: rows of each layer's joint table; below 2**31, so that row ids fit int32.
        layer_ids: decoder layer of each table, zero based.
        max_order: N.
        heads: hash functions of one order.
        num_ids: canonical ids are in [0, num_ids).
        boundary_id: id that a blocked position counts as: pad (`pad`), EOS (`eos_reset`) or 0 (`stop`: no term).
        eos_id: canonical EOS that blocks a lookback, or -1: EOS means nothing.
        pad_token_id: raw token id of the pad.
        pad_class: its class after compression; None where raw ids are hashed.
        spec: the descriptor that all of this comes from.
    """
    moduli: Tensor
    offsets: Tensor
    multipliers: Tensor
    reciprocals: Tensor
    num_rows: tuple[int, ...]
    layer_ids: tuple[int, ...]
    max_order: int
    heads: int
    num_ids: int
    boundary_id: int
    eos_id: int
    pad_token_id: int
    pad_class: int | None
    spec: EngramSpec

    @property
    def num_columns(self) -> int:
        """C, hash columns of a layer."""
        return (self.max_order - 1) * self.heads

    def to(self, device: torch.device | str) -> Layout:
        """The same layout with its tensors on `device`; itself when they are there already."""
        if _modes.is_on(self.moduli, device):
            return self
        return dataclasses.replace(self, moduli=self.moduli.to(device), offsets=self.offsets.to(device),
                                   multipliers=self.multipliers.to(device), reciprocals=self.reciprocals.to(device))

    def of_layer(self, layer_id: int) -> Layout:
        """The layout of one layer alone.

        Args:
            layer_id: one of `layer_ids`.

        Returns:
            A layout with L = 1, whose tensors are slices of these.

        Raises:
            ValueError: there is no such layer.
        """
        if layer_id not in self.layer_ids:
            raise ValueError(f"Layout: layer_id is {layer_id}, expected one of {list(self.layer_ids)}")
        i = self.layer_ids.index(layer_id)
        return dataclasses.replace(self, moduli=self.moduli[i:i + 1], offsets=self.offsets[i:i + 1],
                                   multipliers=self.multipliers[i:i + 1], reciprocals=self.reciprocals[i:i + 1],
                                   num_rows=self.num_rows[i:i + 1], layer_ids=(layer_id,))


def derive_layout(spec: EngramSpec) -> Layout:
    """Derives moduli, offsets and multipliers; the same object for equal specs. Under 10 ms for DeepSeek-V4.1.

    Under FakeTensorMode a layout of fake tensors is returned, which is not kept.

    Args:
        spec: a validated descriptor.

    Returns:
        The layout, tensors on the CPU, whatever the default device.

    Raises:
        ValueError: a table has too many rows for int32 row ids, or the terms of a polynomial hash could overflow int64.

    Source: `xor_prime`: deepseek-ai/Engram `engram_demo_v1.py` (`NgramHashMapping`). `xor_prime_int32`: AI-Hypercomputer/maxtext
    `maxtext.layers.engram`, where the products and their remainder are int32. `xor_splitmix`:
    huggingface/transformers `models/qwen4_exp/modular_qwen4_exp.py` (`Qwen4ExpTextNGramEmbedding`). `polynomial`:
    LongCat-Flash-Lite `modeling_longcat_ngram.py` (`NgramEmbedding`).
    """
    return _layout_of(spec, _constants(spec)) if _modes.fake_mode() else _kept_layout(spec)


@functools.lru_cache(maxsize=64)
def _kept_layout(spec: EngramSpec) -> Layout:
    with _modes.plain_tensors():
        return _layout_of(spec, _constants(spec))


def _layout_of(spec: EngramSpec, constants: tuple[Any, Any, Any]) -> Layout:
    moduli, offsets, multipliers = (torch.tensor(x, dtype=torch.int64, device="cpu") for x in constants)
    return Layout(
        moduli=moduli, offsets=offsets, multipliers=multipliers, reciprocals=reciprocals_of(moduli),
        num_rows=tuple(sum(layer) for layer in constants[0]), layer_ids=spec.layer_ids, max_order=spec.max_order,
        heads=spec.heads, num_ids=spec.num_ids, boundary_id=spec.boundary_id, eos_id=spec.canonical_eos,
        pad_token_id=spec.pad_token_id, pad_class=spec.pad_class, spec=spec)


def reciprocals_of(moduli: Tensor) -> Tensor:
    """`Layout.reciprocals` of int64 moduli in [1, 2**31): floor((2**64 - 1) / modulus), which wraps for 1."""
    half = _INT64_MAX // moduli
    return 2 * half + (2 * (_INT64_MAX - half * moduli) + 1) // moduli


@functools.lru_cache(maxsize=64)
def _constants(spec: EngramSpec) -> tuple[Any, Any, Any]:
    """Moduli, offsets and multipliers as nested lists: what no mode of torch changes."""
    multipliers: list[Any]
    if spec.hash_family == "polynomial":
        moduli = _polynomial_moduli(spec)
        multipliers = _polynomial_multipliers(spec, moduli)
    else:
        moduli = _prime_moduli(spec)
        multipliers = _splitmix_multipliers(spec) if spec.hash_family == "xor_splitmix" else _pcg_multipliers(spec)
    for layer_id, rows in zip(spec.layer_ids, map(sum, moduli), strict=True):
        if rows > _INT32_MAX:
            raise ValueError(f"Layout: layer {layer_id} has {rows} rows, expected at most {_INT32_MAX}: row ids are "
                             f"int32 (table_sizes {spec.table_sizes}, {spec.heads} heads per order)")
    return moduli, [list(itertools.accumulate(layer[:-1], initial=0)) for layer in moduli], multipliers


def _prime_moduli(spec: EngramSpec) -> list[list[int]]:
    """[L][C] primes: the next one from each order's base size on that no earlier column of any layer took."""
    taken: set[int] = set()
    reached: dict[int, int] = {}  # base size -> all primes from there to here are taken, so the search resumes here
    layers = []
    for _ in spec.layer_ids:
        columns = []
        for base in spec.table_sizes:
            candidate = reached.get(base, base - 1)
            for _ in range(spec.heads):
                candidate += 1
                while candidate in taken or not is_prime(candidate):
                    candidate += 1
                taken.add(candidate)
                columns.append(candidate)
            reached[base] = candidate
        layers.append(columns)
    return layers


def _multiplier_bound(num_ids: int, largest: int = _INT64_MAX) -> int:
    """Exclusive bound of r so that id * (2r + 1) is at most `largest` for every id < num_ids."""
    return max(1, largest // num_ids // 2)


def _pcg_multipliers(spec: EngramSpec) -> list[list[int]]:
    """[L][N], from numpy's PCG64 seeded by the layer id. Drawn as int32 it gives other numbers than as int64."""
    is_int32 = spec.hash_family == "xor_prime_int32"
    bound = _multiplier_bound(spec.num_ids, _INT32_MAX if is_int32 else _INT64_MAX)
    layers = []
    for layer_id in spec.layer_ids:
        generator = np.random.default_rng(spec.seed + LAYER_SEED_STEP * layer_id)
        draws = generator.integers(0, bound, spec.max_order, dtype=np.int32 if is_int32 else np.int64)
        layers.append([2 * int(r) + 1 for r in draws])
    return layers


def _splitmix_multipliers(spec: EngramSpec) -> list[list[int]]:
    """[L][N], from splitmix64 seeded by the position of the layer in `layer_ids` (not by its id)."""
    bound = _multiplier_bound(spec.num_ids)
    return [[2 * (splitmix64(spec.seed + LAYER_SEED_STEP * index + _GOLDEN * (s + 1)) % bound) + 1
             for s in range(spec.max_order)] for index in range(len(spec.layer_ids))]


def _polynomial_moduli(spec: EngramSpec) -> list[list[int]]:
    """[L][C]: base size of the order + 2 * column + 1, the same for every layer; not prime."""
    columns = [base + 2 * (order * spec.heads + head) + 1
               for order, base in enumerate(spec.table_sizes) for head in range(spec.heads)]
    return [columns for _ in spec.layer_ids]


def _polynomial_multipliers(spec: EngramSpec, moduli: list[list[int]]) -> list[list[list[int]]]:
    """[L, C, N]: num_ids**s mod modulus, 0 for shifts that the column's order does not reach."""
    layers = []
    for layer in moduli:
        rows = []
        for column, modulus in enumerate(layer):
            order = column // spec.heads + 2
            row = [pow(spec.num_ids, s, modulus) if s < order else 0 for s in range(spec.max_order)]
            if (largest := sum(row) * (spec.num_ids - 1)) > _INT64_MAX:
                raise ValueError(f"Layout: column {column} (modulus {modulus}) can sum to {largest}, "
                                 f"expected at most {_INT64_MAX}: the polynomial hash would overflow int64")
            rows.append(row)
        layers.append(rows)
    return layers


def splitmix64(value: int) -> int:
    """The splitmix64 step of `value` (taken mod 2**64): a uint64 as an int.

    Source: Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
    """
    value = (value + _GOLDEN) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def is_prime(n: int) -> bool:
    """Whether n is prime; Miller-Rabin with fixed witnesses, exact for every n < 3.3e24.

    Source: Sorenson, Webster: Strong pseudoprimes to twelve prime bases, 2015.
    """
    if n < 2:
        return False
    for p in _WITNESSES:
        if n % p == 0:
            return n == p
    twos = ((n - 1) & (1 - n)).bit_length() - 1  # n - 1 = odd * 2**twos
    for a in _WITNESSES:
        x = pow(a, (n - 1) >> twos, n)
        if x not in (1, n - 1) and not any((x := x * x % n) == n - 1 for _ in range(twos - 1)):
            return False
    return True
