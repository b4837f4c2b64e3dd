"""The figure of a comparison: each arm's difference from the reference, seed by seed, with what the arm cost."""

from collections.abc import Callable, Sequence
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gdagrow.experiment.look import BLUE, HEADING, INK, LINE, MUTED, ORANGE, head, num_lines, signed, wrapped
from gdagrow.experiment.results import Arm, Comparison, Results
from gdagrow.experiment.statistics import Difference, differences, mean
from gdagrow.units import count_text, flops_text

_WIDTH: Final = 11.0
_BELOW: Final = 0.95  # inches, as all heights here: for the axis and the key
_ROW: Final = 0.42
_SCATTER: Final = 0.11  # how far from its row the outermost seed is drawn
_OF_VERDICT: Final = {"lower": BLUE, "higher": ORANGE}
# An arm so many times as far out as the middle one is told in figures, or all the others would be one line.
FAR_OUT: Final = 6


def difference_figure(results: Results, comparison: Comparison) -> Figure:
    """Draw one row an arm, the reference on top: a dot a seed, their mean and its intervals; budgets at the right."""
    found = differences(results, comparison)
    arms = [results.arm(name) for name in (comparison.reference, *comparison.arms)]
    num_runs = [len(results.runs_of(comparison.reference)), *(len(difference.seeds) for difference in found)]
    labels = [_label(results, arm, count) for arm, count in zip(arms, num_runs, strict=True)]
    heights = [max(_ROW, LINE * num_lines(label) + 0.08) for label in labels]
    rows = [sum(heights[:i]) + heights[i] / 2 for i in range(len(arms))]
    height = HEADING + 0.25 + sum(heights) + _BELOW
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes((0.2, _BELOW / height, 0.37, sum(heights) / height))
    limits = _limits(found)
    axes.set(xlim=limits, ylim=(sum(heights), 0))
    axes.axvline(0, color=INK, linewidth=1)
    axes.grid(axis="x")
    axes.plot([0], rows[:1], marker="D", color=INK, markersize=7, linestyle="none")
    for row, difference in zip(rows[1:], found, strict=True):
        _row(axes, row, difference, limits)
    axes.set_yticks(rows, labels, color=INK)
    axes.set_xlabel("loss minus the reference's, nats per byte (left is better)")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: signed(value)))
    _columns(axes, results, rows, arms, ["reference", *(difference.verdict for difference in found)])
    test = f"verdict by a paired t test at 5%, Holm's correction for {len(found)}"
    head(figure, results, comparison, f"held-out loss at the end; equal {comparison.matched}; {test}")
    _key(figure, height)
    return figure


def _label(results: Results, arm: Arm, num_runs: int) -> str:
    short = 0 < num_runs < len(results.seeds)
    return wrapped(f"{arm.told} ({num_runs} of {len(results.seeds)} seeds)" if short else arm.told)


def _limits(found: Sequence[Difference]) -> tuple[float, float]:
    """What is shown of the differences: all of them, unless an arm lies far out."""
    reach = {difference.arm: max(map(abs, _ends(difference))) for difference in found if difference.values}
    typical = sorted(reach.values())[len(reach) // 2] if reach else 0.0
    kept = [difference for difference in found if reach.get(difference.arm, float("inf")) <= FAR_OUT * typical]
    ends = [0.0, *(end for difference in kept for end in _ends(difference))]
    margin = 0.08 * (max(ends) - min(ends)) or 0.001
    return min(ends) - margin, max(ends) + margin


def _ends(difference: Difference) -> tuple[float, float]:
    """An arm's outermost marks; the interval of two seeds, wider than any figure, is cut at the edge instead."""
    marks = [*difference.values, *((difference.student or ()) if len(difference.values) > 2 else ())]
    return min(marks), max(marks)


def _row(axes: Axes, row: float, difference: Difference, limits: tuple[float, float]) -> None:
    if difference.mean is None:
        axes.text(0.5, row, "no pair of runs yet", color=MUTED, size=10, ha="center", va="center",
                  transform=axes.get_yaxis_transform(), backgroundcolor="white")  # fmt: skip
        return
    colour = _OF_VERDICT.get(difference.verdict, MUTED)
    if not limits[0] <= difference.mean <= limits[1]:
        _far_out(axes, row, difference.mean, colour, limits)
        return
    if difference.bootstrap:
        axes.plot(difference.bootstrap, (row, row), color=colour, linewidth=6, alpha=0.3, solid_capstyle="butt")
    if difference.student:
        axes.plot(difference.student, (row, row), color=colour, linewidth=1.6, marker="|", markersize=9)
    middle = (len(difference.values) - 1) / 2
    heights = [row + _SCATTER * (i - middle) / max(middle, 1) for i in range(len(difference.values))]
    axes.plot(difference.values, heights, linestyle="none", marker="o", markersize=4.5, markerfacecolor="white",
              markeredgecolor=colour, markeredgewidth=1.1)  # fmt: skip
    axes.plot([difference.mean], [row], marker="D", markersize=7, color=colour, markeredgecolor="white")


def _far_out(axes: Axes, row: float, center: float, colour: str, limits: tuple[float, float]) -> None:
    right = center > limits[1]
    told = signed(center, ".4f")
    told = f"{told} \N{RIGHTWARDS ARROW} " if right else f" \N{LEFTWARDS ARROW} {told}"
    axes.text(limits[right], row, told, color=colour, ha="right" if right else "left", va="center")


def _columns(axes: Axes, results: Results, rows: Sequence[float], arms: Sequence[Arm], verdicts: Sequence[str]) -> None:
    """What an arm reached, what it cost, and its verdict, as a table beside the rows."""

    def loss(arm: Arm) -> str:
        center = mean([run.loss for run in results.runs_of(arm.name)])
        return "-" if center is None else f"{center:.4f}"

    columns: Sequence[tuple[str, float, Callable[[Arm], str]]] = (
        ("loss", 1.14, loss),
        ("parameters", 1.38, lambda arm: count_text(arm.parameters)),
        ("tokens", 1.56, lambda arm: count_text(arm.tokens)),
        ("training", 1.84, lambda arm: flops_text(round(arm.flops))),
    )
    place = axes.get_yaxis_transform()
    for title, x, told in columns:
        axes.text(x, -0.05, title, transform=place, ha="right", va="bottom", color=MUTED, size=10)
        for row, arm in zip(rows, arms, strict=True):
            axes.text(x, row, told(arm), transform=place, ha="right", va="center", size=10)
    for row, verdict in zip(rows, verdicts, strict=True):
        colour = _OF_VERDICT.get(verdict, INK if verdict == "reference" else MUTED)
        axes.text(1.87, row, verdict, transform=place, va="center", size=10, color=colour, weight="bold")


def _key(figure: Figure, height: float) -> None:
    handles = [
        Line2D([], [], color=MUTED, marker="o", markerfacecolor="white", linestyle="none", markersize=4.5,
               label="one seed"),
        Line2D([], [], color=MUTED, marker="D", linestyle="none", markersize=7, label="mean"),
        Line2D([], [], color=MUTED, linewidth=1.6, marker="|", markersize=9, label="95% by t"),
        Line2D([], [], color=MUTED, linewidth=6, alpha=0.3, label="95% by bootstrap"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=(0.2, 0.02 / height), ncols=4, labelcolor=MUTED)
