"""Fold tensors back as a stream, a few chunks of rows in memory at a time, and say where they are wrong."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Final

import torch
from torch import Tensor

from gdagrow.archs import Sizes
from gdagrow.axes import Notation, Segment
from gdagrow.formats.safetensors_reader import TensorReader
from gdagrow.growth import TensorGrowth, copies_of
from gdagrow.header import ITEM_BYTES, TensorInfo
from gdagrow.verify.fold import Wrong, fold_rows, same_bits
from gdagrow.verify.places import head_at

_CHUNK_BYTES: Final = 16 * 2**20  # of grown rows, with all their copies, mapped at a time by each worker
# Of one copy of grown rows that are folded at a time, so that with their source, further copies and scratch they stay
# in the cache of one core. In much smaller ones Python takes longer than the arithmetic, and its lock keeps a second
# worker waiting.
_BLOCK_BYTES: Final = 512 * 2**10
_MAX_WORKERS: Final = 4
MAX_PLACES: Final = 4

PlaceKey = str | tuple[int, int]  # a head, or where there are none, row and column


@dataclass(frozen=True)
class Pair:
    """A grown tensor and the stored tensor that it grew from, its notation and its maps."""

    source: TensorInfo
    grown: TensorInfo
    notation: Notation
    growth: TensorGrowth


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
    """What folding some rows of a tensor came to: see `TensorDifference`; `num_bytes` of grown weights were read."""

    pair: Pair
    num_bytes: int
    num_wrong: int
    largest: float
    places: tuple[Place, ...]


@dataclass(frozen=True)
class _Job:
    """Fold every copy of source rows `[start, stop)`, counted from where `copies` begin."""

    pair: Pair
    copies: tuple[Segment, ...]
    start: int
    stop: int


class Folder:
    """Folds pairs of tensors of two checkpoints, whose readers stay open meanwhile."""

    def __init__(self, source: TensorReader, grown: TensorReader, before: Sizes, after: Sizes) -> None:
        self._source, self._grown = source, grown
        self._before, self._after = before.axes, after.axes

    def fold(self, pairs: Iterable[Pair]) -> Iterator[Folded]:
        """Yield what comes of every chunk of rows, in order."""
        jobs = (job for pair in pairs for job in _jobs(pair))
        num_workers = min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
        # Each worker is one thread; torch's own threads would only get in its way.
        with ThreadPoolExecutor(num_workers, "gdagrow-fold", torch.set_num_threads, (1,)) as workers:
            ahead: deque[Future[Folded]] = deque()
            try:
                while True:
                    ahead.extend(workers.submit(self._fold, job) for job in islice(jobs, 2 * num_workers - len(ahead)))
                    if not ahead:
                        break
                    yield ahead.popleft().result()
            finally:
                workers.shutdown(cancel_futures=True)

    def _fold(self, job: _Job) -> Folded:
        pair, old_row = job.pair, job.copies[0].old + job.start
        source = _rows(self._source, pair.source, old_row, job.copies[0].old + job.stop)
        copies = [_rows(self._grown, pair.grown, copy.new + job.start, copy.new + job.stop) for copy in job.copies]
        num_wrong, largest = 0, 0.0
        places: dict[PlaceKey, Place] = {}
        for copy, start, wrong in _wrong(pair.growth, source, copies):
            num_wrong += len(wrong.rows)
            largest = max(largest, float(wrong.apart.max()))
            row = job.copies[copy].new + job.start + start
            add_places(places, self._places(pair, wrong, row, old_row + start))
        return Folded(pair, sum(copy.nbytes for copy in copies), num_wrong, largest, tuple(places.values()))

    def _places(self, pair: Pair, wrong: Wrong, row: int, old_row: int) -> Iterator[Place]:
        """The first place in every row, or in every column where those are what has heads or is all there is."""
        *rows, columns = pair.notation.dims
        by_column = not rows or bool(head_at(columns, self._after, 0))
        split = pair.notation.reads[-1]
        for i in _first_of_each(wrong.columns if by_column else wrong.rows):
            new, column, old_column = int(wrong.rows[i]) + row, int(wrong.columns[i]), int(wrong.old_columns[i])
            if not by_column:
                head = head_at(rows[0], self._after, new)
            else:
                head = head_at(columns, self._before if split else self._after, old_column if split else column)
            yield Place(new, column, int(wrong.rows[i]) + old_row, old_column, head)


def _wrong(growth: TensorGrowth, source: Tensor, copies: Sequence[Tensor]) -> Iterator[tuple[int, int, Wrong]]:
    """Yield the copy and its first row that each `Wrong` counts from."""
    step = max(1, _BLOCK_BYTES * len(source) // copies[0].nbytes)
    for start in range(0, len(source), step):
        weight = source[start : start + step]
        right: Tensor | None = None
        for i, copy in enumerate(copies):
            grown = copy[start : start + step]
            # Further copies need not be folded if they are the same as one that is right.
            if right is not None and same_bits(right, grown):
                continue
            found = list(fold_rows(growth, weight, grown))
            yield from ((i, start, wrong) for wrong in found)
            right = right if found else grown


def add_places(known: dict[PlaceKey, Place], found: Iterable[Place]) -> None:
    """Add the first place of each further head, or any other place where there are no heads, until there are a few."""
    for place in found:
        if len(known) == MAX_PLACES:
            return
        known.setdefault(place.head or (place.row, place.column), place)


def _rows(reader: TensorReader, info: TensorInfo, start: int, stop: int) -> Tensor:
    return reader.tensor(info.name).reshape(1, -1) if len(info.shape) < 2 else reader.rows(info.name, start, stop)


def _jobs(pair: Pair) -> Iterator[_Job]:
    row_bytes = pair.growth.columns.size * ITEM_BYTES[pair.grown.dtype]
    for copies in copies_of(pair.growth.rows):
        step = max(1, _CHUNK_BYTES // (row_bytes * len(copies)))
        for start in range(0, copies[0].length, step):
            yield _Job(pair, copies, start, min(start + step, copies[0].length))


def _first_of_each(indices: Tensor) -> list[int]:
    """Where each value occurs first, in order of the values."""
    count = len(indices)
    first = torch.full((int(indices.max()) + 1,), count).scatter_reduce_(0, indices, torch.arange(count), "amin")
    positions: list[int] = first[first < count].tolist()
    return positions
