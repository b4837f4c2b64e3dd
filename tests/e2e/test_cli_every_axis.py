"""What `gdagrow diff` prints of new blocks, of layers that moved, and of settings that a growth changes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gdagrow.record import growths_of
from gdagrow.report.growth_sections import what_was_done
from gdagrow.report.node import Node
from gdagrow.verify.logits import compare
from gdagrow.verify.tokens import random_tokens
from gdagrow.verify.weights import check_weights
from tests.checkpoints import write_checkpoint
from tests.command import call
from tests.growths import EPS, grow


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Three layers, then five, of which 1 and 3 are new and 2 and 4 have moved."""
    write_checkpoint(tmp_path / "a", layers=3, activation="silu", dtype=torch.float32, scale=0.6, extra=EPS)
    grow(tmp_path / "a", tmp_path / "b", {"insert": "after:0,1", "hidden_to": 72, "exact_copies": True})
    return tmp_path / "a", tmp_path / "b"


def test_the_parts_of_a_new_block_stand_under_their_headings(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = call(capsys, "diff", *pair, "--length", "8", "--seqs", "1", "--decode", "0")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["layer", "signal"])
    headings, rows = lines[start], lines[start + 1 : start + 6]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3", "4"]
    for number in (1, 3):
        row = rows[number]
        assert row.split()[1:4] == ["new", "0.0e+00", "0.0e+00"]
        for heading, cell in zip(("attention", "mlp", "residual"), row.split()[2:], strict=True):
            stop = headings.index(heading) + len(heading)
            assert row[:stop].endswith(cell), (heading, row)
    assert "rms_norm_eps" not in outcome.out


def test_moments_are_told_layer_by_layer(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    outcome = call(capsys, "diff", *pair, "--gradients", "--length", "8", "--seqs", "2")
    assert outcome.code == 0
    told = {words[0]: words[4:] for line in outcome.out.splitlines() if len(words := line.split()) > 4}
    assert told["self_attn.lambda_q1"] == told["self_attn.subln.weight"] == told["lm_head.weight"] == ["exact"]
    # In two of the three layers lambda moved.
    assert told["self_attn.lambda_q2"] == ["exact", "in", "1", "of", "3"]
    text = " ".join(outcome.out.split())
    assert "optimizer moments can be carried exactly for 41 of 45 tensors; 28 more are of new blocks" in text
    assert "it makes up for the change of its layer's lambda_init self_attn.lambda_q2, self_attn.lambda_k2" in text
    tensors = json.loads(call(capsys, "diff", *pair, "--gradients", "--length", "8", "--json").out)["tensors"]
    assert sum(tensor["lost"] is None for tensor in tensors) == len(tensors) - 2 * 14 - 2 * 2 == 41


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"insert": "after:0,1"}, "layers to 4, new layers 1, 3"),
        ({"hidden_to": 72}, "hidden to 72"),
        ({"rope_theta": 2e4, "max_position_embeddings": 64}, "rope_theta 20000.0, max_position_embeddings 64"),
        ({"embeddings": "untie"}, "untied"),
        ({"ffn": 2, "embeddings": "untie"}, "ffn {}2, untied"),
    ],
)
def test_inspect_and_the_report_tell_what_was_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: dict[str, Any], told: str
) -> None:
    write_checkpoint(tmp_path / "a", tied=True)
    grow(tmp_path / "a", tmp_path / "b", {**recipe, "exact_copies": True})
    out = call(capsys, "inspect", tmp_path / "b").out
    assert f"grown from a: {told.format('x')}; exact copies" in " ".join(out.split())
    page = what_was_done(Node(growths_of(tmp_path / "b"), "growths"))
    words = told.replace("new layers 1, 3", "of which 1, 3 are new").replace("untied", "embeddings untied")
    assert f"Grown from <b>a</b>: {words.format('&times;')}; exact copies" in page


def test_lambdas_that_moved_in_every_layer_are_not_called_exact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "a", dtype=torch.float32, scale=0.6, extra=EPS)
    grow(tmp_path / "a", tmp_path / "b", {"depth": 1, "insert": "bottom"})
    outcome = call(capsys, "diff", tmp_path / "a", tmp_path / "b", "--gradients", "--length", "8", "--seqs", "2")
    told = {words[0]: words[4:] for line in outcome.out.splitlines() if len(words := line.split()) > 4}
    assert told["self_attn.lambda_q2"] == ["anew"]
    assert told["self_attn.lambda_q1"] == ["exact"]


