"""Write one file whole or not at all."""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from gdagrow.errors import OutputError


def require_writable(target: Path, *, replace: bool) -> None:
    """Refuse a place where a file cannot come to be; to be asked before long work, as `write_whole` does in the end.

    Raises:
        OutputError: its parent is not a directory, or something stands there that is not to be replaced.
    """
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent} is not a directory; create it before {target.name} is put into it")
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_file():
        raise OutputError(f"{target} exists and is not a file; remove it or choose another output")
    if not replace:
        raise OutputError(f"{target} exists; choose another output, or replace it with --force")


def write_whole(target: Path, content: bytes, *, replace: bool) -> None:
    """Write a file that appears under its name when all of it is on the disk.

    Raises:
        OutputError: as for `require_writable`, or it cannot be written.
    """
    require_writable(target, replace=replace)
    partial = target.with_name(f".{target.name}.gdagrow-partial-{secrets.token_hex(3)}")
    try:
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            with suppress(FileNotFoundError):
                partial.unlink()
        _sync(target.parent)
    except OSError as error:
        raise OutputError(f"{target} cannot be written ({error.strerror}); choose another place") from None


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
