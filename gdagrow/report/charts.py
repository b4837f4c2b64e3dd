"""The charts of a report: heat maps, curves over layers or steps, bars."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import matplotlib
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from gdagrow.report.node import Node
from gdagrow.report.panel import Panel, colour, in_style, power_text

# Perceptually uniform, the same to readers who do not part red and green, and clear on light and dark paper.
_COLOURS: Final = matplotlib.colormaps["cividis"]
# More cells are drawn as one picture without tooltips, for the page's size.
MAX_CELLS: Final = 640
# More points have no marks of their own.
_MAX_MARKS: Final = 128


@dataclass(frozen=True)
class Scale:
    """The range of a heat map's colours, shared by maps to be compared."""

    low: float
    high: float

    @staticmethod
    def of(nodes: Sequence[Node]) -> "Scale":
        values = [node.value for node in nodes if node] or [0.0]
        return Scale(min(values), max(values))

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5

    def stops(self) -> list[str]:
        """Colours from low to high at equal distances."""
        return [to_hex(_COLOURS(i / 8)) for i in range(9)]


@dataclass(frozen=True)
class HeatMap:
    """A table of figures to be drawn as colours.

    rows, columns: Labels; few of them are written where there are many.
    cells: By row; a node of None is left empty.
    told: The tooltip of a cell by row and column, without its value.
    separators: Columns before which a line is drawn.
    left: Pixels for the labels of the rows.
    every_row: Whether all of those are written.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Node | None]]
    told: Callable[[int, int], str]
    row_axis: str
    column_axis: str
    separators: Sequence[int] = ()
    left: float = 46
    every_row: bool = False


@in_style
def heat_map(heat: HeatMap, scale: Scale) -> str:
    """Draw a heat map; rows go down."""
    num_rows, num_columns = len(heat.rows), len(heat.columns)
    height = min(max(13 * num_rows, 64), 440)
    label = f"Heat map, {heat.title}: {heat.row_axis or 'rows'} by {heat.column_axis}"
    panel = Panel(label, height=height + 58, left=heat.left, bottom=32, title=heat.title)
    axes = panel.axes
    axes.set(xlim=(0, num_columns), ylim=(num_rows, 0), xlabel=heat.column_axis, ylabel=heat.row_axis)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    if num_rows * num_columns <= MAX_CELLS:
        _cells(panel, heat, scale)
    else:
        _picture(panel, heat, scale)
    for column in heat.separators:
        axes.axvline(column, color=colour("paper"), linewidth=2.5 if num_columns <= 32 else 1.2)
    _label(axes.set_xticks, heat.columns, 12)
    _label(axes.set_yticks, heat.rows, num_rows if heat.every_row else 9)
    return panel.svg()


def _cells(panel: Panel, heat: HeatMap, scale: Scale) -> None:
    gap = 0.035 if len(heat.columns) <= 32 else 0.0
    for row, nodes in enumerate(heat.cells):
        for column, node in enumerate(nodes):
            if not node:
                continue
            cell = Rectangle(
                (column + gap / 2, row + gap), 1 - gap, 1 - 2 * gap, clip_on=False, linewidth=0,
                facecolor=_COLOURS(scale.share(node.value)),
            )  # fmt: skip
            panel.axes.add_artist(cell)  # not add_patch, which looks at all limits again for every cell
            panel.note(cell, f"{heat.told(row, column)}: {node.value:.4g}", node)


def _picture(panel: Panel, heat: HeatMap, scale: Scale) -> None:
    """Draw one pixel for each cell, which the page then shows with sharp edges."""
    shares = [[scale.share(node.value) if node else math.nan for node in nodes] for nodes in heat.cells]
    corners = 0, len(heat.columns), len(heat.rows), 0
    panel.axes.imshow(shares, cmap=_COLOURS, vmin=0, vmax=1, extent=corners, aspect="auto", interpolation="none")


def _label(set_ticks: Callable[..., object], labels: Sequence[str], at_most: float) -> None:
    step = max(1, math.ceil(len(labels) / at_most))
    kept = range(0, len(labels), step)
    set_ticks([i + 0.5 for i in kept], [labels[i] for i in kept])


@dataclass(frozen=True)
class Line:
    """A curve: its points, whose nodes of None are left out, in a role of the style sheet or a colour.

    told: The tooltip of a point, without its value; the points have marks then.
    """

    xs: Sequence[float]
    nodes: Sequence[Node]
    colour: str
    dashed: bool = False
    told: Callable[[int], str] | None = None


@in_style
def curves(
    title: str,
    lines: Sequence[Line],
    *,
    x_axis: str,
    label: str,
    limits: tuple[float, float] | None = None,
    bad: Sequence[bool] = (),
) -> str:
    """Draw curves over layers or steps.

    Args:
        title: Over the chart.
        lines: The curves.
        x_axis: What the horizontal axis counts.
        label: What is drawn, for those who do not see it.
        limits: Of the vertical axis, which is a log axis then; a point at zero stands hollow at its lower end, one
            that is not finite at its upper end.
        bad: For each point of the first line, whether it is to be marked as bad.
    """
    panel = Panel(label, title=title, left=52)
    axes = panel.axes
    axes.grid(axis="y")
    if limits:
        axes.set_yscale("log")
        axes.set_ylim(limits)
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for number, line in enumerate(lines):
        _draw(panel, line, limits, bad if number == 0 else ())
    axes.set_xlabel(x_axis)
    axes.margins(x=0.04)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: power_text(value) if limits else f"{value:.4g}"))
    return panel.svg()


def _draw(panel: Panel, line: Line, limits: tuple[float, float] | None, bad: Sequence[bool]) -> None:
    points = [(i, x, node, y) for i, (x, node) in enumerate(zip(line.xs, line.nodes, strict=True))
              if (y := _height(node, limits)) is not None]  # fmt: skip
    width, dashes = (1.3, (0, (4, 3))) if line.dashed else (1.6, (0, ()))
    xs, ys = [x for _, x, _, _ in points], [y for *_, y in points]
    panel.axes.add_line(Line2D(xs, ys, color=line.colour, linewidth=width, linestyle=dashes))
    panel.axes.autoscale_view()
    if line.told is None or len(points) > _MAX_MARKS:
        return
    for i, x, node, y in points:
        wrong = bool(bad) and bad[i]
        edge = colour("bad") if wrong else line.colour
        hollow = limits is not None and node and node.value < limits[0]
        mark = Line2D(
            [x], [y], marker="X" if wrong else "o", markersize=7 if wrong else 5, linestyle="none", clip_on=False,
            color=edge, markerfacecolor=colour("paper") if hollow else edge,
        )  # fmt: skip
        panel.axes.add_artist(mark)
        panel.note(mark, f"{line.told(i)}: {f'{node.value:.4g}' if node else 'not finite'}", node)


def _height(node: Node, limits: tuple[float, float] | None) -> float | None:
    """Where a figure is drawn; None if nowhere."""
    if limits is None:
        return node.value if node else None
    low, high = limits
    return max(node.value, low) if node else high


@dataclass(frozen=True)
class Bar:
    """One bar: what it is told as, its figure, how that is written, and its colour."""

    told: str
    node: Node
    text: str
    colour: str


@in_style
def bars(groups: Sequence[tuple[str, Sequence[Bar]]], *, label: str) -> str:
    """Draw groups of horizontal bars, each with its figure written at its end."""
    thick, gap = 15.0, 13.0
    height = sum(len(group) * thick + gap for _, group in groups)
    panel = Panel(label, height=height + 14, left=78, right=62, top=6, bottom=8)
    axes = panel.axes
    axes.set(xlim=(0, max(bar.node.value for _, group in groups for bar in group) or 1), ylim=(height, 0), xticks=[])
    axes.spines["bottom"].set_visible(False)
    at, middles = gap / 2, []
    for _, group in groups:
        middles.append(at + len(group) * thick / 2)
        for bar in group:
            (drawn,) = axes.barh(at + thick / 2, bar.node.value, thick - 3, color=bar.colour)
            panel.note(drawn, f"{bar.told}: {bar.node.value:,}", bar.node)
            axes.annotate(bar.text, (bar.node.value, at + thick / 2), (5, 0), textcoords="offset points", va="center",
                          fontsize=10, annotation_clip=False)  # fmt: skip
            at += thick
        at += gap
    axes.set_yticks(middles, [name for name, _ in groups])
    axes.tick_params(length=0, pad=6)
    return panel.svg()
