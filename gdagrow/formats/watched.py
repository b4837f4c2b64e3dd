"""Files that something is made of: if they change meanwhile, half of it is of the old ones and half of the new."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from gdagrow.errors import CheckpointError


class FileStat(NamedTuple):
    """What tells that a file is still the same: its number and size, and its times of last change in ns.

    A program may set the time of the content (mtime), as `cp -p` and `rsync` do; that of the inode (ctime) is the
    system's own.
    """

    inode: int
    num_bytes: int
    modified: int
    changed: int


def file_stat(stat: os.stat_result) -> FileStat:
    """What there is to tell of a file by."""
    return FileStat(stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


class WatchedFiles:
    """Files of a directory that must stay what they were when they were first looked at, before any of them is read."""

    def __init__(self, directory: Path, names: Iterable[str]) -> None:
        """Look at the files `names` of `directory`.

        Raises:
            CheckpointError: one is gone.
        """
        self._directory = directory
        self.stats: Mapping[str, FileStat] = {name: self._stat(name) for name in names}

    def require_unchanged(self) -> None:
        """Raises CheckpointError if a file is another than it was, or has another size or time, or is gone."""
        for name, stat in self.stats.items():
            if self._stat(name) != stat:
                raise CheckpointError(
                    f"{self._directory / name} changed while it was being read: it has another size or time, or was "
                    "replaced; let nothing write to the source, and start again"
                )

    def _stat(self, name: str) -> FileStat:
        path = self._directory / name
        try:
            return file_stat(path.stat())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the file") from None
