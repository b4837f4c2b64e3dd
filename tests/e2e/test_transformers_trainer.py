"""The Hugging Face Trainer trains, saves and resumes the model, in every dtype that people use it with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from gdagrow.models.gda import load_model
from gdagrow.models.hf import MotifForCausalLM
from tests.checkpoints import write_checkpoint
from tests.command import call

WINDOWS, POSITIONS = 24, 12

# What the model is loaded in, and what the Trainer is told.
SETTINGS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bf16 weights": (torch.bfloat16, {}),
    "bf16 autocast": (torch.float32, {"bf16": True}),
    "checkpointing and accumulation": (
        torch.float32, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    ),
}  # fmt: skip


def trainer(model: MotifForCausalLM, out: Path, **arguments: Any) -> Trainer:
    # Four of the 61 tokens, which a few steps suffice to find out.
    ids = torch.randint(4, (WINDOWS, POSITIONS), generator=torch.Generator().manual_seed(5))
    data = [{"input_ids": row, "labels": row} for row in ids]
    settings = TrainingArguments(
        output_dir=str(out), max_steps=4, save_steps=2, per_device_train_batch_size=3, learning_rate=1e-2,
        warmup_steps=1, logging_steps=1, report_to=[], use_cpu=True, seed=0, disable_tqdm=True, **arguments,
    )  # fmt: skip
    return Trainer(model=model, args=settings, train_dataset=data)  # type: ignore[arg-type]


def losses(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_the_trainer_evaluates_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    evaluated = trainer(model, tmp_path / "run")
    rows = evaluated.train_dataset
    with torch.no_grad():
        ids = torch.stack([row["input_ids"] for row in rows])  # type: ignore[union-attr]
        expected = model(input_ids=ids, labels=ids).loss.item()
    assert evaluated.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "arguments"), list(SETTINGS.values()), ids=list(SETTINGS))
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    tmp_path: Path, dtype: torch.dtype, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "source", lambda_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer(model, tmp_path / "run", **arguments).train()
    whole = losses(tmp_path / "run" / "checkpoint-4")
    assert len(whole) == 4
    assert whole[3] < whole[0] - 0.1
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []

    half = tmp_path / "run" / "checkpoint-2"
    resumed = AutoModelForCausalLM.from_pretrained(half)
    assert {name: p.dtype for name, p in resumed.named_parameters()} == {name: p.dtype for name, p in before.items()}
    trainer(resumed, tmp_path / "resumed", **arguments).train(resume_from_checkpoint=str(half))
    assert losses(tmp_path / "resumed" / "checkpoint-4") == whole
    first, second = (load_file(tmp_path / run / "checkpoint-4" / "model.safetensors") for run in ("run", "resumed"))
    assert all(torch.equal(first[name], second[name]) for name in first)

    # What the Trainer wrote is a checkpoint to us.
    load_model(half)
    assert call(capsys, "expand", half, tmp_path / "grown", "--signal-x2").code == 0


def test_a_grown_run_goes_on_where_the_source_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "source", dtype=torch.float32)
    trainer(AutoModelForCausalLM.from_pretrained(tmp_path / "source"), tmp_path / "run").train()
    outcome = call(
        capsys, "expand", tmp_path / "run" / "checkpoint-2", tmp_path / "grown", "--uniform-x2", "--exact-copies"
    )
    assert outcome.code == 0, outcome.err
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    trainer(grown, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "grown"))
    expected, found = (losses(tmp_path / name / "checkpoint-4") for name in ("run", "resumed"))
    # The third step computes its loss before it moves a weight: float32 rounding of sums of a hundred terms.
    assert found[2] == pytest.approx(expected[2], rel=100 * torch.finfo(torch.float32).eps)
    assert found[3] < found[2]


def test_the_model_of_a_run_is_exported_without_its_training_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "source", lambda_dtype=torch.float32)
    trainer(AutoModelForCausalLM.from_pretrained(tmp_path / "source"), tmp_path / "run").train()
    last = tmp_path / "run" / "checkpoint-4"
    outcome = call(capsys, "export", last, tmp_path / "out")
    assert outcome.code == 0, outcome.err
    model = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == model
    left = ", ".join(sorted(path.name for path in last.iterdir() if path.name not in model))
    assert f"left behind, as training state: {left}\n" in outcome.out


def test_the_logged_loss_is_that_of_all_labels_of_a_step(tmp_path: Path) -> None:
    """Sequences of unlike length in the parts of a step: the mean over labels, not over parts."""
    write_checkpoint(tmp_path / "source", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    ids = torch.randint(61, (2, POSITIONS), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[1, 3:] = -100
    with torch.no_grad():
        expected = model(ids, labels=labels).loss.item()
    settings = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data: list[dict[str, Tensor]] = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    state = Trainer(model=model, args=settings, train_dataset=data)  # type: ignore[arg-type]
    state.train()
    # float32 rounding of a mean of 13 terms; the Trainer rounds nothing that it logs to fewer digits than this.
    assert state.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)
