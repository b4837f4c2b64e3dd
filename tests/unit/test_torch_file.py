"""Files of torch.save: located without being read, laid out without being had, and never run."""

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from gdagrow.errors import CheckpointError
from gdagrow.formats.file_layout import TargetTensor
from gdagrow.formats.file_writer import FileWriter, tensor_bytes
from gdagrow.formats.torch_file import (
    TorchFileHeader,
    TorchFileReader,
    lay_out_torch_file,
    read_small,
    read_torch_file,
)
from gdagrow.header import TensorInfo

TREE: dict[str, Any] = {
    "state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.arange(12.0).view(3, 4)}, 1: {}},
    "half": torch.arange(5).bfloat16(), "none": torch.empty(0, 4), "words": ["a", ("b", 1.5)], "int": torch.arange(3),
    "ordered": OrderedDict(z=1, a=None),
}  # fmt: skip


def test_tensors_are_found_where_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save(TREE, path)
    tree = read_torch_file(path)
    assert (tree["words"], tree["ordered"], tree["state"][1]) == (TREE["words"], TREE["ordered"], {})
    for info, tensor in (
        (tree["state"][0]["exp_avg"], TREE["state"][0]["exp_avg"]), (tree["half"], TREE["half"]),
        (tree["none"], TREE["none"]), (tree["int"], TREE["int"]), (tree["state"][0]["step"], torch.tensor(7.0)),
    ):  # fmt: skip
        assert isinstance(info, TensorInfo)
        assert torch.equal(read_small(path, info), tensor)
    assert tree["state"][0]["exp_avg"].name == "state/0/exp_avg"


def test_rows_are_read_from_the_file_alone(tmp_path: Path) -> None:
    torch.save(TREE, tmp_path / "state.pt")
    header = TorchFileHeader.of(tmp_path / "state.pt", read_torch_file(tmp_path / "state.pt"))
    assert header.tensors.keys() == {"state/0/step", "state/0/exp_avg", "half", "none"}
    with TorchFileReader(header) as reader:
        assert torch.equal(reader.rows("state/0/exp_avg", 1, 3), TREE["state"][0]["exp_avg"][1:3])
        assert torch.equal(reader.tensor("half"), TREE["half"])


def test_views_that_share_a_storage(tmp_path: Path) -> None:
    whole = torch.arange(20.0).view(5, 4)
    torch.save({"rows": whole[2:4], "whole": whole}, tmp_path / "views.pt")
    tree = read_torch_file(tmp_path / "views.pt")
    assert torch.equal(read_small(tmp_path / "views.pt", tree["rows"]), whole[2:4])
    torch.save({"turned": whole.t()}, tmp_path / "turned.pt")
    with pytest.raises(CheckpointError, match=r"tensor turned: .* strides \[1, 4\]; save a contiguous copy"):
        read_torch_file(tmp_path / "turned.pt")


@pytest.mark.parametrize("mmap", [False, True])
def test_a_layout_that_is_filled_is_what_torch_loads(tmp_path: Path, mmap: bool) -> None:
    filled = {"a": torch.randn(3, 5), "b": torch.randn(2).bfloat16(), "none": torch.empty(0, 4)}
    codes = {torch.float32: "F32", torch.bfloat16: "BF16"}
    targets = {name: TargetTensor(name, codes[tensor.dtype], tuple(tensor.shape)) for name, tensor in filled.items()}
    layout = lay_out_torch_file(
        "optimizer.pt", {**TREE, "nested": [targets["b"], {"a": targets["a"]}, targets["none"]]}
    )
    with FileWriter(tmp_path / layout.file, layout) as writer:
        for tensor in layout.tensors:
            writer.write(tensor_bytes(filled[tensor.name]))
        writer.close()
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True, mmap=mmap)
    b, of_a, none = loaded["nested"]
    assert torch.equal(b, filled["b"])
    assert torch.equal(of_a["a"], filled["a"])
    assert none.shape == (0, 4)
    assert torch.equal(loaded["state"][0]["exp_avg"], TREE["state"][0]["exp_avg"])
    assert loaded["state"][0]["step"] == 7
    assert torch.equal(loaded["int"], TREE["int"])
    assert loaded["ordered"] == TREE["ordered"]


def test_a_layout_takes_no_memory_for_what_is_not_there() -> None:
    layout = lay_out_torch_file("huge.pt", {"huge": TargetTensor("huge", "F32", (2**20, 2**20))})
    assert layout.data_bytes == 2**42
    assert sum(len(octets) for _, octets in layout.literals) < 10_000


class Running:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state": Running(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil.pt asks for more than tensors .*posix.*it was not run"):
        read_torch_file(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_what_is_nested_too_deeply(tmp_path: Path) -> None:
    itself: list[Any] = []
    itself.append(itself)
    torch.save(TREE, tmp_path / "whole.pt")
    for number, octets in enumerate((pickle.dumps(itself, 2), b"\x80\x02)" + b"\x85" * 20_000 + b".")):
        path = tmp_path / f"{number}.pt"
        with zipfile.ZipFile(tmp_path / "whole.pt") as archive, zipfile.ZipFile(path, "w") as changed:
            for record in archive.infolist():
                is_tree = record.filename.endswith("data.pkl")
                changed.writestr(record.filename, octets if is_tree else archive.read(record))
        with pytest.raises(CheckpointError, match="nested too deeply"):
            read_torch_file(path)


def test_what_is_no_such_file(tmp_path: Path) -> None:
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="not a file in torch's zip format"):
        read_torch_file(tmp_path / "pickle.pt")
    torch.save(TREE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="load and save it once with a current torch"):
        read_torch_file(tmp_path / "old.pt")
    torch.save(TREE, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive, zipfile.ZipFile(tmp_path / "packed.pt", "w") as packed:
        for record in archive.infolist():
            packed.writestr(record.filename, archive.read(record), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"packed.pt is compressed"):
        read_torch_file(tmp_path / "packed.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive, zipfile.ZipFile(tmp_path / "big.pt", "w") as big:
        for record in archive.infolist():
            octets = b"big" if record.filename.endswith("/byteorder") else archive.read(record)
            big.writestr(record.filename, octets)
    with pytest.raises(CheckpointError, match="on a big-endian machine"):
        read_torch_file(tmp_path / "big.pt")
    with pytest.raises(CheckpointError, match="cannot be read \\(No such file"):
        read_torch_file(tmp_path / "missing.pt")
    for stop in (0, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.pt").write_bytes(content[:stop])
        with pytest.raises(CheckpointError, match=r"cut.pt"):
            read_torch_file(tmp_path / "cut.pt")


def test_damage_anywhere_is_told_in_a_sentence(tmp_path: Path) -> None:
    torch.save(TREE, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    damaged = 0
    for at in range(0, len(content), 37):
        (tmp_path / "bad.pt").write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            read_torch_file(tmp_path / "bad.pt")
        except CheckpointError:
            damaged += 1
    assert damaged > 10
