"""Publish a directory whole or not at all."""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from gdagrow.errors import OutputError

# What is written lies in a directory of its own, beside what is told of it.
_OUTPUT: Final = "output"


@contextmanager
def staged(target: Path, *, goes_on: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Yield an empty directory beside `target` that becomes `target` if the block ends well, else disappears.

    What earlier runs for the same target left when they were killed is removed first; one that lives is not disturbed.

    Args:
        target: A directory that is missing or empty.
        goes_on: Whether a directory, in which the one that is yielded lies, holds work that is to be gone on with. One
            that a killed run left is taken over if so, and after a failure it stays.

    Raises:
        OutputError: `target` exists and is not an empty directory, at entry or at the end, its parent is not a
            directory that can be written, or another process writes it.
    """
    target = Path(os.path.abspath(target))
    _require_free(target)
    place, stays = None, goes_on
    try:
        try:
            place, lock = _take_over(target, goes_on) or _create_place(target)
            partial = place / _OUTPUT
            partial.mkdir(exist_ok=True)
        except OSError as error:
            raise _unwritable(target, error) from None
        yield partial
        _publish(partial, target)
        stays = None
        _sync_entry(target)
    finally:
        if place is not None:
            try:
                _leave(place, stays)
            except BaseException:  # Ctrl-C in the midst of it; another one ends the process
                _leave(place, stays)
                raise
            finally:
                os.close(lock)


def _leave(place: Path, stays: Callable[[Path], bool] | None) -> None:
    if stays is None or not stays(place):
        shutil.rmtree(place, ignore_errors=True)


def unfinished(target: Path) -> Path | None:
    """The directory that an unfinished run for `target` left, if there is one."""
    target = Path(os.path.abspath(target))
    if not target.parent.is_dir():
        return None
    places = (path for path in target.parent.iterdir() if _is_place_of(target, path))
    return next((path for path in places if (path / _OUTPUT).is_dir()), None)  # else it was published since


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


def _unwritable(target: Path, error: OSError) -> OutputError:
    return OutputError(f"{target.parent} cannot be written ({error.strerror}); choose another place for {target.name}")


def _is_place_of(target: Path, path: Path) -> bool:
    return bool(re.fullmatch(re.escape(f".{target.name}.gdagrow-partial-") + "[0-9a-f]{6}", path.name))


def _take_over(target: Path, goes_on: Callable[[Path], bool] | None) -> tuple[Path, int] | None:
    """Of the directories that killed runs left, lock and return one to go on with; remove the others."""
    with ExitStack() as stack:
        stale: dict[Path, int] = {}
        for path in [path for path in target.parent.iterdir() if _is_place_of(target, path)]:
            with suppress(PermissionError):  # another user's is not ours to remove
                try:
                    lock = _try_lock(path)
                except BlockingIOError:
                    raise OutputError(
                        f"{target} is being written by another process, in {path}; wait for it or choose another output"
                    ) from None
                if lock is not None:
                    stale[path] = lock
                    stack.callback(os.close, lock)
        taken = next(filter(goes_on, stale), None) if goes_on else None
        for path in stale:
            if path != taken:
                shutil.rmtree(path, ignore_errors=True)
        return (taken, os.dup(stale[taken])) if taken else None


def _create_place(target: Path) -> tuple[Path, int]:
    while True:
        place = target.with_name(f".{target.name}.gdagrow-partial-{secrets.token_hex(3)}")
        try:
            place.mkdir()
            # Another process may take the new directory for a stale one until the lock is held.
            with suppress(BlockingIOError):
                if (lock := _try_lock(place)) is not None:
                    return place, lock
        except FileExistsError:
            continue
        except BaseException:  # Ctrl-C, before anyone knows of the directory
            with suppress(OSError):
                place.rmdir()
            raise


def _try_lock(directory: Path) -> int | None:
    """Lock a directory for this process's life; None if it is gone.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), os.lstat(directory)):
            return lock
    except FileNotFoundError:
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
    except OSError as error:
        if target.is_dir() and any(target.iterdir()) and partial.exists():
            raise _not_empty(target) from None
        raise OutputError(f"{target} cannot be published ({error.strerror}); choose another place") from None


def _sync_entry(target: Path) -> None:
    try:
        _sync(target.parent)
    except OSError as error:
        raise OutputError(
            f"{target} is there, whole, but {target.parent} cannot be put on the disk ({error.strerror}), so that the "
            "name may be lost if the machine fails; check the disk"
        ) from None


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


def make_directory(path: Path) -> None:
    """Make a directory, unless it is there; raises OutputError if the disk refuses."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be made ({error.strerror}); free or choose another place") from None


def require_all(directory: Path, names: Iterable[str]) -> None:
    """Raise OutputError if files that were written are gone, as after a hasty `rm` of what looked like a leftover."""
    if gone := sorted(name for name in names if not (directory / name).is_file()):
        raise OutputError(
            f"{directory} has lost {len(gone)} of the files that were written into it, the first {gone[0]}; leave what "
            "is unfinished to gdagrow while it runs, and start again"
        )


def require_apart(source: Path, target: Path) -> None:
    """Raise OutputError if `target` lies in `source`, however either is written."""
    if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(source)):
        raise OutputError(f"{target} lies in the source {source}, which is never changed; choose another output")
