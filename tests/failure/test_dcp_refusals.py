import io
import os
import pickle
import pickletools
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from gdagrow.errors import CheckpointError
from gdagrow.formats.dcp_metadata import read_metadata
from gdagrow.formats.dcp_reader import DcpReader

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    directory = tmp_path / "dcp"
    dcp.save({"w": torch.arange(12.0).reshape(4, 3), "n": 3}, checkpoint_id=directory, no_dist=True)
    return directory


def change(directory: Path, edit: Callable[[Metadata], object]) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    edit(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        DcpReader(read_metadata(directory)).tensor("w")
    return str(refused.value)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_metadata_with_code_is_refused_and_not_run(stored: Path, tmp_path: Path, protocol: int) -> None:
    (stored / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran"), protocol))
    assert "nothing in it was run" in refusal(stored)
    change_with_code = Metadata({}, planner_data={"w": Touch(tmp_path / "ran")}, storage_data={})
    (stored / ".metadata").write_bytes(pickle.dumps(change_with_code, protocol))
    assert "nothing in it was run" in refusal(stored)
    assert not (tmp_path / "ran").exists()


def test_the_refusal_names_what_the_pickle_asks_for(stored: Path, tmp_path: Path) -> None:
    (stored / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    assert "its pickle asks for 'posix.system', which no such file needs; nothing in it was run" in refusal(stored)


def test_a_chunk_with_code_is_refused_and_not_run(stored: Path, tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Touch(tmp_path / "ran"), 2))
        archive.writestr("archive/data/0", bytes(48))
    (stored / "__0_0.distcp").write_bytes(content.getvalue())

    def point(metadata: Metadata) -> None:
        info = metadata.storage_data[MetadataIndex("w", (0, 0))]
        info.offset, info.length = 0, len(content.getvalue())
        metadata.storage_data[MetadataIndex("n")].offset = 0
        metadata.storage_data[MetadataIndex("n")].length = 1

    change(stored, point)
    assert "__0_0.distcp: the chunk of 'w' at [0, 0]: its pickle asks for 'posix.system'" in refusal(stored)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (b"K\x04K\x03\x86", b"K\x05K\x03\x86", "its tensor reaches beyond its storage"),
        (b"K\x03K\x01\x86", b"K\x04K\x01\x86", "its tensor reaches beyond its storage"),
        (b"K\x0ct", b"K\x0dt", "expected 52 bytes of numbers, got 48"),
        (b"FloatStorage", b"HalfStorage", "expected 24 bytes of numbers, got 48"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001", "its numbers are missing"),
        (b"_rebuild_tensor_v2", b"_rebuild_parameter", "'torch._utils._rebuild_parameter', which no such file needs"),
    ],
)
def test_a_chunk_that_makes_no_sense(stored: Path, old: bytes, new: bytes, complaint: str) -> None:
    info = w_info(pickle.loads((stored / ".metadata").read_bytes()))
    blob = (stored / "__0_0.distcp").read_bytes()[info.offset : info.offset + info.length]
    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(blob)) as before, zipfile.ZipFile(content, "w") as after:
        for record in before.infolist():
            after.writestr(record.filename, before.read(record).replace(old, new))

    def point(metadata: Metadata) -> None:
        w_info(metadata).offset, w_info(metadata).length = 0, len(content.getvalue())
        metadata.state_dict_metadata.pop("n")
        metadata.storage_data.pop(MetadataIndex("n"))

    (stored / "__0_0.distcp").write_bytes(content.getvalue())
    change(stored, point)
    assert complaint in refusal(stored)


def w_info(metadata: Metadata) -> _StorageInfo:
    info: _StorageInfo = metadata.storage_data[MetadataIndex("w", (0, 0))]
    return info


