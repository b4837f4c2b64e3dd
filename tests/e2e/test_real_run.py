"""A run as users have it, on real text: killed, resumed, grown by signals or uniformly with its optimizer, trained on.

The text is Python's own library, the model learns from it in half a minute, and every command is a process of its own.
Nothing is said of which growth is better: that takes more tokens and seeds than a test has.
"""

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gdagrow.train.demo import standard_library_text
from tests.command import run, start
from tests.trainings import CONFIG, lines, losses, write_recipe

STEPS, GROWN = 60, 75
MODEL = {**CONFIG, "hidden_size": 64, "intermediate_size": 192, "num_key_value_heads": 4, "head_dim": 16,
         "max_position_embeddings": 128}  # fmt: skip
RUN: dict[str, Any] = {
    "model": {"config": MODEL}, "data": {"train": "{stdlib}/*.py", "held_out": 0.02}, "context_length": 128,
    "batch_size": 32, "optimizer": {"learning_rate": 4e-3}, "schedule": {"kind": "constant", "warm_up": 10},
    "save_every": 15, "keep": 9, "evaluate_every": 15, "evaluate_on": 64,
}  # fmt: skip
ARMS = {"signal": {"signal": 2}, "uniform": {"uniform": 2}}
# Where the first clone of query head 0 stands: behind the three signal heads of its group, or in a copy of the groups.
CLONE = {"signal": 3, "uniform": 8}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its midst and resumed to its end."""
    directory = tmp_path_factory.mktemp("real")
    recipe = write_recipe(directory / "run.yaml", **RUN, steps=STEPS)
    process = start("train", recipe, "--out", directory / "run", "--quiet")
    deadline = time.monotonic() + 100
    while not (directory / "run" / "checkpoint-15").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (directory / "run" / "model").exists()
    outcome = run("train", recipe, "--out", directory / "run", "--resume", "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    return directory / "run"


@pytest.fixture(scope="module", params=list(ARMS))
def grown(request: pytest.FixtureRequest, source: Path) -> Path:
    """The same run, grown at its last step and gone on with."""
    directory = source.with_name(request.param)
    shutil.copytree(source, directory)
    growth = [{"at": STEPS, "expand": ARMS[request.param]}]
    recipe = write_recipe(source.with_name(f"{request.param}.yaml"), **RUN, steps=GROWN, growth=growth, health_every=5)
    outcome = run("train", recipe, "--out", directory, "--resume", "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    return directory


def held_out(directory: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["eval_loss"]) for line in lines(directory) if "eval_loss" in line]


def test_it_learns_and_no_step_is_lost_or_made_twice(source: Path) -> None:
    found = losses(source)
    assert list(found) == list(range(1, STEPS + 1))
    text, _ = standard_library_text()
    counts = torch.bincount(text.long(), minlength=256).double()
    share = counts / counts.sum()
    unigram = -torch.xlogy(share, share).sum().item()
    # Much better than by how often each byte occurs.
    assert held_out(source)[-1][1] < unigram - 0.5


def test_the_loss_stays_at_growth_and_goes_on_falling(grown: Path) -> None:
    (_, start), *_, (step, before), (again, after), (last, end) = held_out(grown)
    assert (step, again, last) == (STEPS, STEPS, GROWN)
    # bf16 has no part in it: float32 sums of up to 768 terms, in a mean over 8,192 tokens.
    assert after == pytest.approx(before, rel=1e-6)
    assert end < after < start
    found = losses(grown)
    assert list(found) == list(range(1, GROWN + 1))
    # No spike: the first steps after growth lie where the last ones before it lay.
    around = [sum(found[step] for step in range(first, first + 5)) / 5 for first in (STEPS - 4, STEPS + 1)]
    assert around[1] < around[0] + 0.15


def test_copies_part(grown: Path) -> None:
    """Cloned query rows are equal when the model is grown, and are told apart by noise in what reads them alone."""
    name = "model.layers.0.self_attn.q_proj.weight"
    for state, apart in (("grown-60", False), ("model", True)):
        heads = load_file(grown / state / "model.safetensors")[name].unflatten(0, (-1, MODEL["head_dim"]))
        assert (not torch.equal(heads[0], heads[CLONE[grown.name]])) == apart
    health = [line for line in lines(grown) if line.get("event") == "health" and line["step"] > STEPS]
    assert [line["step"] for line in health] == [65, 70, 75]
    distances = [line["copies"]["signal"]["relative_distance"] for line in health]
    assert 0 < distances[0] < distances[-1] < 0.2
    assert all(line["warnings"] == [] for line in health)


def test_what_the_run_made_is_its_sources_function(grown: Path) -> None:
    outcome = run("diff", grown / "checkpoint-60", grown / "grown-60", "--seqs", "1", "--length", "32", "--decode", "0")
    assert (outcome.code, outcome.err) == (0, "")
