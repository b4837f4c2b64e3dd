"""Files of torch's own optimizers: named, grown by the mirror rule, and loaded again by the same optimizers."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdagrow.engine import grow_moment
from gdagrow.formats.safetensors_header import read_header
from gdagrow.growing import grow_checkpoint, prepare_growth
from gdagrow.models.gda import load_model
from gdagrow.recipe import make_recipe
from gdagrow.states.optimizer_file import read_optimizer
from tests.checkpoints import write_checkpoint

GROWTH = make_recipe({"signal": 2, "hidden": 3, "ffn": 2, "noise": 2, "kv": 2, "exact_copies": True})
Parameters = Iterable[tuple[str, nn.Parameter]]


def with_names_in_wrappers(named: Parameters) -> Any:
    return [(f"_orig_mod.module.{name.replace('layers.0.', 'layers.0._orig_mod.')}", p) for name, p in named]


def with_names_backwards(named: Parameters) -> Any:
    return list(named)[::-1]


def all_in_one(named: Parameters) -> Any:
    return [parameter for _, parameter in named]


def with_names(named: Parameters) -> Any:
    return list(named)


def matrices_and_the_rest(named: Parameters) -> Any:
    named = list(named)
    return [{"params": [p for _, p in named if p.dim() == 2]},
            {"params": [p for _, p in named if p.dim() != 2], "weight_decay": 0.0}]  # fmt: skip


def as_transformers(named: Parameters) -> Any:
    named = list(named)
    kept = [name for name, _ in named if "norm" in name.lower().replace("poly_norm", "") or "bias" in name]
    return [{"params": [p for n, p in named if n not in kept]},
            {"params": [p for n, p in named if n in kept], "weight_decay": 0.0}]  # fmt: skip


def every_norm(named: Parameters) -> Any:
    named = list(named)
    kept = [name for name, _ in named if "norm" in name or "bias" in name or "subln" in name]
    return [{"params": [p for n, p in named if n not in kept]}, {"params": [p for n, p in named if n in kept]}]


def hidden_matrices(named: Parameters) -> Any:
    return [parameter for name, parameter in named if parameter.dim() == 2 and ".layers." in name]


def matrices(named: Parameters) -> Any:
    return [parameter for _, parameter in named if parameter.dim() == 2]


OPTIMIZERS: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    "AdamW in one group": lambda named: torch.optim.AdamW(all_in_one(named), lr=1e-3),
    "AdamW with names": lambda named: torch.optim.AdamW(with_names(named), lr=1e-3),
    "AdamW with names in wrappers": lambda named: torch.optim.AdamW(with_names_in_wrappers(named), lr=1e-3),
    "AdamW with names in an order of its own": lambda named: torch.optim.AdamW(with_names_backwards(named), lr=1e-3),
    "AdamW as transformers deals it out": lambda named: torch.optim.AdamW(as_transformers(named), lr=1e-3, fused=True),
    "AdamW without decay of any norm": lambda named: torch.optim.AdamW(every_norm(named), lr=1e-3),
    "AMSGrad": lambda named: torch.optim.AdamW(matrices_and_the_rest(named), lr=1e-3, amsgrad=True),
    "NAdam": lambda named: torch.optim.NAdam(all_in_one(named), lr=1e-3),
    "SGD": lambda named: torch.optim.SGD(matrices_and_the_rest(named), lr=1e-3, momentum=0.9),
    "SGD without momentum": lambda named: torch.optim.SGD(all_in_one(named), lr=1e-3),
    "Muon": lambda named: torch.optim.Muon(matrices(named), lr=1e-3),
    "Muon without embedding and head": lambda named: torch.optim.Muon(hidden_matrices(named), lr=1e-3),
    "a rate on the device": lambda named: torch.optim.AdamW(
        all_in_one(named), lr=torch.tensor(1e-3), capturable=False, foreach=False, fused=True
    ),
}
POWERS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "momentum_buffer": 1}


def trained(directory: Path, optimizer_of: Callable[[Parameters], torch.optim.Optimizer], **topology: Any) -> Any:
    """A checkpoint with the state of an optimizer that made two steps on random gradients; returns that optimizer."""
    write_checkpoint(directory, **{"dtype": torch.float32, "bias": True, **topology})
    model = load_model(directory)
    optimizer = optimizer_of(model.named_parameters())
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    return model, optimizer


def state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: kept for parameter, kept in optimizer.state.items()}


@pytest.mark.parametrize("optimizer_of", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_every_moment_is_grown_and_every_step_kept(
    tmp_path: Path, optimizer_of: Callable[[Parameters], torch.optim.Optimizer]
) -> None:
    model, optimizer = trained(tmp_path / "source", optimizer_of)
    growing = prepare_growth(tmp_path / "source", GROWTH)
    grow_checkpoint(tmp_path / "source", tmp_path / "grown", GROWTH)
    grown_model = load_model(tmp_path / "grown")
    grown = optimizer_of(grown_model.named_parameters())
    tree = torch.load(tmp_path / "grown" / "optimizer.pt", weights_only=True)
    for group, stored in zip(grown.param_groups, tree["param_groups"], strict=True):
        names = [name.replace("_orig_mod.", "").replace("module.", "") for name in group.get("param_names", [])]
        assert stored.get("param_names", []) == names
    grown.load_state_dict(tree)
    before, after = state_by_name(model, optimizer), state_by_name(grown_model, grown)
    assert before.keys() == after.keys()
    assert bool(before) == (optimizer.defaults.get("momentum") != 0)
    for tensor in growing.plan.tensors:
        for key, value in before.get(tensor.name, {}).items():
            expected = grow_moment(tensor.growth, value, POWERS[key]) if key in POWERS else value
            assert torch.equal(after[tensor.name][key], expected), (tensor.name, key)
    without_params = [{**group, "params": 0, "param_names": 0} for group in optimizer.state_dict()["param_groups"]]
    assert [{**group, "params": 0, "param_names": 0} for group in grown.state_dict()["param_groups"]] == without_params
    for parameter in grown_model.parameters():
        parameter.grad = torch.ones_like(parameter)
    grown.step()


def test_moments_in_bf16_and_of_tied_embeddings(tmp_path: Path) -> None:
    adamw = OPTIMIZERS["AdamW as transformers deals it out"]
    model, optimizer = trained(tmp_path / "source", adamw, tied=True, dtype=torch.bfloat16)
    grow_checkpoint(tmp_path / "source", tmp_path / "grown", make_recipe({"hidden": 2}))
    kept = torch.load(tmp_path / "grown" / "optimizer.pt", weights_only=True)["state"]
    first = state_by_name(model, optimizer)["model.embed_tokens.weight"]
    # What an embedding writes is divided; halves and quarters are exact in any dtype.
    assert torch.equal(kept[0]["exp_avg"], (first["exp_avg"] / 2).repeat(1, 2))
    assert torch.equal(kept[0]["exp_avg_sq"], (first["exp_avg_sq"] / 4).repeat(1, 2))
    assert kept[0]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("dealt", ["as transformers deals it out", "with names"])
def test_a_head_that_is_untied_joins_the_group_of_its_embedding(tmp_path: Path, dealt: str) -> None:
    adamw = OPTIMIZERS[f"AdamW {dealt}"]
    trained(tmp_path / "source", adamw, tied=True)
    for policy in ("auto", "carry"):
        grow_checkpoint(
            tmp_path / "source", tmp_path / policy, make_recipe({"hidden": 2, "embeddings": "untie"}), moments=policy
        )
        model = load_model(tmp_path / policy)
        optimizer = adamw(model.named_parameters())
        optimizer.load_state_dict(torch.load(tmp_path / policy / "optimizer.pt", weights_only=True))
        missing = model.state_dict().keys() - state_by_name(model, optimizer).keys()
        assert missing == ({"model.embed_tokens.weight", "lm_head.weight"} if policy == "auto" else set())
    names = [name for group in read_optimizer(read_header(tmp_path / "carry")).groups for name in group]
    if dealt == "with names":
        assert names[-1] == "lm_head.weight"
    else:
        assert names.index("lm_head.weight") < names.index("model.norm.weight"), "the head decays, the norm does not"


def test_what_cannot_be_carried_is_reset_and_named(tmp_path: Path) -> None:
    """Where a group's signal heads are split over copies of its noise head, only that noise head's moments are lost."""
    adamw = OPTIMIZERS["AdamW in one group"]
    trained(tmp_path / "source", adamw, ratio=4, bias=False)
    recipe = make_recipe({"noise": 2})
    growing = prepare_growth(tmp_path / "source", recipe)
    lost = {tensor.name for tensor in growing.plan.tensors if tensor.moments_lost}
    assert {name.split(".", 3)[-1] for name in lost} >= {"self_attn.q_proj.weight"}
    grow_checkpoint(tmp_path / "source", tmp_path / "grown", recipe)
    state = read_optimizer(read_header(tmp_path / "grown"), check_moments=False)
    assert {name for name, kept in state.by_name.items() if not kept} == lost
    assert growing.output.record["optimizer"]["reset"].keys() == {
        tensor.parameter for tensor in growing.plan.tensors if tensor.moments_lost
    }
    assert growing.output.record["warm_up"]["steps"] == 2000, "2 / (1 - 0.999)"


def test_reset_leaves_nothing_but_the_groups(tmp_path: Path) -> None:
    trained(tmp_path / "source", OPTIMIZERS["AdamW in one group"])
    grow_checkpoint(tmp_path / "source", tmp_path / "grown", GROWTH, moments="reset")
    tree = torch.load(tmp_path / "grown" / "optimizer.pt", weights_only=True)
    assert (tree["state"], len(tree["param_groups"][0]["params"])) == (
        {},
        len(load_model(tmp_path / "grown").state_dict()),
    )


def without_betas(groups: list[dict[str, Any]]) -> None:
    del groups[0]["betas"]


def betas_of_tensors(groups: list[dict[str, Any]]) -> None:
    groups[0]["betas"] = torch.tensor(0.9), torch.tensor(0.75)


def betas_of_one(groups: list[dict[str, Any]]) -> None:
    groups[0]["betas"] = 0.9, 1.0


@pytest.mark.parametrize(
    ("edit", "of_matrices", "of_all"), [(without_betas, 0, 2000), (betas_of_tensors, 8, 2000), (betas_of_one, 0, 0)]
)
def test_the_warm_up_is_of_the_groups_whose_moments_begin_at_zero(
    tmp_path: Path, edit: Callable[[list[dict[str, Any]]], None], of_matrices: int, of_all: int
) -> None:
    # Matrices, of which some lose their moments, in the first group and all else in the second.
    trained(tmp_path / "source", OPTIMIZERS["AMSGrad"], ratio=4, bias=False)
    tree = torch.load(tmp_path / "source/optimizer.pt", weights_only=True)
    edit(tree["param_groups"])
    torch.save(tree, tmp_path / "source/optimizer.pt")
    for policy, steps in (("auto", of_matrices), ("reset", of_all)):
        growing = prepare_growth(tmp_path / "source", make_recipe({"noise": 2}), moments=policy)
        assert growing.output.record["warm_up"]["steps"] == steps


def test_the_same_growth_writes_the_same_optimizer_file(tmp_path: Path) -> None:
    trained(tmp_path / "source", OPTIMIZERS["AdamW in one group"])
    for name in ("one", "two"):
        grow_checkpoint(tmp_path / "source", tmp_path / name, GROWTH)
    assert (tmp_path / "one/optimizer.pt").read_bytes() == (tmp_path / "two/optimizer.pt").read_bytes()
    assert (tmp_path / "one/growth.json").read_bytes() == (tmp_path / "two/growth.json").read_bytes()
