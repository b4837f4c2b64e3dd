"""What is made of files is of no use if they change meanwhile: half of it is of the old ones, half of the new."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gdagrow.errors import CheckpointError


@contextmanager
def unchanged(paths: Iterable[Path]) -> Iterator[None]:
    """Hold files of a source to what they are at entry; to be entered before the first of them is read.

    Unlike the time of the last change, which a program may set, that of the last change of the inode is the system's
    own. What is written through memory that was mapped, and written to, before entry is not seen.

    Raises:
        CheckpointError: one of them is gone, or another file, or was changed or linked to: at entry, or when the block
            ended well.
    """
    before = {path: _identity(path) for path in paths}
    yield
    for path, identity in before.items():
        if _identity(path) != identity:
            raise CheckpointError(
                f"{path} changed while it was being read: its size, time or place on the disk is no longer what it "
                "was; let nothing write to the source, and start again"
            )


def _identity(path: Path) -> tuple[int, ...]:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the file") from None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
