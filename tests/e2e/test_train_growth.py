"""A run that grows: the loss stays and goes on falling, the optimizer comes along, a kill changes nothing."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from gdagrow.record import read_record
from gdagrow.train.callbacks import FreezeCallback, GrowthCallback
from gdagrow.train.health_callback import HealthCallback
from gdagrow.train.rates import multipliers_of
from gdagrow.train.recipe import TrainRecipe, make_train_recipe, read_train_recipe
from tests.checkpoints import write_checkpoint
from tests.command import call
from tests.growths import grow
from tests.trainings import lines, losses, names, write_recipe

GROWTHS = [
    {"at": 4, "expand": {"signal": 2}, "freeze": {"heads": "old", "steps": 2}},
    {"at": 8, "expand": {"hidden": 2, "ffn": 2}, "rewarm_up": 3, "schedule": "restart"},
]
STATES = ["checkpoint-2", "checkpoint-4", "grown-4", "checkpoint-6", "checkpoint-8", "grown-8", "checkpoint-10"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_growing(path: Path) -> Path:
    return write_recipe(path, growth=GROWTHS, save_every=2, keep=99, health_every=3)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that grows after the fourth and the eighth, every state kept."""
    from gdagrow_cli.main import main

    directory = tmp_path_factory.mktemp("growing")
    assert main(["train", str(write_growing(directory / "r.yaml")), "--out", str(directory / "run"), "--quiet"]) == 0
    return directory / "run"


def tensors(state: Path) -> dict[str, torch.Tensor]:
    return load_file(state / "model.safetensors")


def test_every_state_is_there(grown: Path) -> None:
    assert {name for name in names(grown) if "-" in name} == {*STATES, "checkpoint-12"}


def test_the_loss_is_the_same_right_after_a_growth_and_falls_on(grown: Path) -> None:
    found = lines(grown)
    for step in (4, 8):
        at = next(number for number, line in enumerate(found) if line["step"] == step and "event" in line)
        before, growth, after = found[at - 1 : at + 2]
        assert growth == {
            "step": step,
            "event": "growth",
            "expand": {4: {"signal": 2}, 8: {"hidden": 2, "ffn": 2}}[step],
        }
        # A mean over 512 tokens of sums of 64 to 256 terms in float32, whose epsilon is 1.2e-7.
        assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    loss = losses(grown)
    assert list(loss) == list(range(1, 13))
    assert loss[12] < loss[8] < loss[4]


def test_its_health_is_told(grown: Path) -> None:
    health = {line["step"]: line for line in lines(grown) if line.get("event") == "health"}
    assert list(health) == [3, 6, 9, 12]
    axes = [sorted(line.get("copies", {})) for line in health.values()]
    assert axes == [[], ["signal"], ["ffn", "hidden", "signal"], ["ffn", "hidden", "signal"]]
    # Noise of 1% of each weight is what copies differ by at first (40 dB), a little less where rows are equal.
    assert 1e-4 < health[9]["copy_distance"] < 0.05
    assert all(len(line["lambda"]) == 2 and line["warnings"] == [] for line in health.values())


def test_the_same_batch_has_the_same_loss_in_float64(grown: Path) -> None:
    ids = torch.arange(64).view(2, 32)
    before, after = (
        AutoModelForCausalLM.from_pretrained(grown / name, dtype=torch.float64)(input_ids=ids, labels=ids).loss.item()
        for name in ("checkpoint-8", "grown-8")
    )
    assert after == pytest.approx(before, rel=1e-13)


def test_the_optimizer_has_the_shapes_of_the_grown_model(grown: Path) -> None:
    for step in (4, 8):
        shapes = sorted(tuple(tensor.shape) for tensor in tensors(grown / f"grown-{step}").values())
        state = torch.load(grown / f"grown-{step}" / "optimizer.pt", weights_only=True)["state"]
        assert sorted(tuple(moments["exp_avg_sq"].shape) for moments in state.values()) == shapes
        # What was frozen whole for two steps (keys and values that no head was cloned of) has taken two steps less.
        assert {float(moments["step"]) for moments in state.values()} == ({4.0} if step == 4 else {6.0, 8.0})


def test_old_heads_stay_for_two_steps_and_then_move(grown: Path) -> None:
    """Query group 0 has the signal heads 0, 1, 2 and then their clones, 8 rows each."""
    name = "model.layers.0.self_attn.q_proj.weight"
    at = {step: tensors(grown / directory)[name] for step, directory in ((4, "grown-4"), (6, "checkpoint-6"))}
    later = tensors(grown / "checkpoint-8")[name]
    assert torch.equal(at[4][:24], at[6][:24])
    assert not torch.equal(at[4][24:32], at[6][24:32])
    assert not torch.equal(later[:24], at[6][:24])


