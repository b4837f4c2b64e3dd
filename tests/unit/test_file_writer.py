import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gdagrow.errors import OutputError
from gdagrow.formats.file_layout import FileLayout, TargetTensor
from gdagrow.formats.file_writer import BLOCK_BYTES, FileWriter, tensor_bytes
from gdagrow.formats.safetensors_header import read_shard
from gdagrow.formats.safetensors_layout import index_json, plan_shards


def names(layout: FileLayout) -> list[str]:
    return [tensor.name for tensor in layout.tensors]


def test_shards_are_filled_in_order_up_to_the_limit() -> None:
    tensors = [
        TargetTensor(name, "F32", (size,)) for name, size in [("a", 2), ("b", 3), ("big", 10), ("c", 1), ("d", 4)]
    ]
    layouts = plan_shards(tensors, 20)
    assert [names(layout) for layout in layouts] == [["a", "b"], ["big"], ["c", "d"]]
    assert [layout.file for layout in layouts] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [layout.data_bytes for layout in layouts] == [20, 40, 20]
    assert [layout.file for layout in plan_shards(tensors, 80)] == ["model.safetensors"]
    assert len(plan_shards(tensors, 79)) == 2


def test_every_tensor_is_aligned_to_its_items_and_order_is_kept_within_a_size() -> None:
    tensors = [
        TargetTensor("half", "BF16", (3,)),
        TargetTensor("flag", "U8", (1,)),
        TargetTensor("double", "F64", (1,)),
        TargetTensor("half2", "F16", ()),
        TargetTensor("single", "F32", (0, 5)),
    ]
    (layout,) = plan_shards(tensors, 1000, {"made": "by ü"})
    assert names(layout) == ["double", "single", "half", "half2", "flag"]
    ((at, octets),) = layout.literals
    assert (at, len(octets) % 8, layout.file_bytes) == (0, 0, len(octets) + 17)
    header = json.loads(octets[8:])
    assert header.pop("__metadata__") == {"format": "pt", "made": "by ü"}
    offsets = [tuple(entry["data_offsets"]) for entry in header.values()]
    assert offsets == [(0, 8), (8, 8), (8, 14), (14, 16), (16, 17)]


def test_a_name_that_the_format_keeps_for_itself_is_refused() -> None:
    for names in (["__metadata__"], ["twice", "twice"]):
        with pytest.raises(OutputError, match=f"a tensor cannot be named '{names[-1]}' in safetensors; rename it"):
            plan_shards([TargetTensor(name, "U8", (1,)) for name in names], 100)


def test_index_is_what_transformers_expects() -> None:
    layouts = plan_shards([TargetTensor("b", "F32", (2,)), TargetTensor("a", "BF16", (2,))], 8)
    content = index_json(layouts)
    assert json.loads(content) == {
        "metadata": {"total_size": 12},
        "weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"},
    }
    assert list(json.loads(content)["weight_map"]) == ["a", "b"]


@pytest.mark.parametrize(
    "sizes", [[0], [1], [1, 2, 3], [BLOCK_BYTES], [3 * BLOCK_BYTES + 5, 7], [5, BLOCK_BYTES, 4096 * 3]]
)
def test_file_and_hash_for_all_kinds_of_lengths(tmp_path: Path, sizes: list[int]) -> None:
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randint(0, 256, (size,), dtype=torch.uint8) for i, size in enumerate(sizes)}
    (layout,) = plan_shards([TargetTensor(name, "U8", tuple(t.shape)) for name, t in tensors.items()], 1 << 40)
    path = tmp_path / layout.file
    with FileWriter(path, layout) as writer:
        for tensor in tensors.values():
            buffer = tensor.clone()
            writer.write(tensor_bytes(buffer))
            buffer.zero_()  # the writer must be done with it
        digest = writer.close()
    content = path.read_bytes()
    assert len(content) == layout.file_bytes
    assert content.startswith(layout.literals[0][1])
    assert digest == hashlib.sha256(content).hexdigest()
    with safe_open(path, "pt") as file:
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
    assert list(read_shard(path)[0]) == list(tensors)


@pytest.mark.parametrize("step", [1, 3, 7, 100])
def test_literals_stand_where_the_layout_says(tmp_path: Path, step: int) -> None:
    tensors = TargetTensor("a", "U8", (5,)), TargetTensor("none", "U8", (0,)), TargetTensor("b", "U8", (6,))
    literals = (0, b"<"), (0, b"a:"), (3, b"|"), (5, b" none: b:"), (11, b">"), (11, b"end")
    layout = FileLayout("f", tensors, literals)
    given = b"aaaaabbbbbb"
    with FileWriter(tmp_path / "f", layout) as writer:
        for start in range(0, len(given), step):
            writer.write(memoryview(given[start : start + step]))
        digest = writer.close()
    content = b"<a:aaa|aa none: b:bbbbbb>end"
    assert (tmp_path / "f").read_bytes() == content
    assert (layout.file_bytes, digest) == (len(content), hashlib.sha256(content).hexdigest())


def test_memory_is_a_few_blocks_whatever_is_given(tmp_path: Path) -> None:
    (layout,) = plan_shards([TargetTensor("w", "U8", (20 * BLOCK_BYTES,))], 1 << 40)
    buffer = torch.zeros(10 * BLOCK_BYTES, dtype=torch.uint8)

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024

    before = anonymous()
    with FileWriter(tmp_path / "s", layout) as writer:
        for _ in range(2):
            writer.write(tensor_bytes(buffer))
            assert anonymous() - before < 5 * BLOCK_BYTES
        writer.close()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_tensor_bytes_are_the_storage_itself(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).view(2, 3).to(dtype)
    view = tensor_bytes(tensor[1:])
    assert bytes(view) == bytes(tensor[1:].clone().view(torch.uint8).flatten().tolist())
    tensor[1, 0] = 9
    assert bytes(view) == bytes(tensor[1:].clone().view(torch.uint8).flatten().tolist())
    assert bytes(tensor_bytes(torch.empty(0, 3, dtype=dtype))) == b""


def test_tensor_bytes_keep_the_tensor_alive() -> None:
    views = [tensor_bytes(torch.full((2**20,), i, dtype=torch.uint8)) for i in range(8)]
    assert [(view[0], view[-1]) for view in views] == [(i, i) for i in range(8)]


def test_tensor_bytes_want_contiguous_tensors() -> None:
    with pytest.raises(AssertionError, match="strides"):
        tensor_bytes(torch.zeros(3, 2).T)
