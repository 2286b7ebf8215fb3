"""safetensors files by extents: the header is read and checked, the data is not; and files written whole or not at all.

Format: 8 bytes little-endian header length, a JSON header, the data. Source: huggingface/safetensors README.
"""
import dataclasses
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engram_kernels import capacity
from engram_kernels._files import naming_path, parse_json, replacing, shorten, write_all

MAX_HEADER_BYTES = 16 * 2**20  # of some 150,000 tensors; Python's objects of a header take up to 30 times its bytes
_MAX_DIMS = 64  # as torch
_ALIGN_BYTES = 4096  # data of files that we write starts on a page, which direct reads want
_DTYPE_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
                "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1}


@dataclasses.dataclass(frozen=True)
class Extent:
    """Where a tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file holds."""

    extents: dict[str, Extent]
    metadata: dict[str, str]


def open_regular(path: Path, op: str = "RowTable.open") -> int:
    """A descriptor of a regular file. OSError names the path and why not; a directory or a pipe is refused, not waited for."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as err:
        raise OSError(err.errno, f"{op}: {err.strerror}", str(path)) from None
    except ValueError as err:  # a name with a zero byte
        raise ValueError(f"{op}: {shorten(str(path))!r} is no path: {err}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError(f"{op}: {path} is no regular file, expected a safetensors file")
    return fd


def other_kind(first: bytes) -> str | None:
    """What a file is that begins so, where that is a known kind and no safetensors file."""
    if first.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, which stands for the file: fetch the file itself with `git lfs pull`"
    if first.lstrip().startswith(b"{"):
        return "it is JSON, expected a header of 8 bytes first; an index of a checkpoint has a name that ends with .json"
    return None


def read_header(fd: int, path: Path, op: str = "RowTable.open") -> Header:
    """Reads and checks the header of an open file: every extent inside the file, none overlapping, no byte unaccounted for.

    Raises:
        ValueError: the file is empty, truncated or corrupt; names the path and the numbers that disagree.
        OSError: it cannot be read.
    """
    file_bytes = os.fstat(fd).st_size

    def refuse(why: str) -> ValueError:
        return ValueError(f"{op}: {path} is no whole safetensors file: {why}")

    try:
        if (kind := other_kind(read_bytes(fd, 0, 64))) is not None:
            raise refuse(kind)
        if file_bytes < 8:
            raise refuse(f"it has {file_bytes} bytes, the header length alone takes 8")
        header_bytes = int.from_bytes(read_bytes(fd, 0, 8), "little")
        if header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
            raise refuse(f"its header should have {header_bytes} bytes, the file has {file_bytes - 8} after the length "
                         f"(and at most {MAX_HEADER_BYTES} are allowed)")
        text = read_bytes(fd, 8, header_bytes)
    except OSError as err:
        raise OSError(err.errno, f"{op}: {err.strerror}", str(path)) from None
    if len(text) != header_bytes:
        raise refuse(f"its header should have {header_bytes} bytes, {len(text)} could be read")
    try:
        entries = parse_json(text.decode("utf-8"))
    except ValueError as err:
        raise refuse(f"its header of {header_bytes} bytes is not valid: {shorten(str(err))}") from None
    if not isinstance(entries, dict):
        raise refuse("its header is no JSON object")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise refuse("its __metadata__ is no map of strings")
    data_start = 8 + header_bytes
    extents = {}
    for name, entry in entries.items():
        try:
            extents[name] = _extent(entry, data_start)
        except ValueError as err:
            raise refuse(f"tensor {shorten(name)!r} {shorten(str(err))}") from None
    _check_cover(extents, data_start, file_bytes, refuse)
    return Header(extents, metadata)


def _is_size(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**63


def _extent(entry: Any, data_start: int) -> Extent:
    if not isinstance(entry, dict):
        raise ValueError(f"is described by {entry!r}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(shape, list) and len(shape) <= _MAX_DIMS and all(_is_size(s) for s in shape)):
        raise ValueError(f"has shape {shape!r}")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(_is_size(o) for o in offsets) and offsets[0] <= offsets[1]):
        raise ValueError(f"has data_offsets {offsets!r}, expected [begin, end]")
    if not isinstance(dtype, str):
        raise ValueError(f"has dtype {dtype!r}")
    num_bytes = offsets[1] - offsets[0]
    # dtypes that we do not know (packed ones exist) are left to whoever asks for such a tensor
    if dtype in _DTYPE_BYTES and math.prod(shape) * _DTYPE_BYTES[dtype] != num_bytes:
        raise ValueError(f"has {num_bytes} bytes, expected {math.prod(shape) * _DTYPE_BYTES[dtype]} for {dtype} {shape}")
    if dtype == "F4":  # two elements per byte, which nobody here takes apart: the bytes
        if not shape or shape[-1] % 2 or math.prod(shape) != num_bytes * 2:
            raise ValueError(f"has {num_bytes} bytes, expected two elements of F4 {shape} in each")
        dtype, shape = "U8", [*shape[:-1], shape[-1] // 2]
    return Extent(dtype, tuple(shape), data_start + offsets[0], num_bytes)


def _check_cover(extents: dict[str, Extent], data_start: int, file_bytes: int, refuse: Any) -> None:
    end, before = data_start, "the header"
    for name, extent in sorted(extents.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if extent.offset != end:
            raise refuse(f"tensor {shorten(name)!r} begins at byte {extent.offset}, {before} ends at {end}: they "
                         f"{'overlap' if extent.offset < end else 'leave a hole'}")
        end, before = extent.offset + extent.num_bytes, f"tensor {shorten(name)!r}"
    if end != file_bytes:
        raise refuse(f"its tensors end at byte {end}, the file has {file_bytes} bytes" +
                     (" (truncated)" if end > file_bytes else ""))


def read_bytes(fd: int, at: int, num_bytes: int) -> bytes:
    """Bytes of an open file; fewer where it ends before."""
    pieces = []
    while num_bytes > 0 and (piece := os.pread(fd, num_bytes, at)):
        pieces.append(piece)
        at, num_bytes = at + len(piece), num_bytes - len(piece)
    return b"".join(pieces)


class Writer:
    """Writes tensors of an open file at their places."""

    def __init__(self, fd: int, extents: dict[str, Extent]):
        self._fd, self._extents = fd, extents

    def write(self, name: str, at: int, data: Any) -> None:
        """Writes a vector of bytes at byte `at` of tensor `name`."""
        view, extent = memoryview(data), self._extents[name]
        if at + len(view) > extent.num_bytes:
            raise ValueError(f"{name}: bytes {at}..{at + len(view)} are beyond its {extent.num_bytes}")
        write_all(self._fd, view, extent.offset + at)


def lay_out(tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> tuple[bytes, dict[str, Extent], int]:
    """The first bytes of a file of these tensors (safetensors dtype and shape by name), where each lies, and its size."""
    extents, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        num_bytes = math.prod(shape) * _DTYPE_BYTES[dtype]
        extents[name] = Extent(dtype, shape, offset, num_bytes)
        offset += num_bytes
    entries: dict[str, Any] = {"__metadata__": metadata}
    for name, e in extents.items():
        entries[name] = {"dtype": e.dtype, "shape": e.shape, "data_offsets": [e.offset, e.offset + e.num_bytes]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN_BYTES)
    start = 8 + len(text)
    extents = {name: dataclasses.replace(e, offset=e.offset + start) for name, e in extents.items()}
    return len(text).to_bytes(8, "little") + text, extents, start + offset


@contextmanager
def atomic_writer(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str],
                  op: str = "RowTable.create") -> Iterator[Writer]:
    """A file that appears at `path` when the block ends, whole and on disk, or not at all; an old file stays until then.

    The space is reserved before anything is written, so a disk too full fails first. A process that is killed leaves a
    hidden ``.<name>.<random>.tmp`` beside the path, never a partial file at it.

    Args:
        path: where the file shall be; its directory must exist.
        tensors: safetensors dtype and shape by name, in file order.
        metadata: strings for the header.
        op: named by the errors.

    Yields:
        A `Writer` of the temporary file.

    Raises:
        OSError: a step failed, or there is no room (`CapacityError`); names the path and the step. Nothing is left behind.
    """
    header, extents, file_bytes = lay_out(tensors, metadata)
    capacity.check_directory(op, f"the file {path}", file_bytes, path.parent, capacity.DISK_REMEDY)

    def reserve(fd: int) -> None:
        with naming_path(op, path, f"{file_bytes} bytes cannot be reserved"):
            os.posix_fallocate(fd, 0, file_bytes)

    with replacing(op, path, reserve) as fd:
        with naming_path(op, path, "cannot be written"):
            write_all(fd, header)
        yield Writer(fd, extents)
