"""The noise: right law and scale, wrong scales rejected, independent streams, a grid for the low bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtri

from privfed.errors import ConfigError, SentinelError
from privfed.privacy.noise import (
    GRID_BITS,
    NOISE_DESCRIPTION,
    TAIL,
    gaussian_noise,
    grid,
    privatise_sum,
)
from privfed.rng import PrivateStream

COUNT = 200_000
KEY = bytes(range(32))  # fixed, so that the statistical tests give one answer for ever


def stream(*names):
    return PrivateStream(KEY, "test", *names)


def scale_is_plausible(draws, sigma, significance=1e-6):
    """Two-sided chi-square test of the variance, mean known to be 0."""
    statistic = float(np.sum((draws / sigma) ** 2))
    law = stats.chi2(len(draws))
    return min(law.cdf(statistic), law.sf(statistic)) > significance / 2


@pytest.mark.parametrize("sigma", [1e-3, 1.0, 37.5])
def test_scale(sigma):
    draws = gaussian_noise(stream("scale", sigma), COUNT, sigma)
    assert scale_is_plausible(draws, sigma)
    for wrong in (2 / 3, 3 / 2, 0.98, 1.02):
        assert not scale_is_plausible(draws, sigma * wrong)
    assert abs(draws.mean()) < 5 * sigma / math.sqrt(COUNT)


def test_normality_in_the_body_and_the_tails():
    draws = gaussian_noise(stream("law"), COUNT, 1.0)
    assert stats.kstest(draws, "norm").pvalue > 1e-6
    edges = stats.norm.ppf(np.linspace(0, 1, 101))
    counts, _ = np.histogram(draws, edges)
    assert stats.chisquare(counts).pvalue > 1e-6
    for z in (3.0, 4.0):
        for side in (draws > z, draws < -z):
            expected = COUNT * stats.norm.sf(z)
            assert abs(side.sum() - expected) < 5 * math.sqrt(expected)


def test_streams_are_repeatable_and_independent():
    first = gaussian_noise(stream("round", 1), COUNT, 1.0)
    assert np.array_equal(first, gaussian_noise(stream("round", 1), COUNT, 1.0))
    for other in (stream("round", 2), PrivateStream(bytes(32), "test", "round", 1)):
        draws = gaussian_noise(other, COUNT, 1.0)
        assert abs(np.corrcoef(first, draws)[0, 1]) < 5 / math.sqrt(COUNT)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / math.sqrt(COUNT)
    one = stream("round", 1)
    gaussian_noise(one, COUNT, 1.0)
    assert not np.array_equal(first, gaussian_noise(one, COUNT, 1.0))  # a stream moves on
    assert abs(np.corrcoef(np.abs(first), np.sign(first))[0, 1]) < 5 / math.sqrt(COUNT)


class Words:
    """A stream of chosen words, to reach the ends of the range."""

    def __init__(self, *words):
        self._raw = np.array(words, dtype=np.uint64).tobytes()

    def bytes(self, count):
        assert count == len(self._raw)
        return self._raw


def test_the_ends_of_the_range():
    ones = 2**64 - 1
    sign_set, sign_clear = gaussian_noise(Words(1, 0, 0, 0), 2, 1.0)
    assert sign_set == -sign_clear == ndtri(2.0**-108)
    assert 11.9 < sign_clear < TAIL
    middle = gaussian_noise(Words(ones, ones), 1, 1.0)
    assert abs(middle[0]) < 1e-15
    assert gaussian_noise(stream("none"), 0, 1.0).shape == (0,)


@pytest.mark.parametrize("sigma", [1e-8, 0.3, 1.0, 1.5, 2.0, 12345.6])
def test_released_values_lie_on_the_grid(sigma):
    step = grid(sigma)
    assert math.frexp(step)[0] == 0.5  # a power of two
    assert sigma * 2.0 ** -(GRID_BITS + 1) < step <= sigma * 2.0**-GRID_BITS
    sum_D = np.linspace(-5, 5, 1001) * sigma
    released = privatise_sum(sum_D, standard_deviation=sigma, stream=stream("grid"), sensitivity=sigma)
    assert np.array_equal(released / step, np.rint(released / step))
    noise = gaussian_noise(stream("grid"), sum_D.size, sigma)
    assert np.abs(released - (sum_D + noise)).max() <= step * 0.500001
    assert str(GRID_BITS) in NOISE_DESCRIPTION


def test_low_bits_of_the_input_do_not_show():
    outputs = []
    for value in (0.0, 1 / 3):
        sum_D = np.full(1000, value)
        released = privatise_sum(sum_D, standard_deviation=1.0, stream=stream("low", value), sensitivity=1.0)
        mantissa = released / grid(1.0)
        assert np.array_equal(mantissa, np.rint(mantissa))
        assert not np.any(np.signbit(released) & (released == 0))
        outputs.append(released)
    assert outputs[0].std() == pytest.approx(outputs[1].std(), rel=0.15)


def test_privatise_keeps_shape_and_input():
    sum_D = np.zeros((3, 4))
    released = privatise_sum(sum_D, standard_deviation=2.0, stream=stream("shape"), sensitivity=1.0)
    assert released.shape == (3, 4) and released.dtype == np.float64
    assert not sum_D.any()
    draws = privatise_sum(np.zeros(COUNT), standard_deviation=2.0, stream=stream("sum"), sensitivity=1.0)
    assert scale_is_plausible(draws, 2.0)


def test_refusals():
    for sigma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="standard deviation"):
            gaussian_noise(stream(), 1, sigma)
    with pytest.raises(ConfigError, match="at least 0"):
        gaussian_noise(stream(), -1, 1.0)
    zeros = np.zeros(2)
    for sensitivity in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="sensitivity"):
            privatise_sum(zeros, standard_deviation=1.0, stream=stream(), sensitivity=sensitivity)
    for value in (math.nan, math.inf):
        with pytest.raises(SentinelError, match="not finite"):
            privatise_sum(zeros + value, standard_deviation=1.0, stream=stream(), sensitivity=1.0)
    with pytest.raises(SentinelError, match="too large"):
        privatise_sum(zeros + 1e12, standard_deviation=1.0, stream=stream(), sensitivity=1.0)
