"""How far a long piece of work is: what shows it is passed in, so that libraries print nothing by themselves."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

# (what, total) -> advance(count)
Progress = Callable[[str, int | None], contextlib.AbstractContextManager[Callable[[int], None]]]


@contextlib.contextmanager
def no_progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Shows nothing."""
    yield lambda count: None


@contextlib.contextmanager
def progress_bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, by rich; elsewhere nothing, so that logs stay short."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    console = Console(stderr=True)
    text = "{task.description}" if total is not None else "{task.description}, {task.completed:.0f} done"
    with Progress(TextColumn(text), BarColumn(), TimeRemainingColumn(), console=console, transient=True,
                  disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.update(task, advance=count)
