"""Odd but valid checkpoints are read, or refused by name; values that are not finite are passed on and told."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gdagrow.expand import expand
from gdagrow.growing import grow_checkpoint, prepare_growth
from gdagrow.recipe import make_recipe
from tests.checkpoints import edit, listing, write_checkpoint, write_training_state
from tests.command import call

TINY: dict[str, Any] = {"groups": 1, "ratio": 3, "head_dim": 2, "hidden": 4, "ffn": 4, "vocab": 5, "layers": 1}
LAMBDA = "model.layers.0.self_attn.lambda_q1"
HEAD, EMBEDDING, Q_PROJ = "lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
QUANTISED = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8}


# Dtypes, metadata, shapes


@pytest.mark.parametrize("code", QUANTISED)
def test_quantised_tensors_are_refused_by_name(code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "weight", **TINY)
    edit(tmp_path / "weight", lambda tensors: tensors.update({HEAD: tensors[HEAD].to(QUANTISED[code])}))
    write_checkpoint(tmp_path / "beside", **TINY)
    edit(tmp_path / "beside", lambda tensors: tensors.update({"head_scale": torch.zeros(2).to(QUANTISED[code])}))
    sentences = {
        "weight": f"{HEAD} is stored as {code}, expected one of F64, F32, BF16, F16",
        "beside": f"unknown head_scale ({code})",
    }
    for name, sentence in sentences.items():
        for command in (("inspect",), ("plan", "--signal-x2"), ("expand", tmp_path / "out", "--signal-x2")):
            outcome = call(capsys, command[0], tmp_path / name, *command[1:])
            assert (outcome.code, outcome.err.count("\n")) == (2, 1)
            assert sentence in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("made", [torch.zeros(0, 3), torch.zeros(())], ids=["empty", "without dimensions"])
def test_tensors_that_the_table_has_not_are_refused_by_name(
    made: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, **TINY)
    edit(tmp_path, lambda tensors: tensors.update({"extra": made}))
    assert "unknown extra" in call(capsys, "plan", tmp_path, "--signal-x2").err


def test_dtypes_may_differ_from_tensor_to_tensor_and_metadata_is_kept(tmp_path: Path) -> None:
    model, grown = tmp_path / "model", tmp_path / "grown"
    write_checkpoint(model, **TINY)
    tensors = load_file(model / "model.safetensors")
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    tensors = {name: tensor.to(dtypes[at % 4]) for at, (name, tensor) in enumerate(tensors.items())}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt", "made by": "somebody, 日本"})
    grow_checkpoint(model, grown, make_recipe({"uniform": 2}))
    written = load_file(grown / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in written.items()} == {n: t.dtype for n, t in tensors.items()}
    with safe_open(grown / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "made by": "somebody, 日本"}


# Names and places


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "a b.safetensors", "日本.safetensors", "-x.bin", f"{'x' * 240}.safetensors"]
)
def test_shards_may_have_any_plain_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model", **TINY)
    whole = tmp_path / "model/model.safetensors"
    index = {"weight_map": dict.fromkeys(load_file(whole), name)}
    whole.rename(tmp_path / "model" / name)
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    assert call(capsys, "expand", tmp_path / "model", tmp_path / "grown", "--signal-x2").code == 0
    assert os.listdir(tmp_path / "grown").count(name) == 0
    assert call(capsys, "diff", tmp_path / "model", tmp_path / "grown", "--weights").code == 0


@pytest.mark.parametrize(
    "name", ["weights/a.safetensors", "../a.safetensors", "/a.safetensors", "a\\b", "a\0b", "x" * 5000]
)
def test_shards_elsewhere_are_refused_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model", **TINY)
    (tmp_path / "model/model.safetensors").unlink()
    index = {"weight_map": {HEAD: name}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    outcome = call(capsys, "inspect", tmp_path / "model")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "expected plain file names in weight_map" in outcome.err or "has no file xxx" in outcome.err


NAMES = (
    "a b",
    "näive 日本",
    "-x",
    "--json",
    "x" * 200,
    "a'b\"c",
    "new\nline",
    os.fsdecode(b"not-utf-8-\xff"),
    "$(x) [1] {2}",
)


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_directory_will_do(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / name, tmp_path / f"{name} grown"
    write_checkpoint(source, **TINY, companions=True)
    (source / f"{name}.txt").write_text("beside")
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text("signal: 2\n")
    for words in (
        ("inspect", source), ("expand", source, target, "--recipe", recipe), ("inspect", target),
        ("inspect", target, "--json"), ("diff", source, target, "--weights"),
    ):  # fmt: skip
        outcome = call(capsys, *words)
        assert outcome.code == 0, (words, outcome)
    assert (target / f"{name}.txt").read_text() == "beside"
    assert json.loads((target / "growth.json").read_bytes())["source"]["name"] == name


def test_a_name_that_begins_with_a_dash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "-x", **TINY)
    assert call(capsys, "inspect", "-x").code == 2
    assert call(capsys, "inspect", "--", "-x").code == 0
    assert call(capsys, "inspect", "./-x").code == 0


@pytest.mark.parametrize("how", ["link", "slash", "dot", "dots"])
def test_a_source_may_be_reached_in_any_way(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "model", **TINY, companions=True)
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path / "model")
    given = {"link": str(tmp_path / "link"), "slash": f"{tmp_path}/model/", "dot": ".", "dots": "../model/../link/"}[
        how
    ]
    assert call(capsys, "expand", given, tmp_path / "grown", "--signal-x2").code == 0
    assert json.loads((tmp_path / "grown/growth.json").read_bytes())["source"]["name"] == "model"
    assert (tmp_path / "grown/tokenizer.json").exists()


def test_a_source_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model", **TINY)
    before = listing(tmp_path / "model")
    for path in (tmp_path / "model").iterdir():
        path.chmod(0o444)
    (tmp_path / "model").chmod(0o555)
    try:
        assert call(capsys, "expand", tmp_path / "model", tmp_path / "grown", "--signal-x2").code == 0
        assert listing(tmp_path / "model") == before
    finally:
        (tmp_path / "model").chmod(0o755)


def test_a_config_in_another_order_and_with_other_line_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_checkpoint(tmp_path / "model", **TINY)
    text = json.dumps(dict(reversed(config.items())), indent="\t").replace("\n", "\r\n")
    (tmp_path / "model/config.json").write_bytes(f"\r\n {text}\r\n".encode())
    assert call(capsys, "expand", tmp_path / "model", tmp_path / "grown", "--signal-x2").code == 0
    grown = json.loads((tmp_path / "grown/config.json").read_bytes())
    assert list(grown)[: len(config)] == list(reversed(config))


def test_a_config_with_half_a_letter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON can spell half a surrogate pair, which is no UTF-8; it is written as it was spelled."""
    write_checkpoint(tmp_path / "model", **TINY)
    path = tmp_path / "model/config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"näive é"', '"\\ud800"'))
    for words in (("inspect",), ("inspect", "--json"), ("expand", tmp_path / "grown", "--signal-x2")):
        assert call(capsys, words[0], tmp_path / "model", *words[1:]).code == 0
    assert json.loads((tmp_path / "grown/config.json").read_bytes())["x_note"] == "\ud800"


