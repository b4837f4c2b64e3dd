"""Gradients of a grown model held against its source's, by the chain rule and by the mirror rule of moments."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from gdagrow.archs import architecture_of
from gdagrow.axes import IndexMap
from gdagrow.engine import grow_moment, old_indices
from gdagrow.errors import CompareError
from gdagrow.growth import TensorGrowth
from gdagrow.header import Header
from gdagrow.rows import GrownRow, grown_rows, why_moments_are_lost
from gdagrow.verify.backward import Gradients
from gdagrow.verify.lineage import Lineage
from gdagrow.verify.pair import HeaderPair
from gdagrow.verify.rounding import Budget
from gdagrow.views import origin_of
from gdagrow.views.convert import MADE
from gdagrow.views.deeper import NEW_BLOCK, writes_the_stream

# Columns of a gradient that are held against each other at a time.
_SLAB_COLUMNS: Final = 128

UNEQUAL_PARTS: Final = "parts of a split differ: by zero-sum noise, or where the dtype cannot hold equal ones"


@dataclass(frozen=True)
class GradientDifference:
    """How the gradients of one grown tensor differ from its source's, relative to the largest that is expected.

    name, parameter: The tensor, and its row in the architecture's table.
    chain: From the chain rule: the gradients of all copies of what the layer writes sum to the source's, and those
        of what it reads are the source's each; those of a new block are zero, but for what it writes to the stream. It
        holds for every growth that preserves the function. What was made anew is compared with nothing.
    mirror: From the mirror rule, by which moments are carried: the sum is in equal parts.
    tolerance: What rounding alone may do to either, by the measured condition of the source's own gradient.
    lost: Why moments cannot be carried exactly, or None where they can.
    """

    name: str
    parameter: str
    chain: float
    mirror: float
    tolerance: float
    lost: str | None

    @property
    def agrees(self) -> bool:
        """Whether the chain rule holds within rounding."""
        return self.chain <= self.tolerance


@dataclass
class _Largest:
    """Running maxima of one grown tensor: what is expected of it by either rule, and how far it is from that."""

    source: float = 0.0
    moved: float = 0.0
    chain: float = 0.0
    expected: float = 0.0
    mirror: float = 0.0


@dataclass(frozen=True)
class _Grown:
    """A tensor that grows: its row, its maps, and what the source's gradient is multiplied by besides."""

    row: GrownRow
    growth: TensorGrowth
    factor: float


class GradientMeter:
    """Holds gradients against what the growth's maps say of them."""

    def __init__(self, headers: HeaderPair, lineage: Lineage, *, untied: bool, converted: bool) -> None:
        """Both `headers` are in Motif's layout, in which the model runs; `converted`: only the first is a view."""
        source, grown = headers
        seen = lineage.seen(source)
        architecture = architecture_of(seen.config)
        num_layers = len(lineage.layers.source)
        rows = list(grown_rows(seen, architecture, num_layers, tied_after=architecture.is_tied(grown.config)))
        _require_same_tensors(grown, rows)
        # What only a view has, on both sides, is no parameter.
        self._listed = [row for row in rows if row.name in grown.stored.tensors]
        self._by_source: dict[str, list[_Grown]] = {}
        self._silent: set[str] = set()  # of new blocks, which send nothing back yet
        self._lost: dict[str, str | None] = {}
        for row in rows:
            lost = why_moments_are_lost(row, seen, architecture, lineage.maps, untied=untied)
            self._lost[row.name] = None if lost == MADE and not converted else lost
            origin = origin_of(seen, row.source, below=source)
            if origin.anew is None and origin.name is not None:
                known = self._by_source.setdefault(origin.name, [])
                known.append(_Grown(row, row.growth(lineage.maps), 1 / origin.factor))
            elif origin.anew == NEW_BLOCK and not writes_the_stream(row.parameter):
                self._silent.add(row.name)
        self._found = {row.name: _Largest() for row in rows}

    def add(self, source: Gradients, grown: Gradients, *disturbed: Gradients) -> None:
        """Add the gradients of some tensors, or of the same rows of embedding and head; `source` has none of a block
        that is new.
        """
        for name in grown.keys() & self._silent:
            self._found[name].chain = _larger(self._found[name].chain, _largest_of(grown[name]))
        for name, gradient in source.items():
            # What was made anew is compared with nothing.
            cut = [_without_fresh(one, gradient, grown[one.row.name]) for one in self._by_source.get(name, [])]
            moved = [gradients[name] for gradients in disturbed]
            if len(cut) == 1 and gradient.dim() == 2 and cut[0][0].growth.reads[1]:
                # What is read has nothing to do with its neighbours: a few columns at a time need little memory.
                ((one, of_grown),) = cut
                for old, new in _slabs(one.growth.columns):
                    growth = TensorGrowth((one.growth.rows, IndexMap.identity(old.stop - old.start)), one.growth.reads)
                    slabs = [gradients[:, old] for gradients in moved]
                    self._add([(replace(one, growth=growth), of_grown[:, new])], gradient[:, old], slabs)
            elif cut:
                self._add(cut, gradient, moved)

    def _add(self, tensors: list[tuple[_Grown, Tensor]], gradient: Tensor, disturbed: list[Tensor]) -> None:
        factor = tensors[0][0].factor
        gradient = gradient if factor == 1 else gradient * factor
        whole = _gathered(tensors[0][0].growth, gradient)
        # Two tensors that grew from one, such as an untied head and its embedding, share its gradient.
        summed = torch.zeros_like(whole)
        for one, of_copies in tensors:
            summed += _summed(one.growth, of_copies)
        apart = _largest_of(summed.sub_(whole))
        for one, of_copies in tensors:
            found, expected = self._found[one.row.name], grow_moment(one.growth, gradient, 1)
            found.source = _larger(found.source, _largest_of(gradient))
            for moved in disturbed:
                found.moved = _larger(found.moved, _largest_of(gradient - moved * factor))
            found.chain = _larger(found.chain, apart)
            found.expected = _larger(found.expected, _largest_of(expected))
            found.mirror = _larger(found.mirror, _largest_of(of_copies - expected))

    def differences(self, budget: Budget) -> tuple[GradientDifference, ...]:
        """Everything that was added."""
        tolerances = {row.name: self._tolerance(self._found[row.name], budget) for row in self._listed}
        # The same row of the table in another layer is one more measurement of its condition.
        highest: dict[str, float] = {}
        for row in self._listed:
            highest[row.parameter.name] = max(highest.get(row.parameter.name, 0.0), tolerances[row.name])
        return tuple(
            self._difference(
                row, self._found[row.name], 0.0 if row.name in self._silent else highest[row.parameter.name]
            )
            for row in self._listed
        )

    @staticmethod
    def _tolerance(found: _Largest, budget: Budget) -> float:
        # A gradient that is zero everywhere has no scale.
        return budget.tolerance(found.moved, found.source or 1.0)

    def _difference(self, row: GrownRow, found: _Largest, tolerance: float) -> GradientDifference:
        scale, expected = found.source or 1.0, found.expected or 1.0
        mirror, lost = found.mirror / expected, self._lost[row.name]
        if lost is None and not mirror <= tolerance:
            lost = UNEQUAL_PARTS
        return GradientDifference(row.name, row.parameter.name, found.chain / scale, mirror, tolerance, lost)


