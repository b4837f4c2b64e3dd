"""An experiment's tables: their text, their figures by hand, and that results alone make them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from gdagrow.experiment.results import Comparison, read_results, write_results
from gdagrow.experiment.tables import completeness, tables
from tests.made_results import growth_results, ratio_results

GOLDEN = Path(__file__).parents[1] / "golden"
MADE = {"ratio": ratio_results, "growth": growth_results}


@pytest.mark.parametrize("name", MADE)
def test_the_text_is_pinned(name: str) -> None:
    """To look at after a change that is meant: `tables(ratio_results())` and `tables(growth_results())`."""
    assert tables(MADE[name]()) == (GOLDEN / f"experiment_{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MADE)
def test_the_file_gives_the_same_tables(name: str, tmp_path: Path) -> None:
    write_results(MADE[name](), tmp_path / "results.json")
    assert tables(read_results(tmp_path / "results.json")) == tables(MADE[name]())


@pytest.mark.parametrize("name", MADE)
def test_tables_are_tables(name: str) -> None:
    """As many cells in every row as in its header, whatever a label holds."""
    for block in re.findall(r"(?:^\|.*\n)+", tables(MADE[name]()), re.MULTILINE):
        lines = block.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
        assert set(lines[1]) <= set("|- ")


def row(text: str, label: str, table: int = 0) -> list[str]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", lines[table])[1:-1]]


def test_figures_by_hand() -> None:
    text = tables(ratio_results())
    assert row(text, "1:1") == [
        "1:1", "12 + 12, 12 KV", "1.50 M", "4.10 M", "36.00 TFLOP", "0.002",
        "1.3200 ± 0.0158",  # 1.30 to 1.34 in steps of .01: sqrt(.001 / 4)
        "-", "-", "-", "-", "5 / 5", "reference",
    ]  # fmt: skip
    assert row(text, "8:1") == [
        "8:1", "24 + 3, 3 KV", "1.60 M (x1.07)", "4.10 M (=)", "38.00 TFLOP (x1.06)", "0.002", "1.3260 ± 0.0167",
        "+0.0060 ± 0.0017",  # sqrt((4 + 1 + .25 + 2.25 + 4) / 4) = 1.6956 thousandths
        "+0.0039 to +0.0081",  # 2.7764 * .0016956 / sqrt 5 = .0021054
        # Of the 3125 sums of five of -2, -1.5, .5, 1, 2 the 2.5% lie below -6.5 and above 6.5: 1.3 thousandths.
        "+0.0047 to +0.0073",
        "0.006",  # t = 7.91, p = .00138, times 4: those of 11:1, 3:1 are smaller
        "5 / 5", "higher",
    ]  # fmt: skip
    # The last look of five seeds, two layers: 4 - .6 - .2 + .125 + .02 = 3.345, seeds .01 apart.
    assert row(text, "3:1", 2)[:4] == ["3:1", "grouped differential", "128", "3.345 ± 0.016"]
    assert row(text, "standard attention", 1)[4] == "-"  # no noise maps
    assert row(text, "3:1", 3) == ["3:1", "-", "1.3100", "**1.3000**", "0.002", "yes"]


def test_the_smallest_figure_of_growth() -> None:
    grown = row(tables(growth_results()), "signal x2, exact copies", 1)
    # Before: 1.60 to 1.64. After: 1e-7 more. Transient: .01 and a thousandth a seed.
    assert grown[3:] == ["1.6200 ± 0.0158", "1.6200 ± 0.0158", "1.0e-07", "+0.0120 ± 0.0016", "1.00000 ± 0.00000",
                         "5 / 5"]  # fmt: skip


def test_sentences() -> None:
    made = growth_results()
    assert completeness(ratio_results()) == (
        "Complete: all 40 runs, 8 arms with seeds 0, 1, 2, 3, 4; 6.7 hours on one thread."
    )
    assert completeness(made) == (
        "**Partial: 13 of 20 runs**, 4 arms with seeds 0, 1, 2, 3, 4; 1.1 hours on one thread so far. What follows "
        "may still change. Short of 5 runs: uniform x2 \\| noise at 40 dB (3), from scratch (0)."
    )
    assert "Nothing was stated in advance" in tables(made)
    assert "deviation of 0.0040 in a pilot, with which 5 seeds see a difference of 0.0067 in" in tables(ratio_results())
    assert "6 comparisons were made. Seen: paired standard deviations of 0.0017 (0.0017 to 0.0017)" in tables(
        ratio_results()
    )


def test_no_runs_at_all() -> None:
    text = tables(replace(growth_results(), runs=()))
    assert "**Partial: 0 of 20 runs**" in text
    assert "3 comparisons were made; none has two pairs of runs yet." in text
    assert row(text, "from scratch")[6:] == ["-", "-", "-", "-", "-", "0 / 5", "too few seeds"]
    assert "### Growth" not in text


def test_one_seed() -> None:
    made = ratio_results()
    text = tables(replace(made, seeds=(0,), runs=tuple(run for run in made.runs if run.seed == 0)))
    assert row(text, "2:1")[6:] == ["1.2970", "-0.0030", "-", "-", "-", "1 / 1", "too few seeds"]


def test_arms_that_are_told_alike_are_told_apart_by_name() -> None:
    made = ratio_results()
    arms = tuple(replace(arm, told="3:1") if arm.name == "r4" else arm for arm in made.arms)
    text = tables(replace(made, arms=arms))
    assert "| 3:1 (r3) | grouped differential |" in text
    assert "| 3:1 (r4) | grouped differential |" in text
    assert "| 2:1 | grouped differential |" in text
    assert "| 3:1 (r3) | - | 1.3100 |" in text


def test_words_of_a_recipe_change_no_layout() -> None:
    made = growth_results()
    arms = (replace(made.arms[0], told="a\n| b * <i> [c]"), *made.arms[1:])
    text = tables(replace(made, arms=arms, comparisons=(Comparison("x\n# y", "tokens", "none", ("signal",)),)))
    assert "| a \\| b \\* \\<i> \\[c] |" in text
    assert "\n### x # y\n" in text
