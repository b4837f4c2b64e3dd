"""The growth of one tensor: an index map a dimension, and the order in which its grown rows come about."""

from dataclasses import dataclass
from functools import lru_cache

from gdagrow.axes import AxisMaps, IndexMap, Notation, Segment


@dataclass(frozen=True)
class TensorGrowth:
    """One index map (new -> old) a dimension, and whether the layer reads that dimension."""

    dims: tuple[IndexMap, ...]
    reads: tuple[bool, ...]

    @staticmethod
    def of(notation: Notation, maps: AxisMaps) -> "TensorGrowth":
        return TensorGrowth(notation.index_maps(maps), notation.reads)

    @property
    def source_shape(self) -> tuple[int, ...]:
        return tuple(dim.old_size for dim in self.dims)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(dim.size for dim in self.dims)

    @property
    def is_identity(self) -> bool:
        return all(dim.is_identity for dim in self.dims)

    @property
    def splits(self) -> bool:
        """Whether any weight is split among copies."""
        return any(reads and any(s.copies > 1 for s in dim.segments) for dim, reads in zip(self.dims, self.reads))

    @property
    def rows(self) -> IndexMap:
        """The leading dimensions as one; a one-dimensional tensor is a single row."""
        return self.dims[0] if len(self.dims) == 2 else IndexMap.identity(1)

    @property
    def columns(self) -> IndexMap:
        return self.dims[-1]


@dataclass(frozen=True)
class SourceRows:
    """Grow source rows `[start, stop)`: they become the next rows of the grown tensor."""

    start: int
    stop: int


@dataclass(frozen=True)
class RowCopies:
    """The next rows of the grown tensor are byte for byte its own earlier rows `[start, stop)`."""

    start: int
    stop: int


@lru_cache(maxsize=256)
def row_steps(rows: IndexMap) -> tuple[SourceRows | RowCopies, ...]:
    """How the rows of a grown tensor come about in order: the first copy of each is grown, the others repeat it."""
    first: dict[int, Segment] = {}
    steps: list[SourceRows | RowCopies] = []
    for segment in rows.segments:
        origin = first.setdefault(segment.old, segment)
        step: SourceRows | RowCopies
        if origin is segment:
            step = SourceRows(segment.old, segment.old + segment.length)
        else:
            step = RowCopies(origin.new, origin.new + segment.length)
        last = steps[-1] if steps else None
        if type(last) is type(step) and last.stop == step.start:
            steps[-1] = type(step)(last.start, step.stop)
        else:
            steps.append(step)
    return tuple(steps)
