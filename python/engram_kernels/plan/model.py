"""The planner's arithmetic: what each placement costs per step, which one wins, and what would change that."""
from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

from engram_kernels.plan.hardware import Hardware
from engram_kernels.plan.placements import CHUNKS, PLACEMENTS, Lookup, lookup
from engram_kernels.plan.quantity import Quantity, Surface, derived
from engram_kernels.plan.workload import Workload

TIE = 0.001  # of the step: what nobody could measure decides nothing
MAX_TOKENS = 1 << 24  # where the search for the largest hidden step ends
MAX_FACTOR = 1024.0  # how far one input is moved in search of another winner
_STEP = 2**0.25  # between the factors that are tried


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one placement costs per step.

    Attributes:
        placement: one of `PLACEMENTS`.
        why_not: why it cannot be; None: it can. The times of a placement that only lacks room are given all the same.
        lookup: one layer's.
        lookup_s: of all layers, each alone; None: there is no such hardware.
        hidden_s, exposed_s: of it, behind compute and waited for.
        slower_s: what the step takes longer: what is exposed, and the compute lost beside what is hidden.
        largest_tokens: the largest step whose lookups are hidden and whose buffers fit into device memory, its compute taking as
            long as this one's; 0: none.
        freed_bytes: device memory per GPU, against the table in it.
    """
    placement: str
    why_not: str | None
    lookup: Lookup
    lookup_s: Quantity | None = None
    hidden_s: Quantity | None = None
    exposed_s: Quantity | None = None
    slower_s: Quantity | None = None
    largest_tokens: Quantity | None = None
    freed_bytes: Quantity | None = None


@dataclasses.dataclass(frozen=True)
class Flip:
    """The nearest change of one input that makes another placement win.

    Attributes:
        name: of the input, in words.
        now, then: its value, and the one from which on the other wins.
        factor: then / now.
        winner: the placement that wins there.
    """
    name: str
    now: Quantity
    then: Quantity
    factor: float
    winner: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """The verdict.

    Attributes:
        outcomes: every placement's.
        winner, runner_up: placements; None: nothing fits, or nothing else.
        flip: None: no single input within a factor of `MAX_FACTOR` changes the winner.
    """
    outcomes: dict[str, Outcome]
    winner: str | None
    runner_up: str | None
    flip: Flip | None


def exposed_seconds(windows: Sequence[float], latency: float, stages: Sequence[float], chunks: int = CHUNKS) -> float:
    """Seconds that the compute waits for lookups which are all submitted at time 0, one stream per stage.

    Each lookup passes the stages in `chunks` equal pieces; a stage serves one piece at a time, in the order of submission. The
    compute reaches lookup k at ``windows[k]`` plus what it waited before.

    Args:
        windows: seconds of compute before each lookup is needed, in the order of submission.
        latency: from the submission to the first stage.
        stages: seconds that a whole lookup occupies each stage.
        chunks: pieces.
    """
    free = [0.0] * len(stages)
    waited = 0.0
    for window in windows:
        done = latency
        for _ in range(chunks):
            done = latency
            for index, seconds in enumerate(stages):
                done = free[index] = max(free[index], done) + seconds / chunks
        waited = max(waited, done - window)  # the wait before it counts: max(0, done - (window + waited)) is added
    return max(waited, 0.0)


def evaluate(placement: str, work: Workload, node: Hardware, with_largest: bool = True) -> Outcome:
    """What a placement costs per step. `with_largest`: also search for the largest hidden step."""
    found = lookup(placement, work, node)
    if not found.stages:
        return Outcome(placement, found.why_not, found)
    num_lookups = len(work.spec.layer_ids)
    lookup_s = derived("s", lambda s: s * num_lookups, found.seconds)
    exposed = _exposed(work, found)
    hidden = derived("s", lambda whole, out: max(whole - out, 0.0), lookup_s, exposed)
    slower = derived("s", lambda out, lost, hid, whole: out + lost * num_lookups * hid / whole, exposed, found.lost, hidden,
                     lookup_s)
    in_device = derived("B", lambda table, g, n: table / (g * n), work.table_bytes, work.gpus, work.nodes)
    freed = derived("B", lambda table, mine: max(table - mine, 0.0) if node.has_gpu else 0.0, in_device, found.device_bytes)
    largest = _largest_hidden(placement, work, node) if with_largest else None
    return Outcome(placement, found.why_not, found, lookup_s, hidden, exposed, slower, largest, freed)


def _exposed(work: Workload, found: Lookup) -> Quantity:
    windows = [work.window(layer) for layer in sorted(work.spec.layer_ids)]
    count = len(windows)
    return derived("s", lambda *v: exposed_seconds(v[:count], v[count], v[count + 1:]), *windows, found.latency,
                   *(stage.seconds for stage in found.stages))


def _largest_hidden(placement: str, work: Workload, node: Hardware) -> Quantity:
    def at(tokens: int) -> tuple[Workload, Lookup]:
        changed = dataclasses.replace(work, tokens=dataclasses.replace(work.tokens, value=float(tokens)))
        return changed, lookup(placement, changed, node)

    # what takes more than there is however few the tokens are, such as a table, is no reason: the times are given all the same
    room = None if node.device_bytes is None else max(node.device_bytes.value, at(1)[1].device_bytes.value)

    def hidden(tokens: int) -> bool:
        changed, found = at(tokens)
        return _exposed(changed, found).value == 0 and (room is None or found.device_bytes.value <= room)

    low, high = 0, MAX_TOKENS
    if hidden(high):
        low = high
    while high - low > 1:  # low is hidden (or no step), high is not
        middle = (low + high) // 2
        low, high = (middle, high) if hidden(middle) else (low, middle)
    limits = [_exposed(*at(max(low, 1))), *([] if node.device_bytes is None else [node.device_bytes])]
    return derived("tokens", lambda *_: low, *limits)


def rank(outcomes: Sequence[Outcome], step_s: float) -> list[str]:
    """Placements that can be, the best first.

    The least slow-down of a step wins; of those that differ from it by less than `TIE` of the step, the one that frees the most
    device memory, and of these the one with the shortest lookup.
    """
    left = [o for o in outcomes if o.why_not is None]
    order = []
    while left:
        best = min(_value(o.slower_s) for o in left)
        tied = [o for o in left if _value(o.slower_s) <= best + TIE * step_s]
        winner = min(tied, key=lambda o: (-_value(o.freed_bytes), _value(o.lookup_s), PLACEMENTS.index(o.placement)))
        order.append(winner.placement)
        left.remove(winner)
    return order


def _value(quantity: Quantity | None) -> float:
    assert quantity is not None, "a placement that can be has its times"
    return quantity.value


def make_plan(work: Workload, node: Hardware) -> Plan:
    """Evaluates every placement and says which wins, and what would change that."""
    outcomes = {placement: evaluate(placement, work, node) for placement in PLACEMENTS}
    order = rank(list(outcomes.values()), work.step.value)
    winner = order[0] if order else None
    return Plan(outcomes, winner, order[1] if len(order) > 1 else None, find_flip(work, node, winner))


def winner_of(work: Workload, node: Hardware) -> str | None:
    """The placement that wins, alone."""
    order = rank([evaluate(p, work, node, with_largest=False) for p in PLACEMENTS], work.step.value)
    return order[0] if order else None


# every input that is moved: name in words, and the field of the workload or of the hardware
_WORK_INPUTS = {"tokens per step": "tokens", "step time": "step", "time that ids are known ahead": "ahead",
                "table size": "table_bytes", "copies of the table": "copies", "size of the hot-row cache": "cache_bytes",
                "unique ratio": "repeats", "hit rate of the hot-row cache": "repeats"}
_RATIOS = {"unique ratio": "unique_factor", "hit rate of the hot-row cache": "hit_factor"}
_NODE_INPUTS = {"room in device memory": "device_bytes", "room in host memory": "host_bytes", "room on disk": "disk_bytes",
                "row gather rate from device memory": "device_gather", "UVA rate": "uva", "copy engine rate": "link",
                "host gather rate": "host_copy", "host gather rate, dequantizing": "host_decode",
                "disk reads per second": "disk_reads", "network rate": "network", "NVLink rate": "nvlink",
                "GPU lookup latency": "gpu_latency", "copy latency": "copy_latency", "host lookup latency": "host_latency",
                "disk latency": "disk_latency", "network latency": "network_latency",
                "rows per second of the remote engine": "engine_rows", "latency of the remote engine": "engine_latency",
                "compute lost beside a UVA gather": "gather_share", "compute lost beside a host gather": "host_share"}


def input_names() -> list[str]:
    """The inputs that `find_flip` moves, in words."""
    return [*_WORK_INPUTS, *_NODE_INPUTS]


def input_value(name: str, work: Workload, node: Hardware) -> Quantity | None:
    """An input's value for this workload; None: this machine has no such thing, or it is 0 and cannot be scaled."""
    if name in _RATIOS:
        if name != "unique ratio" and (not node.has_gpu or work.hit_rate.value == 0):
            return None
        return work.repeats.unique_ratio(work.tokens.value) if name == "unique ratio" else work.hit_rate
    value = getattr(work, _WORK_INPUTS[name]) if name in _WORK_INPUTS else getattr(node, _NODE_INPUTS[name])
    if isinstance(value, Surface):
        value = value.at(work.row_bytes, work.table_bytes.value)
    return None if value is None or value.value == 0 else value


