"""Files by their SHA-256: one that is read through, and those of a source, at the pace at which they are used."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Condition
from types import TracebackType
from typing import Final

from typing_extensions import Self

from gdagrow.errors import CheckpointError
from gdagrow.formats.watched import WatchedFiles

_BLOCK_BYTES: Final = 2**20
# How far a source is hashed ahead of being used: far enough never to be waited for, near enough for both to find a
# page of it in the page cache that only one of them had to fetch from the disk.
AHEAD_BYTES: Final = 2 * 2**30


@dataclass(frozen=True)
class FileDigest:
    """A file that was read or written: its size and the SHA-256 of its bytes, in hexadecimal."""

    num_bytes: int
    sha256: str


class Cancelled(Exception):
    """A file was not read to its end, because nobody waits for it any more."""


def digest_file(path: Path, before_block: Callable[[int], None]) -> FileDigest:
    """Read a file through.

    Args:
        path: The file.
        before_block: Called with the number of bytes that are read next; may wait, or raise to end it.

    Raises:
        OSError: it cannot be read.
    """
    digest, num_bytes, block = sha256(), 0, bytearray(_BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size
        while True:
            before_block(min(left, _BLOCK_BYTES))
            count = file.readinto(block)
            if not count:
                return FileDigest(num_bytes, digest.hexdigest())
            digest.update(memoryview(block)[:count])
            num_bytes += count
            left = max(0, left - count)


class SourceFiles(WatchedFiles):
    """The files of a source while something is made of them: watched for changes, and hashed on a thread.

    Use as a context manager; the thread ends with it.
    """

    def __init__(self, directory: Path, names: Iterable[str]) -> None:
        """Look at the files `names` of `directory`.

        Raises:
            CheckpointError: one is gone.
        """
        super().__init__(directory, names)
        self._allowed = AHEAD_BYTES  # bytes of all files in turn that may be hashed
        self._hashed = 0
        self._cancelled = False
        self._changed = Condition()
        self._hasher = ThreadPoolExecutor(1, "gdagrow-hash-source")
        self._digests = self._hasher.submit(self._digest_all)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._cancelled = True
            self._changed.notify()
        self._hasher.shutdown()

    def used(self, fraction: float) -> None:
        """Say how much of all that is made of the source is made."""
        num_bytes = sum(stat.num_bytes for stat in self.stats.values())
        with self._changed:
            self._allowed = AHEAD_BYTES + int(fraction * num_bytes)
            self._changed.notify()

    def digests(self) -> dict[str, FileDigest]:
        """Wait until all files are hashed; what is returned are the bytes that stood there all the time.

        Raises:
            CheckpointError: a file changed since it was first looked at, or cannot be read.
        """
        self.used(1)
        try:
            found = self._digests.result()
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read ({error.strerror}); check the file") from None
        self.require_unchanged()
        return found

    def _digest_all(self) -> dict[str, FileDigest]:
        try:
            return {name: digest_file(self._directory / name, self._await_turn) for name in self.stats}
        except Cancelled:
            return {}

    def _await_turn(self, num_bytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or self._hashed + num_bytes <= self._allowed)
            if self._cancelled:
                raise Cancelled
            self._hashed += num_bytes
