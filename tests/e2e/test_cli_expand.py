"""`gdagrow expand` and `gdagrow diff` on small checkpoints, as a user types them."""

import json
from math import exp
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import COMPANIONS, TRAINING_STATE, UNKNOWN_KEYS, listing, write_checkpoint, write_files
from tests.command import call, run

RECIPES = Path(__file__).parents[2] / "recipes"


def figures(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, object]:
    """The JSON that a command prints."""
    outcome = call(capsys, *words, "--json")
    assert outcome.err == ""
    parsed: dict[str, object] = json.loads(outcome.out)
    return parsed


def test_expand_and_diff_as_processes(tmp_path: Path) -> None:
    """The two commands of the README: the output is whole, and computes the same."""
    source, grown = tmp_path / "model", tmp_path / "model-signal-x2"
    write_checkpoint(source, companions=True, max_shard_bytes=20_000)
    write_files(source, TRAINING_STATE)
    before = listing(source)
    outcome = run("expand", f"{source}/", "--signal-x2", "--max-shard-size", "30kB")
    assert (outcome.code, outcome.err) == (0, "")
    assert listing(source) == before
    assert f"wrote {grown}\n" in outcome.out
    assert f"gdagrow diff {source} {grown}\n" in outcome.out
    assert "learning-rate multipliers" in outcome.out
    assert "hint: the ratio 6:1 is above 5:1" in outcome.out
    assert "optimizer.bin" in outcome.out
    written = listing(grown)
    weights = {name for name in written if name.endswith(".safetensors")}
    assert weights == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    beside = {"config.json", "growth.json", "model.safetensors.index.json", "assets"}
    assert set(written) == weights | beside | set(COMPANIONS)
    assert {name: written[name] for name in COMPANIONS} == COMPANIONS
    config = json.loads((grown / "config.json").read_text())
    assert config["num_attention_heads"] == 14
    assert {key: config[key] for key in UNKNOWN_KEYS} == UNKNOWN_KEYS
    same = run("diff", source, grown)
    assert (same.code, same.err) == (0, "")
    assert same.out.startswith("the same function")