def _require_same_tensors(grown: Header, rows: list[GrownRow]) -> None:
    names = {row.name for row in rows}
    if problems := sorted(names ^ grown.tensors.keys()):
        raise CompareError(
            f"{grown.directory}: {', '.join(problems)}: in one of the two models only, so that gradients cannot be "
            "held against each other; gdagrow diff --weights lists what differs"
        )


def _without_fresh(one: _Grown, gradient: Tensor, grown: Tensor) -> tuple[_Grown, Tensor]:
    """The growth of the rows that there are (all, or some tokens' of a vocabulary, which never grows), and the grown
    gradient, both without fresh indices.
    """
    dims = list(one.growth.dims)
    if len(gradient) != dims[0].old_size:
        dims[0] = IndexMap.identity(len(gradient))
    for dim, index_map in enumerate(dims):
        if index_map.num_fresh:
            kept = [index for index, old in enumerate(index_map) if old < index_map.old_size]
            grown = grown.index_select(dim, torch.tensor(kept, device=grown.device))
            dims[dim] = IndexMap.of([old for old in index_map if old < index_map.old_size], index_map.old_size)
    return replace(one, growth=TensorGrowth(tuple(dims), one.growth.reads)), grown


def _slabs(columns: IndexMap) -> Iterator[tuple[slice, slice]]:
    """The old and the new columns of every copy, a few at a time."""
    for segment in columns.segments:
        for start in range(0, segment.length, _SLAB_COLUMNS):
            width = min(_SLAB_COLUMNS, segment.length - start)
            old, new = segment.old + start, segment.new + start
            yield slice(old, old + width), slice(new, new + width)


def _gathered(growth: TensorGrowth, source: Tensor) -> Tensor:
    """The source's gradient at every grown index."""
    for dim, index_map in enumerate(growth.dims):
        if not index_map.is_identity:
            source = source.index_select(dim, old_indices(index_map, source.device))
    return source


def _summed(growth: TensorGrowth, gradient: Tensor) -> Tensor:
    """The sum over all copies along what the layer writes, at every one of them."""
    for dim, (index_map, reads) in enumerate(zip(growth.dims, growth.reads, strict=True)):
        if not reads and not index_map.is_identity:
            old = old_indices(index_map, gradient.device)
            shape = [*gradient.shape]
            shape[dim] = index_map.old_size
            gradient = gradient.new_zeros(shape).index_add_(dim, old, gradient).index_select(dim, old)
    return gradient


def _largest_of(found: Tensor) -> float:
    """The largest absolute value, NaN if there is one, without a copy of the tensor."""
    low, high = found.aminmax()
    return float(torch.maximum(-low, high))


def _larger(known: float, found: float) -> float:
    """The larger of two; NaN if either is, which `max` would lose."""
    return math.nan if math.isnan(known) or math.isnan(found) else max(known, found)
