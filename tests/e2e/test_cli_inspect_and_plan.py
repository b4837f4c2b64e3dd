"""`gdagrow inspect` and `gdagrow plan`: what they say of a checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from tests.checkpoints import COMPANIONS, TRAINING_STATE, listing, write_checkpoint, write_files
from tests.command import call


def test_inspect_draws_the_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model", groups=4, kv_groups=2, ratio=3)
    lines = [" ".join(line.split()) for line in call(capsys, "inspect", tmp_path / "model").out.splitlines()]
    start = lines.index("KV group query group heads query heads") + 1
    assert lines[start : start + 4] == ["0 0 S S S N 0-3", "1 S S S N 4-7", "1 2 S S S N 8-11", "3 S S S N 12-15"]
    assert "ratio 3:1" in lines


def test_inspect_abbreviates_many_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model", groups=20, ratio=15, kv_groups=1)
    lines = [" ".join(line.split()) for line in call(capsys, "inspect", tmp_path / "model").out.splitlines()]
    assert "... 4 more groups alike" in lines
    assert "19 S S S S S ... 9 more S N 304-319" in lines


def test_inspect_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure by hand: 2 groups of 3:1, 1 KV group, head_dim 8, hidden 32, ffn 48, vocab 61, 2 layers."""
    write_checkpoint(tmp_path / "model", lambda_dtype=torch.float32, max_shard_bytes=20_000)
    told = json.loads(call(capsys, "inspect", tmp_path / "model", "--json").out)
    attention = 8 * 8 * 32 + 2 * 16 * 32 + 32 * 6 * 16 + 4 * 8 + 16
    parameters = {"embedding": 61 * 32, "attention": 2 * attention, "mlp": 2 * (3 * 48 * 32 + 4), "norm": 5 * 32,
                  "head": 61 * 32}  # fmt: skip
    assert told["parameters"] == parameters
    assert told["num_parameters"] == sum(parameters.values())
    assert told["dtypes"] == {"BF16": sum(parameters.values()) - 2 * 4 * 8, "F32": 2 * 4 * 8}
    assert told["weight_bytes"] == 2 * sum(parameters.values()) + 2 * 2 * 4 * 8
    assert told["files"] == {p.name: p.stat().st_size for p in (tmp_path / "model").glob("*.safetensors")}
    assert told["kv_cache_bytes_per_token"] == 2 * (16 + 16) * 2
    matrices = 2 * (8 * 8 * 32 + 2 * 16 * 32 + 32 * 6 * 16 + 3 * 48 * 32) + 61 * 32
    assert told["matmul_flops_per_token"] == 2 * matrices
    assert told["attention_flops_per_token"] == 2 * (6 + 2) * 2 * (8 + 16) * 4096
    assert told["tensor_parallel_degrees"] == [1]
    assert told["heads"]["num_query_heads"] == 8
    assert told["grown"] == []


def test_a_tied_head_is_counted_once_and_multiplied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {}
    for tied in (True, False):
        write_checkpoint(tmp_path / str(tied), tied=tied, groups=4, kv_groups=4)
        told[tied] = json.loads(call(capsys, "inspect", tmp_path / str(tied), "--json").out)
    assert told[False]["num_parameters"] - told[True]["num_parameters"] == 61 * 32
    assert told[False]["matmul_flops_per_token"] == told[True]["matmul_flops_per_token"]
    assert told[True]["tensor_parallel_degrees"] == [1, 2, 4]


def test_plan_tells_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model", companions=True)
    write_files(tmp_path / "model", TRAINING_STATE)
    before = listing(tmp_path)
    told = json.loads(call(capsys, "plan", tmp_path / "model", "--signal-x2", "--hidden-x2", "--json").out)
    assert told["shapes"]["model.layers.1.self_attn.q_proj.weight"] == {"source": [64, 32], "grown": [112, 64]}
    assert told["source"]["heads"]["ratio"] == 3
    assert told["grown"]["heads"]["ratio"] == 6
    assert told["grown"]["sizes"]["hidden"] == 64
    assert told["grown"]["kv_cache_bytes_per_token"] == told["source"]["kv_cache_bytes_per_token"]
    assert told["companions"]["copied"] == sorted(COMPANIONS)
    reason = "training state of the source, wrong beside grown weights"
    assert told["companions"]["left_behind"]["optimizer.bin"] == reason
    assert told["learning_rate_multipliers"]["model.layers.{layer}.self_attn.o_proj.weight"] == 0.5
    assert told["learning_rate_multipliers"]["lm_head.weight"] == 0.5
    assert "model.layers.{layer}.mlp.down_proj.weight" not in told["learning_rate_multipliers"]
    assert told["hints"][0].startswith("the ratio 6:1 is above 5:1")
    assert 30e6 < told["peak_memory_bytes"] < 300e6
    assert listing(tmp_path) == before


def test_plan_tells_the_files_that_expand_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model", tied=True)
    words = tmp_path / "model", "--uniform-x3", "--untie", "--max-shard-size", "40kB"
    told = json.loads(call(capsys, "expand", *words, "--dry-run", "--json").out)
    call(capsys, "expand", *words)
    grown = tmp_path / "model-uniform-x3-untied"
    assert told["grown"]["files"] == {p.name: p.stat().st_size for p in grown.glob("*.safetensors")}
    again = json.loads(call(capsys, "inspect", grown, "--json").out)
    assert {key: again[key] for key in told["grown"]} == told["grown"]
