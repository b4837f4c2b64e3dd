"""An experiment's figures and the files beside its results: there, readable, replaced whole."""

import io
import struct
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.backend_bases import RendererBase
from matplotlib.text import Text
from matplotlib.transforms import Bbox

import gdagrow.experiment.page
from gdagrow.errors import OutputError, ReportError
from gdagrow.experiment.look import STYLE
from gdagrow.experiment.page import write_report
from gdagrow.experiment.plots import _figures, plots
from gdagrow.experiment.results import Comparison, Results
from gdagrow.experiment.tables import tables
from tests.made_results import arm, growth_results, ratio_results

LABEL = "signal x2 with zero-sum noise at 40 dB, moments reset and multipliers"


def many_arms() -> Results:
    """Ten arms against one, with long labels and one that lies far out."""
    made = ratio_results()
    more = tuple(arm(f"more{i}", f"{i}. {LABEL}") for i in range(3))
    far = tuple(replace(run, arm="more0", loss=run.loss + 0.5) for run in made.runs_of("r1"))
    near = tuple(replace(run, arm="more1") for run in made.runs_of("r3")[:2])
    names = tuple(arm.name for arm in (*made.arms, *more) if arm.name != "r1")
    comparison = Comparison("Ten arms", "tokens", "r1", names)
    return replace(made, arms=(*made.arms, *more), runs=(*made.runs, *far, *near), comparisons=(comparison,))


def png_size(content: bytes) -> tuple[int, int]:
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def words(svg: bytes) -> list[str]:
    root = ElementTree.fromstring(svg)
    return ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_files_are_named_by_comparison() -> None:
    kinds = ("differences", "entropy", "losses", "top-5-percent")
    expected = {f"ratio-{kind}-{i}.{end}" for kind in kinds for i in (1, 2) for end in ("png", "svg")}
    assert set(plots(ratio_results())) == expected
    # Without maps there is no figure of them.
    assert sorted(plots(growth_results())) == [
        "growth-differences-1.png", "growth-differences-1.svg", "growth-losses-1.png", "growth-losses-1.svg"
    ]  # fmt: skip


def test_figures_are_drawn_the_same_every_time() -> None:
    assert plots(growth_results()) == plots(growth_results())


def test_what_a_figure_says() -> None:
    files = plots(many_arms())
    assert png_size(files["ratio-losses-1.png"])[0] == 1650  # 11 inches at 150 dots
    assert png_size(files["ratio-differences-1.png"])[0] == 1650
    found = words(files["ratio-differences-1.svg"])
    assert "Ratio scan: Ten arms (partial: 47 of 55 runs)" in found
    assert "held-out loss at the end; equal tokens; verdict by a paired t test at 5%, Holm's correction for 10" in found
    assert [found.count(verdict) for verdict in ("reference", "lower", "higher", "not resolved", "too few seeds")] == [
        1, 2, 4, 3, 1
    ]  # fmt: skip
    assert "+0.5000 \N{RIGHTWARDS ARROW}" in found  # far out, told in figures
    assert "no pair of runs yet" in found
    assert "reset and multipliers (2 of" in found  # a label in lines
    assert {"1.54 M", "36.80 TFLOP", "1.3090"} <= set(found)


def test_text_stays_inside_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten arms with long labels: no letter beyond the figure, no label over another."""
    drawn: list[tuple[str, Bbox]] = []
    draw = Text.draw

    def draw_and_note(text: Text, renderer: RendererBase) -> None:
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            drawn.append((text.get_text(), text.get_window_extent(renderer)))

    monkeypatch.setattr(Text, "draw", draw_and_note)
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        for name, figure in _figures(many_arms()):
            drawn.clear()
            figure.savefig(io.BytesIO(), format="png", dpi=figure.dpi)
            assert len(drawn) > 20
            width, height = figure.get_size_inches() * figure.dpi
            for number, (told, box) in enumerate(drawn):
                assert (min(box.x0, box.y0) >= 0, box.x1 <= width, box.y1 <= height) == (True, True, True), (name, told)
                assert [other for other, place in drawn[:number] if place.overlaps(box)] == [], (name, told)


def test_nothing_done_yet_is_drawn_too() -> None:
    files = plots(replace(growth_results(), runs=()))
    assert len(files) == 4
    assert words(files["growth-differences-1.svg"]).count("no pair of runs yet") == 3
    assert "from scratch (nothing yet)" in words(files["growth-losses-1.svg"])


def test_a_report_replaces_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "tables.md").write_text("old")
    (tmp_path / "other.png").write_text("someone else's")
    written = write_report(growth_results(), tmp_path)
    assert [path.name for path in written] == [
        "growth-differences-1.png", "growth-differences-1.svg", "growth-losses-1.png", "growth-losses-1.svg",
        "tables.md",
    ]  # fmt: skip
    assert (tmp_path / "tables.md").read_text(encoding="utf-8") == tables(growth_results())
    assert sorted(tmp_path.iterdir()) == sorted([*written, tmp_path / "other.png"])


def test_nothing_is_written_where_one_file_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "tables.md").mkdir()
    with pytest.raises(OutputError, match=r"tables\.md exists and is not a file"):
        write_report(growth_results(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tables.md"]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gdagrow.experiment.page, "find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(ReportError) as error:
        write_report(growth_results(), tmp_path)
    assert str(error.value) == (
        "tables and figures of an experiment need matplotlib: pip install 'gdagrow[experiment]'; "
        f"the runs in {tmp_path} are kept"
    )
    assert list(tmp_path.iterdir()) == []
