"""Gradients of source and grown model follow the mirror rule, and do not where the plan says that they cannot."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdagrow.engine import grow_moment
from gdagrow.models.gda import load_model
from tests.checkpoints import write_checkpoint
from tests.growths import EPS, RANDOM, Grown, grow, growths, topologies
from tests.reference import reference_logits

# Rounding in float64 (2.2e-16) over the several hundred dependent operations of forward and backward, with the
# cancellation of a gradient that is a difference of attention maps: 4.5e6 times eps.
TOLERANCE = 1e-9
# A gradient that is zero on paper (of a bias that softmax ignores) has only the rounding of the others: 500 times eps.
ROUNDING = 1e-13

Gradients = dict[str, Tensor]


def gradients(directory: Path, judge: str = "model") -> Gradients:
    """The gradients of the cross-entropy of a fixed random text, by name."""
    config = json.loads((directory / "config.json").read_text())
    ids = torch.randint(config["vocab_size"], (2, 6), generator=torch.Generator().manual_seed(4))
    model = load_model(directory, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    logits = model(ids).logits if judge == "model" else reference_logits(parameters, config, ids)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


def deviations(grown: Grown, judge: str = "model") -> dict[str, float]:
    """For each grown tensor, how far its gradient is from the mirror rule, relative to the rule's largest entry."""
    before, after = gradients(grown.source, judge), gradients(grown.target, judge)
    assert after.keys() == {tensor.name for tensor in grown.plan.tensors}
    largest = max(float(gradient.abs().max()) for gradient in before.values())
    found = {}
    for tensor in grown.plan.tensors:
        expected = grow_moment(tensor.growth, before[tensor.source.name], 1)
        assert expected.shape == after[tensor.name].shape, tensor.name
        scale = float(expected.abs().max()) + ROUNDING / TOLERANCE * largest
        found[tensor.name] = float((after[tensor.name] - expected).abs().max()) / scale
    return found


def lost(grown: Grown) -> dict[str, str]:
    return {tensor.name: tensor.moments_lost for tensor in grown.plan.tensors if tensor.moments_lost}


