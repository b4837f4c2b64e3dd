"""`gdagrow experiment` as a user runs it: every recipe in its quick form, and one killed and gone on with."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from gdagrow.experiment.page import TABLES
from gdagrow.experiment.recipe import read_experiment
from gdagrow.experiment.results import Results, Run, read_results
from gdagrow.experiment.tables import tables
from tests.command import call, run, start
from tests.experiments import with_arms, write_experiment
from tests.trainings import lines

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "experiments").glob("*.yaml"))
# A growth is exact but for the rounding of float32 in two forward passes of one layer: no sum there is of more than a
# few hundred terms, and what is left of them in a mean over tokens is a few units in the last place of a loss near 5.
SAME = 64 * 2**-23 * 5


def grown(results: Results) -> list[Run]:
    return [run for run in results.runs if run.growth is not None]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_quick_form_of_a_recipe_goes_through(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = run("experiment", recipe, "--quick", "--out", out, "--jobs", 1, "--quiet", cwd=tmp_path)
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    asked, results = read_experiment(recipe, "quick"), read_results(out / "results.json")
    assert results.complete
    assert {(run.arm, run.seed) for run in results.runs} == {(arm, seed) for arm in asked.arms for seed in asked.seeds}
    assert (out / TABLES).read_text() == tables(results)
    for number in range(1, len(asked.comparisons) + 1):
        assert (out / f"{recipe.stem}-differences-{number}.png").stat().st_size > 10_000
        assert (out / f"{recipe.stem}-losses-{number}.svg").stat().st_size > 10_000
    for done in grown(results):
        assert done.growth is not None
        assert abs(done.growth["after"] - done.growth["before"]) < SAME
        exact = "exact" in done.arm
        assert (done.growth["copy_cosine"] == 1) == exact, done.arm
    assert len(grown(results)) == len(asked.seeds) * sum(arm.growth is not None for arm in asked.arms.values())
    if asked.maps is not None:
        mapped = {run.seed for run in results.runs if run.maps}
        assert mapped == set(asked.seeds[: asked.maps.seeds])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_gpu_form_of_a_recipe_is_planned(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    outcome = call(capsys, "experiment", recipe, "--scale", "gpu", "--dry-run", "--json", "--out", out)
    assert outcome.code == 0
    found = json.loads(outcome.out)
    assert found["runs"] == len(found["arms"]) * len(found["seeds"])
    assert all(arm["parameters"] > 30e6 for arm in found["arms"])
    # A day of one GPU at 100 TFLOP/s.
    assert 0.3 < found["flops"] / (86_400 * 100e12) < 1.2
    assert not out.exists()


def against_none(*arms: str) -> list[dict[str, Any]]:
    return [{"told": "Growth", "matched": "tokens", "reference": "none", "arms": list(arms)}]


def figures(out: Path) -> dict[str, Any]:
    """All of results.json but what differs from run to run."""
    found = json.loads((out / "results.json").read_text())
    return {
        **found,
        "command": "",
        "runs": [{key: value for key, value in each.items() if key != "seconds"} for each in found["runs"]],
    }


def test_an_experiment_that_is_killed_goes_on_to_the_same_figures(tmp_path: Path) -> None:
    noisy = {"told": "20 dB", "from": "none", "growth": {"expand": {"signal": 2, "snr_db": 20}}}
    recipe = write_experiment(
        tmp_path / "growth.yaml", **with_arms(noisy=noisy),
        tune={"learning_rates": [1e-3, 3e-3], "steps": 4, "seed": 9}, maps={"every": 4, "seeds": 1, "sequences": 1},
    )  # fmt: skip
    assert run("experiment", recipe, "--out", tmp_path / "whole", "--jobs", 1).code == 0
    out, kills = tmp_path / "killed", 0
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        process = start("experiment", recipe, "--out", out, "--jobs", 2, "--quiet")
        before = set(out.glob("runs/*/*/model"))
        while process.poll() is None and len(set(out.glob("runs/*/*/model")) - before) < 2:
            time.sleep(0.02)
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
        kills += process.returncode != 0
        if number != signal.SIGKILL and process.returncode:
            assert process.returncode == 128 + number
            assert "runs are done and in" in told
            assert "Traceback" not in told
            assert not read_results(out / "results.json").complete
    assert kills >= 2
    outcome = run("experiment", recipe, "--out", out, "--jobs", 2)
    assert outcome.code == 0
    assert figures(out) == figures(tmp_path / "whole")
    # All is done, so nothing is run again.
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/metrics.jsonl")}
    again = run("experiment", recipe, "--out", out)
    assert again.code == 0
    assert "arms: 8 runs, 8 of them done" in again.err
    assert stamps == {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/metrics.jsonl")}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("experiment")
    late = {"told": "late", "from": "none", "growth": {"at": 8, "expand": {"signal": 2}}}
    recipe = write_experiment(
        directory / "growth.yaml", **with_arms(uniform=None, late=late), comparisons=against_none("signal", "late")
    )
    assert run("experiment", recipe, "--out", directory / "out", "--quiet").code == 0
    return directory


def test_arms_share_the_beginning_of_what_they_go_on_from(done: Path) -> None:
    runs = done / "out" / "runs"
    whole = [line for line in lines(runs / "none" / "seed-1") if "loss" in line]
    for arm, at in (("signal", 4), ("late", 8)):
        own = [line for line in lines(runs / arm / "seed-1") if "loss" in line]
        shared = sum(line["step"] <= at for line in whole)
        assert own[:shared] == whole[:shared]
        assert own[shared:] != whole[shared:]
    assert not list(runs.glob("*/*/grown-*"))
    assert {path.name for path in (runs / "none" / "seed-0").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}


def test_seeds_and_arms_may_be_added(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_experiment(
        done / "growth.yaml", **with_arms(uniform=None), seeds=[0, 1, 2], comparisons=against_none("signal")
    )
    before = {path: path.stat().st_mtime_ns for path in (done / "out").glob("runs/*/seed-[01]/metrics.jsonl")}
    assert call(capsys, "experiment", recipe, "--out", done / "out", "--quiet", "--jobs", 1).code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert read_results(done / "out" / "results.json").seeds == (0, 1, 2)


def test_runs_of_another_recipe_are_refused(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_experiment(done / "other.yaml", grow_at=8)
    before = (done / "out" / "results.json").read_bytes()
    outcome = call(capsys, "experiment", recipe, "--out", done / "out")
    assert outcome.code == 2
    assert (
        "seed-0 was run with another growth than the recipe says; remove it to run it again, or choose" in outcome.err
    )
    assert (done / "out" / "results.json").read_bytes() == before


def test_a_run_that_diverges_is_told_and_the_others_are_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"told": "huge weights", "config": {"initializer_range": 1e30}}
    recipe = write_experiment(
        tmp_path / "bad.yaml", **with_arms(signal=None, uniform=None, bad=bad), comparisons=against_none("bad")
    )
    outcome = call(capsys, "experiment", recipe, "--out", tmp_path / "out", "--jobs", 1)
    assert outcome.code == 2
    assert "error: bad, seed 0: step 2: the loss is nan; lower the learning rate, remove " in outcome.err
    assert {run.arm for run in read_results(tmp_path / "out" / "results.json").runs} == {"none"}


def test_two_at_once_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = write_experiment(tmp_path / "one.yaml"), tmp_path / "out"
    first = start("experiment", recipe, "--out", out, "--jobs", 1)
    while first.poll() is None and not list(out.glob("runs/*/*")):
        time.sleep(0.02)
    outcome = call(capsys, "experiment", recipe, "--out", out)
    first.kill()
    first.communicate()
    assert outcome.code == 2
    assert "another process runs this experiment; wait for it or stop it" in outcome.err
