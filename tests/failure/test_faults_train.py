"""Faults below the writers of a training run: a state is whole or not there, and what is left can be gone on with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gdagrow.errors import TrainError
from gdagrow.train.run_directory import clear, held, remove, saving_directory, states, writing
from tests.faults.injector import ROOT, library


def sweep(directory: Path, *flags: str) -> dict[str, dict[str, int]]:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.faults.saving", directory, *flags], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "LD_PRELOAD": str(library())}, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found: dict[str, dict[str, int]] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_a_state_killed_at_every_call_and_a_disk_that_refuses(tmp_path: Path) -> None:
    """With the rotation of states behind it; what differs of what is left is gone on with to the same weights."""
    found = sweep(tmp_path, "--where", "state", "--faults", "kill,error", "--every", "6")
    figures = found["where"]["state"]  # type: ignore[index]
    assert figures["calls"] > 40
    assert figures["faults"] == figures["calls"] + figures["calls"] // 6
    assert 5 < figures["whole"] < figures["faults"] / 2
    assert found["resumed"] >= 4


def test_only_one_process_trains_in_a_directory(tmp_path: Path) -> None:
    with held(tmp_path / "run"):
        told = r"another process trains in .*run; wait for it or choose another directory"
        with pytest.raises(TrainError, match=told), held(tmp_path / "run"):
            pytest.fail("entered")
        (tmp_path / "run" / "x").touch()
    with held(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path / "run") == ["x"]


def test_a_run_that_was_refused_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(TrainError), held(tmp_path / "deep" / "run"):
        raise TrainError("no")
    assert os.listdir(tmp_path / "deep") == []


def test_what_is_half_removed_does_not_look_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("checkpoint-2", "checkpoint-4", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()

    def killed(path: Path, **_: object) -> None:
        if path.name.startswith("removed-"):
            raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr("gdagrow.train.run_directory.shutil.rmtree", killed)
        with pytest.raises(InterruptedError):
            clear(tmp_path)
    assert len(states(tmp_path)) == 2
    remove(tmp_path, "model")
    assert not (tmp_path / "model").exists()
    clear(tmp_path)
    assert os.listdir(tmp_path) == []
    assert not saving_directory(tmp_path).exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("basic_ios::clear: iostream error"), "the disk took only a part of it"),
        (ValueError("Error while serializing: I/O error: No room (os error 28)"), "No space left on device"),
    ],
)
def test_errors_of_writers_in_other_languages(tmp_path: Path, error: Exception, reason: str) -> None:
    told = rf"checkpoint-2 cannot be written in .* \({reason}; "
    with pytest.raises(TrainError, match=told), writing(tmp_path, "checkpoint-2"):
        raise error
