"""One file is written whole or not at all, and takes the place of another only where that was asked for."""

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from gdagrow.errors import OutputError
from gdagrow.formats.atomic_file import require_writable, write_whole


def test_it_appears_whole_with_the_usual_mode(tmp_path: Path) -> None:
    write_whole(tmp_path / "page", b"x" * 100_000, replace=False)
    assert (tmp_path / "page").read_bytes() == b"x" * 100_000
    (tmp_path / "plain").touch()
    assert (tmp_path / "page").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page", "plain"]


def test_what_is_there_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(b"old")
    with pytest.raises(OutputError, match="page exists; choose another output, or replace it with --force"):
        write_whole(tmp_path / "page", b"new", replace=False)
    assert (tmp_path / "page").read_bytes() == b"old"
    write_whole(tmp_path / "page", b"new", replace=True)
    assert (tmp_path / "page").read_bytes() == b"new"


@pytest.mark.parametrize("what", ["directory", "link", "dangling link"])
def test_only_a_file_is_replaced(tmp_path: Path, what: str) -> None:
    target, other = tmp_path / "page", tmp_path / "other"
    if what == "directory":
        target.mkdir()
    else:
        target.symlink_to(other)
    if what == "link":
        other.write_bytes(b"kept")
    with pytest.raises(OutputError, match="exists and is not a file"):
        write_whole(target, b"new", replace=True)
    assert not other.exists() or other.read_bytes() == b"kept"


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere is not a directory; create it before page is put into it"):
        require_writable(tmp_path / "nowhere" / "page", replace=True)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failure_leaves_nothing_and_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    (tmp_path / "page").write_bytes(b"old")

    def fail(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OutputError, match=r"page cannot be written \(No space left on device\); choose another place"):
        write_whole(tmp_path / "page", b"new", replace=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"page": b"old"}
