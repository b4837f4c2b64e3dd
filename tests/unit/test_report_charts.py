"""The charts of a report: what is drawn stands where its figure says, in the page's colours."""

import math
import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.colors import to_hex

from gdagrow.report.charts import MAX_CELLS, Bar, HeatMap, Line, Scale, bars, curves, heat_map
from gdagrow.report.head_maps import MAX_HEADS, MAX_OLD_GROUPS, head_map, left_out, lineage_map
from gdagrow.report.node import Node
from gdagrow.report.panel import colour


def marks(svg: str) -> dict[str, ElementTree.Element]:
    """The elements that show a figure, by its path."""
    return {e.attrib["data-figure"]: e for e in ElementTree.fromstring(svg).iter() if "data-figure" in e.attrib}


def style(element: ElementTree.Element) -> Mapping[str, str]:
    """The style of what is drawn in a mark."""
    (found,) = [e.attrib["style"] for e in element.iter() if "style" in e.attrib and e.tag in ("path", "use")][-1:]
    return dict(part.strip().split(": ") for part in found.split(";"))


def place(element: ElementTree.Element) -> tuple[float, float]:
    """Where a mark's point stands."""
    (point,) = element.iter("use")
    return float(point.attrib["x"]), float(point.attrib["y"])


def a_map(values: list[list[float]]) -> HeatMap:
    top = Node({"map": values})
    return HeatMap("a map", [f"r{i}" for i in range(len(values))], [f"c{i}" for i in range(len(values[0]))],
                   [list(row) for row in top["map"]], lambda row, column: f"row {row}, column {column}", "row", "column"
                   )  # fmt: skip


def test_cells_have_the_colours_of_their_values() -> None:
    values = [[0.0, 1.0, 2.5], [10.0, 7.5, 5.0]]
    found = marks(heat_map(a_map(values), Scale(0, 10)))
    colours = {f"map.{row}.{column}": to_hex(matplotlib.colormaps["cividis"](value / 10))
               for row, line in enumerate(values) for column, value in enumerate(line)}  # fmt: skip
    assert {path: style(cell)["fill"] for path, cell in found.items()} == colours
    assert found["map.1.0"].findtext("title") == "row 1, column 0: 10"
    assert found["map.1.2"].attrib["data-value"] == "5.0"


def test_rows_go_down_and_columns_right() -> None:
    corners = {}
    for path, cell in marks(heat_map(a_map([[1.0, 2.0], [3.0, 4.0]]), Scale(1, 4))).items():
        (drawn,) = cell.iter("path")
        numbers = list(map(float, re.findall(r"[\d.]+", drawn.attrib["d"])))
        corners[path] = min(numbers[::2]), min(numbers[1::2])
    assert corners["map.0.0"][0] == corners["map.1.0"][0] < corners["map.0.1"][0]
    assert corners["map.0.0"][1] == corners["map.0.1"][1] < corners["map.1.0"][1]


def test_too_many_cells_are_one_picture() -> None:
    rows = MAX_CELLS // 20 + 1
    svg = heat_map(a_map([[float(row + column) for column in range(20)] for row in range(rows)]), Scale(0, rows + 20))
    assert marks(svg) == {}
    assert svg.count("data:image/png;base64,") == 1
    assert len(svg) < 20_000


def test_a_scale_of_one_value_is_drawn() -> None:
    found = marks(heat_map(a_map([[2.0, 2.0]]), Scale.of([Node(2.0)])))
    assert {style(cell)["fill"] for cell in found.values()} == {to_hex(matplotlib.colormaps["cividis"](0.5))}


def a_curve(values: list[float | None], **more: Any) -> dict[str, ElementTree.Element]:
    line = Line(range(len(values)), list(Node({"v": values})["v"]), colour("grown"), told=lambda i: f"layer {i}")
    return marks(curves("a curve", [line], x_axis="layer", label="A curve", **more))


def test_points_stand_at_their_logarithms() -> None:
    found = a_curve([1e-14, 1e-12, 1e-13], limits=(1e-16, 1e-10))
    (x0, y0), (x1, y1), (x2, y2) = (place(found[f"v.{i}"]) for i in range(3))
    # Coordinates are written to 0.01.
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.03)
    assert y0 - y1 == pytest.approx(2 * (y0 - y2), abs=0.05)
    assert y0 - y1 > 20


def test_zero_is_hollow_at_the_foot_and_what_is_not_finite_stands_at_the_top() -> None:
    found = a_curve([0.0, 1e-15, None], limits=(1e-16, 1e-10), bad=[False, False, True])
    heights = [place(found[f"v.{i}"])[1] for i in range(3)]
    assert heights[0] > heights[1] > heights[2]
    assert [style(found[f"v.{i}"])["fill"] for i in range(3)] == ["var(--paper)", "var(--grown)", "var(--bad)"]
    assert [found[f"v.{i}"].findtext("title") for i in (0, 2)] == ["layer 0: 0", "layer 2: not finite"]


