"""How far a command is that writes many bytes."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gdagrow_cli.console import stderr_console


@contextmanager
def byte_progress(doing: str, num_bytes: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield what takes the number of bytes written since its last call, and shows them on a terminal."""
    if not shown or not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (TextColumn(doing), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr_console(), transient=True) as progress:
        task = progress.add_task("", total=num_bytes)
        yield lambda more: progress.advance(task, more)
