"""How like the copies of a grown checkpoint still are: cosine and distance of each to the first, from the lineage."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Progress = Callable[[str], None]


@dataclass(frozen=True)
class HeadSimilarity:
    """The copies of one head against the first of them, on average.

    head: The source's head: `signal head 2 of group 0`, `noise head of group 1`, `KV group 3`.
    """

    head: str
    cosine: float
    relative_distance: float


@dataclass(frozen=True)
class CloneSimilarity:
    """The copies in one tensor along one axis against the first copy of the same indices; means over all copies.

    name: The tensor.
    layer: Its layer, or None outside the layers.
    parameter: Its row of the architecture's table, with `{layer}`.
    axis: `signal`, `noise`, `kv`, `hidden` or `ffn`.
    written: Whether the layer writes the axis, so that growth made exact copies; else it reads it, and these are parts
        of a split.
    cosine: 1 for the same direction.
    relative_distance: `2 |a - b| / (|a| + |b|)`: 0 only for equal copies, 2 for opposite ones.
    heads: Each head that has copies, for axes of heads; else empty.
    """

    name: str
    layer: int | None
    parameter: str
    axis: str
    written: bool
    cosine: float
    relative_distance: float
    heads: tuple[HeadSimilarity, ...]


@dataclass(frozen=True)
class Clones:
    """The copies in every tensor that has some; `lineage` is the file that says which they are."""

    lineage: str
    tensors: tuple[CloneSimilarity, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def clone_similarity(
    checkpoint: Path, *, lineage: Path | None = None, progress: Progress | None = None
) -> Clones | None:
    """Measure how like its copies a grown checkpoint still holds, a few chunks of rows in memory at a time.

    Args:
        checkpoint: Its directory; it may have been trained since it was grown.
        lineage: Its `growth.json`, or a directory with it, if the checkpoint has lost its own.
        progress: Told what is being read.

    Returns:
        None if no lineage is given and the checkpoint has none: nothing says that it was grown.

    Raises:
        CheckpointError: the checkpoint or the lineage cannot be read, or the lineage is of other sizes.
    """
    raise NotImplementedError