TOKENS = random_tokens(61, seqs=1, length=8, seed=0)
KINDS = {"layer_types": ["full_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("extra", "recipe", "changed", "named"),
    [
        (KINDS, {"insert": "after:0"}, {}, []),
        (KINDS, {"insert": "after:0"}, {"layer_types": ["full_attention", "full_attention", "x"]}, ["layer_types"]),
        ({}, {"hidden_to": 40}, {}, []),
        ({}, {"hidden_to": 40}, {"rms_norm_eps": 1e-6}, ["rms_norm_eps"]),
        ({}, {"hidden_to": 40}, {"attn_rms_norm_eps": 8e-7}, ["attn_rms_norm_eps"]),
        ({}, {"hidden": 2, "max_position_embeddings": 512}, {}, []),
        ({}, {"hidden": 2, "rope_theta": 20000.0}, {}, ["rope_theta"]),
        ({}, {"hidden": 2, "rope_theta": 20000.0}, {"rope_theta": 10000.0}, []),
    ],
)  # fmt: skip
def test_settings_that_a_growth_changes_are_right_as_it_makes_them(
    tmp_path: Path, extra: dict[str, Any], recipe: dict[str, Any], changed: dict[str, Any], named: list[str]
) -> None:
    """By the certificate and beside the logits; a change that the recipe asks for is told all the same."""
    write_checkpoint(tmp_path / "a", scale=0.6, extra={**EPS, **extra})
    grow(tmp_path / "a", tmp_path / "b", recipe)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, **changed}))
    found, run = check_weights(tmp_path / "a", tmp_path / "b"), compare(tmp_path / "a", tmp_path / "b", TOKENS)
    assert [setting.key for setting in found.settings] == [setting.key for setting in run.settings] == named
    assert (found.differences, found.equivalent) == ((), not named)
    assert run.equivalent is (not named or named == ["layer_types"])


@pytest.mark.parametrize(
    ("changed", "named"),
    [({}, []), ({"rms_norm_eps": 1e-6}, ["rms_norm_eps"]), ({"layer_types": ["x"] * 5}, ["layer_types"])],
)
def test_settings_that_several_growths_changed_are_right_as_they_made_them(
    tmp_path: Path, changed: dict[str, Any], named: list[str]
) -> None:
    """32 features, 40 with 8 of zero, 100 with 36: two copies of the 40, and 20 more."""
    write_checkpoint(tmp_path / "a", scale=0.6, extra={**EPS, "layer_types": ["full", "full"]})
    grow(tmp_path / "a", tmp_path / "b", {"hidden_to": 40, "insert": "after:0"})
    grow(tmp_path / "b", tmp_path / "c", {"hidden_to": 100, "insert": "after:1,2"})
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["rms_norm_eps"] == pytest.approx(1e-6 * 64 / 100, rel=1e-12)
    (tmp_path / "c" / "config.json").write_text(json.dumps({**config, **changed}))
    found = compare(tmp_path / "a", tmp_path / "c", TOKENS)
    assert [setting.key for setting in found.settings] == named
    assert found.parts


def test_a_plan_in_json_says_what_is_float64_and_in_which_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "a", layers=3)
    moved = "it makes up for the change of its layer's lambda_init (layers 2, 4)"
    lambdas = {f"model.layers.{{layer}}.self_attn.{name}": moved for name in ("lambda_k2", "lambda_q2", "subln.weight")}
    norms = dict.fromkeys(
        ("model.layers.{layer}.input_layernorm.weight", "model.layers.{layer}.post_attention_layernorm.weight",
         "model.norm.weight"),
        "it makes up for the features that the norm averages over besides",
    )  # fmt: skip
    for flags, told in (
        (("--insert", "after:0,1"), lambdas), (("--hidden-to", "40"), norms), (("--signal-x2",), {}),
    ):  # fmt: skip
        assert json.loads(call(capsys, "plan", tmp_path / "a", *flags, "--json").out)["float64"] == told
