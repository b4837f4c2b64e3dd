import errno
import hashlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from gdagrow.errors import OutputError
from gdagrow.formats import direct_file
from gdagrow.formats.file_layout import FileLayout, TargetTensor
from gdagrow.formats.file_writer import BLOCK_BYTES, FileWriter
from gdagrow.formats.safetensors_layout import plan_shards

NUM_BYTES = 4 * BLOCK_BYTES + 5


def layout(num_bytes: int = NUM_BYTES) -> FileLayout:
    return plan_shards([TargetTensor("w", "U8", (num_bytes,))], 1 << 40)[0]


def write_all(path: Path) -> str:
    with FileWriter(path, layout()) as writer:
        writer.write(memoryview(bytes(NUM_BYTES)))
        return writer.close()


def refused(path: Path) -> str:
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(OutputError) as caught:
        write_all(path)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    return str(caught.value)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, room = os.write, [2 * BLOCK_BYTES + 1000]

    def write(file: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = real(file, data[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr(direct_file.os, "write", write)
    assert refused(tmp_path / "s") == (
        f"{tmp_path / 's'} cannot be written (No space left on device); free or choose another place"
    )


def test_a_disk_that_fails_at_the_last_sync_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(direct_file.os, "fsync", fsync)
    assert f"{tmp_path / 's'} cannot be written (Input/output error)" in refused(tmp_path / "s")


def test_a_disk_that_fails_when_the_file_is_closed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, refusals = os.close, []

    def close(file: int) -> None:
        real(file)
        if not refusals:
            refusals.append(file)
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(direct_file.os, "close", close)
    assert f"{tmp_path / 's'} cannot be written (Disk quota exceeded)" in refused(tmp_path / "s")


def test_a_file_size_limit_is_told(tmp_path: Path) -> None:
    code = """
        import resource, sys
        from pathlib import Path
        from gdagrow.errors import OutputError
        from gdagrow.formats.file_layout import TargetTensor
        from gdagrow.formats.file_writer import FileWriter
        from gdagrow.formats.safetensors_layout import plan_shards
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 * 2**20 + 7, 10 * 2**20 + 7))
        (layout,) = plan_shards([TargetTensor("w", "U8", (64 * 2**20,))], 1 << 40)
        try:
            with FileWriter(Path(sys.argv[1]), layout) as writer:
                writer.write(memoryview(bytes(64 * 2**20)))
                writer.close()
        except OutputError as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "s")], capture_output=True, text=True, timeout=60
    )
    assert run.stdout == f"{tmp_path / 's'} cannot be written (File too large); free or choose another place\n"
    assert run.stderr == ""


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write_all(tmp_path / "whole")
    real, calls = os.write, []

    def write(file: int, data: memoryview) -> int:
        calls.append(len(data))
        return real(file, data[: 3 * 2**20 + 11])

    monkeypatch.setattr(direct_file.os, "write", write)
    assert write_all(tmp_path / "parts") == expected
    assert len(calls) > 10
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_slow_disk_gets_the_bytes_that_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def write(file: int, data: memoryview) -> int:
        time.sleep(0.05)
        return real(file, data)

    monkeypatch.setattr(direct_file.os, "write", write)
    blocks = [bytes([i]) * BLOCK_BYTES for i in range(8)]
    with FileWriter(tmp_path / "s", layout(8 * BLOCK_BYTES)) as writer:
        for block in blocks:
            writer.write(memoryview(block))
        digest = writer.close()
    content = (tmp_path / "s").read_bytes()
    assert content[-8 * BLOCK_BYTES :] == b"".join(blocks)
    assert digest == hashlib.sha256(content).hexdigest()


def test_file_systems_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write_all(tmp_path / "whole")

    def no_direct(file: int, command: int, flags: int = 0) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.O_WRONLY

    with monkeypatch.context() as patch:
        patch.setattr(direct_file.fcntl, "fcntl", no_direct)
        assert write_all(tmp_path / "flag_refused") == expected
    real, refusals = os.write, [errno.EINVAL]

    def write(file: int, data: memoryview) -> int:
        if refusals:
            raise OSError(refusals[0], os.strerror(refusals.pop()))
        return real(file, data)

    monkeypatch.setattr(direct_file.os, "write", write)
    assert write_all(tmp_path / "write_refused") == expected
    assert (tmp_path / "flag_refused").read_bytes() == (tmp_path / "write_refused").read_bytes()


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no memory file system here")
def test_memory_file_system() -> None:
    path = Path(f"/dev/shm/gdagrow-test-{os.getpid()}")
    try:
        write_all(path)
        assert path.stat().st_size == layout().file_bytes
    finally:
        path.unlink()


def test_existing_file_and_missing_directory(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("mine")
    assert "cannot be written (File exists)" in refused(tmp_path / "s")
    assert (tmp_path / "s").read_text() == "mine"
    assert "cannot be written (No such file or directory)" in refused(tmp_path / "absent" / "s")


def test_too_few_and_too_many_bytes(tmp_path: Path) -> None:
    with FileWriter(tmp_path / "few", layout(10)) as writer:
        writer.write(memoryview(bytes(9)))
        with pytest.raises(OutputError, match=r"few: expected 10 bytes, got 9; report this as a bug"):
            writer.close()
    with (
        FileWriter(tmp_path / "many", layout(10)) as writer,
        pytest.raises(OutputError, match=r"many: expected 10 bytes, got more; report this as a bug"),
    ):
        writer.write(memoryview(bytes(11)))


def test_a_writer_that_is_left_or_aborted_lets_go(tmp_path: Path) -> None:
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt), FileWriter(tmp_path / "s", layout()) as writer:  # noqa: PT012
        writer.write(memoryview(bytes(BLOCK_BYTES)))
        raise KeyboardInterrupt
    writer.abort()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_a_header_that_the_format_cannot_hold() -> None:
    with pytest.raises(
        OutputError, match=r"would need a header of \d+ bytes for 1 tensors, expected at most 100000000"
    ):
        plan_shards([TargetTensor("w" * 100_000_000, "U8", (1,))], 100)
