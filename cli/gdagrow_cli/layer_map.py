"""The layers of a grown model as a table: which are the source's, and which are new."""

from itertools import groupby
from typing import Final

from rich.table import Table
from rich.text import Text

from gdagrow.depth import Layers

NEW: Final = "bold green"

# More stretches of layers than these are drawn as the first few and the last.
_MAX_ROWS: Final = 24


def draw_layers(layers: Layers) -> Table:
    """Each stretch of old layers with their old numbers, and each of new blocks with the layer that they copy."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("from", no_wrap=True)
    rows = [
        _row([i for i, _ in stretch], layers)
        for _, stretch in groupby(enumerate(layers.source), lambda at: (at[0] in layers.new, _offset(at, layers)))
    ]
    shown = rows if len(rows) <= _MAX_ROWS else [*rows[: _MAX_ROWS - 2], None, rows[-1]]
    for row in shown:
        table.add_row(*(row or ("...", Text(f"{len(rows) - _MAX_ROWS + 1} more stretches", "dim"))))
    return table


def _offset(at: tuple[int, int], layers: Layers) -> int:
    """What is the same for old layers that follow one another, and for copies of one layer."""
    layer, source = at
    return source if layer in layers.new else layer - source


def _row(stretch: list[int], layers: Layers) -> tuple[str, Text]:
    first, last = layers.source[stretch[0]], layers.source[stretch[-1]]
    if stretch[0] in layers.new:
        return _span(stretch[0], stretch[-1]), Text(f"new, a copy of {first} that adds nothing yet", NEW)
    return _span(stretch[0], stretch[-1]), Text(_span(first, last))


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
