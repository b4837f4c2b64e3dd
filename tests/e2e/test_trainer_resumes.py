"""transformers' Trainer itself goes on from its grown checkpoint: same step, same data, same rate, same loss."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DiffLlamaConfig, DiffLlamaForCausalLM, Trainer, TrainingArguments

import gdagrow.models.hf  # noqa: F401  (registers the Motif classes)
from gdagrow.engine import grow_moment
from gdagrow.formats.safetensors_header import read_header
from gdagrow.growing import grow_checkpoint, prepare_growth
from gdagrow.recipe import make_recipe
from gdagrow.states.optimizer_file import read_optimizer
from tests.checkpoints import write_checkpoint
from tests.command import call

CONFIG = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 50, "head_dim": 8,
}  # fmt: skip
RATE, WARM_UP, LAST = 1e-3, 2, 6
EXACT = {"uniform": 2, "exact_copies": True}
Log = list[dict[str, float]]


def text() -> list[dict[str, Any]]:
    rows = (torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(i)) for i in range(64))
    return [{"input_ids": row, "labels": row} for row in rows]


def train(model: Any, out: Path, resume: Path | None = None, **arguments: Any) -> Log:
    """Train to step `LAST`, saving at every third; returns what was logged at each step."""
    given = TrainingArguments(
        output_dir=str(out), use_cpu=True, disable_tqdm=True, report_to=[], seed=1, max_grad_norm=0.0, logging_steps=1,
        **{"max_steps": LAST, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": RATE,
           "warmup_steps": WARM_UP, "weight_decay": 0.1, **arguments},
    )  # fmt: skip
    trainer = Trainer(model=model, args=given, train_dataset=text(), eval_dataset=text()[:4])
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log]:
    """A run with a checkpoint at step 3, and its log to the end."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("run")
    return out, train(DiffLlamaForCausalLM(DiffLlamaConfig(**CONFIG, attn_implementation="eager")), out)


def names_in_order(model: Any) -> list[str]:
    """Parameters as the Trainer's optimizer numbers them."""
    decayed = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if name in decayed] + [name for name in names if name not in decayed]


def moments(checkpoint: Path, model: Any) -> dict[str, dict[str, torch.Tensor]]:
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    return {name: state.get(number, {}) for number, name in enumerate(names_in_order(model))}


@pytest.mark.parametrize("recipe", [EXACT, {"uniform": 2}, {"hidden": 2, "ffn": 3}], ids=["exact", "noisy", "wider"])
def test_the_run_goes_on(run: tuple[Path, Log], tmp_path: Path, recipe: dict[str, Any]) -> None:
    out, log = run
    growing = prepare_growth(out / "checkpoint-3", make_recipe(recipe))
    grow_checkpoint(out / "checkpoint-3", tmp_path / "grown", make_recipe(recipe))
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", attn_implementation="eager")
    source = AutoModelForCausalLM.from_pretrained(out / "checkpoint-3")
    before, after = moments(out / "checkpoint-3", source), moments(tmp_path / "grown", grown)
    for tensor in growing.plan.tensors:
        assert after[tensor.name]["step"] == before[tensor.name]["step"] == 3
        for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            expected = grow_moment(tensor.growth, before[tensor.name][key], power)
            assert torch.equal(after[tensor.name][key], expected), tensor.name
    resumed = train(grown, tmp_path / "goes-on", resume=tmp_path / "grown")
    # The Trainer's log begins with that of the source, which is in trainer_state.json.
    assert [(entry["step"], entry["learning_rate"]) for entry in resumed] == [
        (entry["step"], entry["learning_rate"]) for entry in log
    ]
    assert [entry["loss"] for entry in resumed[:3]] == [entry["loss"] for entry in log[:3]]
    # The first batch meets the source's function: float32 sums of thrice as many terms.
    assert resumed[3]["loss"] == pytest.approx(log[3]["loss"], rel=1e-5)
    assert all(abs(ours["loss"] - theirs["loss"]) < 0.02 for ours, theirs in zip(resumed, log, strict=True))


