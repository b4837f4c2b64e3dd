"""What the page says of one model: its attention by layer and head, and how like its copies are."""

from collections.abc import Sequence
from functools import partial
from typing import Final

from gdagrow.report.charts import HeatMap, Line, Scale, curves, heat_map
from gdagrow.report.markup import escaped, figure, figure_text, legend, missing, paragraph, scale_bar, section, table
from gdagrow.report.node import Node
from gdagrow.report.panel import colour

_KINDS: Final = (("signal", "signal maps"), ("noise", "noise maps"), ("difference", "differences"))
# A statistic: key, heading, unit of its scale, how it is written, what it shows and how to read it.
_STATISTICS: Final = (
    ("entropy", "Entropy of the attention maps", "nats", "{:.3g}".format,
     "How widely a head looks, on average over all queries: low (dark) heads look at few tokens, high (bright) ones "
     "spread over many. For a difference the weights count by their size."),
    ("top_5_percent", "Share of the largest 5% of the weights", "of all weight", "{:.0%}".format,
     "How much of a head's attention falls on the twentieth of the visible tokens that get most of it: near 100% "
     "is a sharp head, 5% one that looks everywhere alike."),
    ("negative", "Negative share of the differences", "of visible tokens", "{:.0%}".format,
     "The part of the visible tokens that a head weighs below zero, because the noise map takes away more than the "
     "signal map gives: what differential attention does and softmax cannot."),
)  # fmt: skip

# Pixels that a letter of a row's label takes, more or less.
_LETTER: Final = 5.4
# A parameter, the axis along which it has copies, and whether the layer writes that.
_Kind = tuple[str, str, bool]
_ABOUT_COPIES: Final = (
    "Every copy of an index is compared with the first one, as vectors. Growth makes exact copies of what a layer "
    "writes, and parts of a split, which differ by the recipe's noise, of what it reads. Training then lets them part: "
    "the cosine falls from 1, the distance <code>2|a-b| / (|a|+|b|)</code> rises from 0."
)


def attention_sections(identity: str, models: Sequence[tuple[str, Node]]) -> str:
    """Heat maps by layer and head of one model, or of two on the same scale.

    Args:
        identity: Of the section.
        models: What each is called, and its report.
    """
    problems = [missing(f"{called} not run", model["problems"]["attention"].value)
                for called, model in models if not model["attention"]]  # fmt: skip
    known = [(called, model["attention"]) for called, model in models if model["attention"]]
    figures = []
    for key, heading, unit, text, told in _STATISTICS if known else ():
        parts = [(called, kind, title, attention) for called, attention in known for kind, title in _KINDS
                 if attention["layers"][0][kind][key]]  # fmt: skip
        scale = Scale.of([node for _, kind, _, attention in parts for layer in attention["layers"]
                          for node in layer[kind][key]])  # fmt: skip
        panels = [_map(f"{called}: {title}" if len(models) > 1 else title, attention, kind, key, scale)
                  for called, kind, title, attention in parts]  # fmt: skip
        figures.append(figure(heading, told, panels, before=scale_bar(scale, unit, text)))
    figures += [_lambdas(known)] if known else []
    return section(identity, "Attention by layer and head", *problems, *figures)


def _map(title: str, attention: Node, kind: str, key: str, scale: Scale) -> str:
    cells = [list(layer[kind][key]) for layer in attention["layers"]]
    layers, ratio = [layer["layer"].value for layer in attention["layers"]], attention["ratio"].value
    num_heads, of_groups = len(cells[0]), kind == "noise"

    def told(row: int, column: int) -> str:
        group, head = (column, None) if of_groups else divmod(column, ratio)
        name = f"noise head of group {group}" if of_groups else f"signal head {head} of group {group}"
        return f"layer {layers[row]}, {name}"

    heat = HeatMap(
        title, [str(layer) for layer in layers], [str(head) for head in range(num_heads)], cells, told,
        row_axis="layer", column_axis="noise head, one a group" if of_groups else "signal head, group by group",
        separators=() if of_groups else range(ratio, num_heads, ratio),
    )  # fmt: skip
    return heat_map(heat, scale)


def _lambdas(models: Sequence[tuple[str, Node]]) -> str:
    panels = []
    for called, attention in models:
        layers = list(attention["layers"])
        xs = [layer["layer"].value for layer in layers]
        lines = [
            Line(xs, [layer["lambda"] for layer in layers], colour("grown"), told=lambda i: f"layer {i}, lambda"),
            Line(xs, [layer["lambda_init"] for layer in layers], colour("muted"), dashed=True),
        ]
        title = f"{called}: lambda" if len(models) > 1 else "lambda"
        panels.append(curves(title, lines, x_axis="layer", label=f"Lambda of each layer, {called}"))
    told = (
        "How much of the noise map each layer subtracts. The dashed line is the constant that a layer starts from; the "
        "distance from it was learnt."
    )
    keys = legend([("grown", "line", "lambda"), ("muted", "dashed", "lambda_init of the layer")])
    return figure("Lambda", told, panels, before=keys)


