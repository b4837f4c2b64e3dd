"""Health figures against the weights on disk and loops by hand; each signature of failure, and none without it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from math import exp, nan, sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import nn

from gdagrow.archs import Parameter, Sizes
from gdagrow.axes import AxisMaps, IndexMap
from gdagrow.depth import Layers
from gdagrow.errors import CheckpointError
from gdagrow.growth import GrowthMaps
from gdagrow.heads import Heads
from gdagrow.models.gda import GdaModel, load_model, save_model
from gdagrow.train.copies import CopyFigures, CopyMeter
from gdagrow.train.health import HealthFigures, HealthMeter, LossFigures, loss_figures, warnings
from gdagrow.verify.ancestry import Ancestry
from gdagrow.verify.clones import clone_similarity
from tests.checkpoints import write_checkpoint
from tests.diffllama import TOPOLOGIES, diffllama
from tests.growths import grow

SMALL = {"groups": 2, "kv_groups": 1, "ratio": 2, "head_dim": 4, "hidden": 12, "ffn": 16, "vocab": 23,
         "dtype": torch.float32}  # fmt: skip
# Sums of up to 2**12 products in float64, and a few roundings besides.
TOLERANCE = 2**13 * torch.finfo(torch.float64).eps


def grown(directory: Path, **recipe: Any) -> tuple[GdaModel, HealthMeter, dict[str, Any]]:
    write_checkpoint(directory / "source", **SMALL)
    grow(directory / "source", directory / "grown", recipe)
    config = json.loads((directory / "grown" / "config.json").read_text())
    return load_model(directory / "grown"), HealthMeter(config, directory / "grown" / "growth.json"), config


def train(model: GdaModel, num_steps: int, rate: float = 1e-2) -> None:
    """Some steps, and one more backward pass."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for seed in range(num_steps + 1):
        ids = torch.randint(model.config.vocab_size, (4, 8), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        loss = model(ids, ids).loss
        assert loss is not None
        loss.backward()
        if seed < num_steps:
            optimizer.step()


@pytest.mark.parametrize(
    "recipe",
    # By norm other heads are cloned in one layer than in the other.
    [{"signal": 2}, {"signal": "3:1"}, {"signal": "3:1", "select": "norm"}, {"signal": 2, "noise": 2, "kv": 2},
     {"hidden": 3, "ffn": 2}],
    ids=str,
)  # fmt: skip
def test_copies_are_those_that_stats_finds_on_disk(tmp_path: Path, recipe: dict[str, Any]) -> None:
    model, meter, config = grown(tmp_path, **recipe)
    train(model, 5)
    save_model(model, tmp_path / "trained", config)
    on_disk = clone_similarity(tmp_path / "trained", lineage=tmp_path / "grown")
    assert on_disk is not None
    expected = {
        (c.layer, c.parameter, c.axis, c.written): (c.cosine, c.relative_distance)
        for c in on_disk.tensors
        if c.parameter.endswith("proj.weight") or c.parameter in ("model.embed_tokens.weight", "lm_head.weight")
    }
    found = meter.measure(model, step=5, since_growth=5)
    # All of these matrices fit into the samples.
    assert {(c.layer, c.parameter, c.axis, c.written) for c in found.copies} == set(expected)
    for c in found.copies:
        cosine, distance = expected[c.layer, c.parameter, c.axis, c.written]
        assert c.cosine == pytest.approx(cosine, abs=TOLERANCE), c
        assert c.relative_distance == pytest.approx(distance, abs=TOLERANCE), c
        assert 0 < c.relative_distance < 1


def test_a_sample_of_a_large_matrix_is_spread_over_it() -> None:
    before = Sizes(Heads(1, 1, 1), 2, 700, 1000, 10, 1)
    maps = GrowthMaps((AxisMaps({"ffn": IndexMap.tile(1000, 2), "hidden": IndexMap.identity(700)}),) * 5)
    ancestry = Ancestry(before, maps, Layers.unchanged(5), 1, repairs=False)
    meter = CopyMeter({"up": Parameter("up", "ffn <- hidden", "mlp")}, ancestry)
    one, apart = torch.randn(2, 1000, 700, generator=torch.Generator().manual_seed(0))
    (found,) = meter.measure("up", 4, torch.cat([one, one + 0.1 * apart]))
    assert (found.layer, found.axis, found.written) == (4, "ffn", True)
    # Every 63rd row and every third column: 16 x 234 weights, whose spread is 1/sqrt(2 x 3744) of the figure.
    assert found.relative_distance == pytest.approx(0.1, rel=5 / sqrt(2 * 3744))
    last = torch.zeros(1000, 700)
    last[945:, 699] = 1.0
    (found,) = meter.measure("up", 4, torch.cat([one, one + last]))
    assert found.relative_distance > 0


def test_lambdas_and_gradients_of_the_noise_path(tmp_path: Path) -> None:
    model, meter, _ = grown(tmp_path, signal=2, noise=2, kv=2)
    train(model, 0)
    found = meter.measure(model, step=0)
    dim, heads_of_group, kv = 4, 3, 2
    for layer in range(2):
        own = model.model.layers[layer].self_attn
        q1, k1, q2, k2 = (getattr(own, f"lambda_{name}").detach().double() for name in ("q1", "k1", "q2", "k2"))
        expected = exp(float(q1 @ k1)) - exp(float(q2 @ k2)) + 0.8 - 0.6 * exp(-0.3 * (layer - 1))
        assert found.lambdas[layer] == pytest.approx(expected, rel=1e-12)
        # The last head of a group is noise; of a KV group the second key is.
        queries = own.q_proj.weight.grad.double().view(4, heads_of_group, dim, -1)
        keys = own.k_proj.weight.grad.double().view(kv, 2, dim, -1)
        for shares, noise, signal in (
            (found.noise_queries, queries[:, 2], queries[:, :2]),
            (found.noise_keys, keys[:, 1], keys[:, 0]),
        ):
            expected = sqrt(float(noise.square().mean() / signal.square().mean()))
            assert shares[layer] == pytest.approx(expected, rel=1e-9)
    model.zero_grad()
    assert meter.measure(model, step=0).noise_queries == {}


def test_diffllama_is_measured_in_its_own_layout() -> None:
    model = diffllama(TOPOLOGIES[1], seed=3)
    ids = torch.arange(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    found = HealthMeter(model.config.to_dict()).measure(model, step=0)
    assert found.copies == ()
    for layer, own in enumerate(layer.self_attn for layer in model.model.layers):
        expected = (own.lambda_q1 @ own.lambda_k1).exp() - (own.lambda_q2 @ own.lambda_k2).exp() + own.lambda_init
        assert found.lambdas[layer] == pytest.approx(expected.item(), rel=1e-12)
        for shares, weight in ((found.noise_queries, own.q_proj.weight), (found.noise_keys, own.k_proj.weight)):
            signal, noise = weight.grad.chunk(2)
            assert shares[layer] == pytest.approx(float(noise.norm() / signal.norm()), rel=1e-9)


def test_wrapped_models_strangers_and_weights_that_are_not_finite(tmp_path: Path) -> None:
    model, meter, _ = grown(tmp_path, signal=2)
    train(model, 3)
    expected = meter.measure(model, step=3)
    wrapper = nn.Module()
    wrapper.module, wrapper.value_head = model, nn.Linear(3, 3)
    assert meter.measure(wrapper, step=3) == expected
    assert json.loads(json.dumps(expected.as_dict()))["copies"][0]["axis"] == "signal"
    model.get_parameter("model.layers.0.self_attn.q_proj.weight").data[0, 0] = nan
    less = {(c.layer, c.parameter) for c in expected.copies} - {
        (c.layer, c.parameter) for c in meter.measure(model, step=3).copies
    }
    assert less == {(0, "model.layers.{layer}.self_attn.q_proj.weight")}


def test_a_record_of_another_model_is_refused(tmp_path: Path) -> None:
    _, _, config = grown(tmp_path, signal=2)
    with pytest.raises(CheckpointError, match="it is not the lineage of a model with"):
        HealthMeter({**config, "hidden_size": 48}, tmp_path / "grown" / "growth.json")


LOSSES = [(step, 2.0 + 0.1 * (-1) ** step) for step in range(60)]


def test_losses_are_held_against_the_last_ones_before() -> None:
    assert loss_figures([]) is None
    assert loss_figures(LOSSES[:10]) is None
    found = loss_figures([*LOSSES, (60, 5.0)])
    assert found is not None
    assert (found.loss, found.mean) == (5.0, pytest.approx(2.0))
    assert found.deviation == pytest.approx(0.1 * sqrt(50 / 49))
    later = [*LOSSES, *((60 + i, 3.0) for i in range(40)), (100, 2.0)]
    since = loss_figures(later, grown_at=59)
    assert since is not None
    assert since.mean == pytest.approx(2.0)
    flat = loss_figures(later)
    assert flat is not None
    assert flat.mean == pytest.approx(fmean(loss for _, loss in later[-51:-1]))
    # Losses that are not finite tell nothing of what to expect.
    broken = loss_figures([*LOSSES, (60, nan), (61, 2.0)])
    assert broken is not None
    assert broken.mean == pytest.approx(2.0, abs=0.01)


WELL = HealthFigures(
    step=300, since_growth=200, copies=(), lambdas={0: 0.3, 1: -0.5}, noise_queries={0: 0.7, 1: 0.02},
    noise_keys={0: 0.1, 1: 0.4}, loss=LossFigures(2.3, 2.0, 0.1),
)  # fmt: skip


def copies_of(distance: float, cosine: float, *, written: bool = True, layer: int = 0) -> CopyFigures:
    row = "model.layers.{layer}.self_attn." + ("q_proj.weight" if written else "o_proj.weight")
    return CopyFigures(layer, row, "signal", written, cosine, distance)


SIGNATURES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "well": ({}, []),
    "same": (
        {"copies": (copies_of(0.0, 1.0), copies_of(0.0, 1.0, written=False, layer=1))},
        ["copies along signal are bit for bit the same 200 steps after the growth (q_proj, o_proj of layers 0, 1): "
         "exact copies see identical gradients and never part; grow again with noise (without exact copies)"],
    ),
    "same, but too early to tell": ({"since_growth": 19, "copies": (copies_of(0.0, 1.0),)}, []),
    "stuck": (
        {"copies": (copies_of(1e-3, 0.99999),)},
        ["copies along signal do not part any further 200 steps after the growth (q_proj of layer 0, cosine above "
         "0.9999): raise the learning rate, or grow again with more noise (a smaller snr_db)"],
    ),
    "parting": ({"copies": (copies_of(1.1e-3, 0.99999),)}, []),
    "parted": ({"copies": (copies_of(0.9e-3, 0.99),)}, []),
    "parts of a split": ({"copies": (copies_of(0.9e-3, 0.99999, written=False),)}, []),
    "lambda": (
        {"lambdas": {0: 0.3, 1: -2.5}},
        ["lambda is running away: -2.50 in layer 1 (from -0.50); expected within 2 of 0 and 1 of where it was; lower "
         "the learning rate of the lambdas, and leave them out of weight decay"],
    ),
    "lambda drifts": ({"lambdas": {0: 1.4, 1: -0.5}}, ["lambda is running away: 1.40 in layer 0 (from 0.30)"]),
    "lambda nan": ({"lambdas": {0: nan}}, ["lambda is running away: nan in layer 0 (from 0.30)"]),
    "noise queries": (
        {"noise_queries": {0: 0.0, 1: 0.5, 3: 1e-4}},
        ["the noise queries of layers 0, 3 have gradients below 0.001 of the signal queries': the noise path does not "
         "learn; see whether lambda is near 0 there, or the noise heads are cut off from the loss"],
    ),
    "noise keys": ({"noise_keys": {1: 0.0}}, ["the noise keys of layer 1 have gradients below 0.001 of"]),
    "spike": (
        {"since_growth": 5, "loss": LossFigures(2.31, 2.0, 0.1)},
        ["the loss spiked 5 steps after the growth: 2.310 at step 300, where it was 2.000 on average with a deviation "
         "of 0.100; lower the learning rate, or warm it up again after the growth"],
    ),
    "spike within the share": ({"since_growth": 5, "loss": LossFigures(2.09, 2.0, 0.01)}, ["the loss spiked 5 steps"]),
    "no spike": ({"since_growth": 5, "loss": LossFigures(2.09, 2.0, 0.02)}, []),
    "no spike for its deviations": ({"since_growth": 5, "loss": LossFigures(2.29, 2.0, 0.1)}, []),
    "spike without a growth": (
        {"since_growth": None, "loss": LossFigures(2.51, 2.0, 0.1)}, ["the loss spiked: 2.510 at step 300"],
    ),
    "nan": ({"loss": LossFigures(nan, 2.0, 0.1)}, ["the loss spiked: nan at step 300"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_of_failure(name: str) -> None:
    changes, expected = SIGNATURES[name]
    history = [replace(WELL, step=step, copies=(copies_of(1e-3, 0.99999),)) for step in (150, 200, 250)]
    assert_starts(warnings(replace(WELL, **changes), history), expected)


def assert_starts(found: Sequence[str], expected: Sequence[str]) -> None:
    assert len(found) == len(expected), found
    for sentence, start in zip(found, expected, strict=True):
        assert sentence.startswith(start), sentence


def test_exact_copies_are_told_in_training_and_noisy_ones_are_not(tmp_path: Path) -> None:
    for name, exact in (("exact", True), ("noisy", False)):
        model, meter, _ = grown(tmp_path / name, signal=2, exact_copies=exact)
        early = meter.measure(model, step=0, since_growth=0)
        train(model, 25)
        late = replace(meter.measure(model, step=25, since_growth=25), step=125)
        starts = [
            "copies along signal are bit for bit the same 25 steps after the growth (q_proj, o_proj of layers 0, 1)"
        ]
        assert_starts(warnings(late, [early]), starts if exact else [])
