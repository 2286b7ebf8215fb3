"""A discrete-event model of the streams of a machine: what waits for what, piece by piece."""
from __future__ import annotations

import dataclasses
import heapq
import math
from collections import defaultdict
from collections.abc import Hashable, Sequence


@dataclasses.dataclass(frozen=True)
class Task:
    """A piece of work on one stream.

    Attributes:
        name: for the trace.
        stream: what it occupies alone; None: a delay, which occupies nothing.
        seconds: how long.
        after: indices of the tasks that must have ended.
        track: (process, thread) of the trace.
    """
    name: str
    stream: Hashable | None
    seconds: float
    after: tuple[int, ...] = ()
    track: tuple[str, str] = ("", "")


@dataclasses.dataclass(frozen=True)
class Span:
    """When a task ran: ready when all that it waits for had ended."""
    ready: float
    start: float
    end: float


def run_tasks(tasks: Sequence[Task]) -> list[Span]:
    """Runs the tasks; each stream serves one at a time, first ready first, of those ready together the one listed first.

    Raises:
        ValueError: a duration is negative or not finite, a task waits for one that is not there, or tasks wait for each other.
    """
    waits = [len(task.after) for task in tasks]
    followers: dict[int, list[int]] = defaultdict(list)
    for index, task in enumerate(tasks):
        if not (math.isfinite(task.seconds) and task.seconds >= 0):
            raise ValueError(f"simulate: task {index} ({task.name}) takes {task.seconds} s, expected a finite time of at least 0")
        for other in task.after:
            if not 0 <= other < len(tasks):
                raise ValueError(f"simulate: task {index} ({task.name}) waits for task {other}, expected 0 to {len(tasks) - 1}")
            followers[other].append(index)
    ready: dict[int, float] = {}
    spans: dict[int, Span] = {}
    queues: dict[Hashable, list[tuple[float, int]]] = defaultdict(list)
    busy: set[Hashable] = set()
    events: list[tuple[float, int]] = []  # (end, task)

    def begin(index: int, now: float) -> None:
        spans[index] = Span(ready[index], now, now + tasks[index].seconds)
        heapq.heappush(events, (now + tasks[index].seconds, index))

    def release(index: int, now: float, touched: set[Hashable]) -> None:
        ready[index] = now
        stream = tasks[index].stream
        if stream is None:
            begin(index, now)
        else:
            heapq.heappush(queues[stream], (now, index))
            touched.add(stream)

    def serve(touched: set[Hashable], now: float) -> None:
        for stream in touched:
            if stream not in busy and queues[stream]:
                busy.add(stream)
                begin(heapq.heappop(queues[stream])[1], now)

    touched: set[Hashable] = set()
    for index, count in enumerate(waits):
        if count == 0:
            release(index, 0.0, touched)
    serve(touched, 0.0)
    while events:
        now, touched = events[0][0], set()
        while events and events[0][0] == now:  # everything that ends now, before anything starts: the order of listing counts
            _, index = heapq.heappop(events)
            if tasks[index].stream is not None:
                busy.discard(tasks[index].stream)
                touched.add(tasks[index].stream)
            for follower in followers[index]:
                waits[follower] -= 1
                if waits[follower] == 0:
                    release(follower, now, touched)
        serve(touched, now)
    if len(spans) < len(tasks):
        stuck = next(i for i in range(len(tasks)) if i not in spans)
        raise ValueError(f"simulate: task {stuck} ({tasks[stuck].name}) never starts: tasks wait for each other")
    return [spans[index] for index in range(len(tasks))]
