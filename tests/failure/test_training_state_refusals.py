"""Training states that do not belong, or ask for something else than to be read: one sentence, nothing written."""

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from gdagrow.errors import CheckpointError
from gdagrow.models.gda import load_model
from gdagrow.train.state_files import read_state
from tests.checkpoints import write_checkpoint, write_training_state
from tests.command import call


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_training_state(tmp_path / "run")
    return tmp_path / "run"


def change(directory: Path, edit: Callable[[Any], None], file: str = "optimizer.pt") -> None:
    tree = torch.load(directory / file, weights_only=True)
    edit(tree)
    torch.save(tree, directory / file)


def other_model(source: Path) -> None:
    write_training_state(source.parent / "other", layers=3)
    os.replace(source.parent / "other/optimizer.pt", source / "optimizer.pt")


def other_width(source: Path) -> None:
    write_training_state(source.parent / "other", hidden=48)
    os.replace(source.parent / "other/optimizer.pt", source / "optimizer.pt")


def no_moments(source: Path) -> None:
    change(source, lambda tree: tree["state"].clear())


def one_moment_less(source: Path) -> None:
    change(source, lambda tree: tree["state"][3].pop("exp_avg_sq"))


def no_step(source: Path) -> None:
    change(source, lambda tree: tree["state"][3].pop("step"))


def no_groups(source: Path) -> None:
    torch.save({"state": {}, "param_groups": []}, source / "optimizer.pt")


def unknown_moments(source: Path) -> None:
    def edit(tree: Any) -> None:
        tree["state"][0]["exp_avg_sq_row"] = torch.zeros(61)

    change(source, edit)


def a_list_of_tensors(source: Path) -> None:
    def edit(tree: Any) -> None:
        tree["state"][0]["old_dirs"] = [torch.zeros(61)]

    change(source, edit)


def a_number_for_a_moment(source: Path) -> None:
    def edit(tree: Any) -> None:
        tree["state"][0]["exp_avg"] = 0.5

    change(source, edit)


def whole_numbers_for_a_moment(source: Path) -> None:
    def edit(tree: Any) -> None:
        tree["state"][0]["exp_avg"] = tree["state"][0]["exp_avg"].to(torch.int8)

    change(source, edit)


def a_parameter_twice(source: Path) -> None:
    change(source, lambda tree: tree["param_groups"][0]["params"].__setitem__(1, 0))


def moments_of_no_parameter(source: Path) -> None:
    change(source, lambda tree: tree["state"].update({99: tree["state"][0]}))


def no_parameters(source: Path) -> None:
    torch.save({"state": {}, "param_groups": []}, source / "optimizer.pt")


def one_wrong_shape(source: Path) -> None:
    def edit(tree: Any) -> None:
        tree["state"][0]["exp_avg"] = tree["state"][0]["exp_avg"].t().contiguous()

    change(source, edit)


def not_an_optimizer(source: Path) -> None:
    torch.save({"model": torch.zeros(3)}, source / "optimizer.pt")


class Running:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def code(source: Path) -> None:
    torch.save({"state": Running(), "param_groups": []}, source / "optimizer.pt")


def no_optimizer(source: Path) -> None:
    (source / "optimizer.pt").unlink()


def a_pipe(source: Path) -> None:
    (source / "optimizer.pt").unlink()
    os.mkfifo(source / "optimizer.pt")


def a_link_outside(source: Path) -> None:
    os.replace(source / "optimizer.pt", source.parent / "elsewhere.pt")
    (source / "optimizer.pt").symlink_to(source.parent / "elsewhere.pt")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "of another model": (other_model, "has 51 parameters in its groups, expected 35 or "),
    "of another width": (other_width, "exp_avg of model.embed_tokens.weight has shape [61, 48], the "),
    "one wrong shape": (
        one_wrong_shape,
        "exp_avg of model.embed_tokens.weight has shape [32, 61], the ",
    ),
    "missing moments": (no_moments, "moments cannot be carried: no parameter has any"),
    "a moment less": (one_moment_less, "model.layers.0.self_attn.lambda_q2 has no exp_avg_sq"),
    "no step count": (no_step, "model.layers.0.self_attn.lambda_q2 has no step"),
    "no groups": (no_groups, "expected the state_dict of one torch optimizer"),
    "unknown moments": (unknown_moments, "exp_avg_sq_row of model.embed_tokens.weight"),
    "a list of tensors": (a_list_of_tensors, "old_dirs of model.embed_tokens.weight is none of exp_avg, "),
    "a number for a moment": (a_number_for_a_moment, "exp_avg of model.embed_tokens.weight is no tensor"),
    "whole numbers for a moment": (whole_numbers_for_a_moment, "exp_avg of model.embed_tokens.weight is stored as I8"),
    "a parameter twice": (a_parameter_twice, "expected the state_dict of one torch optimizer"),
    "moments of no parameter": (moments_of_no_parameter, "expected the state_dict of one torch optimizer"),
    "no parameters": (no_parameters, "expected the state_dict of one torch optimizer"),
    "no optimizer's file": (not_an_optimizer, "expected the state_dict of one torch optimizer"),
    "code": (code, "it was not run"),
    "a schedule alone": (no_optimizer, "has scheduler.pt and no optimizer.pt"),
    "a pipe": (a_pipe, "optimizer.pt is not a regular file"),
    "a link outside": (a_link_outside, "a link that leads out of its checkpoint directory"),
}