def test_a_new_schedule_begins_at_step_0_with_the_rate_of_the_new_run(run: tuple[Path, Log], tmp_path: Path) -> None:
    out, _ = run
    grow_checkpoint(out / "checkpoint-3", tmp_path / "grown", make_recipe(EXACT), schedule="restart")
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", attn_implementation="eager")
    log = train(grown, tmp_path / "goes-on", resume=tmp_path / "grown", learning_rate=RATE / 2, max_steps=4)
    train(grown, tmp_path / "one-step", resume=tmp_path / "grown", learning_rate=RATE / 2, max_steps=1)
    before, after = (
        load_file(path / "model.safetensors") for path in (tmp_path / "grown", tmp_path / "one-step/checkpoint-1")
    )
    assert all(torch.equal(after[name], weight) for name, weight in before.items()), "no step at the old rate"
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert [entry["learning_rate"] for entry in log] == pytest.approx([0, RATE / 4, RATE / 2, RATE / 4])
    kept = torch.load(tmp_path / "goes-on" / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    assert kept[0]["step"] == 3 + 4, "the moments were kept, with their step count"
    assert not (tmp_path / "grown" / "rng_state.pth").exists()


def test_the_best_model_so_far_is_none_of_the_grown_run(run: tuple[Path, Log], tmp_path: Path) -> None:
    """It has the source's sizes, and the Trainer would load it at the end."""
    source = tmp_path / "run" / "checkpoint-3"
    shutil.copytree(run[0] / "checkpoint-3", source)
    state = json.loads((source / "trainer_state.json").read_text())
    best = {"best_metric": 0.0, "best_global_step": 3, "best_model_checkpoint": str(source)}
    (source / "trainer_state.json").write_text(json.dumps(state | best))
    grow_checkpoint(source, tmp_path / "run" / "grown", make_recipe(EXACT))
    kept = json.loads((tmp_path / "run" / "grown" / "trainer_state.json").read_text())
    assert kept == state | dict.fromkeys(best)
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "grown", attn_implementation="eager")
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    train(grown, tmp_path / "run", resume=tmp_path / "run" / "grown", metric_for_best_model="loss", **evaluation)
    last = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert last["best_global_step"] == 6


def test_moments_that_begin_again_move_no_weight_further_than_the_rate(run: tuple[Path, Log], tmp_path: Path) -> None:
    """Zeros beside the old step count would make a first update of 3.2 times the rate."""
    out, _ = run
    grow_checkpoint(out / "checkpoint-3", tmp_path / "grown", make_recipe(EXACT), moments="reset")
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", attn_implementation="eager")
    resumed = train(grown, tmp_path / "goes-on", resume=tmp_path / "grown", max_steps=4, weight_decay=0.0)
    assert [entry["step"] for entry in resumed] == [1, 2, 3, 4]
    before, after = (
        load_file(path / "model.safetensors") for path in (tmp_path / "grown", tmp_path / "goes-on/checkpoint-4")
    )
    rate = resumed[3]["learning_rate"]
    moved = {name: (after[name] - before[name]).abs().max().item() / rate for name in before}
    # Adam's first step is rate * g / (|g| + eps); decay, which the checkpoint brings with it, adds 0.1 of each weight.
    largest = max(tensor.abs().max().item() for tensor in before.values())
    assert 0.5 < max(moved.values()) < 1 + 0.1 * largest + 1e-3


def test_a_tied_model_that_is_untied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = DiffLlamaConfig(**CONFIG, attn_implementation="eager", tie_word_embeddings=True)
    log = train(DiffLlamaForCausalLM(config), tmp_path / "run", max_steps=3)
    recipe = make_recipe({"hidden": 2, "embeddings": "untie"})
    grow_checkpoint(tmp_path / "run" / "checkpoint-3", tmp_path / "grown", recipe)
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", attn_implementation="eager")
    assert not grown.config.tie_word_embeddings
    empty = {name for name, kept in moments(tmp_path / "grown", grown).items() if not kept}
    assert empty == {"lm_head.weight", "model.embed_tokens.weight"}
    resumed = train(grown, tmp_path / "goes-on", resume=tmp_path / "grown")
    assert [entry["step"] for entry in resumed] == [1, 2, 3, 4, 5, 6]
    assert abs(resumed[3]["loss"] - log[-1]["loss"]) < 0.1


def test_conversion_takes_moments_along_in_the_order_of_the_new_layout(run: tuple[Path, Log], tmp_path: Path) -> None:
    """Moments set to the weights themselves must come out as the grown weights, divided by the copies of their rows."""
    out, _ = run
    source = tmp_path / "source"
    source.mkdir()
    for path in (out / "checkpoint-3").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(source)
    weights, tree = load_file(source / "model.safetensors"), torch.load(source / "optimizer.pt", weights_only=True)
    for number, name in enumerate(names_in_order(model)):
        tree["state"][number]["exp_avg"] = weights[name]
    torch.save(tree, source / "optimizer.pt")
    recipe = make_recipe({"to": "motif", "signal": 2, "ffn": 2, "exact_copies": True})
    growing = prepare_growth(source, recipe)
    grow_checkpoint(source, tmp_path / "grown", recipe)
    grown = load_file(tmp_path / "grown" / "model.safetensors")
    record = json.loads((tmp_path / "grown" / "growth.json").read_text())
    assert {name.split("self_attn.")[1] for name in record["optimizer"]["reset"]} == {
        "subln.weight", "lambda_q1", "lambda_k1",
    }  # fmt: skip
    carried = prepare_growth(source, recipe, moments="carry").output.record["optimizer"]
    assert carried["reset"] == record["optimizer"]["reset"], "what is made has no moments to carry"
    state = read_optimizer(read_header(tmp_path / "grown"), check_moments=False)
    loaded = torch.load(tmp_path / "grown" / "optimizer.pt", weights_only=True)["state"]
    numbers = {name: number for number, name in enumerate(name for group in state.groups for name in group)}
    compared = 0
    for tensor in growing.plan.tensors:
        if tensor.growth.splits or not state.by_name[tensor.name]:
            continue
        copies = {"gate": 2, "up": 2}.get(re.sub(r".*mlp\.(\w+)_proj.*", r"\1", tensor.name), 1)
        expected = grown[tensor.name]
        if "q_proj" in tensor.name:
            heads = expected.view(4, 3, 8, -1)  # groups of two copies of a signal head, and the noise head
            expected = torch.cat((heads[:, :2] / 2, heads[:, 2:]), 1).reshape(expected.shape)
        assert torch.equal(loaded[numbers[tensor.name]]["exp_avg"], expected / copies), tensor.name
        compared += 1
    assert compared > 10


