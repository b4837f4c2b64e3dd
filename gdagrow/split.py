"""Splitting a weight among copies so that the parts sum to it exactly, in the stored dtype.

A weight of `p` significant bits is `w = k * unit` for an integer `k` on its own grid, made finer by the
`floor(log2(copies))` bits that its smaller parts do not need. Partitioning the *integer* `k` into `copies` integers
of at most `2**p` gives parts that the dtype can hold and whose sum is `w`, with no rounding anywhere (growth-math
3.6). Zero-sum noise is the same partition with other shares (growth-math 3.7).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import prod, sqrt
from threading import local

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class _Grid:
    """The grid of a stored dtype.

    carrier: The dtype whose arithmetic on `k` and its parts is exact.
    bits: The integer dtype as wide as the stored one.
    draws: The floating-point dtype that noise is drawn in.
    """

    significant_bits: int
    smallest: float  # the smallest subnormal
    carrier: torch.dtype
    bits: torch.dtype
    draws: torch.dtype


_GRIDS = {
    torch.bfloat16: _Grid(8, 2.0**-133, torch.float32, torch.int16, torch.float32),
    torch.float16: _Grid(11, 2.0**-24, torch.float32, torch.int16, torch.float32),
    torch.float32: _Grid(24, 2.0**-149, torch.float64, torch.int32, torch.float32),
    torch.float64: _Grid(53, 2.0**-1074, torch.float64, torch.int64, torch.float64),
}

# The integer dtype as wide as a carrier, and the mask of the carrier's exponent field.
_EXPONENT_FIELD = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0 << 48)}


class _Scratch(local):
    """Tensors for what a split computes on its way, used again by the next one of the same thread.

    Memory that is new to the process costs several times as much as the arithmetic on it.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._used = 0

    def clear(self) -> None:
        """Take everything back."""
        self._used = 0

    def new(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An empty tensor of the shape of another, until the next `clear`."""
        dtype, slot = dtype or like.dtype, self._used
        self._used += 1
        if slot < len(self._tensors):
            found = self._tensors[slot]
            if found.dtype == dtype and found.shape == like.shape:
                return found
            del self._tensors[slot:]  # another kind of split, which takes others from here on
        self._tensors.append(torch.empty(like.shape, dtype=dtype))
        return self._tensors[-1]

    def converted(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy in another dtype."""
        return self.new(tensor, dtype).copy_(tensor)


_SCRATCH = _Scratch()


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

    def words(self, tensor: str, block: int, shape: tuple[int, ...]) -> Tensor:
        """The random words for one block of source rows of one tensor: see `random_words`."""
        return random_words(self.seed, tensor, block, shape)

    def disturb(self, weights: Tensor, tensor: str, copy: int, block: int, rows: slice, num_rows: int) -> None:
        """Multiply some rows of a block of `num_rows` by random numbers around 1, in place; of one copy of the rows."""
        words = self.words(f"{tensor}/copy {copy}", block, (num_rows, weights.shape[1]))
        factors = words[rows].to(torch.promote_types(weights.dtype, torch.float32))
        factors.mul_(2.0**-31 * sqrt(3.0) * self.amplitude).add_(1.0)
        largest = torch.finfo(weights.dtype).max
        disturbed = factors.mul_(weights).clamp_(-largest, largest)
        # What is not finite is passed on.
        weights.copy_(
            disturbed if _all_zero(weights - weights) else torch.where(weights.isfinite(), disturbed, weights)
        )


def random_words(seed: int, tensor: str, block: int, shape: tuple[int, ...]) -> Tensor:
    """Random words for one block of source rows of one tensor: int32, of which every bit is random.

    The stream is numpy's SFC64, which stays the same from version to version; the tensor may not be written to.
    """
    digest = blake2b(f"{seed}/{tensor}/{block}".encode(), digest_size=16).digest()
    stream = np.random.SFC64(int.from_bytes(digest, "little"))
    num_words = prod(shape)
    raw = stream.random_raw(-(-num_words // 2))
    return torch.from_numpy(raw.view(np.int32)[:num_words]).view(shape)


def num_draws(copies: int) -> int:
    """How many random words a weight needs so that each of its copies gets noise and the noise sums to zero."""
    return 0 if copies == 1 else 1 if copies == 2 else copies


def split(weight: Tensor, parts: Sequence[Tensor], *, words: Sequence[Tensor] = (), amplitude: float = 0.0) -> None:
    """Write into each of `parts` one part of `weight`; the parts sum to it bit for bit in its dtype.

    Args:
        weight: Any shape; float64, float32, bfloat16 or float16. What is not finite is passed through to every part.
        parts: As many tensors of that shape and dtype as there are copies.
        words: `num_draws(len(parts))` int32 tensors of that shape, every bit of them random; none for equal parts.
        amplitude: Relative standard deviation of the noise that the words make.

    Source: growth-math 3.6 and 3.7.
    """
    copies, new = len(parts), _SCRATCH.new
    _SCRATCH.clear()
    if copies & (copies - 1):
        _split_on_the_grid(weight, parts, words, amplitude)
        return
    equal = torch.mul(weight, 1.0 / copies, out=new(weight))
    lost = torch.sub(weight, equal, alpha=copies, out=new(weight))
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
    """Copy parts that are equal, and move each by a number of units: in their bits, where a unit is a 1."""
    if not words:
        for part in parts:
            part.copy_(equal)
        return
    grid, new = _GRIDS[equal.dtype], _SCRATCH.new
    bits, leading = equal.view(grid.bits), 1 << (grid.significant_bits - 1)
    mantissa = torch.bitwise_and(bits, leading - 1, out=new(bits))
    room = torch.bitwise_xor(mantissa, leading - 1, out=new(bits))
    k = _SCRATCH.converted(mantissa, grid.draws).add_(leading)
    # Whether there is a binade below with a finer grid; what lies at the bottom of all stays as it is.
    moves = torch.bitwise_and(bits, torch.iinfo(grid.bits).max, out=new(bits))
    moves.bitwise_right_shift_(grid.significant_bits).clamp_(max=1)
    below = new(bits)
    for part, move in zip(parts, _zero_sum(k, room, words, amplitude), strict=True):
        move.mul_(moves)
        # In the binade below a unit is two steps. No part loses more than half of itself, so that there is one at most.
        torch.add(mantissa, move, out=below).clamp_(max=0)
        part.view(grid.bits).copy_(move.add_(below).add_(bits))


def _split_on_the_grid(weight: Tensor, parts: Sequence[Tensor], words: Sequence[Tensor], amplitude: float) -> None:
    copies, grid, new = len(parts), _GRIDS[weight.dtype], _SCRATCH.new
    exact = _SCRATCH.converted(weight, grid.carrier)
    unit = _signed_unit(exact, grid, spare_bits=copies.bit_length() - 1)
    k = torch.div(exact, unit, out=new(exact))  # an integer, at least 0: the unit carries the sign
    finite = _all_zero(torch.sub(exact, exact, out=new(exact)))
    if not finite:
        k.nan_to_num_(0.0, 0.0, 0.0)
    if weight.dtype == torch.float64:
        # It may exceed 2**53, and its parts need every bit.
        k = _SCRATCH.converted(k, torch.int64)
        share = torch.div(k, copies, rounding_mode="floor", out=new(k))
    else:
        share = torch.div(k, copies, out=new(k)).floor_()
    rest = k.sub_(share, alpha=copies)
    offsets: Iterator[Tensor] = iter(())
    if words:
        size = _SCRATCH.converted(share, grid.draws)
        # One below the largest part, for the unit that the rest adds.
        room = _SCRATCH.converted(share, grid.bits).neg_().add_(2**grid.significant_bits - 1)
        offsets = _zero_sum(size, room, words, amplitude)
    value, scaled = new(share), new(exact)
    for i, part in enumerate(parts):
        # The first `rest` copies carry one unit more.
        torch.sub(rest, i, out=value).clamp_(0, 1).add_(share)
        if words:
            value.add_(next(offsets))
        torch.mul(value if value.is_floating_point() else scaled.copy_(value), unit, out=scaled)
        part.copy_(scaled if finite else torch.where(exact.isfinite(), scaled, exact))


def _all_zero(tensor: Tensor) -> bool:
    """Whether no element differs from zero or is NaN; several times faster than a comparison, which makes booleans."""
    low, high = tensor.aminmax()
    return bool(low == 0) and bool(high == 0)


def _signed_unit(exact: Tensor, grid: _Grid, spare_bits: int) -> Tensor:
    """The grid's step at each weight: a power of two with the weight's sign, no finer than the smallest subnormal."""
    as_integer, exponent_bits = _EXPONENT_FIELD[exact.dtype]
    bits = exact.view(as_integer)
    unit = torch.bitwise_and(bits, exponent_bits, out=_SCRATCH.new(bits)).view(exact.dtype)
    unit.mul_(2.0 ** (1 - grid.significant_bits)).clamp_(min=grid.smallest)
    if spare_bits:
        unit.mul_(2.0**-spare_bits).clamp_(min=grid.smallest)
    return unit.copysign_(exact)


def _zero_sum(size: Tensor, room: Tensor, words: Sequence[Tensor], amplitude: float) -> Iterator[Tensor]:
    """For each copy, integers to add to its share: over the copies they sum to zero, and no part grows too large.

    A uniform draw within `+-a` has variance `a*a/3`. Of two copies one gets the draw and the other its negative; copy
    `i` of more gets the difference of draws `i` and `i - 1`. What was yielded may be changed, and is by the next.

    Args:
        size: The shares, overwritten.
        room: How much more a part may be than its share; integers, overwritten.
    """
    if len(words) == 1:
        (draw,) = _draws(words, size.mul_(2.0**-31 * sqrt(3.0) * amplitude), room)
        offset = _SCRATCH.new(draw)
        yield offset.copy_(draw)
        yield torch.neg(draw, out=offset)
    else:
        draws = _draws(words, size.mul_(2.0**-31 * sqrt(1.5) * amplitude), room.bitwise_right_shift_(1))
        offset = _SCRATCH.new(room)
        for i, draw in enumerate(draws):
            yield torch.sub(draw, draws[i - 1], out=offset)


def _draws(words: Sequence[Tensor], reach: Tensor, room: Tensor) -> list[Tensor]:
    """For each tensor of words `words * reach`, rounded at random so that the mean stays 0, and within `+-room`."""
    low_bits, dither = _SCRATCH.new(words[0]), _SCRATCH.new(reach)
    draws = []
    for word in words:
        dither.copy_(torch.bitwise_and(word, 0xFFFF, out=low_bits))
        scaled = low_bits.view(torch.float32) if reach.dtype == torch.float32 else _SCRATCH.new(reach)
        scaled.copy_(word).mul_(reach).add_(dither, alpha=2.0**-16).floor_()
        draw = _SCRATCH.converted(scaled, room.dtype)
        draws.append(torch.minimum(draw, room, out=draw))
    room.neg_()
    for draw in draws:
        torch.maximum(draw, room, out=draw)
    return draws
