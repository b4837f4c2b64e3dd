"""The commands on a DiffLlama checkpoint: what they print, where they write, what the record and JSON say."""

import json
from pathlib import Path

import pytest
import torch

from tests.command import call
from tests.diffllama import TOPOLOGIES, save_diffllama


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_diffllama(tmp_path / "model", TOPOLOGIES[1], dtype=torch.bfloat16)
    return tmp_path / "model"


def test_inspect_numbers_the_heads_as_the_checkpoint_does(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = call(capsys, "inspect", model).out.splitlines()
    assert "diffllama: differential attention, 2 layers, tied embeddings" in lines
    at = next(i for i, line in enumerate(lines) if "query heads" in line)
    assert [line.split() for line in lines[at + 1 : at + 5]] == [
        ["0", "0", "S", "N", "0,", "4"], ["1", "S", "N", "1,", "5"],
        ["1", "2", "S", "N", "2,", "6"], ["3", "S", "N", "3,", "7"],
    ]  # fmt: skip


def test_plan_says_what_a_conversion_makes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = call(capsys, "plan", model, "--to", "motif", "--signal-x2").out
    assert "motif: diffllama to motif, signal x2, embeddings stay tied; noise 40 dB down, seed 0" in " ".join(
        out.split()
    )
    (row,) = [line.split() for line in out.splitlines() if line.startswith("    self_attn.subln.weight")]
    assert row == ["self_attn.subln.weight", "8"], "no shape in the source"
    hint = "self_attn.lambda_q1, self_attn.lambda_k1, self_attn.subln.weight (it is made in the conversion"
    assert hint in " ".join(out.split())
    out = call(capsys, "plan", model, "--to", "motif").out
    assert "motif: diffllama to motif, embeddings stay tied\n" in out, "nothing is split, so there is no noise"


def test_expand_names_its_output_after_what_it_did(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, name in (("--uniform-x2", "uniform-x2"), ("--to motif", "to-motif"),
                        ("--to motif --ratio 3:1 --hidden-x2", "to-motif-ratio-3to1-hidden-x2")):  # fmt: skip
        outcome = call(capsys, "expand", model, *flags.split())
        assert (outcome.code, outcome.err) == (0, "")
        target = model.with_name(f"model-{name}")
        assert outcome.out.startswith(f"wrote {target}\n")
        for weights in ((), ("--weights",)):
            assert call(capsys, "diff", model, target, *weights).code == 0
    grown = call(capsys, "inspect", target).out
    assert "motif: grouped differential attention, 2 layers, tied embeddings" in grown
    assert "grown from model: diffllama to motif, signal to 3:1, hidden x2; noise 40 dB down, seed 0" in grown


def test_the_json_of_a_conversion(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(call(capsys, "expand", model, model.parent / "out", "--to", "motif", "--json").out)
    assert (told["architecture"], told["converted_from"], told["recipe"]) == ("motif", "diffllama", {"to": "motif"})
    shapes = told["shapes"]
    assert shapes["model.layers.0.self_attn.subln.weight"] == {"source": None, "grown": [8]}
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == {"source": [32, 32], "grown": [32, 32]}
    assert told["source"]["dtypes"].keys() == {"BF16"}
    assert told["grown"]["dtypes"]["F64"] == 2 * (8 + 4 + 4)
    (growth,) = json.loads(call(capsys, "inspect", model.parent / "out", "--json").out)["grown"]
    assert (growth["converted_from"], growth["architecture"], growth["source"]) == ("diffllama", "motif", "model")


def test_a_recipe_may_convert(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model.parent / "recipe.yaml").write_text("to: motif\nsignal: 4\n")
    assert call(capsys, "expand", model, model.parent / "out", "--recipe", model.parent / "recipe.yaml").code == 0
    config = json.loads((model.parent / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_noise_heads"], config["num_attention_heads"]) == ("motif", 4, 20)


def test_the_output_of_a_conversion_is_in_shards_too(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model.parent / "out"
    words = "expand", model, out, "--to", "motif", "--signal-x2", "--max-shard-size", "10kB", "--quiet"
    assert call(capsys, *words).code == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert call(capsys, "diff", model, out, "--weights").code == 0
    assert call(capsys, "expand", out, model.parent / "again", "--uniform-x2", "--quiet").code == 0
    assert call(capsys, "diff", model, model.parent / "again", "--weights").code == 0
