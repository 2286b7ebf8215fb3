"""Files: written whole or not at all, and JSON from files that nobody vouches for."""
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows, where the references run
    fcntl = None  # type: ignore[assignment]

MESSAGE_CHARS = 200  # of what a file says, in a message


def shorten(value: object) -> str:
    """`value` as text of at most MESSAGE_CHARS characters: what a message shows of a name or value out of a file."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= MESSAGE_CHARS else f"{text[:MESSAGE_CHARS - 3]}..."


@contextmanager
def naming_path(op: str, path: Path, step: str) -> Iterator[None]:
    """Turns an OSError of the block into one that names the op, the path and the step that failed."""
    try:
        yield
    except OSError as err:
        raise OSError(err.errno, f"{op}: {step}: {err.strerror}", str(path)) from err


@contextmanager
def replacing(op: str, path: Path, prepare: Callable[[int], None] | None = None) -> Iterator[int]:
    """A file descriptor of a new file that takes the place of `path` when the block ends, whole and on disk, or not at all.

    A process that is killed leaves a hidden ``.<name>.<random>.tmp`` beside the path, never a partial file at it.

    Args:
        op: named by the errors.
        path: where the file shall be; its directory must exist. An old file stays until the last moment.
        prepare: takes the file descriptor before the block, such as to reserve space.

    Yields:
        The descriptor, open for reading and writing.

    Raises:
        OSError: a step failed; names the op, the path and the step. Nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # of its own, whatever other writers do
    with naming_path(op, path, "cannot be created in its directory"):
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            if prepare is not None:
                prepare(fd)
            yield fd
            with naming_path(op, path, "cannot be synced"):
                os.fsync(fd)
        finally:
            os.close(fd)
        with naming_path(op, path, "cannot be put in place"):
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with naming_path(op, path, "is in place and whole, but its directory cannot be synced"):
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextmanager
def one_maker(op: str, path: Path) -> Iterator[None]:
    """Keeps every other block of the same `path` waiting, in any thread or process, until this one ends.

    What the block makes is there for the next one, which looks first. Meanwhile a hidden ``.<name>.making`` is beside the path.

    Raises:
        OSError: the directory is missing or read-only; names the op and the path.
    """
    waiting = path.with_name(f".{path.name}.making")
    with naming_path(op, path, "cannot be created in its directory"):
        fd = os.open(waiting, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
        waiting.unlink(missing_ok=True)  # not after a failure: those who wait and those who come must meet at one file
    finally:
        os.close(fd)


def write_all(fd: int, data: Any, at: int = 0) -> None:
    """Writes a vector of bytes at byte `at` of a file, however many calls that takes."""
    view = memoryview(data)
    while len(view) > 0:
        written = os.pwrite(fd, view, at)
        at, view = at + written, view[written:]


def write_atomic(op: str, path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` so that a reader of `path` sees the old file or the whole new one.

    Raises:
        OSError: a step failed, such as for want of space; names the op, the path and the step. The old file is whole.
    """
    path = Path(path)
    with replacing(op, path) as fd, naming_path(op, path, f"{len(data)} bytes cannot be written"):
        write_all(fd, data)


def parse_json(data: str | bytes) -> Any:
    """What JSON text says, in time and memory that grow with its length.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or names a field twice in one object.
    """
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    raise ValueError(f"it names {shorten(name)!r} twice")
                seen.add(name)
        return result

    try:
        return json.loads(data, object_pairs_hook=without_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(where: str | None, content: dict[str, Any]) -> None:
    """Writes what a command found as JSON: to the file `where`, to the output for "-", nowhere for None."""
    if where is None:
        return
    text = json.dumps(content, indent=2) + "\n"
    if where == "-":
        print(text, end="")
        return
    Path(where).write_text(text, encoding="utf-8")
