"""Rows of a table in Mooncake Store, a distributed store in the memory of many machines: written once, read by ranges.

A table is objects of many rows each, and last a manifest that says what they are. Each row lies with its scales behind it, so
that it is one range. The objects of a write have a generation in their keys: a reader holds to the one that it found.
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from engram_kernels._checks import expect_choice, expect_int
from engram_kernels.row_format import row_format_of
from engram_kernels.table.remote_rows import ENGINES, Description, Piece, fetched
from engram_kernels.table.row_table import RowTable

_OP = "store_rows"
_VERSION = 1
_OBJECT_BYTES = 16 << 20
_BUFFER_BYTES = 64 << 20  # of the engine, for objects on their way: two and more of ours
_MASTER_S = 10.0  # until a master that takes no connection is given up
_PIECE_ROWS = 1024  # between two looks whether the request was given up: 0.06 s over TCP
_GONE = -704
# what get_into_ranges and put return, as far as an error text has a use for it
_ERRORS = {-200: "no memory is left in the store", -704: "there is no such object (it was removed, or evicted)",
           -705: "the object exists already", -707: "its lease expired while it was read", -800: "the transfer failed",
           -900: "the master does not answer"}


def _mooncake() -> Any:
    try:
        import mooncake.store
    except ImportError as err:
        raise RuntimeError(f"Mooncake is needed for rows in Mooncake Store: {err}; pip install 'engram-kernels[mooncake]', and "
                           "Debian's libibverbs1, libnl-3-200 and libnl-route-3-200") from None
    return mooncake.store


def _said(code: object) -> str:
    return f"{code}: {_ERRORS[code]}" if isinstance(code, int) and code in _ERRORS else str(code)


def _expect_master(op: str, master: str, host: str, port: int) -> None:
    """The engine itself tries for 90 s, in which nothing can interrupt it, and then says -1."""
    try:
        with socket.create_connection((host, port), _MASTER_S):
            pass
    except OSError as err:  # a name that nobody knows, too
        raise ConnectionError(f"{op}: mooncake://{master}: no master answers there: {err}") from None


class _Connection:
    """A client of the store; its memory, where it lends any, is the store's while it lives."""

    def __init__(self, op: str, rest: str, protocol: str, rdma_devices: str, local_hostname: str | None, segment_bytes: int = 0):
        self.master, _, self.name = rest.partition("/")
        host, _, port = self.master.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16 or not self.name:
            raise ValueError(f"{op}: address is 'mooncake://{rest}', expected 'mooncake://HOST:PORT/NAME', the master's host and "
                             "port and the name of a table")
        expect_choice(op, "protocol", protocol, ("tcp", "rdma"))  # another one costs 25 s, and then is -1
        store = _mooncake()
        _expect_master(op, self.master, host.strip("[]"), int(port))
        local_hostname = local_hostname or ("127.0.0.1" if host in ("127.0.0.1", "localhost") else os.uname().nodename)
        self.store, self.process, self.closed = store.MooncakeDistributedStore(), os.getpid(), False
        code = self.store.setup(local_hostname, "P2PHANDSHAKE", segment_bytes, _BUFFER_BYTES, protocol, rdma_devices, self.master)
        if code != 0:
            raise ConnectionError(f"{op}: mooncake://{self.master}: this process cannot join the store: {_said(code)}")

    @property
    def where(self) -> str:
        return f"mooncake://{self.master}/{self.name}"

    @property
    def manifest_key(self) -> str:
        return f"engram_kernels/{self.name}"

    def manifest(self) -> dict[str, Any] | None:
        """What is said of the table now; None: nothing. OSError where the store cannot be asked."""
        key, found = self.manifest_key, self.store.is_exist(self.manifest_key)
        if found == 0:
            return None
        if found != 1:
            raise ConnectionError(f"mooncake://{self.master}: key {key!r} cannot be looked for: {_said(found)}")
        text = self.store.get(key)
        if not text:
            raise ConnectionError(f"mooncake://{self.master}: key {key!r} cannot be read: its server is lost, or it was removed")
        try:
            manifest: dict[str, Any] = json.loads(text)
            if manifest["version"] != _VERSION:
                raise ValueError(f"version {manifest['version']}, expected {_VERSION}")
            return manifest
        except (KeyError, TypeError, ValueError) as err:
            raise OSError(f"mooncake://{self.master}: key {key!r} is no manifest of a table: {err}") from None

    def close(self) -> None:
        if os.getpid() == self.process and not self.closed:  # a child after a fork has none of the engine's threads
            self.closed = True  # from here on a call into the engine would be a segmentation fault
            with contextlib.suppress(Exception):
                self.store.close()


