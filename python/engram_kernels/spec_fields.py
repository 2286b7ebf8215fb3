"""Checks of the fields of an `EngramSpec`. Each error names the field, its value and what was expected."""
from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

from engram_kernels._files import shorten

if TYPE_CHECKING:
    from engram_kernels.spec import EngramSpec

INT32_MAX = 2**31 - 1


def check_hash_fields(spec: EngramSpec) -> None:
    """Checks the fields of a spec that its layout derives from; ValueError names the first that is wrong."""
    check_int(spec, "vocab_size", 1, INT32_MAX)
    check_int(spec, "num_classes", 1, spec.vocab_size, none=True)
    check_int(spec, "max_order", 2, 8)
    check_int(spec, "heads", 1, 1024)
    check_int(spec, "seed", 0, 2**62)
    check_ints(spec, "layer_ids", 0, 100_000)
    require(spec, "layer_ids", len(set(spec.layer_ids)) == len(spec.layer_ids) > 0, "distinct layers, at least one")
    check_ints(spec, "table_sizes", 1, INT32_MAX)
    require(spec, "table_sizes", len(spec.table_sizes) == spec.max_order - 1,
            f"{spec.max_order - 1} sizes, for orders 2..{spec.max_order}")
    check_int(spec, "pad_token_id", 0, spec.vocab_size - 1)
    if spec.num_classes is None:
        require(spec, "pad_class", spec.pad_class is None, "None where num_classes is None")
    else:
        check_int(spec, "pad_class", 0, spec.num_classes - 1)
    check_ints(spec, "ignored_token_ids", 0, INT32_MAX)
    require(spec, "zero_is_dead", not spec.zero_is_dead or spec.hash_family == "polynomial",
             "False, but with hash_family 'polynomial'")
    check_int(spec, "eos_token_id", 0, spec.vocab_size - 1, none=spec.boundary != "eos_reset")
    if spec.eos_token_id is not None:
        require(spec, "eos_token_id", spec.boundary != "pad", "None with boundary 'pad', where EOS means nothing")
        require(spec, "num_classes", spec.num_classes is None, "None where EOS counts: it is found among raw ids")


def require(spec: EngramSpec, field: str, holds: bool, expected: str) -> None:
    """Raises ValueError with the field's name, its value and what was expected, unless `holds`."""
    if not holds:
        raise ValueError(f"EngramSpec: {field} is {shorten(repr(getattr(spec, field)))}, expected {expected}")


def check_int(spec: EngramSpec, field: str, low: int, high: int, none: bool = False) -> None:
    """Checks that the field is an integer in [low, high] (with `none`: or None), and stores it as a plain int."""
    value = getattr(spec, field)
    if none and value is None:
        return
    number = as_int(value)
    require(spec, field, number is not None and low <= number <= high,
            f"an integer in [{low}, {high}]" + (" or None" if none else ""))
    object.__setattr__(spec, field, number)


def check_ints(spec: EngramSpec, field: str, low: int, high: int) -> None:
    """Checks that the field is a tuple or list of integers in [low, high], and stores it as a tuple of plain ints."""
    value = getattr(spec, field)
    numbers = [as_int(v) for v in value] if isinstance(value, tuple | list) else [None]
    require(spec, field, all(n is not None and low <= n <= high for n in numbers), f"integers in [{low}, {high}]")
    object.__setattr__(spec, field, tuple(numbers))


def check_float(spec: EngramSpec, field: str) -> None:
    """Checks that the field is a finite number >= 0, and stores it as a float."""
    value = getattr(spec, field)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    require(spec, field, is_number and math.isfinite(value) and value >= 0, "a finite number >= 0")
    object.__setattr__(spec, field, float(value))


def as_int(value: Any) -> int | None:
    """`value` as an int (numpy's integers too); None for anything else, bools included."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