def test_bars_are_as_long_as_their_figures() -> None:
    parts = Node({"a": 30, "b": 90})
    svg = bars([(key, [Bar(key, parts[key], f"{parts[key].value}", colour("source"))]) for key in "ab"], label="Bars")
    widths = {}
    for path, bar in marks(svg).items():
        (drawn,) = bar.iter("path")
        xs = list(map(float, re.findall(r"[\d.]+", drawn.attrib["d"])))[::2]
        widths[path] = max(xs) - min(xs)
    assert widths["b"] == pytest.approx(3 * widths["a"], abs=0.05)
    assert ">30<" in svg


def test_a_chart_has_no_colour_font_or_name_space_of_its_own() -> None:
    svg = curves("$x$ <i>", [Line([0, 1], list(Node([1.0, 2.0])), colour("grown"))], x_axis="step", label='"L"')
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert "var(--ink)" in svg
    assert "xmlns" not in svg
    assert "font-family" not in svg
    assert "$x$ &lt;i&gt;" in svg
    assert svg == curves("$x$ <i>", [Line([0, 1], list(Node([1.0, 2.0])), colour("grown"))], x_axis="step", label='"L"')


def titles(svg: str) -> list[str]:
    return [title.text or "" for title in ElementTree.fromstring(svg).iter("title")]


def a_lineage(signal: list[list[list[int]]], noise: list[int]) -> Node:
    return Node({"signal_heads": signal, "noise_heads": noise, "kv_groups": [0]})


def test_a_line_leads_from_each_grown_head_to_its_own_source() -> None:
    """3:1 to 4:1: the first head of each group is cloned once more, and stands last."""
    lineage = a_lineage([[[0, 0], [0, 1], [0, 2], [0, 0]], [[1, 0], [1, 1], [1, 2], [1, 0]]], [0, 1])
    svg = lineage_map(lineage, 1, 3)
    assert "signal head 3 of group 1, cloned from signal head 0 of group 1 of the source" in titles(svg)
    assert "noise head of group 1, cloned from noise head of group 1 of the source" in titles(svg)
    assert len(titles(svg)) == 3 + 1 + 4 + 1
    # A band's path is the only one with a curve and no filling.
    bands = re.findall(r'<path d="M[^"]* C [^"]*" style="fill: none; opacity: 0.38; stroke: var\(--(\w+)\)', svg)
    assert bands == ["s0", "s1", "s2", "s0", "noise"]


def test_groups_come_from_their_own_group() -> None:
    lineage = a_lineage([[[0, 0]], [[1, 0]], [[0, 0]], [[1, 0]]], [0, 1, 0, 1])
    assert ">group 1<" in lineage_map(lineage, 1, 1)
    assert ">group 3<" in lineage_map(lineage, 1, 1)
    assert ">group 2<" not in lineage_map(lineage, 1, 1)


def test_what_is_not_drawn_is_said() -> None:
    many = a_lineage([[[0, head % 2] for head in range(MAX_HEADS + 5)]] * 3, [0, 0, 0])
    told = "2 more groups of the source, 2 more groups grown from each, 5 more signal heads of each group"
    assert left_out(many, MAX_OLD_GROUPS + 2) == told
    assert len(titles(lineage_map(many, 0, 2))) == 3 + MAX_HEADS + 1
    assert left_out(a_lineage([[[0, 0]]], [0]), 1) == ""


def test_a_head_map_counts_what_it_leaves_out() -> None:
    svg = head_map(3, 15, 3, label="heads")
    assert svg.count(">+7<") == 3
    assert titles(svg)[:2] == ["signal head 0 of group 0", "signal head 1 of group 0"]
    assert len(titles(svg)) == 3 * (8 + 1)
    assert all(math.isfinite(float(number)) for number in re.findall(r"-?\d+\.\d+", svg))


def test_names_that_no_file_format_can_hold_are_shown_all_the_same() -> None:
    line = Line([0], list(Node([1.0])), colour("grown"), told=lambda i: "a\x00b\udc80")
    svg = curves("x\x01\udcff", [line], x_axis="step", label="\x1b[31m")
    assert titles(svg) == ["a?b?: 1"]
    assert ">x??</text>" in svg
    svg.encode()


@pytest.mark.parametrize("columns", [64, 512, 4096])
def test_a_picture_fills_its_axes(columns: int) -> None:
    svg = heat_map(a_map([[0.0] * columns] * (MAX_CELLS // columns + 1)), Scale(0, 1))
    (image,) = ElementTree.fromstring(svg).iter("image")
    scale = float(re.findall(r"matrix\(([-\d.e]+)|scale\(([-\d.e]+)", image.attrib["transform"])[0][0] or 0)
    assert scale * float(image.attrib["width"]) == pytest.approx(320 - 46 - 10, rel=1e-3), image.attrib["transform"]
