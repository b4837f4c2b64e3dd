"""Fold grown rows back onto the source's: copies must be its bits, and parts must sum to it with no rounding.

Weights are arrays of the unsigned integers that their bits are: numpy has no bfloat16, and bits are what is compared.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import fsum, inf, prod
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gdagrow.axes import Segment
from gdagrow.growth import Fill, TensorGrowth, copies_of, fresh_of
from gdagrow.heads import MAX_COPIES

Bits = NDArray[Any]  # unsigned integers as wide as a weight


@dataclass(frozen=True)
class Floats:
    """A stored dtype: the integers that its bits are read as, its numpy dtype if it has one, and its precision."""

    bits: type[np.unsignedinteger[Any]]
    dtype: type[np.floating[Any]] | None
    significant_bits: int

    def doubles(self, weights: Bits) -> NDArray[np.float64]:
        """The weights' values."""
        if self.dtype is None:
            return (weights.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return weights.view(self.dtype).astype(np.float64)

    def widen(self, weights: Bits, out: NDArray[Any]) -> None:
        """Write the weights' values into a wider array; those of bfloat16 in an order of its own."""
        if self.dtype is not None:
            np.copyto(out, weights.view(self.dtype))
        elif out.dtype == np.float64 or weights.shape[-1] % 2:
            np.copyto(out, self.doubles(weights))
        else:
            # A bfloat16 is the upper half of a float32. Two at a time take one operation each and no conversion.
            pairs = weights.view(np.uint32)
            *copies, rows, half = pairs.shape
            halves = out.view(np.uint32).reshape(*copies, 2, rows, half)
            np.left_shift(pairs, 16, out=halves[..., 0, :, :])
            np.bitwise_and(pairs, 0xFFFF0000, out=halves[..., 1, :, :])


FLOATS: Final = {
    "BF16": Floats(np.uint16, None, 8),
    "F16": Floats(np.uint16, np.float16, 11),
    "F32": Floats(np.uint32, np.float32, 24),
    "F64": Floats(np.uint64, np.float64, 53),
}
_PRECISION: Final = {np.float32: 24, np.float64: 53}
_LEAST, _LARGEST = 2.0**-1074, float(np.finfo(np.float64).max)


@dataclass(frozen=True)
class Wrong:
    """Weights that do not fold back, `[n]` each, sorted by row.

    rows: Rows of the block that was folded.
    columns: Where they stand in the grown tensor; for a sum, the first of its parts.
    old_columns: Where they stand in the source tensor.
    apart: How far the copy, or the sum of the parts, is from the source; infinite where either is not finite.
    """

    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    old_columns: NDArray[np.intp]
    apart: NDArray[np.float64]


class _Scratch(threading.local):
    """Memory that a thread works in: fresh memory for every result would take longer than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def of(self, use: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        size = prod(shape) * np.dtype(dtype).itemsize
        if use not in self._buffers or self._buffers[use].size < size:
            self._buffers[use] = np.empty(size, np.uint8)
        view: NDArray[Any] = np.ndarray(shape, dtype, self._buffers[use])
        return view


scratch = _Scratch()


def same_bits(one: Bits, other: Bits) -> bool:
    """Whether two arrays are the same, bit for bit; `one` may be broadcast to the other's shape."""
    if one.size == other.size and one.flags.c_contiguous and other.flags.c_contiguous and not one.nbytes % 8:
        one, other = (bits.reshape(-1).view(np.uint64) for bits in (one, other))
    return not np.not_equal(one, other, out=scratch.of("differ", other.shape, np.bool_)).any()


def _steps(weight: Bits, part: Bits, out: Bits | None = None) -> Bits:
    """How many numbers of their dtype lie between a weight and a part of its sign, counted towards zero.

    Integers without a sign wrap around, so that what would be less than no steps, as parts that are larger or of the
    other sign are away, is about as many as can be counted.
    """
    return np.subtract(weight, part, out=out)


@np.errstate(all="ignore")
def fold_rows(floats: Floats, growth: TensorGrowth, source: Bits, grown: Bits) -> list[Wrong]:
    """Return what of consecutive rows does not fold back along the columns.

    Args:
        floats: The dtype of both.
        growth: The tensor's maps.
        source: `[rows, old columns]`.
        grown: `[rows, new columns]`, contiguous: one copy of those rows.
    """
    wrong: list[Wrong] = []
    for segments in copies_of(growth.columns):
        old, length = segments[0].old, segments[0].length
        weight, parts = source[:, old : old + length], _parts(grown, segments)
        if growth.reads[-1] and len(segments) > 1:
            if not _surely_sum(floats, weight, parts):
                wrong += _located(_sums_apart(floats, weight, parts), segments[0].new, old)
        elif not same_bits(weight, parts):
            apart = _copies_apart(floats, weight, parts)
            for i, segment in enumerate(segments):
                wrong += _located(apart[i], segment.new, old)
    for segment in fresh_of(growth.columns):
        columns = grown[:, segment.new : segment.new + segment.length]
        wrong += _located(_fresh_apart(floats, growth.fills[-1], columns), segment.new, segment.old)
    return wrong


@np.errstate(all="ignore")
def fold_fresh_rows(floats: Floats, growth: TensorGrowth, grown: Bits) -> list[Wrong]:
    """Return what of whole rows `[rows, new columns]`, that come from none, might add something to the function."""
    return list(_located(_fresh_apart(floats, growth.fills[0], grown), 0, 0))


@np.errstate(all="ignore")
def fold_free_rows(floats: Floats, grown: Bits) -> list[Wrong]:
    """Return what of rows `[rows, new columns]`, that may be any, is not finite."""
    return list(_located(_fresh_apart(floats, Fill.free, grown), 0, 0))


def _fresh_apart(floats: Floats, fill: Fill, grown: Bits) -> NDArray[np.float64]:
    """How far fresh weights are from what they must be: zero, or where they are free anything that is finite."""
    values = np.abs(floats.doubles(grown))
    values[~np.isfinite(values)] = inf
    return values if fill is Fill.zero else np.where(np.isinf(values), inf, 0.0)


def _parts(grown: Bits, segments: tuple[Segment, ...]) -> Bits:
    """The segments' columns, `[segments, rows, length]`: a view where they are evenly spaced, as most are."""
    spacing = {b.new - a.new for a, b in pairwise(segments)} or {0}
    if len(spacing) > 1:
        return np.stack([grown[:, s.new : s.new + s.length] for s in segments])
    shape, (row, item) = (len(segments), len(grown), segments[0].length), grown.strides
    view: Bits = np.ndarray(shape, grown.dtype, grown.data, segments[0].new * item, (spacing.pop() * item, row, item))
    return view


def _located(apart: NDArray[np.float64], column: int, old_column: int) -> Iterator[Wrong]:
    rows, columns = apart.nonzero()
    if len(rows):
        yield Wrong(rows, columns + column, columns + old_column, apart[rows, columns])


def _copies_apart(floats: Floats, weight: Bits, parts: Bits) -> NDArray[np.float64]:
    apart = np.abs(floats.doubles(parts) - floats.doubles(weight))
    apart[~np.isfinite(apart)] = inf
    # A zero of the other sign is no copy, if only in its bits; it is told as the least distance that there is.
    return np.where(weight != parts, np.maximum(apart, _LEAST), 0.0)


def _surely_sum(floats: Floats, weight: Bits, parts: Bits) -> bool:
    """Whether the parts sum to their weights, as far as fast arithmetic can tell that is exact wherever this holds.

    Rounding could hide a wrong sum: a part far below the others drowns in them, and parts far above their sum drown its
    last bits. So each of the `c` parts must lie between its weight `w` and `w / 2**K`, `K > 4 + log2 c`, which counting
    numbers shows: those of one sign are ordered as their bits are, and `2**(p - 1)` of them lie between `w` and `w / 2`
    for `p` significant bits. Then, as the sum found is `w`, no partial sum exceeds `|w|`, and every part is a multiple
    of `|w| / 2**(p + K)`, or of the smallest subnormal: in `p + K` bits nothing is rounded. (A part of the other sign
    passes the count if it exceeds `w` by half of all exponents; but then the sum has its sign.)
    """
    copies, rows, length = parts.shape
    # In the order of the file, in which memory is read fastest.
    steps = scratch.of("steps", (rows, copies, length), parts.dtype).swapaxes(0, 1)
    _steps(weight, parts, steps)
    if int(np.maximum.reduce(steps, axis=None)) > _furthest(floats, parts):
        return False
    # Bits again, for their speed; `_sums_apart` finds a rest of -0.0, which weights of zero may leave, to be none.
    needed = floats.significant_bits + _spare_bits(parts)
    carrier = np.float32 if needed <= _PRECISION[np.float32] else np.float64
    return not _rest(floats, weight, parts, carrier).view(np.uint32).max()


def _spare_bits(parts: Bits) -> int:
    return 4 + len(parts).bit_length()


def _furthest(floats: Floats, parts: Bits) -> int:
    """How many numbers may lie between a weight and its part; none do for more copies than growth ever makes."""
    return _spare_bits(parts) << floats.significant_bits - 1 if len(parts) <= MAX_COPIES else -1


def _rest(floats: Floats, weight: Bits, parts: Bits, carrier: type[np.floating[Any]]) -> NDArray[Any]:
    """What the parts sum to beyond their weight, `[rows, length]`, with no rounding where `_surely_sum` says so.

    No dtype has the bits for sums of float64; there what each addition loses is kept (Knuth's TwoSum), and as these
    losses are multiples of the same unit and far below `w`, they are added without an error. Zeros are equal
    whatever their sign, which a sum may lose and no layer makes anything of. In float32, bfloat16 is in the order of
    `Floats.widen`.
    """
    terms = scratch.of("terms", parts.shape, carrier)
    floats.widen(parts, terms)
    lost = []
    # Halves are added, and again, since few large additions are faster than many small ones.
    while len(terms) > 1:
        half = (len(terms) + 1) // 2
        total, value, terms = terms[: len(terms) - half], terms[half:], terms[:half]
        if floats.dtype is np.float64:
            more = total + value
            of_value = more - total
            lost.append(((total - (more - of_value)) + (value - of_value)).sum(0))
        total += value
    rest = scratch.of("rest", weight.shape, carrier)
    floats.widen(weight, rest)
    np.subtract(terms[0], rest, out=rest)
    for error in lost:
        rest += error
    return rest


def _sums_apart(floats: Floats, weight: Bits, parts: Bits) -> NDArray[np.float64]:
    """How far each sum of parts is from its weight, `[rows, length]`; zero only for sums that are exactly equal."""
    beyond = (_steps(weight, parts) > _furthest(floats, parts)).any(0)
    unsure = (_rest(floats, weight, parts, np.float64) != 0) | beyond
    expected = floats.doubles(weight[unsure])
    terms = np.column_stack([*(floats.doubles(part[unsure]) for part in parts), -expected])
    found = np.abs(terms.sum(1))
    finite = np.isfinite(terms).all(1)
    rounding = np.abs(terms).sum(1) * (terms.shape[1] * np.finfo(np.float64).eps)
    # What rounding cannot explain is wrong; the rest, of which there is little, is summed in exact arithmetic.
    for i in (finite & ~(found > rounding)).nonzero()[0].tolist():
        found[i] = _exact_sum(terms[i].tolist())
    whole = ((terms[:, :-1] == expected[:, None]) | (np.isnan(terms[:, :-1]) & np.isnan(expected)[:, None])).all(1)
    found[~finite] = inf
    found[whole & ~np.isfinite(expected)] = 0.0
    apart = np.zeros(unsure.shape)
    apart[unsure] = found
    return apart


def _exact_sum(terms: list[float]) -> float:
    """The magnitude of a sum, rounded once, and so zero only if the sum is."""
    try:
        return abs(fsum(terms))
    except OverflowError:  # an intermediate sum
        total = abs(sum(map(Fraction, terms), start=Fraction()))
        return float(min(total, Fraction(_LARGEST)))
