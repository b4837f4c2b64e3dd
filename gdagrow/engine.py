"""The one engine: grows any tensor, or its optimizer moments, from its notation and the axes' index maps.

A weight is gathered along every dimension, and split among the copies of every index that the layer *reads*; a
moment is gathered likewise and divided among the copies of every index that the layer *writes* (growth-math 2).
"""

from functools import lru_cache

import torch
from torch import Tensor

from gdagrow.axes import IndexMap
from gdagrow.fresh import Fresh, fill_columns, fill_rows
from gdagrow.growth import TensorGrowth, block_rows, copies_of
from gdagrow.split import Noise, num_draws, split


def grow_rows(
    growth: TensorGrowth, source: Tensor, grown: Tensor, *, first_row: int, name: str, noise: Noise | None,
    fresh: Fresh | None = None,
) -> None:  # fmt: skip
    """Grow consecutive source rows along the columns.

    Args:
        growth: The tensor's maps; of two dimensions only the last may be read with copies.
        source: `[rows, old columns]`, the source rows from `first_row`.
        grown: `[rows, new columns]` of the same dtype, written here.
        first_row: Where those rows stand in the source tensor; with `noise` it decides the random words.
        name: The grown tensor's name, which decides the random words.
        noise: Zero-sum noise for split weights, or None for equal parts.
        fresh: How free weights are drawn, for a growth with fresh columns.
    """
    columns = growth.columns
    if columns.num_fresh:
        assert fresh is not None, f"{name} has fresh columns"
        fill_columns(growth, source, grown, first_row=first_row, name=name, fresh=fresh)
    draws = max(num_draws(s.copies) for s in columns.segments)
    if not growth.reads[-1]:
        for s in columns.segments:
            if not s.fresh:
                grown[:, s.new : s.new + s.length] = source[:, s.old : s.old + s.length]
        return
    size = block_rows(growth)
    start = first_row
    while start < first_row + source.shape[0]:
        block = start // size
        stop = min((block + 1) * size, first_row + source.shape[0])
        words = None
        if noise is not None and draws:
            words = noise.words(name, block, (draws, size, columns.old_size))[
                :, start - block * size : stop - block * size
            ]
        at = slice(start - first_row, stop - first_row)
        _split_columns(columns, source[at], grown[at], words, noise.amplitude if noise else 0.0)
        start = stop


def part_rows(growth: TensorGrowth, grown: Tensor, *, copy: int, first_row: int, name: str, noise: Noise) -> None:
    """Tell rows apart from the other copies of the same source rows, where these may be any.

    In a new block the weights that read copies are zero, and so would be noise in proportion to them: there the rows
    that make the copies get it instead, all but the first copy of each.

    Args:
        growth: The tensor's maps.
        grown: `[rows, new columns]`, changed here.
        copy: Which copy of the source rows they are.
        first_row, name: As for `grow_rows`.
        noise: How large it is, and its seed.
    """
    size, start, stop = block_rows(growth), first_row, first_row + grown.shape[0]
    while start < stop:
        block = start // size
        end = min((block + 1) * size, stop)
        rows = slice(start - block * size, end - block * size)
        noise.disturb(grown[start - first_row : end - first_row], name, copy, block, rows, size)
        start = end


def _split_columns(columns: IndexMap, source: Tensor, grown: Tensor, words: Tensor | None, amplitude: float) -> None:
    for segments in copies_of(columns):
        at = slice(segments[0].old, segments[0].old + segments[0].length)
        parts = [grown[:, s.new : s.new + s.length] for s in segments]
        if len(parts) == 1:
            parts[0].copy_(source[:, at])
        else:
            used = () if words is None else words[: num_draws(len(parts)), :, at].unbind()
            split(source[:, at], parts, words=used, amplitude=amplitude)


def grow_tensor(
    growth: TensorGrowth, source: Tensor, name: str = "", noise: Noise | None = None, fresh: Fresh | None = None,
    *, parted: bool = False,
) -> Tensor:  # fmt: skip
    """Grow a whole tensor in memory: what streaming does row by row, for small tensors and for tests.

    `parted`: whether copies of rows are told apart, see `part_rows`.

    Returns:
        A tensor of `growth.shape` in the dtype of `source`.
    """
    matrix = source.reshape(growth.rows.old_size, growth.columns.old_size)
    grown = source.new_empty((growth.rows.size, growth.columns.size))
    for s in growth.rows.segments:
        rows, to = slice(s.old, s.old + s.length), slice(s.new, s.new + s.length)
        if s.fresh:
            assert fresh is not None, f"{name} has fresh rows"
            fill_rows(growth, grown[to], first_row=s.old, name=name, fresh=fresh)
        else:
            grow_rows(growth, matrix[rows], grown[to], first_row=s.old, name=name, noise=noise, fresh=fresh)
            if parted and noise is not None and s.copy:
                part_rows(growth, grown[to], copy=s.copy, first_row=s.old, name=name, noise=noise)
    return grown.reshape(growth.shape)


def grow_moment_rows(growth: TensorGrowth, source: Tensor, grown: Tensor, *, row_copies: int, power: int) -> None:
    """Grow consecutive source rows of an optimizer moment along the columns, by the mirror rule.

    Args:
        growth: The maps of the parameter that the moment belongs to.
        source: `[rows, old columns]`.
        grown: `[rows, new columns]` of the same dtype, written here.
        row_copies: How many copies each of these rows has in the grown moment. What is fresh begins at zero.
        power: 1 for `exp_avg` or a momentum buffer, 2 for `exp_avg_sq`: of the copies that are divided by.

    Source: growth-math 2; the gradient of a grown parameter is this with power 1.
    """
    writes_rows, writes_columns = len(growth.dims) == 2 and not growth.reads[0], not growth.reads[-1]
    for s in growth.columns.segments:
        if s.fresh:
            grown[:, s.new : s.new + s.length] = 0
            continue
        copies = (row_copies if writes_rows else 1) * (s.copies if writes_columns else 1)
        part, old = grown[:, s.new : s.new + s.length], source[:, s.old : s.old + s.length]
        if copies == 1:
            part.copy_(old)
        else:
            torch.div(old, copies**power, out=part)


def grow_moment(growth: TensorGrowth, source: Tensor, power: int) -> Tensor:
    """Grow a whole optimizer moment in memory, where it lies: what streaming does row by row.

    Args:
        growth: The maps of the parameter that the moment belongs to.
        source: The moment, of the parameter's source shape.
        power: See `grow_moment_rows`.

    Returns:
        A tensor of `growth.shape` in the dtype of `source`.
    """
    matrix = source.reshape(growth.rows.old_size, growth.columns.old_size)
    grown = source.new_empty((growth.rows.size, growth.columns.size))
    for s in growth.rows.segments:
        to = grown[s.new : s.new + s.length]
        if s.fresh:
            to.zero_()
        else:
            grow_moment_rows(growth, matrix[s.old : s.old + s.length], to, row_copies=s.copies, power=power)
    return grown.reshape(growth.shape)


@lru_cache(maxsize=64)
def old_indices(index_map: IndexMap, device: torch.device) -> Tensor:
    """The old index of each new one, int64 on `device`."""
    return torch.tensor(list(index_map), device=device)
