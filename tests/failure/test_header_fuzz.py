import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gdagrow.errors import CheckpointError
from gdagrow.formats.safetensors_header import read_header, read_shard

SPLICES = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"-1", b"1e9", b"true", b"null", b"\xff", b"\\ud800", b"9" * 30]


def mutated(rng: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        position = rng.randrange(len(data))
        kind = rng.randrange(5)
        if kind == 0:
            data[position] = rng.randrange(256)
        elif kind == 1:
            del data[position : position + rng.randint(1, 8)]
        elif kind == 2:
            data[position:position] = rng.choice(SPLICES)
        elif kind == 3:
            data[position : position + 1] = rng.choice(SPLICES)
        else:
            data[position] ^= 1 << rng.randrange(8)
    return bytes(data) or b"\0"


def test_mutated_shards_are_read_or_refused_and_what_is_read_is_what_safetensors_reads(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "s.safetensors"
    tensors = {"a.weight": torch.zeros(2, 3), "b": torch.zeros(4).bfloat16(), "c": torch.zeros(0), "d": torch.zeros(())}
    save_file(tensors, path, {"format": "pt"})
    content = path.read_bytes()
    read = 0
    for _ in range(4000):
        path.write_bytes(mutated(rng, content))
        try:
            infos, metadata = read_shard(path)
        except CheckpointError:
            continue
        read += 1
        with safe_open(path, "pt") as theirs:
            assert set(infos) == set(theirs.keys())
            assert metadata == (theirs.metadata() or {})
            for name, info in infos.items():
                assert tuple(theirs.get_slice(name).get_shape()) == info.shape
    assert read > 100


def test_what_safetensors_refuses_is_refused(tmp_path: Path) -> None:
    rng = random.Random(1)
    path = tmp_path / "s.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4).half()}, path)
    content = path.read_bytes()
    refused = 0
    for _ in range(2000):
        path.write_bytes(mutated(rng, content))
        try:
            with safe_open(path, "pt"):
                continue
        except SafetensorError:
            refused += 1
        with pytest.raises(CheckpointError):
            read_shard(path)
    assert refused > 1000


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_mutated_json_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    rng = random.Random(2)
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "Motif", "x": [1.5, None, {"y": "é"}]}))
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"w": "a.safetensors"}}')
    content = (tmp_path / name).read_bytes()
    for _ in range(1000):
        (tmp_path / name).write_bytes(mutated(rng, content))
        try:
            assert list(read_header(tmp_path).tensors) == ["w"]
        except CheckpointError:
            continue
