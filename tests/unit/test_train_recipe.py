"""The recipe of a training run: what it takes, what it refuses and in which words, and that it can be written back."""

from pathlib import Path
from typing import Any

import pytest

from gdagrow.errors import RecipeError
from gdagrow.recipe import make_recipe
from gdagrow.train.recipe import make_train_recipe, read_train_recipe
from tests.trainings import CONFIG, recipe, write_recipe

SHIPPED_FROM = Path(__file__).parents[2]
SHIPPED = sorted((SHIPPED_FROM / "recipes" / "train").glob("*.yaml"))


def test_what_is_left_out_has_its_default() -> None:
    made = make_train_recipe(recipe(), "recipe")
    assert (made.keep, made.precision, made.optimizer.betas, made.growth) == (2, "fp32", (0.9, 0.95), ())
    assert made.evaluates


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_recipe_is_the_same_after_it_was_written_as_used(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ruamel.yaml import YAML

    monkeypatch.chdir(SHIPPED_FROM)
    made = read_train_recipe(path)
    with (tmp_path / "recipe.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(made.as_dict(), file)
    assert read_train_recipe(tmp_path / "recipe.yaml") == made


def test_a_growth_may_stand_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "growth.yaml").write_text("signal: 4:1\n")
    made = make_train_recipe(recipe(growth=[{"at": 5, "expand": str(tmp_path / "growth.yaml")}]), "recipe")
    assert made.growth[0].expand == make_recipe({"signal": "4:1"})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stepps": 3}, "unknown key 'stepps'"),
        ({"optimizer": {"learning_rate": 1e-3, "nesterov": True}}, "unknown key 'optimizer.nesterov'"),
        ({"optimizer": {}}, "optimizer.learning_rate is missing"),
        ({"steps": 0}, "steps: input should be greater than or equal to 1, got 0"),
        ({"steps": "many"}, "steps: input should be a valid integer, got 'many'"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate: input should be"),
        ({"optimizer": {"learning_rate": 1e-3, "momentum": 0.5}}, "optimizer: adamw has no momentum; leave it out"),
        ({"model": {}}, "model: expected either directory (of a checkpoint) or config (keys of a config.json)"),
        ({"model": {"config": {}, "directory": "a"}}, "model: expected either directory"),
        ({"data": {"train": []}}, "data.train: "),
        ({"data": {"train": "a", "evaluation": "b", "held_out": 0.1}}, "data: evaluation and held_out both say"),
        ({"growth": [{"at": 12, "expand": {"signal": 2}}]}, "growth: step 12 is not before the last one, 12"),
        ({"growth": [{"at": 5, "expand": {"signal": 2}}] * 2}, "expected steps in ascending order, each once, got [5,"),
        ({"growth": [{"at": 5, "expand": {"signal": 1}}]}, "growth.0.expand: growth: no growth asked for"),
        ({"growth": [{"at": 5, "expand": {"head_dim": 2}}]}, "head_dim cannot grow"),
        ({"growth": [{"at": 5, "expand": "no.yaml"}]}, "recipe no.yaml: cannot be read: No such file"),
        ({"freeze": {"steps": 3}}, "freeze: nothing to freeze; give layers: [0, 1, ...], layers: old or heads: old"),
        ({"freeze": {"layers": [0, -1], "steps": 3}}, "expected old, or a list of layers counted from 0, got [0, -1]"),
        ({"freeze": {"layers": "new", "steps": 3}}, "freeze.layers: expected old, or a list of layers counted from 0"),
        ({"freeze": {"layers": "old", "steps": 3}}, "a model of new weights has no old heads or layers"),
        ({"freeze": {"heads": "old", "steps": 3}}, "a model of new weights has no old heads"),
        ({"multipliers": True, "optimizer": {"name": "sgd", "learning_rate": 1}}, "multipliers are for adamw"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_sentence(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as refused:
        make_train_recipe(recipe(**changes), "recipe r.yaml")
    assert str(refused.value).startswith("recipe r.yaml: ")
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"steps: .*; unknown key 'a'"):
        read_train_recipe(write_recipe(tmp_path / "r.yaml", steps=-1, a=1))


def test_a_config_is_any_mapping() -> None:
    assert make_train_recipe(recipe(), "r").as_dict()["model"]["config"] == dict(CONFIG)


@pytest.mark.parametrize(
    ("changes", "scales"),
    [({}, True), ({"multipliers": False}, False), ({"multipliers": True}, True),
     ({"optimizer": {"name": "sgd", "learning_rate": 1}}, False),
     ({"optimizer": {"name": "muon", "learning_rate": 1}}, False)],
)  # fmt: skip
def test_multipliers_are_applied_where_they_belong_unless_it_is_said(changes: dict[str, Any], scales: bool) -> None:
    assert make_train_recipe(recipe(**changes), "r").scales_rates is scales