@pytest.mark.parametrize(("spoil", "sentence"), REFUSED.values(), ids=list(REFUSED))
def test_one_sentence_and_nothing_written(
    source: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(source.parent)
    spoil(source)
    before = sorted(source.parent.iterdir())
    for command in (("plan", source), ("expand", source, source.parent / "grown")):
        outcome = call(capsys, *command, "--signal-x2")
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.count("\n") == 1
        assert sentence in outcome.err
    assert sorted(source.parent.iterdir()) == before


def test_the_parts_of_the_parameter_count_are_told(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other_model(source)
    told = call(capsys, "plan", source, "--signal-x2").err
    assert "take the model alone with gdagrow export" in told


def test_flags_without_a_training_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model")
    for flag in (("--moments", "reset"), ("--schedule", "restart")):
        outcome = call(capsys, "expand", tmp_path / "model", "--signal-x2", *flag)
        assert outcome.code == 2
        assert "has no training state, such as optimizer.pt, for --" in outcome.err
    assert not list(tmp_path.glob("model-*"))


def test_a_schedule_that_is_not_understood_cannot_restart(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"_schedulers": [], "last_epoch": 3}, source / "scheduler.pt")
    outcome = call(capsys, "expand", source, source.parent / "grown", "--signal-x2", "--schedule", "restart")
    assert outcome.code == 2
    assert "keep it with --schedule keep" in outcome.err
    assert call(capsys, "expand", source, source.parent / "grown", "--signal-x2").code == 0


@pytest.mark.parametrize("file", ["scheduler.pt", "trainer_state.json"])
@pytest.mark.parametrize("schedule", ["keep", "restart"])
def test_links_to_files_of_a_run_do_not_lead_out(
    source: Path, capsys: pytest.CaptureFixture[str], file: str, schedule: str
) -> None:
    os.replace(source / file, source.parent / file)
    (source / file).symlink_to(source.parent / file)
    outcome = call(capsys, "expand", source, source.parent / "grown", "--signal-x2", "--schedule", schedule)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert f"{file} is a link that leads out of its checkpoint directory" in outcome.err


def test_what_else_an_optimizer_saves_is_carried(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"scale": torch.tensor(3.0), "names": ["a"]}
    change(source, lambda tree: tree.update(more=more))
    assert call(capsys, "expand", source, source.parent / "grown", "--signal-x2").code == 0
    assert torch.load(source.parent / "grown/optimizer.pt", weights_only=True)["more"] == more


def test_a_run_at_its_last_step_is_told(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "trainer_state.json").write_text('{"global_step": 10, "max_steps": 10, "loss": NaN}')
    outcome = call(capsys, "plan", source, "--signal-x2")
    assert "the run is at step 10 of 10" in outcome.out.replace("\n", " ")
    assert "the run is at step" not in call(capsys, "plan", source, "--signal-x2", "--schedule", "restart").out


def test_an_optimizer_without_a_schedule_is_told(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "scheduler.pt").unlink()
    told = " ".join(call(capsys, "plan", source, "--signal-x2").out.split())
    assert "there is no scheduler.pt, without which the Trainer restores no optimizer either" in told


def test_reset_needs_no_moments_that_can_be_grown(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unknown_moments(source)
    outcome = call(capsys, "expand", source, source.parent / "grown", "--signal-x2", "--moments", "reset")
    assert (outcome.code, outcome.err) == (0, "")
    assert "\n  begin at zero (asked for): all\n" in outcome.out
    assert torch.load(source.parent / "grown/optimizer.pt", weights_only=True)["state"] == {}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_sharded_state_with_code_in_a_value_is_refused_before_an_engine_runs_it(source: Path) -> None:
    weights = load_model(source).state_dict()
    kept = {name: {"exp_avg": torch.zeros_like(weight)} for name, weight in weights.items()}
    (source / "model.safetensors").unlink()
    dcp.save({"model": weights}, checkpoint_id=source / "pytorch_model_fsdp_0", no_dist=True)
    for value, sentence in ((1e-3, None), (Running(), "'optimizer.lr' asks for more than tensors and plain values")):
        shutil.rmtree(source / "optimizer_0", ignore_errors=True)
        dcp.save({"optimizer": {"state": kept, "lr": value}}, checkpoint_id=source / "optimizer_0", no_dist=True)
        with nullcontext() if sentence is None else pytest.raises(CheckpointError, match=sentence):
            assert len(read_state(source).tensors) == len(weights)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_sharded_weights_with_a_schedule_alone(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dcp.save({"model": load_model(source).state_dict()}, checkpoint_id=source / "pytorch_model_fsdp_0", no_dist=True)
    (source / "model.safetensors").unlink()
    outcome = call(capsys, "plan", source, "--signal-x2")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "has scheduler.pt and no optimizer_0" in outcome.err


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_weights_half_of_a_sharded_state_says_where_the_optimizer_is(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_model(source).state_dict()
    half = source / "pytorch_model_fsdp_0"
    dcp.save({"model": weights}, checkpoint_id=half, no_dist=True)
    words = "plan", half, "--signal-x2", "--config", source
    assert "only weights are in" not in call(capsys, *words).out
    dcp.save({"optimizer": {"lr": torch.tensor(1e-3)}}, checkpoint_id=source / "optimizer_0", no_dist=True)
    outcome = call(capsys, *words)
    assert outcome.code == 0, outcome.err
    assert "only weights are in" in outcome.out
