"""Places that refuse, change or are shared: a full disk, one to be read only, a target that another command makes."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.cases import EXPORT, SHARDS, TARGET, TO_DCP, Case
from tests.faults.injector import ROOT, Forker

# A disk of 64 kB of its own, in a name space of its own; what is behind the mount runs in it.
MOUNT = """
import os, subprocess, sys
directory, options, *words = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", directory], check=True)
if options:
    subprocess.run(["mount", "-o", f"remount,{options}", directory], check=True)
ended = subprocess.run([sys.executable, "-m", "gdagrow_cli.main", *words])
print(sorted(os.listdir(directory)))
sys.exit(ended.returncode)
"""


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    with Forker() as running:
        yield running


@pytest.fixture(scope="module")
def other() -> Iterator[Forker]:
    with Forker() as running:
        yield running


@pytest.fixture
def source(tmp_path: Path) -> Path:
    SHARDS.write(tmp_path / "source")
    return tmp_path / "source"


def mounted(source: Path, options: str, *more: str) -> subprocess.CompletedProcess[str]:
    disk = source.with_name("disk")
    disk.mkdir()
    words = ["expand", str(source), str(disk / "made"), "--hidden-x2", "--quiet", *more]
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", MOUNT, str(disk), options, *words],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip


def require_name_spaces() -> None:
    tried = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this system lets no user mount in a name space of its own: {tried.stderr.strip()}")


def test_a_disk_that_is_too_small(source: Path) -> None:
    require_name_spaces()
    ended = mounted(source, "")
    assert ended.returncode == 2, ended
    assert "has too little space" in ended.stderr
    assert ended.stdout == "[]\n"


def test_a_disk_that_is_read_only(source: Path) -> None:
    require_name_spaces()
    ended = mounted(source, "ro")
    assert ended.returncode == 2, ended
    assert "cannot be written (Read-only file system); choose another place for made" in ended.stderr
    assert ended.stdout == "[]\n"


@pytest.mark.parametrize(("first", "second"), [(SHARDS, SHARDS), (SHARDS, TO_DCP), (EXPORT, SHARDS)])
def test_a_target_that_another_command_makes(
    forker: Forker, other: Forker, tmp_path: Path, source: Path, first: Case, second: Case
) -> None:
    child = forker.pause(tmp_path, *first.words(tmp_path), at=12)
    assert child
    refused = other.run(tmp_path, *second.words(tmp_path))
    assert refused.code == 2
    assert f"{tmp_path / TARGET} is being written by another process" in refused.err
    os.kill(child, signal.SIGCONT)
    assert forker.wait().code == 0
    assert sorted(os.listdir(tmp_path)) == [TARGET, "source"]


def take(target: Path) -> None:
    target.mkdir()
    (target / "theirs").touch()


def remove_parent(target: Path) -> None:
    shutil.rmtree(target.parent)


def lock_parent(target: Path) -> None:
    target.parent.rename(target.parent.with_name("moved"))


@pytest.mark.parametrize(
    ("change", "told"),
    [(take, "made exists and is not empty"), (remove_parent, "No such file or dir"), (lock_parent, "No such file or")],
)
def test_a_place_that_changes_while_it_is_written(
    forker: Forker, tmp_path: Path, source: Path, change: Callable[[Path], None], told: str
) -> None:
    place = tmp_path / "place"
    for at in (12, 30):
        place.mkdir()
        words = ["expand", source, place / TARGET, "--hidden-x2", "--quiet", "--max-shard-size", "9kB"]
        child = forker.pause(place, *words, at=at)
        assert child
        change(place / TARGET)
        os.kill(child, signal.SIGCONT)
        ended = forker.wait()
        assert (ended.code, ended.err.count("\n")) == (2, 1), ended
        assert told in ended.err or "has lost" in ended.err, ended
        left = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob(TARGET)}
        assert left == ({"place"} if change is take else set())
        assert change is not take or os.listdir(place / TARGET) == ["theirs"]
        for name in set(os.listdir(tmp_path)) - {"source"}:
            shutil.rmtree(tmp_path / name)
