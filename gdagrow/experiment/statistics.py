"""Differences between arms, paired by seed, with the honest width of what a few seeds say."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gdagrow.experiment.results import Comparison, Results

LEVEL: Final = 0.05  # two-sided; intervals are those of 1 - LEVEL
POWER: Final = 0.8
# Up to so many seeds every one of the n**n resamples is looked at; beyond, `_DRAWN` of them with a fixed seed.
_MOST_LISTED: Final = 6
_DRAWN: Final = 9999
_QUANTILES: Final = 20_000

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """An arm's held-out loss minus the reference's, over the seeds that both have.

    Args:
        seeds, values: The seeds, and the difference of each, in nats per byte.
        mean, sd: Of the values; None where there are too few (one for a mean, two for a deviation).
        student: Interval of the mean by Student's t with n - 1 degrees of freedom; None for fewer than two seeds. It
            takes the differences to be normal, and it is what decides (through `p`).
        bootstrap: Percentile bootstrap interval of the mean; None for fewer than two seeds. It takes nothing to be
            normal, but over 5 seeds it is too narrow: the spread of resampled means is that of the sample without the
            factor n / (n - 1), and percentiles have no factor for so few degrees of freedom, so it holds the true mean
            in about 85% of normal samples rather than 95%.
        p: Of the two-sided paired t test; None for fewer than two seeds.
        adjusted_p: After Holm's correction for all the arms of the comparison, those without a `p` counted as 1, so
            that a result of some of the runs claims no more than one of all of them.
    """

    arm: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float | None
    sd: float | None
    student: Interval | None
    bootstrap: Interval | None
    p: float | None
    adjusted_p: float

    @property
    def resolved(self) -> bool:
        """Whether the difference is told from none: the adjusted p of the t test is below `LEVEL`."""
        return self.adjusted_p < LEVEL

    @property
    def verdict(self) -> str:
        """`lower`, `higher`, `not resolved`, or `too few seeds` for a test."""
        if self.mean is None or self.p is None:
            return "too few seeds"
        if not self.resolved:
            return "not resolved"
        return "lower" if self.mean < 0 else "higher"


def differences(results: Results, comparison: Comparison) -> tuple[Difference, ...]:
    """Every arm of a comparison against its reference, in the comparison's order; `len` of it tests are made."""
    reference = {run.seed: run.loss for run in results.runs_of(comparison.reference)}
    found = []
    for arm in comparison.arms:
        pairs = [(run.seed, run.loss - reference[run.seed]) for run in results.runs_of(arm) if run.seed in reference]
        found.append((arm, tuple(seed for seed, _ in pairs), tuple(value for _, value in pairs)))
    ps = [p_value(values) for *_, values in found]
    return tuple(
        Difference(arm, seeds, values, mean(values), deviation(values), student(values), bootstrap(values), p, adjusted)
        for (arm, seeds, values), p, adjusted in zip(found, ps, holm(ps), strict=True)
    )


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation with n - 1; None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def student(values: Sequence[float]) -> Interval | None:
    """Student's t interval of the mean; None for fewer than two values."""
    from scipy import stats

    center, sd = mean(values), deviation(values)
    if center is None or sd is None:
        return None
    half = float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1)) * sd / math.sqrt(len(values))
    return center - half, center + half


def bootstrap(values: Sequence[float]) -> Interval | None:
    """Percentile bootstrap interval of the mean; None for fewer than two values.

    Up to six values, from all n**n resamples, which needs no random numbers; beyond, scipy's with a fixed seed.
    """
    from scipy import stats

    if len(values) < 2:
        return None
    if len(values) <= _MOST_LISTED:
        means = np.array(list(itertools.product(values, repeat=len(values)))).mean(axis=1)
        low, high = np.percentile(means, [100 * LEVEL / 2, 100 * (1 - LEVEL / 2)])
    else:
        low, high = stats.bootstrap(
            (np.array(values),), np.mean, confidence_level=1 - LEVEL, n_resamples=_DRAWN, method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
    return float(low), float(high)


def p_value(values: Sequence[float]) -> float | None:
    """Of the two-sided t test that the mean is zero; None for fewer than two values."""
    from scipy import stats

    center, sd = mean(values), deviation(values)
    if center is None or sd is None:
        return None
    if sd == 0:
        return 1.0 if center == 0 else 0.0
    return float(2 * stats.t.sf(abs(center) / sd * math.sqrt(len(values)), len(values) - 1))


def holm(ps: Sequence[float | None]) -> tuple[float, ...]:
    """Holm's step-down adjustment of p values (Scandinavian Journal of Statistics 6, 1979); None counts as 1."""
    filled = [1.0 if p is None else p for p in ps]
    adjusted, largest = [1.0] * len(filled), 0.0
    for rank, index in enumerate(sorted(range(len(filled)), key=filled.__getitem__)):
        largest = max(largest, min(1.0, (len(filled) - rank) * filled[index]))
        adjusted[index] = largest
    return tuple(adjusted)


def detectable(sd: float, seeds: int, power: float = POWER, comparisons: int = 1) -> float:
    """The smallest true paired difference that a two-sided 5% t test sees with this power, by the noncentral t.

    Args:
        sd: Standard deviation of the paired differences.
        seeds: Pairs, at least two.
        power: Share of experiments that would see it.
        comparisons: Tests made together; Holm's first step then asks 5% divided by their number of the one in question.
    """
    from scipy import optimize, special, stats

    critical = float(stats.t.ppf(1 - LEVEL / comparisons / 2, seeds - 1))
    # T is (Z + shift) / S with S the root of a chi-squared over its degrees of freedom: an average over the quantiles
    # of S, because scipy's own noncentral t answers NaN where few degrees of freedom meet a large shift.
    quantiles = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    scales = np.sqrt(stats.chi2.ppf(quantiles, seeds - 1) / (seeds - 1))

    def missing(shift: float) -> float:
        seen = special.ndtr(shift - critical * scales) + special.ndtr(-shift - critical * scales)
        return power - float(np.mean(seen))

    shift = float(optimize.brentq(missing, 0.0, 4 * critical + 10))  # at the upper end all but 1e-4 are seen
    return sd * shift / math.sqrt(seeds)
