"""A progress bar on a terminal, on stderr; elsewhere nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def byte_bar(description: str, total_bytes: int) -> Iterator[Callable[[int], object]]:
    """Gives what is to be told how many more bytes are done."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    # Imported here because it takes longer than all the rest, and only terminals need it.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task(description, total=total_bytes)
        yield lambda size: display.advance(task, size)
