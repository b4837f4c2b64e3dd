"""How an experiment's figures look: the colours and letters of `gdagrow report`, in files that stand alone."""

import textwrap
from typing import Any, Final

from matplotlib.figure import Figure

from gdagrow.experiment.results import Comparison, Results

# The style sheet's colours in their light form.
INK, MUTED, RULE, BLUE, ORANGE = "#1b2330", "#5c6675", "#dde1e7", "#2f66d8", "#c2700f"
STYLE: Final = {
    "svg.fonttype": "none", "svg.hashsalt": "gdagrow", "text.parse_math": False, "font.size": 11,
    "xtick.labelsize": 10, "ytick.labelsize": 10, "axes.unicode_minus": True, "text.color": INK,
    "axes.formatter.useoffset": False,
    "axes.edgecolor": RULE, "axes.linewidth": 1, "axes.labelcolor": MUTED, "axes.titlecolor": INK,
    "axes.titlesize": 11.5, "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlepad": 8,
    "xtick.color": RULE, "xtick.labelcolor": MUTED, "ytick.color": RULE, "ytick.labelcolor": MUTED,
    "xtick.major.size": 3, "ytick.major.size": 0, "axes.axisbelow": True, "grid.color": RULE, "grid.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "legend.frameon": False, "legend.fontsize": 10, "legend.labelcolor": INK,
}  # fmt: skip
# Inches: of a line of small letters, and of the two lines over a figure.
LINE: Final = 0.19
HEADING: Final = 0.75
_LONGEST_TITLE: Final = 95  # characters that fit the width of a figure
# Told apart without red and green (P. Tol, "muted"), and by marks, which come round at another turn.
_COLOURS: Final = ("#332288", "#cc6677", "#117733", "#88ccee", "#882255", "#999933", "#aa4499", "#44aa99")
_MARKS: Final = ("s", "^", "D", "v", "P", "X", "<", ">", "p")
_DASHES: Final = ("-", "--", ":")


def line_look(number: int) -> dict[str, Any]:
    """The look of arm `number` of a comparison, of which 0 is the reference."""
    marks = {"markersize": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.6}
    if number == 0:
        return {"color": INK, "linewidth": 2.2, "marker": "o", "zorder": 3, **marks}
    turn, colour = divmod(number - 1, len(_COLOURS))
    mark = _MARKS[(number - 1) % len(_MARKS)]
    return {
        "color": _COLOURS[colour], "linewidth": 1.5, "linestyle": _DASHES[turn % len(_DASHES)], "marker": mark, **marks
    }  # fmt: skip


def wrapped(text: str) -> str:
    """A label in as many lines as it needs."""
    return "\n".join(textwrap.wrap(text, 27)) or text


def num_lines(label: str) -> int:
    """Lines of a label that `wrapped` made."""
    return label.count("\n") + 1


def signed(value: float, digits: str = ".4g") -> str:
    """A difference: with its sign, a minus as long as the plus; `0` for none."""
    return f"{value:+{digits}}".replace("-", "\N{MINUS SIGN}") if value else "0"


def head(figure: Figure, results: Results, comparison: Comparison, told: str) -> None:
    """Write over a figure what it compares, whether it is partial, and how to read it."""
    height = figure.get_figheight()
    partial = "" if results.complete else f" (partial: {len(results.runs)} of {results.num_planned} runs)"
    title = f"{results.title}: {comparison.told}{partial}"
    size = 12.5 * min(1, _LONGEST_TITLE / len(title))
    figure.text(0.012, 1 - 0.3 / height, title, weight="bold", size=size)
    figure.text(0.012, 1 - 0.54 / height, told, color=MUTED, size=10)
