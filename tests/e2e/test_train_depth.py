"""A run that grows in depth: old blocks are kept bit for bit while new ones learn, and a kill changes nothing."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import write_checkpoint
from tests.command import call
from tests.growths import grow
from tests.trainings import lines, losses, names, write_recipe

# Layers 0 and 1 become 0 and 2; 1 and 3 are their copies.
GROWTH = {"at": 4, "expand": {"depth": 2}, "rewarm_up": 0, "freeze": {"layers": "old", "steps": 4}}
OLD, NEW = {0: 0, 2: 1}, (1, 3)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_deepening(path: Path, **changes: Any) -> Path:
    given = {"growth": [GROWTH], "save_every": 2, "keep": 99, "multipliers": True, "health_every": 3, **changes}
    return write_recipe(path, **given)


@pytest.fixture(scope="module")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that gets two new blocks after the fourth, every state kept."""
    from gdagrow_cli.main import main

    directory = tmp_path_factory.mktemp("deeper")
    assert main(["train", str(write_deepening(directory / "r.yaml")), "--out", str(directory / "run"), "--quiet"]) == 0
    return directory / "run"


def block(state: Path, layer: int) -> dict[str, torch.Tensor]:
    """The weights of a block as the run has them: in float32."""
    prefix = f"model.layers.{layer}."
    stored = load_file(state / "model.safetensors")
    return {name.removeprefix(prefix): tensor.float() for name, tensor in stored.items() if name.startswith(prefix)}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_old_blocks_stay_bit_for_bit_while_new_ones_learn(deeper: Path) -> None:
    for layer in OLD:
        assert moved(block(deeper / "grown-4", layer), block(deeper / "checkpoint-8", layer)) == set()
        # From then on all of them learn again.
        later = moved(block(deeper / "checkpoint-8", layer), block(deeper / "checkpoint-10", layer))
        assert later == block(deeper / "grown-4", layer).keys()
    for layer in NEW:
        first, then = (block(deeper / state, layer) for state in ("grown-4", "checkpoint-8"))
        assert {name for name, tensor in first.items() if not tensor.any()} == {
            "self_attn.o_proj.weight",
            "mlp.down_proj.weight",
        }
        assert moved(first, then) == first.keys()
    outside = load_file(deeper / "grown-4" / "model.safetensors"), load_file(deeper / "checkpoint-6/model.safetensors")
    assert moved(*outside) >= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_the_loss_is_the_same_right_after_the_growth_and_falls_on(deeper: Path) -> None:
    found = lines(deeper)
    at = next(number for number, line in enumerate(found) if line.get("event") == "growth")
    before, growth, after = found[at - 1 : at + 2]
    assert growth == {"step": 4, "event": "growth", "expand": {"depth": 2}}
    # Moved layers are repaired in float64 and trained in float32, whose epsilon is 1.2e-7; sums of up to 64 terms.
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    loss = losses(deeper)
    assert list(loss) == list(range(1, 13))
    assert loss[12] < loss[8] < loss[4]


def test_the_optimizer_has_what_was_learned_of_old_blocks_alone(deeper: Path) -> None:
    kept = {}
    for state in ("grown-4", "checkpoint-6"):
        tree = torch.load(deeper / state / "optimizer.pt", weights_only=True)
        kept[state] = {index: float(moments["step"]) for index, moments in tree["state"].items()}
        total = sum(len(group["params"]) for group in tree["param_groups"])
    num_block = len(block(deeper / "grown-4", 0))
    # Not of the two new blocks, nor of the two lambda vectors of the one old block that moved.
    assert len(kept["grown-4"]) == total - 2 * num_block - 2
    assert set(kept["grown-4"].values()) == {4.0}
    # After two more steps the old blocks stand where they were, the new ones have two steps, all else six.
    assert sorted(set(kept["checkpoint-6"].values())) == [2.0, 4.0, 6.0]
    assert list(kept["checkpoint-6"].values()).count(4.0) == 2 * num_block - 2


def test_its_health_is_told(deeper: Path) -> None:
    health = {line["step"]: line for line in lines(deeper) if line.get("event") == "health"}
    assert [len(line["lambda"]) for line in health.values()] == [2, 4, 4, 4]
    assert all(line["warnings"] == [] and "copies" not in line for line in health.values())
    # Lambda of an old block is what it was, wherever the block stands now.
    before = load_lambdas(deeper / "checkpoint-4", [0, 1])
    assert [health[6]["lambda"][layer] for layer in OLD] == pytest.approx(before, rel=1e-6)


def load_lambdas(state: Path, layers: list[int]) -> list[float]:
    from gdagrow.lambda_init import lambda_init

    found = []
    for layer in layers:
        vectors = {name: tensor.double() for name, tensor in block(state, layer).items() if "lambda_" in name}
        first, second = (
            float((vectors[f"self_attn.lambda_q{i}"] * vectors[f"self_attn.lambda_k{i}"]).sum().exp()) for i in (1, 2)
        )
        found.append(first - second + lambda_init(layer))
    return found


