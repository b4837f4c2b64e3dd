"""Fold grown rows back onto the source's: copies must be its bits, and parts must sum to it with no rounding."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import fsum, inf

import torch
from torch import Tensor

from gdagrow.axes import Segment
from gdagrow.growth import TensorGrowth, copies_of
from gdagrow.heads import MAX_COPIES

_AS_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SIGNIFICANT_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}
_LEAST, _LARGEST = 2.0**-1074, torch.finfo(torch.float64).max


@dataclass(frozen=True)
class Wrong:
    """Weights that do not fold back, `[n]` each, sorted by row.

    rows: Rows of the block that was folded.
    columns: Where they stand in the grown tensor; for a sum, the first of its parts.
    old_columns: Where they stand in the source tensor.
    apart: How far the copy, or the sum of the parts, is from the source; infinite where either is not finite.
    """

    rows: Tensor
    columns: Tensor
    old_columns: Tensor
    apart: Tensor


class _Scratch(threading.local):
    """Memory that a thread works in: fresh memory for every result would take longer than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def of(self, use: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        num_bytes = shape.numel() * dtype.itemsize
        if use not in self._buffers or self._buffers[use].numel() < num_bytes:
            self._buffers[use] = torch.empty(num_bytes, dtype=torch.uint8)
        return self._buffers[use][:num_bytes].view(dtype).view(shape)


_scratch = _Scratch()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype are the same, bit for bit; `one` may be broadcast to the other's shape."""
    low, high = _steps(one, other)
    return low == high == 0


def _steps(one: Tensor, other: Tensor) -> tuple[int, int]:
    """The least and greatest of `_each_step`, several times faster to find than a comparison, which makes booleans."""
    integer = _AS_INTEGER[one.dtype.itemsize]
    out = _scratch.of("steps", other.shape, integer)
    low, high = torch.sub(one.view(integer), other.view(integer), out=out).aminmax()
    return int(low), int(high)


def _each_step(one: Tensor, other: Tensor) -> Tensor:
    """How many numbers of their dtype lie between two of one sign, counted away from zero; 0 only for the same bits."""
    integer = _AS_INTEGER[one.dtype.itemsize]
    return one.view(integer) - other.view(integer)


def fold_rows(growth: TensorGrowth, source: Tensor, grown: Tensor) -> Iterator[Wrong]:
    """Yield what of consecutive rows does not fold back along the columns.

    Args:
        growth: The tensor's maps.
        source: `[rows, old columns]`.
        grown: `[rows, new columns]` of the same dtype: one copy of those rows.
    """
    for segments in copies_of(growth.columns):
        old, length = segments[0].old, segments[0].length
        weight, parts = source[:, None, old : old + length], _side_by_side(grown, segments)
        if growth.reads[-1] and len(segments) > 1:
            if not _surely_sum(weight, parts):
                yield from _located(_sums_apart(weight, parts), segments[0].new, old)
        elif not same_bits(weight, parts):
            for part, segment in zip(parts.unbind(1), segments, strict=True):
                yield from _located(_copies_apart(weight[:, 0], part), segment.new, old)


def _side_by_side(grown: Tensor, segments: tuple[Segment, ...]) -> Tensor:
    """The segments' columns, `[rows, segments, length]`: a view where they are evenly spaced, as nearly all are."""
    parts = [grown[:, s.new : s.new + s.length] for s in segments]
    strides = {b.new - a.new for a, b in pairwise(segments)} or {0}
    if len(strides) > 1:
        return torch.stack(parts, dim=1)
    rows, columns = parts[0].stride()
    return parts[0].as_strided((len(grown), len(parts), segments[0].length), (rows, strides.pop() * columns, columns))


def _located(apart: Tensor, column: int, old_column: int) -> Iterator[Wrong]:
    rows, columns = apart.nonzero(as_tuple=True)
    if len(rows):
        yield Wrong(rows, columns + column, columns + old_column, apart[rows, columns])


def _copies_apart(weight: Tensor, part: Tensor) -> Tensor:
    apart = (part.double() - weight.double()).abs().nan_to_num(inf, inf, inf)
    # A zero of the other sign is no copy, if only in its bits; it is told as the least distance that there is.
    return torch.where(_each_step(weight, part) != 0, apart.clamp(min=_LEAST), 0.0)


def _surely_sum(weight: Tensor, parts: Tensor) -> bool:
    """Whether the parts sum to their weights, as far as fast arithmetic can tell that is exact wherever this holds.

    Rounding could hide a wrong sum: a part far below the others drowns in them, and parts far above their sum drown its
    last bits. So each of the `c` parts must lie between its weight `w` and `w / 2**K`, `K > 4 + log2 c`, which counting
    numbers shows: those of one sign are ordered as their bits are, and `2**(p - 1)` of them lie between `w` and `w / 2`
    for `p` significant bits. Then, as the sum found is `w`, no partial sum exceeds `|w|`, and every part is a multiple
    of `|w| / 2**(p + K)`, or of the smallest subnormal: in `p + K` bits nothing is rounded. (A part of the other sign
    passes the count if it exceeds `w` by half of all exponents; but then the sum has its sign.)
    """
    low, high = _steps(weight, parts)
    if low < 0 or high > _furthest(weight, parts):
        return False
    # Bits again, for their speed; `_sums_apart` finds a rest of -0.0, which weights of zero may leave, to be none.
    least, greatest = _rest(weight, parts).view(torch.int32).aminmax()
    return int(least) == int(greatest) == 0


def _spare_bits(parts: Tensor) -> int:
    return 4 + parts.shape[1].bit_length()


def _furthest(weight: Tensor, parts: Tensor) -> int:
    """How many numbers may lie between a weight and its part; none do for more copies than growth ever makes."""
    return _spare_bits(parts) << (_SIGNIFICANT_BITS[weight.dtype] - 1) if parts.shape[1] <= MAX_COPIES else -1


def _rest(weight: Tensor, parts: Tensor) -> Tensor:
    """What the parts sum to beyond their weight, with no rounding where `_surely_sum` says so.

    No dtype has the bits for sums of float64; there what each addition loses is kept (Knuth's TwoSum), and as these
    losses are multiples of the same unit and far below `w`, they are added without an error. Zeros are equal
    whatever their sign, which a sum may lose and no layer makes anything of.
    """
    needed = _SIGNIFICANT_BITS[weight.dtype] + _spare_bits(parts)
    carrier = torch.float32 if needed <= _SIGNIFICANT_BITS[torch.float32] else torch.float64
    terms = _scratch.of("terms", parts.shape, carrier).copy_(parts)
    lost = []
    while (count := terms.shape[1]) > 1:
        total, value, terms = terms[:, : count // 2], terms[:, (count + 1) // 2 :], terms[:, : (count + 1) // 2]
        if needed > _SIGNIFICANT_BITS[carrier]:
            more = total + value
            of_value = more - total
            lost.append(((total - (more - of_value)) + (value - of_value)).sum(1, keepdim=True))
        total.add_(value)
    rest = _scratch.of("rest", weight.shape, carrier).copy_(weight)
    torch.sub(terms, rest, out=rest)
    for error in lost:
        rest.add_(error)
    return rest


def _sums_apart(weight: Tensor, parts: Tensor) -> Tensor:
    """How far each sum of parts is from its weight, `[rows, length]` float64; zero only where exactly equal."""
    steps = _each_step(weight, parts)
    beyond = (steps < 0) | (steps > _furthest(weight, parts))
    unsure = ((_rest(weight, parts) != 0) | beyond.any(1, keepdim=True))[:, 0]
    weight = weight[:, 0]
    expected = weight[unsure].double()
    terms = torch.cat([parts.transpose(1, 2)[unsure].double(), -expected[:, None]], dim=1)
    found = terms.sum(1).abs()
    finite = terms.isfinite().all(1)
    rounding = terms.abs().sum(1) * (terms.shape[1] * torch.finfo(torch.float64).eps)
    # What rounding cannot explain is wrong; the rest, of which there is little, is summed in exact arithmetic.
    for i in (finite & ~(found > rounding)).nonzero().flatten().tolist():
        found[i] = _exact_sum(terms[i].tolist())
    whole = ((terms[:, :-1] == expected[:, None]) | (terms[:, :-1].isnan() & expected.isnan()[:, None])).all(1)
    found[~finite] = inf
    found[whole & ~expected.isfinite()] = 0.0
    apart = torch.zeros(weight.shape, dtype=torch.float64)
    apart[unsure] = found
    return apart


def _exact_sum(terms: list[float]) -> float:
    """The magnitude of a sum, rounded once, and so zero only if the sum is."""
    try:
        return abs(fsum(terms))
    except OverflowError:  # an intermediate sum
        total = abs(sum(map(Fraction, terms), start=Fraction()))
        return float(min(total, Fraction(_LARGEST)))
