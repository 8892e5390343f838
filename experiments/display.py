"""How commands show their tables and how far they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_TABLE_WIDTH = 160  # no heading breaks, however slow the machine and long its figures


def console() -> Console:
    """Tables keep their shape where the output is a file."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=_TABLE_WIDTH)


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar for each task, on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # Drawn rarely: the display must not take time from what is measured.
    with Progress(
        *columns, console=Console(stderr=True), refresh_per_second=2, transient=True
    ) as shown:
        yield shown