def test_the_model_tells_its_history(grown: Path) -> None:
    record = json.loads((grown / "model" / "growth.json").read_text())
    assert [growth["recipe"] for growth in [*record["history"], record]] == [{"signal": 2}, {"hidden": 2, "ffn": 2}]


def test_a_state_that_is_no_longer_kept_leaves_its_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    growth = [{"at": 2, "expand": {"signal": 2}}]
    recipe = write_recipe(tmp_path / "r.yaml", steps=6, growth=growth, save_every=1, keep=1)
    assert call(capsys, "train", recipe, "--out", tmp_path / "run", "--quiet").code == 0
    assert [name for name in names(tmp_path / "run") if "-" in name] == ["checkpoint-6"]
    for state in ("checkpoint-6", "model"):
        (record,) = read_record(tmp_path / "run" / state)
        assert record["recipe"] == {"signal": 2}


@pytest.mark.parametrize("last", ["checkpoint-4", "grown-4", "checkpoint-6", "checkpoint-8"])
def test_a_run_killed_anywhere_goes_on_to_the_same_figures(
    last: str, grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it lies when the run is killed after a state was published, within what comes next."""
    shutil.copytree(grown, tmp_path / "run")
    for name in [*STATES[STATES.index(last) + 1 :], "checkpoint-12", "model"]:
        shutil.rmtree(tmp_path / "run" / name)
    partial = tmp_path / "run" / ".saving" / "grown-4"
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("{")
    recipe = write_growing(tmp_path / "r.yaml")
    assert call(capsys, "train", recipe, "--out", tmp_path / "run", "--resume", "--quiet").code == 0
    assert lines(tmp_path / "run") == lines(grown)
    assert names(tmp_path / "run") == names(grown)
    resumed, whole = tensors(tmp_path / "run" / "model"), tensors(grown / "model")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_growth_that_cannot_be_done_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    growth = [{"at": 2, "expand": {"signal": "2:1"}}]
    recipe = write_recipe(tmp_path / "r.yaml", growth=growth)
    outcome = call(capsys, "train", recipe, "--out", tmp_path / "run", "--quiet")
    assert outcome.code == 2
    assert "ratio" in outcome.err
    assert not (tmp_path / "run").exists()


def stock_trainer(checkpoint: Path, out: Path, *callbacks: Any, steps: int = 1) -> dict[str, torch.Tensor]:
    """How far a user's own Trainer moves each parameter of a checkpoint in some steps of Adam without decay."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    args = TrainingArguments(
        str(out), max_steps=steps, learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.0, report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="no", adam_epsilon=1e-20, per_device_train_batch_size=2,
    )  # fmt: skip
    ids = torch.arange(48).view(2, 24)
    data: Any = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, args, train_dataset=data, callbacks=list(callbacks)).train()
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of float32, grown by hidden x2."""
    from gdagrow_cli.main import main

    directory = tmp_path_factory.mktemp("wide")
    write_checkpoint(directory / "source", dtype=torch.float32)
    assert main(["expand", str(directory / "source"), str(directory / "wide"), "--hidden-x2", "--quiet"]) == 0
    return directory / "wide"


def test_multipliers_in_a_trainer_of_ones_own(wide: Path, tmp_path: Path) -> None:
    """Adam's first step is the learning rate itself wherever the gradient is not 0 (eps is 1e-20)."""
    moved = stock_trainer(wide, tmp_path, GrowthCallback(wide))
    expected = multipliers_of(read_record(wide), list(moved))
    assert expected["model.layers.0.self_attn.q_proj.weight"] == 0.5
    for name, by in moved.items():
        # The difference of two weights around 1: some roundings of 6e-8.
        assert float(by.abs().max()) == pytest.approx(1e-3 * expected[name], abs=5e-7), name


