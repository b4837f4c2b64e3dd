"""Head maps: the query groups of a model, and which head of the source each grown head was cloned from."""

from collections import Counter
from typing import Final

from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

from gdagrow.report.node import Node
from gdagrow.report.panel import Panel, colour, in_style, series

# Of a model, and of a growth: the first groups of the source are drawn, and of each so many grown heads.
MAX_GROUPS: Final = 8
MAX_OLD_GROUPS: Final = 6
MAX_HEADS: Final = 40
_MAX_SIGNAL_CHIPS: Final = 11

_ROW, _CHIP_HEIGHT, _CHIP_WIDTH, _GROUP_GAP = 20.0, 16.0, 34.0, 12.0


@in_style
def head_map(num_groups: int, ratio: int, num_kv_groups: int, *, label: str) -> str:
    """Draw the heads of a layer: a row for each query group, its signal heads and its noise head last."""
    groups = min(num_groups, MAX_GROUPS)
    left_out = max(0, ratio - _MAX_SIGNAL_CHIPS)
    num_chips = ratio - left_out + 1 + bool(left_out)
    panel = _canvas(label, height=groups * 32 + 10)
    step = min(_CHIP_WIDTH + 5, 236 / num_chips)
    for group in range(groups):
        y = 8 + group * 32
        kv = group // (num_groups // num_kv_groups)
        panel.axes.text(0, y + 8, f"group {group}", va="center", fontsize=10.5)
        panel.axes.text(0, y + 20, f"KV {kv}", va="center", fontsize=9, color=colour("muted"))
        _box(panel, 56, y, num_chips * step + 7, 24)
        names = [*(f"S{head}" for head in range(ratio - left_out)), *(["…"] if left_out else []), "N"]
        for place, name in enumerate(names):
            role = colour("noise") if name == "N" else series(place)
            if name == "…":
                panel.axes.text(
                    60 + place * step + step / 2, y + 12, f"+{left_out}", ha="center", va="center", fontsize=9
                )
                continue
            _chip(panel, 61 + place * step, y + 4, step - 5, name, role, f"{_told(name)} of group {group}")
    return panel.svg()


