"""Tables and sentences on the standard output: rich on a terminal, plain elsewhere, and readable where there is little room."""
from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, TextIO

_SHREDDED = 1.5  # a table this many times wider than the terminal is no longer one


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
        elif self._out.isatty():
            self._width = shutil.get_terminal_size().columns
            if "NO_COLOR" not in os.environ:
                try:
                    from rich.console import Console
                    self._console = Console(file=self._out, highlight=False)
                    self._width = self._console.width
                except ImportError:
                    pass

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str | None]) -> None:
        """A table; `styles` are rich's, a line each. Where it would be far wider than the terminal, a paragraph a line of it."""
        widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
        plain = self._console is None
        room = None if self._width is None else self._width if plain else self._width * _SHREDDED
        if room is not None and sum(widths) + 2 * len(widths) > room:
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
        """A line."""
        if self._console is None:
            print(text, file=self._out)
        else:
            self._console.print(text, style=style, markup=False)
