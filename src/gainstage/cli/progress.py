"""A bar for what takes longer than a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PATIENCE = 1.0  # seconds


@contextmanager
def progress_bar(what: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """A function of how much is done, and of how much there is in all: once it is late, it draws a bar.

    Args:
        what: stands before the bar.
        console: where to; standard error by default. Nothing is drawn where it is no terminal.
    """
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console or Console(stderr=True), transient=True)
    start = time.monotonic()
    task = bar.add_task(what)
    with ExitStack() as stack:

        def show(done: int, total: int) -> None:
            if bar.console.is_terminal and not bar.live.is_started and time.monotonic() - start > PATIENCE:
                stack.enter_context(bar)
            bar.update(task, completed=done, total=total)

        yield show
