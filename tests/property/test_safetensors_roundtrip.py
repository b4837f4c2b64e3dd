import hashlib
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gdagrow.formats.file_layout import TargetTensor
from gdagrow.formats.file_writer import FileWriter, tensor_bytes
from gdagrow.formats.safetensors_header import read_header
from gdagrow.formats.safetensors_layout import index_json, plan_shards
from gdagrow.formats.safetensors_reader import TORCH_DTYPES, TensorReader

TENSORS = st.lists(
    st.tuples(
        st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=12).filter(
            lambda name: name != "__metadata__"
        ),
        st.sampled_from(sorted(TORCH_DTYPES)),
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda item: item[0],
).map(lambda items: [TargetTensor(*item) for item in items])


def random_bits(target: TargetTensor) -> torch.Tensor:
    """Any bits, NaNs and infinities among them."""
    octets = torch.randint(0, 256, (target.num_bytes,), dtype=torch.uint8)
    return octets.view(TORCH_DTYPES[target.dtype]).view(target.shape)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and bytes(tensor_bytes(left.contiguous())) == bytes(
        tensor_bytes(right.contiguous())
    )


@settings(max_examples=100, deadline=None)
@given(targets=TENSORS, max_shard_bytes=st.integers(1, 2000), seed=st.integers(0, 2**32), cuts=st.integers(1, 7))
def test_what_is_written_is_read_back_bit_for_bit_by_us_and_by_safetensors(
    targets: list[TargetTensor], max_shard_bytes: int, seed: int, cuts: int
) -> None:
    torch.manual_seed(seed)
    values = {target.name: random_bits(target) for target in targets}
    layouts = plan_shards(targets, max_shard_bytes)
    assert sorted(tensor.name for layout in layouts for tensor in layout.tensors) == sorted(values)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        theirs: dict[str, torch.Tensor] = {}
        for layout in layouts:
            path = directory / layout.file
            with FileWriter(path, layout) as writer:
                for tensor in layout.tensors:
                    content = tensor_bytes(values[tensor.name])
                    for start in range(0, len(content), cuts):
                        writer.write(content[start : start + cuts])
                assert writer.close() == hashlib.sha256(path.read_bytes()).hexdigest()
            assert path.stat().st_size == layout.file_bytes
            theirs |= load_file(path)
        (directory / "config.json").write_text("{}")
        if len(layouts) > 1:
            (directory / "model.safetensors.index.json").write_bytes(index_json(layouts))
        header = read_header(directory)
        assert header.tensors.keys() == theirs.keys() == values.keys()
        with TensorReader(header) as reader:
            for key, value in values.items():
                assert same_bits(theirs[key], value)
                assert same_bits(reader.tensor(key), value)
                if value.ndim and value.shape[0] > 1:
                    assert same_bits(reader.rows(key, 1, value.shape[0]), value[1:])
