"""A sharded run is grown by one process and goes on on any number of ranks, its optimizer included."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from gdagrow.checkpoint import read_checkpoint
from gdagrow.engine import grow_moment
from gdagrow.errors import CheckpointError
from gdagrow.formats.torch_dtypes import DTYPES
from gdagrow.growing import grow_checkpoint, prepare_growth
from gdagrow.recipe import make_recipe
from tests.checkpoints import write_checkpoint, write_distributed_state
from tests.command import call
from tests.dcp_ranks import run_jobs

RECIPE = {"signal": 2, "hidden": 2, "noise": 2}
POWERS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def grown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state that two ranks saved, what it grew into, and what ranks and one process made of that."""
    work = tmp_path_factory.mktemp("tied" if request.param else "untied")
    write_checkpoint(work / "model", dtype=torch.float32, tied=request.param, vocab=67)
    run_jobs(("save", 2, work / "model", work / "dcp", work / "saved.safetensors"))
    # The ranks' weights after their step, whole: what the same growth makes of it is what ranks must find.
    stepped = work / "stepped"
    stepped.mkdir()
    (stepped / "config.json").write_bytes((work / "model" / "config.json").read_bytes())
    saved = load_file(work / "saved.safetensors")
    weights = {name.removeprefix("model."): tensor for name, tensor in saved.items() if not name.startswith("optim.")}
    save_file(weights, stepped / "model.safetensors")
    grow_checkpoint(stepped, work / "whole", make_recipe(RECIPE))
    grow_checkpoint(work / "dcp", work / "grown", make_recipe(RECIPE), config=work / "model", max_shard_bytes=20_000)
    run_jobs(
        *(("load", ranks, work / "whole", work / "grown", work / f"found-{ranks}.safetensors") for ranks in (1, 2, 3)),
        *(("go_on", ranks, work / "whole", work / "grown", work / f"losses-{ranks}.json") for ranks in (1, 2)),
    )
    return work


def test_weights_are_those_that_the_same_growth_makes_of_safetensors(grown: Path) -> None:
    whole, found = load_file(grown / "whole" / "model.safetensors"), load_file(grown / "found-2.safetensors")
    weights = {name.removeprefix("model."): tensor for name, tensor in found.items() if not name.startswith("optim.")}
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_moments_go_by_the_mirror_rule_on_any_number_of_ranks(grown: Path, ranks: int) -> None:
    saved, found = load_file(grown / "saved.safetensors"), load_file(grown / f"found-{ranks}.safetensors")
    plan = prepare_growth(grown / "dcp", make_recipe(RECIPE), config=grown / "model").plan
    for tensor in plan.tensors:
        prefix = f"optim.state.{tensor.name}"
        assert found[f"{prefix}.step"] == saved[f"{prefix}.step"] == 1
        for kind, power in POWERS.items():
            expected = grow_moment(tensor.growth, saved[f"{prefix}.{kind}"], power)
            assert torch.equal(found[f"{prefix}.{kind}"], expected), (tensor.name, kind)


def test_the_run_goes_on_alike_on_one_rank_and_two(grown: Path) -> None:
    one, two = (json.loads((grown / f"losses-{ranks}.json").read_text()) for ranks in (1, 2))
    # The same sums in another order, over a few steps: float32 rounding of sums of 64 terms.
    assert one == pytest.approx(two, rel=1e-5)
    assert len(set(one)) == 3


def test_values_that_are_no_tensors_are_carried_and_torch_reads_all(grown: Path) -> None:
    dcp_to_torch_save(grown / "grown", grown / "plain.pt")
    state: dict[str, Any] = torch.load(grown / "plain.pt", weights_only=False)
    assert (state["steps"], state["scheduler"]) == (1, {"last_epoch": 1})
    (group,) = state["optim"]["param_groups"]
    assert (group["lr"], group["amsgrad"]) == (1e-2, True)
    record = json.loads((grown / "grown" / "growth.json").read_text())
    assert record["optimizer"] == {"moments": "auto", "schedule": "keep", "reset": {}}
    assert len(list((grown / "grown").glob("*.distcp"))) > 1


def test_diff_and_inspect_read_distributed_checkpoints(grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (grown / "dcp" / "config.json").write_bytes((grown / "model" / "config.json").read_bytes())
    assert call(capsys, "inspect", grown / "grown").code == 0
    for evidence in (("--seqs", 1, "--length", 8, "--decode", 0), ("--weights",)):
        outcome = call(capsys, "diff", grown / "dcp", grown / "grown", *evidence)
        assert outcome.code == 0, outcome
    outcome = call(capsys, "diff", grown / "dcp", grown / "whole", "--weights")
    assert outcome.code == 0, outcome
    outcome = call(capsys, "export", grown / "grown", grown / "exported")
    assert outcome.code == 2
    assert "gdagrow convert --to safetensors makes a model directory of it" in outcome.err


def test_reset_writes_zeros_for_the_ranks_to_load(grown: Path) -> None:
    target = grown / "reset"
    grow_checkpoint(grown / "dcp", target, make_recipe(RECIPE), config=grown / "model", moments="reset")
    dcp_to_torch_save(target, grown / "reset.pt")
    state = torch.load(grown / "reset.pt", weights_only=False)["optim"]["state"]
    assert all(not tensor.any() for kept in state.values() for tensor in kept.values())
    assert state["model.norm.weight"]["exp_avg"].shape == (64,)
    record = json.loads((target / "growth.json").read_text())
    assert record["warm_up"]["steps"] == 2000, "2 / (1 - 0.999), from the groups"
    header = read_checkpoint(target)
    assert header.tensors["model.norm.weight"].shape == (64,)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--signal-x2", "--schedule", "restart"), "exclude_from_loading"),
        (("--signal-x2",), "has no config.json; give the model's with --config"),
        (("--signal-x2", "--to", "motif"), "convert it to safetensors first"),
        (("--hidden-x2", "--untie"), "the head would be new to the optimizer"),
    ],
)
def test_what_is_refused(
    grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], sentence: str
) -> None:
    if "--untie" in words and not json.loads((grown / "model/config.json").read_text())["tie_word_embeddings"]:
        sentence = "the source's head and embedding are not tied"
    source = tmp_path / "dcp"
    source.mkdir()
    for path in (grown / "dcp").iterdir():
        if path.name != "config.json":
            (source / path.name).write_bytes(path.read_bytes())
    config = () if "--config" in sentence else ("--config", grown / "model")
    outcome = call(capsys, "expand", source, tmp_path / "out", *words, *config)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert sentence in outcome.err
    assert not (tmp_path / "out").exists()


