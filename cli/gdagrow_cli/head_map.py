"""The heads of one layer as a picture: a row for each query group, its signal heads and its noise head last."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from rich.table import Table
from rich.text import Text

from gdagrow.axes import IndexMap
from gdagrow.heads import HeadGrowth, Heads

SIGNAL: Final = "bold black on cyan"
NOISE: Final = "bold white on magenta"

# More groups than these are drawn as the first few and the last; so are more signal heads than fit the width.
_MAX_GROUPS: Final = 16
_MAX_CHOICES: Final = 16
_WIDTH_OF_THE_REST: Final = 42  # the other columns and the noise head
_WIDTH_OF_LEFT_OUT: Final = 14


def draw_heads(heads: Heads, query_heads: Mapping[int, Sequence[int]], width: int) -> Table:
    """Each query group with the KV group that serves it: `S` is a signal head, `N` the noise head.

    query_heads: For each group the numbers of its query heads in the checkpoint.
    """
    table = _table("query heads")
    for group in _shown(heads.num_groups, _MAX_GROUPS):
        if group is None:
            table.add_row("", "", Text(f"... {heads.num_groups - _MAX_GROUPS} more groups alike", "dim"), "")
            continue
        table.add_row(*_place(heads, group), _cells(["S"] * heads.ratio, width), _numbers(query_heads[group]))
    return table


def draw_growth(growth: HeadGrowth, width: int) -> Table:
    """Each new query group and what it was cloned from: `S2` is signal head 2 of the old group named at the end."""
    table = _table("cloned from")
    for group in _shown(growth.after.num_groups, _MAX_GROUPS):
        if group is None:
            table.add_row("", "", Text(f"... {growth.after.num_groups - _MAX_GROUPS} more groups", "dim"), "")
            continue
        cells = [f"S{head}" for head in growth.signal[group]]
        old = list(growth.group)[group]
        table.add_row(*_place(growth.after, group), _cells(cells, width), f"group {old}")
    return table


def draw_choices(growths: Sequence[HeadGrowth]) -> Table:
    """Which signal heads are cloned more than others of their group, in layers that differ in that.

    growths: One for each layer of the grown model.
    """
    layers: dict[HeadGrowth, list[int]] = {}
    for layer, growth in enumerate(growths):
        layers.setdefault(growth, []).append(layer)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("layers", overflow="fold")
    table.add_column("in each group of the source", overflow="fold")
    alike = list(layers.items())
    for i in _shown(len(alike), _MAX_CHOICES):
        if i is None:
            table.add_row("...", Text(f"{len(alike) - _MAX_CHOICES} more choices", "dim"))
        else:
            growth, found = alike[i]
            table.add_row(_numbers(found), " | ".join(_cloned_more(growth)))
    return table


def _cloned_more(growth: HeadGrowth) -> list[str]:
    """For each group of the source, `S0 S2`: each head as often as it has copies beyond those of the least cloned."""
    groups = list(growth.group)
    told = []
    for old in range(growth.before.num_groups):
        copies = Counter(growth.signal[groups.index(old)])
        least = min(copies.values())
        told.append(" ".join(f"S{head}" for head in sorted(copies) for _ in range(copies[head] - least)) or "none")
    return told


def legend() -> Text:
    """What the letters and colours mean."""
    return Text.assemble(
        (" S ", SIGNAL), " signal head   ", (" N ", NOISE), " noise head, subtracted from its whole group"
    )


def _table(last_column: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("KV group", justify="right", no_wrap=True)
    table.add_column("query group", justify="right", no_wrap=True)
    table.add_column("heads", no_wrap=True)
    table.add_column(last_column, justify="right", no_wrap=True)
    return table


def _place(heads: Heads, group: int) -> tuple[str, str]:
    """The KV group, named where its first query group stands, and the query group."""
    first_of_kv = group % heads.groups_per_kv == 0
    return str(group // heads.groups_per_kv) if first_of_kv else "", str(group)


def _cells(signal: Sequence[str], width: int) -> Text:
    text, room, cell = Text(), width - _WIDTH_OF_THE_REST, max(map(len, signal)) + 3
    at_most = len(signal) if len(signal) * cell <= room else max(2, (room - _WIDTH_OF_LEFT_OUT) // cell)
    for i in _shown(len(signal), at_most):
        if i is None:
            text.append(f"... {len(signal) - at_most} more ", "dim")
        else:
            text.append(f" {signal[i]} ", SIGNAL)
            text.append(" ")
    return text.append(" N ", NOISE)


def _numbers(ascending: Sequence[int]) -> str:
    runs = IndexMap.of(list(ascending), ascending[-1] + 1).runs
    return ", ".join(f"{start}-{stop - 1}" if stop - start > 1 else str(start) for start, stop in runs)


def _shown(count: int, at_most: int) -> list[int | None]:
    """The indices to draw; None stands for those left out, before the last."""
    if count <= at_most:
        return list(range(count))
    return [*range(at_most - 1), None, count - 1]
