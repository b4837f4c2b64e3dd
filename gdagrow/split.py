"""Splitting a weight among copies so that the parts sum to it exactly, in the stored dtype.

A weight of `p` significant bits is `w = k * unit` for an integer `k` on its own grid, made finer by the
`floor(log2(copies))` bits that its smaller parts do not need. Partitioning the *integer* `k` into `copies` integers
of at most `2**p` gives parts that the dtype can hold and whose sum is `w`, with no rounding anywhere (growth-math
3.6). Zero-sum noise is the same partition with other shares (growth-math 3.7).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import sqrt

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Grid:
    """The grid of a stored dtype, and the dtype `carrier` whose arithmetic on `k` and its parts is exact."""

    significant_bits: int
    smallest: float  # the smallest subnormal
    carrier: torch.dtype


_GRIDS = {
    torch.bfloat16: _Grid(8, 2.0**-133, torch.float32),
    torch.float16: _Grid(11, 2.0**-24, torch.float32),
    torch.float32: _Grid(24, 2.0**-149, torch.float64),
    torch.float64: _Grid(53, 2.0**-1074, torch.float64),
}

# The integer dtype as wide as a carrier, and the mask of the carrier's exponent field.
_EXPONENT_FIELD = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0 << 48)}


@dataclass(frozen=True)
class Noise:
    """Zero-sum noise: its power relative to each weight's part in decibels, and the seed of its random words.

    The words depend on the seed, the tensor's name and the block of source rows alone, so the grown bytes do not
    change with the chunk size or the number of threads.
    """

    snr_db: float
    seed: int

    @property
    def amplitude(self) -> float:
        """The relative standard deviation of the noise on one part."""
        return float(10.0 ** (-self.snr_db / 20.0))

    def generator(self, tensor: str, block: int) -> torch.Generator:
        """The source of random words for one block of source rows of one tensor."""
        return words_of(self.seed, tensor, block)

    def disturb(self, weights: Tensor, tensor: str, copy: int, block: int, rows: slice, num_rows: int) -> None:
        """Multiply some rows of a block of `num_rows` by random numbers around 1, in place; of one copy of the rows."""
        words = torch.empty((num_rows, weights.shape[1]), dtype=torch.int32)
        words.random_(generator=self.generator(f"{tensor}/copy {copy}", block))
        factors = words[rows].to(torch.promote_types(weights.dtype, torch.float32))
        factors.sub_(2.0**30).mul_(2.0**-30 * sqrt(3.0) * self.amplitude).add_(1.0)
        largest = torch.finfo(weights.dtype).max
        disturbed = factors.mul_(weights).clamp_(-largest, largest)
        # What is not finite is passed on.
        weights.copy_(
            disturbed if _all_zero(weights - weights) else torch.where(weights.isfinite(), disturbed, weights)
        )


def words_of(seed: int, tensor: str, block: int) -> torch.Generator:
    """The source of random words for one block of source rows of one tensor."""
    digest = blake2b(f"{seed}/{tensor}/{block}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def num_draws(copies: int) -> int:
    """How many random words a weight needs so that each of its copies gets noise and the noise sums to zero."""
    return 0 if copies == 1 else 1 if copies == 2 else copies


def split(weight: Tensor, parts: Sequence[Tensor], *, words: Sequence[Tensor] = (), amplitude: float = 0.0) -> None:
    """Write into each of `parts` one part of `weight`; the parts sum to it bit for bit in its dtype.

    Args:
        weight: Any shape; float64, float32, bfloat16 or float16. What is not finite is passed through to every part.
        parts: As many tensors of that shape and dtype as there are copies.
        words: `num_draws(len(parts))` int32 tensors of that shape, uniform in `[0, 2**31)`; none for equal parts.
        amplitude: Relative standard deviation of the noise that the words make.

    Source: growth-math 3.6 and 3.7.
    """
    copies = len(parts)
    if copies & (copies - 1):
        _split_on_the_grid(weight, parts, words, amplitude)
        return
    equal = weight * (1.0 / copies)
    lost = torch.sub(weight, equal, alpha=copies)
    if _all_zero(lost):
        _split_equally(equal, parts, words, amplitude)
        return
    # Subnormals that lose bits when halved, and what is not finite, need the grid; the parts of the other weights
    # must not depend on what stands beside them.
    _split_on_the_grid(weight, parts, words, amplitude)
    alone = [torch.empty_like(part) for part in parts]
    _split_equally(equal, alone, words, amplitude)
    for part, value in zip(parts, alone, strict=True):
        part.copy_(torch.where(lost == 0, value, part))


def _split_equally(equal: Tensor, parts: Sequence[Tensor], words: Sequence[Tensor], amplitude: float) -> None:
    if not words:
        for part in parts:
            part.copy_(equal)
        return
    grid = _GRIDS[equal.dtype]
    exact = equal.to(torch.promote_types(equal.dtype, torch.float32))
    unit = _signed_unit(exact, grid, spare_bits=0)
    for part, offset in zip(parts, _zero_sum(exact / unit, words, amplitude, grid), strict=True):
        part.copy_(offset.mul_(unit).add_(exact))


def _split_on_the_grid(weight: Tensor, parts: Sequence[Tensor], words: Sequence[Tensor], amplitude: float) -> None:
    copies, grid = len(parts), _GRIDS[weight.dtype]
    exact = weight.to(grid.carrier)
    unit = _signed_unit(exact, grid, spare_bits=copies.bit_length() - 1)
    k = exact / unit  # an integer, at least 0: the unit carries the sign
    if weight.dtype == torch.float64:
        k = k.nan_to_num_(0.0, 0.0, 0.0).to(torch.int64)  # k may exceed 2**53, and its parts need every bit
    share = k // copies if k.dtype == torch.int64 else (k / copies).floor_()
    rest = k.sub_(share, alpha=copies)
    offsets = _zero_sum(share, words, amplitude, grid)
    finite = _all_zero(exact - exact)
    for i, part in enumerate(parts):
        value = (rest - i).clamp_(0, 1).add_(share)  # the first `rest` copies carry one unit more
        if words:
            value.add_(next(offsets))
        value = value.to(grid.carrier).mul_(unit)
        part.copy_(value if finite else torch.where(exact.isfinite(), value, exact))


def _all_zero(tensor: Tensor) -> bool:
    """Whether no element differs from zero or is NaN; several times faster than a comparison, which makes booleans."""
    low, high = tensor.aminmax()
    return bool(low == 0) and bool(high == 0)


def _signed_unit(exact: Tensor, grid: _Grid, spare_bits: int) -> Tensor:
    """The grid's step at each weight: a power of two with the weight's sign, no finer than the smallest subnormal."""
    as_integer, exponent_bits = _EXPONENT_FIELD[exact.dtype]
    power = (exact.view(as_integer) & exponent_bits).view(exact.dtype)
    unit = power.mul_(2.0 ** (1 - grid.significant_bits)).clamp_(min=grid.smallest)
    if spare_bits:
        unit = unit.mul_(2.0**-spare_bits).clamp_(min=grid.smallest)
    return unit.copysign_(exact)


def _zero_sum(share: Tensor, words: Sequence[Tensor], amplitude: float, grid: _Grid) -> Iterator[Tensor]:
    """For each copy, integers to add to its share: over the copies they sum to zero, and no part grows too large.

    A uniform draw within `+-a` has variance `a*a/3`. Of two copies one gets the draw and the other its negative; copy
    `i` of more gets the difference of draws `i` and `i - 1`.
    """
    size = share if share.is_floating_point() else share.double()
    largest_share = 2**grid.significant_bits - 1  # one below the largest part, for the unit that the rest adds
    if len(words) == 1:
        draw = _draw(words[0], size * (amplitude * sqrt(3.0)), largest_share - size).to(share.dtype)
        # Sums, because a bare draw or its negative may be -0.0, which would take the sign of a weight of -0.0 away.
        yield draw + 0
        yield 0 - draw
    elif words:
        reach, room = size * (amplitude * sqrt(1.5)), (largest_share - size).mul_(0.5).floor_()
        draws = [_draw(word, reach, room).to(share.dtype) for word in words]
        for i, draw in enumerate(draws):
            yield draw - draws[i - 1]


def _draw(word: Tensor, reach: Tensor, room: Tensor) -> Tensor:
    """A uniform draw within `+-reach`, rounded to an integer at random so that its mean stays 0, within `+-room`."""
    dither = (word & 0xFFFF).to(reach.dtype)
    draw = word.to(reach.dtype).sub_(2.0**30).mul_(2.0**-30).mul_(reach)
    return draw.add_(dither, alpha=2.0**-16).floor_().clamp_(min=-room, max=room)
