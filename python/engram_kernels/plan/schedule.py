"""The layer schedule of a plan as tasks: compute layer by layer, lookups submitted some layers early, shards exchanged."""
from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from engram_kernels.plan.hardware import Hardware
from engram_kernels.plan.placements import CHUNKS, TITLES, lookup
from engram_kernels.plan.quantity import Provenance, Quantity, derived, given
from engram_kernels.plan.simulate import Span, Task, run_tasks
from engram_kernels.plan.workload import Workload

MAX_TASKS = 2_000_000
_SHARED = ("host", "disk")  # one per node; every other stream is a GPU's own
_Waits = dict[tuple[int, int], tuple[int, ...]]  # (node, GPU) -> tasks
_EXCHANGED = ("network", "nvlink")  # an all-to-all: it starts when every GPU has its rows ready


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What is simulated.

    Attributes:
        placement: where the table lies.
        steps: steps in a row, at least 1.
        early: layers of compute between the submission of a lookup and its layer; None: as many as the ids allow, which are
            known when the step starts.
    """
    placement: str
    steps: int = 3
    early: int | None = None


@dataclasses.dataclass(frozen=True)
class Simulated:
    """What came out.

    Attributes:
        step_s: seconds per step, the mean of all.
        exposed_s: of them, what the compute waited for rows; the mean over GPUs.
        busy: stream -> share of the time that it worked; the mean over GPUs or nodes.
        tasks, spans: everything, for the trace.
    """
    step_s: Quantity
    exposed_s: Quantity
    busy: dict[str, Quantity]
    tasks: list[Task]
    spans: list[Span]


def simulate(work: Workload, node: Hardware, schedule: Schedule) -> Simulated:
    """Runs the schedule on ``nodes * gpus`` GPUs.

    Rows of a shard are exchanged by all GPUs at once: a piece leaves when each of them has its own. A lookup passes its stages
    in `CHUNKS` pieces. Compute lost beside a gather (`Stage.share`) is not in it.

    Raises:
        ValueError: the placement cannot be, or the schedule makes no sense.
    """
    found = lookup(schedule.placement, work, node)
    if not found.stages:
        raise ValueError(f"plan: {TITLES[schedule.placement]} cannot be simulated: {found.why_not}")
    if schedule.steps < 1:
        raise ValueError(f"plan: {schedule.steps} steps, expected at least 1")
    if schedule.early is not None and schedule.early < 0:
        raise ValueError(f"plan: lookups are submitted {schedule.early} layers early, expected at least 0")
    gpus, nodes, layers = int(work.gpus.value), int(work.nodes.value), int(work.layers.value)
    pieces = len(work.spec.layer_ids) * (CHUNKS * len(found.stages) + 1)
    if (count := gpus * nodes * schedule.steps * (layers + pieces)) > MAX_TASKS:
        raise ValueError(f"plan: {count:,} tasks to simulate, expected at most {MAX_TASKS:,}: fewer steps, GPUs or nodes")
    tasks = _Builder(work, found.latency.value, [(s.resource, s.seconds.value) for s in found.stages], schedule).build()
    spans = run_tasks(tasks)
    inputs = [work.step, work.layers, found.latency, *(stage.seconds for stage in found.stages)]
    simulated = Quantity(1.0, "1", Provenance.SIMULATED, f"{schedule.steps} steps on {nodes} x {gpus} GPUs or hosts, simulated")
    end = max(span.end for span in spans)

    def result(value: float, unit: str) -> Quantity:
        return derived(unit, lambda *_: value, simulated, *inputs)

    step_s = end / schedule.steps
    busy: dict[str, float] = defaultdict(float)
    for task in tasks:
        if isinstance(task.stream, tuple):
            busy[task.stream[-1]] += task.seconds
    compute = sum(task.seconds for task in tasks if isinstance(task.stream, tuple) and task.stream[-1] == "compute")
    return Simulated(result(step_s, "s"), result(step_s - compute / (gpus * nodes * schedule.steps), "s"),
                     {name: result(seconds / end / (nodes if name in _SHARED else nodes * gpus), "1")
                      for name, seconds in busy.items()}, tasks, spans)


class _Builder:
    """Lists the tasks of every GPU, step by step."""

    def __init__(self, work: Workload, latency: float, stages: list[tuple[str, float]], schedule: Schedule):
        self._work, self._latency, self._schedule = work, latency, schedule
        self._layers, self._gpus = int(work.layers.value), int(work.gpus.value)
        # the plan counts what all GPUs of a node ask of it; here each asks for its own
        self._stages = [(name, seconds / self._gpus if name in _SHARED else seconds) for name, seconds in stages]
        self._ranks = [(n, g) for n in range(int(work.nodes.value)) for g in range(self._gpus)]
        self._tasks: list[Task] = []

    def build(self) -> list[Task]:
        last: _Waits = {rank: () for rank in self._ranks}  # compute so far
        memories = sorted(self._work.spec.layer_ids)
        for step in range(self._schedule.steps):
            submits: dict[int, list[int]] = defaultdict(list)  # compute layer -> the memories submitted before it
            for memory in memories:
                early = memory if self._schedule.early is None else min(self._schedule.early, memory)
                submits[memory - early].append(memory)
            arrived: dict[int, _Waits] = {}
            for layer in range(self._layers):
                for memory in submits[layer]:
                    arrived[memory] = self._lookup(f"step {step} layer {memory}", last)
                for rank in self._ranks:
                    after = last[rank] + (arrived[layer][rank] if layer in arrived else ())
                    last[rank] = (self._add(f"step {step} layer {layer}", rank, "compute",
                                            self._work.step.value / self._layers, after),)
        return self._tasks

    def _lookup(self, name: str, known: _Waits) -> _Waits:
        """The pieces of one memory's rows on every GPU; returns what its layer must wait for."""
        first: _Waits = {rank: (self._add(f"{name} latency", rank, None, self._latency, known[rank]),) for rank in self._ranks}
        done: _Waits = {rank: () for rank in self._ranks}
        for piece in range(CHUNKS):
            before = first
            for resource, seconds in self._stages:
                if resource in _EXCHANGED:
                    everyone = tuple(index for rank in self._ranks for index in before[rank])
                    before = {rank: everyone for rank in self._ranks}
                before = {rank: (self._add(f"{name} {resource} {piece + 1}/{CHUNKS}", rank, resource, seconds / CHUNKS,
                                           before[rank]),) for rank in self._ranks}
            done = {rank: done[rank] + before[rank] for rank in self._ranks}
        return done

    def _add(self, name: str, rank: tuple[int, int], resource: str | None, seconds: float, after: tuple[int, ...]) -> int:
        shared = resource in _SHARED
        stream = None if resource is None else (rank[0], resource) if shared else (*rank, resource)
        thread = resource or "latency" if shared else f"gpu {rank[1]} {resource or 'latency'}"
        self._tasks.append(Task(name, stream, seconds, after, (f"node {rank[0]}", thread)))
        return len(self._tasks) - 1


