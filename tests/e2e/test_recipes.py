"""Every recipe of the repository, run by the command line on a small model of the kind that it is for."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_checkpoint
from tests.command import call

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
MOTIF_12_7B = RECIPES[0].with_name("motif-2.6b-to-12.7b.yaml")

# (signal heads, noise heads, KV groups, hidden, FFN, layers) from 6, 2, 1, 32, 48, 2 at 3:1, or from 4, 4, 4, 64, 48, 2
# at 1:1.
GROWN = {
    "signal-x2": (12, 2, 1, 32, 48, 2),
    "uniform-x2": (12, 4, 2, 64, 96, 2),
    "ratio-4to1": (8, 2, 1, 32, 48, 2),
    "motif-2.6b-to-12.7b": (16, 4, 4, 128, 96, 10),
}


def write_small_motif(directory: Path, rope_theta: float) -> None:
    """Motif-2.6B but for its sizes, with some base of RoPE."""
    config = write_checkpoint(directory, plain=True, ratio=1, groups=4, kv_groups=4, hidden=64, tied=True)
    (directory / "config.json").write_text(json.dumps({**config, "rope_theta": rope_theta}))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_makes_what_it_says(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if recipe == MOTIF_12_7B:
        write_small_motif(tmp_path / "model", rope_theta=1e6)
    else:
        write_checkpoint(tmp_path / "model")
    assert call(capsys, "expand", tmp_path / "model", tmp_path / "grown", "--recipe", recipe, "--quiet").code == 0
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    noise = config.get("num_noise_heads", config["num_attention_heads"] // 2)
    assert GROWN[recipe.stem] == (
        config["num_attention_heads"] - noise, noise, config["num_key_value_heads"] // 2,
        config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"],
    )  # fmt: skip
    assert call(capsys, "diff", tmp_path / "model", tmp_path / "grown", "--length", "16").code == 0


def test_the_base_of_rope_is_all_that_changes_motifs_function(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_small_motif(tmp_path / "model", rope_theta=5e5)
    assert call(capsys, "expand", tmp_path / "model", tmp_path / "grown", "--recipe", MOTIF_12_7B, "--quiet").code == 0
    outcome = call(capsys, "diff", tmp_path / "model", tmp_path / "grown", "--weights", "--json")
    assert outcome.code == 1
    found: dict[str, Any] = json.loads(outcome.out)
    assert found["differences"] == []
    assert [(setting["key"], setting["grown"]) for setting in found["settings"]] == [("rope_theta", 1e6)]
