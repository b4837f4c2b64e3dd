"""Figures of an experiment from lines of its runs that are written here by hand: what counts, from which steps."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gdagrow.experiment.gather import gather
from gdagrow.experiment.jobs import MAPS_FILE, Job
from gdagrow.experiment.results import Results
from gdagrow.experiment.runs import Experiment
from gdagrow.experiment.text import PreparedText
from gdagrow.train.run_directory import METRICS_FILE, MODEL
from tests.experiments import planned

TOKENS = 4 * 32  # of a step


def trained(step: int, loss: float, seconds: float, steps: int = 2) -> dict[str, Any]:
    """A line of training: `steps` steps in so many seconds."""
    return {"step": step, "loss": loss, "tokens_per_second": steps * TOKENS / seconds}


def put(job: Job, *lines: Mapping[str, Any]) -> None:
    (job.directory / MODEL).mkdir(parents=True)
    (job.directory / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


SOURCE = (
    trained(2, 5.5, 1), trained(4, 5.0, 3), {"step": 4, "eval_loss": 4.9},
    trained(20, 4.0, 8, 16), trained(24, 3.5, 2, 4), trained(26, 1.0, 1), {"step": 26, "eval_loss": 3.0},
)  # fmt: skip
FORK = (
    *SOURCE[:3],
    {"step": 4, "event": "growth", "expand": {"signal": 2}}, {"step": 4, "eval_loss": 4.95},
    {"step": 6, "event": "health", "copies": {"signal": {"cosine": 1.0}, "kv": {"cosine": 0.5}}},
    trained(20, 4.25, 16, 16), trained(24, 4.0, 4, 4), trained(26, 1.0, 2), {"step": 26, "eval_loss": 2.75},
    {"step": 26, "event": "health", "copies": {"signal": {"cosine": 0.5}, "kv": {"cosine": 0.25}}},
)  # fmt: skip


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return planned(tmp_path, maps={"every": 8, "seeds": 1})


def results_of(experiment: Experiment) -> Results:
    text = PreparedText(Path("a"), Path("b"), (9, 1), (900, 100), 2.5, 1.5)
    return gather(experiment, {"code": text}, name="growth", scale="default", command="gdagrow experiment growth.yaml")


def test_a_growth_is_what_its_own_lines_say(experiment: Experiment) -> None:
    for name, lines in (("none", SOURCE), ("signal", FORK)):
        put(experiment.job(experiment.arms[name], 1, 3e-3), *lines)
    results = results_of(experiment)
    assert [(run.arm, run.seed, run.loss) for run in results.runs] == [("none", 1, 3.0), ("signal", 1, 2.75)]
    source, fork = results.runs
    assert source.curve == ((4 * TOKENS, 4.9), (26 * TOKENS, 3.0))
    assert fork.curve == ((4 * TOKENS, 4.9), (4 * TOKENS, 4.95), (26 * TOKENS, 2.75))
    # Its own steps alone: 16 + 4 + 2 seconds, not those of its source.
    assert (source.seconds, fork.seconds) == (1 + 3 + 8 + 2 + 1, 16 + 4 + 2)
    assert source.growth is None
    # Of the steps (4, 24], each line once, at the end cosines of all axes; (4.25 + 4 - 4 - 3.5) / 2.
    assert fork.growth == {"before": 4.9, "after": 4.95, "transient": 0.375, "copy_cosine": 0.375}
    assert (source.maps, fork.maps) == ((), ())


def test_maps_are_of_the_first_seeds_alone(experiment: Experiment) -> None:
    for seed in (0, 1):
        job = experiment.job(experiment.arms["none"], seed, 3e-3)
        put(job, *SOURCE)
        (job.directory / MAPS_FILE).write_text(json.dumps([{"step": 8, "layers": [{"lambda": 0.5}]}]))
    first, second = results_of(experiment).runs
    assert [(maps.tokens, maps.layers) for maps in first.maps] == [(8 * TOKENS, ({"lambda": 0.5},))]
    assert second.maps == ()


def test_arms_are_told_with_their_sizes_and_budgets(experiment: Experiment) -> None:
    results = results_of(experiment)
    arm, made = results.arm("signal"), experiment.arms["signal"]
    assert (arm.signal_heads, arm.noise_heads, arm.kv_heads, arm.head_dim, arm.ffn) == (12, 2, 2, 4, 24)
    assert (arm.parameters, arm.tokens, arm.flops) == (made.parameters, 12 * TOKENS, made.flops)
    assert arm.growth is not None
    assert (arm.grown_from, arm.growth["at"], arm.learning_rate) == ("none", 4, 3e-3)
    assert (results.seeds, results.complete, results.texts[0].bigram) == ((0, 1), False, 2.5)
