"""How far the copies in a live model have parted, from samples of its weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean
from typing import Final

import torch
from torch import Tensor

from gdagrow.archs import Parameter
from gdagrow.verify.ancestry import Ancestry
from gdagrow.verify.clones import Piece, cosine_and_distance, inner_products, pieces

# Indices of each head, or of each stretch of features, whose copies are compared, and weights of each of them: copies
# that part do so everywhere, so that a few thousand weights of each tensor tell what all of them would.
SAMPLED_INDICES: Final = 16
SAMPLED_WEIGHTS: Final = 256


@dataclass(frozen=True)
class CopyFigures:
    """The copies in one matrix along one axis, each against the first of its index; means over a sample of all.

    layer: Its layer, or None outside the layers.
    parameter: Its row of the architecture's table, with `{layer}`.
    axis: `signal`, `noise`, `kv`, `hidden` or `ffn`.
    written: Whether the layer writes the axis, so that growth made equal copies; else they are parts of a split.
    cosine, relative_distance: As in `gdagrow.verify.clones.CloneSimilarity`.
    """

    layer: int | None
    parameter: str
    axis: str
    written: bool
    cosine: float
    relative_distance: float


@dataclass(frozen=True)
class _Copies:
    """Where copies along one axis of a dimension stand: pairs of indices, and which copy of which head each is of."""

    dim: int
    axis: str
    written: bool
    first: Tensor
    other: Tensor
    copy: Tensor
    num_copies: int


class CopyMeter:
    """Measures the copies of a grown model, matrix by matrix."""

    def __init__(self, table: Mapping[str, Parameter], ancestry: Ancestry) -> None:
        """`table` by name; `ancestry`: the growth, and the sizes that it started from."""
        self._table, self._ancestry = table, ancestry
        self._known: dict[int, tuple[_Copies, ...]] = {}  # the same for most layers

    def _copies(self, parameter: str, layer: int | None) -> tuple[_Copies, ...]:
        notation = self._table[parameter].parsed
        if len(notation.dims) != 2:
            return ()
        growth = self._ancestry.maps.growth(notation.text, layer or 0)
        if id(growth) not in self._known:
            dims = zip(notation.dims, growth.dims, notation.reads, strict=True)
            self._known[id(growth)] = tuple(
                copies
                for dim, (expression, index_map, reads) in enumerate(dims)
                for copies in _sampled(
                    dim, list(pieces(expression, index_map, self._ancestry.before)), written=not reads
                )
            )
        return self._known[id(growth)]

    def has_copies(self, parameter: str, layer: int | None) -> bool:
        """Whether a row of the table is a matrix with copies."""
        return bool(self._copies(parameter, layer))

    def measure(self, parameter: str, layer: int | None, matrix: Tensor) -> Iterator[CopyFigures]:
        """The figures of one matrix, along each axis that has copies; none where weights are not finite."""
        for copies in self._copies(parameter, layer):
            across = spread(matrix.shape[1 - copies.dim], SAMPLED_WEIGHTS).to(matrix.device)
            first, other = (
                matrix.index_select(copies.dim, of.to(matrix.device)).index_select(1 - copies.dim, across).double()
                for of in (copies.first, copies.other)
            )
            if copies.dim:
                first, other = first.T, other.T
            sums = torch.zeros(copies.num_copies, 4, dtype=torch.float64, device=matrix.device)
            sums.index_add_(0, copies.copy.to(matrix.device), inner_products(first, other))
            listed = sums.tolist()
            if all(isfinite(value) for of_copy in listed for value in of_copy):
                cosines, distances = zip(*(cosine_and_distance(*of_copy) for of_copy in listed), strict=True)
                yield CopyFigures(layer, parameter, copies.axis, copies.written, fmean(cosines), fmean(distances))


def spread(size: int, most: int) -> Tensor:
    """At most so many of `size` indices, evenly spread."""
    return torch.arange(0, size, -(-size // most))


def _sampled(dim: int, found: Sequence[Piece], *, written: bool) -> Iterator[_Copies]:
    for axis in dict.fromkeys(piece.axis for piece in found):
        first, other, copy = [], [], []
        numbers: dict[tuple[str, int], int] = {}
        for piece in found:
            if piece.axis != axis:
                continue
            offsets = spread(piece.length, SAMPLED_INDICES)
            for number, start in enumerate(piece.starts[1:], 1):
                first.append(piece.starts[0] + offsets)
                other.append(start + offsets)
                of_copy = numbers.setdefault((piece.head, number), len(numbers))
                copy.append(torch.full_like(offsets, of_copy))
        yield _Copies(dim, axis, written, torch.cat(first), torch.cat(other), torch.cat(copy), len(numbers))
