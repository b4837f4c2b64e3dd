"""Scaled rates step as explicit groups would, bit for bit, and nothing that is saved or scheduled ever sees them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gdagrow.errors import CheckpointError, GdagrowError
from gdagrow.models.gda import load_model
from gdagrow.record import read_record
from gdagrow.train.rates import multipliers_of, scaled_rates, warm_up_factor
from tests.checkpoints import write_checkpoint
from tests.growths import grow

MULTIPLIERS = (0.5, 1.0, 0.5, 0.25)
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "adamw foreach": (AdamW, {"foreach": True}),
    "adamw one by one": (AdamW, {"foreach": False}),
    "adamw fused": (AdamW, {"fused": True}),
    "adamw tensor rate": (AdamW, {"foreach": False, "lr": torch.tensor(0.01)}),
    "sgd": (SGD, {"momentum": 0.9, "nesterov": True}),
}
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    OPTIMIZERS["muon"] = (torch.optim.Muon, {})


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(4, 3 + i, generator=generator)) for i in range(4)]


def give_gradients(of: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in of:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def two_groups(of: list[nn.Parameter], **options: Any) -> list[dict[str, Any]]:
    """As engines make them: with decay and without."""
    return [{"params": of[:3], "weight_decay": 0.1, **options}, {"params": of[3:], "weight_decay": 0.0, **options}]


def scaled(name: str) -> tuple[list[nn.Parameter], Optimizer]:
    make, options = OPTIMIZERS[name]
    of = parameters()
    return of, make(two_groups(of), **{"lr": 0.01, **options})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_those_of_explicit_groups(name: str) -> None:
    make, options = OPTIMIZERS[name]
    ours, optimizer = scaled(name)
    theirs = parameters()
    rate = options.get("lr", 0.01)
    explicit = make(
        [{"params": [p], "lr": rate * m, "weight_decay": (0.1 if i < 3 else 0.0) / m}
         for i, (p, m) in enumerate(zip(theirs, MULTIPLIERS, strict=True))],
        **{"lr": 0.01, **options},
    )  # fmt: skip
    scaled_rates(optimizer, dict(zip(ours, MULTIPLIERS, strict=True)))
    schedules = [LambdaLR(o, lambda step: 0.9**step) for o in (optimizer, explicit)]
    for step in range(5):
        for of, stepped, schedule in ((ours, optimizer, schedules[0]), (theirs, explicit, schedules[1])):
            give_gradients(of, step)
            stepped.step()
            schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], parameters()[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_checkpoints_and_schedules_see_the_optimizer_as_it_was_made(name: str) -> None:
    ours, optimizer = scaled(name)
    groups = optimizer.param_groups
    _, untouched = scaled(name)
    handle = scaled_rates(optimizer, dict(zip(ours, MULTIPLIERS, strict=True)), warm_up_steps=3)
    schedules = [LambdaLR(o, lambda step: 0.5**step) for o in (optimizer, untouched)]
    for step in range(2):
        give_gradients(ours, step)
        optimizer.step()
        untouched.step()
        for schedule in schedules:
            schedule.step()
    assert optimizer.param_groups is groups
    assert handle.steps_done == 2
    saved, expected = optimizer.state_dict(), untouched.state_dict()
    assert str(saved["param_groups"]) == str(expected["param_groups"])
    assert schedules[0].get_last_lr() == schedules[1].get_last_lr()
    # Loaded into a new optimizer whose rates are scaled as well, the run goes on as if it had not been stopped.
    again, resumed = scaled(name)
    for parameter, stopped in zip(again, ours, strict=True):
        parameter.data.copy_(stopped.data)
    scaled_rates(resumed, dict(zip(again, MULTIPLIERS, strict=True)), warm_up_steps=3, steps_done=2)
    resumed.load_state_dict(copy.deepcopy(saved))
    for of, stepped in ((ours, optimizer), (again, resumed)):
        give_gradients(of, 9)
        stepped.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def moved(of: list[nn.Parameter], optimizer: Optimizer) -> list[float]:
    """How far a step with gradients of one moves each parameter."""
    before = [parameter.detach().clone() for parameter in of]
    for parameter in of:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return [float((old - new).detach().mean()) for old, new in zip(before, of, strict=True)]


def test_decay_shrinks_a_weight_by_the_same_share() -> None:
    of = [nn.Parameter(torch.ones(2, 2, dtype=torch.float64))]
    optimizer = AdamW(of, lr=0.01, weight_decay=0.5)
    scaled_rates(optimizer, {of[0]: 0.25})
    of[0].grad = torch.zeros_like(of[0])
    optimizer.step()
    assert float(of[0][0, 0].detach()) == pytest.approx(1 - 0.01 * 0.5, rel=1e-15)


def test_warm_up_runs_linearly_from_zero_to_the_full_rate() -> None:
    of = [nn.Parameter(torch.zeros(2, 2, dtype=torch.float64)) for _ in range(2)]
    optimizer = SGD(of, lr=1.0)
    handle = scaled_rates(optimizer, {of[1]: 0.5}, warm_up_steps=4)
    rates = [moved(of, optimizer) for _ in range(6)]
    assert rates == [[f, f / 2] for f in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)]
    handle.remove()
    assert moved(of, optimizer) == [1.0, 1.0]


def test_factors_of_a_warm_up() -> None:
    assert [warm_up_factor(step, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert warm_up_factor(0, 0) == 1.0


class Raising(SGD):
    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("out of memory")


def test_a_step_that_raises_leaves_no_trace() -> None:
    of = parameters()
    optimizer = Raising(two_groups(of), lr=0.01)
    groups, before = optimizer.param_groups, str(optimizer.state_dict())
    scaled_rates(optimizer, dict(zip(of, MULTIPLIERS, strict=True)))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
        assert str(optimizer.state_dict()) == before
        assert optimizer.param_groups is groups
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(SGD(two_groups(parameters()), lr=0.5).state_dict()))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("multipliers", "message"),
    [
        ([0.0, 0.5, -1.0, 1.0], "learning-rate multipliers: expected numbers above 0, got -1.0, 0.0"),
        ([float("nan")] * 4, "expected numbers above 0, got nan"),
        ([float("inf")] * 4, "expected numbers above 0, got inf"),
    ],
)
def test_refused_multipliers(multipliers: list[float], message: str) -> None:
    of = parameters()
    with pytest.raises(GdagrowError, match=message):
        scaled_rates(SGD(of, lr=0.1), dict(zip(of, multipliers, strict=True)))


def test_refused_parameters_and_a_second_scaling() -> None:
    of = parameters()
    optimizer = SGD(of, lr=0.1)
    with pytest.raises(GdagrowError, match=r"4 parameters, the first of shape \[4, 3\], are not in the optimizer"):
        scaled_rates(optimizer, dict(zip(parameters(), MULTIPLIERS, strict=True)))
    scaled_rates(optimizer).remove()
    scaled_rates(optimizer)
    with pytest.raises(GdagrowError, match="scaled already; remove that first"):
        scaled_rates(optimizer)


class Counting(SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1


def test_an_optimizer_that_keeps_figures_in_its_groups_is_refused() -> None:
    of = parameters()
    optimizer = Counting(two_groups(of), lr=0.01)
    scaled_rates(optimizer, dict(zip(of, MULTIPLIERS, strict=True)))
    with pytest.raises(GdagrowError, match="Counting keeps steps in its parameter groups, where scaled rates would"):
        optimizer.step()


def records_of(source: Path, target: Path, **recipe: Any) -> list[Any]:
    grow(source, target, recipe)
    return read_record(target)


def test_multipliers_of_successive_growths_multiply(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", tied=True)
    once = records_of(tmp_path / "source", tmp_path / "once", hidden=2, signal=2)
    twice = records_of(tmp_path / "once", tmp_path / "twice", hidden=3, embeddings="untie")
    names = [name for name, _ in load_model(tmp_path / "once").named_parameters()]
    first = multipliers_of(once, names)
    layer = "model.layers.1."
    assert list(first) == names
    assert (first["model.norm.weight"], first[layer + "mlp.up_proj.weight"]) == (1 / 2, 1 / 2)
    assert (first[layer + "self_attn.o_proj.weight"], first["model.embed_tokens.weight"]) == (1 / 2, 1.0)
    names = [name for name, _ in load_model(tmp_path / "twice").named_parameters()]
    both = multipliers_of(twice, names)
    # The norm still carries the split of the first growth, and the head that of the second.
    assert (both["model.norm.weight"], both["lm_head.weight"]) == (1 / 2, pytest.approx(1 / 3))
    assert both[layer + "mlp.up_proj.weight"] == pytest.approx(1 / 6)
    assert both[layer + "self_attn.o_proj.weight"] == 1 / 2
    wrapped = multipliers_of(twice, [f"module._orig_mod.{name}" for name in names])
    assert list(wrapped.values()) == list(both.values())
    assert multipliers_of([], names) == dict.fromkeys(names, 1.0)


def test_refused_names_and_records(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source")
    records = records_of(tmp_path / "source", tmp_path / "grown", hidden=2)
    with pytest.raises(CheckpointError, match=r"no learning-rate multiplier for value\.weight, x; give the parameters"):
        multipliers_of(records, ["value.weight", "lm_head.weight", "x"])
    for broken in ({}, {"learning_rate_multipliers": [1]}, {"learning_rate_multipliers": {"a": 0}}, []):
        with pytest.raises(CheckpointError, match="expected learning_rate_multipliers, a number above 0"):
            multipliers_of([broken], ["a"])  # type: ignore[list-item]
