"""What stands in the place of a checkpoint's files: links that lead out or in circles, pipes, directories, devices."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import pytest

from tests.checkpoints import write_checkpoint, write_distributed_state, write_training_state
from tests.command import call

TINY = {"groups": 1, "ratio": 3, "head_dim": 2, "hidden": 4, "ffn": 4, "vocab": 5, "layers": 1}


class HangsError(BaseException):
    """A command did not come back."""


@pytest.fixture(autouse=True)
def _comes_back() -> Iterator[None]:
    """Nothing here waits for anything."""

    def stop(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise HangsError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def out_of_it(path: Path) -> None:
    elsewhere = path.parents[1] / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def out_of_it_by_dots(path: Path) -> None:
    path.rename(path.parents[1] / "elsewhere")
    path.symlink_to("../elsewhere")


def in_a_circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


PLACES = (out_of_it, out_of_it_by_dots, in_a_circle, to_nowhere, a_pipe, a_directory, a_device)


def sharded(directory: Path) -> None:
    write_checkpoint(directory, **TINY, max_shard_bytes=300)


def distributed(directory: Path) -> None:
    write_checkpoint(directory.parent / "whole", **TINY)
    write_distributed_state(directory.parent / "whole", directory)
    shutil.copy(directory.parent / "whole/config.json", directory)


def trained(directory: Path) -> None:
    write_training_state(directory, **TINY)


FILES: dict[str, Callable[[Path], object]] = {
    "config.json": lambda directory: write_checkpoint(directory, **TINY),
    "model.safetensors": lambda directory: write_checkpoint(directory, **TINY),
    "model.safetensors.index.json": sharded,
    "model-00002-of-*.safetensors": sharded,
    "growth.json": lambda directory: write_grown(directory),
    "optimizer.pt": trained,
    "trainer_state.json": trained,
    ".metadata": distributed,
    "__0_0.distcp": distributed,
}


def write_grown(directory: Path) -> None:
    write_checkpoint(directory, **TINY)
    (directory / "growth.json").write_text("{}")


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("file", FILES)
def test_what_is_no_file_of_the_directory_is_refused_at_once(
    file: str, place: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    FILES[file](model)
    place(next(model.glob(file)))
    outcome = call(capsys, "expand", model, tmp_path / "grown", "--signal-x2")
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert str(model) in outcome.err
    assert not (tmp_path / "grown").exists()
