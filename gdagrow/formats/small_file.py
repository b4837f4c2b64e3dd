"""Read a file of a few bytes whole, whatever stands in its place."""

import os
import stat
from pathlib import Path
from typing import Final

from gdagrow.errors import CheckpointError

# More than the JSON of any checkpoint: what the header of a safetensors file may take.
MAX_BYTES: Final = 100_000_000


def read_small_file(path: Path, at_most: int = MAX_BYTES) -> bytes:
    """Read a regular file; a pipe is not waited for, and a device is not read.

    Raises:
        CheckpointError: it is none, cannot be read, or has more than `at_most` bytes.
    """
    try:
        # Without O_NONBLOCK a pipe would be waited for before anything could be said of it.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path} is not a regular file; restore it")
            raw = file.read(min(found.st_size, at_most) + 1)  # for which memory is set aside first
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the file") from None
    if len(raw) > at_most:
        raise CheckpointError(f"{path}: expected at most {at_most:,} bytes, got more; restore the file")
    return raw
