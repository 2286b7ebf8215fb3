"""A number with where it comes from, and the words for it."""
from __future__ import annotations

import dataclasses
from typing import Any

GIVEN, COMPUTED, ELSEWHERE, ASSUMED = "given", "computed", "measured elsewhere", "assumed"


@dataclasses.dataclass(frozen=True)
class Number:
    """One number.

    Attributes:
        value: in `unit`.
        unit: "parameters", "flop", "B", "experts", "layers", "elements" or "1".
        provenance: "given" (config, spec or command line), "computed" from what is given, "measured elsewhere" (the paper), or
            "assumed" (a default).
        source: which field, which formula, which table.
        text: what it is instead of a number, such as layers 1,23; `value` is 0 then. None: it is a number.
    """
    value: float
    unit: str
    provenance: str
    source: str
    text: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The number as a JSON file has it, in the form that `engram-kernels plan` writes."""
        return {"value": self.value if self.text is None else self.text, "unit": self.unit, "provenance": self.provenance,
                "source": self.source}


def computed(value: float, unit: str, formula: str) -> Number:
    """What follows from the inputs by a formula."""
    return Number(value, unit, COMPUTED, formula)


def count_text(value: float) -> str:
    """A count with three or four digits: 26.70B, 32.8M, 5,120."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.2f}{letter}" if abs(scaled) < 100 else f"{scaled:.1f}{letter}"
    return f"{value:,.0f}"
