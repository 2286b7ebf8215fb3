"""The journal of a table file that is trained: what a step wrote, on disk before the table is touched.

A header of HEADER_BYTES names the state file; then one record per step, with every row and moment as the step left them. A record
counts once all of it is there, which its checksum says, so writing it again gives the state after the step, however often.
"""
from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engram_kernels._files import naming_path, parse_json, write_all
from engram_kernels.table.safetensors_file import read_bytes

HEADER_BYTES = 4096
_KIND = "engram_kernels step journal 1"
_MAGIC = b"EKSTEP01"
_RECORD = struct.Struct("<8sQQQI4x")  # magic, number of the step, rows, bytes behind this, checksum of both


def journal_path(table: Path) -> Path:
    """Where the journal of a table file is while it is trained."""
    return table.with_name(f"{table.name}.journal")


class StepJournal:
    """An open journal.

    Args:
        path: of the journal; it is made where there is none.
        state: what names the state file in it.

    Raises:
        ValueError: the file is no journal, or one of another state.
        OSError: it cannot be opened, read or written.
    """

    def __init__(self, op: str, path: Path, state: str):
        self.op, self.path, self.is_new = op, path, not path.exists()
        with naming_path(op, path, "the journal cannot be opened"):
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(self.fd).st_size
            if size < HEADER_BYTES:  # a process ended while it made it: no step was journaled
                self.is_new = True
                text = json.dumps({"kind": _KIND, "state": state}).encode().ljust(HEADER_BYTES)
                with naming_path(op, path, "the journal cannot be written"):
                    write_all(self.fd, text)
                    os.fsync(self.fd)
                    _sync_directory(path)
            else:
                self._check_header(state)
        except BaseException:
            os.close(self.fd)
            raise
        self.end = HEADER_BYTES

    def _check_header(self, state: str) -> None:
        try:
            header = parse_json(read_bytes(self.fd, 0, HEADER_BYTES))
        except ValueError:
            header = None
        if not isinstance(header, dict) or header.get("kind") != _KIND:
            raise ValueError(f"{self.op}: {self.path} is no journal of steps; it stands in the way of one")
        if header.get("state") != state:
            raise ValueError(f"{self.op}: {self.path} is the journal of a run with another state file, whose last steps it has; "
                             "open the table with that one, or remove the journal and put back a saved table")

    def records(self) -> Iterator[tuple[int, int, bytes]]:
        """(step, rows, bytes) of each whole record, in order; `end` is behind the last one then."""
        self.end = HEADER_BYTES
        while True:
            head = read_bytes(self.fd, self.end, _RECORD.size)
            if len(head) < _RECORD.size:
                return
            magic, step, count, num_bytes, crc = _RECORD.unpack(head)
            if magic != _MAGIC or num_bytes > os.fstat(self.fd).st_size - self.end:
                return
            body = read_bytes(self.fd, self.end + _RECORD.size, num_bytes)
            if len(body) < num_bytes or _checksum(step, count, num_bytes, [body]) != crc:
                return
            self.end += _RECORD.size + num_bytes
            yield step, count, body

    def append(self, step: int, count: int, parts: list[Any], durable: bool) -> None:
        """Adds a record; `durable`: it is on disk when this returns. OSError: nothing was added."""
        num_bytes, at = sum(memoryview(part).nbytes for part in parts), self.end + _RECORD.size
        crc = _checksum(step, count, num_bytes, parts)
        try:
            with naming_path(self.op, self.path, f"step {step} cannot be journaled, so the table and its state are those of step "
                                                 f"{step - 1}"):
                for part in parts:
                    write_all(self.fd, part, at)
                    at += memoryview(part).nbytes
                write_all(self.fd, _RECORD.pack(_MAGIC, step, count, num_bytes, crc), self.end)
                if durable:
                    os.fdatasync(self.fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, self.end)
            raise
        self.end = at

    def clear(self) -> None:
        """Forgets all records: the table and the state are on disk."""
        with naming_path(self.op, self.path, "the journal cannot be shortened"):
            os.ftruncate(self.fd, HEADER_BYTES)
            os.fsync(self.fd)
        self.end = HEADER_BYTES

    def close(self, remove: bool) -> None:
        """Closes it, and removes it where nothing is left to do."""
        if remove:
            self.path.unlink(missing_ok=True)
            _sync_directory(self.path)
        os.close(self.fd)


def _checksum(step: int, count: int, num_bytes: int, parts: list[Any]) -> int:
    crc = zlib.crc32(_RECORD.pack(_MAGIC, step, count, num_bytes, 0))
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def _sync_directory(path: Path) -> None:
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
