"""A small chart as inline SVG whose colours are the page's: matplotlib draws with stand-ins, the style sheet fills in.

The page then follows a reader's light or dark mode, and the print medium, with one drawing and no script.
"""

import functools
import io
import json
import re
from collections.abc import Callable
from typing import Final, ParamSpec
from xml.etree import ElementTree

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gdagrow.report.node import Node

# Series colours of the style sheet.
NUM_SERIES: Final = 8
_ROLES: Final = ("ink", "muted", "rule", "paper", "source", "grown", "bad", "noise", "on-series",
                 *(f"s{i}" for i in range(NUM_SERIES)))  # fmt: skip
# Colours that nothing else is drawn in, by what the style sheet calls the real ones.
_STAND_INS: Final = {role: f"#01fe{number:02x}" for number, role in enumerate(_ROLES)}
_PIXELS_PER_INCH: Final = 72  # the unit of matplotlib's SVG
_STYLE: Final = {
    "svg.fonttype": "none", "svg.hashsalt": "gdagrow", "text.parse_math": False, "font.size": 11,
    "xtick.labelsize": 10, "ytick.labelsize": 10, "axes.unicode_minus": True,
    "axes.edgecolor": _STAND_INS["rule"], "axes.linewidth": 1, "axes.facecolor": "none", "figure.facecolor": "none",
    "axes.labelcolor": _STAND_INS["muted"], "text.color": _STAND_INS["ink"],
    "axes.titlecolor": _STAND_INS["ink"], "axes.titlesize": 11.5, "axes.titlelocation": "left", "axes.titlepad": 7,
    "axes.titleweight": "bold",
    "xtick.color": _STAND_INS["rule"], "xtick.labelcolor": _STAND_INS["muted"],
    "ytick.color": _STAND_INS["rule"], "ytick.labelcolor": _STAND_INS["muted"],
    "xtick.major.size": 3, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "grid.color": _STAND_INS["rule"], "grid.linewidth": 0.7, "axes.axisbelow": True,
}  # fmt: skip


def colour(role: str) -> str:
    """What to draw in for a colour of the style sheet."""
    return _STAND_INS[role]


def series(number: int) -> str:
    """What to draw the `number`-th of several in; beyond `NUM_SERIES` the colours come again."""
    return _STAND_INS[f"s{number % NUM_SERIES}"]


_Arguments = ParamSpec("_Arguments")


def in_style(draw: Callable[_Arguments, str]) -> Callable[_Arguments, str]:
    """Have a drawing made in the page's style: matplotlib looks its defaults up whenever something is added."""

    @functools.wraps(draw)
    def styled(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> str:
        with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
            return draw(*args, **kwargs)

    return styled


class Panel:
    """One chart of `width` x `height` CSS pixels with its margins, and what its marks tell.

    Args:
        label: What is drawn, for those who do not see it.
    """

    def __init__(
        self, label: str, *, width: float = 320, height: float = 200, left: float = 46, right: float = 10,
        top: float = 26, bottom: float = 36, title: str = "",
    ) -> None:  # fmt: skip
        self._label, self._notes = _printable(label), list[tuple[str, Node | None]]()
        self.width, self.height = width, height
        self._figure = Figure(figsize=(width / _PIXELS_PER_INCH, height / _PIXELS_PER_INCH))
        self.axes: Axes = self._figure.add_axes(
            (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
        )
        if title:
            self.axes.set_title(_printable(title))

    def note(self, artist: Artist, told: str, node: Node | None = None) -> None:
        """Give a mark a tooltip, and name the figure that it shows."""
        artist.set_gid(f"note{len(self._notes)}")
        self._notes.append((_printable(told), node))

    def svg(self) -> str:
        """The chart as an element for a page, without a name space, a font or a colour of its own."""
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        self._figure.savefig(out, format="svg", metadata=nothing)
        root = ElementTree.fromstring(out.getvalue())
        self._clean(root)
        root.attrib.clear()
        root.attrib.update({
            "class": "panel", "role": "img", "aria-label": self._label, "width": f"{self.width:g}",
            "viewBox": f"0 0 {self.width:g} {self.height:g}",
        })  # fmt: skip
        text = ElementTree.tostring(root, encoding="unicode")
        return re.sub("|".join(_STAND_INS.values()), lambda found: f"var(--{_OF_STAND_IN[found[0]]})", text)

    def _clean(self, root: ElementTree.Element) -> None:
        used = set(re.findall(r'(?:url\(#|href=")#?([^)"]+)', ElementTree.tostring(root, encoding="unicode")))
        for element in list(root.iter()):
            for child in list(element):
                if _local(child.tag) in ("metadata", "style") or _is_background(child):
                    element.remove(child)
        for element in root.iter():
            element.tag = _local(element.tag)
            element.text, element.tail = _stripped(element.text), _stripped(element.tail)
            name = element.attrib.get("id", "")
            attributes = {_local(key): _short(_local(key), value) for key, value in element.attrib.items()}
            if name not in used:
                attributes.pop("id", None)
            element.attrib = {key: value for key, value in attributes.items() if value}
            if name.startswith("note"):
                self._annotate(element, *self._notes[int(name.removeprefix("note"))])

    def _annotate(self, element: ElementTree.Element, told: str, node: Node | None) -> None:
        title = ElementTree.Element("title")
        title.text = told
        element.insert(0, title)
        if node is not None:
            element.attrib |= {"data-figure": node.path, "data-value": json.dumps(node.value)}


_OF_STAND_IN: Final = {stand_in: role for role, stand_in in _STAND_INS.items()}


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _is_background(element: ElementTree.Element) -> bool:
    """Whether it is the figure's or the axes' own patch, which has no colour."""
    styles = [path.get("style") for path in element]
    return element.attrib.get("id", "").startswith("patch_") and styles == ["fill: none"]


def _printable(text: str) -> str:
    """Text without what neither XML nor UTF-8 can hold: control characters and bytes of no character."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _stripped(text: str | None) -> str | None:
    return text if text and text.strip() else None


def _short(key: str, value: str) -> str:
    """An attribute with what takes space and changes nothing left out."""
    if key == "style":
        return re.sub(r"font-family: [^;]+;? ?", "", value).strip("; ")
    if key == "transform":
        value = re.sub(r"rotate\(-?0 [^)]*\)", "", value)
    if key in ("d", "x", "y", "points", "width", "height") or value.startswith("translate"):
        value = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
    return " ".join(value.split())


def power_text(value: float) -> str:
    """A power of ten at an axis: `1e-15`."""
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
