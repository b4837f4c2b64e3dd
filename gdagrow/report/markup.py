"""Pieces of the page: every text is escaped here, and every figure carries its path and its full value."""

import html
import json
from collections.abc import Callable, Iterable, Sequence

from gdagrow.report.charts import Scale
from gdagrow.report.node import Node

Format = Callable[..., str]


def escaped(text: object) -> str:
    """Text for an element or a quoted attribute; what UTF-8 cannot say, as in some file names, becomes `?`."""
    return html.escape(str(text).encode(errors="replace").decode())


def few_digits(value: float) -> str:
    """Three digits: `1.25e-15`."""
    return f"{value:.3g}"


def whole(value: int) -> str:
    """`1,312,656`."""
    return f"{value:,}"


def percent(value: float) -> str:
    """`99.61%`."""
    return f"{value:.2%}"


def ratio(value: int) -> str:
    """`3:1`."""
    return f"{value}:1"


def figure_text(node: Node, text: Format = few_digits) -> str:
    """A figure as it is read, with where it stands in the JSON and its full value there."""
    told = "&ndash;" if node.value is None else escaped(text(node.value))
    value = escaped(json.dumps(node.value))
    return f'<span class="n" data-figure="{escaped(node.path)}" data-value="{value}">{told}</span>'


def paragraph(*parts: str) -> str:
    """Markup as a paragraph."""
    return f"<p>{''.join(parts)}</p>"


def badge(text: str, kind: str) -> str:
    """A verdict; `kind` is good, bad or none."""
    return f'<span class="badge {kind}">{escaped(text)}</span>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    """A table of markup; the first cell of a row is its heading."""
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    top = f"<thead><tr>{columns}</tr></thead>" if head else ""
    return f'<div class="scrolls"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def figure(title: str, told: str, panels: Iterable[str], *, before: str = "") -> str:
    """Charts under a heading of their own, with what they show and how to read it.

    Args:
        title: Plain text; empty where the section has one.
        told, before: Markup below and above the charts.
    """
    heading = f"<h4>{escaped(title)}</h4>" if title else ""
    shown = f'<div class="panels">{"".join(panels)}</div>'
    return f"<figure>{heading}{before}{shown}<figcaption>{told}</figcaption></figure>"


def scale_bar(scale: Scale, unit: str, text: Format = few_digits, *, of: str = "") -> str:
    """The colours of a heat map, from its lowest to its highest figure; `of` names the map where there are several."""
    stops = ", ".join(scale.stops())
    low, high = (f"<span>{escaped(text(value))}</span>" for value in (scale.low, scale.high))
    drawn = f'<i style="background: linear-gradient(90deg, {stops})"></i>'
    name = f"<b>{escaped(of)}</b>" if of else ""
    return f'<p class="scale">{name}{low}{drawn}{high} {escaped(unit)}</p>'


def legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """What the colours of a chart stand for: role of the style sheet, shape (`box`, `line`, `dashed`), text."""
    keys = "".join(f'<li><i class="{shape}" style="--key: var(--{role})"></i>{escaped(text)}</li>'
                   for role, shape, text in entries)  # fmt: skip
    return f'<ul class="legend">{keys}</ul>'


def missing(what: str, reason: str) -> str:
    """What could not be had, and why."""
    return f'<p class="missing">{badge(what, "none")} {escaped(reason)}</p>'


def section(identity: str, heading: str, *content: str, level: int = 3) -> str:
    """A section with its heading; nothing where it has no content."""
    body = "".join(content)
    return f'<section id="{identity}"><h{level}>{heading}</h{level}>{body}</section>' if body else ""