# Values that are not finite

ODD = (float("nan"), float("inf"), -float("inf"), -0.0, 1e-40)
GROWTHS: dict[str, dict[str, Any]] = {
    "signal": {"signal": 2}, "exact": {"uniform": 2, "exact_copies": True}, "noise": {"uniform": 2},
    "three": {"hidden": 3, "ffn": 3}, "uneven": {"signal": "4:1"}, "fresh": {"hidden_to": 6}, "deeper": {"depth": 2},
}  # fmt: skip


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=["bf16", "fp32", "fp16"])
def test_values_that_are_not_finite_are_passed_on_and_told(
    growth: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "clean", **TINY, dtype=dtype, activation="silu")
    shutil.copytree(tmp_path / "clean", tmp_path / "model")

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        for at, value in enumerate(ODD):
            tensors[Q_PROJ][at, at % 4] = value
        tensors[EMBEDDING][2, 1] = float("nan")

    edit(tmp_path / "model", plant)
    recipe = make_recipe(GROWTHS[growth])
    clean, expansion = (
        grow_checkpoint(tmp_path / name, tmp_path / f"{name} grown", recipe) for name in ("clean", "model")
    )
    copies = 1 + 2 * (growth == "deeper")  # of the layer
    layers = {Q_PROJ.replace("0", str(layer)): 3 for layer in range(copies)}
    assert clean.not_finite == {}
    assert expansion.not_finite == {EMBEDDING: 1, **layers}
    assert json.loads((expansion.target / "growth.json").read_bytes())["not_finite"] == expansion.not_finite
    assert "not_finite" not in json.loads((clean.target / "growth.json").read_bytes())
    # Neighbours are the bytes that they are without them, and every copy is what it is a copy of.
    before, after = (load_file(place.target / "model.safetensors") for place in (clean, expansion))
    source = load_file(tmp_path / "model/model.safetensors")
    for name, grown in after.items():
        changed = grown.view(torch.uint8) != before[name].view(torch.uint8)
        if name not in expansion.not_finite:
            assert not changed.any(), name
    kinds = {"nan": torch.isnan, "inf": torch.isposinf, "-inf": torch.isneginf}
    old = {kind: int(test(source[Q_PROJ]).sum()) for kind, test in kinds.items()}
    new = {kind: int(test(after[Q_PROJ]).sum()) for kind, test in kinds.items()}
    share = after[Q_PROJ].numel() // source[Q_PROJ].numel()
    assert old == dict.fromkeys(kinds, 1)
    if growth in ("signal", "exact", "noise", "three"):
        rows = {"signal": 2, "exact": 4, "noise": 4, "three": 3}[growth]
        assert new == {kind: new["nan"] for kind in kinds}
        assert new["nan"] in (rows, share)
    assert call(capsys, "diff", tmp_path / "model", expansion.target, "--weights").code == 0