@st.composite
def exact_cases(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    topology = draw(topologies(dtypes=(torch.float64,)))
    return topology, draw(growths(topology, exact_copies=True))


@settings(RANDOM, max_examples=80)
@given(exact_cases(), st.integers(0, 3))
def test_gradients_follow_the_mirror_rule(case: tuple[dict[str, Any], dict[str, Any]], choice: int) -> None:
    topology, recipe = case
    with TemporaryDirectory() as directory:
        write_checkpoint(Path(directory, "source"), **topology)
        grown = grow(Path(directory, "source"), Path(directory, "grown"), recipe)
        wrong = deviations(grown, "reference" if choice == 0 else "model")
    assert {name: error for name, error in wrong.items() if name not in lost(grown) and error > TOLERANCE} == {}


@pytest.mark.parametrize(
    "recipe",
    [
        {"signal": 3}, {"signal": "4:1"}, {"signal": "7:1", "hidden": 3}, {"hidden": 5, "ffn": 3}, {"uniform": 3},
        {"uniform": 2, "embeddings": "keep"}, {"signal": 5, "noise": 5, "kv": 5}, {"signal": 4, "noise": 2},
    ],
    ids=str,
)  # fmt: skip
def test_plans_that_lose_no_moment(tmp_path: Path, recipe: dict[str, Any]) -> None:
    write_checkpoint(
        tmp_path / "source", dtype=torch.float64, tied=True, bias=True, groups=4, kv_groups=2, head_dim=4, hidden=12,
        extra=EPS,
    )  # fmt: skip
    grown = grow(tmp_path / "source", tmp_path / "grown", recipe | {"exact_copies": True})
    assert lost(grown) == {}
    assert max(deviations(grown).values()) < TOLERANCE


@pytest.mark.parametrize(
    ("recipe", "names", "reason"),
    [
        ({"noise": 2}, {"q_proj.weight", "q_proj.bias"}, "copies along group serve unequal shares of what they served"),
        (
            {"kv": 2},
            {"k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"},
            "copies along kv serve unequal shares of what they served",
        ),
        ({"embeddings": "untie"}, {"model.embed_tokens.weight"}, "its tied gradient was that of two parameters"),
        ({"embeddings": "untie"}, {"lm_head.weight"}, "it is new: the source's head was tied to the embedding"),
    ],
    ids=["noise x2", "kv x2", "untied embedding", "untied head"],
)
def test_the_rule_fails_where_the_plan_says_so(
    tmp_path: Path, recipe: dict[str, Any], names: set[str], reason: str
) -> None:
    write_checkpoint(
        tmp_path / "source", dtype=torch.float64, tied=True, bias=True, groups=2, ratio=2, head_dim=4, hidden=12,
        scale=0.6, extra=EPS,
    )  # fmt: skip
    grown = grow(tmp_path / "source", tmp_path / "grown", recipe | {"exact_copies": True})
    named = {name: text for name, text in lost(grown).items() if text == reason}
    assert {name for name in named if not any(name.endswith(end) for end in names)} == set()
    wrong = deviations(grown)
    for end in names:
        # Off by more than a hundredth of the largest entry, where the rule holds to 1e-9 otherwise.
        assert max(wrong[name] for name in named if name.endswith(end)) > 0.01, end
    assert max(error for name, error in wrong.items() if name not in lost(grown)) < TOLERANCE


def test_second_moments_take_the_factor_squared(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", dtype=torch.float64, tied=True, bias=True, extra=EPS)
    grown = grow(tmp_path / "source", tmp_path / "grown", {"uniform": 3, "exact_copies": True})
    before, after = gradients(grown.source), gradients(grown.target)
    assert lost(grown) == {}
    for tensor in grown.plan.tensors:
        expected = grow_moment(tensor.growth, before[tensor.source.name].square(), 2)
        # Twice the relative error of the gradient itself.
        assert float((after[tensor.name].square() - expected).abs().max()) <= 2 * TOLERANCE * float(expected.max())


def clones_of_one_signal_head(grown: Grown, head: int) -> list[slice]:
    """The rows of q_proj of every copy of one signal head of group 0."""
    sizes, lineage = grown.plan.after, grown.plan.heads.lineage()
    at = [g * (sizes.heads.ratio + 1) + slot
          for g, slots in enumerate(lineage) for slot, old in enumerate(slots) if old == [0, head]]  # fmt: skip
    return [slice(i * sizes.head_dim, (i + 1) * sizes.head_dim) for i in at]


def test_exact_copies_have_identical_gradients_and_noise_parts_them_at_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", dtype=torch.float64, groups=1, ratio=3, layers=1, scale=0.6, extra=EPS)
    exact = grow(tmp_path / "source", tmp_path / "exact", {"signal": "4:1", "exact_copies": True})
    noisy = grow(tmp_path / "source", tmp_path / "noisy", {"signal": "4:1", "snr_db": 40.0})
    name = "model.layers.0.self_attn.q_proj.weight"
    first, second = clones_of_one_signal_head(exact, 0)
    assert (first.start, second.start) == (0, 3 * 8)
    same, parted = gradients(exact.target)[name], gradients(noisy.target)[name]
    assert torch.equal(same[first], same[second])
    assert torch.equal(noisy.after[name][first], noisy.after[name][second]), "noise is for read axes only"
    # Parts of o_proj are 1% apart from equal shares, the one up and the other down: gradients differ by some 2%; a
    # tenth of that would part copies too.
    difference = (parted[first] - parted[second]).norm() / parted[first].norm()
    assert 0.002 < float(difference) < 0.1


@pytest.mark.parametrize(
    ("recipe", "name", "dim"),
    [
        ({"ffn": 2}, "model.layers.0.mlp.gate_proj.weight", 0),
        ({"hidden": 2}, "model.layers.0.mlp.down_proj.weight", 0),
        ({"signal": 2, "noise": 2, "kv": 2}, "model.layers.0.self_attn.k_proj.weight", 0),
    ],
    ids=["ffn", "hidden", "kv"],
)
def test_noise_parts_the_copies_of_every_axis(tmp_path: Path, recipe: dict[str, Any], name: str, dim: int) -> None:
    write_checkpoint(tmp_path / "source", dtype=torch.float64, layers=2, scale=0.6, extra=EPS)
    grown = grow(tmp_path / "source", tmp_path / "grown", recipe | {"snr_db": 40.0})
    gradient = gradients(grown.target)[name]
    one, other = gradient.chunk(2, dim)
    # The readers of the copies are 1% up and down from equal shares.
    assert float((one - other).norm() / one.norm()) > 0.002