@pytest.mark.parametrize(
    ("written", "name"),
    [("model", "model-kv-x2"), ("model///", "model-kv-x2"), ("./model/.", "model-kv-x2"),
     ("model/../model", "model-kv-x2"), ("link", "link-kv-x2"), (".", "model-kv-x2")],
)  # fmt: skip
def test_the_default_output_stands_beside_the_source(
    written: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path / "model" if written == "." else tmp_path)
    assert call(capsys, "expand", written, "--kv-x2").code == 0
    assert (tmp_path / name / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "factors"),
    [
        ("--signal-x2", {"signal": 2}),
        ("--signal-x 2 --kv-x=2", {"signal": 2, "kv": 2}),
        ("--hidden-x3 --ffn-x 5", {"hidden": 3, "ffn": 5}),
        ("--uniform-x2", dict.fromkeys(("signal", "noise", "kv", "hidden", "ffn"), 2)),
        ("--ratio 4:1", {"signal": "4:1"}),
        (f"--recipe {RECIPES}/signal-x2.yaml", {"signal": 2}),
        (f"--recipe {RECIPES}/signal-x2.yaml --signal-x4 --ffn-x2", {"signal": 4, "ffn": 2}),
        (f"--recipe {RECIPES}/signal-x2.yaml --ratio 4:1", {"signal": "4:1"}),
        ("--kv-x2 --exact-copies", {"kv": 2}),
        ("--hidden-x2 --snr-db 30 --seed 7", {"hidden": 2}),
    ],
)
def test_every_way_to_type_a_growth(
    flags: str, factors: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is grown is what was asked for, and the same function."""
    source, grown = tmp_path / "model", tmp_path / "grown"
    write_checkpoint(source, tied=True, dtype=torch.float32)
    told = figures(capsys, "expand", source, grown, *flags.split())
    ones = dict.fromkeys(("signal", "noise", "kv", "hidden", "ffn"), 1)
    assert told["factors"] == {**ones, **factors}
    assert told["output"] == str(grown)
    assert figures(capsys, "diff", source, grown, "--seqs", 2, "--length", 16)["equivalent"] is True


@pytest.mark.parametrize(("flag", "tied"), [("--untie", False), ("--keep-tied", True)])
def test_tied_embeddings(flag: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model", tied=True)
    call(capsys, "expand", tmp_path / "model", tmp_path / "grown", "--hidden-x2", flag)
    assert ("lm_head.weight" in load_file(tmp_path / "grown" / "model.safetensors")) is not tied
    assert call(capsys, "diff", tmp_path / "model", tmp_path / "grown", "--length", 8).code == 0


def test_the_seed_decides_the_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model")
    bytes_of = []
    for number, seed in enumerate((1, 1, 2)):
        call(capsys, "expand", tmp_path / "model", tmp_path / str(number), "--signal-x2", "--seed", seed)
        bytes_of.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]


def test_json_is_one_object_and_quiet_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model", companions=True)
    told = figures(capsys, "expand", tmp_path / "model", tmp_path / "a", "--signal-x2")
    record = json.loads((tmp_path / "a" / "growth.json").read_text())
    assert told["files"] == record["output"]["files"]
    assert told["learning_rate_multipliers"] == {"model.layers.{layer}.self_attn.o_proj.weight": 0.5}
    quiet = call(capsys, "expand", tmp_path / "model", tmp_path / "b", "--signal-x2", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_a_dry_run_is_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model", companions=True)
    before = listing(tmp_path)
    for more in ((), ("--json",)):
        dry = call(capsys, "expand", tmp_path / "model", "--signal-x2", "--dry-run", *more)
        plan = call(capsys, "plan", tmp_path / "model", "--signal-x2", *more)
        assert dry == plan
        assert dry.code == 0
    split = figures(capsys, "expand", tmp_path / "model", "--signal-x2", "--dry-run", "--max-shard-size", "20kB")
    assert split["grown"]["num_parameters"] == 34_888  # type: ignore[index]
    assert len(split["grown"]["files"]) == 5  # type: ignore[index]
    assert listing(tmp_path) == before


def test_growing_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A grown checkpoint grows again, and says where it came from."""
    write_checkpoint(tmp_path / "m")
    call(capsys, "expand", tmp_path / "m", "--ratio", "4:1")
    call(capsys, "expand", tmp_path / "m-ratio-4to1", "--hidden-x2", "--exact-copies")
    twice = tmp_path / "m-ratio-4to1-hidden-x2"
    assert call(capsys, "diff", tmp_path / "m", twice, "--length", 16).code == 0
    lines = call(capsys, "inspect", twice).out.splitlines()
    assert lines[2] == "grown from m: signal to 4:1; noise 40 dB down, seed 0 (gdagrow 0.1.0)"
    assert lines[3] == "grown from m-ratio-4to1: hidden x2; exact copies (gdagrow 0.1.0)"


def test_diff_finds_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, in words and in JSON, with the figures."""
    write_checkpoint(tmp_path / "a", dtype=torch.float32)
    call(capsys, "expand", tmp_path / "a", tmp_path / "b", "--signal-x2")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    tensors["lm_head.weight"][3] *= 1.001
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    outcome = call(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert outcome.code == 1
    assert outcome.out.startswith("different")
    told = figures(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert told["equivalent"] is False
    assert 1e-5 < told["max_rel"] < 1e-2  # type: ignore[operator]
    assert {"max_abs", "kl", "top1_agreement", "tolerance"} <= set(told)
    assert [change["what"] for change in told["changes"]] == ["ratio", "signal heads", "parameters"]  # type: ignore


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_diff_in_shorter_dtypes(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "a")
    call(capsys, "expand", tmp_path / "a", tmp_path / "b", "--signal-x2")
    told = figures(capsys, "diff", tmp_path / "a", tmp_path / "b", "--dtype", dtype)
    assert (told["equivalent"], told["dtype"]) == (True, dtype)


def test_diff_on_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bytes of a text where the checkpoint has no tokenizer."""
    write_checkpoint(tmp_path / "a", vocab=256)
    call(capsys, "expand", tmp_path / "a", tmp_path / "b", "--kv-x2")
    (tmp_path / "text").write_text("to be, or not to be, that is the question")
    words = "diff", tmp_path / "a", tmp_path / "b", "--text", tmp_path / "text", "--seqs", 3, "--length", 10
    told = figures(capsys, *words)
    assert (told["equivalent"], told["num_sequences"], told["length"]) == (True, 3, 10)
    shown = call(capsys, *words).out
    assert f"perplexity a token, source and grown   {exp(told['source_loss']):.6g}" in shown  # type: ignore[arg-type]
    assert "the same 4 tokens after 10" in shown
    assert "perplexity" not in call(capsys, *words[:3]).out


def test_diff_says_where_the_models_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In words, in a table of every layer and in JSON."""
    write_checkpoint(tmp_path / "a", layers=14)
    words = "diff", tmp_path / "a", tmp_path / "b", "--logits", "--decode", 0
    call(capsys, "expand", tmp_path / "a", tmp_path / "b", "--signal-x2")
    lines = call(capsys, *words).out.splitlines()
    assert lines[0] == "the same function: within what rounding alone may do"
    assert "  ... and 2 layers further from theirs; --json lists all" in lines
    assert not any("greedy" in line for line in lines)
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    # Group 1 has its 3 source heads twice and a noise head: row 8 of its second head, after the 7 of group 0.
    tensors["model.layers.11.self_attn.q_proj.weight"][8 * (7 + 1)] *= 2
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    outcome = call(capsys, *words)
    assert outcome.code == 1
    first, second = outcome.out.splitlines()[:2]
    assert first == "different: beyond what rounding alone may do"
    assert second.startswith("  layer 11 self_attn: signal head 1 of group 1 differs by ")
    row = next(line.split() for line in outcome.out.splitlines() if line.startswith("     11 "))
    assert [row[i + 1 : i + 2] == ["!"] for i, _ in enumerate(row)].count(True) == 5
    # In layer 11 all but the noise heads, and everything in the two layers after it.
    assert "  ! beyond its tolerance: 17 of 84 parts" in outcome.out
    told = figures(capsys, *words)
    assert told["first_difference"]["head"] == "signal head 1 of group 1"  # type: ignore[index]
    assert len(told["parts"]) == 1 + 14 * 6  # type: ignore[arg-type]


def test_gradients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 and 1, in words and in JSON, with what can be carried."""
    write_checkpoint(tmp_path / "a")
    call(capsys, "expand", tmp_path / "a", tmp_path / "b", "--signal-x2", "--noise-x2")
    words = "diff", tmp_path / "a", tmp_path / "b", "--gradients"
    outcome = call(capsys, *words)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[:2] == [
        "the same gradients: those of all copies make up the source's",
        "  optimizer moments can be carried exactly for 33 of 35 tensors",
    ]
    rows = {line.split()[0]: line.split() for line in reversed(lines) if line.startswith("  ")}
    assert rows["self_attn.k_proj.weight"][-1] == "exact"
    assert rows["self_attn.q_proj.weight"][-1] == "off"
    assert any(line.startswith("Moments that cannot be carried exactly: parts of a split differ") for line in lines)
    assert max(map(len, lines)) <= 80
    told = figures(capsys, *words)
    assert (told["num_sequences"], told["length"], told["equivalent"]) == (2, 32, True)
    assert len(told["tensors"]) == 35  # type: ignore[arg-type]
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0] *= 2
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    outcome = call(capsys, *words)
    assert outcome.code == 1
    assert outcome.out.startswith("different: beyond what rounding alone may do")
    assert "tensors differ, the first of the backward pass: " in outcome.out


def test_the_certificate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 and 1, in words and in JSON, with the tensor and the head named."""
    write_checkpoint(tmp_path / "a")
    assert f"gdagrow diff {tmp_path / 'a'} {tmp_path / 'b'} --weights\n" in (
        call(capsys, "expand", tmp_path / "a", tmp_path / "b", "--signal-x2").out
    )
    words = "diff", tmp_path / "a", tmp_path / "b", "--weights"
    outcome = call(capsys, *words)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines() == [
        "the same function: every weight folds back onto the source, bit for bit",
        "  35 tensors of 34,888 weights checked, maps from growth.json",
    ]
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][8 * 9] *= 2
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "rope_theta": 5}))
    outcome = call(capsys, *words)
    assert outcome.code == 1
    lines = [line.split() for line in outcome.out.splitlines()]
    assert ["rope_theta", "10000.0", "5"] in lines
    assert "model.layers.1.self_attn.q_proj.weight: 32 wrong, by" in outcome.out
    assert "signal head 2 of group 1: row 72 from 48 of the source, column 0 from 0" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80
    told = figures(capsys, *words)
    assert told["equivalent"] is False
    assert [d["num_wrong"] for d in told["differences"]] == [32]  # type: ignore[attr-defined]
