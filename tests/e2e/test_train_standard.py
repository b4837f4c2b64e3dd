"""`gdagrow train` on standard attention: trained, gone on with, published; and what it is refused."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from gdagrow.train.building import build_model
from gdagrow.train.data import open_tokens
from gdagrow.train.recipe import read_train_recipe
from tests.command import Outcome, call
from tests.trainings import CONFIG, lines, losses, names, write_recipe

LLAMA: dict[str, Any] = {
    **{key: CONFIG[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "vocab_size",
                                    "rms_norm_eps", "rope_theta", "max_position_embeddings")},
    "model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
RUN: dict[str, Any] = {
    "model": {"config": LLAMA},
    "schedule": {"kind": "constant", "warm_up": 2},
    "save_every": 4,
    "evaluate_every": 4,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As in runs that are processes of their own, whose sums are to be the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(capsys: pytest.CaptureFixture[str], path: Path, run: Path, *words: str, **changes: Any) -> Outcome:
    write_recipe(path, **{**RUN, **changes})
    return call(capsys, "train", path, "--out", run, "--quiet", *words)


def test_it_is_trained_gone_on_with_and_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(capsys, tmp_path / "r.yaml", whole) == Outcome(0, "", "")
    assert names(whole) == ["checkpoint-8", "checkpoint-12", "metrics.jsonl", "model", "recipe.yaml", "tokens"]
    found = losses(whole)
    assert found[12] < found[1] - 0.5  # it learned which bytes are frequent

    assert train(capsys, tmp_path / "r.yaml", halves, steps=8).code == 0
    assert train(capsys, tmp_path / "r.yaml", halves, "--resume") == Outcome(0, "", "")
    assert lines(halves) == lines(whole)
    weights = [load_file(run / "model" / "model.safetensors") for run in (whole, halves)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.load(whole / "checkpoint-12" / "optimizer.pt", weights_only=True)["state"].keys() == set(range(21))

    model = transformers.AutoModelForCausalLM.from_pretrained(whole / "model")
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    assert model.generation_config.eos_token_id is None
    made = read_train_recipe(tmp_path / "r.yaml")
    _, held_out = open_tokens(made.data, whole / "tokens", 32, 256)
    assert held_out is not None
    ids = torch.stack([held_out[n]["input_ids"] for n in range(made.evaluate_on)])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    logged = [line["eval_loss"] for line in lines(whole) if "eval_loss" in line][-1]
    # The mean of a few hundred losses, in another order.
    assert logged == pytest.approx(loss, rel=2**-23 * 32)


def test_a_published_model_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = {"save_every": 100, "steps": 2}
    assert train(capsys, tmp_path / "r.yaml", tmp_path / "first", **first).code == 0
    model = {"directory": str(tmp_path / "first" / "model")}
    assert train(capsys, tmp_path / "r.yaml", tmp_path / "then", **first, model=model) == Outcome(0, "", "")
    config = [json.loads((tmp_path / run / "model" / "config.json").read_text()) for run in ("first", "then")]
    assert config[0] == config[1]


def test_new_weights_are_drawn_as_those_of_differential_attention() -> None:
    config = {**LLAMA, "hidden_size": 256, "initializer_range": 0.05}
    model = build_model(config, (), None, 0, is_first=True)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            # Four standard errors of the deviation of so many draws.
            expected = pytest.approx(0.05, rel=4 / (2 * parameter.numel()) ** 0.5)
            assert float(parameter.detach().std()) == expected, name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"growth": [{"at": 4, "expand": {"signal": 2}}]}, "growth"), ({"multipliers": True}, "multipliers"),
     ({"health_every": 2}, "health_every"),
     ({"multipliers": True, "health_every": 2}, "multipliers, health_every")],
)  # fmt: skip
def test_what_is_for_differential_attention_alone(
    changes: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = train(capsys, tmp_path / "r.yaml", tmp_path / "run", **changes)
    assert outcome == Outcome(
        2, "", "error: model_type llama is a baseline of standard attention, trained by one process and never grown: "
        f"leave out {told}\n"
    )  # fmt: skip
    assert names(tmp_path) == ["r.yaml"]


def test_the_same_for_old_heads_and_several_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "model")
    kept = {"heads": "old", "steps": 3}
    outcome = train(capsys, tmp_path / "r.yaml", tmp_path / "run", freeze=kept,
                    model={"directory": str(tmp_path / "model")})  # fmt: skip
    assert outcome.err.endswith("never grown: leave out freeze of what is old\n")
    write_recipe(tmp_path / "r.yaml", **RUN)
    outcome = call(capsys, "train", tmp_path / "r.yaml", "--dry-run", "--processes", "2")
    assert outcome.err.endswith("never grown: leave out several processes\n")
    assert names(tmp_path) == ["model", "r.yaml"]


def test_the_dry_run_says_that_there_is_no_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = call(capsys, "train", write_recipe(tmp_path / "r.yaml", **RUN), "--dry-run")
    assert outcome.code == 0
    assert re.search(r"\nratio +no noise\n", outcome.out)
