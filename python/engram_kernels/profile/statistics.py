"""How a time is taken: adaptive stop, median with an interval, raw samples kept, disturbances flagged."""
from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIDENCE = 0.95
MIN_ROUNDS = 9
FEW_ROUNDS = 3  # where the time is up
MAX_STEAL = 0.02  # of the time of all cores, given to other guests
MAX_PREEMPTIONS = 0.5  # per sample: other processes of this system had the CPU
_PROC_STAT = Path("/proc/stat")
_CPUS, _CPU_STAT = Path("/sys/devices/system/cpu"), Path("/sys/fs/cgroup/cpu.stat")


@dataclass(frozen=True)
class Summary:
    """What a series of samples says.

    Attributes:
        samples: every sample, in the order of the measurement, in `unit`.
        median, low, high: the median and its 95 % interval, from order statistics: no assumption on the distribution.
        least, q1, q3: minimum and quartiles.
        unit: of all of them.
        flags: what disturbed the measurement, such as "steal 7 %"; empty when nothing was seen.
    """
    samples: tuple[float, ...]
    median: float
    low: float
    high: float
    least: float
    q1: float
    q3: float
    unit: str = "s"
    flags: tuple[str, ...] = ()

    @property
    def spread(self) -> float:
        """Width of the interval over the median."""
        return (self.high - self.low) / self.median if self.median else math.inf


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of order statistics that holds the median of the distribution with at least this probability.

    The number of samples below the median is binomial(n, 1/2), so ``[x_k, x_{n+1-k}]`` covers it with probability
    ``1 - 2 P(B < k)``. With fewer than 6 samples no such interval exists at 95 %: the range is given.
    """
    ordered, n = sorted(samples), len(samples)
    if n == 0:
        raise ValueError("median_interval: no samples")
    tail, below = 0.0, 0
    for k in range(n // 2):
        tail += math.comb(n, k) / 2**n
        if 2 * tail > 1 - confidence:
            break
        below = k + 1
    k = max(below, 1)
    return ordered[k - 1], ordered[n - k]


def summarize(samples: Sequence[float], unit: str = "s", flags: Sequence[str] = ()) -> Summary:
    """The summary of a series.

    Raises:
        ValueError: no samples, or one that is not a finite number: a measurement is never empty.
    """
    if not samples or not all(math.isfinite(x) for x in samples):
        raise ValueError(f"summarize: {len(samples)} samples, expected at least one, all finite")
    low, high = median_interval(samples)
    q1, _, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else (samples[0],) * 3
    return Summary(tuple(samples), statistics.median(samples), low, high, min(samples), q1, q3, unit, tuple(flags))


@dataclass
class Conditions:
    """What happens to the machine while something is measured. Use as a context manager, then read `flags`."""
    flags: list[str] = field(default_factory=list)
    rounds: int = 0  # set before the end: how many samples were taken

    def __enter__(self) -> Conditions:
        self._steal, self._usage = _steal_ticks(), _usage()
        self._throttled = _throttle_counts()
        return self

    def __exit__(self, *exc_info: object) -> None:
        before, after = self._steal, _steal_ticks()
        if before and after and after[1] > before[1]:
            share = (after[0] - before[0]) / (after[1] - before[1])
            if share > MAX_STEAL:
                self.flags.append(f"steal {share:.0%}")
        usage = _usage()
        if faults := usage.ru_majflt - self._usage.ru_majflt:
            self.flags.append(f"{faults} major faults")
        now = _throttle_counts()
        self.flags += [f"throttled {why} {now[why] - count} times" for why, count in self._throttled.items() if now[why] > count]
        preempted = usage.ru_nivcsw - self._usage.ru_nivcsw
        if preempted > MAX_PREEMPTIONS * max(self.rounds, 1):
            self.flags.append(f"preempted {preempted} times")


def _usage() -> Any:
    import resource  # not on Windows, where nothing is profiled but runs are compared
    return resource.getrusage(resource.RUSAGE_SELF)


def _throttle_counts() -> dict[str, int]:
    """How often the hardware, for heat, and the CPU quota of the control group held this process back; 0 where none tells."""
    heat = sum(_first_int(path) for path in _CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))
    quota = [line.split()[1] for line in _text(_CPU_STAT).splitlines() if line.startswith("nr_throttled ")]
    return {"for heat": heat, "by the CPU quota": int(quota[0]) if quota else 0}


def _first_int(path: Path) -> int:
    return int(_text(path).split()[0]) if _text(path).strip() else 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _steal_ticks() -> tuple[int, int] | None:
    """(stolen, all) ticks since boot, where the system tells."""
    try:
        fields = [int(x) for x in _text(_PROC_STAT).split("\n", 1)[0].split()[1:9]]
    except ValueError:
        return None
    return (fields[7], sum(fields)) if len(fields) == 8 else None


def measure(run: Callable[[], object], control: Callable[[], object] | None = None, *, spread: float = 0.03,
            min_rounds: int = MIN_ROUNDS, max_rounds: int = 200, max_seconds: float = 5.0,
            clock: Callable[[], float] = time.perf_counter) -> tuple[Summary, Summary | None]:
    """Times `run`, with `control` before each call of it, until the median is known well enough.

    Args:
        run: what is timed; one untimed call goes before.
        control: a fixed piece of work that tells a slow machine from a slow `run`; None: none.
        spread: stop when the 95 % interval of the median is narrower than this share of it.
        min_rounds, max_rounds, max_seconds: bounds of the stop; `max_seconds` cannot cut below `min_rounds`.
        clock: seconds; injected by tests.

    Returns:
        The summaries of `run` and `control`, in seconds per call; the flag "spread 12 %" where `spread` was not reached.
    """
    def timed(work: Callable[[], object]) -> Callable[[], float]:
        def seconds() -> float:
            start = clock()
            work()
            return clock() - start
        return seconds
    return sample_until(timed(run), None if control is None else timed(control), spread=spread, min_rounds=min_rounds,
                        max_rounds=max_rounds, max_seconds=max_seconds, clock=clock)


def sample_until(sample: Callable[[], float], control: Callable[[], float] | None = None, *, spread: float = 0.03,
                 min_rounds: int = MIN_ROUNDS, max_rounds: int = 200, max_seconds: float = 5.0,
                 out_of_time: Callable[[], bool] = lambda: False,
                 clock: Callable[[], float] = time.perf_counter) -> tuple[Summary, Summary | None]:
    """`measure` for work that takes its own time: `sample` and `control` return seconds.

    Once `out_of_time` says so, `FEW_ROUNDS` samples suffice; the flag "only 3 samples: out of time" tells.
    """
    sample()
    if control is not None:
        control()
    times: list[float] = []
    controls: list[float] = []
    with Conditions() as conditions:
        begin = clock()
        while len(times) < max_rounds:
            if control is not None:
                controls.append(control())
            times.append(sample())
            if len(times) >= min_rounds and (summarize(times).spread <= spread or clock() - begin > max_seconds):
                break
            if len(times) >= FEW_ROUNDS and out_of_time():
                break
        conditions.rounds = len(times)
    flags = list(conditions.flags)
    if len(times) < min_rounds:
        flags.append(f"only {len(times)} samples: out of time")
    reached = summarize(times).spread
    if reached > spread:
        flags.append(f"spread {reached:.0%}")
    return summarize(times, flags=flags), summarize(controls, flags=flags) if controls else None
