"""What the commands share on a terminal: tables and sentences, usage errors, progress."""
from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

_FOLDED = 30  # columns to which rich may fold a long text and it can still be read


class Printer:
    """Tables and sentences: rich on a terminal; plain text with NO_COLOR, without a terminal, or without rich.

    Args:
        out: where to; None: the standard output.
        console: rich's, instead.
    """

    def __init__(self, out: TextIO | None = None, console: Any = None):
        self._out = sys.stdout if out is None else out
        self._console = console
        self._width: int | None = None  # a file and a pipe have no end of a line
        if console is not None:
            self._width = console.width
        elif (columns := terminal_columns(self._out)) is not None:
            self._width = columns
            if "NO_COLOR" not in os.environ:
                try:
                    from rich.console import Console
                    self._console = Console(file=self._out, highlight=False, width=self._width)
                except ImportError:
                    pass

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str | None]) -> None:
        """A table; `styles` are rich's, a line each. Where the terminal is too narrow for one, a paragraph per line of it."""
        widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
        plain = self._console is None
        needed = sum(widths) + 2 * len(widths) if plain else sum(min(w, _FOLDED) for w in widths) + 3 * len(widths) + 1
        if self._width is not None and needed > self._width:
            for line, style in zip(rows, styles, strict=True):
                self._paragraph(head, line, style)
        elif plain:
            for line in [head, *rows]:
                print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip(), file=self._out)
        else:
            from rich.markup import escape
            from rich.table import Table
            table = Table(*head)
            for line, style in zip(rows, styles, strict=True):
                table.add_row(*map(escape, line), style=style)
            self._console.print(table)

    def _paragraph(self, head: Sequence[str], line: Sequence[str], style: str | None) -> None:
        """The first word as a title, then what the others are, broken between two of them where that is possible."""
        width = max(self._width or 0, 20)
        self.say("\n".join(textwrap.wrap(line[0], width)), style)
        current = ""
        for name, text in zip(head[1:], line[1:], strict=True):
            if not text or text == "-":
                continue
            part = f"{name}: {text}"
            if current and len(current) + len(part) + 5 > width:
                self._indented(current, width, style)
                current = ""
            current = f"{current} | {part}" if current else part
        self._indented(current, width, style)

    def _indented(self, text: str, width: int, style: str | None) -> None:
        if text:
            self.say("\n".join(textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")), style)

    def say(self, text: str = "", style: str | None = None) -> None:
        """A line, broken between words where a terminal is narrower."""
        if self._console is None:
            for line in text.split("\n"):
                long = self._width is not None and len(line) > max(self._width, 20)
                print(textwrap.fill(line, max(self._width or 0, 20)) if long else line, file=self._out)
        else:
            self._console.print(text, style=style, markup=False)


def terminal_columns(out: TextIO) -> int | None:
    """How wide a terminal is; None: `out` is a file or a pipe, where a line has no end."""
    return shutil.get_terminal_size().columns if out.isatty() else None


class UsageError(Exception):
    """An argument makes no sense; the message says which. The command ends with exit code 2."""


def finite(text: str) -> float:
    """A number of the command line, for argparse: "nan" and "inf" are none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return value


def is_stream(path: Path) -> bool:
    """Whether `path` is a device, a pipe or a socket, which is written to and not replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def expect_writable(option: str, path: Path | None) -> None:
    """Makes sure that a file can be written at `path`, its folder made where it is missing; None: nothing is asked.

    Raises:
        UsageError: it cannot; names the option and the reason.
    """
    if path is None:
        return
    try:
        if path.is_dir():
            raise UsageError(f"{option} {path} is a folder, expected a file")
        if is_stream(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(0, "it may not be written to")
        else:
            _expect_room(path.resolve().parent)
    except OSError as err:
        raise UsageError(f"{option} {path} cannot be written: {err.strerror}") from None


def expect_writable_folder(option: str, path: Path | None) -> None:
    """Raises UsageError unless files can be put into a folder."""
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise UsageError(f"{option} {path} is no folder")
    try:
        _expect_room(path)
    except OSError as err:
        raise UsageError(f"{option} {path} cannot be written: {err.strerror}") from None


def _expect_room(folder: Path) -> None:
    """Makes a file there and takes it away; permissions alone do not tell of read-only file systems, nor of root."""
    folder.mkdir(parents=True, exist_ok=True)
    number, path = tempfile.mkstemp(dir=folder, prefix=".engram-kernels-")
    os.close(number)
    os.unlink(path)


# (what, total) -> advance(count)
Progress = Callable[[str, int | None], contextlib.AbstractContextManager[Callable[[int], None]]]


@contextlib.contextmanager
def no_progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Shows nothing."""
    yield lambda count: None


@contextlib.contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, by rich; elsewhere nothing, so that logs stay short. `total` None: not known, so a count."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    console = Console(stderr=True)
    text = "{task.description}" if total is not None else "{task.description}, {task.completed:.0f} done"
    with Progress(TextColumn(text), BarColumn(), TimeRemainingColumn(), console=console, transient=True,
                  disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.update(task, advance=count)
