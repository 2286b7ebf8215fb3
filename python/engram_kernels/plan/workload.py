"""What is asked of the memory: rows, bytes and deadlines of one step."""
from __future__ import annotations

import dataclasses
import math

from engram_kernels.plan.quantity import Quantity, derived, given
from engram_kernels.plan.repeats import SLOT_BYTES, Repeats
from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.spec import EngramSpec

SECTOR_BYTES = 32  # the least that a GPU asks of the link
OUT_BYTES = 2  # rows come out as bf16


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step of a model with a memory, on each GPU.

    Attributes:
        spec: the memory.
        table_bytes: all tables.
        tokens: tokens of a step of one GPU.
        step: seconds of its compute without the memory.
        layers: decoder layers of the model; their compute is taken as equal.
        ahead: seconds from when the ids are known to the start of the step.
        copies: copies of the table in one node's memory.
        gpus: GPUs of a node, each with its own step.
        nodes: nodes that shard the table where it lies in host memory, in files, or in all GPUs' memory.
        cache_bytes: device memory of the hot-row cache.
        repeats: what duplicates and a cache save.
    """
    spec: EngramSpec
    table_bytes: Quantity
    tokens: Quantity
    step: Quantity
    layers: Quantity
    ahead: Quantity
    copies: Quantity
    gpus: Quantity
    nodes: Quantity
    cache_bytes: Quantity
    repeats: Repeats

    def __post_init__(self) -> None:
        for field, low in (("tokens", 1), ("layers", 1), ("copies", 1), ("gpus", 1), ("nodes", 1), ("ahead", 0),
                           ("cache_bytes", 0), ("table_bytes", 1)):
            if getattr(self, field).value < low:
                raise ValueError(f"plan: {field} is {getattr(self, field).value:g}, expected at least {low}")
        if self.step.value <= 0:
            raise ValueError(f"plan: step is {self.step.value:g} s, expected a positive time")
        if self.layers.value <= max(self.spec.layer_ids):
            raise ValueError(f"plan: the model has {self.layers.value:g} layers, but spec {self.spec.name} has a memory in layer "
                             f"{max(self.spec.layer_ids)} (counted from 0)")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, scales and padding included."""
        return self.spec.bytes_per_row

    @property
    def requested(self) -> Quantity:
        """Rows that one layer asks for in a step."""
        return derived("rows", lambda t: t * self.spec.num_columns, self.tokens)

    @property
    def distinct(self) -> Quantity:
        """Rows that are left after duplicates within the step are dropped."""
        return derived("rows", lambda n, u: n * u, self.requested, self.repeats.unique_ratio(self.tokens.value))

    @property
    def cache_slots(self) -> Quantity:
        """Rows that the hot-row cache holds, of all layers."""
        return derived("rows", lambda c: c // (self.row_bytes + SLOT_BYTES), self.cache_bytes)

    @property
    def hit_rate(self) -> Quantity:
        """Share of the distinct rows that are in one layer's part of the cache."""
        slots = self.cache_slots
        return derived("1", lambda h, _: h, self.repeats.hit_rate(slots.value / len(self.spec.layer_ids)), slots)

    @property
    def link_bytes(self) -> float:
        """Bytes that move where a kernel reads a row, over the link or from device memory: whole sectors, on average over the
        rows' alignments."""
        return SECTOR_BYTES * sum(touched(part, SECTOR_BYTES) for part in self.row_parts)

    @property
    def row_parts(self) -> list[int]:
        """Bytes of a row that lie together: its values and its scales, where these are apart."""
        stored = ROW_FORMATS[self.spec.row_format]
        if not stored.has_row_scales or stored.is_packed:
            return [self.row_bytes]
        values = stored.width(self.spec.head_dim) * stored.dtype.itemsize
        return [values, self.row_bytes - values]

    def window(self, layer_id: int) -> Quantity:
        """Seconds from when the ids are known until the compute reaches the layer."""
        return derived("s", lambda ahead, step, layers: ahead + step * layer_id / layers, self.ahead, self.step, self.layers)


def touched(num_bytes: int, unit: int) -> float:
    """Units that a run of bytes touches, on average over where it starts: any multiple of the largest step that fits both."""
    step = math.gcd(num_bytes, unit)
    return (num_bytes - step) / unit + 1


def table_bytes(spec: EngramSpec) -> Quantity:
    """Bytes of all tables of a spec."""
    return given(spec.bytes(), "B", f"spec {spec.name}")
