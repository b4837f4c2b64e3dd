"""Training states under depth, sizes that are no multiple and a choice of heads: against gradients, and by hand.

One step of AMSGrad with rates and betas of zero leaves every weight where it is, a gradient in `exp_avg`, and its
square in `exp_avg_sq` and `max_exp_avg_sq`. What a growth makes of that state must be the gradients of the grown model:
those that automatic differentiation finds, whatever the rule says.
"""

import json
import re
from collections import Counter
from math import exp, sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from torch import Tensor, nn

from gdagrow.formats.safetensors_header import read_header
from gdagrow.growing import grow_checkpoint, prepare_growth
from gdagrow.models.gda import load_model
from gdagrow.plan import GrowthPlan, TensorPlan
from gdagrow.recipe import make_recipe
from gdagrow.states.optimizer_file import read_optimizer
from tests.checkpoints import write_checkpoint
from tests.growths import RANDOM
from tests.property.test_every_axis import compositions
from tests.trained_pairs import BIG, EPSILON, MUON, ROUNDINGS, backward, batches

POWERS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "momentum_buffer": 1}
Kept = dict[str, dict[str, Tensor]]


def write_gradients(directory: Path, ids: Tensor) -> None:
    """Write `optimizer.pt` of a run that made the step above on one batch."""
    model = load_model(directory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.0, 0.0), weight_decay=0.0, amsgrad=True)
    backward(model, ids)
    optimizer.step()
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")


def kept_by_name(directory: Path) -> Kept:
    """What `optimizer.pt` keeps, by the names of the model in one group, in the order of `named_parameters()`."""
    names = [name for name, _ in load_model(directory).named_parameters()]
    tree = torch.load(directory / "optimizer.pt", weights_only=True)
    (group,) = tree["param_groups"]
    assert group["params"] == list(range(len(names)))
    return {names[number]: kept for number, kept in tree["state"].items()}


def fresh_places(tensor: TensorPlan) -> Tensor:
    """Which elements of a tensor stand at fresh indices."""
    found = torch.zeros(tensor.shape, dtype=torch.bool)
    for dim, index_map in enumerate(tensor.growth.dims):
        fresh = torch.tensor([old >= index_map.old_size for old in index_map])
        found |= fresh.reshape([-1 if d == dim else 1 for d in range(len(tensor.shape))])
    return found


@settings(RANDOM, max_examples=8)
@given(compositions())
def test_grown_moments_are_the_gradients_of_the_grown_model(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    topology, recipe = case
    with TemporaryDirectory() as directory:
        source, target = Path(directory, "source"), Path(directory, "grown")
        write_checkpoint(source, **{**topology, "dtype": torch.float64, "lambda_dtype": torch.float64})
        (ids,) = batches(topology["vocab"], 1, seed=3)
        write_gradients(source, ids)
        recipe = make_recipe({**recipe, "exact_copies": True, "snr_db": 40.0, "seed": 0})
        plan = prepare_growth(source, recipe).plan
        grow_checkpoint(source, target, recipe)
        kept, model = kept_by_name(target), load_model(target)
        backward(model, ids)
        lost = {tensor.name for tensor in plan.tensors if tensor.moments_lost}
        assert kept.keys() == model.state_dict().keys() - lost
        event("some are lost" if lost else "all are carried")
        for tensor in plan.tensors:
            if tensor.name in lost:
                continue
            gradient = model.get_parameter(tensor.name).grad
            assert gradient is not None
            # Whatever its gradient is: it has no past.
            begun = fresh_places(tensor)
            for key, moment in kept[tensor.name].items():
                if key == "step":
                    assert moment == 1
                    continue
                assert not moment[begun].any()
                expected = (gradient ** POWERS[key])[~begun]
                tolerance = ROUNDINGS * EPSILON * max(float(expected.abs().max()), *_largest(model, POWERS[key]))
                assert float((moment[~begun] - expected).abs().max()) <= tolerance, (tensor.name, key)


def _largest(model: nn.Module, power: int) -> tuple[float, float]:
    """The largest gradient of a model, to whose size rounding in the backward pass is relative."""
    return 0.0, max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) ** power


