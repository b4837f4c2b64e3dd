"""Head maps: the query groups of a model, and which head of the source each grown head was cloned from."""

from collections import Counter
from typing import Final

from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

from gdagrow.report.node import Node
from gdagrow.report.panel import Panel, colour, in_style, series

# Of a model, and of a growth: its first groups are drawn, and of each old group about so many grown heads.
MAX_GROUPS: Final = 8
MAX_OLD_GROUPS: Final = 6
MAX_HEADS: Final = 40
_MAX_SIGNAL_CHIPS: Final = 8

_CHIP_WIDTH, _CHIP_HEIGHT, _ROW, _GROUP_GAP = 34.0, 16.0, 20.0, 12.0
# Of a lineage: where the old and the new heads stand, and how much room their headings take.
_OLD, _NEW, _TOP = 6.0, 196.0, 28.0

NOISE: Final = -1  # in place of the index of a signal head


@in_style
def head_map(num_groups: int, ratio: int, num_kv_groups: int, *, label: str) -> str:
    """Draw the heads of a layer: a row for each query group, its signal heads and its noise head last."""
    groups, shown = min(num_groups, MAX_GROUPS), min(ratio, _MAX_SIGNAL_CHIPS)
    places = [*range(shown), *([None] if shown < ratio else []), NOISE]
    panel = _canvas(label, height=groups * 32 + 10)
    step = min(_CHIP_WIDTH + 5, 254 / len(places))
    for group in range(groups):
        y = 8.0 + group * 32
        panel.axes.text(0, y + 8, f"group {group}", va="center", fontsize=10.5)
        kv = f"KV {group // (num_groups // num_kv_groups)}"
        panel.axes.text(0, y + 20, kv, va="center", fontsize=9, color=colour("muted"))
        _box(panel, 56, y, len(places) * step + 5, 24)
        for place, head in enumerate(places):
            x = 61 + place * step
            if head is None:
                panel.axes.text(x + step / 2 - 2, y + 12, f"+{ratio - shown}", ha="center", va="center", fontsize=9)
            else:
                _chip(panel, x, y + 4, step - 5, head, _head_text(head, group))
    return panel.svg()


@in_style
def lineage_map(lineage: Node, old_group: int, ratio: int) -> str:
    """Draw one group of the source and, beside it, the grown groups that came of it.

    Args:
        lineage: The report's lineage.
        old_group: Index of the source's group.
        ratio: Signal heads in a group of the source.
    """
    old_heads = [*range(min(ratio, MAX_HEADS)), NOISE]
    new_groups = [(new, _sources(lineage, new)) for new in groups_from(lineage, old_group)]
    new_groups = new_groups[: _groups_that_fit(len(new_groups[0][1]))]
    num_new = sum(len(heads) for _, heads in new_groups)
    old_height, new_height = len(old_heads) * _ROW, num_new * _ROW + (len(new_groups) - 1) * _GROUP_GAP
    height = max(old_height, new_height)
    label = f"Lineage of group {old_group}: the source's heads on the left, those cloned from them on the right"
    panel = _canvas(label, height=_TOP + height + 12)
    for x, heading in ((_OLD, f"source group {old_group}"), (_NEW, "grown")):
        panel.axes.text(x, 8, heading, va="center", fontsize=11, fontweight="bold")
    start = _TOP + (height - old_height) / 2
    old_rows = {head: start + place * _ROW for place, head in enumerate(old_heads)}
    _new_groups(panel, new_groups, old_rows, old_group)
    _box(panel, _OLD - 4, start - 5, _CHIP_WIDTH + 8, old_height + 6)
    for head, y in old_rows.items():
        _chip(panel, _OLD, y, _CHIP_WIDTH, head, f"{_head_text(head, old_group)} of the source")
    return panel.svg()


