"""A new file written front to back, past the page cache where the file system lets it.

Filling the page cache costs processor time that growing and hashing need: on ext4 a whole expand, hashing included,
took less of it than `dd` through the cache mostly took for the same bytes (docs/benchmarks.md).
"""

import errno
import fcntl
import os
from pathlib import Path


class DirectFile:
    """A file that must not exist before; every method raises OSError as the system does."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._direct = False
        try:
            self._set_direct(True)
        except OSError as error:
            if error.errno != errno.EINVAL:
                os.close(self._file)
                raise

    def write(self, block: memoryview) -> None:
        """Append bytes that begin at a page of memory; all but the last block must be whole pages to go directly."""
        while block:
            try:
                block = block[os.write(self._file, block) :]
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                # The end of the file does not fill a disk block; and some file systems refuse all direct writes.
                self._set_direct(False)

    def sync(self) -> None:
        """Return when the disk holds all that was written."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def _set_direct(self, direct: bool) -> None:
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~os.O_DIRECT
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags | (os.O_DIRECT if direct else 0))
        self._direct = direct