class StoredRows:
    """A table in the store. Where this process lends the memory, the rows are there until `close`.

    Attributes:
        address: "mooncake://HOST:PORT/NAME", for `RowTable.connect`.
        generation: of this write.
        keys: of the objects and, last, the manifest.
    """

    def __init__(self, connection: _Connection, generation: str, keys: list[str]):
        self._connection, self.address, self.generation, self.keys = connection, connection.where, generation, keys

    def remove(self) -> None:
        """Takes the table out of the store; what is gone already is none of it.

        Raises:
            RuntimeError: after `close`, or in a child after a fork.
            ConnectionError: the master is lost; names the key.
        """
        connection = self._connection
        if connection.closed or os.getpid() != connection.process:
            why = "is closed here" if connection.closed else "was stored before a fork; its parent can remove it"
            raise RuntimeError(f"StoredRows.remove: {self.address} {why}")
        for key in reversed(self.keys):
            if (code := connection.store.remove(key, True)) not in (0, _GONE):
                raise ConnectionError(f"StoredRows.remove: mooncake://{connection.master}: key {key!r}: {_said(code)}")

    def close(self) -> None:
        """Leaves the store, which takes back the memory that this process lends."""
        self._connection.close()

    def __enter__(self) -> StoredRows:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def store_rows(table: RowTable, address: str, *, replace: bool = False, replicas: int = 1, object_bytes: int = _OBJECT_BYTES,
               segment_bytes: int = 0, protocol: str = "tcp", rdma_devices: str = "",
               local_hostname: str | None = None) -> StoredRows:
    """Puts a table into Mooncake Store, as objects of many rows that are never evicted (hard pins).

    Args:
        table: any; of a file, rows pass in pieces.
        address: "mooncake://HOST:PORT/NAME": the master, and a name for the table.
        replace: put the table in the place of one of that name, whose readers then fail and have to connect again.
        replicas: copies of each object, on as many servers; where there are fewer, the engine makes fewer.
        object_bytes: of an object, at most.
        segment_bytes: memory that this process lends to the store; 0: others lend it (such as `mooncake_client`).
        protocol: "tcp" or "rdma".
        rdma_devices: names of RDMA devices; "": as the engine finds them.
        local_hostname: how the others reach this process; None: its host name.

    Returns:
        A StoredRows: keep it where this process lends memory.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: there is a table of that name.
        OSError: the store cannot be reached, or has no room; names host and key. Nothing is left behind.
        RuntimeError: Mooncake is not installed.

    Source: docs/remote.md.
    """
    scheme, _, rest = str(address).partition("://")
    if scheme != "mooncake":
        raise ValueError(f"{_OP}: address is {address!r}, expected 'mooncake://HOST:PORT/NAME'")
    if not isinstance(table, RowTable):
        raise TypeError(f"{_OP}: table is {type(table).__name__}, expected a RowTable")
    expect_int(_OP, "replicas", replicas, 1, 64)
    expect_int(_OP, "segment_bytes", segment_bytes, 0, 2**63 - 1)
    expect_int(_OP, "object_bytes", object_bytes, 1, _BUFFER_BYTES // 2)
    described = Description.of(table)
    row_bytes = described.row_bytes + described.scale_bytes
    chunk_rows = max(object_bytes // max(row_bytes, 1), 1)
    connection = _Connection(_OP, rest, protocol, rdma_devices, local_hostname, segment_bytes)
    generation, written = secrets.token_hex(8), []
    try:
        old = connection.manifest()
        if old is not None and not replace:
            raise FileExistsError(f"{_OP}: {address}: there is a table of that name, with fingerprint "
                                  f"{old['table']['fingerprint']}; replace=True takes its place")
        config = _mooncake().ReplicateConfig()
        config.replica_num, config.with_hard_pin = replicas, True
        num_objects = -(-described.num_rows // chunk_rows)
        keys = _object_keys(connection, generation, num_objects)
        for number, key in enumerate(keys):
            begin = number * chunk_rows
            _put(connection, key, _chunk(table, begin, min(chunk_rows, described.num_rows - begin), described), config)
            written.append(key)
        text = json.dumps({"version": _VERSION, "generation": generation, "chunk_rows": chunk_rows,
                           "table": dataclasses.asdict(described)}).encode()
        if old is None:
            _put(connection, connection.manifest_key, text, config)
        elif (code := connection.store.upsert(connection.manifest_key, text, config)) != 0:
            raise OSError(f"{_OP}: mooncake://{connection.master}: key {connection.manifest_key!r}: {_said(code)}")
        keys, written = [*written, connection.manifest_key], []  # the manifest names the objects: from here on they stay
        if old is not None:
            for key in _object_keys(connection, old["generation"], -(-old["table"]["num_rows"] // old["chunk_rows"])):
                connection.store.remove(key, True)
    except BaseException:
        for key in written:
            connection.store.remove(key, True)
        connection.close()
        raise
    return StoredRows(connection, generation, keys)


def _object_keys(connection: _Connection, generation: str, count: int) -> list[str]:
    return [f"{connection.manifest_key}/{generation}/{number}" for number in range(count)]


def _put(connection: _Connection, key: str, value: Any, config: Any) -> None:
    code = connection.store.put(key, value, config)
    if code != 0:
        raise OSError(f"{_OP}: mooncake://{connection.master}: key {key!r} cannot be put: {_said(code)}")


def _chunk(table: RowTable, begin: int, count: int, described: Description) -> Any:
    """Rows from `begin` on as bytes, each with its scales behind it."""
    rows, scales = table.read_rows(torch.arange(begin, begin + count, device=table.device))
    stored = np.empty((count, described.row_bytes + described.scale_bytes), np.uint8)
    stored[:, :described.row_bytes] = rows.detach().cpu().view(torch.uint8).numpy()
    if described.scale_bytes and scales is not None:
        stored[:, described.row_bytes:] = scales.cpu().view(torch.uint8).numpy()
    return stored.reshape(-1)


class MooncakeClient:
    """A client of a table that `store_rows` put into the store, or of one that Mooncake's own `EngramStore` populated: that has
    the key engram:lLAYER for a name, one object per head, and no manifest, so that the caller says what its rows are.

    Calls may come from several threads, one piece of rows at a time; a child after a fork makes its own.
    """

    def __init__(self, rest: str, timeout_s: float, protocol: str = "tcp", rdma_devices: str = "",
                 local_hostname: str | None = None, row_format: str | None = None, row_dim: int | None = None,
                 table_vocab_sizes: list[int] | None = None):
        self._connection = _Connection("RowTable.connect", rest, protocol, rdma_devices, local_hostname)
        self._timeout_s, self._process, self._lock = timeout_s, os.getpid(), threading.Lock()
        self._stored = (row_format, row_dim, table_vocab_sizes)
        self._generation: str | None = None
        self._row_bytes = self._scale_bytes = 0
        self._bounds: Any = None  # the first row of each object, and the number of rows
        self._keys: list[str] = []
        self._buffer: Any = None  # registered with the engine, which writes into it: held as long as the engine lives
        self._lookup: Any = None

    def __del__(self) -> None:
        if hasattr(self, "_connection"):
            self._connection.close()

    def describe(self) -> Description:
        """What the table is: out of its manifest, or what the caller says of one without."""
        connection, (row_format, row_dim, sizes) = self._connection, self._stored
        if sizes is not None:
            return self._describe_heads(row_format, row_dim, sizes)
        if row_format is not None or row_dim is not None:
            raise ValueError(f"RowTable.connect: row_format is {row_format!r} and row_dim {row_dim!r}, expected neither without "
                             "table_vocab_sizes: a table of store_rows says itself what its rows are")
        manifest = connection.manifest()
        if manifest is None:
            raise FileNotFoundError(f"mooncake://{connection.master}: there is no key {connection.manifest_key!r}: no table "
                                    "of that name")
        described = Description.read(f"{connection.where}, key {connection.manifest_key!r}", manifest["table"])
        self._generation, chunk_rows = manifest["generation"], manifest["chunk_rows"]
        self._bounds = np.append(np.arange(0, described.num_rows, chunk_rows), described.num_rows)
        self._keys = _object_keys(connection, str(self._generation), len(self._bounds) - 1)
        self._row_bytes, self._scale_bytes = described.row_bytes, described.scale_bytes
        self._make_buffer(_PIECE_ROWS)
        return described

    def _describe_heads(self, row_format: str | None, row_dim: int | None, sizes: list[int]) -> Description:
        """Describes a layer that EngramStore populated: its rows are those of its heads, one behind the other."""
        name = self._connection.name
        layer = name.removeprefix("engram:l")
        if row_format is None or row_dim is None or not layer.isdigit() or layer == name:
            raise ValueError(f"RowTable.connect: {self._connection.where}: table_vocab_sizes is that of an EngramStore layer, "
                             "whose name is engram:lLAYER, and needs row_format and row_dim")
        if not isinstance(sizes, list) or not sizes or not all(isinstance(x, int) and x > 0 for x in sizes):
            raise ValueError(f"RowTable.connect: table_vocab_sizes is {sizes!r}, expected the rows of each head")
        fmt = row_format_of("RowTable.connect", row_format)
        described = Description(row_format, row_dim, sum(sizes), fmt.width(row_dim), False, 1.0, None, "")
        if described.scale_bytes or fmt.has_table_scale or (fmt.scale_dtype is not None and not fmt.has_row_scales):
            raise ValueError(f"RowTable.connect: row_format is {row_format!r}, expected one whose rows hold their scales")
        self._bounds = np.concatenate([[0], np.cumsum(sizes)])
        self._keys = [f"{name}:h{head}" for head in range(len(sizes))]
        self._row_bytes = described.row_bytes
        store = _mooncake()
        if hasattr(store.EngramStore, "lookup_into"):  # Mooncake after #4065
            config = store.EngramStoreConfig()
            config.table_vocab_sizes, config.row_bytes = list(sizes), self._row_bytes
            self._lookup = (store.EngramStore({int(layer): config}, self._connection.store), int(layer))
        self._make_buffer(_PIECE_ROWS * (len(sizes) if self._lookup else 1))
        return described

    def _make_buffer(self, num_rows: int) -> None:
        self._buffer = np.empty(max(num_rows * (self._row_bytes + self._scale_bytes), 1), np.uint8)
        code = self._connection.store.register_buffer(self._buffer.ctypes.data, self._buffer.nbytes)
        if code != 0:
            raise OSError(f"{self._connection.where}: {self._buffer.nbytes} bytes cannot be registered with the engine: "
                          f"{_said(code)}")

    def fetch(self, ids: bytes, watch: Any) -> Iterator[Piece]:
        """The rows of distinct ids, in pieces."""
        return fetched(self._connection.where, self._process, ids, lambda wanted: self._pieces(wanted, watch))

    def _pieces(self, ids: Any, watch: Any) -> Iterator[Piece]:
        deadline = time.monotonic() + self._timeout_s
        for begin in range(0, ids.size, _PIECE_ROWS):
            if watch.cancelled():
                yield None
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._connection.where}: {ids.size} rows did not arrive in {self._timeout_s} s")
            with self._lock:
                part = ids[begin:begin + _PIECE_ROWS]
                stored = self._look_up(part) if self._lookup else self._read_ranges(part)
            rows, scales = np.ascontiguousarray(stored[:, :self._row_bytes]), None
            if self._scale_bytes:
                scales = np.ascontiguousarray(stored[:, self._row_bytes:])
            yield rows, scales

    def _read_ranges(self, ids: Any) -> Any:
        """Rows with their scales; neighbours in an object are one range."""
        size = self._row_bytes + self._scale_bytes
        objects = np.searchsorted(self._bounds, ids, "right") - 1
        begins = np.flatnonzero(np.append(True, (np.diff(ids) != 1) | (np.diff(objects) != 0)))
        lengths = np.diff(np.append(begins, ids.size))
        of_object = objects[begins]
        sources = (ids[begins] - self._bounds[of_object]) * size
        firsts = np.flatnonzero(np.append(True, np.diff(of_object) != 0))
        keys = [self._keys[number] for number in of_object[firsts]]
        targets, sources, sizes = ([x.tolist() for x in np.split(array, firsts[1:])]
                                   for array in (begins * size, sources, lengths * size))
        try:
            answers = self._connection.store.get_into_ranges([self._buffer.ctypes.data], [keys], [targets], [sources], [sizes])[0]
        except Exception as err:  # the engine raises what it likes
            raise self._error(keys[0], err) from err
        for key, got, asked in zip(keys, answers, sizes, strict=True):
            if list(got) != asked:
                raise self._error(key, next((x for x, y in zip(got, asked, strict=False) if x != y), "it answered nothing"))
        return self._buffer[:ids.size * size].reshape(ids.size, size).copy()  # the buffer is that of the next piece

    def _look_up(self, ids: Any) -> Any:
        """Reads the rows of `ids` by `EngramStore.lookup_into`, which takes an id of every head at a time."""
        store, layer = self._lookup
        heads = np.searchsorted(self._bounds, ids, "right") - 1
        local = ids - self._bounds[heads]
        place = np.arange(ids.size) - np.searchsorted(heads, heads)
        grid = np.zeros((1, int(place.max()) + 1, len(self._keys)), np.int64)
        grid[0, place, heads] = local
        out = self._buffer[:grid.size * self._row_bytes].reshape(*grid.shape, self._row_bytes)
        try:
            code = store.lookup_into(layer, grid, out)
        except Exception as err:
            raise self._error(self._keys[int(heads[0])], err) from err
        if isinstance(code, int) and code < 0:
            raise self._error(self._keys[int(heads[0])], code)
        return out[0, place, heads]

    def _error(self, key: str, said: object) -> OSError:
        """What to raise where an object cannot be read: names the host, the key and, where it is another, the generation."""
        now = ""
        if self._generation is not None:
            with contextlib.suppress(OSError):
                manifest = self._connection.manifest()
                found = None if manifest is None else manifest["generation"]
                if found != self._generation:
                    now = f"; the table of generation {self._generation} is gone, there is " + (
                        "none of that name now" if found is None else f"one of generation {found} now: connect again")
        what = _said(said) if isinstance(said, int) else f"{type(said).__name__}: {said}" if isinstance(said, Exception) else said
        return ConnectionError(f"mooncake://{self._connection.master}: key {key!r} cannot be read: {what}{now}")


ENGINES["mooncake"] = MooncakeClient
