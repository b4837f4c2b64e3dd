"""Random topologies under random compositions of all growths: the same function, by two models and the certificate."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor

import gdagrow.views.deeper
from gdagrow.models.gda import load_model
from gdagrow.verify.logits import compare
from gdagrow.verify.tokens import random_tokens
from gdagrow.verify.weights import check_weights
from gdagrow.views import Derived, Seen
from tests.checkpoints import write_checkpoint
from tests.growths import EPS, RANDOM, Grown, compositions, grow
from tests.reference import reference_logits

# Rounding in float64 (2.2e-16) over a few hundred dependent operations in up to seven layers, amplified by norms of
# small activations: 45000 times eps.
TOLERANCE = 1e-11


def agree(got: Tensor, expected: Tensor) -> bool:
    return float((got - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def logits_of(directory: Path, ids: Tensor) -> tuple[Tensor, Tensor]:
    """By our own model and by the one that is written as loops."""
    config = json.loads((directory / "config.json").read_text())
    with torch.no_grad():
        loops = reference_logits(load_file(directory / "model.safetensors"), config, ids)
        return load_model(directory, dtype=torch.float64)(ids).logits, loops


def require_same_function(grown: Grown) -> None:
    ids = random_tokens(grown.plan.before.vocab, seqs=1, length=4, seed=7)
    before, after = logits_of(grown.source, ids), logits_of(grown.target, ids)
    assert bool(before[1].isfinite().all())
    assert agree(after[0], before[0])
    assert agree(after[1], before[1])


@settings(RANDOM, max_examples=200)
@given(compositions())
def test_any_composition_preserves_the_function(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    topology, recipe = case
    with TemporaryDirectory() as directory:
        source = Path(directory, "source")
        write_checkpoint(source, **topology)
        grown = grow(source, Path(directory, "grown"), recipe)
        event("deeper" if grown.plan.layers.new else "as deep")
        event("fresh features" if grown.plan.maps.common.of("hidden", None).num_fresh else "whole copies of features")
        require_same_function(grown)
        certificate = check_weights(source, grown.target)
        assert certificate.equivalent, certificate
        assert certificate.num_tensors == len(grown.after)


@settings(RANDOM, max_examples=25)
@given(compositions())
def test_layer_by_layer(case: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Every part of every old layer is the source's, new blocks add nothing, and all residual streams agree."""
    topology, recipe = case
    with TemporaryDirectory() as directory:
        write_checkpoint(Path(directory, "source"), **topology)
        grown = grow(Path(directory, "source"), Path(directory, "grown"), recipe)
        ids = random_tokens(topology["vocab"], seqs=1, length=5, seed=1)
        found = compare(grown.source, grown.target, ids)
        assert found.equivalent
        assert found.first_difference is None, found.first_difference
        layers = grown.plan.layers
        assert {part.layer for part in found.parts} == {None, *range(len(layers.source))}
        for part in found.parts:
            if part.layer in layers.new and part.part in ("attention", "mlp"):
                assert part.max_abs == 0


def without_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Move layers as they are."""

    def copied(header: Any, architecture: Any, old: int, new: int) -> dict[str, Derived]:
        names = [architecture.subln, *(architecture.lambdas.format(layer="{layer}", name=f"lambda_{v}")
                                       for v in ("q2", "k2"))]  # fmt: skip
        return {name.format(layer=new): Seen(name.format(layer=old)) for name in names}

    monkeypatch.setattr(gdagrow.views.deeper, "_moved_layer", copied)


def apart(grown: Grown) -> float:
    ids = random_tokens(grown.plan.before.vocab, seqs=2, length=8, seed=3)
    before, after = logits_of(grown.source, ids)[1], logits_of(grown.target, ids)[1]
    return float((after - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("vectors", ["random", "zero", "one of them zero"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_error_that_the_repair_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, vectors: str
) -> None:
    """New blocks at the bottom move every layer: lambda_init of layer 0 goes from -0.01 to 0.36 (growth-math 3.8)."""
    write_checkpoint(tmp_path / "source", dtype=dtype, lambda_dtype=torch.float32, layers=3, extra=EPS)
    if vectors != "random":
        tensors = load_file(tmp_path / "source" / "model.safetensors")
        for name, tensor in tensors.items():
            if "lambda_" in name and (vectors == "zero" or name.endswith("k2")):
                tensor.zero_()
        save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    recipe = {"depth": 2, "insert": "bottom"}
    repaired = grow(tmp_path / "source", tmp_path / "repaired", recipe)
    assert {name for name, tensor in repaired.after.items() if tensor.dtype == torch.float64} == {
        f"model.layers.{layer}.self_attn.{name}"
        for layer in (2, 3, 4)
        for name in ("lambda_q2", "lambda_k2", "subln.weight")
    }
    assert apart(repaired) < 1e-14
    assert check_weights(tmp_path / "source", tmp_path / "repaired").equivalent
    without_repair(monkeypatch)
    moved = grow(tmp_path / "source", tmp_path / "moved", recipe)
    assert apart(moved) > 0.1, "another function"
    monkeypatch.undo()
    certificate = check_weights(tmp_path / "source", tmp_path / "moved")
    assert not certificate.equivalent
    assert {difference.name for difference in certificate.differences} == {
        name for name, tensor in repaired.after.items() if tensor.dtype == torch.float64
    }


def test_a_repair_rounded_to_the_stored_dtype_is_what_float64_saves(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", layers=3, extra=EPS)
    grown = grow(tmp_path / "source", tmp_path / "grown", {"depth": 2, "insert": "bottom"})
    assert apart(grown) < 1e-14
    rounded = {name: tensor.bfloat16() for name, tensor in grown.after.items()}
    save_file(rounded, tmp_path / "grown" / "model.safetensors", metadata={"format": "pt"})
    # Up to 2^-9 of each of three small tensors in three layers.
    assert 1e-5 < apart(grown) < 0.05