def test_tensors_of_any_dtype_and_size_are_carried_as_they_are(tmp_path: Path) -> None:
    """Such as the states of random generators and data loaders."""
    whole = {code: torch.tensor([1, 0, 2**7 - 1]).to(dtype) for code, dtype in DTYPES.items()
             if not dtype.is_floating_point}  # fmt: skip
    others = {"none": torch.empty(0, 3, dtype=torch.int64), "scale": torch.tensor(1.5).to(torch.float8_e4m3fn)}
    write_checkpoint(tmp_path / "model", dtype=torch.float32)
    write_distributed_state(tmp_path / "model", tmp_path / "dcp", **whole, **others)
    grow_checkpoint(tmp_path / "dcp", tmp_path / "grown", make_recipe(RECIPE), config=tmp_path / "model")
    dcp_to_torch_save(tmp_path / "grown", tmp_path / "plain.pt")
    state = torch.load(tmp_path / "plain.pt", weights_only=True)
    for key, tensor in {**whole, **others}.items():
        assert (state[key].dtype, state[key].tolist()) == (tensor.dtype, tensor.tolist()), key


def test_moments_of_what_is_not_stored_are_refused_by_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", dtype=torch.float32, tied=True)
    for number, name in enumerate(("lm_head.weight", "model.layers.0.self_attn.q_proj.bias")):
        state = tmp_path / f"dcp-{number}"
        moments = {"optim.state": {name: {"max_exp_avg_sq": torch.zeros(32)}}}
        write_distributed_state(tmp_path / "model", state, **moments)
        with pytest.raises(CheckpointError, match=f"{name}.max_exp_avg_sq is of no weight that is stored"):
            grow_checkpoint(state, tmp_path / "grown", make_recipe(RECIPE), config=tmp_path / "model")
    write_distributed_state(tmp_path / "model", tmp_path / "short", average=torch.zeros(3).to(torch.float8_e4m3fn))
    with pytest.raises(CheckpointError, match=r"1 tensors belong to no parameter of the model .*: average"):
        grow_checkpoint(tmp_path / "short", tmp_path / "grown", make_recipe(RECIPE), config=tmp_path / "model")


NORM = "model.norm.weight"
WRONG: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "none": ({}, f"{NORM} has none"),
    "of another shape": ({"exp_avg": torch.zeros(64)}, f"{NORM}.exp_avg has shape [64], the weight [32]"),
    "of whole numbers": ({"exp_avg": torch.zeros(32, dtype=torch.int8)}, f"{NORM}.exp_avg is stored as I8"),
    "of another kind": ({"exp_avg_sq_row": torch.zeros(2)}, f"{NORM}.exp_avg_sq_row is none of exp_avg, "),
}


@pytest.mark.parametrize(("kept", "sentence"), WRONG.values(), ids=list(WRONG))
def test_moments_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: dict[str, torch.Tensor], sentence: str
) -> None:
    write_checkpoint(tmp_path / "model", dtype=torch.float32, hidden=32)
    write_distributed_state(tmp_path / "model", tmp_path / "dcp", moments={NORM: kept})
    words = (tmp_path / "dcp", tmp_path / "grown", "--signal-x2", "--config", tmp_path / "model")
    outcome = call(capsys, "expand", *words)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert sentence in outcome.err
    assert not (tmp_path / "grown").exists()
    reset = call(capsys, "expand", *words, "--moments", "reset")
    if "exp_avg_sq_row" in kept:
        assert "exp_avg_sq_row cannot be reset" in reset.err
    else:
        assert reset.code == 0, reset


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_tied_weights_alone_whose_head_differs_or_is_untied(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", dtype=torch.float32, tied=True)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    for name, head in (("whole", {}), ("torn", {"lm_head.weight": embedding + 1})):
        dcp.save({"model": {**weights, **head}}, checkpoint_id=tmp_path / name, no_dist=True)
    untied = make_recipe({"embeddings": "untie", "exact_copies": True, "hidden": 2})
    with pytest.raises(CheckpointError, match=r"'model.lm_head.weight' and 'model.model.embed_tokens.weight' differ"):
        grow_checkpoint(tmp_path / "torn", tmp_path / "grown", untied, config=tmp_path / "model")
    grow_checkpoint(tmp_path / "whole", tmp_path / "grown", untied, config=tmp_path / "model")
    dcp_to_torch_save(tmp_path / "grown", tmp_path / "plain.pt")
    grown = torch.load(tmp_path / "plain.pt", weights_only=True)["model"]
    assert torch.equal(grown["lm_head.weight"], (embedding / 2).repeat(1, 2))
    assert torch.equal(grown["model.embed_tokens.weight"], embedding.repeat(1, 2))