def lambda_init(layer: int) -> float:
    return 0.8 - 0.6 * exp(-0.3 * (layer - 1))  # Motif's own counting


PLACED = {
    "even": ({"depth": 2}, [0, 0, 1, 1], {1, 3}),
    "top": ({"depth": 2, "insert": "top"}, [0, 1, 1, 1], {2, 3}),
    "bottom": ({"depth": 2, "insert": "bottom"}, [0, 0, 0, 1], {0, 1}),
    "after": ({"insert": "after:0,0,1"}, [0, 0, 0, 1, 1], {1, 2, 4}),
}
WIDER: dict[str, dict[str, Any]] = {
    "alone": {},
    "copied": {"hidden": 2, "signal": 2, "ffn": 3},
    "to sizes": {"hidden_to": 31, "ffn_to": 25, "signal": "3:1", "select": "norm"},
}


def by_hand(plan: GrowthPlan, tensor: TensorPlan, source: Tensor, power: int, factor: float) -> Tensor:
    """The mirror rule, copies counted one by one: divided by those of what is written, fresh ones zero."""
    expected = source
    for dim, (index_map, reads) in enumerate(zip(tensor.growth.dims, tensor.growth.reads, strict=True)):
        old = list(index_map)
        times = Counter(old)
        shares = [0.0 if i >= index_map.old_size else 1.0 if reads else times[i] ** -power for i in old]
        gathered = expected.index_select(dim, torch.tensor([0 if i >= index_map.old_size else i for i in old]))
        shape = [-1 if d == dim else 1 for d in range(source.dim())]
        expected = gathered * torch.tensor(shares, dtype=source.dtype).reshape(shape)
    return expected / factor**power


