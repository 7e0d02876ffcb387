"""A progress bar for what takes longer than a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

_SILENT = 1.0  # seconds without a bar


@contextmanager
def progress_bar(label: str, console: Console | None = None) -> Iterator[Callable[[int, int | None], None]]:
    """A function of the steps done and of all steps (None: not known); its bar, on a terminal, goes when the block ends."""
    start = time.monotonic()
    console = console or Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(label, total=None)

    def advance(done: int, total: int | None) -> None:
        if time.monotonic() - start > _SILENT:
            bar.start()
            bar.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
