"""Sums of float64 numbers that do not depend on how the numbers are split over threads or ranks."""
import math
from collections.abc import Iterable

PARTS = 4


def exact_parts(values: Iterable[float]) -> list[float]:
    """`PARTS` numbers whose exact sum is that of `values`, to some 200 bits: ``math.fsum`` of all ranks' parts rounds once."""
    rest, parts = list(values), []
    for _ in range(PARTS):
        parts.append(math.fsum(rest))
        if not math.isfinite(parts[-1]) or parts[-1] == 0:
            break
        rest.append(-parts[-1])
    return parts + [0.0] * (PARTS - len(parts))
