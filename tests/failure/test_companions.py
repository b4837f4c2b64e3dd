import json
import os
import socket
from pathlib import Path

import pytest

from gdagrow.errors import CheckpointError, OutputError
from gdagrow.formats.companions import Companions, SkippedFile, copy_companions, list_companions

CARRIED = ["README.md", "tokenizer.json", "generation_config.json", "modeling_motif.py", "1_Pooling/config.json"]
STATE = "training state of the source, wrong beside grown weights"
WEIGHTS = "weights of the source"
SKIPPED = {
    "config.json": "rewritten",
    "growth.json": "rewritten",
    "model.safetensors.index.json": WEIGHTS,
    "model-00001-of-00001.safetensors": WEIGHTS,
    "pytorch_model.bin": WEIGHTS,
    "pytorch_model.bin.index.json": WEIGHTS,
    "original/consolidated.00.pth": WEIGHTS,
    "model.gguf": WEIGHTS,
    "flax_model.msgpack": WEIGHTS,
    "tf_model.h5": WEIGHTS,
    "optimizer.pt": STATE,
    "scheduler.pt": STATE,
    "rng_state_0.pth": STATE,
    "trainer_state.json": STATE,
    "training_args.bin": STATE,
    "global_step100/": STATE,
    "checkpoint-500/": STATE,
    ".git/": "history of the source",
    ".cache/": "download records of the source",
    ".grown.gdagrow-partial-abc123/": "an unfinished output of gdagrow",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    for name in (*CARRIED, *SKIPPED):
        path = source / (f"{name}inside.txt" if name.endswith("/") else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    return source


def contents(directory: Path) -> dict[str, str]:
    return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_everything_is_carried_but_weights_and_training_state(source: Path, tmp_path: Path) -> None:
    listed = list_companions(source)
    assert listed == Companions(
        tuple(sorted(CARRIED)), tuple(SkippedFile(name, SKIPPED[name]) for name in sorted(SKIPPED))
    )
    destination = tmp_path / "destination"
    destination.mkdir()
    assert copy_companions(source, destination) == listed
    assert contents(destination) == {name: f"content of {name}" for name in CARRIED}


def test_links_inside_are_replaced_by_what_they_point_to(source: Path, tmp_path: Path) -> None:
    (source / "vocab.txt").symlink_to("tokenizer.json")
    (source / "weights.dat").symlink_to("model.gguf")
    (source / "same").symlink_to(".")
    (source / "broken").symlink_to("nothing")
    listed = list_companions(source)
    assert set(listed.copied) == {*CARRIED, "vocab.txt"}
    reasons = {skip.path: skip.reason for skip in listed.skipped}
    assert reasons["weights.dat"] == WEIGHTS
    assert reasons["same/"] == "a link to a directory that is carried along by itself"
    assert reasons["broken"] == "not a regular file"
    (tmp_path / "d").mkdir()
    copy_companions(source, tmp_path / "d")
    assert not (tmp_path / "d" / "vocab.txt").is_symlink()
    assert contents(tmp_path / "d")["vocab.txt"] == "content of tokenizer.json"


@pytest.mark.parametrize("kind", ["file", "directory", "absent"])
def test_links_that_lead_out_are_refused_before_anything_is_written(source: Path, tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    if kind == "file":
        outside.write_text("secret")
    elif kind == "directory":
        outside.mkdir()
    (source / "zz_notes").symlink_to(outside)
    (tmp_path / "d").mkdir()
    with pytest.raises(CheckpointError) as caught:
        copy_companions(source, tmp_path / "d")
    assert str(caught.value) == (
        f"{source / 'zz_notes'} is a link that leads out of its checkpoint directory, to {outside}; "
        f"make a full copy first: cp -rL {source} COPY"
    )
    assert os.listdir(tmp_path / "d") == []


def test_pipes_and_sockets_are_skipped(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(source / "pipe")
    monkeypatch.chdir(source)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        reasons = {skip.path: skip.reason for skip in list_companions(source).skipped}
    assert reasons["pipe"] == reasons["socket"] == "not a regular file"


def test_a_source_reached_through_a_link_is_inside_itself(source: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to("source")
    (source / "vocab.txt").symlink_to("tokenizer.json")
    assert set(list_companions(tmp_path / "alias").copied) == {*CARRIED, "vocab.txt"}


def test_a_copy_that_fails_names_the_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "d" / "README.md").mkdir(parents=True)
    with pytest.raises(OutputError) as caught:
        copy_companions(source, tmp_path / "d")
    assert f"{source / 'README.md'} cannot be copied to {tmp_path / 'd'} (Is a directory); check both" == str(
        caught.value
    )


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"gone cannot be listed \(No such file or directory\); check the directory"
    ):
        list_companions(tmp_path / "gone")


def test_weights_of_any_name_that_the_index_gives_them(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "weights", "b": "model.tensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("weights", "model.tensors", "notes"):
        (tmp_path / name).write_text("")
    companions = list_companions(tmp_path)
    assert companions.copied == ("notes",)
    assert [skip.path for skip in companions.skipped if skip.reason == "weights of the source"] == [
        "model.safetensors.index.json", "model.tensors", "weights",
    ]  # fmt: skip