def repair_of(name: str, layers: list[int], new: set[int], hidden: tuple[int, int]) -> float | None:
    """What a gain was multiplied by, None for lambdas that were moved; 1 for all else."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    layer = int(found[1]) if found else None
    if "layernorm" in name or name == "model.norm.weight":
        return sqrt(hidden[1] // hidden[0] * hidden[0] / hidden[1])
    if layer is None or layers[layer] == layer:
        return 1.0
    if name.endswith("subln.weight"):
        return (1 - lambda_init(layers[layer])) / (1 - lambda_init(layer))
    return None if name.endswith(("lambda_q2", "lambda_k2")) else 1.0


def trained(directory: Path, make: Any, **topology: Any) -> Kept:
    """Write a checkpoint and what an optimizer keeps after two steps on random gradients; returns that by name."""
    write_checkpoint(directory, **{**BIG, "layers": 2, "activation": "silu", **topology})
    model = load_model(directory)
    optimizer = make(model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: kept for parameter, kept in optimizer.state.items()}


MAKERS = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters()),
    "SGD momentum": lambda model: torch.optim.SGD(model.parameters(), momentum=0.9),
    "AMSGrad in named groups": lambda model: torch.optim.AdamW(
        [{"params": [(n, p) for n, p in model.named_parameters() if p.dim() == 2]},
         {"params": [(n, p) for n, p in model.named_parameters() if p.dim() != 2], "weight_decay": 0.0}], amsgrad=True,
    ),
    "Muon": lambda model: MUON([p for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n]),
}  # fmt: skip


# Every placement with every width, and every optimizer with each of both once.
CASES = [
    ("AMSGrad in named groups", "even", "alone"), ("AdamW", "even", "copied"), ("Muon", "even", "to sizes"),
    ("AdamW", "top", "alone"), ("Muon", "top", "copied"), ("SGD momentum", "top", "to sizes"),
    ("Muon", "bottom", "alone"), ("SGD momentum", "bottom", "copied"),
    ("AMSGrad in named groups", "bottom", "to sizes"),
    ("SGD momentum", "after", "alone"), ("AMSGrad in named groups", "after", "copied"), ("AdamW", "after", "to sizes"),
]  # fmt: skip


@pytest.mark.parametrize(("optimizer_of", "where", "wider"), CASES, ids=[", ".join(case) for case in CASES])
def test_every_moment_by_hand(tmp_path: Path, optimizer_of: str, where: str, wider: str) -> None:
    make, (deeper, layers, new) = MAKERS[optimizer_of], PLACED[where]
    source, target = tmp_path / "source", tmp_path / "grown"
    before = trained(source, make)
    recipe = make_recipe({**deeper, **WIDER[wider]})
    plan = prepare_growth(source, recipe).plan
    grow_checkpoint(source, target, recipe)
    model = load_model(target)
    optimizer = make(model)
    # Raises if groups have other sizes; by its order numbers become the parameters of the grown model again.
    optimizer.load_state_dict(torch.load(target / "optimizer.pt", weights_only=True))
    names = {parameter: name for name, parameter in model.named_parameters()}
    after = {names[parameter]: kept for parameter, kept in optimizer.state.items() if kept}
    assert list(names.values()) == [tensor.name for tensor in plan.tensors]
    hidden, expected = (plan.before.hidden, plan.after.hidden), set()
    for tensor in plan.tensors:
        found = re.match(r"model\.layers\.(\d+)\.", tensor.name)
        old = tensor.name
        if found and int(found[1]) in new:
            continue
        if found:
            old = tensor.name.replace(f"layers.{found[1]}.", f"layers.{layers[int(found[1])]}.")
        factor = repair_of(tensor.name, layers, new, hidden)
        if factor is None or old not in before:
            continue
        expected.add(tensor.name)
        for key, moment in before[old].items():
            if key in POWERS:
                right = by_hand(plan, tensor, moment, POWERS[key], factor)
                # Powers and products of a few factors, each rounded once.
                assert torch.allclose(after[tensor.name][key], right, rtol=16 * EPSILON, atol=0), (tensor.name, key)
            else:
                assert after[tensor.name][key] == moment
    assert after.keys() == expected
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = read_optimizer(read_header(target))
    if "named" in optimizer_of:
        groups = torch.load(target / "optimizer.pt", weights_only=True)["param_groups"]
        assert [list(names) for names in state.groups] == [group["param_names"] for group in groups]
    assert {name for name, kept in state.by_name.items() if kept} == expected
    # What it reads grows on.
    grow_checkpoint(target, tmp_path / "again", make_recipe({"depth": 1, "hidden": 2}))


def two_orders() -> dict[str, Any]:
    """Orders of a group that are not those of `named_parameters()`."""

    def backwards(named: list[tuple[str, nn.Parameter]]) -> Any:
        return named[::-1]

    def by_kind(named: list[tuple[str, nn.Parameter]]) -> Any:
        return sorted(named, key=lambda item: re.sub(r"\.\d+\.", ".", item[0]))

    def otherwise_in_a_block(named: list[tuple[str, nn.Parameter]]) -> Any:
        def place(item: tuple[str, nn.Parameter]) -> tuple[int, str]:
            found = re.match(r"model\.layers\.(\d+)\.(.*)", item[0])
            return (int(found[1]), found[2]) if found else (-1, "") if "embed" in item[0] else (99, item[0])

        return sorted(named, key=place)

    return {"backwards": backwards, "by kind": by_kind, "otherwise in a block": otherwise_in_a_block}


@pytest.mark.parametrize("ordered", two_orders().values(), ids=list(two_orders()))
@pytest.mark.parametrize("placed", PLACED.values(), ids=list(PLACED))
def test_new_blocks_in_a_group_with_an_order_of_its_own(
    tmp_path: Path, placed: tuple[dict[str, Any], list[int], set[int]], ordered: Any
) -> None:
    """An engine loads by place, not by name: the same optimizer of the grown model has the names in the same order."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(ordered(list(model.named_parameters())))

    trained(tmp_path / "source", make)
    grow_checkpoint(tmp_path / "source", tmp_path / "grown", make_recipe(placed[0]))
    (stored,) = torch.load(tmp_path / "grown/optimizer.pt", weights_only=True)["param_groups"]
    assert stored["param_names"] == [
        name for name, _ in ordered(list(load_model(tmp_path / "grown").named_parameters()))
    ]