def moved(name: str, factor: float, work: Workload, node: Hardware) -> tuple[Workload, Hardware] | None:
    """Workload and machine with one input `factor` times as large; None: such an input makes no sense."""
    if name in _RATIOS:
        now = input_value(name, work, node)
        if now is None or now.value * factor > 1:
            return None
        field = _RATIOS[name]
        repeats = dataclasses.replace(work.repeats, **{field: getattr(work.repeats, field) * factor})
        return dataclasses.replace(work, repeats=repeats), node
    try:
        if name in _WORK_INPUTS:
            field = _WORK_INPUTS[name]
            return dataclasses.replace(work, **{field: getattr(work, field).scaled(factor)}), node
        field = _NODE_INPUTS[name]
        if field.endswith("_share") and getattr(node, field).value * factor > 1:
            return None
        return work, dataclasses.replace(node, **{field: getattr(node, field).scaled(factor)})
    except ValueError:  # fewer than one token, or one copy
        return None


def find_flip(work: Workload, node: Hardware, winner: str | None) -> Flip | None:
    """The single input whose smallest change, as a factor, makes another placement win.

    Factors are tried outwards in steps of 2**0.25, all inputs at once, then the place is bisected: a change of the winner that
    is undone within one step is not seen.
    """
    values = {name: value for name in input_names() if (value := input_value(name, work, node)) is not None}

    def wins(name: str, factor: float) -> str | None:
        changed = moved(name, factor, work, node)
        return winner if changed is None else winner_of(*changed)

    def flips(name: str, factor: float) -> bool:
        return wins(name, factor) not in (winner, None)

    for exponent in range(1, round(math.log(MAX_FACTOR, _STEP)) + 1):
        found = []
        for name, now in values.items():
            for direction in (_STEP, 1 / _STEP):
                if flips(name, direction**exponent):
                    factor = _bisect(functools.partial(flips, name), direction ** (exponent - 1), direction**exponent)
                    found.append(Flip(name, now, now.scaled(factor), factor, str(wins(name, factor))))
        if found:
            return min(found, key=lambda flip: abs(math.log(flip.factor)))
    return None


def _bisect(changes: Callable[[float], bool], same: float, changed: float) -> float:
    """The factor nearest to `same` at which the winner changes, to a millionth."""
    while abs(math.log(changed / same)) > 1e-6:
        middle = math.sqrt(same * changed)
        same, changed = (same, middle) if changes(middle) else (middle, changed)
    return changed
