"""Every recipe of the repository, run by the command line on a small model of the kind that it is for."""

import json
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.command import call

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

# (signal heads, noise heads, KV groups, hidden, FFN) from 6, 2, 1, 32, 48 at 3:1, or from 4, 4, 4, 64, 48 at 1:1.
GROWN = {
    "signal-x2": (12, 2, 1, 32, 48),
    "uniform-x2": (12, 4, 2, 64, 96),
    "ratio-4to1": (8, 2, 1, 32, 48),
    "motif-2.6b-to-12.7b-width": (16, 4, 4, 128, 96),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_makes_what_it_says(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if recipe.stem.startswith("motif-2.6b"):
        write_checkpoint(tmp_path / "model", plain=True, ratio=1, groups=4, kv_groups=4, hidden=64, tied=True)
    else:
        write_checkpoint(tmp_path / "model")
    assert call(capsys, "expand", tmp_path / "model", tmp_path / "grown", "--recipe", recipe, "--quiet").code == 0
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    noise = config.get("num_noise_heads", config["num_attention_heads"] // 2)
    assert GROWN[recipe.stem] == (
        config["num_attention_heads"] - noise, noise, config["num_key_value_heads"] // 2,
        config["hidden_size"], config["intermediate_size"],
    )  # fmt: skip
    assert call(capsys, "diff", tmp_path / "model", tmp_path / "grown", "--length", "16").code == 0
