"""The growth of one tensor: an index map for each of its dimensions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from gdagrow.axes import AxisMaps, IndexMap, Notation, Segment, parse

# Weights to a block: its random words, and every temporary of its arithmetic, stay in the cache of one core.
BLOCK_WEIGHTS = 1 << 17


class Fill(Enum):
    """What stands at fresh indices, which come from nothing: zeros, weights that are free, or the mean of the rest."""

    zero = "zero"
    free = "free"
    mean = "mean"


# What of a fresh feature is zero, so that it adds nothing. In the residual stream it is what writes it: what reads it
# is free, and sends back a gradient. In the FFN it is what reads it: its two writers multiply each other, and would
# stay zero for ever if both were.
_SILENT_IF_WRITTEN: Final = {"hidden": True, "ffn": False}


@dataclass(frozen=True)
class TensorGrowth:
    """One index map (new -> old) a dimension, whether the layer reads that dimension, and what fills fresh indices."""

    dims: tuple[IndexMap, ...]
    reads: tuple[bool, ...]
    fills: tuple[Fill, ...] = ()

    @staticmethod
    def of(notation: Notation, maps: AxisMaps, *, is_gain: bool = False) -> "TensorGrowth":
        """The growth of a tensor; a gain multiplies what it is said to write, or read."""
        dims = notation.index_maps(maps)
        assert all(dim.is_complete for dim in dims), f"a growth of {notation.text!r} loses old indices"
        if not any(dim.num_fresh for dim in dims):
            return TensorGrowth(dims, notation.reads)
        fills = tuple(
            Fill.mean if is_gain else _fill(axis, reads, len(dims))
            for axis, reads in zip(notation.dims, notation.reads, strict=True)
        )
        return TensorGrowth(dims, notation.reads, fills)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(dim.size for dim in self.dims)

    @property
    def splits(self) -> bool:
        """Whether any weight is split among copies."""
        return any(
            reads and any(s.copies > 1 and not s.fresh for s in dim.segments)
            for dim, reads in zip(self.dims, self.reads, strict=True)
        )

    @property
    def rows(self) -> IndexMap:
        """The leading dimensions as one; a one-dimensional tensor is a single row."""
        return self.dims[0] if len(self.dims) == 2 else IndexMap.identity(1)

    @property
    def columns(self) -> IndexMap:
        return self.dims[-1]


def _fill(axis: object, reads: bool, num_dims: int) -> Fill:
    if num_dims == 1:
        return Fill.zero  # a bias
    silent_if_written = _SILENT_IF_WRITTEN.get(axis) if isinstance(axis, str) else None
    return Fill.free if silent_if_written is None or silent_if_written == reads else Fill.zero


@dataclass(frozen=True)
class GrowthMaps:
    """What growth does to every axis in every layer; layers differ in which signal heads are cloned, if at all.

    by_layer: For each layer of the grown model its maps. Outside layers any of them serves.
    """

    by_layer: tuple[AxisMaps, ...]
    _known: dict[tuple[str, int, bool], TensorGrowth] = field(default_factory=dict, repr=False, compare=False)

    @property
    def common(self) -> AxisMaps:
        """The maps of the first layer, which are those of all others but for signal heads."""
        return self.by_layer[0]

    def growth(self, notation: str, layer: int, *, is_gain: bool = False) -> TensorGrowth:
        """The growth of a tensor in arrow notation; `layer` is any for one outside the layers."""
        maps = self.by_layer[layer]
        key = notation, id(maps), is_gain
        if key not in self._known:
            self._known[key] = TensorGrowth.of(parse(notation), maps, is_gain=is_gain)
        return self._known[key]


def block_rows(growth: TensorGrowth) -> int:
    """Source rows to a block, the unit in which random words are drawn."""
    return max(1, BLOCK_WEIGHTS // growth.columns.old_size)


def copies_of(index_map: IndexMap) -> tuple[tuple[Segment, ...], ...]:
    """The segments of a map, those of the same old indices together; without the fresh ones."""
    copies: dict[int, list[Segment]] = {}
    for segment in index_map.segments:
        if not segment.fresh:
            copies.setdefault(segment.old, []).append(segment)
    return tuple(map(tuple, copies.values()))


def fresh_of(index_map: IndexMap) -> Sequence[Segment]:
    """The fresh segments of a map."""
    return [segment for segment in index_map.segments if segment.fresh]
