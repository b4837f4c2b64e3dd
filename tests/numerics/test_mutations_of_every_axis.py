"""Wrong growths by depth, to sizes that are no multiple, and of chosen heads: each is caught, and named."""

import json
import math
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gdagrow.errors import CheckpointError, CompareError
from gdagrow.verify.gradients import compare_gradients
from gdagrow.verify.lineage import lineage_of
from gdagrow.verify.logits import compare
from gdagrow.verify.pair import read_pair
from gdagrow.verify.tokens import random_tokens
from gdagrow.verify.weights import check_weights
from tests.checkpoints import edit, edit_json, write_checkpoint
from tests.command import call
from tests.diffllama import save_diffllama
from tests.growths import EPS, grow

Tensors = dict[str, Tensor]

TOKENS = random_tokens(61, seqs=2, length=12, seed=0)
# Of the source: 3 layers, 2 groups of 3:1, hidden 32, FFN 48 of SiLU. Of the grown model: 5 layers, of which 1 and 3
# are new and 2 and 4 have moved; 4:1; hidden 72, of which the last 8 are fresh; FFN 110, of which the last 14 are.
RECIPE = {"insert": "after:0,1", "signal": "4:1", "select": "norm", "hidden_to": 72, "ffn_to": 110}
HIDDEN, FFN = 64, 96  # those that are copies
NEW, OTHER_NEW, MOVED, OTHER_MOVED = (f"model.layers.{layer}." for layer in (1, 3, 2, 4))
FIRST = "model.layers.0."


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("right")
    write_checkpoint(
        directory / "source", layers=3, activation="silu", bias=True, lambda_dtype=torch.float32, scale=0.6, extra=EPS
    )
    grow(directory / "source", directory / "grown", RECIPE)
    return directory


