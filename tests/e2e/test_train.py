"""`gdagrow train` as a user runs it: a run, killed and gone on with, the same to the digit; and what it refuses."""

import io
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from gdagrow_cli.main import main
from safetensors.torch import load_file

from gdagrow.report.training import read_run
from tests.checkpoints import write_checkpoint
from tests.command import call, start
from tests.trainings import CONFIG, lines, losses, names, write_recipe


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As in runs that are processes of their own, whose sums are to be the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A directory with a recipe and the run of it that nothing interrupted, and what that said."""
    directory, told = tmp_path_factory.mktemp("train"), io.StringIO()
    recipe = write_recipe(directory / "recipe.yaml")
    with redirect_stdout(told):
        assert main(["train", str(recipe), "--out", str(directory / "whole")]) == 0
    return directory, told.getvalue()


def test_a_run_leaves_states_figures_and_a_model(done: tuple[Path, str]) -> None:
    directory, told = done
    whole = directory / "whole"
    assert names(whole) == ["checkpoint-8", "checkpoint-12", "metrics.jsonl", "model", "recipe.yaml", "tokens"]
    found = losses(whole)
    assert list(found) == list(range(1, 13))
    assert found[12] < found[1] - 0.5  # it learned which bytes are frequent
    assert f"12 steps, loss {found[12]:.4f}, held-out loss" in told
    evaluated = {line["step"]: line["eval_loss"] for line in lines(whole) if "eval_loss" in line}
    assert list(evaluated) == [6, 12]
    assert {line["step"]: line["tokens"] for line in lines(whole) if "tokens" in line}[12] == 12 * 8 * 32
    assert {key: json.loads((whole / "model" / "config.json").read_text())[key] for key in CONFIG} == CONFIG


def test_the_report_draws_its_figures(done: tuple[Path, str]) -> None:
    curves = {curve.metric: curve.num_points for curve in read_run(done[0] / "whole").curves}
    assert (curves["loss"], curves["eval_loss"], curves["grad_norm"]) == (12, 2, 12)


def test_a_killed_run_goes_on_to_the_same_digits(done: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    directory, killed = done[0], done[0] / "killed"
    process = start("train", "recipe.yaml", "--out", "killed", cwd=directory)
    deadline = time.monotonic() + 60
    while not (killed / "checkpoint-4").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "model").exists()
    (killed / ".saving" / "checkpoint-12").mkdir(parents=True)  # a state half written, and a line
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    outcome = call(capsys, "train", directory / "recipe.yaml", "--out", killed, "--resume", "--quiet")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert lines(killed) == lines(directory / "whole")
    assert names(killed) == names(directory / "whole")
    weights = [load_file(directory / name / "model" / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_ctrl_c_says_what_is_there(done: tuple[Path, str], tmp_path: Path) -> None:
    write_recipe(tmp_path / "r.yaml", steps=100_000)
    process = start("train", "r.yaml", cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "r" / "checkpoint-8").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; --resume goes on from r/checkpoint-" in err


def test_a_second_pass_over_the_text_is_resumed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog; " * 20)  # 3 batches
    data = {"train": str(tmp_path / "a.txt")}
    changes: dict[str, Any] = {"steps": 8, "save_every": 2, "keep": 9, "log_every": 3, "evaluate_every": 0}
    recipe = write_recipe(tmp_path / "r.yaml", data=data, **changes)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert call(capsys, "train", recipe, "--out", whole, "--quiet").code == 0
    for state in ("checkpoint-4", "checkpoint-6"):  # within the second pass, and at the end of it
        shutil.rmtree(resumed, ignore_errors=True)
        shutil.copytree(whole, resumed)
        shutil.rmtree(resumed / "model")
        for later in range(int(state[-1]) + 2, 10, 2):
            shutil.rmtree(resumed / f"checkpoint-{later}")
        assert call(capsys, "train", recipe, "--out", resumed, "--resume", "--quiet").code == 0
        assert lines(resumed) == lines(whole)


def test_accumulated_batches_are_the_same_batches(
    done: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", micro_batch_size=2)
    assert call(capsys, "train", recipe, "--out", tmp_path / "run", "--quiet").code == 0
    whole, found = losses(done[0] / "whole"), losses(tmp_path / "run")
    # Sums in another order, carried on through twelve steps of a model whose loss falls by half.
    assert [found[step] for step in found] == pytest.approx([whole[step] for step in whole], rel=1e-5)


def test_the_model_of_a_directory_in_bf16_with_recomputed_activations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "source", vocab=256, companions=True, tied=True)
    model = {"directory": str(tmp_path / "source")}
    changes: dict[str, Any] = {"model": model, "steps": 3, "precision": "bf16", "gradient_checkpointing": True}
    optimizer = {"name": "sgd", "learning_rate": 1e-3, "weight_decay": 0.0}
    recipe = write_recipe(tmp_path / "r.yaml", **changes, optimizer=optimizer)
    outcome = call(capsys, "train", recipe, "--out", tmp_path / "run", "--json")
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)
    assert (told["steps"], told["model"]) == (3, str(tmp_path / "run" / "model"))
    before, after = (load_file(tmp_path / path / "model.safetensors") for path in ("source", "run/model"))
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    moved = max(float((after[name] - before[name].float()).abs().max()) for name in before)
    assert 0 < moved < 0.1
    assert (tmp_path / "run" / "model" / "tokenizer.json").exists()


def test_settings_may_be_changed_when_a_run_goes_on(
    done: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done[0] / "whole", tmp_path / "run")
    optimizer = {"learning_rate": 1e-4, "weight_decay": 0.0}
    recipe = write_recipe(tmp_path / "r.yaml", steps=14, optimizer=optimizer, schedule={"kind": "constant"})
    assert call(capsys, "train", recipe, "--out", tmp_path / "run", "--resume", "--quiet").code == 0
    rates = [line["learning_rate"] for line in lines(tmp_path / "run") if line["step"] > 12 and "loss" in line]
    assert rates == [1e-4] * 2
    optimizer_state = torch.load(tmp_path / "run" / "checkpoint-14" / "optimizer.pt", weights_only=True)
    assert [group["weight_decay"] for group in optimizer_state["param_groups"]] == [0.0, 0.0]


def test_a_run_killed_before_its_first_state_may_begin_with_another_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", optimizer={"learning_rate": 1e30, "max_grad_norm": 0})
    assert call(capsys, "train", recipe, "--out", tmp_path / "run", "--quiet").code == 2
    (tmp_path / "a.txt").write_text("a" * 1000)
    write_recipe(recipe, data={"train": str(tmp_path / "a.txt")}, steps=2)
    assert call(capsys, "train", recipe, "--out", tmp_path / "run", "--resume", "--quiet").code == 0
    assert (tmp_path / "run" / "tokens" / "train.bin").stat().st_size == 2000


@pytest.mark.parametrize(
    ("changes", "flags", "told"),
    [
        ({}, [], "is not empty; --resume goes on with the run in it, --restart begins it anew"),
        ({}, ["--resume", "--restart"], "--resume goes on with a run and --restart begins it anew; give one of them"),
        ({}, ["--resume"], "all 12 steps are done; to go on, ask for more steps in the recipe"),
        ({"seed": 1, "context_length": 16}, ["--resume"], "was begun with another context_length, seed than"),
        ({"steps": 20, "growth": [{"at": 5, "expand": {"signal": 2}}]}, ["--resume"], "begun with another growth"),
        ({"batch_size": 7, "micro_batch_size": 2}, ["--restart"], "batch_size 7 does not divide into 1 processes"),
        ({"batch_size": 10_000}, ["--restart"], "are fewer than a batch of 10000; give more text or a smaller batch"),
        ({"data": {"train": "nothing/*.txt"}}, ["--restart"], "data: nothing/*.txt matches no file; give the path"),
        ({"model": {"directory": "nowhere"}}, ["--restart"], "nowhere"),
        ({"model": {"config": {"hidden_size": 32}}}, ["--restart"], "config.json: "),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(
    changes: dict[str, Any], flags: list[str], told: str, done: tuple[Path, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(done[0] / "whole", tmp_path / "run")
    before = names(tmp_path / "run")
    recipe = write_recipe(tmp_path / "r.yaml", **changes)
    outcome = call(capsys, "train", recipe, "--out", tmp_path / "run", *flags)
    assert outcome.code == 2
    assert told in outcome.err
    assert outcome.err.count("\n") == 1
    if "fewer than a batch" not in told:  # that is seen when the text was made tokens, which another run's are not
        assert names(tmp_path / "run") == before


class _Code:
    """Asks for a call when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("optimizer.pt", {"state": {}, "param_groups": [{"params": [0, 1]}]}, "optimizer.pt"),
        ("optimizer.pt", _Code(), "optimizer.pt"),
        ("model.safetensors", None, "model.safetensors"),
    ],
)  # fmt: skip
def test_a_state_that_is_not_of_this_run_is_refused_before_the_engine_has_it(
    file: str, content: Any, told: str, done: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done[0] / "whole", tmp_path / "run")
    if content is None:
        (tmp_path / "run" / "checkpoint-12" / file).unlink()
    else:
        torch.save(content, tmp_path / "run" / "checkpoint-12" / file)
    recipe = write_recipe(tmp_path / "r.yaml", steps=14)
    outcome = call(capsys, "train", recipe, "--out", tmp_path / "run", "--resume", "--quiet")
    assert outcome.code == 2
    assert told in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("room", "told"), [(5_000, "tokens"), (100_000, "checkpoint-4"), (250_000, "checkpoint-4")],
    ids=["tokens", "weights", "optimizer"],
)  # fmt: skip
def test_a_disk_that_takes_only_a_part_is_told(
    room: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens, weights and moments are written by numpy, safetensors and torch, whose errors have nothing in common."""
    data = {"train": "{stdlib}/bisect.py", "held_out": 0.1}
    recipe = write_recipe(tmp_path / "r.yaml", steps=4, data=data)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        outcome = call(capsys, "train", recipe, "--out", tmp_path / "run", "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {told} cannot be written in {tmp_path / 'run'} (")
    assert outcome.err.endswith(" bytes free); free some space and go on with --resume\n")
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert call(capsys, "train", recipe, "--out", tmp_path / "run", "--resume", "--quiet").code == 0


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", optimizer={"learning_rate": 1e30, "max_grad_norm": 0}, evaluate_every=0)
    outcome = call(capsys, "train", recipe, "--out", tmp_path / "run", "--quiet")
    assert outcome.code == 2
    assert "the loss is nan; go on from the last state with a lower learning rate (--resume)" in outcome.err
    assert all(line["loss"] > 1 for line in lines(tmp_path / "run"))