def clone_section(identity: str, model: Node) -> str:
    """How like the copies in each tensor are, by layer; empty for a model that nothing says was grown."""
    heading = "How like the copies are"
    if "clones" in model["problems"].value:
        return section(identity, heading, missing("not measured", model["problems"]["clones"].value))
    if not model["clones"]:
        return ""
    rows: dict[_Kind, list[Node]] = {}
    for tensor in model["clones"]["tensors"]:
        kind = tensor["parameter"].value, tensor["axis"].value, tensor["written"].value
        rows.setdefault(kind, []).append(tensor)
    if not rows:
        return section(identity, heading, paragraph("No index has more than one copy."))
    layered = {kind: nodes for kind, nodes in rows.items() if nodes[0]["layer"]}
    drawn = _clone_maps(layered) + _clone_heads(layered) if layered else ""
    head = ("parameter", "copied along", "made as", "cosine, least", "most", "distance, least", "most")
    listed = f"<summary>All {len(rows)} kinds of copies as a table</summary>" + table(
        head, map(_clone_row, rows.items())
    )
    return section(identity, heading, paragraph(_ABOUT_COPIES), drawn, f"<details>{listed}</details>")


def _clone_maps(rows: dict[_Kind, list[Node]]) -> str:
    labels = [f"{_short(parameter)} · {axis}" for parameter, axis, _ in rows]
    layers = sorted({node["layer"].value for nodes in rows.values() for node in nodes})
    panels, scales = [], []
    for key, title in (("relative_distance", "relative distance"), ("cosine", "cosine")):
        cells = [[next((node[key] for node in nodes if node["layer"].value == layer), None) for layer in layers]
                 for nodes in rows.values()]  # fmt: skip
        scale = Scale.of([node for row in cells for node in row if node])
        scales.append(scale_bar(scale, "", "{:.4g}".format, of=title))
        heat = HeatMap(
            title, labels, [str(layer) for layer in layers], cells, row_axis="", column_axis="layer",
            left=14 + _LETTER * max(map(len, labels)), every_row=True,
            told=lambda row, column: f"{labels[row]}, layer {layers[column]}",
        )  # fmt: skip
        panels.append(heat_map(heat, scale))
    told = (
        "Each row is a parameter and the axis along which it has copies, each column a layer. Rows at distance 0 are "
        "exact copies; the others show the noise of the split, and what training made of it."
    )
    return figure(
        "Distance and cosine of copies, by layer", told, panels, before=f'<div class="scales">{"".join(scales)}</div>'
    )


def _clone_heads(rows: dict[_Kind, list[Node]]) -> str:
    """The distance head by head, of what has copies along an axis of heads."""
    of_heads = {kind: nodes for kind, nodes in rows.items() if len(nodes[0]["heads"])}
    if not of_heads:
        return ""
    key = "relative_distance"
    scale = Scale.of([head[key] for nodes in of_heads.values() for node in nodes for head in node["heads"]])
    panels = []
    for (parameter, axis, _), nodes in of_heads.items():
        cells = [[head[key] for head in node["heads"]] for node in nodes]
        layers = [str(node["layer"].value) for node in nodes]
        heads = [head["head"].value for head in nodes[0]["heads"]]
        heat = HeatMap(
            f"{_short(parameter)}, {axis}", layers, [str(i) for i in range(len(heads))], cells,
            partial(_head_told, layers, heads), row_axis="layer", column_axis="head of the source",
        )  # fmt: skip
        panels.append(heat_map(heat, scale))
    told = (
        "The same distance for each head that has copies: after training it shows which heads have parted from their "
        "copies, and in which layers. One scale for all."
    )
    return figure("Distance of copies, head by head", told, panels, before=scale_bar(scale, "", "{:.4g}".format))


def _head_told(layers: Sequence[str], heads: Sequence[str], row: int, column: int) -> str:
    return f"layer {layers[row]}, {heads[column]}"


def _clone_row(entry: tuple[_Kind, list[Node]]) -> Sequence[str]:
    (parameter, axis, written), nodes = entry
    cells = []
    for key in ("cosine", "relative_distance"):
        known = [node[key] for node in nodes if node[key]] or [nodes[0][key]]
        for pick in (min, max):
            cells.append(figure_text(pick(known, key=lambda node: node.value or 0), "{:.6g}".format))
    return (f"<code>{escaped(parameter)}</code>", escaped(axis), "copies" if written else "parts", *cells)


def _short(parameter: str) -> str:
    return parameter.rpartition("{layer}.")[2].removesuffix(".weight")
