"""Named axes, the arrow notation, and index maps kept as runs.

A parameter is written as its storage dimensions over named axes, with an arrow that points at the axes the layer
*writes*; the other side is what it *reads*:

    embed_tokens   vocab -> hidden
    q_proj         (group (signal + 1) head_dim) <- hidden
    o_proj         hidden <- (group signal 2 head_dim)
    norm           hidden <-

A dimension is an axis, a number, a product `(a b c)` in row-major order, or a sum `(a + b)` of blocks laid end to
end. Growth gives each axis one index map `new -> old`; the notation composes those maps into one map per dimension.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, pairwise
from math import prod

from gdagrow.errors import GdagrowError


@dataclass(frozen=True)
class Segment:
    """New indices `[new, new + length)`: copy number `copy` of `copies` of the old ones from `old`, unless `fresh`."""

    new: int
    old: int
    length: int
    copy: int
    copies: int
    fresh: bool = False


@dataclass(frozen=True)
class IndexMap:
    """A map `new -> old` of one dimension, as runs `(start, stop)` of contiguous old indices in new order.

    Indices of `old_size` and above are fresh: they come from nothing, each number from another nothing.
    """

    runs: tuple[tuple[int, int], ...]
    old_size: int

    @staticmethod
    def identity(size: int) -> "IndexMap":
        return IndexMap(((0, size),), size)

    @staticmethod
    def tile(size: int, copies: int) -> "IndexMap":
        """Whole copies of the old block, one after another."""
        return IndexMap(((0, size),) * copies, size)

    @staticmethod
    def extended(size: int, new_size: int) -> "IndexMap":
        """As many whole copies of the old block as there is room for, and fresh indices behind them."""
        copies, fresh = divmod(new_size, size)
        return IndexMap(((0, size),) * copies + ((size, size + fresh),) * bool(fresh), size)

    @staticmethod
    def of(indices: list[int], old_size: int) -> "IndexMap":
        """The map that lists one old index for each new one."""
        return IndexMap(_join(((i, i + 1) for i in indices), old_size), old_size)

    @cached_property
    def num_fresh(self) -> int:
        return sum(stop - max(start, self.old_size) for start, stop in self.runs if stop > self.old_size)

    @cached_property
    def size(self) -> int:
        return sum(stop - start for start, stop in self.runs)

    @property
    def is_identity(self) -> bool:
        return self.runs == ((0, self.old_size),)

    def __iter__(self) -> Iterator[int]:
        for start, stop in self.runs:
            yield from range(start, stop)

    def runs_between(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The runs of old indices, in order, that the new indices `[begin, end)` come from."""
        starts, found = self._starts, []
        for at in range(bisect_right(starts, begin) - 1, len(self.runs)):
            if starts[at] >= end:
                break
            old = self.runs[at][0] - starts[at]
            found.append((old + max(begin, starts[at]), old + min(end, starts[at + 1])))
        return found

    @cached_property
    def _starts(self) -> list[int]:
        """Where each run begins among the new indices, and where the last one ends."""
        return list(accumulate((stop - start for start, stop in self.runs), initial=0))

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The map cut so that the copy number and the number of copies are constant in each segment, in new order.

        All copies of an old index lie in segments with the same `old` and `length`.
        """
        cuts = sorted({edge for run in self.runs for edge in run})
        pieces = [
            (start, stop)
            for run_start, run_stop in self.runs
            for start, stop in pairwise(cuts[bisect_left(cuts, run_start) : bisect_right(cuts, run_stop)])
        ]
        copies: dict[int, int] = {}
        for start, _ in pieces:
            copies[start] = copies.get(start, 0) + 1
        segments, seen, new = [], dict.fromkeys(copies, 0), 0
        for start, stop in pieces:
            segments.append(Segment(new, start, stop - start, seen[start], copies[start], start >= self.old_size))
            seen[start] += 1
            new += stop - start
        return tuple(segments)

    @property
    def is_complete(self) -> bool:
        """Whether every old index has at least one copy."""
        return sum(s.length for s in self.segments if s.copy == 0 and not s.fresh) == self.old_size


def _join(runs: Iterator[tuple[int, int]], old_size: int) -> tuple[tuple[int, int], ...]:
    """Join runs that go on where the last one ended, but for fresh indices behind old ones."""
    joined: list[tuple[int, int]] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start != old_size:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


@dataclass(frozen=True)
class AxisMaps:
    """What growth does to every axis.

    maps: One map for an axis that stands alone; for an axis nested in another (signal heads in their group), one map
        for each new index of the enclosing axis.
    unequal: Axes whose copies serve unequal shares of the old consumers. What writes such an axis has a gradient
        that is not `1/copies` of the old one, so its moments cannot be carried exactly (growth-math 3.1).
    """

    maps: Mapping[str, IndexMap | tuple[IndexMap, ...]]
    unequal: frozenset[str] = frozenset()

    def of(self, axis: str, outer: int | None) -> IndexMap:
        found = self.maps[axis]
        if isinstance(found, IndexMap):
            return found
        assert outer is not None, f"axis {axis} stands outside the axis it is nested in"
        return found[outer]


# A dimension's expression: an axis name, a fixed number, or ("product" | "sum", terms).
Expression = str | int | tuple[str, tuple["Expression", ...]]


@dataclass(frozen=True)
class Notation:
    """A parameter in arrow notation: one expression a dimension, and whether the layer reads or writes it."""

    text: str
    dims: tuple[Expression, ...]
    reads: tuple[bool, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape that axis sizes give."""
        return tuple(size_of(dim, sizes) for dim in self.dims)

    def axes(self, *, read: bool) -> frozenset[str]:
        """The names of the axes that the layer reads, or writes."""
        return frozenset(
            name for dim, reads in zip(self.dims, self.reads, strict=True) if reads == read for name in _names(dim)
        )

    def index_maps(self, maps: AxisMaps) -> tuple[IndexMap, ...]:
        """One composed map a dimension."""
        return tuple(_compose(dim, maps, None) for dim in self.dims)


