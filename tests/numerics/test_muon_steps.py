"""Muon after growth: its step depends on whole matrices, by their singular values (see test_training_steps.py)."""

from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trained_pairs import BIG, MUON, Method, Pair, State, copies, gathered, grown_pair, moved, whole

pytestmark = pytest.mark.skipif(MUON is None, reason="this torch has no Muon")

# Fifteen products of matrices in a step of Newton and Schulz's iteration, each rounded to bfloat16.
NEWTON_SCHULZ = 15 * torch.finfo(torch.bfloat16).eps / 2


def adjusted(shape: tuple[int, ...]) -> float:
    """What torch's Muon multiplies a step by, of its own accord ("original")."""
    return sqrt(max(1, shape[0] / shape[1]))


def muon(**options: Any) -> Method:
    options = {"weight_decay": 0.0, **options}
    return Method(MUON, options, lambda w, r: sqrt(w / r), lambda w, r: sqrt(r / w), 1.0)


def muon_steps(pair: Pair, state: State) -> dict[str, tuple[Tensor, Tensor, float]]:
    """By matrix: how far a step moves it, how far the source's step is (gathered), and the factor expected between."""
    matrices = {tensor.name for tensor in pair.plan.tensors if len(tensor.shape) == 2}
    of_source = moved(pair.source, whole(pair.source, pair.method, pair.state, matrices))
    of_grown = moved(pair.grown, whole(pair.grown, pair.method, state, matrices))
    found = {}
    for tensor in pair.plan.tensors:
        if tensor.name in matrices:
            (w,), (r,) = (copies(tensor.growth, read=read).unique().tolist() for read in (False, True))
            factor = adjusted(tensor.shape) / adjusted(tensor.source.shape) / sqrt(w * r)
            found[tensor.name] = of_grown[tensor.name], gathered(tensor.growth, of_source[tensor.name]), factor
    return found


def test_muon_steps_by_the_singular_values(tmp_path: Path) -> None:
    # As many copies of every row, and of every column, of each matrix.
    pair = grown_pair(tmp_path, BIG, {"signal": 2, "noise": 2, "kv": 2, "hidden": 2, "ffn": 4}, muon())
    found = muon_steps(pair, pair.grown_state())
    assert len(found) == 2 + 2 * 7
    for name, (step, old, factor) in found.items():
        assert float((step - factor * old).norm()) <= NEWTON_SCHULZ * float((factor * old).norm()), name


def test_under_muon_rows_in_two_copies_move_0707_as_far(tmp_path: Path) -> None:
    # No wider than high before and after, so that the shape's own factor stays 1.
    pair = grown_pair(tmp_path, {**BIG, "ffn": 5}, {"ffn": 2}, muon())
    step, old, factor = muon_steps(pair, pair.grown_state())["model.layers.0.mlp.gate_proj.weight"]
    assert factor == pytest.approx(0.7071, rel=1e-4)
    assert float(step.norm(dim=1).mean() / old.norm(dim=1).mean()) == pytest.approx(0.7071, rel=NEWTON_SCHULZ)


def test_a_momentum_buffer_that_is_not_divided_turns_the_step_of_muon(tmp_path: Path) -> None:
    pair = grown_pair(tmp_path, BIG, {"hidden": 4, "ffn": 4}, muon(momentum=0.5))
    state = pair.grown_state()
    for tensor in pair.plan.tensors:
        for key, moment in pair.state[tensor.source.name].items():
            state[tensor.name][key] = gathered(tensor.growth, moment)
    written = {t.name for t in pair.plan.tensors if copies(t.growth, read=False).max() > 1}
    for name, (step, old, factor) in muon_steps(pair, state).items():
        assert (float((step - factor * old).norm()) > NEWTON_SCHULZ * float((factor * old).norm())) == (name in written)
