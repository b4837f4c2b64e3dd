"""A run of an experiment: when it may go on, from what, and what is left when it is done; nothing is trained here."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gdagrow.errors import TrainError
from gdagrow.experiment import jobs
from gdagrow.experiment.jobs import MAPS_FILE, Job, require_same, run_job
from gdagrow.train.beginning import write_recipe
from gdagrow.train.recipe import read_train_recipe
from gdagrow.train.run_directory import METRICS_FILE, MODEL, RECIPE_FILE, TOKENS, checkpoint_name
from tests.experiments import planned, with_arms

MAPS: dict[str, Any] = {"every": 4, "seeds": 1}


def job_of(tmp_path: Path, arm: str, seed: int = 0, **changes: Any) -> Job:
    experiment = planned(tmp_path, **changes)
    return experiment.job(experiment.arms[arm], seed, 3e-3)


def begun(job: Job, *steps: int) -> Job:
    """Put a run there as it is while it is trained, with states that are empty."""
    job.directory.mkdir(parents=True)
    for step in steps:
        (job.directory / checkpoint_name(step)).mkdir()
    write_recipe(job.recipe, job.directory / RECIPE_FILE)
    lines = [{"step": step, "eval_loss": 5.0 - step / 10} for step in (4, 8, 12)]
    (job.directory / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return job


def test_a_fork_begins_as_its_own_run_at_the_state_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(job_of(tmp_path, "none"), 4, 8, 12)
    fork = job_of(tmp_path, "signal")
    monkeypatch.setattr("gdagrow.train.run.train", lambda *given, **more: None)
    jobs._train(fork, lambda step: None)
    assert [path.name for path in fork.directory.glob("checkpoint-*")] == ["checkpoint-4"]
    assert read_train_recipe(fork.directory / RECIPE_FILE) == fork.recipe
    assert (fork.directory / METRICS_FILE).read_text() == '{"step": 4, "eval_loss": 4.6}\n'
    require_same(fork)
    # What was begun in one way does not go on in another, done or not.
    multiplied = {"told": "x", "from": "none", "growth": {"expand": {"signal": 2}}, "multipliers": True}
    with pytest.raises(TrainError, match="signal/seed-0 was run with another multipliers than the recipe says"):
        require_same(job_of(tmp_path, "signal", **with_arms(signal=multiplied)))


def test_a_fork_whose_source_has_no_such_state_is_refused(tmp_path: Path) -> None:
    begun(job_of(tmp_path, "none"), 8)
    with pytest.raises(TrainError, match="none/seed-0/checkpoint-4, from which signal, seed 0 goes on, is gone"):
        run_job(job_of(tmp_path, "signal"), lambda step: None)
    assert not job_of(tmp_path, "signal").directory.exists()


def test_states_stay_that_others_go_on_from(tmp_path: Path) -> None:
    late = {"told": "late", "from": "none", "growth": {"at": 8, "expand": {"signal": 2}}}
    job = begun(job_of(tmp_path, "none", **with_arms(late=late)), 4, 8, 12)
    assert (job.states_kept, job.recipe.keep) == ((4, 8), 6)
    jobs._remove_states(job)
    assert {path.name for path in job.directory.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}


def test_maps_are_those_of_the_first_seeds_after_a_growth_and_at_the_end(tmp_path: Path) -> None:
    assert job_of(tmp_path, "none", 0, maps=MAPS).mapped_steps == [4, 8, 12]
    assert job_of(tmp_path, "signal", 0, maps=MAPS).mapped_steps == [8, 12]
    assert job_of(tmp_path, "none", 0, maps={"every": 8, "seeds": 1}).mapped_steps == [8, 12]
    assert job_of(tmp_path, "none", 1, maps=MAPS).mapped_steps == []
    assert job_of(tmp_path, "none", 1, maps=MAPS, seeds=[1, 0]).mapped_steps == [4, 8, 12]


def test_maps_that_were_not_measured_in_time_are_told(tmp_path: Path) -> None:
    job = begun(job_of(tmp_path, "none", maps=MAPS), 4)
    (job.directory / MODEL).mkdir()
    assert not job.is_done
    with pytest.raises(TrainError, match="none/seed-0 has no state any more after step 8, whose attention maps"):
        run_job(job, lambda step: None)
    assert not (job.directory / MAPS_FILE).exists()
    (job.directory / MAPS_FILE).write_text(json.dumps([{"step": 4, "layers": []}, {"step": 12, "layers": []}]))
    with pytest.raises(TrainError, match="another maps than the recipe says"):
        require_same(job)


def test_a_run_finds_its_text_where_it_was_moved(tmp_path: Path) -> None:
    begun(job_of(tmp_path, "none"))
    (tmp_path / "other").mkdir()
    moved = planned(tmp_path / "other")
    shutil.move(tmp_path / "out", moved.directory)
    text = moved.directory / "text" / "code"
    text.mkdir(parents=True)
    for name in ("train.bin", "held-out.bin"):
        (text / name).write_bytes(bytes(128))
    there = moved.job(moved.arms["none"], 0, 3e-3)
    require_same(there)
    jobs._find_text(there)
    assert read_train_recipe(there.directory / RECIPE_FILE) == there.recipe
    described = json.loads((there.directory / TOKENS / "data.json").read_text())
    assert described["evaluation"][0]["path"] == str(text / "held-out.bin")


def test_a_text_that_is_gone_is_not_made_anew_under_runs(tmp_path: Path) -> None:
    begun(job_of(tmp_path, "none"))
    with pytest.raises(TrainError, match="text/code is gone, on which none were trained"):
        planned(tmp_path).prepare_texts()


def test_a_job_is_the_recipe_at_a_rate_and_a_seed(tmp_path: Path) -> None:
    tune = {"learning_rates": [1e-3, 6e-3], "steps": 4, "seed": 9}
    experiment = planned(tmp_path, tune=tune, **with_arms(same={"told": "x", "learning_rate_of": "none"}))
    swept = experiment.sweep()
    assert [job.directory.relative_to(tmp_path / "out" / "runs") for job in swept] == [
        Path("none/rate-0.001"), Path("none/rate-0.006"),
    ]  # fmt: skip
    assert all((job.recipe.seed, job.recipe.steps, job.may_diverge) == (9, 4, True) for job in swept)
    for job, loss in zip(swept, (5.0, 4.0), strict=True):
        (begun(job).directory / METRICS_FILE).write_text(json.dumps({"step": 4, "eval_loss": loss}) + "\n")
        (job.directory / MODEL).mkdir()
    assert experiment.tuning() == {"none": {1e-3: 5.0, 6e-3: 4.0}}
    assert experiment.learning_rates() == dict.fromkeys(("none", "signal", "uniform", "same"), 6e-3)
    runs = experiment.runs()
    assert {job.recipe.optimizer.learning_rate for job in runs} == {6e-3}
    # Seed by seed, and forks after what they go on from.
    assert [job.told for job in runs[:4]] == [f"{name}, seed 0" for name in ("none", "same", "signal", "uniform")]
    assert [(job.recipe.seed, job.fork_at) for job in runs] == [(s, at) for s in (0, 1) for at in (0, 0, 4, 4)]
    (swept[1].directory / "diverged.json").write_text("{}")
    assert experiment.learning_rates()["none"] == 1e-3
