"""The arrow notation, its shapes, and composed index maps against a slow computation by coordinates."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdagrow.axes import AxisMaps, Expression, IndexMap, Segment, parse
from gdagrow.coordinates import coordinates
from gdagrow.errors import GdagrowError
from tests.growths import RANDOM

SIZES = {"group": 2, "signal": 3, "kv": 1, "head_dim": 4, "hidden": 5, "ffn": 7, "vocab": 11}


@pytest.mark.parametrize(
    ("text", "shape", "reads"),
    [
        ("vocab -> hidden", (11, 5), (True, False)),
        ("(group (signal + 1) head_dim) <- hidden", (2 * 4 * 4, 5), (False, True)),
        ("(((group signal) + group) head_dim) <- hidden", ((2 * 3 + 2) * 4, 5), (False, True)),
        ("hidden <- (group signal 2 head_dim)", (5, 2 * 3 * 2 * 4), (False, True)),
        ("(kv 2 head_dim) <- hidden", (8, 5), (False, True)),
        ("hidden <-", (5,), (False,)),
        ("<- hidden", (5,), (True,)),
        ("-> hidden", (5,), (False,)),
        ("head_dim", (4,), (False,)),
        ("(2 head_dim)", (8,), (False,)),
        ("3", (3,), (False,)),
        ("((group kv) + 2 + ffn) <- 3", (2 + 2 + 7, 3), (False, True)),
    ],
)
def test_shapes_and_roles(text: str, shape: tuple[int, ...], reads: tuple[bool, ...]) -> None:
    notation = parse(text)
    assert notation.shape(SIZES) == shape
    assert notation.reads == reads


def test_coordinates_of_an_index() -> None:
    """Signal head 2 of group 1 and its noise head, in a sum inside a product and in a product inside a sum."""
    for text, signal, noise in (
        ("(group (signal + 1) head_dim)", 4 * (4 + 2) + 3, 4 * (4 + 3)),
        ("(((group signal) + group) head_dim)", 4 * 5 + 3, 4 * 7),
    ):  # fmt: skip
        (dim,) = parse(text).dims
        assert dict(coordinates(dim, SIZES, signal)) == {"group": 1, "signal": 2, "head_dim": 3}
        assert {axis: i for axis, i in coordinates(dim, SIZES, noise) if axis != "1"} == {"group": 1, "head_dim": 0}
    (values,) = parse("(kv 2 head_dim)").dims
    assert list(coordinates(values, SIZES, 6)) == [("kv", 0), ("2", 1), ("head_dim", 2)]


def test_axes_by_role() -> None:
    notation = parse("(group (signal + 1) head_dim) <- hidden")
    assert notation.axes(read=False) == {"group", "signal", "head_dim"}
    assert notation.axes(read=True) == {"hidden"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a <- b <- c", "expected one arrow at most"),
        ("a -> b <- c", "expected one arrow at most"),
        ("a * b", "unexpected '*'"),
        ("Hidden <-", "unexpected 'Hidden'"),
        ("head_dim2 <-", "unexpected 'head_dim2'"),
        ("a) <- b", "unexpected ')'"),
        ("a < b", "unexpected '<'"),
        ("(a <- b", "parentheses do not match, or a sum stands outside them"),
        ("a <- ((b)", "parentheses do not match, or a sum stands outside them"),
        ("a + b", "parentheses do not match, or a sum stands outside them"),
        ("(a +)", "a sum is written (a + b), its products in parentheses of their own"),
        ("(+ a)", "a sum is written (a + b), its products in parentheses of their own"),
        ("(a b + c)", "a sum is written (a + b), its products in parentheses of their own"),
        ("(a + b c)", "a sum is written (a + b), its products in parentheses of their own"),
        ("(a + + b)", "a sum is written (a + b), its products in parentheses of their own"),
        ("() <- hidden", "empty parentheses"),
    ],
)
def test_errors_repeat_the_notation(text: str, complaint: str) -> None:
    with pytest.raises(GdagrowError) as error:
        parse(text)
    assert str(error.value) == f"notation {text!r}: {complaint}"


def test_identity_and_tile() -> None:
    identity, tile = IndexMap.identity(3), IndexMap.tile(3, 2)
    assert (list(identity), identity.size, identity.is_identity, identity.is_complete) == ([0, 1, 2], 3, True, True)
    assert (list(tile), tile.size, tile.is_identity, tile.runs) == ([0, 1, 2, 0, 1, 2], 6, False, ((0, 3), (0, 3)))
    assert IndexMap.tile(3, 1) == identity
    assert not IndexMap.of([0, 1], 3).is_identity
    assert not IndexMap.of([0, 2, 2], 3).is_complete
    assert IndexMap.of([0, 1, 2, 0], 3).runs == ((0, 3), (0, 1))


def test_segments_of_a_worked_map() -> None:
    # 0 and 1 stand thrice and twice, 2 once: three ways to cut, in new order.
    assert IndexMap.of([0, 1, 2, 0, 1, 0], 3).segments == (
        Segment(new=0, old=0, length=1, copy=0, copies=3),
        Segment(new=1, old=1, length=1, copy=0, copies=2),
        Segment(new=2, old=2, length=1, copy=0, copies=1),
        Segment(new=3, old=0, length=1, copy=1, copies=3),
        Segment(new=4, old=1, length=1, copy=1, copies=2),
        Segment(new=5, old=0, length=1, copy=2, copies=3),
    )


LONGEST_MAP = 7


@st.composite
def index_maps(draw: st.DrawFn, old_size: int) -> IndexMap:
    return IndexMap.of(draw(st.lists(st.integers(0, old_size - 1), min_size=1, max_size=7)), old_size)


@settings(RANDOM)
@given(st.integers(1, 6).flatmap(index_maps))
def test_segments_number_the_copies(index_map: IndexMap) -> None:
    old_indices = list(index_map)
    covered = 0
    for s in index_map.segments:
        assert s.new == covered
        covered += s.length
        for offset in range(s.length):
            old = old_indices[s.new + offset]
            assert old == s.old + offset
            assert s.copies == old_indices.count(old)
            assert s.copy == old_indices[: s.new + offset].count(old)
    assert covered == index_map.size
    where = {(old, s.old, s.length) for s in index_map.segments for old in range(s.old, s.old + s.length)}
    assert len(where) == len({old for old, _, _ in where}), "copies of one index lie in segments cut differently"
    assert index_map.is_complete == (set(old_indices) == set(range(index_map.old_size)))


# Dimensions over the plain axes `a` and `b`, and `s`, which is nested in `g` and has a map for each new index of it.
LEAVES = st.sampled_from(
    [
        "a",
        "b",
        "1",
        "2",
        "3",
        "g",
        "(g s)",
        "(g (s + 1) a)",
        "(g s 2 b)",
        "(g 2 s)",
        "(g ((s 2) + a + s))",
        "(((g s) + g) a)",
        "(2 g a)",
    ]
)
DIMS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda terms: f"({' '.join(terms)})"),
        st.lists(inner, min_size=2, max_size=3).map(lambda terms: f"({' + '.join(terms)})"),
    ),
    max_leaves=3,
).filter(lambda text: parse(text).shape(dict.fromkeys("abgs", LONGEST_MAP)) < (5000,))


@st.composite
def axis_maps(draw: st.DrawFn) -> AxisMaps:
    plain = {axis: draw(st.integers(1, 3).flatmap(index_maps)) for axis in ("a", "b", "g")}
    signals = draw(st.integers(1, 3))
    return AxisMaps({**plain, "s": tuple(draw(index_maps(signals)) for _ in range(plain["g"].size))})


Coordinate = tuple[tuple[str, int], ...]


def old_coordinates(dim: Expression, sizes: Mapping[str, int]) -> Iterator[Coordinate]:
    """Every element of an old dimension in storage order, by its index along each axis on the way to it."""
    if isinstance(dim, str | int):
        yield from (((str(dim), i),) for i in range(dim if isinstance(dim, int) else sizes[dim]))
        return
    kind, terms = dim
    if kind == "sum":
        for block, term in enumerate(terms):
            yield from ((("+", block), *rest) for rest in old_coordinates(term, sizes))
    elif not terms:
        yield ()
    else:
        for first in old_coordinates(terms[0], sizes):
            yield from (first + rest for rest in old_coordinates((kind, terms[1:]), sizes))


def grown_coordinates(dim: Expression, maps: AxisMaps, group: int | None) -> Iterator[tuple[Coordinate, int | None]]:
    """For every element of a new dimension, the coordinates of the old one it copies, and the new group it is in."""
    if isinstance(dim, int):
        yield from ((((str(dim), i),), group) for i in range(dim))
    elif isinstance(dim, str):
        found = maps.maps[dim]
        if not isinstance(found, IndexMap):
            assert group is not None
            found = found[group]
        yield from ((((dim, old),), new if dim == "g" else group) for new, old in enumerate(found))
    elif dim[0] == "sum":
        for block, term in enumerate(dim[1]):
            yield from (((("+", block), *rest), group) for rest, _ in grown_coordinates(term, maps, group))
    elif not dim[1]:
        yield (), group
    else:
        for first, inside in grown_coordinates(dim[1][0], maps, group):
            yield from ((first + rest, i) for rest, i in grown_coordinates(("product", dim[1][1:]), maps, inside))


@settings(RANDOM, max_examples=300)
@given(DIMS, axis_maps())
def test_composed_maps_are_those_of_the_coordinates(text: str, maps: AxisMaps) -> None:
    (dim,) = parse(text).dims
    sizes = {axis: (m if isinstance(m, IndexMap) else m[0]).old_size for axis, m in maps.maps.items()}
    position = {coordinate: i for i, coordinate in enumerate(old_coordinates(dim, sizes))}
    expected = [position[coordinate] for coordinate, _ in grown_coordinates(dim, maps, None)]
    (composed,) = parse(text).index_maps(maps)
    assert list(composed) == expected
    assert composed.size == len(expected)
    assert (composed.old_size,) == parse(text).shape(sizes) == (len(position),)
    assert all(a[1] != b[0] for a, b in pairwise(composed.runs)), f"runs that meet are not joined: {composed.runs}"


def test_each_dimension_has_its_own_map() -> None:
    maps = AxisMaps({"a": IndexMap.tile(2, 2), "b": IndexMap.of([1, 0, 0], 2)})
    rows, columns = parse("(a 3) <- b").index_maps(maps)
    assert list(rows) == [0, 1, 2, 3, 4, 5] * 2
    assert list(columns) == [1, 0, 0]
    assert prod(parse("(a 3) <- b").shape({"a": 2, "b": 2})) == 12
