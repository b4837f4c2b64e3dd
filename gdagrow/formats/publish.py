"""Publish a directory whole or not at all."""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gdagrow.errors import OutputError


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
