"""Real DiffLlama directories, saved and judged by `transformers`, grown as they are and converted to Motif's layout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gdagrow.engine import grow_moment
from gdagrow.models.gda import load_model
from gdagrow.verify.attention import attention_stats
from gdagrow.verify.gradients import compare_gradients
from gdagrow.verify.logits import compare
from gdagrow.verify.mirror import UNEQUAL_PARTS
from gdagrow.verify.tokens import random_tokens
from gdagrow.verify.weights import check_weights
from tests.command import call
from tests.diffllama import TOPOLOGIES, floor_of, load_diffllama, save_diffllama
from tests.growths import RANDOM, Grown, grow
from tests.reference import reference_logits

IDS = random_tokens(40, seqs=2, length=13, seed=1)
# Rounding in float64 over a few hundred operations in three layers, as tests/property/test_growth_preserves.py says.
ROUNDING = 1e-11

# (heads, KV heads) pairs of which every head count of a DiffLlama is a multiple.
HEADS = [(2, 2), (4, 2), (4, 4), (8, 2), (8, 4), (12, 4), (12, 6)]
NATIVE: list[dict[str, int]] = [
    {"uniform": 2}, {"uniform": 3}, {"hidden": 2, "ffn": 3}, {"ffn": 5}, {"signal": 2, "noise": 2},
    {"signal": 3, "noise": 3, "kv": 3}, {"signal": 6, "noise": 6, "kv": 2, "hidden": 3},
    {"signal": 4, "noise": 4, "ffn": 2},
]  # fmt: skip
CONVERTED: list[dict[str, Any]] = [
    {}, {"signal": 2}, {"signal": 3, "hidden": 2}, {"signal": "4:1", "ffn": 3}, {"signal": 4, "noise": 2, "kv": 2},
    {"uniform": 2},
]  # fmt: skip


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `save_diffllama`."""
    heads, kv_heads = draw(st.sampled_from(HEADS))
    hidden, ffn, dim = draw(st.integers(4, 24)), draw(st.integers(4, 24)), 2 * draw(st.integers(1, 4))
    return {
        "sizes": (hidden, ffn, draw(st.integers(1, 3)), heads, kv_heads, dim, draw(st.booleans())),
        "dtype": draw(st.sampled_from([torch.float64, torch.bfloat16])), "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }  # fmt: skip


def copies(exact: bool, seed: int) -> dict[str, Any]:
    return {"exact_copies": True} if exact else {"snr_db": 30.0, "seed": seed}


def apart(got: Tensor, expected: Tensor) -> float:
    assert got.dtype == expected.dtype == torch.float64
    assert float(expected.std()) > 0.01 * float(expected.abs().max()), "logits that say nothing"
    return float((got - expected).abs().max() / expected.abs().max())


def logits(directory: Path) -> Tensor:
    """By `transformers` alone."""
    with torch.no_grad():
        found: Tensor = load_diffllama(directory)(IDS).logits
    return found


def require_verified(grown: Grown) -> float:
    """What `gdagrow diff` and `gdagrow diff --weights` say; returns what `transformers` may err by (`floor_of`)."""
    comparison = compare(grown.source, grown.target, IDS, num_decoded=2)
    assert comparison.equivalent, comparison
    assert (comparison.parts_not_compared, comparison.first_difference) == (None, None)
    gradients = compare_gradients(grown.source, grown.target, IDS)
    assert gradients.equivalent, [tensor for tensor in gradients.tensors if not tensor.agrees]
    assert {tensor.name for tensor in gradients.tensors} == {tensor.name for tensor in grown.plan.tensors}
    planned = {tensor.name: tensor.moments_lost for tensor in grown.plan.tensors if tensor.moments_lost}
    found = {tensor.name: tensor.lost for tensor in gradients.tensors if tensor.lost and tensor.lost != UNEQUAL_PARTS}
    assert found == planned
    for kept in (True, False):
        if not kept:
            (grown.target / "growth.json").unlink()
        certificate = check_weights(grown.source, grown.target)
        assert certificate.equivalent, certificate
        assert certificate.num_tensors == len(grown.plan.tensors)
    return floor_of(load_diffllama(grown.source), comparison.condition)


@settings(RANDOM, max_examples=16)
@given(models(), st.sampled_from(NATIVE), st.booleans(), st.data())
def test_transformers_runs_what_was_grown(
    model: dict[str, Any], growth: dict[str, int], exact: bool, data: st.DataObject
) -> None:
    """Where the residual stream is as wide as before, its norms see the same numbers and what they round is the same.

    Where it is wider, their float32 sums are other sums, in either model.
    """
    embeddings = data.draw(st.sampled_from([None, "keep", "untie"])) if model["sizes"][-1] else None
    with TemporaryDirectory() as name:
        source = Path(name, "source")
        save_diffllama(source, **model)
        recipe = {**growth, **copies(exact, data.draw(st.integers(0, 2**32))), "embeddings": embeddings}
        grown = grow(source, Path(name, "grown"), recipe)
        event(f"{growth}")
        config = json.loads((grown.target / "config.json").read_text())
        assert config["model_type"] == "diffllama"
        wider = grown.plan.after.hidden != grown.plan.before.hidden
        floor = require_verified(grown)
        assert apart(logits(grown.target), logits(source)) <= (2 * floor if wider else ROUNDING)


@settings(RANDOM, max_examples=16)
@given(models(), st.sampled_from(CONVERTED), st.booleans(), st.booleans())
def test_a_converted_model_is_the_source_of_transformers(
    model: dict[str, Any], growth: dict[str, Any], exact: bool, untie: bool
) -> None:
    """By the reference model and by loops over heads, which know only Motif's layout, against `transformers`."""
    with TemporaryDirectory() as name:
        source = Path(name, "source")
        save_diffllama(source, **model)
        recipe = {
            "to": "motif",
            **growth,
            **copies(exact, 3),
            "embeddings": "untie" if untie and model["sizes"][-1] else None,
        }
        grown = grow(source, Path(name, "grown"), recipe)
        event(f"{growth}")
        expected, config = logits(source), json.loads((grown.target / "config.json").read_text())
        assert config["model_type"] == "motif"
        with torch.no_grad():
            ours = load_model(grown.target, dtype=torch.float64)(IDS).logits
            loops = reference_logits(grown.after, config, IDS)
        floor = require_verified(grown)
        assert apart(ours, expected) <= floor
        assert apart(loops, expected) <= floor
        assert apart(ours, loops) <= ROUNDING


def gradients(directory: Path) -> dict[str, Tensor]:
    """The gradients of the cross-entropy of a fixed random text, by `transformers`."""
    model = load_diffllama(directory)
    predictions = model(IDS).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(predictions, IDS[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("sizes", TOPOLOGIES[1:], ids=str)
@pytest.mark.parametrize(
    "growth", [{"uniform": 2}, {"uniform": 3}, {"signal": 2, "noise": 2, "kv": 2}, {"signal": 2, "noise": 2}], ids=str
)
def test_gradients_of_transformers_follow_the_mirror_rule(
    tmp_path: Path, sizes: tuple[int, int, int, int, int, int, bool], growth: dict[str, int]
) -> None:
    """Forward and backward, of source and grown model, each err by `floor_of` where norms are wider than before.

    A bias of keys has no gradient on paper, for softmax ignores it: errors are relative to the largest of all, too.
    """
    save_diffllama(tmp_path / "source", sizes, dtype=torch.float64, bias=True)
    grown = grow(tmp_path / "source", tmp_path / "grown", {**growth, "exact_copies": True})
    assert [tensor.name for tensor in grown.plan.tensors if tensor.moments_lost] == []
    before, after = gradients(grown.source), gradients(grown.target)
    assert after.keys() == {tensor.name for tensor in grown.plan.tensors}
    tolerance = 4 * require_verified(grown) if "uniform" in growth else ROUNDING
    largest = max(float(gradient.abs().max()) for gradient in before.values())
    for tensor in grown.plan.tensors:
        expected = grow_moment(tensor.growth, before[tensor.source.name], 1)
        scale = float(expected.abs().max()) + 1e-3 * largest
        assert float((after[tensor.name] - expected).abs().max()) <= tolerance * scale, tensor.name


@pytest.mark.parametrize(
    "growth", [{"uniform": 2}, {"signal": 4, "noise": 4, "kv": 2, "hidden": 2}, {"ffn": 4}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_growing_and_converting_are_done_in_either_order(
    tmp_path: Path, dtype: torch.dtype, growth: dict[str, int]
) -> None:
    """Powers of two and exact copies: not a byte of the weights differs."""
    save_diffllama(tmp_path / "source", TOPOLOGIES[2], dtype=dtype, bias=True)
    exact = {**growth, "exact_copies": True}
    grow(tmp_path / "source", tmp_path / "grown", exact)
    last = grow(tmp_path / "grown", tmp_path / "grown-converted", {"to": "motif"}).target
    grow(tmp_path / "source", tmp_path / "converted", {"to": "motif"})
    first = grow(tmp_path / "converted", tmp_path / "converted-grown", exact).target
    once = grow(tmp_path / "source", tmp_path / "once", {"to": "motif", **exact}).target
    files = [(target / "model.safetensors").read_bytes() for target in (last, first, once)]
    configs = [json.loads((target / "config.json").read_text()) for target in (last, first, once)]
    assert files[0] == files[1] == files[2]
    assert configs[0] == configs[1] == configs[2]
    # Back through a growth and a conversion, in either order, to what was there first.
    for target in (last, first):
        found = check_weights(tmp_path / "source", target)
        assert (found.equivalent, found.maps) == (True, "growth.json"), found


def test_the_moments_of_what_a_conversion_makes_are_not_carried(tmp_path: Path) -> None:
    save_diffllama(tmp_path / "source", TOPOLOGIES[1], dtype=torch.float64)
    plan = grow(tmp_path / "source", tmp_path / "grown", {"to": "motif", "signal": 2, "exact_copies": True}).plan
    lost = {tensor.parameter.split(".", 4)[-1]: tensor.moments_lost for tensor in plan.tensors if tensor.moments_lost}
    reason = "it is made in the conversion, from another value"
    assert lost == dict.fromkeys(("lambda_q1", "lambda_k1", "subln.weight"), reason)


def test_attention_statistics_are_those_of_the_maps_that_transformers_makes(tmp_path: Path) -> None:
    save_diffllama(tmp_path, TOPOLOGIES[3], dtype=torch.float64)
    found = attention_stats(tmp_path, IDS, dtype=torch.float64)
    model = load_diffllama(tmp_path)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(IDS, output_attentions=True).attentions
    assert len(found.layers) == len(maps) == 3
    for layer, both in zip(found.layers, maps, strict=True):
        signal, noise = both.chunk(2, dim=1)
        attention = model.model.layers[layer.layer].self_attn
        first, second = (
            (getattr(attention, f"lambda_q{n}") * getattr(attention, f"lambda_k{n}")).sum().exp() for n in (1, 2)
        )
        assert layer.lambda_ == pytest.approx(float((first - second).detach() + attention.lambda_init), rel=1e-12)
        assert layer.lambda_init == pytest.approx(attention.lambda_init, rel=1e-15)
        difference = signal - layer.lambda_ * noise
        for told, expected in ((layer.signal, signal), (layer.noise, noise), (layer.difference, difference)):
            share = expected.abs() / expected.abs().sum(-1, keepdim=True)
            entropy = torch.special.entr(share).sum(-1).mean((0, 2))
            # transformers' softmax is float32's: eps 1.2e-7, times a hundred for what lies before it in three layers.
            assert told.entropy == pytest.approx(entropy.tolist(), abs=1e-5)


def edit(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return spoil


def set_key(key: str, value: Any) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, key: value}))

    return spoil


def next_number(tensor: Tensor) -> Tensor:
    """The last element one unit in the last place away."""
    changed = tensor.clone()
    changed.view(-1)[-1:].copy_(torch.nextafter(changed.view(-1)[-1:], changed.new_tensor(torch.inf)))
    return changed


ATTENTION = "model.layers.1.self_attn."
SWAPPED = [edit(f"{ATTENTION}{name}_proj.weight", lambda weight: torch.cat(weight.chunk(2)[::-1])) for name in "qkv"]


@pytest.mark.parametrize(
    ("growth", "spoil", "named"),
    [
        # Signal heads for noise heads, one half of the values for the other: the shapes are right.
        ("--uniform-x2", SWAPPED[0], "signal head 0 of group 3: row 30 from 30"),
        ("--uniform-x2", SWAPPED[1], "KV group"),
        ("--uniform-x2", SWAPPED[2], "KV group"),
        ("--uniform-x2", edit(f"{ATTENTION}lambda_q2", lambda vector: vector + 0.25), "lambda_q2"),
        ("--uniform-x2", set_key("rms_norm_eps", 1e-2), "rms_norm_eps"),
        ("--to motif --signal-x2", SWAPPED[0], "noise head of group 0: row 20 from 10"),
        ("--to motif --signal-x2", edit(f"{ATTENTION}subln.weight", lambda w: w * 1.01), "subln.weight"),
        ("--to motif --signal-x2", edit(f"{ATTENTION}lambda_k1", lambda vector: vector + 0.25), "lambda_k1"),
        ("--to motif", set_key("attn_rms_norm_eps", 1e-2), "attn_rms_norm_eps"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], growth: str, spoil: Callable[[Path], None], named: str
) -> None:
    save_diffllama(tmp_path / "source", TOPOLOGIES[4], dtype=torch.bfloat16)
    assert call(capsys, "expand", tmp_path / "source", tmp_path / "grown", *growth.split(), "--quiet").code == 0
    of_a_run = tmp_path / "source", tmp_path / "grown", "--seqs", "2", "--length", "13"
    assert call(capsys, "diff", *of_a_run).code == 0
    assert call(capsys, "diff", *of_a_run[:2], "--weights").code == 0
    spoil(tmp_path / "grown")
    assert call(capsys, "diff", *of_a_run).code == 1
    outcome = call(capsys, "diff", *of_a_run[:2], "--weights")
    assert (outcome.code, named in outcome.out) == (1, True), outcome.out


@pytest.mark.parametrize("made", ["subln.weight", "lambda_q1", "lambda_k1"])
def test_one_bit_of_a_made_tensor_is_seen(tmp_path: Path, made: str) -> None:
    save_diffllama(tmp_path / "source", TOPOLOGIES[0], dtype=torch.bfloat16)
    grown = grow(tmp_path / "source", tmp_path / "grown", {"to": "motif", "signal": 2})
    edit(f"model.layers.0.self_attn.{made}", next_number)(grown.target)
    (difference,) = check_weights(grown.source, grown.target).differences
    assert (difference.name, difference.num_wrong) == (f"model.layers.0.self_attn.{made}", 1)
    assert 0 < difference.largest <= 2**-52 * 4


def test_a_cast_of_the_made_tensors_changes_the_function_by_its_rounding(tmp_path: Path) -> None:
    """Why they are float64 whatever the source's dtype: bfloat16 has 8 bits."""
    save_diffllama(tmp_path / "source", TOPOLOGIES[3], dtype=torch.bfloat16)
    grown = grow(tmp_path / "source", tmp_path / "grown", {"to": "motif"})
    shutil.copytree(grown.target, tmp_path / "cast")
    cast_tensors = {name: tensor.bfloat16() for name, tensor in grown.after.items()}
    save_file(cast_tensors, tmp_path / "cast" / "model.safetensors", metadata={"format": "pt"})
    exact, cast = compare(grown.source, grown.target, IDS), compare(grown.source, tmp_path / "cast", IDS)
    assert exact.max_rel <= 1e-14
    assert 2**-12 < cast.max_rel < 2**-3
    assert not cast.equivalent
