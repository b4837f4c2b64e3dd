"""The repair of a layer whose index changes: what it computes, and that it is the same bits everywhere."""

from math import exp, fsum, inf, isclose, nan, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdagrow.lambda_init import lambda_init, moved, moved_norm
from tests.growths import RANDOM

EPS = 2.0**-52


def dot(one: list[float], other: list[float]) -> float:
    return fsum(a * b for a, b in zip(one, other, strict=True))


def length(vector: list[float]) -> float:
    return sqrt(dot(vector, vector))


VECTORS = st.integers(1, 16).flatmap(
    lambda size: st.tuples(*[st.lists(st.floats(-4, 4, allow_subnormal=False), min_size=size, max_size=size)] * 2)
)


@settings(RANDOM, max_examples=200)
@given(VECTORS, st.integers(0, 60), st.integers(1, 3), st.sampled_from([1.0, 1e-3, 1e-9]))
def test_lambda_stays_what_it_was(vectors: tuple[list[float], list[float]], new: int, up: int, scale: float) -> None:
    query, key = [scale * value for value in vectors[0]], vectors[1]
    old = new + up
    for q, k in ((query, key), (key, query)):
        moved_q, moved_k = moved(q, k, old, new)
        # The vectors are rounded once each, and lambda_init is subtracted from itself with a rounding on either side.
        rounding = 4 * EPS * (1 + fsum(abs(a * b) for a, b in zip(moved_q, moved_k, strict=True)))
        was, now = exp(dot(q, k)) + lambda_init(old), exp(dot(moved_q, moved_k)) + lambda_init(new)
        assert abs(now - was) <= rounding * max(1.0, was)


def test_the_shorter_vector_is_changed_along_the_longer() -> None:
    short, long = [0.1, -0.2, 0.05], [1.0, 2.0, -3.0]
    q, k = moved(short, long, 5, 4)
    assert k == long
    change = [a - b for a, b in zip(q, short, strict=True)]
    assert isclose(dot(change, long), length(change) * length(long), rel_tol=1e-14), "not along it"
    assert moved(long, short, 5, 4) == (long, q)


def test_vectors_of_nothing() -> None:
    gain = sqrt(dot(*moved([0.0, 0.0], [0.0, 0.0], 1, 0)))
    assert moved([0.0, 0.0], [0.0, 0.0], 1, 0) == ([gain, 0.0], [gain, 0.0])
    assert isclose(gain**2, 0.19055034438541132, rel_tol=1e-14), "ln(1 + lambda_init(1) - lambda_init(0))"
    assert moved([5e-324], [1e-200], 1, 0) == ([gain], [gain])
    assert moved([0.0, 0.0], [0.0, 2.0], 1, 0) == ([0.0, gain**2 / 2], [0.0, 2.0])


@pytest.mark.parametrize("query", [[nan, 1.0], [inf, 1.0]], ids=str)
def test_what_is_not_finite_is_passed_on(query: list[float]) -> None:
    assert repr(moved(query, [1.0, 2.0], 1, 0)) == repr((query, [1.0, 2.0]))


def test_exponentials_beyond_float64() -> None:
    assert moved([1e3], [1e3], 1, 0) == ([1e3], [1e3]), "lambda is infinite, whatever is added to it"
    q, k = moved([-1e10], [1e10], 1, 0)
    # `exp(q . k)` is 0 and has to become the difference of two lambda_init.
    assert k == [1e10]
    assert isclose(exp(q[0] * k[0]), lambda_init(1) - lambda_init(0), rel_tol=1e-14)


def test_the_bits_are_pinned() -> None:
    """Against mpmath with 80 digits; a certificate may be checked on another machine than the growth was made on."""
    assert moved_norm(1, 0).hex() == "0x1.95941d5ce8ab5p-1"
    assert moved_norm(7, 7) == 1.0
    q, k = moved([0.5, -0.25], [0.125, 2.0], 3, 2)
    assert [value.hex() for value in q] == ["0x1.029de1bc84dacp-1", "-0x1.588790dec950dp-3"]
    assert k == [0.125, 2.0]


@pytest.mark.parametrize("index", range(0, 80, 7))
def test_the_norm_takes_up_the_factor(index: int) -> None:
    kept = moved_norm(index + 1, index) * (1 - lambda_init(index))
    assert isclose(kept, 1 - lambda_init(index + 1), rel_tol=3 * EPS / 0.2)
