"""`--like` and `--budget`: growths that are asked for by what shall come out."""

import json
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.command import call
from tests.failure.test_cli_refusals import require_refusal


def test_growing_to_the_sizes_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bytes as the factors give, and a record of the factors."""
    source, wanted = tmp_path / "small", tmp_path / "large"
    write_checkpoint(source, ratio=1, groups=4, kv_groups=4, tied=True)
    config = write_checkpoint(wanted, ratio=4, groups=4, kv_groups=4, hidden=64, ffn=144, tied=False, seed=1)
    flags = ("--signal-x4", "--hidden-x2", "--ffn-x3", "--untie")
    told = call(capsys, "plan", source, "--like", wanted)
    assert told.code == 0
    assert "motif: signal x4, hidden x2, ffn x3, embeddings untied; noise 40 dB down, seed 0" in told.out
    for target, asked in (("like", ("--like", wanted)), ("factors", flags)):
        assert call(capsys, "expand", source, tmp_path / target, *asked, "--quiet").code == 0
    like, factors = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("like", "factors"))
    assert like == factors
    assert json.loads((tmp_path / "like" / "config.json").read_text()) == config
    record = json.loads((tmp_path / "like" / "growth.json").read_text())
    assert record["recipe"] == {"embeddings": "untie", "ffn": 3, "hidden": 2, "signal": 4}
    assert str(wanted) not in (tmp_path / "like" / "growth.json").read_text()
    assert call(capsys, "diff", source, tmp_path / "like", "--length", "16").code == 0


def test_the_output_is_named_for_the_derived_growth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "small")
    write_checkpoint(tmp_path / "large", ffn=96)
    (tmp_path / "recipe.yaml").write_text(f"like: {tmp_path / 'large' / 'config.json'}\nseed: 5\n")
    assert call(capsys, "expand", tmp_path / "small", "--recipe", tmp_path / "recipe.yaml", "--quiet").code == 0
    assert json.loads((tmp_path / "small-ffn-x2" / "growth.json").read_text())["recipe"] == {"ffn": 2, "seed": 5}


def test_every_obstacle_is_told_and_nothing_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model")
    for sentence in (
        "head_dim: the target has 128 and the source 8;",
        "vocab_size: the target has 219520 and the source 61;",
        "rope_theta: the target has 1000000 and the source 10000; only 10000 keeps the function; add --rope-theta",
    ):
        words = ("expand", tmp_path / "model", tmp_path / "grown", "--like", "motif-2-12.7b")
        require_refusal(capsys, tmp_path, sentence, *words)
    require_refusal(capsys, tmp_path, "like nowhere: nowhere cannot be", "plan", tmp_path / "model", "--like=nowhere")
    sentence = "growth: like says all sizes; remove kv or like"
    require_refusal(capsys, tmp_path, sentence, "plan", tmp_path / "model", "--like=motif-2.6b", "--kv-x2")
