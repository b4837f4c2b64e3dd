import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gdagrow.errors import CheckpointError
from gdagrow.formats.safetensors_header import read_header
from gdagrow.formats.safetensors_reader import TensorReader
from gdagrow.formats.weight_files import RowsInFile, WeightFiles
from gdagrow.header import Header


def checkpoint(directory: Path, tensors: dict[str, torch.Tensor]) -> Header:
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return read_header(directory)


def sparse(directory: Path, shape: list[int], dtype: str, item_bytes: int, shift: int = 0) -> Path:
    """Write a shard of one tensor of zeros that takes no room on the disk, its data at `shift` modulo 8."""
    num_bytes = item_bytes
    for size in shape:
        num_bytes *= size
    text = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, num_bytes]}}).encode()
    text += b" " * ((shift - len(text)) % 8)
    path = directory / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        try:
            file.truncate(8 + len(text) + num_bytes)
        except OSError:
            pytest.skip("no sparse files of this size here")
    (directory / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_the_stored_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {
        "matrix": torch.randn(37, 5).to(dtype),
        "cube": torch.randn(4, 3, 2).to(dtype),
        "vector": torch.randn(11).to(dtype),
        "scalar": torch.tensor(2.5, dtype=dtype),
        "empty": torch.empty(3, 0, dtype=dtype),
    }
    with TensorReader(checkpoint(tmp_path, tensors)) as reader, warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, tensor in tensors.items():
            assert reader.tensor(name).dtype == dtype
            assert torch.equal(reader.tensor(name), tensor)
        for name, tensor in tensors.items():
            if tensor.ndim:
                for begin in range(tensor.shape[0] + 1):
                    for end in range(begin, tensor.shape[0] + 1):
                        assert torch.equal(reader.rows(name, begin, end), tensor[begin:end])
        assert torch.equal(reader.rows("scalar", 0, 1), tensors["scalar"])


def test_tensors_survive_the_reader_and_writing_to_them_does_not_reach_the_file(tmp_path: Path) -> None:
    with TensorReader(checkpoint(tmp_path, {"w": torch.ones(100)})) as reader:
        view = reader.tensor("w")
    view.zero_()
    assert torch.equal(view, torch.zeros(100))
    with TensorReader(read_header(tmp_path)) as reader:
        assert torch.equal(reader.tensor("w"), torch.ones(100))


@pytest.mark.parametrize("shift", range(8))
def test_data_that_the_file_does_not_align(tmp_path: Path, shift: int) -> None:
    path = sparse(tmp_path, [9, 3], "F32", 4, shift)
    expected = torch.randn(9, 3)
    content = path.read_bytes()
    path.write_bytes(content[:-108] + bytes(expected.flatten().view(torch.uint8).tolist()))
    with TensorReader(read_header(tmp_path)) as reader:
        assert torch.equal(reader.tensor("w"), expected)
        assert torch.equal(reader.rows("w", 2, 7), expected[2:7])
        assert reader.rows("w", 2, 7).data_ptr() % 4 == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_file_larger_than_memory_is_read_by_rows(tmp_path: Path) -> None:
    rows = 2**40 // 2**14
    sparse(tmp_path, [rows, 2**13], "BF16", 2)
    with TensorReader(read_header(tmp_path)) as reader:
        before = status_kib("VmSize")
        view = reader.rows("w", 1, 4)
        # A private mapping of the whole file is refused where memory may not be overcommitted.
        assert status_kib("VmSize") - before < 2**20
        assert torch.equal(view, torch.zeros(3, 2**13, dtype=torch.bfloat16))


def status_kib(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_reading_takes_the_memory_of_what_is_read_and_gives_it_back(tmp_path: Path) -> None:
    sparse(tmp_path, [64, 2**20], "F32", 4)
    # In a process of its own, whose memory no other test has left in whatever state.
    code = """
        import sys
        from pathlib import Path
        from gdagrow.formats.safetensors_header import read_header
        from gdagrow.formats.safetensors_reader import TensorReader
        def anonymous_kib():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
        with TensorReader(read_header(Path(sys.argv[1]))) as reader:
            assert reader.rows("w", 0, 1).sum().item() == 0
            before, most = anonymous_kib(), 0
            # More at once than the C library ever keeps for the next one (32 MiB): what is dropped leaves the process.
            for row in range(0, 60, 12):
                rows = reader.rows("w", row, row + 12)
                assert rows.sum().item() == 0
                most = max(most, anonymous_kib() - before)
            del rows
            print(most, anonymous_kib() - before)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    most, left = map(int, run.stdout.split())
    # Of 240 MiB, 48 are in use, and 48 more while the next rows replace these.
    assert most < 104 * 1024
    assert left < 8 * 1024


def test_a_file_that_is_cut_off_while_it_is_open_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the look at its size, as it may happen: of a mapped file, the process would end here."""
    with TensorReader(checkpoint(tmp_path, {"w": torch.ones(5000, 3)})) as reader:
        find = reader.find

        def cut(*rows: Any) -> RowsInFile:
            found = find(*rows)
            os.truncate(tmp_path / "model.safetensors", found.start + 5000)
            return found

        monkeypatch.setattr(reader, "find", cut)
        with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was being read"):
            reader.rows("w", 0, 5000)


def test_a_dtype_that_is_no_float_is_refused(tmp_path: Path) -> None:
    header = checkpoint(tmp_path, {"ids": torch.arange(4)})
    with (
        TensorReader(header) as reader,
        pytest.raises(
            CheckpointError,
            match=r"tensor 'ids': expected a dtype of F64, F32, F16, BF16, got I64; convert or remove it",
        ),
    ):
        reader.tensor("ids")


def test_a_header_that_changed_since_it_was_read_is_refused(tmp_path: Path) -> None:
    header = checkpoint(tmp_path, {"w": torch.ones(4, 2)})
    save_file({"w": torch.ones(2, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was being read"):
        TensorReader(header)


def test_a_shard_that_vanished_is_refused(tmp_path: Path) -> None:
    header = checkpoint(tmp_path, {"w": torch.ones(4, 2)})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read \(No such file or directory\)"):
        TensorReader(header)


@pytest.mark.parametrize("how", ["grown", "touched"])
def test_a_shard_that_changes_while_open_is_refused(tmp_path: Path, how: str) -> None:
    path = tmp_path / "model.safetensors"
    with TensorReader(checkpoint(tmp_path, {"w": torch.ones(4, 2)})) as reader:
        assert reader.rows("w", 0, 2).sum() == 4
        if how == "grown":
            with path.open("ab") as file:
                file.write(b"more")
        else:
            os.utime(path, (1, 1))
        with pytest.raises(CheckpointError, match="changed while it was being read: its header, size or time"):
            reader.rows("w", 2, 4)


def test_open_files_are_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    header = checkpoint(tmp_path, {"w": torch.ones(4, 2)})
    with TensorReader(header) as reader:
        reader.tensor("w")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        TensorReader(header)
    assert len(os.listdir("/proc/self/fd")) == before


def test_rows_are_read_into_memory_of_the_callers(tmp_path: Path) -> None:
    expected = torch.randn(9, 3)
    with WeightFiles(checkpoint(tmp_path, {"w": expected})) as files:
        rows = files.find("w", 2, 7)
        assert (rows.shape, rows.num_bytes) == ((5, 3), 60)
        octets = bytearray(24)
        files.read(rows, 12, memoryview(octets))
        assert octets == bytes(expected[3:5].flatten().view(torch.uint8).tolist())


def test_a_file_that_becomes_shorter_between_finding_and_reading_is_refused(tmp_path: Path) -> None:
    with WeightFiles(checkpoint(tmp_path, {"w": torch.ones(9, 3)})) as files:
        rows = files.find("w", 2, 7)
        os.truncate(tmp_path / "model.safetensors", rows.start + 30)
        with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was being read"):
            files.read(rows, 0, memoryview(bytearray(60)))
