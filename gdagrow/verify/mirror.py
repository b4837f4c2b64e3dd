"""Gradients of a grown model held against its source's, by the chain rule and by the mirror rule of moments."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Final

import torch
from torch import Tensor

from gdagrow.archs import architecture_of
from gdagrow.axes import IndexMap, parse
from gdagrow.engine import grow_moment, old_indices
from gdagrow.errors import CompareError
from gdagrow.growth import TensorGrowth
from gdagrow.header import Header
from gdagrow.rows import GrownRow, claim, grown_rows, why_moments_are_lost
from gdagrow.verify.backward import Gradients
from gdagrow.verify.lineage import Lineage
from gdagrow.verify.pair import HeaderPair
from gdagrow.verify.rounding import Budget

# Columns of a gradient that are held against each other at a time.
_SLAB_COLUMNS: Final = 128

UNEQUAL_PARTS: Final = "parts of a split differ: by zero-sum noise, or where the dtype cannot hold equal ones"


@dataclass(frozen=True)
class GradientDifference:
    """How the gradients of one grown tensor differ from its source's, relative to the largest that is expected.

    name, parameter: The tensor, and its row in the architecture's table.
    chain: From the chain rule: the gradients of all copies of what the layer writes sum to the source's, and those
        of what it reads are the source's each. It holds for every growth that preserves the function.
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


class GradientMeter:
    """Holds gradients against what the growth's maps say of them."""

    def __init__(self, headers: HeaderPair, lineage: Lineage, *, untied: bool) -> None:
        """Both `headers` are in Motif's layout, in which the reference model runs."""
        source, grown = headers
        architecture = architecture_of(source.config)
        parameters = claim(source, architecture, architecture.sizes(source.config))
        rows = list(grown_rows(source, architecture, parameters, tied_after=architecture.is_tied(grown.config)))
        _require_same_tensors(grown, rows)
        self._rows: dict[str, list[GrownRow]] = {}
        for row in rows:
            self._rows.setdefault(row.source, []).append(row)
        self._growths = {text: TensorGrowth.of(parse(text), lineage.maps) for text in {row.notation for row in rows}}
        # What only a view has, on both sides, is no parameter.
        self._stored = grown.stored.tensors.keys()
        converted = source.view_of is not None and grown.view_of is None
        self._lost = {
            row.name: why_moments_are_lost(
                row, architecture, lineage.maps, untied=untied, made=converted and source.is_made(row.source)
            )
            for row in rows
        }
        self._found = {row.name: _Largest() for row in rows}

    def add(self, source: Gradients, grown: Gradients, *disturbed: Gradients) -> None:
        """Add the gradients of some tensors, or of the same rows of embedding and head."""
        for name, gradient in source.items():
            rows = self._rows[name]
            growths = [_of_rows(self._growths[row.notation], gradient) for row in rows]
            of_grown, moved = [grown[row.name] for row in rows], [gradients[name] for gradients in disturbed]
            if len(rows) == 1 and gradient.dim() == 2 and growths[0].reads[1]:
                # What is read has nothing to do with its neighbours: a few columns at a time need little memory.
                for old, new in _slabs(growths[0].columns):
                    growth = TensorGrowth((growths[0].rows, IndexMap.identity(old.stop - old.start)), growths[0].reads)
                    slabs = [gradients[:, old] for gradients in moved]
                    self._add(rows, [growth], gradient[:, old], [of_grown[0][:, new]], slabs)
            else:
                self._add(rows, growths, gradient, of_grown, moved)

    def _add(
        self, rows: list[GrownRow], growths: list[TensorGrowth], gradient: Tensor, grown: list[Tensor],
        disturbed: list[Tensor],
    ) -> None:  # fmt: skip
        whole = _gathered(growths[0], gradient)
        # Two tensors that grew from one, such as an untied head and its embedding, share its gradient.
        summed = torch.zeros_like(whole)
        for growth, of_copies in zip(growths, grown, strict=True):
            summed += _summed(growth, of_copies)
        apart = _largest_of(summed.sub_(whole))
        for row, growth, of_copies in zip(rows, growths, grown, strict=True):
            found, expected = self._found[row.name], grow_moment(growth, gradient, 1)
            found.source = _larger(found.source, _largest_of(gradient))
            for moved in disturbed:
                found.moved = _larger(found.moved, _largest_of(gradient - moved))
            found.chain = _larger(found.chain, apart)
            found.expected = _larger(found.expected, _largest_of(expected))
            found.mirror = _larger(found.mirror, _largest_of(of_copies - expected))

    def differences(self, budget: Budget) -> tuple[GradientDifference, ...]:
        """Everything that was added."""
        rows = [row for row in chain.from_iterable(self._rows.values()) if row.name in self._stored]
        tolerances = {row.name: self._tolerance(self._found[row.name], budget) for row in rows}
        # The same row of the table in another layer is one more measurement of its condition.
        highest: dict[str, float] = {}
        for row in rows:
            highest[row.parameter.name] = max(highest.get(row.parameter.name, 0.0), tolerances[row.name])
        return tuple(self._difference(row, self._found[row.name], highest[row.parameter.name]) for row in rows)

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


def _of_rows(growth: TensorGrowth, gradient: Tensor) -> TensorGrowth:
    """The growth of the rows that there are: all, or some tokens' of a vocabulary, which never grows."""
    if len(gradient) == growth.dims[0].old_size:
        return growth
    return TensorGrowth((IndexMap.identity(len(gradient)), *growth.dims[1:]), growth.reads)


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
