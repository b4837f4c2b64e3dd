"""The directory of a training run: its states, of which only whole ones have their name, and which one is the last.

recipe.yaml     the recipe as used
metrics.jsonl   one JSON object a line, each with a step
checkpoint-200  the state after step 200, as the engine writes it
grown-200       the same state, grown: what step 201 goes on from
model           the model at the end
tokens          the text as tokens
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gdagrow.errors import GdagrowError, TrainError

RECIPE_FILE: Final = "recipe.yaml"
METRICS_FILE: Final = "metrics.jsonl"
MODEL: Final = "model"
TOKENS: Final = "tokens"

_STATE: Final = re.compile(r"(checkpoint|grown)-(0|[1-9]\d{0,14})")
_SAVING: Final = ".saving"
# What the writers of torch and safetensors say when a disk refuses; neither raises an OSError.
_NUMBER: Final = re.compile(r"os error (\d{1,4})")
_REFUSED: Final = re.compile(r"inline_container|PytorchStreamWriter|iostream error|I/O error|os error", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class RunState:
    """A state on the disk; a grown one comes after the one that it grew from."""

    step: int
    grown: bool
    directory: Path


def checkpoint_name(step: int) -> str:
    """The name of the state after a step."""
    return f"checkpoint-{step}"


def grown_name(step: int) -> str:
    """The name of what that state was grown into."""
    return f"grown-{step}"


def states(run: Path) -> list[RunState]:
    """The whole states of a run, oldest first; a state that is being written has another name."""
    found = ((path, _STATE.fullmatch(path.name)) for path in (run.iterdir() if run.is_dir() else ()))
    return sorted(
        RunState(int(match.group(2)), match.group(1) == "grown", path)
        for path, match in found if match and path.is_dir()
    )  # fmt: skip


def last_state(run: Path) -> RunState | None:
    """The state that a run goes on from; None at its start."""
    return next(reversed(states(run)), None)


def is_begun(run: Path) -> bool:
    """Whether there is anything of a run in a directory."""
    return run.is_dir() and any(run.iterdir())


def clear(run: Path) -> None:
    """Remove what a run left, and nothing else."""
    remove_unfinished(run)
    for name in [*(state.directory.name for state in states(run)), MODEL, TOKENS]:
        remove(run, name)
    for name in (METRICS_FILE, RECIPE_FILE):
        (run / name).unlink(missing_ok=True)
    remove_unfinished(run)


def remove(run: Path, name: str) -> None:
    """Remove a directory of a run, if it is there."""
    if (run / name).exists():
        # Renamed first: what is half removed must not look whole.
        doomed = saving_directory(run) / f"removed-{name}"
        shutil.rmtree(doomed, ignore_errors=True)
        doomed.parent.mkdir(exist_ok=True)
        os.rename(run / name, doomed)
        shutil.rmtree(doomed)


def remove_unfinished(run: Path) -> None:
    """Remove what was being written, or removed, when a run was killed."""
    shutil.rmtree(run / _SAVING, ignore_errors=True)
    for name in (METRICS_FILE, RECIPE_FILE):
        _unfinished(run / name).unlink(missing_ok=True)


def replace_file(path: Path, content: str) -> None:
    """Write a small file of a run so that one who is killed in the midst of it has the old one still."""
    unfinished = _unfinished(path)
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}")


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Keep other processes from training in a run's directory meanwhile; it is made if it is missing.

    Raises:
        TrainError: it cannot be made, or another process trains in it.
    """
    was_there = run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = os.open(run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise TrainError(f"{run} cannot be made ({error.strerror}); choose another place") from None
    try:
        with suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainError(f"another process trains in {run}; wait for it or choose another directory") from None
        yield
    finally:
        if not was_there:
            with suppress(OSError):  # there is something in it
                run.rmdir()
        os.close(lock)


def saving_directory(run: Path) -> Path:
    """Where a state is written until it is whole."""
    return run / _SAVING


def publish(run: Path, name: str) -> None:
    """Put what was written in the saving directory into place, once it is on the disk."""
    partial = saving_directory(run) / name
    for directory, _, files in os.walk(partial):
        for file in files:
            _sync(Path(directory, file))
        _sync(Path(directory))
    os.rename(partial, run / name)
    _sync(run)


def keep_last(run: Path, count: int) -> None:
    """Remove all states but the last `count`."""
    for state in states(run)[:-count]:
        remove(run, state.directory.name)


@contextmanager
def writing(run: Path, what: str) -> Iterator[None]:
    """Say it when the disk refuses something of a run, whichever library was writing.

    Raises:
        TrainError: it does.
    """
    try:
        yield
    except GdagrowError:
        raise
    except BaseException as error:  # torch's error of a distributed save is no Exception
        if not (isinstance(error, OSError) or _REFUSED.search(str(error))):
            raise
        free = shutil.disk_usage(run).free
        number = _NUMBER.search(str(error))  # of safetensors' error; torch's does not say why
        reason = os.strerror(int(number[1])) if number else "the disk took only a part of it"
        reason = (isinstance(error, OSError) and error.strerror) or reason
        raise TrainError(
            f"{what} cannot be written in {run} ({reason}; {free:,} bytes free); free some space and go on with "
            "--resume"
        ) from None


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
