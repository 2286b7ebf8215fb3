"""What `budget` is called with, before anything is computed: each value of its kind, or an error that names it."""
from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from engram_kernels._files import shorten


def whole_number(name: str, value: Any) -> int | None:
    """An integer of at least 1, NumPy's among them; None stays.

    Raises:
        ValueError: it is something else; names it, and 1 where that is the nearest.
    """
    if value is None:
        return None
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < 1:
        nearest = "; nearest: 1" if found is not None else ""
        raise ValueError(f"budget: {name} is {shorten(repr(value))}, expected an integer of at least 1{nearest}")
    return found


def integers(name: str, values: Any) -> tuple[int, ...] | None:
    """Several integers; None stays.

    Raises:
        ValueError: it is no sequence, or holds something else; names it.
    """
    if values is None:
        return None
    try:
        parts = [] if isinstance(values, str | bytes) else list(values)
        found = tuple(operator.index(one) for one in parts if not isinstance(one, bool))
    except TypeError:
        parts, found = [values], ()
    if isinstance(values, str | bytes) or len(found) != len(parts):
        raise ValueError(f"budget: {name} is {shorten(repr(values))}, expected integers, such as (2, 3)")
    return found


def share(name: str, value: Any) -> float:
    """A number in 0..1.

    Raises:
        ValueError: it is something else; names it and the nearest.
    """
    number = _real(value)
    if number is None:
        raise ValueError(f"budget: {name} is {shorten(repr(value))}, expected a share in 0..1, such as 0.75")
    if not 0 <= number <= 1:  # nan, too
        nearest = "1" if number > 1 else "0" if number < 0 else "0.75"
        raise ValueError(f"budget: {name} is {number:g}, expected a share in 0..1; nearest: {nearest}")
    return number


def shares(name: str, values: Any) -> list[float]:
    """One share or several.

    Raises:
        ValueError: there is none, or one of them is no number in 0..1.
    """
    parts = [values] if isinstance(values, str | bytes) or not isinstance(values, Iterable) else list(values)
    if not parts:
        raise ValueError(f"budget: no {name} is given, expected at least one in 0..1; nearest: 0.75")
    return [share(name, one) for one in parts]


def real(name: str, value: Any) -> float | None:
    """A number; None stays.

    Raises:
        ValueError: it is something else, such as the text "26.7B"; names it.
    """
    if value is None:
        return None
    if (number := _real(value)) is None:
        raise ValueError(f"budget: {name} is {shorten(repr(value))}, expected a number, such as 26.7e9")
    return number


def _real(value: Any) -> float | None:
    """None: it is no number."""
    if isinstance(value, str | bytes | bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else -float("inf")
    except (TypeError, ValueError):
        return None
