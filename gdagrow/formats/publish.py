"""Publish a directory whole or not at all, with the companion files of the checkpoint that it came from."""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from gdagrow.errors import CheckpointError, OutputError
from gdagrow.formats.links import require_inside

# What of a source is not carried along, and why: pattern of a name, reason. A trailing slash means a directory.
_REWRITTEN: Final = (("config.json", "rewritten"), ("growth.json", "rewritten"))  # at the top of the directory only
_STATE: Final = "training state of the source, wrong beside grown weights"
_WEIGHTS: Final = "weights of the source"
_LEFT_BEHIND: Final = (
    *((pattern, _STATE) for pattern in (
        "optimizer*.pt", "optimizer*.bin", "scheduler*.pt", "scaler*.pt", "rng_state*.pth", "trainer_state.json",
        "training_args.bin", "global_step*/", "checkpoint-*/", "latest",
    )),
    *((pattern, _WEIGHTS) for pattern in (
        "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf", "*.h5", "*.h5.index.json",
        "*.msgpack", "*.msgpack.index.json", "*.pt", "*.pth", "*.onnx", "*.onnx_data",
        "*.distcp", ".metadata",
    )),
    (".git/", "history of the source"),
    (".cache/", "download records of the source"),
    (".*.gdagrow-partial-*/", "an unfinished output of gdagrow"),
)  # fmt: skip


@dataclass(frozen=True)
class SkippedFile:
    """A file, or a directory with a trailing slash, that is not carried along; `path` is relative to the source."""

    path: str
    reason: str


@dataclass(frozen=True)
class Companions:
    """The files beside the weights: paths relative to the source that are copied, and those that are not."""

    copied: tuple[str, ...]
    skipped: tuple[SkippedFile, ...]


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside `target` that becomes `target` if the block ends well, else disappears.

    What earlier runs for the same target left when they were killed is removed first.

    Raises:
        OutputError: `target` exists and is not an empty directory, at entry or at the end, or its parent is not a
            directory that can be written.
    """
    target = Path(os.path.abspath(target))
    _require_free(target)
    try:
        _remove_stale(target)
        partial, lock = _create_partial(target)
    except OSError as error:
        raise OutputError(
            f"{target.parent} cannot be written ({error.strerror}); choose another place for {target.name}"
        ) from None
    try:
        yield partial
        _publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _require_free(target: Path) -> None:
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent} is not a directory; create it before {target.name} is put into it")
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise OutputError(f"{target} exists and is not a directory; remove it or choose another output")
    if any(target.iterdir()):
        raise _not_empty(target)


def _not_empty(target: Path) -> OutputError:
    return OutputError(f"{target} exists and is not empty; remove it or choose another output")


def _remove_stale(target: Path) -> None:
    ours = re.compile(re.escape(f".{target.name}.gdagrow-partial-") + "[0-9a-f]{6}")
    for path in target.parent.iterdir():
        if not ours.fullmatch(path.name):
            continue
        with suppress(PermissionError):  # another user's is not ours to remove
            if (lock := _try_lock(path)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _create_partial(target: Path) -> tuple[Path, int]:
    while True:
        partial = target.with_name(f".{target.name}.gdagrow-partial-{secrets.token_hex(3)}")
        try:
            partial.mkdir()
        except FileExistsError:
            continue
        # Another process may take the new directory for a stale one until the lock is held.
        lock = _try_lock(partial)
        if lock is not None:
            return partial, lock


def _try_lock(directory: Path) -> int | None:
    """Lock a directory for this process's life; None if another one holds it or it is gone."""
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.lstat(directory)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _publish(partial: Path, target: Path) -> None:
    try:
        for directory, _, names in os.walk(partial):
            for name in names:
                _sync(os.path.join(directory, name))
            _sync(directory)
        os.rename(partial, target)
        _sync(target.parent)
    except OSError as error:
        if target.is_dir() and any(target.iterdir()) and partial.exists():
            raise _not_empty(target) from None
        raise OutputError(f"{target} cannot be published ({error.strerror}); choose another place") from None


def _sync(path: str | Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def check_free_space(parent: Path, num_bytes: int) -> None:
    """Raise OutputError unless the disk of directory `parent` has `num_bytes` to spare."""
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise OutputError(
            f"{parent} has too little space: {num_bytes:,} bytes needed, {free:,} bytes free; "
            "free some or choose another disk"
        )


def write_file(path: Path, content: str | bytes) -> None:
    """Write a small file; raises OutputError if the disk refuses."""
    if isinstance(content, str):
        # A name that is no UTF-8 has half surrogate pairs in it, whose escapes in Python and in JSON are the same.
        content = content.encode("utf-8", "backslashreplace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); free or choose another place") from None


def require_apart(source: Path, target: Path) -> None:
    """Raise OutputError if `target` lies in `source`, however either is written."""
    if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(source)):
        raise OutputError(f"{target} lies in the source {source}, which is never changed; choose another output")


def list_companions(source: Path, carried: Collection[str] = ()) -> Companions:
    """Say which files of a source directory, weights aside, go with a model grown from it; nothing is written.

    Args:
        source: The directory.
        carried: Names of files at its top that go along whatever they are.

    Raises:
        CheckpointError: a link leads out of the directory, or a part of it cannot be listed.
    """
    copied: list[str] = []
    skipped: list[SkippedFile] = []

    def unreadable(error: OSError) -> None:
        raise CheckpointError(f"{error.filename} cannot be listed ({error.strerror}); check the directory")

    for directory, subdirectories, names in os.walk(source, onerror=unreadable):
        for name in list(subdirectories):
            path = Path(directory, name)
            if reason := _reason_to_skip_directory(source, path):
                skipped.append(SkippedFile(f"{path.relative_to(source).as_posix()}/", reason))
                subdirectories.remove(name)
        for name in names:
            path = Path(directory, name)
            relative = path.relative_to(source).as_posix()
            if reason := _reason_to_skip_file(source, path, carried):
                skipped.append(SkippedFile(relative, reason))
            else:
                copied.append(relative)
    return Companions(tuple(sorted(copied)), tuple(sorted(skipped, key=lambda skip: skip.path)))


def copy_companions(source: Path, destination: Path, carried: Collection[str] = ()) -> Companions:
    """Copy the companion files of `source` into directory `destination`, links replaced by what they point to.

    Raises:
        CheckpointError: as for `list_companions`, before anything is written.
        OutputError: a file cannot be copied.
    """
    companions = list_companions(source, carried)
    for relative in companions.copied:
        try:
            (destination / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / relative, destination / relative)
        except OSError as error:
            raise OutputError(
                f"{source / relative} cannot be copied to {destination} ({error.strerror}); check both"
            ) from None
    return companions


def _reason_to_skip_directory(source: Path, path: Path) -> str | None:
    if reason := _reason_by_name(f"{path.name}/"):
        return reason
    if path.is_symlink():
        require_inside(source, path)
        return "a link to a directory that is carried along by itself"
    return None


def _reason_to_skip_file(source: Path, path: Path, carried: Collection[str]) -> str | None:
    if path.parent == source and (reason := dict(_REWRITTEN).get(path.name)):
        return reason
    wanted = path.parent == source and path.name in carried
    if not wanted and (reason := _reason_by_name(path.name)):
        return reason
    real = require_inside(source, path)
    if not real.is_file():
        return "not a regular file"
    return None if wanted else _reason_by_name(real.name)


def _reason_by_name(name: str) -> str | None:
    return next((reason for pattern, reason in _LEFT_BEHIND if fnmatchcase(name, pattern)), None)
