"""An experiment's figures: differences by arm, losses over tokens, attention maps by layer; PNG and SVG of each."""

import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gdagrow.experiment.difference_plot import FAR_OUT, difference_figure
from gdagrow.experiment.look import HEADING, INK, LINE, STYLE, head, line_look, num_lines, signed, wrapped
from gdagrow.experiment.results import Arm, Comparison, Results
from gdagrow.units import count_text

_WIDTH: Final = 11.0
_DOTS_PER_INCH: Final = 150
_SAVED: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("png", {"dpi": _DOTS_PER_INCH, "metadata": {"Software": None}}),
    ("svg", {"metadata": dict.fromkeys(("Date", "Creator", "Format", "Type"))}),
)
_MAP_KINDS: Final = (("signal", "signal maps"), ("noise", "noise maps"), ("difference", "differences"))
_MAP_FIGURES: Final = (("entropy", "entropy, nats"), ("top_5_percent", "share on the top 5%"))
_MOST_LAYERS: Final = 4
# Of the tokens: what lies before would flatten all that comes later.
_EARLY: Final = 0.25

Points = Sequence[tuple[float, float]]


def plots(results: Results) -> dict[str, bytes]:
    """Draw every figure of an experiment.

    Returns:
        Files by name: for comparison i (from 1) `NAME-differences-i` and `NAME-losses-i`, and where its arms have maps
        `NAME-entropy-i` and `NAME-top-5-percent-i`, each with `.png` and `.svg`.
    """
    files: dict[str, bytes] = {}
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        for name, figure in _figures(results):
            for kind, options in _SAVED:
                out = io.BytesIO()
                figure.savefig(out, format=kind, facecolor="white", **options)
                files[f"{results.experiment}-{name}.{kind}"] = out.getvalue()
    return files


def _figures(results: Results) -> Iterator[tuple[str, Figure]]:
    for number, comparison in enumerate(results.comparisons, 1):
        yield f"differences-{number}", difference_figure(results, comparison)
        yield f"losses-{number}", _loss_figure(results, comparison)
        arms = _compared(results, comparison)
        if any(run.maps for arm in arms for run in results.runs_of(arm.name)):
            for key, axis in _MAP_FIGURES:
                yield f"{key.replace('_', '-')}-{number}", _map_figure(results, comparison, key, axis)


def _compared(results: Results, comparison: Comparison) -> list[Arm]:
    return [results.arm(name) for name in (comparison.reference, *comparison.arms)]


def _loss_figure(results: Results, comparison: Comparison) -> Figure:
    """Held-out losses over tokens at the left, differences from the reference's at the right, means over seeds."""
    arms = _compared(results, comparison)
    losses = [_mean_curve(results, arm) for arm in arms]
    paired = [_paired_curve(results, arm, arms[0]) for arm in arms[1:]]
    figure, ((left, right),) = _grid(1, 2, 3.6, arms)
    for number, points in enumerate(losses):
        _line(left, number, points)
    for number, points in enumerate(paired, 1):
        _line(right, number, points)
    left.set_title("loss, nats per byte")
    right.set_title(textwrap.shorten(f"minus that of {arms[0].told}", 40, placeholder=" ..."))
    right.axhline(0, color=INK, linewidth=1.4)
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: signed(value)))
    later = _EARLY * max((points[-1][0] for points in losses if points), default=0)
    _set_heights(left, [[y for x, y in points if x >= later] for points in losses])
    _set_heights(right, [[0.0], *_without_far_out([[y for x, y in points if x >= later] for points in paired])])
    told = "held-out loss over tokens trained on, mean over the seeds done; early losses and arms far out are cut"
    head(figure, results, comparison, told)
    _key(figure, [(number, arm, bool(losses[number])) for number, arm in enumerate(arms)])
    return figure


def _grid(rows: int, columns: int, row_height: float, arms: Sequence[Arm]) -> tuple[Figure, Any]:
    """Axes over tokens, with a heading above and room for the arms' names at the right."""
    names = sum(LINE * num_lines(wrapped(arm.told)) + 0.08 for arm in arms)
    height = HEADING + max(rows * row_height, names + 0.3)
    figure = Figure(figsize=(_WIDTH, height))
    grid = figure.subplots(rows, columns, sharex=True, sharey="row" if rows > 1 else False, squeeze=False)
    figure.subplots_adjust(
        left=0.08, right=0.75, bottom=0.6 / height, top=1 - (HEADING + 0.3) / height, hspace=0.28,
        wspace=0.24 if rows == 1 else 0.1,
    )  # fmt: skip
    for axes in grid.flat:
        axes.grid(axis="y")
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(5 if columns < 3 else 3, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tokens_text(value)))
    for axes in grid[-1]:
        axes.set_xlabel("tokens")
    return figure, grid