@pytest.fixture
def pair(right: Path, tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(right / "grown", tmp_path / "grown")
    return right / "source", tmp_path / "grown"


def edit_lineage(directory: Path, **keys: Any) -> None:
    lineage = json.loads((directory / "growth.json").read_text())["lineage"]
    edit_json(directory / "growth.json", lineage={**lineage, **keys})


Index = tuple[slice | int, ...]
EVERY = slice(None)
LEAST = 2.0**-133  # of bfloat16

# What each is set to, and the first part that `compare` names: the layer and the part, or None where the first that
# differs is behind all layers; or that nothing differs there, since the function is the same or the change too small.
NOTHING = (-1, "")
Part = tuple[int | None, str] | None
SET: tuple[tuple[str, Index, float, bool, Part], ...] = (
    # What a new block writes is not zero. Its parts are held against zero, which no rounding disturbs.
    (NEW + "self_attn.o_proj.weight", (3, 5), 0.5, False, (1, "attention")),
    (NEW + "self_attn.o_proj.weight", (3, 5), LEAST, True, (1, "attention")),
    (NEW + "self_attn.o_proj.bias", (70,), 0.5, False, (1, "attention")),
    (OTHER_NEW + "mlp.down_proj.weight", (71, 109), 0.5, False, (3, "mlp")),
    (OTHER_NEW + "mlp.down_proj.weight", (0, 7), 0.5, False, (3, "mlp")),
    (OTHER_NEW + "mlp.down_proj.bias", (0,), 0.5, False, (3, "mlp")),
    # Something writes to a fresh feature.
    ("model.embed_tokens.weight", (EVERY, HIDDEN), 0.5, False, (None, "embedding")),
    (FIRST + "self_attn.o_proj.weight", (HIDDEN + 1, 0), 0.5, False, (0, "attention")),
    (FIRST + "self_attn.o_proj.bias", (HIDDEN + 1,), 0.5, False, (0, "attention")),
    (MOVED + "mlp.down_proj.weight", (HIDDEN + 7, 2), 0.5, False, (2, "mlp")),
    # What reads a fresh feature is not finite: zero times that is no number.
    (FIRST + "self_attn.q_proj.weight", (0, HIDDEN), math.inf, False, (0, "signal heads")),
    (FIRST + "input_layernorm.weight", (HIDDEN,), math.nan, False, (0, "signal heads")),
    (OTHER_MOVED + "mlp.up_proj.weight", (3, HIDDEN + 2), math.nan, False, (4, "mlp")),
    ("lm_head.weight", (60, 71), -math.inf, False, None),
    # A fresh unit of the FFN is read, or is not finite, or has a bias (which is no matter, but not as it was made).
    (FIRST + "mlp.down_proj.weight", (0, FFN), 0.5, False, (0, "mlp")),
    (FIRST + "mlp.gate_proj.weight", (FFN + 1, 3), math.nan, False, (0, "mlp")),
    (FIRST + "mlp.up_proj.bias", (FFN,), 0.5, True, NOTHING),
    # A new block is a copy of another block than is said; it adds nothing all the same.
    (NEW + "self_attn.q_proj.weight", (0, 0), 0.5, True, NOTHING),
    (NEW + "mlp.gate_proj.weight", (0, 0), 0.5, True, NOTHING),
    (NEW + "self_attn.subln.weight", (0,), 0.5, True, NOTHING),
)  # fmt: skip


@pytest.mark.parametrize(("name", "at", "value", "same", "part"), SET, ids=[f"{case[0]}{case[1:3]}" for case in SET])
def test_a_weight_that_is_not_as_it_must_be(
    name: str, at: Index, value: float, same: bool, part: Part, pair: tuple[Path, Path]
) -> None:
    def change(t: Tensors) -> None:
        assert not bool((t[name][at] == value).all())
        t[name][at] = value

    edit(pair[1], change)
    found = check_weights(*pair)
    assert not found.equivalent
    (difference,) = found.differences
    assert (difference.name, difference.problem) == (name, None)
    assert difference.num_wrong == load_file(pair[1] / "model.safetensors")[name][at].numel()
    run = compare(*pair, TOKENS)
    assert run.equivalent is same
    first = run.first_difference
    if part is None or part == NOTHING:
        assert first is None
    else:
        assert first
        assert (first.layer, first.part) == part


def test_a_new_block_that_sends_something_back(pair: tuple[Path, Path]) -> None:
    """The least number in what it writes, far below what shows in the loss, and its other gradients are not zero."""
    edit(pair[1], lambda t: t[NEW + "self_attn.o_proj.weight"][3, 5].fill_(LEAST))
    found = compare_gradients(*pair, TOKENS)
    wrong = {tensor.name for tensor in found.tensors if not tensor.agrees}
    assert not found.equivalent
    assert NEW + "self_attn.v_proj.weight" in wrong
    assert all(name.startswith(NEW) and "mlp" not in name and "post" not in name for name in wrong)


def next_number(t: Tensors, name: str, at: int) -> None:
    assert t[name].dtype == torch.float64, name
    t[name].view(torch.int64)[at] += 1


# Small tensors that were made anew: a norm's gains of copies, the last norm's, a sub-norm, moved lambdas.
MADE = (FIRST + "input_layernorm.weight", NEW + "post_attention_layernorm.weight", "model.norm.weight",
        MOVED + "self_attn.subln.weight", OTHER_MOVED + "self_attn.lambda_q2",
        MOVED + "self_attn.lambda_k2")  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_a_repair_that_is_off_by_the_last_bit(name: str, pair: tuple[Path, Path]) -> None:
    """In float64 that is far below what rounding does to a logit: the certificate alone can tell."""
    edit(pair[1], lambda t: next_number(t, name, 3))
    (difference,) = check_weights(*pair).differences
    assert (difference.name, difference.num_wrong) == (name, 1)
    assert 0 < difference.largest < 1e-15
    assert compare(*pair, TOKENS).equivalent


def test_repairs_that_were_not_made(pair: tuple[Path, Path]) -> None:
    """Gains and lambdas as the source has them, if in float64."""
    source = load_file(pair[0] / "model.safetensors")
    for name, old, part in (
        (MOVED + "self_attn.subln.weight", "model.layers.1.self_attn.subln.weight", (2, "differences")),
        (OTHER_MOVED + "self_attn.lambda_q2", "model.layers.2.self_attn.lambda_q2", (4, "differences")),
        (FIRST + "input_layernorm.weight", FIRST + "input_layernorm.weight", (0, "signal heads")),
        ("model.norm.weight", "model.norm.weight", None),
    ):
        kept: list[Tensor] = []

        def unmade(t: Tensors, name: str = name, old: str = old, kept: list[Tensor] = kept) -> None:
            kept.append(t[name].clone())
            size = min(len(t[name]), 2 * len(source[old]))
            t[name][:size] = source[old].double().repeat(2)[:size]

        edit(pair[1], unmade)
        assert [difference.name for difference in check_weights(*pair).differences] == [name]
        run = compare(*pair, TOKENS)
        assert not run.equivalent
        first = run.first_difference
        assert (first and (first.layer, first.part)) == part
        edit(pair[1], lambda t, name=name, kept=kept: t[name].copy_(kept[0]))  # type: ignore[misc]
    assert check_weights(*pair).equivalent


def test_a_repair_that_a_trainer_cast(pair: tuple[Path, Path]) -> None:
    edit(pair[1], lambda t: t.update({name: t[name].float() for name in MADE}))
    problems = {difference.name: difference.problem for difference in check_weights(*pair).differences}
    assert problems == dict.fromkeys(MADE, "stored as F32, in the source as F64")


def test_free_weights_may_be_others(pair: tuple[Path, Path]) -> None:
    """They come from nothing and add nothing."""

    def change(t: Tensors) -> None:
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            t[f"{FIRST}{name}.weight"][:, HIDDEN:] = 3
        t[FIRST + "mlp.gate_proj.weight"][FFN:] = -2
        t[FIRST + "input_layernorm.weight"][HIDDEN:] = 9
        t["lm_head.weight"][:, HIDDEN:] = 7

    edit(pair[1], change)
    assert check_weights(*pair).equivalent
    run = compare(*pair, TOKENS)
    assert (run.equivalent, run.first_difference) == (True, None)
    assert compare_gradients(*pair, TOKENS).equivalent


def test_an_eps_that_was_not_scaled(pair: tuple[Path, Path]) -> None:
    assert json.loads((pair[1] / "config.json").read_text())["rms_norm_eps"] == 1e-6 * (64 / 72)
    assert check_weights(*pair).settings == compare(*pair, TOKENS).settings == ()
    edit_json(pair[1] / "config.json", rms_norm_eps=1e-6)
    found = check_weights(*pair)
    assert (found.equivalent, found.differences) == (False, ())
    (setting,) = found.settings
    assert (setting.key, setting.source, setting.grown) == ("rms_norm_eps", 1e-6 * (64 / 72), 1e-6)
    run = compare(*pair, TOKENS)
    assert (run.equivalent, run.settings) == (False, found.settings)


def differing_layers(pair: tuple[Path, Path]) -> set[str]:
    found = check_weights(*pair)
    assert not found.equivalent
    return {".".join(difference.name.split(".")[:3]) for difference in found.differences}


def test_lineages_that_lie_about_layers(pair: tuple[Path, Path]) -> None:
    """They could be those of a growth, so nothing but the weights shows that they are not of this one."""
    edit_lineage(pair[1], layers=[0, 0, 1, 2, 2])
    assert differing_layers(pair) == {"model.layers.3"}  # said to be a copy of the last layer
    edit_lineage(pair[1], layers=[0, 0, 1, 1, 2], new_layers=[0, 3])
    assert differing_layers(pair) == {"model.layers.0", "model.layers.1"}
    run = compare(*pair, TOKENS)
    assert run.equivalent
    assert run.first_difference
    assert (run.first_difference.layer, run.first_difference.part) == (0, "attention")
    edit_lineage(pair[1], layers=[0, 1, 1, 2, 2], new_layers=[2, 4])
    assert differing_layers(pair) == {f"model.layers.{layer}" for layer in (1, 2, 3, 4)}
    edit_lineage(pair[1], layers=[0, 0, 1, 1, 2], new_layers=[1, 3])
    assert check_weights(*pair).equivalent


def test_a_lineage_that_lies_about_heads(pair: tuple[Path, Path]) -> None:
    lineage = json.loads((pair[1] / "growth.json").read_text())["lineage"]
    of_layer = lineage["signal_heads_by_layer"]
    assert of_layer[0] == of_layer[1] != of_layer[2], "norm chose other heads in the two layers"
    edit_lineage(pair[1], signal_heads_by_layer=[of_layer[2], *of_layer[1:]])
    found = check_weights(*pair)
    assert {difference.name for difference in found.differences} == {
        FIRST + f"self_attn.{name}" for name in ("q_proj.weight", "q_proj.bias", "o_proj.weight")
    }
    del lineage["signal_heads_by_layer"]
    edit_json(pair[1] / "growth.json", lineage={**lineage, "signal_heads": of_layer[0]})
    assert "model.layers.2" in differing_layers(pair)


COPIES = [[0, 32], [0, 32]]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a layer is lost": ({"layers": [0, 0, 1, 1, 1]}, "layers: expected every old layer once and in order"),
    "layers swapped": ({"layers": [1, 0, 0, 1, 2], "new_layers": [1, 3]}, "layers: expected every old layer once"),
    "all are new": ({"new_layers": [0, 1, 2, 3, 4]}, "layers: expected every old layer once and in order"),
    "none is new": ({"new_layers": []}, "layers: expected every old layer once and in order, beside new ones"),
    "one more is new": ({"new_layers": [1, 2, 3]}, "layers: expected every old layer once and in order"),
    "a new one is not there": ({"new_layers": [1, 3, 5]}, "layers: expected every old layer once and in order"),
    "a copy of no layer": ({"layers": [0, 3, 1, 1, 2]}, "layers: expected every old layer once and in order"),
    "a huge layer": ({"layers": [0, 10**7, 1, 1, 2]}, "layers: expected every old layer once and in order"),
    "a huge old layer": ({"layers": [0, 0, 1, 1, 10**7]}, "layers: expected every old layer once and in order"),
    "beyond all": ({"layers": [0, 0, 1, 1, 10**30]}, "layers: expected indices, got 1000000000000000000000000000000"),
    "a negative layer": ({"new_layers": [-1, 3]}, "new_layers: expected indices, got -1"),
    "true": ({"new_layers": [True, 3]}, "new_layers: expected indices, got True"),
    "too many layers": ({"layers": [0, 0, 1, 1, 2, 2]}, "layers: expected 5 entries, got 6"),
    "a number of layers": ({"layers": 5}, "layers: expected 5 entries, got int"),
    "text": ({"new_layers": "13"}, "new_layers: expected 2 entries, got str"),
    "nothing": ({"new_layers": None}, "expected the lineage of a growth, got something else"),
    "heads of too few layers": ({"signal_heads_by_layer": []}, "signal_heads_by_layer: expected 5 entries, got 0"),
    "heads of layers as a map": ({"signal_heads_by_layer": {"0": 1}}, "signal_heads_by_layer: expected 5 entries"),
    "fresh as a list": ({"fresh": []}, "fresh: expected a number of features by axis, got list"),
    "fresh as a number": ({"fresh": 8}, "fresh: expected a number of features by axis, got int"),
    "fresh as text": ({"fresh": "hidden"}, "fresh: expected a number of features by axis, got str"),
    "less fresh": ({"fresh": {"hidden": 7, "ffn": 14}}, "hidden: expected runs of 72 old features in all, got 71"),
    "none fresh": ({"fresh": {"hidden": 8}}, "ffn: expected runs of 110 old features in all, got 96"),
    "fresh huge": ({"fresh": {"hidden": 2**30, "ffn": 14}}, "hidden: expected runs of 72 old features in all, got"),
    "fresh negative": ({"fresh": {"hidden": -8, "ffn": 14}}, "hidden: expected indices, got -8"),
    "fresh of a fraction": ({"fresh": {"hidden": 8.0, "ffn": 14}}, "hidden: expected indices, got 8.0"),
    "fresh said to be copies": ({"hidden": [*COPIES, [0, 8]], "fresh": {"ffn": 14}},
                                "hidden: expected as many copies of every old feature"),
    "copies said to be fresh": ({"hidden": [[0, 32]], "fresh": {"hidden": 40, "ffn": 14}},
                                "hidden: expected fewer than 32 fresh features, got 40"),
    "all fresh": ({"hidden": [], "fresh": {"hidden": 72, "ffn": 14}}, "hidden: expected as many copies of every"),
    "fewer layers": ({"layers": [0, 0, 1, 1, 1], "new_layers": [1, 3, 4]}, "its lineage leads back to 2 groups of 3:1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_corrupted_lineage_is_refused(case: str, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """In one sentence, and before anything as large as its numbers is made."""
    keys, sentence = REFUSED[case]
    edit_lineage(pair[1], **keys)
    headers = read_pair(*pair)
    tracemalloc.start()
    with pytest.raises(CheckpointError) as error:
        lineage_of(*headers)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    assert str(error.value).startswith(f"{pair[1] / 'growth.json'}: ")
    assert sentence in str(error.value)
    assert str(error.value).endswith("restore the file, or remove it to have the maps inferred from the two configs")
    outcome = call(capsys, "diff", *pair, "--weights")
    assert (outcome.code, outcome.out) == (2, "")
    assert "growth.json" in outcome.err
    assert "Traceback" not in outcome.err


def padded(source: Path, target: Path, axis: str) -> None:
    """A model with the source's weights, and features or units beside them that are silent; nothing is made up for."""
    grow(source, target, {axis: 2})
    before = load_file(source / "model.safetensors")

    def change(t: Tensors) -> None:
        for name, tensor in t.items():
            old = before[name]
            if old.shape != tensor.shape:
                tensor.fill_(1.0 if "norm" in name else 0.0)
                tensor[tuple(slice(size) for size in old.shape)] = old

    edit(target, change)


@pytest.mark.parametrize(("axis", "activation"), [("hidden", "silu"), ("ffn", "poly_norm")])
def test_what_averages_over_silent_features_is_another_function(tmp_path: Path, axis: str, activation: str) -> None:
    """Every weight would fold back, and a lineage that says so is none of a growth that preserves the function."""
    write_checkpoint(tmp_path / "source", activation=activation, scale=0.6, extra=EPS)
    size = {"hidden": 32, "ffn": 48}[axis]
    padded(tmp_path / "source", tmp_path / "grown", axis)
    assert not compare(tmp_path / "source", tmp_path / "grown", TOKENS).equivalent
    edit_lineage(tmp_path / "grown", **{axis: [[0, size]]}, fresh={axis: size})
    with pytest.raises(CheckpointError, match=rf"{axis}: expected fewer than {size} fresh features, got {size}"):
        check_weights(tmp_path / "source", tmp_path / "grown")


def test_fresh_units_under_polynorm_are_refused(tmp_path: Path) -> None:
    """No growth makes them, but a lineage could say so, and every weight fold back."""
    write_checkpoint(tmp_path / "silu", activation="silu", scale=0.6, extra=EPS)
    grow(tmp_path / "silu", tmp_path / "grown", {"ffn_to": 60})
    write_checkpoint(tmp_path / "source", activation="poly_norm", scale=0.6, extra=EPS)
    silu, poly = (load_file(tmp_path / name / "model.safetensors") for name in ("silu", "source"))
    activations = {name: tensor for name, tensor in poly.items() if ".act_fn." in name}
    save_file(silu | activations, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    edit(tmp_path / "grown", lambda t: t.update(activations))
    edit_json(tmp_path / "grown" / "config.json", hidden_act="poly_norm")
    assert not compare(tmp_path / "source", tmp_path / "grown", TOKENS).equivalent
    with pytest.raises(CheckpointError, match=r"its lineage has fresh FFN units, over which its activation averages"):
        check_weights(tmp_path / "source", tmp_path / "grown")


def test_a_diffllama_whose_layers_are_said_to_have_moved_is_refused(tmp_path: Path) -> None:
    """Its sub-norm has no weight that could have been repaired: with the same shapes it would be another function."""
    save_diffllama(tmp_path / "source", (32, 40, 2, 8, 4, 4, False), dtype=torch.bfloat16)
    grow(tmp_path / "source", tmp_path / "grown", {"depth": 1, "insert": "top"})
    assert check_weights(tmp_path / "source", tmp_path / "grown").equivalent
    edit_lineage(tmp_path / "grown", layers=[0, 0, 1], new_layers=[0])
    with pytest.raises(
        CheckpointError, match=r"its lineage has layers that moved, which a sub-norm without a weight can"
    ):
        check_weights(tmp_path / "source", tmp_path / "grown")


def test_a_diffllama_whose_features_are_said_to_be_fresh_is_refused(tmp_path: Path) -> None:
    """Its sub-norm has the same eps, which therefore cannot follow the width."""
    save_diffllama(tmp_path / "source", (32, 40, 2, 8, 4, 4, False), dtype=torch.bfloat16)
    grow(tmp_path / "source", tmp_path / "grown", {"hidden": 2})
    save_diffllama(tmp_path / "narrower", (33, 40, 2, 8, 4, 4, False), dtype=torch.bfloat16)
    edit_lineage(tmp_path / "grown", hidden=[[0, 33]], fresh={"hidden": 31})
    with pytest.raises(CheckpointError, match=r"its lineage has fresh features, for which the eps of its norms cannot"):
        check_weights(tmp_path / "narrower", tmp_path / "grown")


def test_repairs_in_one_of_several_growths_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", activation="silu", extra=EPS)
    for name, first, second in (
        ("depth", {"depth": 1, "insert": "bottom"}, {"hidden": 2}), ("size", {"hidden": 2}, {"hidden_to": 70}),
        # No old layer of the first source moves, but a block that was new has moved.
        ("new", {"depth": 1, "insert": "top"}, {"insert": "after:1"}),
    ):  # fmt: skip
        grow(tmp_path / "a", tmp_path / f"{name}-b", first)
        grow(tmp_path / f"{name}-b", tmp_path / f"{name}-c", second)
        assert check_weights(tmp_path / f"{name}-b", tmp_path / f"{name}-c").equivalent
        with pytest.raises(CompareError, match=r"tells of 2 growths, in one of which layers moved or gains were"):
            check_weights(tmp_path / "a", tmp_path / f"{name}-c")
        run = compare(tmp_path / "a", tmp_path / f"{name}-c", TOKENS)
        assert (run.equivalent, run.first_difference, run.parts_not_compared) == (True, None, None)


def test_several_growths_without_repairs_fold_back_at_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", activation="silu", tied=True, extra=EPS)
    for source, target, recipe in (
        ("a", "b", {"depth": 1, "insert": "top"}), ("b", "c", {"ffn_to": 60, "hidden": 3}),
        ("c", "d", {"ffn": 2, "signal": "4:1", "select": "norm"}), ("d", "e", {"insert": "top", "layers": 5}),
    ):  # fmt: skip
        grow(tmp_path / source, tmp_path / target, recipe)
        for first in "abcd"[: ord(target) - ord("a")]:
            found = check_weights(tmp_path / first, tmp_path / target)
            assert (found.equivalent, found.maps) == (True, "growth.json"), found
    run = compare(tmp_path / "a", tmp_path / "e", TOKENS)
    assert (run.equivalent, run.first_difference, run.parts_not_compared) == (True, None, None)
    assert compare_gradients(tmp_path / "a", tmp_path / "e", TOKENS).equivalent
    edit(tmp_path / "e", lambda t: t[NEW.replace("1", "4") + "self_attn.o_proj.weight"][0, 0].fill_(LEAST))
    assert [difference.name for difference in check_weights(tmp_path / "a", tmp_path / "e").differences] == [
        "model.layers.4.self_attn.o_proj.weight"
    ]


def test_further_copies_in_a_new_block_may_be_anything_finite(tmp_path: Path) -> None:
    """They are told apart by noise in their own rows; the first copies must be the neighbour's bits."""
    write_checkpoint(tmp_path / "source", layers=2, extra=EPS)
    grown = grow(tmp_path / "source", tmp_path / "grown", {"signal": 2, "depth": 1, "insert": "top"})
    name = "model.layers.2.self_attn.q_proj.weight"
    (tensor,) = (tensor for tensor in grown.plan.tensors if tensor.name == name)
    first, further = (next(s.new for s in tensor.growth.rows.segments if s.copy == copy) for copy in (0, 1))
    assert not torch.equal(grown.after[name][first], grown.after[name][further])
    assert torch.equal(grown.after[name][first], grown.before["model.layers.1.self_attn.q_proj.weight"][0])
    for row, value, wrong in ((further, 3.0, 0), (further, torch.inf, 1), (first, 3.0, 1)):
        edit(grown.target, lambda tensors, row=row, value=value: tensors[name].__setitem__((row, 0), value))
        certificate = check_weights(grown.source, grown.target)
        assert [d.num_wrong for d in certificate.differences] == [wrong] * bool(wrong)
        edit(grown.target, lambda tensors: tensors[name].copy_(grown.after[name]))
