"""Splits of random bit patterns: the parts of a weight sum to it bit for bit, with and without noise."""

from fractions import Fraction
from itertools import combinations
from math import sqrt, ulp

import pytest
import torch
from torch import Tensor

from gdagrow.split import Noise, num_draws, split

# Significant bits, the smallest subnormal, and the integer dtype of the same width.
DTYPES = {
    torch.float64: (53, 2.0**-1074, torch.int64),
    torch.float32: (24, 2.0**-149, torch.int32),
    torch.bfloat16: (8, 2.0**-133, torch.int16),
    torch.float16: (11, 2.0**-24, torch.int16),
}
COPIES = (2, 3, 4, 5, 6, 7, 8, 9, 12, 16)
AMPLITUDES = (0.0, 0.001, 0.01, 0.1)
NUM_WEIGHTS = 20_000


def random_bits(dtype: torch.dtype, num: int, seed: int) -> Tensor:
    """Uniform bit patterns, so infinities and NaN among them, after every kind of extreme value with both signs."""
    info, (bits, smallest, integer) = torch.finfo(dtype), DTYPES[dtype]
    largest_subnormal = info.smallest_normal - smallest
    extremes = [0.0, smallest, 2 * smallest, 3 * smallest, 7 * smallest, largest_subnormal, info.smallest_normal, 1.0,
                1.0 + info.eps, 2.0 - info.eps, info.max, info.max * 2.0**-bits, torch.inf, torch.nan]  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    limits = torch.iinfo(integer)
    drawn = torch.randint(limits.min, limits.max, (num,), dtype=integer, generator=generator).view(dtype)
    # Uniform bit patterns of float64 are hardly ever subnormal.
    subnormal = (torch.randint(0, 2 ** min(bits - 1, 52), (num // 20,), generator=generator) * smallest).to(dtype)
    special = torch.tensor(extremes, dtype=torch.float64).to(dtype)
    return torch.cat([special, -special, drawn, subnormal])


def words_for(weight: Tensor, copies: int, seed: int) -> Tensor:
    words = torch.empty((num_draws(copies), *weight.shape), dtype=torch.int32)
    return words.random_(-(2**31), 2**31 - 1, generator=torch.Generator().manual_seed(seed))


def split_in(weight: Tensor, copies: int, amplitude: float, seed: int = 1) -> Tensor:
    """The parts `[copies, ...]`, with noise unless `amplitude` is 0."""
    parts = torch.full((copies, *weight.shape), 99.0, dtype=weight.dtype)
    words = words_for(weight, copies, seed).unbind() if amplitude else ()
    split(weight, parts.unbind(), words=words, amplitude=amplitude)
    return parts


def sums_to(weight: Tensor, parts: Tensor) -> bool:
    """Whether the parts `[copies, num]` sum to the weights `[num]` with no rounding.

    In float64 for the smaller dtypes: parts of `w` are multiples of `ulp(w) / 2**4`, and partial sums are at most
    `3 * |w|`, so at most `24 + 4 + 2` bits are ever needed. As fractions for float64 itself.
    """
    if parts.dtype != torch.float64:
        return torch.equal(parts.double().sum(0), weight.double())
    sums = [sum(map(Fraction, column), start=Fraction(0)) for column in parts.T.tolist()]
    return sums == [Fraction(w) for w in weight.tolist()]


def unit_of(weight: Tensor, copies: int) -> Tensor:
    """The grid of the parts in float64: `ulp(w) / 2**floor(log2(copies))`, at least the smallest subnormal."""
    bits, smallest, _ = DTYPES[weight.dtype]
    values = weight.double().abs().tolist()
    spare = 2 ** (copies.bit_length() - 1)
    units = [max(max(ulp(v) * 2.0 ** (53 - bits), smallest) / spare, smallest) for v in values]
    return torch.tensor(units, dtype=torch.float64)


@pytest.mark.parametrize("amplitude", AMPLITUDES)
@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_sum_to_the_weight(dtype: torch.dtype, copies: int, amplitude: float) -> None:
    weight = random_bits(dtype, 2_000 if dtype == torch.float64 else NUM_WEIGHTS, seed=copies)
    finite = weight.isfinite()
    assert 0 < int((~finite).sum()) < len(weight) / 10
    # Beside infinities and NaN in the same call, and without any.
    for values in (weight, weight[finite]):
        parts, known = split_in(values, copies, amplitude), values.isfinite()
        assert sums_to(values[known], parts[:, known])
        for part in parts:
            assert torch.equal(part[~known].nan_to_num(nan=7.0), values[~known].nan_to_num(nan=7.0))


@pytest.mark.parametrize("amplitude", [0.0, 0.01])
@pytest.mark.parametrize("copies", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_bit_pattern_of_16_bits(dtype: torch.dtype, copies: int, amplitude: float) -> None:
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = weight.isfinite()
    # All exponents but the highest; with the sign, 2 * 2**8 and 2 * 2**5 of those, and the mantissas.
    assert int(finite.sum()) == {torch.bfloat16: 2**16 - 2 * 2**7, torch.float16: 2**16 - 2 * 2**10}[dtype]
    parts = split_in(weight, copies, amplitude)
    assert torch.equal(parts[:, finite].double().sum(0), weight[finite].double())
    alone = split_in(weight[finite], copies, amplitude)
    assert torch.equal(alone.double().sum(0), weight[finite].double())
    assert bool(parts[:, weight.isnan()].isnan().all())
    assert bool((parts[:, weight.isinf()] == weight[weight.isinf()]).all())


@pytest.mark.parametrize("amplitude", AMPLITUDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_keep_their_sign(dtype: torch.dtype, amplitude: float) -> None:
    zeros = torch.zeros(200_000, dtype=dtype)  # as some words give a draw of -0.0: one in 2**17
    for copies in (2, 3, 4, 7):
        assert not split_in(zeros, copies, amplitude).signbit().any(), copies
        parts = split_in(-zeros, copies, amplitude)
        assert bool(parts.signbit().all()), copies
        assert not parts.any()


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_parts_differ_by_one_unit_at_most(dtype: torch.dtype, copies: int) -> None:
    weight = random_bits(dtype, 2_000, seed=copies)
    weight = weight[weight.isfinite()]
    parts = split_in(weight, copies, 0.0)
    spread = parts.double().amax(0) - parts.double().amin(0)  # exact: both lie on the same grid, one unit apart
    assert bool((spread <= unit_of(weight, copies)).all())
    if copies & (copies - 1) == 0:
        assert bool((spread[weight.abs() >= torch.finfo(dtype).smallest_normal * copies] == 0).all())


def mantissas(dtype: torch.dtype, num: int) -> Tensor:
    """Weights of both signs within four binades around 1, so that none is subnormal."""
    return (torch.exp2(torch.rand(num, generator=torch.Generator().manual_seed(5)) * 4 - 2)).to(dtype) * torch.where(
        torch.arange(num) % 2 == 0, 1, -1
    ).to(dtype)


@pytest.mark.parametrize("snr_db", [20.0, 40.0, 60.0])
@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noise_has_the_power_asked_for(dtype: torch.dtype, copies: int, snr_db: float) -> None:
    num, amplitude = 40_000, Noise(snr_db, 0).amplitude
    assert amplitude == pytest.approx(10 ** (-snr_db / 20), rel=1e-15)
    weight = mantissas(dtype, num)
    share = weight.double() / copies
    parts = split_in(weight, copies, amplitude).double()
    # Rounding a draw to a whole unit at random adds a variance of at most 1/4 unit^2, twice where two draws are
    # subtracted, and the odd units of a weight that does not divide shift a part by less than one unit.
    units = unit_of(weight, copies) / share.abs()
    rounding = (0.25 if copies == 2 else 0.5) + (1.0 if copies & (copies - 1) else 0.0)
    added = rounding * float((units**2).mean())
    # A draw is cut where a part would need one bit more than its dtype has, which takes at most all of its power: that
    # can only be where the largest draw carries the part over the top of its grid.
    reach = amplitude * (sqrt(3) if copies == 2 else 2 * sqrt(1.5))
    top = 2.0 ** DTYPES[dtype][0] - 2
    cut = float((1 / units * (1 + reach) + 2 >= top).double().mean())
    # Relative standard error of a mean square: sqrt((kurtosis - 1) / n), with a kurtosis of at most 3; five of them.
    error = 5 * sqrt(2 / num)
    for part in parts:
        power = float((((part - share) / share) ** 2).mean()) / amplitude**2
        assert 1 - cut - error < power < 1 + error + added / amplitude**2


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_noise_has_no_mean(dtype: torch.dtype, copies: int) -> None:
    weight, amplitude = mantissas(dtype, 40_000), 0.01
    offset = split_in(weight, copies, amplitude).double() - split_in(weight, copies, 0.0).double()
    relative = offset / weight.double() * copies
    for copy in relative:
        assert abs(float(copy.mean())) < 5 * float(copy.std()) / sqrt(len(copy))
        # Odd symmetry in the weight's sign: no bias away from zero either.
        signed = copy * weight.double().sign()
        assert abs(float(signed.mean())) < 5 * float(signed.std()) / sqrt(len(copy))


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_parts_the_copies(dtype: torch.dtype, copies: int) -> None:
    """Two copies of a weight agree only where their draws round to the same unit, or where there is no room."""
    num, amplitude = 40_000, 0.01
    weight = mantissas(dtype, num)
    parts = split_in(weight, copies, amplitude)
    # A share has at least 2**(p - 2) units, so a draw reaches over `reach` of them on either side. One of two copies
    # gets the draw and the other its negative: they agree at a draw of 0, of probability 1/(2*reach) at most. Of more
    # copies, differences of draws agree no likelier than a single draw hits one value. A draw is cut to nothing in the
    # last units of the grid, fewer than `reach` of `2**(p - 1)`: amplitude * sqrt(3) * 2, and the log-uniform
    # mantissas put at most as many weights there as uniform ones.
    reach = 2 ** (DTYPES[dtype][0] - (1 if copies & (copies - 1) == 0 else 2)) * amplitude
    reach *= sqrt(3) if copies == 2 else sqrt(1.5)
    at_most = min(1.0, 1 / (2 * reach)) + 2 * amplitude * sqrt(3) + 5 * sqrt(0.25 / num)
    for one, other in combinations(parts, 2):
        assert float((one == other).double().mean()) < at_most


def test_number_of_draws() -> None:
    assert [num_draws(copies) for copies in (1, 2, 3, 4, 7)] == [0, 1, 3, 4, 7]


@pytest.mark.parametrize("copies", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_share_depends_on_its_weight_and_words_alone(dtype: torch.dtype, copies: int) -> None:
    """Splitting a slice gives the slice of the split, whatever subnormal or infinite weights the rest holds."""
    weight = random_bits(dtype, 4_000, seed=3)
    words = words_for(weight, copies, seed=8)
    whole = torch.empty((copies, len(weight)), dtype=dtype)
    split(weight, whole.unbind(), words=words.unbind(), amplitude=0.01)
    normal = (weight.abs() >= torch.finfo(dtype).smallest_normal * copies) & weight.isfinite()
    for at in (slice(0, 14), slice(28, 1000), slice(2000, 2001), normal, ~normal):
        part = torch.empty_like(whole[:, at])
        split(weight[at], part.unbind(), words=words[:, at].unbind(), amplitude=0.01)
        # A NaN stays one, its other bits are the processor's.
        got, expected = (t.nan_to_num(nan=7.0, posinf=torch.inf, neginf=-torch.inf) for t in (part, whole[:, at]))
        assert torch.equal(got.view(DTYPES[dtype][2]), expected.view(DTYPES[dtype][2]))
