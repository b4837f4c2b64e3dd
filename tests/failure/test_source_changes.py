"""A source that changes while something is made of it: nothing is published, whatever the change and however late."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.checkpoints import listing
from tests.faults.cases import DISTRIBUTED, EXPORT, SHARDS, TARGET, TO_DCP, TO_SAFETENSORS, TRAINER, Case
from tests.faults.injector import Fault, Forker


def write_into(path: Path) -> None:
    """Change bytes of weights, which lie towards the end."""
    with path.open("r+b") as file:
        file.seek(-200, os.SEEK_END)
        octets = file.read(2)
        file.seek(-200, os.SEEK_END)
        file.write(bytes(octet ^ 1 for octet in octets))


def write_and_set_time(path: Path) -> None:
    stat = path.stat()
    write_into(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 200)


def replace(path: Path) -> None:
    stat, other = path.stat(), path.with_name("other")
    shutil.copy2(path, other)
    write_into(other)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, path)


CHANGES: list[Callable[[Path], None]] = [write_into, write_and_set_time, cut, replace, Path.unlink]
CASES = {
    SHARDS: "*.safetensors", TRAINER: "optimizer.pt", DISTRIBUTED: "*.distcp", TO_DCP: "*.safetensors",
    TO_SAFETENSORS: "*.distcp", EXPORT: "*.safetensors",
}  # fmt: skip
WEIGHTS = ("safetensors", "pt", "distcp")
TOLD = (
    "changed while it was being read", "changed since its directory was read", "cannot be read", "cannot be copied",
)  # fmt: skip


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    with Forker() as running:
        yield running


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_change_after_the_first_byte_or_the_last_is_refused(forker: Forker, tmp_path: Path, case: Case) -> None:
    words, target = case.words(tmp_path), tmp_path / TARGET
    case.write(tmp_path / "kept")
    shutil.copytree(tmp_path / "kept", tmp_path / "source")
    calls = forker.run(tmp_path, *words, fault=Fault()).calls
    shutil.rmtree(target)
    weights = [at for at, call in enumerate(calls, 1) if call.startswith("write") and call.endswith(WEIGHTS)]
    last = next(at for at, call in enumerate(calls, 1) if call.startswith("close") and at > weights[-1])
    for at in (weights[0], last) if case is SHARDS else (last,):
        for change in CHANGES:
            child = forker.pause(tmp_path, *words, at=at)
            assert child, f"call {at} never came"
            changed = max((tmp_path / "source").glob(CASES[case]))
            change(changed)
            os.kill(child, signal.SIGCONT)
            ended = forker.wait()
            assert ended.code == 2, (at, change, ended)
            assert ended.err.count("\n") == 1, ended
            assert f"{changed}" in ended.err, ended
            assert any(told in ended.err for told in TOLD), ended
            assert sorted(os.listdir(tmp_path)) == ["kept", "source"]
            shutil.rmtree(tmp_path / "source")
            shutil.copytree(tmp_path / "kept", tmp_path / "source")


def test_a_change_after_the_hash_leaves_what_was_made_of_the_old_bytes(forker: Forker, tmp_path: Path) -> None:
    words, target = SHARDS.words(tmp_path), tmp_path / TARGET
    SHARDS.write(tmp_path / "source")
    calls = forker.run(tmp_path, *words, fault=Fault()).calls
    whole = listing(target)
    shutil.rmtree(target)
    renames = [number for number, call in enumerate(calls, 1) if call.startswith("rename")]
    child = forker.pause(tmp_path, *words, at=renames[-1])
    assert child
    write_into(next((tmp_path / "source").glob("*.safetensors")))
    os.kill(child, signal.SIGCONT)
    assert forker.wait().code == 0
    assert listing(target) == whole
