from collections.abc import Mapping
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint.default_planner import _validate_global_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gdagrow.formats.dcp_layout import DcpLayout, plan_dcp
from gdagrow.formats.dcp_metadata import DTYPE_CODES, read_metadata
from gdagrow.formats.dcp_reader import DcpReader
from gdagrow.formats.file_layout import TargetTensor
from gdagrow.formats.file_writer import FileWriter, tensor_bytes
from gdagrow.formats.torch_dtypes import DTYPES
from tests.checkpoints import write_checkpoint
from tests.dcp_ranks import run_jobs
from tests.growths import RANDOM

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in ("torch.distributed is disabled", "Detected an")]
CODES = {dtype: code for code, dtype in DTYPES.items()}


def targets(state: Mapping[str, torch.Tensor]) -> list[TargetTensor]:
    return [TargetTensor(key, CODES[tensor.dtype], tuple(tensor.shape)) for key, tensor in state.items()]


def write(directory: Path, layout: DcpLayout, state: Mapping[str, torch.Tensor]) -> Path:
    directory.mkdir()
    for file in layout.files:
        with FileWriter(directory / file.file, file) as writer:
            for tensor in file.tensors:
                writer.write(tensor_bytes(state[tensor.name].contiguous()))
            writer.close()
        assert (directory / file.file).stat().st_size == file.file_bytes
    (directory / ".metadata").write_bytes(layout.metadata)
    return directory


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and bool(
        torch.equal(found.contiguous().view(-1).view(torch.uint8), expected.contiguous().view(-1).view(torch.uint8))
    )  # fmt: skip


def random(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    octets = torch.randint(0, 256, (prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    return (octets % 2 if dtype == torch.bool else octets).view(dtype).view(shape)


@RANDOM
@given(
    tensors=st.lists(
        st.tuples(st.sampled_from(sorted(DTYPE_CODES)), st.lists(st.integers(0, 7), max_size=3).map(tuple)), max_size=6
    ),
    max_file_bytes=st.integers(1, 500),
    max_chunk_bytes=st.integers(1, 100),
)
def test_torch_loads_what_is_written_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[tuple[str, tuple[int, ...]]],
    max_file_bytes: int,
    max_chunk_bytes: int,
) -> None:
    state = {f"t{i}.w": random(getattr(torch, name), shape) for i, (name, shape) in enumerate(tensors)}
    layout = plan_dcp(targets(state), {}, {}, max_file_bytes, max_chunk_bytes)
    directory = write(tmp_path_factory.mktemp("dcp") / "out", layout, state)
    loaded = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    dcp.load(loaded, checkpoint_id=directory, no_dist=True)
    for key, tensor in state.items():
        assert same(loaded[key], tensor), key
    metadata = FileSystemReader(directory).read_metadata()
    assert _validate_global_plan([], metadata) == []
    for file in layout.files:
        assert len(file.tensors) == 1 or file.data_bytes <= max_file_bytes or not tensors
    for entry in metadata.state_dict_metadata.values():
        assert isinstance(entry, TensorStorageMetadata)
        item = entry.properties.dtype.itemsize
        assert all(prod(c.sizes) * item <= max_chunk_bytes or c.sizes[0] == 1 for c in entry.chunks if c.sizes)


def test_the_same_layout_gives_the_same_bytes() -> None:
    tensors = [TargetTensor("a", "F32", (3, 5)), TargetTensor("b", "BF16", (7,))]
    assert plan_dcp(tensors, {"n": b"1"}, {}, 10**9) == plan_dcp(tensors, {"n": b"1"}, {}, 10**9)


def test_numbers_are_aligned_so_that_every_chunk_can_be_mapped(tmp_path: Path) -> None:
    state = {"a": torch.randn(5, 3), "b": torch.randn(7).double(), "c": torch.randn(2, 2).bfloat16()}
    directory = write(tmp_path / "out", plan_dcp(targets(state), {"n": b"x" * 13}, {}, 10**9, 24), state)
    stored = read_metadata(directory)
    with DcpReader(stored) as reader:
        places = [reader._locate(key, chunk) for key, t in stored.tensors.items() for chunk in t.chunks]
        assert len(places) == 3 + 3 + 1
        assert [place.start % 64 for place in places] == [0] * 7
        assert reader.blob("n") == b"x" * 13


def test_torch_turns_it_into_the_nested_dict_that_was_meant(tmp_path: Path) -> None:
    dcp.save({"model": {"a.w": torch.ones(2)}, "optim": {"lr": 0.5}}, checkpoint_id=tmp_path / "source", no_dist=True)
    source = read_metadata(tmp_path / "source")
    with DcpReader(source) as reader:
        blobs = {key: reader.blob(key) for key in source.blobs}
    state = {"model.a.w": torch.arange(6.0).reshape(3, 2)}
    directory = write(tmp_path / "out", plan_dcp(targets(state), blobs, source.paths, 10**9), state)
    dcp_to_torch_save(directory, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert loaded["optim"] == {"lr": 0.5}
    assert torch.equal(loaded["model"]["a.w"], state["model.a.w"])


def test_fsdp2_loads_a_rewritten_training_state_on_one_two_and_three_ranks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", layers=1)
    run_jobs(("save", 1, tmp_path / "source", tmp_path / "saved", tmp_path / "saved.safetensors"))
    stored, expected = read_metadata(tmp_path / "saved"), load_file(tmp_path / "saved.safetensors")
    with DcpReader(stored) as reader:
        state = {key: reader.tensor(key) for key in stored.tensors}
        blobs = {key: reader.blob(key) for key in stored.blobs}
    layout = plan_dcp(targets(state), blobs, stored.paths, 100_000, 3000)
    assert len(layout.files) == 3
    write(tmp_path / "out", layout, state)
    run_jobs(*(("load", n, tmp_path / "source", tmp_path / "out", tmp_path / f"{n}.safetensors") for n in (1, 2, 3)))
    for ranks in (1, 2, 3):
        found = load_file(tmp_path / f"{ranks}.safetensors")
        assert found.keys() == expected.keys()
        assert all(same(found[key], tensor) for key, tensor in expected.items()), ranks
