"""`compare_gradients`: the chain rule holds for right growths and no wrong one, and lost moments are as planned."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gdagrow.engine import grow_moment
from gdagrow.errors import CompareError
from gdagrow.models.gda import load_model
from gdagrow.verify.gradients import GradientComparison, compare_gradients
from gdagrow.verify.mirror import UNEQUAL_PARTS
from gdagrow.verify.tokens import random_tokens
from gdagrow.views.deeper import MOVED, NEW_BLOCK
from tests.checkpoints import write_checkpoint
from tests.growths import EPS, RANDOM, Grown, compositions, grow, growths, topologies

TOKENS = random_tokens(61, seqs=2, length=12, seed=0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    topology = draw(topologies(dtypes=(torch.float64, torch.bfloat16)))
    return topology, draw(growths(topology))


def lost(found: GradientComparison) -> dict[str, str]:
    return {tensor.name: tensor.lost for tensor in found.tensors if tensor.lost}


@settings(RANDOM, max_examples=50)
@given(cases())
def test_every_right_growth_holds_and_loses_what_its_plan_says(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    topology, recipe = case
    directory = tmp_path_factory.mktemp("pair")
    write_checkpoint(directory / "source", **topology)
    require_what_is_planned(grow(directory / "source", directory / "grown", recipe))


def require_what_is_planned(grown: Grown) -> GradientComparison:
    tokens = random_tokens(grown.plan.before.vocab, seqs=2, length=6, seed=3)
    found = compare_gradients(grown.source, grown.target, tokens)
    assert {tensor.name for tensor in found.tensors} == {tensor.name for tensor in grown.plan.tensors}
    assert {t.name: (t.chain, t.tolerance) for t in found.tensors if not t.agrees} == {}
    assert found.equivalent
    planned = {tensor.name: tensor.moments_lost for tensor in grown.plan.tensors if tensor.moments_lost}
    assert {name: reason for name, reason in lost(found).items() if reason != UNEQUAL_PARTS} == planned
    return found


def is_silent(name: str) -> bool:
    """Whether a tensor of a new block has no gradient, as all that it makes goes through one that is zero."""
    return not name.endswith(("o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias"))


@settings(RANDOM, max_examples=25)
@given(compositions(dtypes=(torch.float64, torch.bfloat16)))
def test_every_composition_holds_and_loses_what_its_plan_says(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """With depth and fresh features too; and silent tensors of new blocks have no gradient at all, not a small one."""
    topology, recipe = case
    directory = tmp_path_factory.mktemp("pair")
    write_checkpoint(directory / "source", **topology)
    grown = grow(directory / "source", directory / "grown", recipe)
    found = {tensor.name: tensor for tensor in require_what_is_planned(grown).tensors}
    gradients = gradients_of(grown.target, random_tokens(topology["vocab"], seqs=2, length=6, seed=3))
    for layer in grown.plan.layers.new:
        of_layer = [name for name in gradients if name.startswith(f"model.layers.{layer}.")]
        for name in of_layer:
            assert (float(gradients[name].abs().max()) == 0) is is_silent(name), name
            assert found[name].lost == NEW_BLOCK
            if is_silent(name):
                assert (found[name].chain, found[name].tolerance) == (0, 0)


def gradients_of(directory: Path, tokens: Tensor) -> dict[str, Tensor]:
    """Of the whole model in memory, by torch."""
    model = load_model(directory, dtype=torch.float64)
    loss = model(tokens, tokens).loss
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(
        tmp_path / "source", dtype=torch.float32, tied=True, bias=True, groups=2, ratio=2, head_dim=4, hidden=12,
        scale=0.6, extra=EPS,
    )  # fmt: skip
    return tmp_path / "source"


@pytest.mark.parametrize("recipe", [{"uniform": 2}, {"signal": 4, "noise": 2}, {"hidden": 2, "ffn": 4}], ids=str)
def test_moments_of_exact_copies_by_powers_of_two_can_all_be_carried(source: Path, recipe: dict[str, Any]) -> None:
    grow(source, source.parent / "grown", recipe | {"exact_copies": True})
    found = compare_gradients(source, source.parent / "grown", TOKENS)
    assert found.equivalent
    assert lost(found) == {}
    assert max(tensor.mirror / tensor.tolerance for tensor in found.tensors) < 0.5


@pytest.mark.parametrize("recipe", [{"depth": 2, "insert": "bottom"}, {"hidden_to": 30}, {"ffn_to": 60},
                                    {"depth": 1, "hidden_to": 56, "ffn_to": 110, "signal": 2}], ids=str)  # fmt: skip
def test_what_moved_or_stands_beside_fresh_features_can_be_carried(tmp_path: Path, recipe: dict[str, Any]) -> None:
    """But for new blocks, and the two vectors that take up a change of lambda_init: all by the mirror rule."""
    write_checkpoint(tmp_path / "source", dtype=torch.float32, activation="silu", hidden=12, scale=0.6, extra=EPS)
    grown = grow(tmp_path / "source", tmp_path / "grown", recipe | {"exact_copies": True})
    found = compare_gradients(tmp_path / "source", tmp_path / "grown", TOKENS)
    assert found.equivalent
    layers = grown.plan.layers
    assert lost(found) == {
        name: NEW_BLOCK if layer in layers.new else MOVED
        for name in grown.after
        if ".layers." in name and (layer := int(name.split(".")[2])) in layers.new | layers.moved
        and (layer in layers.new or name.endswith(("lambda_q2", "lambda_k2")))
    }  # fmt: skip
    assert max(t.mirror / t.tolerance for t in found.tensors if not t.lost) < 0.5


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.bfloat16, 1e-3, 2**-6), (torch.float32, 1e-8, 1e-6)])
def test_thirds_are_equal_up_to_the_grid_of_their_dtype(
    tmp_path: Path, dtype: torch.dtype, least: float, most: float
) -> None:
    # In bf16 a third is off by up to 2/3 of half a unit in the last place of its weight, which is 2^-7 of the third;
    # what sums such weights with signs is off by more where they cancel: twice that is allowed.
    write_checkpoint(tmp_path / "source", dtype=dtype, scale=0.6, extra=EPS)
    grow(tmp_path / "source", tmp_path / "grown", {"ffn": 3, "exact_copies": True})
    found = compare_gradients(tmp_path / "source", tmp_path / "grown", TOKENS)
    assert found.equivalent
    names = {name.split(".", 3)[-1]: reason for name, reason in lost(found).items()}
    assert names == {f"mlp.{part}_proj.weight": UNEQUAL_PARTS for part in ("gate", "up")}
    assert least < max(tensor.mirror for tensor in found.tensors) < most


def test_noise_is_told_by_its_size(source: Path) -> None:
    for snr_db, size in ((40.0, 0.01), (60.0, 0.001)):
        target = source.parent / f"noise-{size}"
        grow(source, target, {"hidden": 2, "snr_db": snr_db})
        found = compare_gradients(source, target, TOKENS)
        assert found.equivalent
        assert set(lost(found).values()) == {UNEQUAL_PARTS}
        # Uniform noise reaches sqrt(3) of its amplitude; an o_proj that reads nothing with copies stays exact.
        assert size / 3 < max(tensor.mirror for tensor in found.tensors) < 3 * size
        assert "model.layers.0.mlp.down_proj.bias" in lost(found)
        assert "model.layers.0.mlp.gate_proj.weight" not in lost(found)


def test_the_mirror_figure_is_the_distance_from_the_moment_that_would_be_carried(source: Path) -> None:
    grown = grow(source, source.parent / "grown", {"ffn": 2, "snr_db": 20.0})
    found = {tensor.name: tensor for tensor in compare_gradients(source, source.parent / "grown", TOKENS).tensors}
    gradients = [gradients_of(directory, TOKENS) for directory in (source, source.parent / "grown")]
    for tensor in grown.plan.tensors:
        expected = grow_moment(tensor.growth, gradients[0][tensor.source.name], 1)
        mirror = float((gradients[1][tensor.name] - expected).abs().max() / expected.abs().max())
        told = found[tensor.name]
        assert abs(told.mirror - mirror) <= told.tolerance + 1e-9 * mirror
        assert (told.lost is not None) == (".mlp.gate_" in tensor.name or ".mlp.up_" in tensor.name)


def edit(directory: Path, name: str, factor: float) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name] *= factor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight",
                                  "model.layers.0.self_attn.lambda_q2"])  # fmt: skip
def test_a_wrong_growth_is_caught(source: Path, name: str) -> None:
    grow(source, source.parent / "grown", {"uniform": 2})
    edit(source.parent / "grown", name, 1.001)
    found = compare_gradients(source, source.parent / "grown", TOKENS)
    assert not found.equivalent
    assert any(not tensor.agrees and tensor.name == name for tensor in found.tensors)


def test_a_broken_grown_model_is_different_and_its_figures_are_json(source: Path) -> None:
    grow(source, source.parent / "grown", {"uniform": 2})
    edit(source.parent / "grown", "model.norm.weight", float("nan"))
    found = compare_gradients(source, source.parent / "grown", TOKENS)
    assert not found.equivalent
    assert found.as_dict()["tensors"][0]["chain"] is None
    json.dumps(found.as_dict(), allow_nan=False)
    edit(source, "model.norm.weight", float("nan"))
    with pytest.raises(CompareError, match="the model's own loss is not finite"):
        compare_gradients(source, source.parent / "grown", TOKENS)


def test_what_cannot_be_compared(source: Path, tmp_path: Path) -> None:
    grow(source, tmp_path / "grown", {"uniform": 2})
    with pytest.raises(CompareError, match="expected sequences of at least 2 tokens, got 1"):
        compare_gradients(source, tmp_path / "grown", TOKENS[:, :1])
    write_checkpoint(tmp_path / "deep", head_dim=4, layers=3)
    with pytest.raises(CompareError, match=r"gradients cannot be held.* no whole factors lead from .*layers 2 to 3"):
        compare_gradients(source, tmp_path / "deep", TOKENS)
    write_checkpoint(tmp_path / "vocab", vocab=62)
    with pytest.raises(CompareError, match=r"vocabulary of 61 tokens and .* one of 62"):
        compare_gradients(source, tmp_path / "vocab", TOKENS)
    tensors = load_file(tmp_path / "grown" / "model.safetensors")
    for layer in (0, 1):
        del tensors[f"model.layers.{layer}.mlp.up_proj.bias"]
    save_file(tensors, tmp_path / "grown" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompareError, match=r"layers\.0\.mlp\.up_proj\.bias, .*in one of the two models only"):
        compare_gradients(source, tmp_path / "grown", TOKENS)
