"""A run of the probes: time budget, cells, peaks, and a report file that is valid whenever the run ends."""
from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engram_kernels._files import write_atomic
from engram_kernels._terminal import is_stream
from engram_kernels.profile.cells import (
    JsonCell,
    Skip,
    against_peak,
    flag_drift,
    measured,
    not_measured,
    passes,
    verdict_of,
)
from engram_kernels.profile.statistics import sample_until

SCHEMA_VERSION = 2
BUDGET_SECONDS = {"quick": 45.0, "full": 540.0}  # of 60 s and 10 minutes: starting up and drawing take the rest
_CELL_SECONDS = {"quick": 0.15, "full": 0.6}


@dataclass(frozen=True)
class Options:
    """What the user chose.

    Attributes:
        mode: "quick" or "full".
        groups: which of "host", "disk", "gpu" are probed.
        disk_folder: where the disk probe makes its file.
        trace: a .npy file of row ids for the order "trace"; None: that order is left out.
        max_memory_bytes: no table is larger; None: 80 % of the free memory.
        gpu: index of the GPU.
    """
    mode: str = "quick"
    groups: tuple[str, ...] = ("host", "disk", "gpu")
    disk_folder: Path = Path()
    trace: Path | None = None
    max_memory_bytes: int | None = None
    gpu: int = 0