def early_enough(work: Workload, node: Hardware, placement: str) -> int | None:
    """The fewest layers early at which a lookup costs the least that it can; None where there is no memory past layer 0."""
    latest = max(work.spec.layer_ids)
    if latest == 0:
        return None
    least = simulate(work, node, Schedule(placement, 1)).exposed_s.value
    low, high = 0, latest  # high is enough
    while low < high:
        middle = (low + high) // 2
        exposed = simulate(work, node, Schedule(placement, 1, middle)).exposed_s.value
        low, high = (low, middle) if exposed <= least + 1e-12 else (middle + 1, high)
    return high


def write_trace(path: Path, simulated: Simulated, title: str) -> None:
    """Writes the Chrome trace (opens in Perfetto): a process per node, a thread per stream; times in microseconds.

    Raises:
        OSError: the file cannot be written.
    """
    processes: dict[str, int] = {}
    threads: dict[tuple[str, str], int] = {}
    events: list[dict[str, Any]] = []
    for task, span in zip(simulated.tasks, simulated.spans, strict=True):
        process = processes.setdefault(task.track[0], len(processes))
        thread = threads.setdefault(task.track, len(threads))
        events.append({"ph": "X", "name": task.name, "cat": "simulated", "pid": process, "tid": thread, "ts": span.start * 1e6,
                       "dur": (span.end - span.start) * 1e6, "args": {"waited_us": (span.start - span.ready) * 1e6}})
    names = [{"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}} for name, number in processes.items()]
    names += [{"ph": "M", "name": "thread_name", "pid": processes[track[0]], "tid": number, "args": {"name": track[1]}}
              for track, number in threads.items()]
    other = {"title": title, "provenance": Provenance.SIMULATED.word, "inputs": simulated.step_s.provenance.word,
             "weakest_input": simulated.step_s.source}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": other}) + "\n",
                    encoding="utf-8")


def ids_at_step_start(work: Workload) -> Workload:
    """The workload as it is simulated: ids are known when a step starts, not before."""
    return dataclasses.replace(work, ahead=given(0, "s", "simulated: ids are known when a step starts"))