def set_chunks(*boxes: tuple[tuple[int, int], tuple[int, int]]) -> Callable[[Metadata], None]:
    def edit(metadata: Metadata) -> None:
        info = metadata.storage_data.pop(MetadataIndex("w", (0, 0)))
        chunks = metadata.state_dict_metadata["w"].chunks
        chunks[:] = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
        metadata.storage_data |= {MetadataIndex("w", offsets): info for offsets, _ in boxes}

    return edit


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda m: setattr(w_info(m), "relative_path", "../secret"), "path of a file inside the directory, got '../s"),
        (lambda m: setattr(w_info(m), "relative_path", "/etc/passwd"), "inside the directory, got '/etc/passwd'"),
        (lambda m: setattr(w_info(m), "relative_path", "a/../../b"), "inside the directory, got 'a/../../b'"),
        (lambda m: setattr(w_info(m), "relative_path", ""), "inside the directory, got ''"),
        (lambda m: setattr(w_info(m), "relative_path", "gone"), "no file gone, where it says that 'w' is"),
        (lambda m: setattr(w_info(m), "offset", -1), "whole numbers of bytes"),
        (lambda m: setattr(w_info(m), "offset", 10**6), "__0_0.distcp is truncated: 'w' ends at byte"),
        (lambda m: setattr(w_info(m), "length", 47), "its chunk at [0, 0] has fewer bytes than [4, 3] takes"),
        (lambda m: setattr(w_info(m), "length", 1000), "the chunk of 'w' at [0, 0]: it is no file of torch.save"),
        (lambda m: setattr(w_info(m), "transform_descriptors", ["zstd"]), "through a transformation (compression)"),
        (lambda m: m.storage_data.clear(), "'w': storage_data does not say where its chunk at [0, 0] is"),
        (lambda m: setattr(m, "storage_data", None), "expected a table storage_data"),
        (lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", torch.complex64), "dtype complex64, expect"),
        (lambda m: setattr(m.state_dict_metadata["w"].properties, "layout", torch.sparse_coo), "a strided tensor"),
        (lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", torch.float16), "expected F16 of [4, 3], g"),
        (lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size([2**40, 2**40])), "overflows 63 bits"),
        (lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size([5, 3])), "cover 4 of dimension 0 in the s"),
        (set_chunks(((0, 0), (2, 3)), ((3, 0), (1, 3))), "leave a gap along dimension 0: expected one from 2, got 3"),
        (set_chunks(((0, 0), (3, 3)), ((2, 0), (2, 3))), "overlap along dimension 0: expected one from 3, got 2"),
        (set_chunks(((0, 0), (4, 2)), ((0, 1), (4, 2))), "overlap along dimension 1: expected one from 2, got 1"),
        (set_chunks(((0, 0), (4, 3)), ((0, 0), (4, 3))), "2 chunks hold the same, at [0, 0]"),
        (set_chunks(), "its chunks cover 0 of dimension 0 in the shape [4, 3]"),
    ],
)
def test_metadata_that_makes_no_sense(stored: Path, edit: Callable[[Metadata], object], complaint: str) -> None:
    change(stored, edit)
    found = refusal(stored)
    assert complaint in found
    assert str(stored) in found


def test_a_path_that_is_nested_too_deeply_to_be_shown(stored: Path) -> None:
    raw = (stored / ".metadata").read_bytes()
    (at,) = (at for opcode, found, at in pickletools.genops(raw) if found == "__0_0.distcp" and at is not None)
    end = raw.index(b"__0_0.distcp") + len("__0_0.distcp")
    (stored / ".metadata").write_bytes(raw[:at] + b")" + b"\x85" * 100_000 + raw[end:])
    assert "expected the path of a file inside the directory, got something else" in refusal(stored)


def test_links_do_not_lead_out(stored: Path, tmp_path: Path) -> None:
    (stored / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (stored / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    assert "is a link that leads out of its checkpoint directory" in refusal(stored)


def test_what_is_no_dcp_directory(tmp_path: Path) -> None:
    assert "is no distributed checkpoint: it has no file .metadata" in refusal(tmp_path)
    (tmp_path / "__0.metadata").write_bytes(b"")
    assert "each rank was saved by itself; save with collectives" in refusal(tmp_path)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_damaged_files_are_read_or_refused(stored: Path, name: str) -> None:
    rng, content, read = random.Random(3), (stored / name).read_bytes(), 0
    expected = torch.arange(12.0).reshape(4, 3)
    for turn in range(1500):
        data = bytearray(content)
        if turn % 3 == 0:
            del data[rng.randrange(len(data)) :]
        for _ in range(turn % 3):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (stored / name).write_bytes(data)
        try:
            metadata = read_metadata(stored)
            if "w" not in metadata.tensors:  # a damaged name
                continue
            found = DcpReader(metadata).tensor("w")
        except CheckpointError:
            continue
        read += 1
        assert found.numel() == expected.numel()
    assert 100 < read < 1400