def _tokens_text(tokens: float) -> str:
    number, _, unit = count_text(round(tokens)).partition(" ")
    return f"{float(number):g} {unit}".strip()


def _line(axes: Axes, number: int, points: Points) -> None:
    if points:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, markevery=max(1, len(xs) // 8), **line_look(number))


def _set_heights(axes: Axes, heights: Iterable[Iterable[float]]) -> None:
    if found := [y for line in heights for y in line]:
        margin = 0.06 * (max(found) - min(found)) or 0.001
        axes.set_ylim(min(found) - margin, max(found) + margin)


def _without_far_out(heights: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    reach = sorted(max(map(abs, line)) for line in heights if line)
    typical = reach[len(reach) // 2] if reach else 0.0
    return [line for line in heights if line and max(map(abs, line)) <= FAR_OUT * typical]


def _key(figure: Figure, arms: Sequence[tuple[int, Arm, bool]]) -> None:
    """Name the lines; of each arm its number, and whether it has one."""
    handles = [
        Line2D([], [], label=wrapped(arm.told if drawn else f"{arm.told} (nothing yet)"), **line_look(number))
        for number, arm, drawn in arms
    ]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.76, figure.subplotpars.top + 0.01))


def _mean_curve(results: Results, arm: Arm) -> Points:
    """Means over an arm's runs, the two sides of a growth apart."""
    return _means(
        [((tokens, i), loss) for i, (tokens, loss) in enumerate(run.curve)] for run in results.runs_of(arm.name)
    )


def _paired_curve(results: Results, arm: Arm, reference: Arm) -> Points:
    """Means of differences at the tokens that both have, over the seeds that both have; right after a growth."""
    beside = {run.seed: dict(run.curve) for run in results.runs_of(reference.name)}
    return _means(
        [((tokens, 0), loss - beside[run.seed][tokens]) for tokens, loss in dict(run.curve).items()
         if tokens in beside[run.seed]]
        for run in results.runs_of(arm.name) if run.seed in beside
    )  # fmt: skip


def _means(runs: Iterable[Iterable[tuple[tuple[int, int], float]]]) -> Points:
    """By place, which begins with tokens: means where all of the runs have a value."""
    found: dict[tuple[int, int], list[float]] = {}
    num_runs = 0
    for run in runs:
        num_runs += 1
        for place, value in run:
            found.setdefault(place, []).append(value)
    return [
        (place[0], math.fsum(values) / num_runs) for place, values in sorted(found.items()) if len(values) == num_runs
    ]


def _map_figure(results: Results, comparison: Comparison, key: str, axis: str) -> Figure:
    """Rows: signal maps, noise maps, differences; columns: layers; a line an arm, means over heads and seeds."""
    arms = [(number, arm) for number, arm in enumerate(_compared(results, comparison))
            if any(run.maps for run in results.runs_of(arm.name))]  # fmt: skip
    layers_of = {arm.name: arm.layers for _, arm in arms}
    num_layers = max(layers_of.values())
    layers = _spread_evenly(num_layers, _MOST_LAYERS)
    figure, grid = _grid(len(_MAP_KINDS), len(layers), 2.3, [arm for _, arm in arms])
    for axes_row, (kind, told) in zip(grid, _MAP_KINDS, strict=True):
        for axes, layer in zip(axes_row, layers, strict=True):
            for number, arm in arms:
                _line(axes, number, _map_curve(results, arm, layer, f"{kind}_{key}"))
            axes.set_title(f"{told}, layer {layer}")
        axes_row[0].set_ylabel(axis)
    some = f"; {len(layers)} of {num_layers} layers" if len(layers) < num_layers else ""
    head(figure, results, comparison, f"attention maps over tokens trained on, mean over heads and seeds{some}")
    _key(figure, [(number, arm, True) for number, arm in arms])
    return figure


def _spread_evenly(count: int, most: int) -> list[int]:
    """At most so many of `count` layers, the first and the last among them."""
    return list(range(count)) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _map_curve(results: Results, arm: Arm, layer: int, key: str) -> Points:
    return _means(
        [((maps.tokens, 0), maps.layers[layer][key]) for maps in run.maps
         if layer < len(maps.layers) and key in maps.layers[layer]]
        for run in results.runs_of(arm.name) if run.maps
    )  # fmt: skip
