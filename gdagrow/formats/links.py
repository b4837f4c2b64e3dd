"""A checkpoint directory is read as a closed box: links may not lead out of it."""

import os
from pathlib import Path

from gdagrow.errors import CheckpointError


def require_inside(directory: Path, path: Path) -> Path:
    """Return the real path of `path`, which may not exist.

    Raises:
        CheckpointError: the real path is outside `directory`.
    """
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(directory)):
        raise CheckpointError(
            f"{path} is a link that leads out of its checkpoint directory, to {real}; "
            f"make a full copy first: cp -rL {directory} COPY"
        )
    return real
