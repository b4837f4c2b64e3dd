"""Where an index of a dimension stands on the named axes that make it up."""

from collections.abc import Iterator, Mapping
from math import prod

from gdagrow.axes import Expression, IndexMap, size_of


def coordinates(dim: Expression, sizes: Mapping[str, int], index: int) -> Iterator[tuple[str, int]]:
    """Yield where an index of a dimension stands on each axis that it has; a number counts as an axis of that name.

    The noise head of group 1 in `(group (signal + 1) head_dim)` is `group` 1 and has no `signal`.
    """
    if isinstance(dim, str):
        yield dim, index
    elif isinstance(dim, int):
        yield str(dim), index
    elif dim[0] == "product":
        for i, term in enumerate(dim[1]):
            outer, index = divmod(index, prod(size_of(rest, sizes) for rest in dim[1][i + 1 :]))
            yield from coordinates(term, sizes, outer)
    else:
        for term in dim[1]:
            if index < (size := size_of(term, sizes)):
                yield from coordinates(term, sizes, index)
                return
            index -= size


def reordering(old: Expression, new: Expression, sizes: Mapping[str, int]) -> IndexMap:
    """The map `new -> old` between two dimensions that hold the same coordinates in different orders.

    A 1 has no coordinate: `((group signal) + group)` and `(group (signal + 1))` hold the same heads.
    """
    at = {_place(old, sizes, index): index for index in range(size_of(old, sizes))}
    found = IndexMap.of([at[_place(new, sizes, index)] for index in range(size_of(new, sizes))], len(at))
    assert len(at) == size_of(old, sizes) == found.size, f"{old} and {new} are no orders of the same coordinates"
    return found


def _place(dim: Expression, sizes: Mapping[str, int], index: int) -> frozenset[tuple[str, int]]:
    return frozenset((axis, i) for axis, i in coordinates(dim, sizes, index) if axis != "1")
