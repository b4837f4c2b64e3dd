"""The growth of one tensor: an index map for each of its dimensions."""

from dataclasses import dataclass

from gdagrow.axes import AxisMaps, IndexMap, Notation, Segment

# Weights to a block: its random words, and every temporary of its arithmetic, stay in the cache of one core.
BLOCK_WEIGHTS = 1 << 16


@dataclass(frozen=True)
class TensorGrowth:
    """One index map (new -> old) a dimension, and whether the layer reads that dimension."""

    dims: tuple[IndexMap, ...]
    reads: tuple[bool, ...]

    @staticmethod
    def of(notation: Notation, maps: AxisMaps) -> "TensorGrowth":
        dims = notation.index_maps(maps)
        assert all(dim.is_complete for dim in dims), f"a growth of {notation.text!r} loses old indices"
        return TensorGrowth(dims, notation.reads)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(dim.size for dim in self.dims)

    @property
    def splits(self) -> bool:
        """Whether any weight is split among copies."""
        return any(
            reads and any(s.copies > 1 for s in dim.segments) for dim, reads in zip(self.dims, self.reads, strict=True)
        )

    @property
    def rows(self) -> IndexMap:
        """The leading dimensions as one; a one-dimensional tensor is a single row."""
        return self.dims[0] if len(self.dims) == 2 else IndexMap.identity(1)

    @property
    def columns(self) -> IndexMap:
        return self.dims[-1]


def block_rows(growth: TensorGrowth) -> int:
    """Source rows to a block, the unit in which random words are drawn."""
    return max(1, BLOCK_WEIGHTS // growth.columns.old_size)


def copies_of(index_map: IndexMap) -> tuple[tuple[Segment, ...], ...]:
    """The segments of a map, those of the same old indices together."""
    copies: dict[int, list[Segment]] = {}
    for segment in index_map.segments:
        copies.setdefault(segment.old, []).append(segment)
    return tuple(map(tuple, copies.values()))
