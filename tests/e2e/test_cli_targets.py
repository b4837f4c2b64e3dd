"""`--like` and `--budget`: growths that are asked for by what shall come out."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_checkpoint
from tests.command import call
from tests.failure.test_cli_refusals import require_refusal

# 4 groups of 1:1 on 2 KV groups, and the parameters that it has when all is twice as wide.
PLAIN: dict[str, Any] = {"groups": 4, "ratio": 1, "kv_groups": 2, "layers": 4, "activation": "silu"}
BUDGET = "180608"


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


@pytest.mark.parametrize("budget", [BUDGET, "225000"], ids=["widths alone", "depth as well"])
def test_each_growth_that_is_proposed_makes_what_the_table_says(
    budget: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    write_checkpoint(tmp_path / "model", **PLAIN)
    told = json.loads(call(capsys, "plan", tmp_path / "model", "--budget", budget, "--compare", "--json").out)
    assert told["budget"] == int(budget)
    assert list(told["arms"]) == [
        "source", "uniform", "differentiated", "equal parameters", "equal FLOPs", "equal query heads",
    ]  # fmt: skip
    assert any("--depth" in arm["flags"][-1] for arm in list(told["arms"].values())[1:]) == (budget != BUDGET)
    for arm in list(told["arms"].values())[1:]:
        grown = json.loads(call(capsys, "plan", tmp_path / "model", *arm["flags"], "--json").out)["grown"]
        assert {
            "num_parameters": grown["num_parameters"],
            "flops_per_token": grown["matmul_flops_per_token"] + grown["attention_flops_per_token"],
            "kv_cache_bytes_per_token": grown["kv_cache_bytes_per_token"],
            "ratio": grown["heads"]["ratio"],
            "num_query_heads": grown["heads"]["num_query_heads"],
            "num_layers": grown["sizes"]["num_layers"],
            "training_state_bytes": 16 * grown["num_parameters"],
        } == {key: value for key, value in arm.items() if key not in ("recipe", "flags")}


def test_the_table_of_growths_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model", **PLAIN)
    outcome = call(capsys, "plan", tmp_path / "model", "--budget", BUDGET, "--compare")
    assert outcome.code == 0
    lines = [line.split() for line in outcome.out.splitlines()]
    assert all(len(line) <= 80 for line in outcome.out.splitlines() if str(tmp_path) not in line)
    assert ["uniform", "180.61", "K", "12.93", "M", "1.02", "kB", "1:1", "16", "4", "2.89", "MB"] in lines
    assert f"  uniform: gdagrow expand {tmp_path / 'model'} --uniform-x2" in outcome.out.splitlines()
    deeper = call(capsys, "plan", tmp_path / "model", "--budget", "60K", "--compare").out
    assert f"  uniform: gdagrow expand {tmp_path / 'model'} --depth=+1\n" in deeper
    assert "  equal query heads: none, no ratio above the source's up to 5:1 makes 8 query heads\n" in deeper


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--budget 7B", "--budget 7B is the size of growths to compare; add --compare, or ask for a growth"),
        ("--compare", "--compare compares growths to a number of parameters; add it, such as --budget 7B"),
        (
            "--budget 7B --compare --kv-x2 --moments carry",
            "finds growths and plans none; leave a growth, --moments out",
        ),
        ("--budget 7B --compare --like motif-2-12.7b", "finds growths and plans none; leave a growth out"),
        (
            "--budget lots --compare",
            "--budget: expected a number of parameters such as 7B, 700M or 1300000, got 'lots'",
        ),
        ("--budget 1K --compare", "budget 1.00 K: the source has 47.39 K parameters and growth never shrinks it"),
        ("--json", "growth: no growth asked for; give at least one factor above 1, such as --signal-x2"),
    ],
)
def test_what_is_no_comparison(
    flags: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    write_checkpoint(tmp_path / "model", **PLAIN)
    require_refusal(capsys, tmp_path, sentence, "plan", tmp_path / "model", *flags.split())


def test_every_axis_at_once_to_the_sizes_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ratio, noise heads, KV groups, widths that are no multiples, depth and an own head: the same function."""
    source, wanted, grown = tmp_path / "small", tmp_path / "large", tmp_path / "grown"
    write_checkpoint(source, groups=4, kv_groups=2, layers=3, activation="silu", tied=True)
    config = write_checkpoint(
        wanted, groups=8, ratio=4, kv_groups=4, layers=5, activation="silu", hidden=40, ffn=70, tied=False
    )
    asked = ("--like", wanted, "--select", "norm", "--insert", "after:0,2")
    assert call(capsys, "expand", source, grown, *asked, "--quiet").code == 0
    record = json.loads((grown / "growth.json").read_text())
    assert record["recipe"] == {
        "embeddings": "untie", "ffn_to": 70, "hidden_to": 40, "insert": "after:0,2", "kv": 2, "layers": 5, "noise": 2,
        "select": "norm", "signal": "4:1",
    }  # fmt: skip
    # The eps follows the width where new features are zero; a config that says so is reached as well.
    made = json.loads((grown / "config.json").read_text())
    assert made == config | {"rms_norm_eps": 1e-6 * 32 / 40}
    (wanted / "config.json").write_text(json.dumps(made))
    assert call(capsys, "plan", source, *asked).code == 0
    assert call(capsys, "diff", source, grown, "--length", "16").code == 0
    assert call(capsys, "diff", source, grown, "--weights").code == 0
