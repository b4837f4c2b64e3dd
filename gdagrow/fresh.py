"""Weights at fresh indices, which come from no weight of the source: zeros, free ones, or the mean of a gain."""

from dataclasses import dataclass
from math import fsum, nan, sqrt

import torch
from torch import Tensor

from gdagrow.growth import Fill, TensorGrowth, block_rows, fresh_of
from gdagrow.split import random_words


@dataclass(frozen=True)
class Fresh:
    """How free weights are drawn: uniform with mean 0 and this standard deviation.

    Each depends on the seed, the tensor's name and its place alone, as noise does (`gdagrow.split.Noise`); the
    arithmetic is that of whole numbers and one product, so that they are the same on every machine.
    """

    deviation: float
    seed: int

    def draw(self, growth: TensorGrowth, grown: Tensor, columns: slice, first_row: int, name: str) -> None:
        """Write free weights into columns of rows that stand at `first_row` and behind it in the source.

        Args:
            grown: `[rows, new columns]`.
            columns: Which of the new columns.
        """
        size, width = block_rows(growth), columns.stop - columns.start
        row, stop = first_row, first_row + len(grown)
        while row < stop:
            block = row // size
            end = min((block + 1) * size, stop)
            # Apart from the words of noise, and of the other columns of these rows.
            words = random_words(self.seed, f"fresh/{name}/{columns.start}", block, (size, width))
            part = words[row - block * size : end - block * size].double()
            part.mul_(2.0**-31 * sqrt(3.0) * self.deviation)
            grown[row - first_row : end - first_row, columns] = part.to(grown.dtype)
            row = end


def fill_columns(
    growth: TensorGrowth, source: Tensor, grown: Tensor, *, first_row: int, name: str, fresh: Fresh
) -> None:
    """Write the fresh columns of rows that grow from `source`."""
    for s in fresh_of(growth.columns):
        at = slice(s.new, s.new + s.length)
        if growth.fills[-1] is Fill.free:
            fresh.draw(growth, grown, at, first_row, name)
        elif growth.fills[-1] is Fill.mean:
            grown[:, at] = torch.tensor([[_mean(row)] for row in source.tolist()], dtype=torch.float64).to(grown.dtype)
        else:
            grown[:, at] = 0


def _mean(values: list[float]) -> float:
    """Of a sum that is rounded once, since torch's own goes in another order on another processor."""
    try:
        return fsum(values) / len(values)
    except (OverflowError, ValueError):  # infinities of both signs, and what is too large to be summed
        return nan


def fill_rows(growth: TensorGrowth, grown: Tensor, *, first_row: int, name: str, fresh: Fresh) -> None:
    """Write whole rows that are fresh: `grown` is `[rows, new columns]`, `first_row` their first index."""
    if growth.fills[0] is Fill.zero:
        grown.zero_()
        return
    # What writes a free row of the FFN reads the residual stream, all of whose readers are free.
    assert growth.fills[-1] is Fill.free, f"{name} has columns that must be zero in rows that are free"
    fresh.draw(growth, grown, slice(0, growth.columns.size), first_row, name)
