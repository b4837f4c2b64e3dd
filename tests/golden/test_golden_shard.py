"""The bytes on the disk are a promise: a shard written today is the one that is written tomorrow."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from gdagrow.formats.file_layout import TargetTensor
from gdagrow.formats.file_writer import FileWriter, tensor_bytes
from gdagrow.formats.safetensors_layout import index_json, plan_shards

HEADER = (
    b'{"__metadata__":{"format":"pt","gdagrow":"1"},'
    b'"norm":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"proj":{"dtype":"BF16","shape":[2,1],"data_offsets":[8,12]}}      '
)
SHARD = (
    b"\xa8\x00\x00\x00\x00\x00\x00\x00"
    + HEADER
    + b"\x00\x00\x80\x3f\x00\x00\x00\xc0"  # 1, -2 in float32
    + b"\x80\x3f\x40\xc0"  # 1, -3 in bfloat16
)
SHA256 = "bd4366c6a0144711818f5c180944cf82cae4c9abf9ffa4205d78b602fcea76ad"


def test_shard_bytes_and_hash(tmp_path: Path) -> None:
    targets = [TargetTensor("proj", "BF16", (2, 1)), TargetTensor("norm", "F32", (2,))]
    (layout,) = plan_shards(targets, 100, {"gdagrow": "1"})
    values = {"proj": torch.tensor([[1.0], [-3.0]]).bfloat16(), "norm": torch.tensor([1.0, -2.0])}
    with FileWriter(tmp_path / layout.file, layout) as writer:
        for tensor in layout.tensors:
            writer.write(tensor_bytes(values[tensor.name]))
        assert writer.close() == SHA256
    assert (tmp_path / "model.safetensors").read_bytes() == SHARD


def test_safetensors_writes_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(5), "c": torch.randn(4, 2).half(), "d": torch.randn(3).half()}
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    codes = {torch.float32: "F32", torch.float16: "F16"}
    (layout,) = plan_shards([TargetTensor(n, codes[t.dtype], tuple(t.shape)) for n, t in tensors.items()], 1000)
    with FileWriter(tmp_path / "ours", layout) as writer:
        for tensor in layout.tensors:
            writer.write(tensor_bytes(tensors[tensor.name]))
        writer.close()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_index_bytes() -> None:
    layouts = plan_shards([TargetTensor("b", "F32", (1,)), TargetTensor("a", "F32", (1,))], 4)
    assert index_json(layouts) == (
        b'{\n  "metadata": {\n    "total_size": 8\n  },\n  "weight_map": {\n'
        b'    "a": "model-00002-of-00002.safetensors",\n    "b": "model-00001-of-00002.safetensors"\n  }\n}\n'
    )