@pytest.fixture(scope="module")
def motif_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log]:
    """A run of a model in Motif's layout with a checkpoint at step 3, and its log to the end."""
    out = tmp_path_factory.mktemp("motif")
    write_checkpoint(out / "source", vocab=50, activation="silu", dtype=torch.float32, extra={})
    return out, train(AutoModelForCausalLM.from_pretrained(out / "source"), out)


EVERY_AXIS = {
    "even": ({"depth": 2}, 0),
    "bottom": ({"depth": 3, "insert": "bottom"}, 0),
    "to sizes": ({"hidden_to": 40, "ffn_to": 100, "depth": 1, "insert": "top"}, 0),
    "selected": ({"signal": "5:1", "select": "norm", "insert": "after:0,0", "hidden": 2}, 0),
    "diffllama": ({"depth": 2, "insert": "top", "ffn": 2}, 1),
    "diffllama to motif": ({"to": "motif", "depth": 2, "hidden_to": 48, "signal": 2}, 1),
}


@pytest.mark.parametrize(("recipe", "source"), EVERY_AXIS.values(), ids=list(EVERY_AXIS))
def test_the_run_goes_on_along_every_axis(
    motif_run: tuple[Path, Log], run: tuple[Path, Log], tmp_path: Path, recipe: dict[str, Any], source: int
) -> None:
    """New blocks begin without moments and with a step count of their own, whatever else grows."""
    out, log = (motif_run, run)[source]
    plan = prepare_growth(out / "checkpoint-3", make_recipe(recipe)).plan
    grow_checkpoint(out / "checkpoint-3", tmp_path / "grown", make_recipe(recipe))
    before, after = (
        moments(path, AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager"))
        for path in (out / "checkpoint-3", tmp_path / "grown")
    )
    assert after.keys() == {tensor.name for tensor in plan.tensors}
    for tensor in plan.tensors:
        if tensor.moments_lost:
            assert after[tensor.name] == {}
            continue
        assert after[tensor.name]["step"] == 3
        assert after[tensor.name]["exp_avg"].shape == tensor.shape, tensor.name
        if tensor.part == "mlp" and tensor.stored:
            expected = grow_moment(tensor.growth, before[tensor.stored]["exp_avg_sq"], 2)
            assert torch.equal(after[tensor.name]["exp_avg_sq"], expected), tensor.name
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", attn_implementation="eager")
    resumed = train(grown, tmp_path / "goes-on", resume=tmp_path / "grown")
    assert [entry["step"] for entry in resumed] == [1, 2, 3, 4, 5, 6]
    # The first batch meets the source's function: float32 sums of up to thrice as many terms.
    assert resumed[3]["loss"] == pytest.approx(log[3]["loss"], rel=1e-5)
    assert all(abs(ours["loss"] - theirs["loss"]) < 0.1 for ours, theirs in zip(resumed, log, strict=True))
    saved = torch.load(tmp_path / "goes-on/checkpoint-6/optimizer.pt", weights_only=True)["state"]
    assert len(saved) == len(plan.tensors)
    # All that there was has six steps, all that was new three.
    steps = [float(kept["step"]) for kept in saved.values()]
    assert (steps.count(6.0), steps.count(3.0)) == (
        sum(not tensor.moments_lost for tensor in plan.tensors),
        sum(bool(tensor.moments_lost) for tensor in plan.tensors),
    )


def test_what_the_commands_say(run: tuple[Path, Log], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = run[0] / "checkpoint-3"
    told = call(capsys, "plan", source, "--uniform-x2").out
    assert re.search(r"Training state\n  58 moments grown, 742\.40 kB; schedule: keep\n", told), told
    assert re.search(r"trainer_state.json\s+copied", told)
    outcome = call(capsys, "expand", source, tmp_path / "grown", "--uniform-x2", "--json")
    told = json.loads(outcome.out)
    assert told["training_state"]["optimizer"] == {"moments": "auto", "schedule": "keep", "reset": {}}
    assert told["files"].keys() == {"model.safetensors", "optimizer.pt"}
