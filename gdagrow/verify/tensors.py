"""Fold tensors back as a stream, a few chunks of rows in memory at a time, and say where they are wrong."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gdagrow.archs import Sizes
from gdagrow.axes import Notation, Segment
from gdagrow.formats.weight_files import RowFiles, RowsInFile
from gdagrow.growth import TensorGrowth, copies_of, fresh_of
from gdagrow.header import ITEM_BYTES, TensorInfo
from gdagrow.verify.fold import FLOATS, Bits, Wrong, fold_free_rows, fold_fresh_rows, fold_rows, same_bits, scratch
from gdagrow.verify.forked import in_forks, num_processes
from gdagrow.verify.places import head_at

_CHUNK_BYTES: Final = 16 * 2**20  # of grown rows, with all their copies, that are folded between two reports
# Of one copy of grown rows, read and folded at a time: what is made of them mostly stays in the cache of a core.
_BLOCK_BYTES: Final = 2**18
_ALONE_BYTES: Final = 2**26  # of less than this, other processes would take longer to start than to help
MAX_PLACES: Final = 4

PlaceKey = str | tuple[int, int]  # a head, or where there are none, row and column


@dataclass(frozen=True)
class Pair:
    """A grown tensor and the stored tensor that it grew from, its notation and its maps.

    copies_are_free: Whether copies of its rows, but for the first of each, may be any that is finite.
    """

    source: TensorInfo
    grown: TensorInfo
    notation: Notation
    growth: TensorGrowth
    copies_are_free: bool


@dataclass(frozen=True)
class Place:
    """Where a tensor differs; a tensor of one dimension has the row 0.

    row, column: In the grown tensor; for a sum of parts, the column of the first part.
    old_row, old_column: In the source's.
    head: `signal head 2 of group 1`: of the grown model for a copy, of the source for a sum; empty without heads.
    """

    row: int
    column: int
    old_row: int
    old_column: int
    head: str


@dataclass(frozen=True)
class Folded:
    """What folding rows of a grown tensor came to: see `TensorDifference`; `num_bytes` of grown weights were read."""

    name: str
    num_bytes: int
    num_wrong: int
    largest: float
    places: tuple[Place, ...]


@dataclass(frozen=True)
class _Job:
    """Fold every copy of source rows `[start, stop)`, counted from where `copies` begin; fresh rows have none."""

    pair: Pair
    copies: tuple[Segment, ...]
    start: int
    stop: int

    @property
    def fresh(self) -> bool:
        return self.copies[0].fresh


class Folder:
    """Folds pairs of tensors of two checkpoints, whose readers stay open meanwhile."""

    def __init__(self, source: RowFiles, grown: RowFiles, before: Sizes, after: Sizes) -> None:
        self._source, self._grown = source, grown
        self._before, self._after = before.axes, after.axes

    def fold(self, pairs: Sequence[Pair]) -> Iterator[Folded]:
        """Yield what comes of every chunk of rows, in order."""
        jobs = [job for pair in pairs for job in _jobs(pair)]
        if sum(pair.grown.stop - pair.grown.start for pair in pairs) < _ALONE_BYTES:
            return map(self._fold, jobs)
        return in_forks(self._fold, jobs, num_processes())

    def _fold(self, job: _Job) -> Folded:
        pair, old, length = job.pair, job.copies[0].old + job.start, job.stop - job.start
        source = None if job.fresh else _find(self._source, pair.source, old, length)
        copies = [_find(self._grown, pair.grown, copy.new + job.start, length) for copy in job.copies]
        num_wrong, largest = 0, 0.0
        places: dict[PlaceKey, Place] = {}
        step = max(1, _BLOCK_BYTES // _row_bytes(pair))
        for start in range(0, length, step):
            for copy, wrong in self._wrong(pair, source, copies, start, min(start + step, length)):
                num_wrong += len(wrong.rows)
                largest = max(largest, float(wrong.apart.max()))
                row = job.copies[copy].new + job.start + start
                add_places(places, self._places(pair, wrong, row, old + start))
        num_bytes = sum(copy.num_bytes for copy in copies)
        return Folded(pair.grown.name, num_bytes, num_wrong, largest, tuple(places.values()))

    def _wrong(
        self, pair: Pair, source: RowsInFile | None, copies: Sequence[RowsInFile], start: int, stop: int
    ) -> Iterator[tuple[int, Wrong]]:
        """Yield which copy each `Wrong` is in, of rows `[start, stop)` of those that were found."""
        floats = FLOATS[pair.grown.dtype]
        if source is None:
            grown = _read(self._grown, copies[0], start, stop, "grown")
            yield from ((0, wrong) for wrong in fold_fresh_rows(floats, pair.growth, grown))
            return
        weight = _read(self._source, source, start, stop, "source")
        right: Bits | None = None
        for i, copy in enumerate(copies):
            grown = _read(self._grown, copy, start, stop, "grown" if right is None else "again")
            if i and pair.copies_are_free:
                yield from ((i, wrong) for wrong in fold_free_rows(floats, grown))
                continue
            # Further copies need not be folded if they are the same as one that is right.
            if right is not None and same_bits(right, grown):
                continue
            found = fold_rows(floats, pair.growth, weight, grown)
            yield from ((i, wrong) for wrong in found)
            if right is None and not found:
                right = grown

    def _places(self, pair: Pair, wrong: Wrong, row: int, old_row: int) -> Iterator[Place]:
        """The first place in every row, or in every column where those are what has heads or is all there is."""
        *rows, columns = pair.notation.dims
        by_column = not rows or bool(head_at(columns, self._after, 0))
        split = pair.notation.reads[-1]
        for i in np.unique(wrong.columns if by_column else wrong.rows, return_index=True)[1]:
            new, column, old_column = int(wrong.rows[i]) + row, int(wrong.columns[i]), int(wrong.old_columns[i])
            if not by_column:
                head = head_at(rows[0], self._after, new)
            else:
                head = head_at(columns, self._before if split else self._after, old_column if split else column)
            yield Place(new, column, int(wrong.rows[i]) + old_row, old_column, head)


def add_places(known: dict[PlaceKey, Place], found: Iterable[Place]) -> None:
    """Add the first place of each further head, or any other place where there are no heads, until there are a few."""
    for place in found:
        if len(known) == MAX_PLACES:
            return
        known.setdefault(place.head or (place.row, place.column), place)


def _find(files: RowFiles, info: TensorInfo, start: int, length: int) -> RowsInFile:
    """Rows of a tensor; one of fewer than two dimensions is a single row."""
    return files.find(info.name) if len(info.shape) < 2 else files.find(info.name, start, start + length)


def _read(files: RowFiles, rows: RowsInFile, start: int, stop: int, use: str) -> Bits:
    """Rows `[start, stop)` of those that were found, in memory that is used again."""
    columns = rows.info.shape[-1] if rows.info.shape else 1
    bits = scratch.of(use, (stop - start, columns), FLOATS[rows.info.dtype].bits)
    files.read(rows, start * bits.strides[0], bits.data.cast("B"))
    return bits


def _row_bytes(pair: Pair) -> int:
    return pair.growth.columns.size * ITEM_BYTES[pair.grown.dtype]


def _jobs(pair: Pair) -> Iterator[_Job]:
    for copies in (*copies_of(pair.growth.rows), *((segment,) for segment in fresh_of(pair.growth.rows))):
        step = max(1, _CHUNK_BYTES // (_row_bytes(pair) * len(copies)))
        for start in range(0, copies[0].length, step):
            yield _Job(pair, copies, start, min(start + step, copies[0].length))
