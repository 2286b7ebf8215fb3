"""Rows of a table in Ray actors: each has a range of them, in memory or in a file; clients ask for distinct rows.

Ray does the rest: placement, transport, and starting an actor again that died (`max_restarts`). A request that meets a dead actor
fails with an error that names it; the next one finds it again.
"""
from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engram_kernels._checks import expect_int, expect_seconds
from engram_kernels.table.remote_rows import ENGINES, Description, Piece, fetched
from engram_kernels.table.row_table import RowTable

if TYPE_CHECKING:
    from engram_kernels.table.checkpoint_files import Source

NAMESPACE = "engram_kernels"
_OP = "serve_rows"
_SLICE_S = 0.1  # after which a request looks whether it was given up
_CALL_IDS, _CALL_BYTES = 65_536, 32 << 20  # of one call to an actor: with eight calls in its place it took twice as long
_CALLS = 4  # in flight per request
_LONGEST_S = 1e9  # Ray counts milliseconds


def _ray() -> Any:
    try:
        import ray
    except ImportError as err:
        raise RuntimeError(f"ray is needed for rows in Ray actors: {err}; pip install 'engram-kernels[ray]'") from None
    if not ray.is_initialized():
        raise RuntimeError("Ray is not running in this process: call ray.init() first, which starts it or joins a cluster")
    return ray


def _actor_name(name: str, number: int) -> str:
    return f"rows/{name}/{number}"


class _RowActor:
    """One range of rows. Ray makes it in a process of its own, and again with the same arguments where that died."""

    def __init__(self, source: Any, described: dict[str, Any], number: int, bounds: list[int], in_memory: bool):
        self._described, self._number, self._bounds = described, number, bounds
        self._begin, end = bounds[number], bounds[number + 1]
        self._table: RowTable | None = None
        self._arrays: tuple[Any, Any] = (None, None)
        if not isinstance(source, dict):
            self._arrays = source
            return
        table = RowTable.open(**source)
        found = table.fingerprint()
        if found != described["fingerprint"]:
            raise ValueError(f"{table.path} has rows with fingerprint {found}, {described['fingerprint']} was served: it is "
                             "another file by now")
        if in_memory:
            self._arrays = _arrays_of(table, self._begin, end)
        else:
            self._table = table

    def describe(self) -> dict[str, Any]:
        return {"number": self._number, "bounds": self._bounds, "table": self._described, "process": os.getpid()}

    def read(self, ids: Any) -> tuple[Any, Any]:
        if self._table is None:
            rows, scales = self._arrays
            local = ids - self._begin
            return np.take(rows, local, axis=0), None if scales is None else np.take(scales, local, axis=0)
        rows, scales = self._table.read_rows(torch.from_numpy(np.array(ids)))  # Ray's arrays are read-only
        return _bytes_of(rows), _bytes_of(scales) if scales is not None and scales.dim() == 2 else None


def _bytes_of(stored: torch.Tensor) -> Any:
    return stored.detach().contiguous().view(torch.uint8).numpy()


def _arrays_of(table: RowTable, begin: int, end: int) -> tuple[Any, Any]:
    """Rows [begin, end) and their scales as bytes."""
    per_row = table.scales is not None and table.scales.dim() == 2
    scales = None
    if table._file is None:
        rows = table.rows[begin:end].cpu()
        if per_row and table.scales is not None:
            scales = table.scales[begin:end].cpu()
    else:
        rows = torch.empty((end - begin, table.rows.shape[1]), dtype=table.rows.dtype, device="cpu")
        if per_row and table.scales is not None:
            scales = torch.empty((end - begin, table.scales.shape[1]), dtype=table.scales.dtype, device="cpu")
        table._file.read_span(begin, rows, scales)
    return _bytes_of(rows), None if scales is None else _bytes_of(scales)