@dataclass
class Session:
    """What probes write to.

    Attributes:
        options: of the user.
        machine: the machine block of the report.
        path: where the report goes after each probe; None: nowhere.
        cells, peaks, probes: of the report.
        clock: seconds; injected by tests.
    """
    options: Options
    machine: dict[str, Any]
    path: Path | None = None
    cells: list[JsonCell] = field(default_factory=list)
    peaks: dict[str, dict[str, Any]] = field(default_factory=dict)
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    complete: bool = False
    peak_again: dict[str, Callable[[], float]] = field(default_factory=dict)  # measures the peak of this name: bytes per second
    tick: Callable[[], None] = lambda: None  # a cell is done
    control: Callable[[], float] | None = None  # seconds of a fixed piece of work, before each sample of the probe that runs

    def __post_init__(self) -> None:
        self._begin = self.clock()
        self._started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self._deadline = self._end = self._begin + BUDGET_SECONDS[self.options.mode]

    @property
    def quick(self) -> bool:
        """Whether few cells are wanted."""
        return self.options.mode == "quick"

    @property
    def has_gpu(self) -> bool:
        """Whether a GPU will be probed."""
        return "gpu" in self.options.groups and bool(self.machine["gpu"])

    def seconds(self) -> float:
        """Since the run began."""
        return self.clock() - self._begin

    @property
    def last_level_bytes(self) -> int:
        """Bytes of the last-level cache; 32 MiB where the system does not tell."""
        return self.machine["caches"]["last_level_bytes"] or 32 << 20

    @contextlib.contextmanager
    def probe(self, name: str, seconds: float, control: Callable[[], float] | None = None) -> Iterator[None]:
        """Runs the body as probe `name`, for at most `seconds`, then sums up its cells and writes the report.

        What the body raises ends this probe and no other: a `Skip` or an error becomes a cell.
        """
        begin, before = self.clock(), len(self.cells)
        self._deadline, self.control = min(self._end, begin + seconds), control
        interrupted = False
        try:
            yield
        except KeyboardInterrupt:
            interrupted = True
            self.add(not_measured({"probe": name}, "INTERRUPTED", "Ctrl-C"))
            raise
        except Exception as err:
            self.fail({"probe": name}, err)
        finally:
            mine = self.cells[before:]
            if not mine and not interrupted:
                self.add(not_measured({"probe": name}, "ERROR", "the probe measured nothing"))
                mine = self.cells[before:]
            flag_drift(mine)
            verdict, advice = verdict_of(mine)
            cut = sum((c.get("reason") or {}).get("kind") == "TIME_BUDGET" for c in mine)
            self.probes[name] = {"verdict": verdict, "advice": advice, "cells": len(mine), "cut": cut,
                                 "seconds": round(self.clock() - begin, 3)}
            self.write()

    @contextlib.contextmanager
    def at_most(self, share: float) -> Iterator[None]:
        """Gives the body this share of what is left of the probe's time, so that something is left for what follows."""
        before = self._deadline
        self._deadline = min(before, self.clock() + share * max(self.seconds_left(), 0.0))
        try:
            yield
        finally:
            self._deadline = before

    def measure(self, cell: JsonCell, sample: Callable[[], float], *, peak: str | None = None, may_be_cached: bool = False,
                min_rounds: int = 9) -> JsonCell:
        """Measures and files one cell. What `sample` raises becomes the reason of the cell.

        Args:
            cell: what is measured; `rows` and `bytes` are those of a call.
            sample: seconds of a call.
            peak: name of the peak to divide by.
            may_be_cached: see `against_peak`.
            min_rounds: samples at least.

        Returns:
            The cell, which is in `cells` too.
        """
        if self.time_is_up():
            return self.add(not_measured(cell, "TIME_BUDGET", f"the time of this probe in a {self.options.mode} run was used up"))
        try:
            seconds = _CELL_SECONDS[self.options.mode]
            summary, control = sample_until(sample, self.control, min_rounds=min_rounds, max_seconds=seconds,
                                            out_of_time=self.time_is_up)
            result = measured(cell, summary, control)
        except Exception as err:
            return self.fail(cell, err)
        if peak in self.peaks:
            if peak in self.peak_again and not may_be_cached and passes(result, self.peaks[peak]):
                # the peak may have been measured in a bad moment
                self.set_peak(peak, self.peak_again[peak](), f"{self.peaks[peak]['source']}, measured again")
            against_peak(result, peak, self.peaks[peak], may_be_cached)
        return self.add(result)

    def time_is_up(self) -> bool:
        """Whether the probe that runs has used its time."""
        return self.seconds_left() <= 0

    def seconds_left(self) -> float:
        """Seconds left to the probe that runs."""
        return self._deadline - self.clock()

    def skip(self, cell: JsonCell, kind: str, text: str) -> JsonCell:
        """Files a cell that cannot be measured."""
        return self.add(not_measured(cell, kind, text))

    def fail(self, cell: JsonCell, err: Exception) -> JsonCell:
        """Files a cell whose measurement raised."""
        return self.add(not_measured(cell, *((err.kind, err.text) if isinstance(err, Skip) else _reason(err))))

    def add(self, cell: JsonCell) -> JsonCell:
        """Files a cell."""
        self.cells.append(cell)
        self.tick()
        return cell

    def set_peak(self, name: str, bytes_per_s: float, source: str, provenance: str = "measured", physical: bool = False) -> None:
        """What later cells are divided by; of two measured ones of a name the higher stays."""
        known = self.peaks.get(name)
        if bytes_per_s > 0 and (known is None or bytes_per_s > known["bytes_per_s"]):
            self.peaks[name] = {"bytes_per_s": bytes_per_s, "provenance": provenance, "source": source, "physical": physical}

    def report(self) -> dict[str, Any]:
        """The report as `profile.schema.json` describes it."""
        return {"schema_version": SCHEMA_VERSION, "mode": self.options.mode, "complete": self.complete,
                "started": self._started, "seconds": round(self.seconds(), 3), "machine": self.machine,
                "peaks": self.peaks, "probes": self.probes, "cells": self.cells}

    def write(self) -> None:
        """Replaces the report file as a whole: a reader, or a run that is killed, never leaves half of one."""
        if self.path is not None and self.cells:
            write_whole(self.path, json.dumps(self.report(), indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside `path`, then renames it. A link stays one, and what is no regular file is written to as it is."""
    if is_stream(path):
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic("profile", path, text.encode())


def _reason(err: Exception) -> tuple[str, str]:
    """(kind, text) of what a probe raised; memory that is not there, of host or device, is no fault."""
    text = f"{type(err).__name__}: {str(err).strip()[:500]}"
    return "NO_MEMORY" if isinstance(err, MemoryError) or "out of memory" in text else "ERROR", text
