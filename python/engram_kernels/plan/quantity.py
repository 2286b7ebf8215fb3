"""A number with its unit and where it comes from; what is computed from numbers comes from the weakest of them."""
from __future__ import annotations

import bisect
import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any


class Provenance(enum.IntEnum):
    """Where a number comes from, the strongest first."""
    GIVEN = 0  # by the spec or on the command line: an input, exact
    MEASURED = 1
    SIMULATED = 2
    ASSUMED = 3  # a default, a data sheet, somebody else's machine, or outside what was measured

    @property
    def word(self) -> str:
        """The name in tables and JSON."""
        return self.name.lower()


@dataclass(frozen=True)
class Quantity:
    """One number.

    Attributes:
        value: finite; in `unit`.
        unit: "s", "B", "B/s", "1/s", "tokens", "rows" or "1".
        provenance: where it comes from.
        source: what was measured, which data sheet, or whose default; of a derived number: that of its weakest input.
    """
    value: float
    unit: str
    provenance: Provenance
    source: str

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"Quantity: value is {self.value} {self.unit} ({self.source}), expected a finite number")
        if not self.source:
            raise ValueError(f"Quantity: {self.value} {self.unit} has no source")

    def scaled(self, factor: float) -> Quantity:
        """A quantity `factor` times as large, of the same source."""
        return replace(self, value=self.value * factor)

    def as_json(self) -> dict[str, Any]:
        """The quantity as a JSON file has it."""
        return {"value": self.value, "unit": self.unit, "provenance": self.provenance.word, "source": self.source}


def given(value: float, unit: str, source: str) -> Quantity:
    """An input that somebody chose."""
    return Quantity(float(value), unit, Provenance.GIVEN, source)


def measured(value: float, unit: str, source: str) -> Quantity:
    """What was measured."""
    return Quantity(float(value), unit, Provenance.MEASURED, source)


def assumed(value: float, unit: str, source: str) -> Quantity:
    """What was neither given nor measured here."""
    return Quantity(float(value), unit, Provenance.ASSUMED, source)


def derived(unit: str, formula: Callable[..., float], *inputs: Quantity) -> Quantity:
    """``formula`` of the values of the inputs, as weak as the weakest of them."""
    weakest = max(inputs, key=lambda q: q.provenance)
    return Quantity(float(formula(*(q.value for q in inputs))), unit, weakest.provenance, weakest.source)


def total(unit: str, parts: Sequence[Quantity]) -> Quantity:
    """The sum; of no parts: an exact 0."""
    return derived(unit, lambda *values: sum(values), *parts) if parts else given(0, unit, "nothing to add up")


@dataclass(frozen=True)
class Surface:
    """A rate measured at some row sizes and table sizes, interpolated in the logarithms between them.

    Outside the measured range the nearest point stands in, as an assumption.

    Attributes:
        points: (bytes per row, bytes of the table, rate), at least one.
    """
    points: tuple[tuple[float, float, Quantity], ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("Surface: no points, expected at least one")
        for row_bytes, table_bytes, rate in self.points:
            if row_bytes <= 0 or table_bytes <= 0 or rate.value <= 0:
                raise ValueError(f"Surface: {rate.value} {rate.unit} at rows of {row_bytes} and a table of {table_bytes} bytes, "
                                 "expected positive numbers")

    def at(self, row_bytes: float, table_bytes: float) -> Quantity:
        """The rate for such rows in such a table."""
        columns = []
        for size in sorted({table for _, table, _ in self.points}):
            columns.append((size, interpolate([(row, rate) for row, table, rate in self.points if table == size], row_bytes,
                                              "rows of {:,.0f} bytes")))
        return interpolate(columns, table_bytes, "a table of {:,.0f} bytes")

    def scaled(self, factor: float) -> Surface:
        """A surface whose rates are `factor` times as large."""
        return Surface(tuple((row, table, rate.scaled(factor)) for row, table, rate in self.points))


def interpolate(points: Sequence[tuple[float, Quantity]], at: float, what: str) -> Quantity:
    """The curve's value at `at`, linear in the logarithms; between two points it has both as its source.

    Args:
        points: (positive argument, positive value).
        at: positive.
        what: the argument in words, with a place for it, for the source of a value outside the range.
    """
    points = sorted(points, key=lambda p: p[0])
    arguments = [p[0] for p in points]
    right = bisect.bisect_left(arguments, at)
    if right < len(points) and arguments[right] == at:
        return points[right][1]
    if right in (0, len(points)):
        nearest, rate = points[min(right, len(points) - 1)]
        return replace(rate, provenance=Provenance.ASSUMED,
                       source=f"{rate.source}; measured with {what.format(nearest)}, not {what.format(at)}")
    (low, a), (high, b) = points[right - 1], points[right]
    share = math.log(at / low) / math.log(high / low)
    between = derived(a.unit, lambda x, y: x ** (1 - share) * y ** share, a, b)
    return between if a.source == b.source else replace(between, source=f"between {a.source} and {b.source}")
