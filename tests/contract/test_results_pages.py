"""The pages of results say what their data say: tables made again, of the recipe that is in the repository."""

import re
from pathlib import Path

import pytest

from gdagrow.experiment.gather import recipe_as_kept
from gdagrow.experiment.recipe import read_experiment
from gdagrow.experiment.results import read_results
from gdagrow.experiment.tables import tables

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "results").glob("*.md"))
DATA = sorted((ROOT / "docs" / "results").glob("*/results.json"))
LEAST_SEEDS = {"ratio": 5, "growth": 5, "repetition": 3, "domain": 3}


def test_every_experiment_has_its_page() -> None:
    assert {path.parent.name for path in DATA} == set(LEAST_SEEDS)


@pytest.mark.parametrize("data", DATA, ids=lambda path: path.parent.name)
def test_a_page_is_of_its_data(data: Path) -> None:
    name, results = data.parent.name, read_results(data)
    page = (ROOT / "docs" / "results" / f"{name}.md").read_text()
    assert tables(results) in page
    assert results.command in page
    # A plot comes first, then what was found, then the tables.
    assert 0 < page.index("![") < page.index("**Found") < page.index("**Limits") < page.index(tables(results))
    recipe = read_experiment(ROOT / "recipes" / "experiments" / f"{name}.yaml")
    assert results.recipe == recipe_as_kept(recipe)
    for arm in results.arms:
        assert len(results.runs_of(arm.name)) >= LEAST_SEEDS[name], arm.name
    assert results.complete or "**Partial" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_what_a_page_shows_is_there(page: Path) -> None:
    linked = re.findall(r"\]\(([^)#]+)", page.read_text())
    assert linked
    for link in linked:
        assert link.startswith("http") or (page.parent / link).exists(), link