def test_the_model_tells_its_history(deeper: Path) -> None:
    record = json.loads((deeper / "model" / "growth.json").read_text())
    assert (record["lineage"]["layers"], record["lineage"]["new_layers"]) == ([0, 0, 1, 1], list(NEW))
    assert record["warm_up"]["steps"] == 40, "2 / (1 - 0.95), because moments of new blocks begin at zero"


@pytest.mark.parametrize("last", ["grown-4", "checkpoint-6"])
def test_a_run_killed_while_old_blocks_are_kept_goes_on_to_the_same_figures(
    last: str, deeper: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(deeper, tmp_path / "run")
    states = ["grown-4", "checkpoint-6", "checkpoint-8", "checkpoint-10", "checkpoint-12"]
    for name in [*states[states.index(last) + 1 :], "model"]:
        shutil.rmtree(tmp_path / "run" / name)
    recipe = write_deepening(tmp_path / "r.yaml")
    assert call(capsys, "train", recipe, "--out", tmp_path / "run", "--resume", "--quiet").code == 0
    assert lines(tmp_path / "run") == lines(deeper)
    assert names(tmp_path / "run") == names(deeper)
    resumed, whole = (load_file(run / "model" / "model.safetensors") for run in (tmp_path / "run", deeper))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_blocks_frozen_from_the_start_and_muon_and_several_growths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was frozen since the start has no moments when the run grows; nor has a new block that never was."""
    growth = [
        {"at": 2, "expand": {"hidden_to": 40, "insert": "after:1"}, "freeze": {"layers": [2], "steps": 99}},
        {"at": 4, "expand": {"signal": "4:1", "select": "norm", "depth": 1, "insert": "bottom"}},
    ]
    changes = {"freeze": {"layers": [0], "steps": 9}, "optimizer": {"name": "muon", "learning_rate": 3e-3}}
    recipe = write_recipe(tmp_path / "r.yaml", steps=6, growth=growth, save_every=2, keep=9, **changes)
    outcome = call(capsys, "train", recipe, "--out", tmp_path / "run", "--quiet")
    assert outcome.code == 0, outcome.err
    run = tmp_path / "run"
    assert moved(block(run / "grown-2", 2), block(run / "checkpoint-4", 2)) == set()
    assert moved(block(run / "grown-2", 0), block(run / "checkpoint-4", 0)) == block(run / "grown-2", 0).keys()
    found = lines(run)
    for at, line in enumerate(found):
        if line.get("event") == "growth":
            assert found[at + 1]["eval_loss"] == pytest.approx(found[at - 1]["eval_loss"], rel=2e-6)
    reset = json.loads((run / "grown-4" / "growth.json").read_text())["optimizer"]["reset"]
    told = "its block is new (layer 0); the run has none of it yet (layer 3)"
    assert reset["model.layers.{layer}.mlp.up_proj.weight"] == told


REFUSED = {
    "no blocks": ({"signal": 2}, {"layers": "old"}, "growth at step 4, freeze: it adds no blocks, so all of them are "),
    "no such": ({"depth": 1}, {"layers": [1, 3, 8]}, "the grown model has no layer 3, 8, only 3 layers counted from 0"),
    "no heads": ({"depth": 1}, {"heads": "old"}, "growth at step 4, freeze: it clones no heads, so all of them are "),
}


@pytest.mark.parametrize(("expand", "kept", "sentence"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_kept_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], expand: Any, kept: Any, sentence: str
) -> None:
    growth = [{"at": 4, "expand": expand, "freeze": {**kept, "steps": 2}}]
    recipe = write_recipe(tmp_path / "r.yaml", growth=growth)
    for words in (("--dry-run",), ("--quiet",)):
        outcome = call(capsys, "train", recipe, "--out", tmp_path / "run", *words)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert sentence in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_grown_model_whose_old_blocks_are_kept_from_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"dtype": torch.float32, "vocab": 256, "extra": {}}
    write_checkpoint(tmp_path / "source", **given)
    grow(tmp_path / "source", tmp_path / "grown", {"depth": 2, "insert": "top"})
    kept = {"freeze": {"layers": "old", "steps": 9}, "steps": 2, "save_every": 2, "schedule": {"kind": "constant"}}
    recipe = write_recipe(tmp_path / "r.yaml", model={"directory": str(tmp_path / "grown")}, **kept)
    assert call(capsys, "train", recipe, "--out", tmp_path / "run", "--quiet").code == 0
    for layer in (0, 1):
        assert moved(block(tmp_path / "grown", layer), block(tmp_path / "run/model", layer)) == set()
    assert moved(block(tmp_path / "grown", 3), block(tmp_path / "run/model", 3))
    recipe = write_recipe(tmp_path / "again.yaml", model={"directory": str(tmp_path / "source")}, **kept)
    outcome = call(capsys, "train", recipe, "--out", tmp_path / "again", "--quiet")
    assert outcome.code == 2
    assert "no growth.json, which says what is old" in outcome.err
    assert not (tmp_path / "again").exists()