@cache
def parse(text: str) -> Notation:
    """Read a parameter in arrow notation.

    Raises:
        GdagrowError: the text is not in the notation; the message repeats it.
    """
    if text.count("<-") + text.count("->") > 1:
        raise GdagrowError(f"notation {text!r}: expected one arrow at most")
    left, arrow, right = re.match(r"(.*?)(<-|->|$)(.*)", text).groups()  # type: ignore[union-attr]
    left_dims, right_dims = _parse_terms(left, text), _parse_terms(right, text)
    if arrow == "->":
        reads = (True,) * len(left_dims) + (False,) * len(right_dims)
    else:
        reads = (False,) * len(left_dims) + (True,) * len(right_dims)
    return Notation(text, left_dims + right_dims, reads)


def _parse_terms(side: str, text: str) -> tuple[Expression, ...]:
    tokens = re.findall(r"\w+|\S", side)
    stack: list[list[Expression]] = [[]]
    for token in tokens:
        if token == "(":
            stack.append([])
        elif token == ")" and len(stack) > 1:
            stack[-2].append(_group(stack.pop(), text))
        elif token == "+" or re.fullmatch(r"[a-z_]+", token):
            stack[-1].append(token)
        elif token.isdigit():
            stack[-1].append(int(token))
        else:
            raise GdagrowError(f"notation {text!r}: unexpected {token!r}")
    if len(stack) > 1 or "+" in stack[0]:
        raise GdagrowError(f"notation {text!r}: parentheses do not match, or a sum stands outside them")
    return tuple(stack[0])


def _group(terms: list[Expression], text: str) -> Expression:
    if not terms:
        raise GdagrowError(f"notation {text!r}: empty parentheses")
    if "+" not in terms:
        return ("product", tuple(terms))
    if len(terms) % 2 == 0 or any((term == "+") != (i % 2 == 1) for i, term in enumerate(terms)):
        raise GdagrowError(f"notation {text!r}: a sum is written (a + b), its products in parentheses of their own")
    return ("sum", tuple(terms[::2]))


def size_of(dim: Expression, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, str):
        return sizes[dim]
    if isinstance(dim, int):
        return dim
    kind, terms = dim
    parts = [size_of(term, sizes) for term in terms]
    return sum(parts) if kind == "sum" else prod(parts)


def _names(dim: Expression) -> Iterator[str]:
    if isinstance(dim, str):
        yield dim
    elif isinstance(dim, tuple):
        for term in dim[1]:
            yield from _names(term)


def _compose(dim: Expression, maps: AxisMaps, outer: int | None) -> IndexMap:
    if isinstance(dim, str):
        return maps.of(dim, outer)
    if isinstance(dim, int):
        return IndexMap.identity(dim)
    kind, terms = dim
    if kind == "sum":
        return _laid_end_to_end([_compose(term, maps, outer) for term in terms])
    if len(terms) == 1:
        return _compose(terms[0], maps, outer)
    head, rest = _compose(terms[0], maps, outer), ("product", terms[1:])
    if not any(isinstance(maps.maps[name], tuple) for name in _names(rest)):
        inner = _compose(rest, maps, outer)
        if inner.is_identity:
            size = inner.old_size
            return _joined(((a * size, b * size) for a, b in head.runs), head.old_size * size)
        inners = [inner] * head.size
    else:
        # A nested axis follows the index of the last axis before it, which a number between them is not.
        inners = [_compose(rest, maps, new if isinstance(terms[0], str) else outer) for new in range(head.size)]
    assert not any(inner.num_fresh for inner in inners), "an axis with fresh indices stands alone in its dimension"
    size = inners[0].old_size
    runs = ((old * size + a, old * size + b) for old, inner in zip(head, inners, strict=True) for a, b in inner.runs)
    return _joined(runs, head.old_size * size)


def _laid_end_to_end(parts: list[IndexMap]) -> IndexMap:
    runs, offset = [], 0
    for part in parts:
        assert not part.num_fresh, "an axis with fresh indices stands alone in its dimension"
        runs += [(a + offset, b + offset) for a, b in part.runs]
        offset += part.old_size
    return _joined(iter(runs), offset)


def _joined(runs: Iterator[tuple[int, int]], old_size: int) -> IndexMap:
    return IndexMap(_join(runs, old_size), old_size)