class RowServer:
    """Actors that serve a table, while this object lives or until `close`.

    Attributes:
        address: "ray://NAME", for `RowTable.connect`.
        actors: the Ray actors, in the order of their rows.
    """

    def __init__(self, address: str, actors: list[Any], held: list[Any]):
        self.address, self.actors = address, actors
        self._held = held  # rows in Ray's object store, with which it starts an actor again
        self._process = os.getpid()

    def close(self) -> None:
        """Ends the actors; what is asked of them from here on fails. In a child after a fork: nothing, they are its parent's."""
        if os.getpid() != self._process:
            return
        (actors, self.actors), self._held = (self.actors, []), []
        with contextlib.suppress(ImportError):
            import ray
            for actor in actors if ray.is_initialized() else []:
                ray.kill(actor, no_restart=True)

    def __enter__(self) -> RowServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def serve_rows(source: RowTable | Source, num_actors: int = 1, *, name: str = "rows", in_memory: bool = False,
               max_restarts: int = -1, timeout_s: float = 120.0, actor_options: dict[str, Any] | None = None,
               **open_options: Any) -> RowServer:
    """Serves a table from Ray actors, each with a range of its rows: R // n, and one more in the first R % n.

    `ray.init()` comes first. Actors have names in the Ray namespace "engram_kernels", so that any process of the cluster can
    `RowTable.connect("ray://NAME")`.

    Args:
        source: a table in memory, whose rows go into Ray's object store and stay there while they are served; a table in a
            file, or what `RowTable.open` takes: files that every node of the cluster sees under that path.
        num_actors: n, at most R.
        name: by which clients find it.
        in_memory: of a table in a file: each actor reads its rows once and serves them from memory.
        max_restarts: how often Ray starts an actor again that died; -1: always. It serves again once it has found the same
            fingerprint.
        timeout_s: seconds until all actors answer.
        actor_options: for Ray's `options`, such as num_cpus (default 0), resources, scheduling_strategy, lifetime="detached".
        open_options: as of `RowTable.open`, where source is a path.

    Returns:
        A RowServer.

    Raises:
        ValueError: an argument is out of range, or the name is taken.
        OSError: the file cannot be read, or an actor could not start.
        TimeoutError: they did not answer in time. Nothing is left behind.
        RuntimeError: Ray is not installed or not running.

    Source: docs/remote.md.
    """
    ray = _ray()
    options = _actor_options(name, max_restarts, actor_options)
    timeout_s = min(expect_seconds(_OP, "timeout_s", timeout_s), _LONGEST_S)
    if isinstance(source, RowTable) and open_options:
        raise TypeError(f"{_OP}: {next(iter(open_options))!r} is an option of RowTable.open, but source is a table that is open "
                        "already, expected a path")
    table = source if isinstance(source, RowTable) else RowTable.open(source, **open_options)
    num_actors = expect_int(_OP, "num_actors", num_actors, 1, max(table.num_rows, 1))
    described = dataclasses.asdict(Description.of(table))
    base, more = divmod(table.num_rows, num_actors)
    bounds = [number * base + min(number, more) for number in range(num_actors + 1)]
    remote, actors, stored = ray.remote(_RowActor), [], []
    try:
        for number in range(num_actors):
            opened = table._file.opened if table.tier == "file" and table._file is not None else None
            if opened is None:
                stored.append(ray.put(_arrays_of(table, bounds[number], bounds[number + 1])))
            actors.append(remote.options(name=_actor_name(name, number), **options).remote(
                opened or stored[-1], described, number, bounds, in_memory))
        ray.get([actor.describe.remote() for actor in actors], timeout=timeout_s)
    except BaseException as err:
        RowServer("", actors, stored).close()
        if isinstance(err, ray.exceptions.GetTimeoutError):
            raise TimeoutError(f"{_OP}: the {num_actors} actors of {name!r} did not answer in {timeout_s} s") from None
        if isinstance(err, ValueError) and "taken" in str(err):  # Ray's ActorAlreadyExistsError, once a plain ValueError
            raise ValueError(f"{_OP}: name is {name!r}, expected another: actors of that name serve rows already") from None
        if isinstance(err, ray.exceptions.RayError):
            raise OSError(f"{_OP}: an actor of {name!r} could not start: {_last_line(err)}") from err
        raise
    return RowServer(f"ray://{name}", actors, stored)


def _actor_options(name: object, max_restarts: object, actor_options: dict[str, Any] | None) -> dict[str, Any]:
    """For Ray's `options`, but for the actor's name; the arguments of `serve_rows`, checked."""
    if not isinstance(name, str) or not name or "/" in name:
        raise ValueError(f"{_OP}: name is {name!r}, expected a string without '/'")
    given = dict(actor_options or {})
    if taken := [key for key in ("name", "namespace", "max_restarts", "get_if_exists") if key in given]:
        raise ValueError(f"{_OP}: actor_options has {taken[0]!r}, expected none of name, namespace, max_restarts and "
                         "get_if_exists: clients find the actors by what serve_rows gives them")
    return {"num_cpus": 0, **given, "namespace": NAMESPACE, "max_restarts": expect_int(_OP, "max_restarts", max_restarts, -1)}


def _last_line(err: BaseException) -> str:
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return f"{type(err).__name__}: {lines[-1] if lines else ''}"


