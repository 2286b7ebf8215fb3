"""Segments that processes of one machine share: a file in memory with a manifest, counted by locks that die with their holder.

A segment is a file ``engram-NAME`` in a directory of tmpfs. Byte 0: the manifest, one page; byte 2 MiB: the data. Its maker
holds an exclusive lock (flock) while it fills it, every user a shared one afterwards. Locks belong to open files: the kernel
drops those of a process that dies in any way. So a segment that is locked exclusively is being filled, one that is locked is in
use, and one that is not is nobody's: the next one who comes along removes it. What the file says of its owner is for messages.
"""
from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import secrets
import stat
import struct
import time
import zlib
from pathlib import Path

from engram_kernels import capacity
from engram_kernels.row_format import check_shape
from engram_kernels.table.host_memory import TableLayout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX = "engram-"
DATA_OFFSET = 2 << 20
VERSION = 3
_MAGIC = b"EKSHARE\0"
_HEADER = struct.Struct("<8sIIII")  # magic, version, state, bytes of JSON, crc32 of what is before it here and of the JSON
HEADER_BYTES = 4096
_FILLING, _READY = 1, 2
POLL_S = 0.01
GRACE_S = 2.0  # for a last user that is just leaving


class NotOurs(ValueError):
    """A file that this version did not write: never removed."""


class HalfWritten(ValueError):
    """A segment whose maker died while filling it."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a segment holds."""

    row_format: str
    row_dim: int
    num_rows: int
    width: int  # elements from a row to the next
    zero_scale_is_zero: bool
    num_bytes: int  # of the data
    fingerprint: str
    table_scale: float = 1.0
    source_path: str = ""  # of the file that it was filled from; empty: from memory
    source_file: str = ""  # its device and inode
    source_changed_ns: int = 0  # when it was last written to
    owner_pid: int = dataclasses.field(default_factory=os.getpid)
    owner_start: int = dataclasses.field(default_factory=lambda: start_time(os.getpid()) or 0)

    def owner(self) -> str:
        """The maker of the segment, in words."""
        alive = self.owner_start != 0 and start_time(self.owner_pid) == self.owner_start
        return f"process {self.owner_pid}, which {'is running' if alive else 'is gone'}"


