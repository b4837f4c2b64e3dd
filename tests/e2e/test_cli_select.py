"""`--select`: the heads that a target ratio clones once more are those with the largest norm, or those of a file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gdagrow.verify.logits import compare
from gdagrow.verify.tokens import random_tokens
from tests.checkpoints import write_checkpoint
from tests.command import call
from tests.growths import grow

ATTENTION = "model.layers.{}.self_attn.{}_proj.weight"
# Of `write_checkpoint`: 2 groups of 3:1 and head_dim 8, so 4 query heads of 8 rows and 3 outputs of 16 columns each.
GROUPS, RATIO, DIM = 2, 3, 8
LAYERS = 4


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "source", layers=LAYERS, tied=True)
    return tmp_path / "source"


def cloned_more(source: Path, grown: Path) -> list[list[list[int]]]:
    """For each layer and group, the old heads whose queries stand behind those of all heads, found in the files."""
    before, after = (load_file(directory / "model.safetensors") for directory in (source, grown))
    layers = []
    for layer in range(LAYERS):
        name = ATTENTION.format(layer, "q")
        old, new = (tensors[name].view(GROUPS, -1, DIM, before[name].shape[1]) for tensors in (before, after))
        layers.append([
            [next(head for head in range(RATIO) if torch.equal(rows, heads[head])) for rows in grown_heads[RATIO:-1]]
            for heads, grown_heads in zip(old, new, strict=True)
        ])  # fmt: skip
        assert torch.equal(new[:, :RATIO], old[:, :RATIO])
        assert torch.equal(new[:, -1], old[:, -1])
    return layers


def largest(source: Path) -> list[list[list[int]]]:
    tensors = load_file(source / "model.safetensors")
    found = []
    for layer in range(LAYERS):
        weight = tensors[ATTENTION.format(layer, "o")].double().view(-1, GROUPS, RATIO, 2 * DIM)
        norms = (weight * tensors[f"model.layers.{layer}.self_attn.subln.weight"].double()).square().sum((0, 3))
        found.append([[int(norms[group].argmax())] for group in range(GROUPS)])
    return found


def require_same_function(capsys: pytest.CaptureFixture[str], source: Path, grown: Path) -> None:
    for check in ((), ("--weights",)):
        outcome = call(capsys, "diff", source, grown, *check)
        assert outcome.code == 0, outcome.out + outcome.err


def test_the_heads_with_the_largest_norm_are_cloned(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grown = source.with_name("grown")
    outcome = call(capsys, "expand", source, grown, "--signal", "4:1", "--select", "norm")
    assert outcome.code == 0, outcome.err
    wanted = largest(source)
    assert len({str(layer) for layer in wanted}) > 1, "layers that choose alike would not show a mix-up"
    assert cloned_more(source, grown) == wanted
    require_same_function(capsys, source, grown)
    recipe = json.loads((grown / "growth.json").read_text())["recipe"]
    assert (recipe["signal"], recipe["select"]) == ("4:1", "norm")


def test_the_heads_of_a_file_are_cloned(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grown, file = source.with_name("grown"), source.with_name("heads.yaml")
    file.write_text('layers:\n  "*": [1, 3, 1]\n  2:\n    - [1, 1, 3]\n    - [2, 1, 2]\n')
    outcome = call(capsys, "expand", source, grown, "--ratio", "5:1", "--select", f"given:{file}")
    assert outcome.code == 0, outcome.err
    assert cloned_more(source, grown) == [
        [[1, 1], [1, 1]], [[1, 1], [1, 1]], [[2, 2], [0, 2]], [[1, 1], [1, 1]],
    ]  # fmt: skip
    require_same_function(capsys, source, grown)


def test_each_layer_is_compared_by_its_own_heads(source: Path) -> None:
    heads = 'layers:\n  0: [2, 1, 1]\n  3: [[1, 2, 1], [1, 1, 2]]\n  "*": [1, 1, 2]\n'
    source.with_name("heads.yaml").write_text(heads)
    recipe = {"signal": "4:1", "select": f"given:{source.with_name('heads.yaml')}", "insert": "after:0"}
    grown = grow(source, source.with_name("grown"), recipe)
    found = compare(source, grown.target, random_tokens(61, seqs=1, length=5, seed=1))
    assert found.first_difference is None
    assert {part.layer for part in found.parts if part.part == "signal heads"} == {0, 2, 3, 4}


def test_the_choice_composes_with_every_width_and_can_be_grown_again(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = source.with_name("first"), source.with_name("second")
    widths = ("--noise-x2", "--hidden-x2", "--ffn-x3", "--untie")
    assert call(capsys, "expand", source, first, "--ratio", "4:1", "--select", "norm", *widths).code == 0
    require_same_function(capsys, source, first)
    assert call(capsys, "expand", first, second, "--ratio", "5:1", "--select", "norm").code == 0
    require_same_function(capsys, first, second)


def test_a_plan_shows_which_heads(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = call(capsys, "plan", source, "--ratio", "4:1", "--select", "norm").out
    assert "Heads of layer 0 of the grown model" in out
    _, _, table = out.partition("Signal heads cloned more than others, by layer\n")
    drawn = [line[line.index("S") :].rstrip() for line in table.partition("\n\n")[0].splitlines()[1:]]
    assert drawn == list(dict.fromkeys(" | ".join(f"S{head}" for (head,) in groups) for groups in largest(source)))
    assert "Heads of every layer" in call(capsys, "plan", source, "--ratio", "4:1").out
    assert "Heads of every layer" in call(capsys, "plan", source, "--ratio", "6:1", "--select", "norm").out


def test_a_file_that_does_not_fit_is_refused(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grown, file = source.with_name("grown"), source.with_name("heads.yaml")
    file.write_text('layers: {"*": [2, 1, 1], 4: [1, 1, 2]}')
    outcome = call(capsys, "expand", source, grown, "--ratio", "4:1", "--select", f"given:{file}")
    assert (outcome.code, outcome.out) == (2, "")
    assert "layer 4: no layer of the source, expected 0 to 3" in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err
    assert not grown.exists()
