"""lambda_init, the part of lambda that depends on the layer's index, and the repair of a layer whose index changes.

A layer computes `subln(signal - lambda * noise) * (1 - lambda_init)` with `lambda = exp(q1 . k1) - exp(q2 . k2) +
lambda_init`. In another place it does the same if its sub-norm takes up the change of the factor and one exponential
the change of the sum (growth-math 3.8).

The repair is made in decimal arithmetic and rounded once, so that it is the same bits on every machine, which a
certificate can hold a checkpoint against.
"""

from collections.abc import Sequence
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from math import exp, isfinite

# Float64 has 17 digits; sums of products of its numbers lose few of the rest.
_ARITHMETIC = Context(prec=60, Emax=MAX_EMAX, Emin=MIN_EMIN)
# A squared length of which float64 shows nothing beside the change that is made.
_NOTHING = Decimal("1e-32")


def lambda_init(layer_index: int) -> float:
    """The constant part of lambda in layer `layer_index` (0-based, so layer 0 gives -0.0099; Motif's own counting)."""
    return 0.8 - 0.6 * exp(-0.3 * (layer_index - 1))


def moved_norm(old: int, new: int) -> float:
    """What to multiply the sub-norm's weight by when a layer goes from index `old` to index `new`."""
    with localcontext(_ARITHMETIC):
        return float((1 - _lambda_init(old)) / (1 - _lambda_init(new)))


def vectors_that_move(old: int, new: int) -> tuple[str, str]:
    """Which two vectors take up the change of a layer's index, `lambda_q1` and `lambda_k1` or the others.

    lambda_init grows with the index. Where it becomes less, the exponential that is added grows; where it becomes more,
    the one that is taken off: a logarithm of what grows exists, whatever the vectors are.
    """
    return ("lambda_q1", "lambda_k1") if new < old else ("lambda_q2", "lambda_k2")


def moved(query: Sequence[float], key: Sequence[float], old: int, new: int) -> tuple[list[float], list[float]]:
    """The vectors `vectors_that_move(old, new)` of a layer that goes from index `old` to index `new`.

    `exp(query . key)` grows by the difference that this makes to lambda_init. The shorter vector is changed along the
    longer one, which is the smallest change of either that has the effect; where both are next to nothing, their first
    components are set instead.

    Args:
        query, key: `[head_dim]`; where they are not finite, they come back as they are.

    Returns:
        Both in float64.
    """
    assert new != old, f"layer {old} stays where it is"
    if not all(map(isfinite, (*query, *key))):
        return list(query), list(key)
    with localcontext(_ARITHMETIC):
        q, k = ([Decimal(value) for value in vector] for vector in (query, key))
        now = sum((a * b for a, b in zip(q, k, strict=True)), start=Decimal())
        change = _log_of_sum(now, abs(_lambda_init(old) - _lambda_init(new))) - now
        q_long, k_long = (sum((value * value for value in vector), start=Decimal()) for vector in (q, k))
        if max(q_long, k_long) < _NOTHING:
            q[0] = k[0] = change.sqrt()
        elif k_long >= q_long:
            q = [a + b * change / k_long for a, b in zip(q, k, strict=True)]
        else:
            k = [b + a * change / q_long for a, b in zip(q, k, strict=True)]
        return [float(value) for value in q], [float(value) for value in k]


def _lambda_init(index: int) -> Decimal:
    return Decimal("0.8") - Decimal("0.6") * (Decimal("-0.3") * (index - 1)).exp()


def _log_of_sum(log: Decimal, more: Decimal) -> Decimal:
    """`ln(exp(log) + more)` for `more` in [0, 1)."""
    # Beyond, what is added is less than float64 shows; and an exponential of millions takes long.
    if log > 100:
        return log
    return more.ln() if log < -10_000 and more else (log.exp() + more).ln()
