import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gdagrow.formats.safetensors_header import read_header, read_shard
from gdagrow.header import TensorInfo


def write_raw(path: Path, header: dict[str, object], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_single_file_header_matches_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4, dtype=torch.float16),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt", "who": "ü"})
    (tmp_path / "config.json").write_text('{"model_type": "Motif", "n": 3}')
    header = read_header(tmp_path)
    assert header.directory == tmp_path
    assert header.config == {"model_type": "Motif", "n": 3}
    assert header.metadata == {"format": "pt", "who": "ü"}
    assert header.shards == ("model.safetensors",)
    assert {name: info.dtype for name, info in header.tensors.items()} == {
        "a": "F32", "b": "BF16", "empty": "F16", "scalar": "F64", "flags": "BOOL",
    }  # fmt: skip
    content = (tmp_path / "model.safetensors").read_bytes()
    for name, tensor in tensors.items():
        info = header.tensors[name]
        assert info.shape == tuple(tensor.shape)
        assert content[info.start : info.stop] == bytes(tensor.flatten().view(torch.uint8).tolist())
    assert header.num_bytes == 24 + 10 + 8 + 2
    assert max(info.stop for info in header.tensors.values()) == len(content)


def test_shards_are_joined_in_storage_order(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({"y": torch.zeros(3), "z": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors", {"k": "v"})
    weight_map = {"z": 2, "y": 2, "x": 1}
    index = {"weight_map": {name: f"model-0000{i}-of-00002.safetensors" for name, i in weight_map.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    header = read_header(tmp_path)
    assert list(header.tensors) == ["x", "y", "z"]
    assert header.shards == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert header.metadata == {"format": "pt", "k": "v"}


def test_padding_metadata_and_any_key_order_are_read(tmp_path: Path) -> None:
    entries = {
        "late": {"data_offsets": [2, 6], "shape": [1], "dtype": "F32"},
        "__metadata__": {},
        "early": {"dtype": "F16", "shape": [], "data_offsets": [0, 2]},
    }
    text = json.dumps(entries).encode() + b"   "
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(6))
    start = 8 + len(text)
    assert read_shard(path) == (
        {
            "early": TensorInfo("early", "F16", (), "m.safetensors", start, start + 2),
            "late": TensorInfo("late", "F32", (1,), "m.safetensors", start + 2, start + 6),
        },
        {},
    )


def test_a_link_inside_the_directory_is_followed(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "weights")
    (tmp_path / "model.safetensors").symlink_to("weights")
    (tmp_path / "config.json").write_text("{}")
    assert list(read_header(tmp_path).tensors) == ["x"]


def test_parsing_takes_time_in_proportion_to_the_tensors(tmp_path: Path) -> None:
    entries = ",".join(
        f'"layers.{i}.w":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(200_000)
    )
    text = f"{{{entries}}}".encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(200_000))
    begin = time.process_time()
    infos, _ = read_shard(path)
    assert len(infos) == 200_000
    assert time.process_time() - begin < 10  # about 2 s; anything quadratic takes minutes


def test_the_header_alone_is_read(tmp_path: Path) -> None:
    num_bytes = 1 << 40
    text = json.dumps({"big": {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [0, num_bytes]}}).encode()
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        try:
            file.truncate(8 + len(text) + num_bytes)
        except OSError:
            pytest.skip("no sparse files of a terabyte here")
    assert read_shard(path)[0]["big"].num_elements == num_bytes // 4


def test_neither_reading_headers_nor_writing_imports_torch() -> None:
    code = (
        "import sys, gdagrow.formats.safetensors_header, gdagrow.formats.safetensors_layout\n"
        "import gdagrow.formats.file_writer, gdagrow.formats.publish\n"
        "print(sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