def test_a_warm_up_after_growth(wide: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    callbacks = [GrowthCallback(wide, multipliers=False, warm_up=4, at_step=at) for at in (0, -1)]
    first, second = (float(stock_trainer(wide, tmp_path, callback)[name].abs().max()) for callback in callbacks)
    assert (first, second) == (pytest.approx(0.25e-3, abs=5e-7), pytest.approx(0.5e-3, abs=5e-7))


def test_copies_that_cannot_part_are_warned_of(tmp_path: Path) -> None:
    from gdagrow_cli.main import main

    write_checkpoint(tmp_path / "source", dtype=torch.float32)
    words = ["expand", str(tmp_path / "source"), str(tmp_path / "exact"), "--signal-x2", "--exact-copies", "--quiet"]
    assert main(words) == 0
    written: list[Any] = []
    stock_trainer(tmp_path / "exact", tmp_path, HealthCallback(10, written.append, tmp_path / "exact"), steps=20)
    assert [(line["step"], len(line["warnings"])) for line in written] == [(10, 0), (20, 1)]
    assert "copies along signal are bit for bit the same 20 steps after the growth" in written[1]["warnings"][0]
    assert written[1]["copy_distance"] == 0


def test_blocks_are_kept_in_a_trainer_of_ones_own(wide: Path, tmp_path: Path) -> None:
    moved = stock_trainer(wide, tmp_path, FreezeCallback(5, layers=[1]), steps=2)
    kept = {name for name, by in moved.items() if not by.any()}
    assert kept == {name for name in moved if name.startswith("model.layers.1.")}


def test_the_shipped_demo_in_few_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "recipes" / "train" / "demo.yaml"
    values = read_train_recipe(path).as_dict()
    (growth,) = values["growth"]
    values |= {"steps": 6, "save_every": 3, "evaluate_every": 0, "evaluate_on": 4, "growth": [{**growth, "at": 3}]}
    with (tmp_path / "demo.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(values, file)
    assert call(capsys, "train", tmp_path / "demo.yaml", "--out", tmp_path / "run", "--quiet").code == 0
    assert len(tensors(tmp_path / "run" / "model")["model.layers.3.self_attn.q_proj.weight"]) == (6 + 1) * 2 * 32


def test_a_warm_up_as_the_growth_proposes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Moments begin at zero, so that Adam's first step is the rate itself, and 2 / (1 - 0.95) steps are proposed."""
    growth = [{"at": 2, "expand": {"signal": 2}, "moments": "reset"}]
    optimizer = {"learning_rate": 1e-3, "weight_decay": 0.0, "eps": 1e-20}
    schedule = {"kind": "constant"}
    changes: dict[str, Any] = {"steps": 3, "save_every": 1, "keep": 9, "evaluate_every": 0}
    recipe = write_recipe(tmp_path / "r.yaml", growth=growth, optimizer=optimizer, schedule=schedule, **changes)
    assert call(capsys, "train", recipe, "--out", tmp_path / "run", "--quiet").code == 0
    assert json.loads((tmp_path / "run" / "grown-2" / "growth.json").read_text())["warm_up"]["steps"] == 40
    before, after = (tensors(tmp_path / "run" / name)["lm_head.weight"] for name in ("grown-2", "checkpoint-3"))
    # The difference of weights around 0.02: roundings of 2e-9.
    assert float((after - before).abs().max()) == pytest.approx(1e-3 / 40, abs=1e-8)


def test_muon_grows_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    growth = [{"at": 4, "expand": {"signal": 2, "ffn": 2}}]
    optimizer = {"name": "muon", "learning_rate": 3e-3}
    recipe = write_recipe(tmp_path / "r.yaml", steps=8, growth=growth, optimizer=optimizer, keep=9)
    outcome = call(capsys, "train", recipe, "--out", tmp_path / "run", "--quiet")
    assert outcome.code == 0, outcome.err
    found = losses(tmp_path / "run")
    assert found[8] < found[4] < found[1]
    saved = torch.load(tmp_path / "run" / "grown-4" / "optimizer.pt", weights_only=True)
    kept = {tuple(sorted(moments)) for moments in saved["state"].values()}
    assert kept == {("momentum_buffer",), ("exp_avg", "exp_avg_sq", "step")}
    names_of = [group["param_names"] for group in saved["param_groups"]]
    assert names_of[1:2] == [["model.embed_tokens.weight", "lm_head.weight"]]
    assert [group["weight_decay"] for group in saved["param_groups"]] == [0.1, 0.1, 0.0]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors(tmp_path / "run" / "grown-4").items()}
    flat = [name for names in names_of for name in names]
    for index, moments in saved["state"].items():
        assert all(tuple(value.shape) in ((), shapes[flat[index]]) for value in moments.values())
    # Killed after the growth, it goes on to the same figures.
    whole = lines(tmp_path / "run")
    for name in ("checkpoint-8", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    assert call(capsys, "train", recipe, "--out", tmp_path / "run", "--resume", "--quiet").code == 0
    assert lines(tmp_path / "run") == whole


def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    write_checkpoint(tmp_path / "demo" / "source", vocab=256, dtype=torch.float32, extra={})
    grow(tmp_path / "demo" / "source", tmp_path / "demo" / "grown", {"signal": 2})
    monkeypatch.chdir(tmp_path)
    printed: list[Any] = []
    exec(block, {"print": lambda *told: printed.append(told)})
    assert [sorted(copies) for copies, _ in printed] == [["signal"], ["signal"]]


def test_the_recipe_of_the_page_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    made = make_train_recipe(YAML(typ="safe", pure=True).load(block), "the page")
    assert (made.growth[0].at, made.precision) == (2000, "bf16")
    keys = set(re.findall(r"`(\w+)`", "".join(line for line in page.splitlines() if line.startswith("| `"))))
    assert set(TrainRecipe.model_fields) - {"data"} <= keys, "the table of the page lacks a key"