def test_blocks_in_groups_of_their_own_take_their_copies_along(tmp_path: Path) -> None:
    """Rates that fall with depth, by groups that name their parameters: a copy has the rate of its neighbour."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        found: list[list[Any]] = [[], [], []]
        for name, parameter in model.named_parameters():
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            found[int(layer[1]) if layer else 2].append((name, parameter))
        return torch.optim.AdamW([{"params": named, "lr": 0.1**number} for number, named in enumerate(found)])

    trained(tmp_path / "source", make)
    grow_checkpoint(tmp_path / "source", tmp_path / "grown", make_recipe({"insert": "after:0,1,1"}))
    groups = torch.load(tmp_path / "grown/optimizer.pt", weights_only=True)["param_groups"]
    layers = [sorted({name.split(".")[2] for name in group["param_names"] if "layers" in name}) for group in groups]
    assert layers == [["0", "1"], ["2", "3", "4"], []]
    assert [group["lr"] for group in groups] == [1, 0.1, pytest.approx(0.01)]


def test_the_record_says_in_which_layers_moments_begin(tmp_path: Path) -> None:
    """Where a group's signal heads are split over two copies of a noise head, and blocks are new besides."""
    trained(tmp_path / "source", MAKERS["AdamW"])
    growing = prepare_growth(tmp_path / "source", make_recipe({"noise": 2, "depth": 1, "insert": "after:0"}))
    reset = growing.output.record["optimizer"]["reset"]
    attention = "model.layers.{layer}.self_attn."
    assert reset[f"{attention}o_proj.weight"] == "its block is new (layer 1)"
    assert re.fullmatch(
        r"copies along .* \(layers 0, 2\); its block is new \(layer 1\)", reset[f"{attention}q_proj.weight"]
    )
    moved = "it makes up for the change of its layer's lambda_init"
    assert reset[f"{attention}lambda_q2"] == f"its block is new (layer 1); {moved} (layer 2)"
    assert f"{attention}subln.weight" in reset, "of the new block"
    target = tmp_path / "grown"
    grow_checkpoint(tmp_path / "source", target, growing.plan.recipe)
    assert json.loads((target / "growth.json").read_text())["moments_not_carried"] == reset


@pytest.mark.parametrize(("recipe", "steps"), [({"hidden_to": 17}, 20), ({"depth": 1}, 20), ({"hidden": 2}, 0)])
def test_a_warm_up_is_proposed_wherever_moments_begin(tmp_path: Path, recipe: dict[str, Any], steps: int) -> None:
    """Zeros of fresh features lie beside the old step count, with which Adam's first steps would be too long."""
    trained(tmp_path / "source", lambda model: torch.optim.AdamW(model.parameters(), betas=(0.9, 0.9)))
    assert prepare_growth(tmp_path / "source", make_recipe(recipe)).output.record["warm_up"]["steps"] == steps


def test_what_a_run_has_not_trained_yet_begins_in_the_grown_one(tmp_path: Path) -> None:
    """Blocks that were frozen since the start of a run have no moments, and no optimizer asks for any."""
    write_checkpoint(tmp_path / "source", **{**BIG, "layers": 2})
    model = load_model(tmp_path / "source")
    optimizer = torch.optim.AdamW(model.parameters())
    backward(model, batches(23, 1, seed=1)[0])
    for name, parameter in model.named_parameters():
        if ".layers.0." in name:
            parameter.grad = None
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "source/optimizer.pt")
    recipe = make_recipe({"signal": 2, "depth": 1, "insert": "bottom"})
    grow_checkpoint(tmp_path / "source", tmp_path / "grown", recipe)
    kept = kept_by_name(tmp_path / "grown")
    assert {name.split(".")[2] for name in kept if ".layers." in name} == {"2"}
    reset = json.loads((tmp_path / "grown/growth.json").read_text())["optimizer"]["reset"]
    told = "its block is new (layer 0); the run has none of it yet (layer 1)"
    assert reset["model.layers.{layer}.mlp.up_proj.weight"] == told
