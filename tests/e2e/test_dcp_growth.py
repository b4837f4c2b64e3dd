"""A sharded run is grown by one process and goes on on any number of ranks, its optimizer included."""

import json
import shutil
import warnings
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
from gdagrow.models.gda import load_model
from gdagrow.recipe import make_recipe
from gdagrow.verify.weights import check_weights
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
        (("--hidden-x2", "--untie"), "the first lm_head.weight, would be new to the optimizer"),
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


EVERY_AXIS: dict[str, dict[str, Any]] = {
    "deeper": {"depth": 2},
    "to a size": {"hidden_to": 47},
    "all at once": {"insert": "after:0,1,1", "hidden_to": 80, "signal": "5:1", "select": "norm", "noise": 1, "ffn": 2},
}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("recipe", EVERY_AXIS.values(), ids=list(EVERY_AXIS))
def test_weights_alone_grow_along_every_axis(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: dict[str, Any], tied: bool
) -> None:
    write_checkpoint(tmp_path / "model", dtype=torch.float32, tied=tied)
    weights = load_model(tmp_path / "model").state_dict()
    dcp.save({"model": weights, "steps": 7}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "dcp" / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    grow_checkpoint(tmp_path / "dcp", tmp_path / "grown", make_recipe(recipe))
    grow_checkpoint(tmp_path / "model", tmp_path / "whole", make_recipe(recipe))
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    dcp_to_torch_save(tmp_path / "grown", tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert plain["steps"] == 7
    assert plain["model"].keys() - {"lm_head.weight"} == whole.keys() - {"lm_head.weight"}
    for name, tensor in whole.items():
        assert plain["model"][name].dtype == tensor.dtype
        assert torch.equal(plain["model"][name], tensor), name
    # An engine loads into what it has; what is made in float64 is rounded to that, and nothing else is.
    state = {"model": load_model(tmp_path / "whole", dtype=torch.float32).state_dict()}
    for tensor in state["model"].values():
        tensor.fill_(0.25)
    dcp.load(state, checkpoint_id=tmp_path / "grown", no_dist=True)
    assert all(torch.equal(state["model"][name], tensor.float()) for name, tensor in whole.items())
    records = [json.loads((tmp_path / name / "growth.json").read_text()) for name in ("grown", "whole")]
    assert records[0]["lineage"] == records[1]["lineage"]
    for source in ("model", "dcp"):
        outcome = call(capsys, "diff", tmp_path / source, tmp_path / "grown", "--weights")
        assert outcome.code == 0, outcome
    outcome = call(capsys, "diff", tmp_path / "dcp", tmp_path / "grown", "--seqs", 1, "--length", 6, "--decode", 0)
    assert outcome.code == 0, outcome


@pytest.mark.parametrize("pair", [False, True], ids=["one directory", "the Trainer's pair"])
def test_moments_grow_to_a_size_that_is_no_multiple(tmp_path: Path, pair: bool) -> None:
    """Gains were multiplied by the root of 32 / 47, so that their gradients are divided by it; fresh features begin."""
    write_checkpoint(tmp_path / "model", dtype=torch.float32)
    weights = load_model(tmp_path / "model").state_dict()
    generator = torch.Generator().manual_seed(0)
    kept = {
        name: {"step": torch.tensor(3.0)}
        | {key: torch.rand(weight.shape, generator=generator) for key in ("exp_avg", "exp_avg_sq")}
        for name, weight in weights.items()
    }
    source, target = tmp_path / "source", tmp_path / "grown"
    write_both(source, weights, kept, pair=pair)
    (source / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    grow_checkpoint(source, target, make_recipe({"hidden_to": 47}))
    dcp_to_torch_save(target / "optimizer_0" if pair else target, tmp_path / "plain.pt")
    tree = torch.load(tmp_path / "plain.pt", weights_only=True)
    grown = tree["optimizer" if pair else "optim"]["state"]
    assert grown.keys() == kept.keys()
    for name, moments in grown.items():
        assert moments["step"] == 3
        for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            expected = kept[name][key]
            gain = "layernorm" in name or name == "model.norm.weight"
            expected = expected / (32 / 47) ** (power / 2) if gain else expected
            for dim, (old, new) in enumerate(zip(weights[name].shape, moments[key].shape, strict=True)):
                assert new == (47 if old == 32 else old)
                zeros = expected.new_zeros([new - old if d == dim else n for d, n in enumerate(expected.shape)])
                expected = torch.cat((expected, zeros), dim)
            # One product in float32, of a quotient rounded to float64.
            assert torch.allclose(moments[key], expected, rtol=2e-7, atol=0), (name, key)
    record = json.loads((target / "growth.json").read_text())
    assert record["optimizer"]["reset"] == {}
    assert record["warm_up"]["steps"] == 40, "zeros of fresh features lie beside the old step count"
    assert check_weights(tmp_path / "model", target).equivalent


def write_both(directory: Path, weights: Any, kept: Any, *, pair: bool) -> None:
    """A training state in one directory, or as the Trainer has it with several processes."""
    groups = [{"lr": 1e-3, "betas": (0.9, 0.95), "params": list(weights)}]
    moments = {"state": kept, "param_groups": groups}
    trees = {".": {"model": weights, "optim": moments}}
    if pair:
        trees = {"pytorch_model_fsdp_0": {"model": weights}, "optimizer_0": {"optimizer": moments}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is one process
        for place, tree in trees.items():
            dcp.save(tree, checkpoint_id=directory / place, no_dist=True)


@pytest.mark.parametrize("moments", ["auto", "carry", "reset"])
@pytest.mark.parametrize("pair", [False, True], ids=["one directory", "the Trainer's pair"])
def test_new_blocks_beside_an_optimizer_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: bool, moments: str
) -> None:
    write_checkpoint(tmp_path / "model", dtype=torch.float32)
    weights = load_model(tmp_path / "model").state_dict()
    kept = {
        name: {"step": torch.tensor(1.0)} | {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")}
        for name, weight in weights.items()
    }
    write_both(tmp_path / "state", weights, kept, pair=pair)
    words = ("--depth", "1", "--moments", moments, "--config", tmp_path / "model")
    outcome = call(capsys, "expand", tmp_path / "state", tmp_path / "grown", *words)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "more layers: 16 parameters, the first model.layers.2." in outcome.err
    assert "convert the weights alone to safetensors first" in outcome.err
    assert not (tmp_path / "grown").exists()


def test_a_comparison_is_proposed_only_where_the_source_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`gdagrow diff` takes no config for a distributed checkpoint that has none."""
    write_checkpoint(tmp_path / "model", dtype=torch.float32)
    write_distributed_state(tmp_path / "model", tmp_path / "dcp")
    words = "--signal-x2", "--config", tmp_path / "model"
    without = call(capsys, "expand", tmp_path / "dcp", tmp_path / "grown", *words)
    assert (without.code, "gdagrow diff" in without.out, "then train it" in without.out) == (0, False, True)
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "dcp")
    proposed = call(capsys, "expand", tmp_path / "dcp", tmp_path / "again", "--signal-x2").out
    assert f"  gdagrow diff {tmp_path / 'dcp'} {tmp_path / 'again'} --weights\n" in proposed
    assert call(capsys, "diff", tmp_path / "dcp", tmp_path / "again", "--weights").code == 0