class RayClient:
    """A client of the actors that serve a table. Calls may come from several threads; a child after a fork makes its own."""

    def __init__(self, name: str, timeout_s: float):
        self.name, self._timeout_s, self._process = name, timeout_s, os.getpid()
        self._ray = _ray()
        self._actors: list[Any] = [self._find(0)]
        self._bounds: list[int] = []
        self._row_bytes = 1

    def _find(self, number: int) -> Any:
        try:
            return self._ray.get_actor(_actor_name(self.name, number), namespace=NAMESPACE)
        except ValueError as err:
            raise ConnectionError(f"ray://{self.name}: there is no actor {_actor_name(self.name, number)!r} in the Ray namespace "
                                  f"{NAMESPACE!r}: {_last_line(err)}") from None

    def describe(self) -> Description:
        """What the table is, as all actors say it."""
        said = [self._describe(0)]
        self._bounds = said[0]["bounds"]
        for number in range(1, len(self._bounds) - 1):
            self._actors.append(self._find(number))
            said.append(self._describe(number))
            if said[number]["table"] != said[0]["table"] or said[number]["bounds"] != self._bounds:
                raise OSError(f"ray://{self.name}: {self._who(number)} serves another table than "
                              f"{_actor_name(self.name, 0)!r}: fingerprint {said[number]['table']['fingerprint']}, expected "
                              f"{said[0]['table']['fingerprint']}")
        described = Description.read(f"ray://{self.name}", said[0]["table"])
        self._row_bytes = max(described.row_bytes + described.scale_bytes, 1)
        return described

    def _describe(self, number: int) -> Any:
        deadline = time.monotonic() + self._timeout_s
        return self._answer(self._actors[number].describe.remote(), number, deadline, None)

    def fetch(self, ids: bytes, watch: Any) -> Iterator[Piece]:
        """The rows of distinct ids, in pieces of some megabytes; several are on their way at a time."""
        return fetched(f"ray://{self.name}", self._process, ids, lambda wanted: self._pieces(wanted, watch))

    def _pieces(self, ids: Any, watch: Any) -> Iterator[Piece]:
        deadline = time.monotonic() + self._timeout_s
        most = max(min(_CALL_IDS, _CALL_BYTES // self._row_bytes), 1)
        ends = np.searchsorted(ids, self._bounds)
        if self._bounds[-1] < 1 << 31:
            ids = ids.astype(np.int32)  # half to send
        calls = ((number, ids[begin:min(begin + most, ends[number + 1])]) for number in range(len(self._actors))
                 for begin in range(ends[number], ends[number + 1], most))
        asked: collections.deque[tuple[int, Any]] = collections.deque()
        for number, part in calls:
            if len(asked) == _CALLS:
                yield self._answer(asked[0][1], asked[0][0], deadline, watch)
                asked.popleft()
                if watch.cancelled():
                    yield None
                    return
            asked.append((number, self._ask(number, part)))
        while asked:
            number, answer = asked.popleft()
            yield self._answer(answer, number, deadline, watch)

    def _ask(self, number: int, ids: Any) -> Any:
        try:
            return self._actors[number].read.remote(ids)
        except Exception as err:  # such as of Ray, which was shut down
            raise self._error(number, err) from err

    def _answer(self, answer: Any, number: int, deadline: float, watch: Any) -> Any:
        """What an actor answers; None: the request was given up."""
        ray = self._ray
        while True:
            try:
                return ray.get(answer, timeout=_SLICE_S)
            except ray.exceptions.GetTimeoutError:
                if watch is not None and watch.cancelled():
                    return None
            except Exception as err:
                raise self._error(number, err) from err
            if time.monotonic() > deadline:
                raise TimeoutError(f"ray://{self.name}: {self._who(number)} did not answer in {self._timeout_s} s")

    def _error(self, number: int, err: Exception) -> OSError:
        failed = self._ray.exceptions
        cause = err.cause if isinstance(err, failed.RayTaskError) and isinstance(err.cause, Exception) else err
        if isinstance(cause, OSError) and not isinstance(cause, failed.RayError):
            return OSError(cause.errno or 5, f"ray://{self.name}: {self._who(number)}: {cause.strerror or cause}")
        again = "; where serve_rows was called again since, connect again" if isinstance(cause, failed.ActorDiedError) else ""
        return ConnectionError(f"ray://{self.name}: {self._who(number)} did not answer: {_last_line(cause)}{again}")

    def _who(self, number: int) -> str:
        rows = f" (rows [{self._bounds[number]}, {self._bounds[number + 1]}))" if self._bounds else ""
        return f"actor {_actor_name(self.name, number)!r}{rows}"


ENGINES["ray"] = RayClient
