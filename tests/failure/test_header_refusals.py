import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gdagrow.errors import CheckpointError
from gdagrow.formats.safetensors_header import read_header, read_shard

GOOD = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    save_file({"w": torch.zeros(2)}, directory / "model.safetensors")
    return directory


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(directory)
    assert str(directory) in str(caught.value)
    return str(caught.value)


def raw_shard(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refused_shard(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_shard(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_directory_that_is_none(tmp_path: Path) -> None:
    assert "is not a directory" in refused(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "is not a directory" in refused(tmp_path / "file")


def test_no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    assert "has no file config.json" in refused(checkpoint)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[1]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b"", "not valid JSON (Expecting value"),
        (b"{", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": [-Infinity]}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "1e999 does not fit a float"),
        (b'{"a": 1, "b": 2, "a": 3}', "duplicate keys: 'a'"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"\xff\xfe{\x00}\x00", "not valid JSON ('utf-8' codec"),
        (b'{"a":' * 100_000, "nested too deep"),
    ],
)
def test_bad_config(checkpoint: Path, content: bytes, reason: str) -> None:
    (checkpoint / "config.json").write_bytes(content)
    message = refused(checkpoint)
    assert f"{checkpoint / 'config.json'}: " in message
    assert reason in message


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    message = refused(checkpoint)
    assert "has no model.safetensors and no model.safetensors.index.json; only safetensors weights are read" in message


def test_single_file_and_index(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model.safetensors"}}')
    assert "has both model.safetensors and model.safetensors.index.json, so it is ambiguous" in refused(checkpoint)


def test_no_tensors(checkpoint: Path) -> None:
    save_file({}, checkpoint / "model.safetensors")
    assert "holds no tensors" in refused(checkpoint)


@pytest.mark.parametrize(
    "shard", ["", ".", "..", "/etc/passwd", "../x.safetensors", "a/b", "a\\b", "a\0b", "\ud800", 3, None, ["x"]]
)
def test_shard_names_must_be_plain(checkpoint: Path, shard: object) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    assert f"expected plain file names in weight_map, got {shard!r};" in refused(checkpoint)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_index_without_weight_map(checkpoint: Path, index: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(index)
    assert "expected a non-empty object weight_map" in refused(checkpoint)


def test_missing_shard(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {"w": "gone.safetensors"}}')
    assert "has no file gone.safetensors" in refused(checkpoint)


def test_index_and_shards_disagree_and_every_tensor_is_named(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    save_file({"twice": torch.zeros(1), "ok": torch.zeros(1)}, checkpoint / "a.safetensors")
    save_file({"twice": torch.zeros(1), "moved": torch.zeros(1), "extra": torch.zeros(1)}, checkpoint / "b.safetensors")
    weight_map = {"twice": "a.safetensors", "ok": "a.safetensors", "moved": "a.safetensors", "gone": "b.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = refused(checkpoint)
    assert "'gone' is missing from b.safetensors" in message
    assert "'twice' is in b.safetensors, but the index says a.safetensors" in message
    assert "'moved' is in b.safetensors, but the index says a.safetensors" in message
    assert "'extra' is in b.safetensors, but the index says nothing of it" in message
    assert "'ok'" not in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_out_of_the_directory(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (checkpoint / name).rename(tmp_path / name)
    (checkpoint / name).symlink_to(tmp_path / name)
    message = refused(checkpoint)
    assert f"{checkpoint / name} is a link that leads out of its checkpoint directory" in message
    assert f"cp -rL {checkpoint}" in message


def test_a_pipe_is_not_waited_for(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    os.mkfifo(checkpoint / "config.json")
    assert "has no file config.json" in refused(checkpoint)


@pytest.mark.parametrize("num_bytes", [0, 7])
def test_file_shorter_than_a_length(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "s"
    path.write_bytes(bytes(num_bytes))
    assert f"expected at least the 8 bytes of a safetensors header length, got {num_bytes} bytes" in refused_shard(path)


def test_header_claims(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    assert f"at most 100000000 bytes, got a claim of {1 << 60} bytes" in refused_shard(path)
    path.write_bytes((3).to_bytes(8, "little") + b"{}")
    assert "expected a header of 3 bytes, got a file of 10 bytes in all; the file is truncated" in refused_shard(path)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"", "expected a header that starts with '{', got b''"),
        (b"  {}", "expected a header that starts with '{'"),
        (b"[]", "expected a header that starts with '{'"),
        (b'{"a":\xff}', "not valid JSON ('utf-8' codec"),
        (b'{"a":', "not valid JSON"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "duplicate keys: 'dtype'"),
        (b'{"w":{},"w":{}}', "duplicate keys: 'w'"),
        ({"__metadata__": {"a": 1}, **GOOD}, "expected __metadata__ to map strings to strings"),
        ({"__metadata__": ["a"], **GOOD}, "expected __metadata__ to map strings to strings"),
        ({"__metadata__": {"a": "\ud800"}, **GOOD}, "expected __metadata__ to map strings to strings"),
        ({"a\x1b[2J": GOOD["w"]}, "tensor 'a\\x1b[2J': expected a printable name"),
        ({"w": 3}, "tensor 'w': expected an object with dtype, shape and data_offsets, got int"),
        ({"w": {"dtype": "F32"}}, "expected an object with dtype, shape and data_offsets, got ['dtype']"),
        ({"w": {**GOOD["w"], "x": 1}}, "got ['data_offsets', 'dtype', 'shape', 'x']"),
    ],
)
def test_bad_header_json(tmp_path: Path, header: object, reason: str) -> None:
    assert reason in refused_shard(raw_shard(tmp_path / "s", header, bytes(8)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "F33"}, "unknown dtype 'F33', expected one of F64, "),
        ({"dtype": ["F32"]}, "unknown dtype ['F32']"),
        ({"shape": [-2]}, "expected a shape of non-negative integers, got [-2]"),
        ({"shape": [True, 2]}, "expected a shape of non-negative integers, got [True, 2]"),
        ({"shape": [2.0]}, "expected a shape of non-negative integers, got [2.0]"),
        ({"shape": 2}, "expected a shape of non-negative integers, got 2"),
        ({"shape": [2**64]}, "expected a shape of non-negative integers"),
        ({"shape": [2**40, 2**40, 0]}, "overflows 63 bits"),
        ({"shape": [3]}, "expected 12 bytes for shape [3] of F32, got 8 by its offsets"),
        ({"data_offsets": [0, True]}, "expected data_offsets of two ascending non-negative integers, got [0, True]"),
        ({"data_offsets": [0]}, "expected data_offsets of two ascending"),
        ({"data_offsets": [8, 0]}, "expected data_offsets of two ascending"),
        ({"data_offsets": [-8, 0]}, "expected data_offsets of two ascending"),
        ({"data_offsets": {"0": 8}}, "expected data_offsets of two ascending"),
    ],
)
def test_bad_tensor_entry(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    message = refused_shard(raw_shard(tmp_path / "s", {"w": {**GOOD["w"], **changes}}, bytes(8)))
    assert "tensor 'w': " in message
    assert reason in message


def test_overlap_hole_and_leftover(tmp_path: Path) -> None:
    def two(second: list[int]) -> dict[str, object]:
        return {**GOOD, "v": {"dtype": "U8", "shape": [second[1] - second[0]], "data_offsets": second}}

    assert "tensor 'v' overlaps 'w': expected it to start at byte" in refused_shard(
        raw_shard(tmp_path / "s", two([6, 10]), bytes(10))
    )
    assert "tensor 'v' leaves a hole after 'w'" in refused_shard(raw_shard(tmp_path / "s", two([9, 10]), bytes(10)))
    first_late = {"w": {**GOOD["w"], "data_offsets": [4, 12]}}
    assert "tensor 'w' leaves a hole after the header" in refused_shard(
        raw_shard(tmp_path / "s", first_late, bytes(12))
    )
    path = raw_shard(tmp_path / "s", two([8, 10]), bytes(13))
    size = path.stat().st_size
    assert f"expected {size - 3} bytes by its header, got {size}: 3 bytes belong to no tensor" in refused_shard(path)


def test_truncated_shard_names_the_first_tensor_outside(tmp_path: Path) -> None:
    header = {
        name: {"dtype": "U8", "shape": [10], "data_offsets": [10 * i, 10 * i + 10]} for i, name in enumerate("abc")
    }
    path = raw_shard(tmp_path / "s", header, bytes(15))
    size = path.stat().st_size
    assert (
        f"is truncated: expected {size + 15} bytes, got {size}, so tensor 'b' lies outside the file; download it again"
        in refused_shard(path)
    )
