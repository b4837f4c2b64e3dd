"""`gdagrow diff --weights`: whether a grown checkpoint folds back onto its source, bit for bit."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from gdagrow.checkpoint import read_checkpoint
from gdagrow.verify.tensors import Place
from gdagrow.verify.weights import Certificate, TensorDifference, check_weights
from gdagrow_cli.console import print_json, printable, stderr_console, stdout_console
from gdagrow_cli.plan_view import print_section
from gdagrow_cli.settings_view import print_settings

_MAX_TENSORS = 12


def show_certificate(source: Path, grown: Path, *, as_json: bool) -> bool:
    """Hold a grown checkpoint's weights against its source's and print what differs; returns whether nothing does.

    Raises:
        GdagrowError: they cannot be held against each other.
    """
    with _progress(grown, shown=not as_json) as advance:
        certificate = check_weights(source, grown, progress=advance)
    if as_json:
        print_json(certificate.as_dict())
    else:
        _print(stdout_console(), certificate)
    return certificate.equivalent


@contextmanager
def _progress(grown: Path, *, shown: bool) -> Iterator[Callable[[int], None] | None]:
    if not shown or not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("checking"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr_console(), transient=True) as progress:
        task = progress.add_task("", total=read_checkpoint(grown).num_bytes)
        yield lambda more: progress.advance(task, more)


def _print(console: Console, certificate: Certificate) -> None:
    told = f"{certificate.num_tensors:,} tensors of {certificate.num_elements:,} weights"
    if certificate.equivalent:
        console.print(
            Text.assemble(("the same function", "bold green"), ": every weight folds back onto the source, bit for bit")
        )
    else:
        why = (
            "not every tensor folds back" if certificate.differences else "every weight folds back, the settings differ"
        )
        console.print(Text.assemble(("different", "bold red"), f": {why}"))
    console.print(f"  {told} checked, maps from {certificate.maps}")
    print_settings(console, certificate.settings)
    if certificate.differences:
        shown = certificate.differences[:_MAX_TENSORS]
        print_section(console, f"Tensors that differ: {len(certificate.differences)}", *map(_difference_text, shown))
        if left := len(certificate.differences) - len(shown):
            console.print(f"  ... and {left} more; --json lists all")


def _difference_text(difference: TensorDifference) -> Text:
    if difference.problem:
        return Text.assemble((printable(difference.name), "bold"), f": {difference.problem}")
    largest = f"by {difference.largest:.3g} at most" if math.isfinite(difference.largest) else "some are not finite"
    text = Text.assemble((printable(difference.name), "bold"), f": {difference.num_wrong:,} wrong, {largest}")
    for place in difference.places:
        text.append(f"\n  {_place_text(place)}")
    return text


def _place_text(place: Place) -> str:
    where = (
        f"row {place.row} from {place.old_row} of the source, column {place.column} from {place.old_column}"
        if (place.row, place.old_row) != (0, 0)
        else f"row 0, column {place.column} from {place.old_column} of the source"
    )
    return f"{place.head}: {where}" if place.head else where
