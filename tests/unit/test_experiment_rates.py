"""Which learning rate an arm gets from which sweep."""

from math import inf
from pathlib import Path
from typing import Any

import pytest

from gdagrow.errors import TrainError
from gdagrow.experiment.recipe import read_experiment
from gdagrow.experiment.runs import Experiment
from tests.experiments import with_arms, write_experiment

TUNE: dict[str, Any] = {"learning_rates": [1e-3, 2e-3], "steps": 4, "seed": 9}
ARMS = with_arms(
    wide={"told": "wide", "config": {"intermediate_size": 48}},
    same={"told": "same", "config": {"intermediate_size": 47}, "learning_rate_of": "wide"},
)


def planned(tmp_path: Path, **changes: Any) -> Experiment:
    return Experiment.planned(read_experiment(write_experiment(tmp_path / "r.yaml", **ARMS, **changes)), tmp_path / "o")


def swept(monkeypatch: pytest.MonkeyPatch, none: tuple[float, float], wide: tuple[float, float]) -> None:
    found = {name: dict(zip((1e-3, 2e-3), losses, strict=True)) for name, losses in (("none", none), ("wide", wide))}
    monkeypatch.setattr(Experiment, "tuning", lambda self: found)


def test_arms_that_take_the_rate_of_another_are_not_swept(tmp_path: Path) -> None:
    jobs = planned(tmp_path, tune=TUNE).sweep()
    assert [job.told for job in jobs] == [
        "none, learning rate 0.001", "none, learning rate 0.002", "wide, learning rate 0.001",
        "wide, learning rate 0.002",
    ]  # fmt: skip
    assert {(job.recipe.seed, job.recipe.steps, job.recipe.evaluate_every) for job in jobs} == {(9, 4, 0)}


def test_each_arm_takes_the_best_of_its_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept(monkeypatch, (3.0, 2.9), (2.0, 2.5))
    found = planned(tmp_path, tune=TUNE)
    assert found.learning_rates() == {"none": 2e-3, "signal": 2e-3, "uniform": 2e-3, "wide": 1e-3, "same": 1e-3}
    assert {job.told: job.recipe.optimizer.learning_rate for job in found.runs()}["same, seed 1"] == 1e-3


def test_all_arms_take_the_rate_that_is_best_on_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept(monkeypatch, (3.0, 2.9), (2.0, 2.5))
    assert set(planned(tmp_path, tune={**TUNE, "shared": True}).learning_rates().values()) == {1e-3}


def test_of_equal_rates_the_lower_one_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept(monkeypatch, (3.0, 3.0), (2.0, 2.0))
    assert set(planned(tmp_path, tune=TUNE).learning_rates().values()) == {1e-3}


def test_without_a_sweep_the_recipe_says_it(tmp_path: Path) -> None:
    found = planned(tmp_path)
    assert found.sweep() == []
    assert set(found.learning_rates().values()) == {3e-3}


def test_a_rate_that_diverged_is_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept(monkeypatch, (inf, 2.9), (2.0, 2.5))
    assert planned(tmp_path, tune={**TUNE, "shared": True}).learning_rates()["wide"] == 2e-3
    swept(monkeypatch, (inf, inf), (2.0, 2.5))
    with pytest.raises(TrainError, match="arm none: every learning rate of the sweep diverged; give lower ones"):
        planned(tmp_path, tune=TUNE).learning_rates()


def test_runs_come_seed_by_seed_and_sources_first(tmp_path: Path) -> None:
    told = [job.told for job in planned(tmp_path).runs()]
    first = [f"{name}, seed 0" for name in ("none", "same", "wide", "signal", "uniform")]
    assert told[:5] == first
    assert told[5:] == [name.replace("seed 0", "seed 1") for name in first]
