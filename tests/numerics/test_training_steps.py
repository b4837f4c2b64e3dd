"""A grown training state goes on as its source would have: k optimizer steps, folded back, are the source's k steps.

Let an element of a grown parameter have `w` copies along the axes that its layer writes and `r` along those that it
reads (the other elements that grew from the same source element). With exact copies its weight is `1/r` of the
source's, and by the mirror rule its gradient is `1/w` of the source's; a moment that averages gradients is grown by
`1/w`, one that averages their squares by `1/w^2` (growth-math 2 and 3.1). From this, what an optimizer must be told so
that every later weight is `1/r` of the source's too, which is what folding (sum over read copies, any one of the equal
written copies) undoes:

| optimizer | update of the source | learning rate | weight decay | eps |
|---|---|---|---|---|
| SGD | `lr b`, `b` an average of `g + decay W` | `w/r` | `r/w` | |
| Adam, AMSGrad | `lr m / (sqrt(v) + eps)`, of `g + decay W` | `1/r` | `r/w` | `1/w` |
| AdamW, AMSGrad | the same of `g`, and `W` shrinks by `lr decay` | `1/r` | `r` | `1/w` |
| Muon | `lr NS(b)`, and `W` shrinks by `lr decay` | `sqrt(w/r)` | `sqrt(r/w)` | |

Decay is multiplied so that the share by which it shrinks a weight stays; without decay, or where nothing is read in
copies, there is nothing to do. Without the multipliers one step moves the folded weight `r/w` (SGD) or `r` (Adam)
times as far. Muon's step depends on the whole matrix: `r` copies of each column and `w` of each row multiply the
singular values of a momentum `M/w` by `sqrt(r w) / w` all alike, so the normalised iteration does the same to them, and
singular vectors are spread over `sqrt(r w)` times as many entries: each copy moves `1/sqrt(r w)` as far, rows in two
copies 0.707. That is so only if all rows have as many copies, and all columns; and torch's Muon multiplies its step by
a function of the shape besides, which growth changes.

The rule for gradients, and so all this, needs copies that serve equal shares; `moments_lost` of the plan names the
parameters for which it does not hold.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD

from gdagrow.engine import grow_moment
from gdagrow.plan import TensorPlan
from gdagrow.record import read_record
from gdagrow.states.moments import POWERS
from gdagrow.train.rates import multipliers_of, scaled_rates
from tests.growths import RANDOM, growths, topologies
from tests.trained_pairs import (
    ADAM,
    ADAM_EPS,
    BIG,
    EPSILON,
    METHODS,
    RATE,
    ROUNDINGS,
    Pair,
    Piecewise,
    copies,
    every,
    gaps,
    gathered,
    grown_pair,
    moved,
    trainable,
    trained_on,
    whole,
)

STEPS = (1, 5, 20)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], str]:
    topology = draw(topologies(dtypes=(torch.float64,)))
    return topology, draw(growths(topology, exact_copies=True)), draw(st.sampled_from(sorted(METHODS)))


def assert_equal_after_steps(
    directory: Path, topology: Mapping[str, Any], recipe: Mapping[str, Any], name: str
) -> Pair:
    pair = grown_pair(directory, topology, recipe, METHODS[name])
    of_source, of_grown = trainable(pair)
    source = whole(pair.source, pair.method, pair.state, of_source)
    grown = Piecewise(pair, pair.grown_state(), of_grown)
    for num, found in enumerate(trained_on(pair, grown, source, max(STEPS)), 1):
        assert num not in STEPS or found.beyond() == set(), (num, found)
    return pair


@settings(RANDOM, max_examples=10)
@given(cases())
def test_any_growth_trains_on_as_its_source(case: tuple[dict[str, Any], dict[str, Any], str]) -> None:
    with TemporaryDirectory() as directory:
        assert_equal_after_steps(Path(directory), *case)


GROWTHS = {
    "signal": {"signal": 3}, "target ratio": {"signal": "3:1"}, "noise": {"signal": 2, "noise": 2},
    "kv": {"signal": 2, "noise": 2, "kv": 2}, "hidden": {"hidden": 3}, "ffn": {"ffn": 2}, "uniform": {"uniform": 2},
}  # fmt: skip


@pytest.mark.parametrize("recipe", GROWTHS.values(), ids=list(GROWTHS))
def test_every_kind_of_growth(tmp_path: Path, recipe: dict[str, Any]) -> None:
    assert assert_equal_after_steps(tmp_path, {**BIG, "tied": True}, recipe, "adamw").lost == set()


@pytest.mark.parametrize("name", METHODS)
def test_every_method(tmp_path: Path, name: str) -> None:
    pair = assert_equal_after_steps(tmp_path, BIG, {"signal": "3:1", "hidden": 2, "ffn": 3}, name)
    assert pair.lost == set()


def test_the_suggested_multipliers_make_adamw_train_on_as_the_source(tmp_path: Path) -> None:
    """In one group with decay, as a user has it; eps, for which there is no multiplier, is left out of the way."""
    topology = {**BIG, "bias": False, "vocab": 11}  # every token is in an early batch, so that no moment stays zero
    pair = grown_pair(tmp_path, topology, {"signal": 2, "hidden": 2, "ffn": 3}, METHODS["adamw"])
    pair = replace(pair, method=replace(pair.method, options={**ADAM, "eps": 0.0}))
    of_source, of_grown = every(pair)
    source = whole(pair.source, pair.method, pair.state, of_source)
    grown = whole(pair.grown, pair.method, pair.grown_state(), of_grown)
    multipliers = multipliers_of(read_record(tmp_path / "grown"), of_grown)
    assert sorted(set(multipliers.values())) == [pytest.approx(m) for m in (1 / 3, 1 / 2, 1)]
    scaled_rates(grown, {pair.grown.get_parameter(name): value for name, value in multipliers.items()})
    *_, found = trained_on(pair, grown, source, max(STEPS))
    # Without eps an error of a gradient is found in the step divided by what the step is divided by.
    smallest = min(float(state["exp_avg_sq"].min()) for state in source.state.values()) ** 0.5
    found = replace(found, tolerance=found.tolerance * (2 / smallest) / pair.method.condition)
    assert found.beyond() == set()
    assert found.tolerance < 1e-3 * RATE


@pytest.mark.parametrize("name", ["sgd momentum decay", "nesterov", "adam", "adamw", "adamw amsgrad"])
def test_without_multipliers_a_step_is_too_long_by_the_stated_factor(tmp_path: Path, name: str) -> None:
    pair = grown_pair(tmp_path, BIG, {"signal": "3:1", "hidden": 2, "ffn": 3}, METHODS[name])
    method = replace(pair.method, options={**pair.method.options, "weight_decay": 0.0})
    source, grown = (whole(model, method, state, {name for name, _ in model.named_parameters()})
                     for model, state in ((pair.source, pair.state), (pair.grown, pair.grown_state())))  # fmt: skip
    of_source, of_grown = moved(pair.source, source), moved(pair.grown, grown)
    largest = max(float(p.grad.abs().max()) for p in pair.source.parameters() if p.grad is not None)
    # A move is the difference of two weights, which are rounded.
    weights = max(float(p.detach().abs().max()) for p in pair.source.parameters())
    tolerance = EPSILON * (ROUNDINGS * RATE * method.condition * largest + 4 * weights)
    for tensor in pair.plan.tensors:
        w, r = copies(tensor.growth, read=False), copies(tensor.growth, read=True)
        of_old = gathered(tensor.growth, of_source[tensor.source.name])
        if isinstance(source, SGD):
            expected = r / w * of_old
        else:
            state = source.state[pair.source.get_parameter(tensor.source.name)]
            first, second = (1 - beta ** float(state["step"]) for beta in ADAM["betas"])
            square = state["max_exp_avg_sq" if "max_exp_avg_sq" in state else "exp_avg_sq"]
            mean, root = (gathered(tensor.growth, of) for of in (state["exp_avg"] / first, (square / second).sqrt()))
            # The written copies see `w` times the eps; but for that it is `r` times the source's step.
            expected = -RATE * r * mean / (root + w * ADAM_EPS)
            assert torch.allclose(expected[w == 1], (r * of_old)[w == 1], rtol=0, atol=tolerance)
        assert float((r * of_grown[tensor.name] - expected).abs().max()) <= r.max() * tolerance, tensor.name
        if r.max() > 1:
            apart = (r * of_grown[tensor.name] - of_old).abs().max()
            assert float(apart) > 1e6 * tolerance, tensor.name


MISTAKES: dict[str, Callable[[Tensor, TensorPlan, int], Tensor]] = {
    "zeros with the old step": lambda moment, tensor, power: torch.zeros(tensor.shape, dtype=moment.dtype),
    "not divided": lambda moment, tensor, power: gathered(tensor.growth, moment),
    "divided once for all moments": lambda moment, tensor, power: grow_moment(tensor.growth, moment, 1),
    "divided along what is read": lambda moment, tensor, power: grow_moment(
        replace(tensor.growth, reads=tuple(not reads for reads in tensor.growth.reads)), moment, power
    ),
}


@pytest.mark.parametrize(
    ("name", "mistake"),
    [("adamw", mistake) for mistake in MISTAKES]
    + [("sgd momentum decay", mistake) for mistake in MISTAKES if mistake != "divided once for all moments"],
)
def test_wrong_moments_are_seen_at_the_first_step(tmp_path: Path, name: str, mistake: str) -> None:
    pair = grown_pair(tmp_path, BIG, {"signal": 2, "hidden": 2, "ffn": 3}, METHODS[name])
    right, wrong, spoilt = pair.grown_state(), pair.grown_state(), set()
    for tensor in pair.plan.tensors:
        for key in POWERS.keys() & pair.state[tensor.source.name].keys():
            moment = MISTAKES[mistake](pair.state[tensor.source.name][key], tensor, POWERS[key])
            wrong[tensor.name][key] = moment
            if not torch.allclose(moment, right[tensor.name][key], rtol=1e-9, atol=1e-12):
                spoilt.add(tensor.name)
    of_source, of_grown = every(pair)
    source = whole(pair.source, pair.method, pair.state, of_source)
    found = next(trained_on(pair, Piecewise(pair, wrong, of_grown), source, 1))
    assert found.beyond() == spoilt
    assert len(spoilt) >= 20
    # A hundredth of a step, which every wrong moment leaves far behind, and far beyond the tolerance.
    assert min(found.weights[tensor] for tensor in spoilt) > 1e-2 * RATE * (1 if name == "adamw" else 1e-2)
    assert 1e3 * found.tolerance < 1e-4 * RATE


def first_updates(pair: Pair, step: float) -> Tensor:
    """How far AdamW of the usual betas and eps, with moments of zero, moves each grown weight, in learning rates."""
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    zeros = {t.name: {**{key: torch.zeros(t.shape, dtype=torch.float64) for key in ("exp_avg", "exp_avg_sq")},
                      "step": torch.tensor(step)} for t in pair.plan.tensors}  # fmt: skip
    optimizer = whole(pair.grown, replace(pair.method, options=options), zeros, every(pair)[1])
    of_grown = moved(pair.grown, optimizer)
    return torch.cat([move.abs().flatten() for move in of_grown.values()]) / RATE


def test_zeroed_moments_with_the_old_step_make_a_first_update_three_times_too_large(tmp_path: Path) -> None:
    pair = grown_pair(tmp_path, {**BIG, "bias": False}, {"signal": 2}, METHODS["adamw"])
    # 0.1 g / sqrt(0.001 g^2), both moments being taken for the means of ten thousand steps.
    too_large = first_updates(pair, 10_000.0)
    assert float(too_large.max()) == pytest.approx(0.1 / sqrt(0.001), rel=1e-3)
    assert float(too_large.median()) == pytest.approx(0.1 / sqrt(0.001), rel=1e-3)
    pair = grown_pair(tmp_path / "again", {**BIG, "bias": False}, {"signal": 2}, METHODS["adamw"])
    # g / sqrt(g^2), and a rounding of weight and move.
    assert 1 - 1e-3 < float(first_updates(pair, 0.0).max()) <= 1 + 1e-9


UNEQUAL = {"groups": 2, "kv_groups": 1, "ratio": 2}


@pytest.mark.parametrize(
    ("recipe", "ends"),
    [
        ({"noise": 2}, {"q_proj.weight", "q_proj.bias"}),
        ({"kv": 2}, {"k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"}),
        ({"embeddings": "untie"}, {"model.embed_tokens.weight", "lm_head.weight"}),
    ],
    ids=["noise x2", "kv x2", "untied"],
)
def test_just_the_moments_that_the_plan_names_are_not_to_be_carried(
    tmp_path: Path, recipe: dict[str, Any], ends: set[str]
) -> None:
    pair = grown_pair(tmp_path, {**BIG, **UNEQUAL, "tied": True}, recipe, METHODS["adamw"])
    assert {end for end in ends for name in pair.lost if name.endswith(end)} == ends
    assert all(any(name.endswith(end) for end in ends) for name in pair.lost)
    of_source, of_grown = every(pair)
    source = whole(pair.source, pair.method, pair.state, of_source)
    found = next(trained_on(pair, Piecewise(pair, pair.grown_state(), of_grown), source, 1))
    assert found.beyond() == pair.lost
    assert min(found.weights[name] for name in pair.lost) > 0.1 * RATE


@pytest.mark.parametrize(("recipe", "lost"), [({"noise": 2}, "q_proj.weight"), ({"kv": 2}, "v_proj.weight")])
def test_under_sgd_copies_with_unequal_shares_part_but_their_mean_does_not(
    tmp_path: Path, recipe: dict[str, Any], lost: str
) -> None:
    pair = grown_pair(tmp_path, {**BIG, **UNEQUAL}, recipe, METHODS["sgd"])
    of_source, of_grown = every(pair)
    source = whole(pair.source, pair.method, pair.state, of_source)
    found = next(trained_on(pair, Piecewise(pair, pair.grown_state(), of_grown), source, 1))
    signed = gaps(pair)
    (tensor,) = (tensor for tensor in pair.plan.tensors if tensor.name == f"model.layers.0.self_attn.{lost}")
    assert tensor.name in pair.lost
    assert float(signed[tensor.name].abs().max()) > 1e3 * found.tolerance
    old = torch.tensor(list(tensor.growth.dims[0]))
    summed = torch.zeros(tensor.source.shape, dtype=torch.float64).index_add(0, old, signed[tensor.name])
    assert float(summed.abs().max()) <= 2 * found.tolerance