@in_style
def lineage_map(lineage: Node, old_group: int, ratio: int) -> str:
    """Draw one group of the source and, beside it, the grown groups that came of it.

    Args:
        lineage: The report's lineage.
        old_group: Index of the source's group.
        ratio: Signal heads in a group of the source.
    """
    new_groups = groups_from(lineage, old_group)
    heads = [(group, [head for _, head in lineage["signal_heads"].value[group]]) for group in new_groups]
    per_group = len(heads[0][1]) + 1
    shown = heads[: max(1, MAX_HEADS // per_group)]
    signal = min(ratio, MAX_HEADS), min(len(shown[0][1]), MAX_HEADS)
    left_height, right_height = (signal[0] + 1) * _ROW, len(shown) * ((signal[1] + 1) * _ROW + _GROUP_GAP) - _GROUP_GAP
    height = 30 + max(left_height, right_height) + 10
    label = (
        f"Lineage of group {old_group}: the source's heads on the left, the grown ones cloned from them on the right"
    )
    panel = _canvas(label, height=height)
    left, right = 6.0, 196.0
    panel.axes.text(left, 8, f"source group {old_group}", va="center", fontsize=11, fontweight="bold")
    panel.axes.text(right, 8, "grown", va="center", fontsize=11, fontweight="bold")
    start = 28 + (height - 38 - left_height) / 2
    rows = {head: start + place * _ROW for place, head in enumerate([*range(signal[0]), -1])}
    _box(panel, left - 4, start - 5, _CHIP_WIDTH + 8, left_height + 6)
    seen: Counter[int] = Counter()
    y = 28.0
    for new, sources in shown:
        _box(panel, right - 4, y - 5, _CHIP_WIDTH + 8, (signal[1] + 1) * _ROW + 6)
        middle = y + (signal[1] + 1) * _ROW / 2
        panel.axes.text(
            right + _CHIP_WIDTH + 12, middle - 2, f"group {new}", va="center", fontsize=10, color=colour("muted")
        )
        for source in [*sources[: signal[1]], -1]:
            name, role = ("N", colour("noise")) if source < 0 else (f"S{source}", series(source))
            told = f"{_told(name)} of group {new}, from {_told(name)} of the source's group {old_group}"
            _band(panel, left + _CHIP_WIDTH + 1, rows.get(source, start) + 8, right - 1, y + 8, role)
            _chip(panel, right, y, _CHIP_WIDTH, name, role, told, faint=seen[source] > 0)
            seen[source] += 1
            y += _ROW
        y += _GROUP_GAP
    for source, row in rows.items():
        name, role = ("N", colour("noise")) if source < 0 else (f"S{source}", series(source))
        _chip(panel, left, row, _CHIP_WIDTH, name, role, f"{_told(name)} of the source's group {old_group}")
    return panel.svg()


def groups_from(lineage: Node, old_group: int) -> list[int]:
    """The grown query groups whose noise head is a copy of the old group's."""
    return [new for new, old in enumerate(lineage["noise_heads"].value) if old == old_group]


def left_out(lineage: Node, num_old_groups: int) -> str:
    """What the maps of a growth leave out, as a sentence; empty if nothing."""
    told = []
    if num_old_groups > MAX_OLD_GROUPS:
        told.append(f"{num_old_groups - MAX_OLD_GROUPS} more groups of the source are not drawn")
    copies, per_group = len(groups_from(lineage, 0)), len(lineage["signal_heads"].value[0]) + 1
    if per_group > MAX_HEADS:
        told.append(f"{per_group - 1 - MAX_HEADS} more signal heads of each group are not drawn")
    if copies > (fitting := max(1, MAX_HEADS // per_group)):
        told.append(f"{copies - fitting} more groups grown from each are not drawn")
    return "; ".join(told)


def _told(name: str) -> str:
    return "noise head" if name == "N" else f"signal head {name[1:]}"


def _canvas(label: str, *, height: float) -> Panel:
    """A panel whose axes count pixels from the top left."""
    panel = Panel(label, height=height, left=0, right=0, top=0, bottom=0)
    panel.axes.set(xlim=(0, panel.width), ylim=(height, 0))
    panel.axes.set_axis_off()
    return panel


def _box(panel: Panel, x: float, y: float, width: float, height: float) -> None:
    style = "round,pad=0,rounding_size=6"
    panel.axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor="none", edgecolor=colour("rule"), linewidth=1.2)
    )


def _chip(
    panel: Panel, x: float, y: float, width: float, name: str, role: str, told: str, *, faint: bool = False
) -> None:
    style = "round,pad=0,rounding_size=4"
    chip = FancyBboxPatch((x, y), width, _CHIP_HEIGHT, boxstyle=style, facecolor=role, edgecolor="none",
                          alpha=0.45 if faint else None)  # fmt: skip
    panel.axes.add_patch(chip)
    panel.note(chip, told)
    ink = colour("ink") if faint else colour("on-series")
    panel.axes.text(x + width / 2, y + _CHIP_HEIGHT / 2 + 0.5, name, ha="center", va="center_baseline", fontsize=10,
                    color=ink, fontweight="bold")  # fmt: skip


def _band(panel: Panel, x: float, y: float, to_x: float, to_y: float, role: str) -> None:
    middle = (x + to_x) / 2
    path = Path([(x, y), (middle, y), (middle, to_y), (to_x, to_y)], [Path.MOVETO] + [Path.CURVE4] * 3)
    panel.axes.add_patch(PathPatch(path, facecolor="none", edgecolor=role, linewidth=3.2, alpha=0.38, capstyle="butt"))
