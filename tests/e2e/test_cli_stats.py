"""`gdagrow stats` as users run it."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdagrow.verify.attention import attention_stats
from gdagrow.verify.clones import clone_similarity
from gdagrow.verify.tokens import random_tokens, text_tokens
from tests.checkpoints import write_checkpoint
from tests.command import call
from tests.e2e.test_output_looks import on_a_terminal
from tests.growths import grow

RUN = ("--seqs", "2", "--length", "30")


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """Two groups of four signal heads from two of two, hidden twice as wide, the same vocabulary as bytes."""
    write_checkpoint(tmp_path / "source", groups=2, ratio=2, kv_groups=2, vocab=256, layers=2)
    grow(tmp_path / "source", tmp_path / "grown", {"signal": 2, "hidden": 2})
    return tmp_path / "grown"


def train(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("q_proj.weight"):
            tensor += torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor.dtype)
    save_file(tensors, directory / "model.safetensors")


def section(text: str, heading: str) -> list[str]:
    """The lines under a heading that starts so, without their indentation."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading))
    rest = lines[start + 1 :]
    end = next((i for i, line in enumerate(rest) if line and not line.startswith(" ")), len(rest))
    return [line.strip() for line in rest[:end]]


def test_a_line_a_layer_and_what_copies_have_become(grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = call(capsys, "stats", grown, *RUN)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[0] == str(grown)
    attention = section(outcome.out, "Attention on 2 x 30 random tokens, computed in float32")
    assert attention[1] == "spread evenly: entropy 3.21 nats, 4.1% on the top 1%, 7.7% on the top 5%"
    stats = attention_stats(grown, random_tokens(256, seqs=2, length=30, seed=0))
    for line, layer in zip(attention[-3:-1], stats.layers, strict=True):
        cells = line.split()
        assert cells[:3] == [str(layer.layer), f"{layer.lambda_:.3f}", f"{layer.lambda_init:.3f}"]
        assert cells[3] == f"{sum(layer.signal.entropy) / 8:.2f}"
        assert cells[8] == f"{sum(layer.difference.top_5_percent) / 8:.1%}"
        assert cells[9] == f"{sum(layer.difference.negative or ()) / 8:.1%}"
    clones = section(outcome.out, "Clone similarity")
    assert clones[0] == "copies have not parted: equal in all that the layers write"
    assert re.fullmatch(r"the parts of split weights: distance [12]\.\d\d%, cosine 0\.999\d{3} on average", clones[1])
    assert [line.split() for line in clones if "copies" in line][1:4] == [
        ["model.embed_tokens", "hidden", "copies", "1", "1", "0"],
        ["self_attn.q_proj", "signal", "copies", "1", "1", "0"],
        ["self_attn.o_proj", "hidden", "copies", "1", "1", "0"],
    ]
    assert clones[-1] == f"lineage: {grown / 'growth.json'}"


def test_every_head_of_one_layer(grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = call(capsys, "stats", grown, *RUN, "--layer", 1).out
    heads = section(out, "Attention of layer 1 on 2 x 30 random tokens")
    layer = attention_stats(grown, random_tokens(256, seqs=2, length=30, seed=0)).layers[1]
    assert heads[0] == f"lambda {layer.lambda_:.3f}, lambda_init {layer.lambda_init:.3f}"
    names = [line for line in heads if line.startswith(("signal", "noise", "group"))]
    assert [" ".join(line.split()[:3]) for line in names if line.startswith("signal")] == [
        f"signal head {j}" for _ in range(2) for j in range(4)
    ]
    last = names[-2].split()
    assert last[3:5] == [f"{layer.signal.entropy[7]:.2f}", f"{layer.difference.entropy[7]:.2f}"]
    noise = names[-1].split()
    assert noise == ["noise", "head", f"{layer.noise.entropy[1]:.2f}", f"{layer.noise.top_1_percent[1]:.1%}",
                     f"{layer.noise.top_5_percent[1]:.1%}"]  # fmt: skip
    clones = section(out, "Clone similarity of the heads of layer 1")
    assert "self_attn.q_proj, copies" in clones
    assert sum(line.startswith("signal head") for line in clones) == 2 * 4


def test_copies_that_have_parted(grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(grown)
    (grown / "growth.json").rename(tmp_path / "kept.json")
    out = call(capsys, "stats", grown, *RUN).out
    told = " ".join(section(out, "Clone similarity"))
    assert told == ("no growth.json: nothing says that this model was grown; --lineage PATH names the file if it was")
    out = call(capsys, "stats", grown, *RUN, "--lineage", tmp_path / "kept.json").out
    parted, equal, _, *_ = section(out, "Clone similarity")
    assert re.fullmatch(r"copies have parted: distance \d\d\.\d\d%, cosine 0\.\d{6} on average", parted)
    # Norms, o_proj, down_proj and the embedding are as they were; q_proj is not, in either layer.
    assert equal == "still equal: 10 of 12 places, each a tensor along one axis"


def test_copies_without_any_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "source", vocab=256)
    grow(tmp_path / "source", tmp_path / "grown", {"signal": 2, "exact_copies": True})
    clones = section(call(capsys, "stats", tmp_path / "grown", *RUN).out, "Clone similarity")
    assert clones[1] == "nor have the parts of split weights: such copies stay equal in training"


def test_json_holds_all_of_it(grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("some text to run on, long enough for two sequences of thirty tokens")
    content = json.loads(call(capsys, "stats", grown, *RUN, "--text", tmp_path / "t.txt", "--json").out)
    tokens = text_tokens(tmp_path / "t.txt", grown, 256, seqs=2, length=30)
    clones = clone_similarity(grown)
    assert clones is not None
    expected = {"attention": attention_stats(grown, tokens).as_dict(), "clones": clones.as_dict()}
    assert content == json.loads(json.dumps(expected))
    layer = content["attention"]["layers"][1]
    assert layer.keys() == {"layer", "lambda", "lambda_init", "signal", "noise", "difference"}
    assert (len(layer["signal"]["entropy"]), len(layer["noise"]["entropy"])) == (8, 2)
    assert layer["signal"]["negative"] is None
    source = json.loads(call(capsys, "stats", tmp_path / "source", *RUN, "--json").out)
    assert source["clones"] is None


def test_the_seed_is_that_of_the_tokens(grown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (
        call(capsys, "stats", grown, *RUN, "--json", "--seed", seed, "--dtype", "float64").out for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert json.loads(first)["attention"]["dtype"] == "float64"


def test_progress_is_shown_on_a_terminal(grown: Path) -> None:
    assert "attention of layer 2 of 2" in on_a_terminal("stats", grown, *RUN)


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("flags", ["", "--layer 1"])
def test_copies_of_every_kind_fit(
    flags: str, width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "source", groups=12, ratio=2, kv_groups=12, bias=True)
    grow(tmp_path / "source", tmp_path / "grown", {"uniform": 2})
    monkeypatch.setenv("COLUMNS", str(width))
    lines = call(capsys, "stats", tmp_path / "grown", *RUN, *flags.split()).out.splitlines()
    assert len(lines) > 40
    assert [line for line in lines if len(line) > width and str(tmp_path) not in line] == []
    assert not any(re.search(r"[\x00-\x1f\x7f-\x9f]", line) for line in lines)