def start_time(pid: int) -> int | None:
    """When a process started, in ticks since boot: with its number it names a process for good. None: there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def segment_path(op: str, name: str, directory: str | os.PathLike[str]) -> Path:
    """The file of a segment. ValueError unless the name can be one."""
    capacity.expect_linux(op)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", name) or name.endswith(".tmp"):
        raise ValueError(f"{op}: name is {name!r}, expected 1 to 128 of letters, digits, '_', '-' and '.'")
    return Path(directory) / f"{PREFIX}{name}"


def write_manifest(fd: int, manifest: Manifest, ready: bool) -> None:
    """Writes the first page of a segment."""
    text = json.dumps(dataclasses.asdict(manifest)).encode()
    state = _READY if ready else _FILLING
    crc = zlib.crc32(_HEADER.pack(_MAGIC, VERSION, state, len(text), 0) + text)
    os.pwrite(fd, (_HEADER.pack(_MAGIC, VERSION, state, len(text), crc) + text).ljust(HEADER_BYTES, b"\0"), 0)


def read_manifest(op: str, fd: int, path: Path) -> Manifest:
    """The manifest of a segment that is locked. ValueError says what is wrong with it, with the numbers."""
    header = os.pread(fd, HEADER_BYTES, 0)
    if len(header) < _HEADER.size:
        raise NotOurs(f"{op}: {path} is no table segment: it has {len(header)} bytes")
    magic, version, state, text_bytes, crc = _HEADER.unpack(header[:_HEADER.size])
    if magic != _MAGIC:
        raise NotOurs(f"{op}: {path} is no table segment: it begins with {magic!r}, expected {_MAGIC!r}")
    if version != VERSION:
        raise NotOurs(f"{op}: {path} has version {version}, this is version {VERSION}: it is of another engram_kernels")
    text = header[_HEADER.size:_HEADER.size + text_bytes]
    if zlib.crc32(_HEADER.pack(_MAGIC, version, state, text_bytes, 0) + text) != crc:
        raise ValueError(f"{op}: {path} has a corrupt manifest: its checksum is not {crc:#x}")
    fields = json.loads(text)
    wanted = {field.name: str(field.type) for field in dataclasses.fields(Manifest)}
    kinds = {"int": int, "str": str, "bool": bool, "float": float}
    if set(fields) != set(wanted) or any(type(fields[name]) is not kinds[kind] for name, kind in wanted.items()):
        raise ValueError(f"{op}: {path} has a corrupt manifest: {fields}, expected {', '.join(wanted)}")
    manifest = Manifest(**fields)
    if state != _READY:
        raise HalfWritten(f"{op}: {path} is half-written: it was made by {manifest.owner()}, before it was full; share it anew")
    check_shape(f"{op}: {path}", manifest.row_format, manifest.row_dim, manifest.width)
    layout = TableLayout.of(manifest.row_format, manifest.num_rows, manifest.width, manifest.row_dim)
    if manifest.num_rows < 0 or layout.num_bytes != manifest.num_bytes:
        raise ValueError(f"{op}: {path} has a corrupt manifest: {manifest.num_bytes} bytes, but {manifest.num_rows} rows of "
                         f"{manifest.row_format}, {manifest.width} wide, take {layout.num_bytes}")
    size = os.fstat(fd).st_size
    if size != DATA_OFFSET + manifest.num_bytes:
        raise ValueError(f"{op}: {path} has {size} bytes, its manifest says {DATA_OFFSET + manifest.num_bytes}"
                         + (" (truncated)" if size < DATA_OFFSET + manifest.num_bytes else ""))
    return manifest


def create(op: str, path: Path, manifest: Manifest) -> int:
    """A new segment, without data, locked exclusively before anyone can see it: its descriptor.

    Raises:
        FileExistsError: there is one.
        OSError: it cannot be made; names the path.
    """
    while True:
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as err:
            raise OSError(err.errno, f"{op}: cannot be created: {err.strerror}", str(path)) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            write_manifest(fd, manifest, ready=False)
            os.link(temporary, path)
            return fd
        except FileNotFoundError:  # another process took it for a dead one's before it was locked
            os.close(fd)
        except BaseException:
            os.close(fd)
            raise
        finally:
            temporary.unlink(missing_ok=True)


def join(op: str, path: Path, timeout_s: float, wait_for_new: bool) -> tuple[int, Manifest]:
    """Opens a segment for use: its descriptor, with a shared lock, and what it holds.

    Args:
        op: who asks, for messages.
        path: of the segment.
        timeout_s: how long to wait for one that is being filled.
        wait_for_new: wait for one that is missing or half-written too: somebody may make it.

    Raises:
        FileNotFoundError: there is none, and none came in time.
        TimeoutError: it is still being filled.
        ValueError: it is broken; says how.
        OSError: it cannot be opened, or belongs to another user.
    """
    start = time.monotonic()
    while True:
        waited = time.monotonic() - start
        try:
            fd = _open(op, path)
        except FileNotFoundError:
            if not wait_for_new or waited >= timeout_s:
                raise
            time.sleep(POLL_S)
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            filling = _is_filling(fd)
            os.close(fd)
            if waited >= (timeout_s if filling else max(timeout_s, GRACE_S)):
                raise TimeoutError(errno.ETIMEDOUT, f"{op}: another process still "
                                   f"{'fills' if filling else 'locks'} it after {waited:.1f} s", str(path)) from None
            time.sleep(POLL_S)
            continue
        if not is_linked(fd, path):  # its last user left between the two calls
            os.close(fd)
            continue
        try:
            return fd, read_manifest(op, fd, path)
        except NotOurs:
            os.close(fd)
            raise
        except HalfWritten:
            release(fd, path)
            if not wait_for_new or waited >= timeout_s:
                raise
            time.sleep(POLL_S)
        except BaseException:
            release(fd, path)
            raise


def _open(op: str, path: Path) -> int:
    try:
        # for writing too: pinning asks for it
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, f"{op}: no process shares a table by this name", str(path)) from None
    except OSError as err:
        raise OSError(err.errno, f"{op}: cannot be opened: {err.strerror}", str(path)) from None
    info = os.fstat(fd)
    if stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid():
        return fd
    os.close(fd)
    if not stat.S_ISREG(info.st_mode):
        raise NotOurs(f"{op}: {path} is no regular file")
    raise PermissionError(errno.EACCES, f"{op}: belongs to user {info.st_uid}, this process runs as {os.geteuid()}", str(path))


def _is_filling(fd: int) -> bool:
    header = os.pread(fd, _HEADER.size, 0)
    return len(header) < _HEADER.size or _HEADER.unpack(header)[2] != _READY


def is_linked(fd: int, path: Path) -> bool:
    """Whether a path still leads to an open file."""
    try:
        info = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    mine = os.fstat(fd)
    return (info.st_dev, info.st_ino) == (mine.st_dev, mine.st_ino)


def release(fd: int, path: Path, pid: int | None = None) -> None:
    """Gives up a use of a segment; the last user removes it. A child of `pid` shares its lock: there only the descriptor goes."""
    try:
        if pid in (None, os.getpid()):
            with contextlib.suppress(BlockingIOError):  # others use it
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _unlink(fd, path)
    finally:
        os.close(fd)


def downgrade(fd: int, path: Path) -> bool:
    """Turns the lock of the maker into that of a user; False: the segment was lost in between, and is closed."""
    fcntl.flock(fd, fcntl.LOCK_SH)
    if is_linked(fd, path):
        return True
    os.close(fd)
    return False


def _unlink(fd: int, path: Path) -> None:
    """Removes a segment that is locked exclusively."""
    if is_linked(fd, path):
        path.unlink(missing_ok=True)


def remove_stale(path: Path) -> bool:
    """Removes a segment of this version that no process uses; whether it did."""
    try:
        fd = _open("", path)
    except (OSError, NotOurs):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        header = os.pread(fd, _HEADER.size, 0)
        ours = header[:12] == struct.pack("<8sI", _MAGIC, VERSION) or (not header and path.name.endswith(".tmp"))
        if not (ours and is_linked(fd, path)):
            return False
        _unlink(fd, path)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def num_users(fd: int) -> int | None:
    """How many hold a segment open for use, as far as this process can see; None: unknown."""
    info = os.fstat(fd)
    device = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    try:
        locks = Path("/proc/locks").read_text()
    except OSError:
        return None
    return sum(" FLOCK " in line and f" {device} " in line and "->" not in line for line in locks.splitlines())
