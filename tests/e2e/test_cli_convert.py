"""`gdagrow convert`: what it writes is read by torch's own DCP and by safetensors' own reader, bit for bit."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import DiffLlamaForCausalLM

from gdagrow.models.gda import load_model
from tests.checkpoints import COMPANIONS, TRAINING_STATE, listing, write_checkpoint, write_files
from tests.command import Outcome, call
from tests.dcp_ranks import run_jobs
from tests.diffllama import TOPOLOGIES, save_diffllama

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in ("torch.distributed is disabled", "Detected an")]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors directory, by safetensors' own reader."""
    return {
        name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def convert(capsys: pytest.CaptureFixture[str], *words: object) -> Outcome:
    outcome = call(capsys, "convert", *words)
    assert (outcome.code, outcome.err) == (0, "")
    return outcome


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", ["5GB", "30kB"])
def test_there_and_back_again(tied: bool, size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, there, back = tmp_path / "source", tmp_path / "there", tmp_path / "back"
    write_checkpoint(source, companions=True, tied=tied, bias=True, lambda_dtype=torch.float32, max_shard_bytes=40_000)
    write_files(source, {**TRAINING_STATE, "growth.json": b'{"history": []}'})
    told = convert(capsys, source, there, "--to", "dcp", "--max-shard-size", size).out
    assert f"wrote {there}\n" in told
    assert re.search(r"^  trainer_state\.json +left behind: training state of the source *$", told, re.MULTILINE)
    convert(capsys, there, back, "--to", "safetensors", "--max-shard-size", size)
    assert equal(weights_of(back), weights_of(source))
    assert len(list(back.glob("*.safetensors"))) == len(list(there.glob("*.distcp"))) == (1 if size == "5GB" else 2)
    for name in ("config.json", "growth.json", *COMPANIONS):
        assert (source / name).read_bytes() == (there / name).read_bytes() == (back / name).read_bytes()
    assert not any((there / name).exists() for name in TRAINING_STATE)


def test_a_converted_copy_of_a_grown_model_is_that_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its growth.json comes along, and tells of a growth that does not lie between the two."""
    write_checkpoint(tmp_path / "source")
    call(capsys, "expand", tmp_path / "source", tmp_path / "grown", "--signal-x2", "--hidden-x2")
    convert(capsys, tmp_path / "grown", tmp_path / "dcp", "--to", "dcp")
    outcome = call(capsys, "diff", tmp_path / "grown", tmp_path / "dcp", "--weights")
    assert (outcome.code, outcome.err) == (0, "")
    assert "the same function: every weight folds back onto the source, bit for bit" in outcome.out
    outcome = call(capsys, "diff", tmp_path / "source", tmp_path / "dcp", "--weights")
    assert "maps from growth.json" in outcome.out


def test_torch_loads_it_into_what_a_model_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "source")
    convert(capsys, tmp_path / "source", tmp_path / "dcp", "--to", "dcp", "--quiet")
    model = load_model(tmp_path / "source", dtype=torch.bfloat16)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    dcp.load({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert equal(model.state_dict(), expected)


@pytest.mark.parametrize("prefix", ["", "model.", "app.model."])
def test_the_prefix_is_the_place_in_the_state_dict(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "source")
    convert(capsys, tmp_path / "source", tmp_path / "dcp", "--to", "dcp", "--prefix", prefix)
    expected = weights_of(tmp_path / "source")
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    state: dict[str, object] = dict(found)
    for name in reversed(prefix.split(".")[:-1]):
        state = {name: state}
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert equal(found, expected)
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    for name in prefix.split(".")[:-1]:
        whole = whole[name]
    assert equal(whole, expected)
    convert(capsys, tmp_path / "dcp", tmp_path / "back", "--to", "safetensors")
    assert equal(weights_of(tmp_path / "back"), expected)


def test_a_tied_model_of_transformers_loads_it_under_both_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_diffllama(tmp_path / "source", TOPOLOGIES[1], dtype=torch.bfloat16)
    model = DiffLlamaForCausalLM.from_pretrained(tmp_path / "source")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert "lm_head.weight" in expected
    convert(capsys, tmp_path / "source", tmp_path / "dcp", "--to", "dcp")
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load({"model": found}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert equal(found, expected)
    convert(capsys, tmp_path / "dcp", tmp_path / "back", "--to", "safetensors")
    assert equal(weights_of(tmp_path / "back"), weights_of(tmp_path / "source"))


def test_a_sharded_run_gives_safetensors_and_safetensors_a_sharded_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run, reference = tmp_path / "source", tmp_path / "run", tmp_path / "run.safetensors"
    write_checkpoint(source, companions=True, layers=1)
    run_jobs(("save", 2, source, run, reference))
    told = json.loads(
        convert(capsys, run, tmp_path / "weights", "--to", "safetensors", "--config", source, "--json").out
    )
    expected = load_file(reference)
    weights = {name.removeprefix("model."): t for name, t in expected.items() if name.startswith("model.")}
    assert equal(weights_of(tmp_path / "weights"), weights)
    assert told["bytes"] == sum(tensor.nbytes for tensor in weights.values())
    assert told["left_behind"][0]["reason"] == "optimizer state"
    assert set(told["copied"]) == set(COMPANIONS)
    convert(capsys, tmp_path / "weights", tmp_path / "again", "--to", "dcp", "--max-shard-size", "20kB")
    run_jobs(("load_weights", 3, source, tmp_path / "again", tmp_path / "found.safetensors"))
    assert equal(load_file(tmp_path / "found.safetensors"), {f"model.{name}": t for name, t in weights.items()})


def refused(capsys: pytest.CaptureFixture[str], root: Path, sentence: str, *words: object) -> None:
    before = listing(root)
    outcome = call(capsys, "convert", *words)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert sentence in outcome.err
    assert listing(root) == before


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, shards, out = tmp_path / "plain", tmp_path / "dcp", tmp_path / "out"
    write_checkpoint(plain, tied=True)
    convert(capsys, plain, shards, "--to", "dcp")
    back = ("--to", "safetensors")
    refused(capsys, tmp_path, "stores its weights as dcp already", shards, out, "--to", "dcp")
    refused(capsys, tmp_path, "stores its weights as safetensors already", plain, out, *back)
    refused(capsys, tmp_path, "'parquet' is not one of 'dcp', 'safetensors'", plain, out, "--to", "parquet")
    refused(capsys, tmp_path, "exists and is not empty", plain, shards, "--to", "dcp")
    refused(capsys, tmp_path, "which is never changed", plain, plain / "out", "--to", "dcp")
    refused(capsys, tmp_path, "has a config.json of its own", plain, out, "--to", "dcp", "--config", shards)
    refused(capsys, tmp_path, "nowhere is neither", shards, out, *back, "--config", tmp_path / "nowhere")
    refused(capsys, tmp_path, "lies in the source", shards, plain / "out", *back, "--config", plain)
    refused(
        capsys, tmp_path, "--prefix: expected names with a dot behind each", plain, out, "--to", "dcp", "--prefix", "a"
    )
    refused(capsys, tmp_path, "--prefix is of keys in dcp", shards, out, *back, "--prefix", "a.")
    shutil.copy(plain / "model.safetensors", shards)
    refused(capsys, tmp_path, "has both .metadata and model.safetensors", shards, out, *back)
    (shards / "model.safetensors").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        refused(capsys, tmp_path, "too little space", shards, out, *back)
    data = bytearray((shards / "__0_0.distcp").read_bytes())
    at = data.rindex(b"PK\x05\x06")  # the end of the last chunk, which is found when it is its turn
    data[at : at + 4] = b"none"
    (shards / "__0_0.distcp").write_bytes(data)
    refused(capsys, tmp_path, "'model.lm_head.weight' at [0, 0]: it is no file of torch.save", shards, out, *back)


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.system, (f"touch {self.path}",)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    refused(capsys, tmp_path, "asks for 'posix.system'", tmp_path / "dcp", tmp_path / "out", "--to", "safetensors")