def test_expand_says_how_many_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "model", **TINY)

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        for at, name in enumerate((HEAD, EMBEDDING, Q_PROJ, "model.norm.weight", LAMBDA)):
            tensors[name].view(-1)[: 1 + at % 2] = float("nan")

    edit(tmp_path / "model", plant)
    told = call(capsys, "expand", tmp_path / "model", tmp_path / "grown", "--signal-x2").out
    assert (
        "\n  7 values of the source are NaN or infinite and stay so: "
        "2 for model.embed_tokens.weight, 2 for model.norm.weight, 1 for "
    ) in told
    assert "and 2 more, all in growth.json\n" in told
    outcome = call(capsys, "expand", tmp_path / "model", tmp_path / "again", "--signal-x2", "--json")
    assert sum(json.loads(outcome.out)["not_finite"].values()) == 7


def test_moments_that_are_not_finite_are_told(tmp_path: Path) -> None:
    write_training_state(tmp_path / "model", **TINY)
    state = torch.load(tmp_path / "model/optimizer.pt", weights_only=True)
    state["state"][0]["exp_avg"][0, 0] = float("inf")
    torch.save(state, tmp_path / "model/optimizer.pt")
    expansion = grow_checkpoint(tmp_path / "model", tmp_path / "grown", make_recipe({"hidden": 2}))
    assert expansion.not_finite == {f"{EMBEDDING}/exp_avg": 1}


def test_a_large_sum_of_finite_values_is_nothing_to_tell(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", **TINY, dtype=torch.float16)
    edit(tmp_path / "model", lambda tensors: tensors[HEAD].fill_(60000.0))
    assert grow_checkpoint(tmp_path / "model", tmp_path / "grown", make_recipe({"signal": 2})).not_finite == {}


def test_what_an_earlier_run_finished_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gdagrow.formats.file_writer import FileWriter

    write_checkpoint(tmp_path / "model", **TINY)
    edit(tmp_path / "model", lambda tensors: tensors[EMBEDDING].view(-1)[:2].fill_(float("nan")))
    growing = prepare_growth(tmp_path / "model", make_recipe({"signal": 2}), max_shard_bytes=300)
    closed: list[str] = []
    close: Callable[[FileWriter], str] = FileWriter.close

    def fails(writer: FileWriter) -> str:
        closed.append("")
        if len(closed) == 3:
            raise KeyboardInterrupt
        return close(writer)

    monkeypatch.setattr(FileWriter, "close", fails)
    with pytest.raises(KeyboardInterrupt):
        expand(growing.plan, tmp_path / "grown", growing.output, resume=True)
    expansion = expand(growing.plan, tmp_path / "grown", growing.output, resume=True)
    assert expansion.resumed
    assert expansion.not_finite == {EMBEDDING: 2}