def _new_groups(panel: Panel, groups: list[tuple[int, list[int]]], old_rows: dict[int, float], old_group: int) -> None:
    copies: Counter[int] = Counter()
    y = _TOP
    for group, sources in groups:
        height = len(sources) * _ROW
        _box(panel, _NEW - 4, y - 5, _CHIP_WIDTH + 8, height + 6)
        panel.axes.text(_NEW + _CHIP_WIDTH + 12, y + height / 2 - 2, f"group {group}", va="center", fontsize=10,
                        color=colour("muted"))  # fmt: skip
        for place, source in enumerate(sources):
            if source in old_rows:
                _band(panel, old_rows[source] + _CHIP_HEIGHT / 2, y + _CHIP_HEIGHT / 2, source)
            head = NOISE if source == NOISE else place
            told = f"{_head_text(head, group)}, cloned from {_head_text(source, old_group)} of the source"
            _chip(panel, _NEW, y, _CHIP_WIDTH, source, told, faint=copies[source] > 0)
            copies[source] += 1
            y += _ROW
        y += _GROUP_GAP


def groups_from(lineage: Node, old_group: int) -> list[int]:
    """The grown query groups whose noise head is a copy of the old group's."""
    return [new for new, old in enumerate(lineage["noise_heads"].value) if old == old_group]


def left_out(lineage: Node, num_old_groups: int) -> str:
    """What the maps of a growth leave out, in words; empty if nothing."""
    copies, ratio = len(groups_from(lineage, 0)), len(lineage["signal_heads"].value[0])
    told = {
        "more groups of the source": num_old_groups - MAX_OLD_GROUPS,
        "more groups grown from each": copies - _groups_that_fit(min(ratio, MAX_HEADS) + 1),
        "more signal heads of each group": ratio - MAX_HEADS,
    }
    return ", ".join(f"{count} {what}" for what, count in told.items() if count > 0)


def _sources(lineage: Node, group: int) -> list[int]:
    """The old signal heads of a grown group's first signal heads, and its noise head."""
    return [*(head for _, head in lineage["signal_heads"].value[group][:MAX_HEADS]), NOISE]


def _groups_that_fit(num_heads: int) -> int:
    return max(1, MAX_HEADS // num_heads)


def _head_text(head: int, group: int) -> str:
    return f"noise head of group {group}" if head == NOISE else f"signal head {head} of group {group}"


def _role(head: int) -> str:
    return colour("noise") if head == NOISE else series(head)


def _canvas(label: str, *, height: float) -> Panel:
    """A panel whose axes count pixels from the top left."""
    panel = Panel(label, height=height, left=0, right=0, top=0, bottom=0)
    panel.axes.set(xlim=(0, panel.width), ylim=(height, 0))
    panel.axes.set_axis_off()
    return panel


def _box(panel: Panel, x: float, y: float, width: float, height: float) -> None:
    shape = "round,pad=0,rounding_size=6"
    box = FancyBboxPatch(
        (x, y), width, height, boxstyle=shape, facecolor="none", edgecolor=colour("rule"), linewidth=1.2
    )
    panel.axes.add_artist(box).set_clip_on(False)


def _chip(panel: Panel, x: float, y: float, width: float, head: int, told: str, *, faint: bool = False) -> None:
    shape, alpha = "round,pad=0,rounding_size=4", 0.45 if faint else None
    chip = FancyBboxPatch((x, y), width, _CHIP_HEIGHT, boxstyle=shape, facecolor=_role(head), edgecolor="none",
                          alpha=alpha)  # fmt: skip
    panel.axes.add_artist(chip).set_clip_on(False)
    panel.note(chip, told)
    panel.axes.text(x + width / 2, y + _CHIP_HEIGHT / 2 + 0.5, "N" if head == NOISE else f"S{head}", ha="center",
                    va="center_baseline", fontsize=10, fontweight="bold",
                    color=colour("ink" if faint else "on-series"))  # fmt: skip


def _band(panel: Panel, old_y: float, new_y: float, head: int) -> None:
    x, to_x = _OLD + _CHIP_WIDTH + 1, _NEW - 1
    middle = (x + to_x) / 2
    path = Path([(x, old_y), (middle, old_y), (middle, new_y), (to_x, new_y)], [Path.MOVETO] + [Path.CURVE4] * 3)
    band = PathPatch(path, facecolor="none", edgecolor=_role(head), linewidth=3.2, alpha=0.38, capstyle="butt")
    panel.axes.add_artist(band).set_clip_on(False)
