"""Integer-only samplers without any table: slow, and simple enough to check by eye. The tests' oracle.

Discrete Gaussian: Canonne, Kamath and Steinke 2020 (arXiv 2004.00010), Algorithms 1-3, over whole arrays.
Poisson: the von Neumann schema of Flajolet, Pelletier and Soria 2011 (arXiv 0906.5560, section 2.2): draw a geometric
N with P(N = n) = (1 - x) x^n and keep it with probability 1 / n!; what is kept is Poisson(x). Sums give any mean.

Only uniform integers and comparisons of integers are used, so that the laws are exact for a perfect stream. All
parameters are fractions, and are refused where an intermediate could pass 62 bits.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError
from privfed.privacy.discrete.tables import RawStream

Int64 = NDArray[np.int64]
Bools = NDArray[np.bool_]
_LIMIT = 2**62


def exact_discrete_gaussian(stream: RawStream, count: int, variance: Fraction) -> Int64:
    """Return ``count`` draws of the discrete Gaussian of parameter sigma^2 = ``variance`` (CKS20, Algorithm 3).

    Raises:
        ConfigError: If the variance is not positive, or its numerator and denominator are too large.
    """
    top, bottom = _checked(variance)
    t = math.isqrt(top // bottom) + 1  # floor(sigma) + 1
    largest = 64 * t * t * bottom + top  # |Y| beyond 64 t has probability exp(-64): refused below
    if largest**2 >= _LIMIT or 2 * top * bottom * t * t * 64 >= _LIMIT:
        raise ConfigError(f"Expected a variance with a small numerator and denominator, got {variance}.")
    result = np.empty(count, dtype=np.int64)
    missing = np.arange(count)
    while missing.size:
        value = _discrete_laplace(stream, missing.size, t)
        if int(np.abs(value).max()) > 64 * t:
            raise ConfigError("A draw beyond 64 scale lengths does not fit 62 bits: draw again.")
        distance = np.abs(np.abs(value) * (t * bottom) - top)  # (|y| - sigma^2 / t) * t * bottom
        kept = _bernoulli_exp(stream, distance**2, np.full_like(value, 2 * top * bottom * t * t))
        result[missing[kept]] = value[kept]
        missing = missing[~kept]
    return result


def exact_poisson(stream: RawStream, count: int, mean: Fraction) -> Int64:
    """Return ``count`` draws of Poisson(``mean``), as sums of Poissons of mean at most 1/2.

    Raises:
        ConfigError: If the mean is not positive, or its numerator and denominator are too large.
    """
    top, bottom = _checked(mean)
    parts = math.ceil(2 * mean)
    result = np.zeros(count, dtype=np.int64)
    for _ in range(parts):
        result += _small_poisson(stream, count, top, bottom * parts)
    return result


def exact_skellam(stream: RawStream, count: int, variance: Fraction) -> Int64:
    """Return ``count`` draws of Skellam of this variance: the difference of two Poissons of half of it.

    Raises:
        ConfigError: As ``exact_poisson``.
    """
    return exact_poisson(stream, count, variance / 2) - exact_poisson(stream, count, variance / 2)


def _small_poisson(stream: RawStream, count: int, top: int, bottom: int) -> Int64:
    result = np.empty(count, dtype=np.int64)
    missing = np.arange(count)
    while missing.size:
        drawn = np.zeros(missing.size, dtype=np.int64)
        going = np.ones(missing.size, dtype=bool)
        kept = np.ones(missing.size, dtype=bool)
        while going.any():
            at = np.flatnonzero(going)
            going[at] = _below(stream, np.full(at.size, bottom)) < top
            drawn[going] += 1
            more = np.flatnonzero(going)  # a factor 1 / n of 1 / n! for each step to n
            kept[more] &= _below(stream, drawn[more]) == 0
        result[missing[kept]] = drawn[kept]
        missing = missing[~kept]
    return result


def _discrete_laplace(stream: RawStream, count: int, t: int) -> Int64:
    """Return draws with P(y) proportional to exp(-|y| / t) (CKS20, Algorithm 2 with s = 1)."""
    result = np.empty(count, dtype=np.int64)
    missing = np.arange(count)
    while missing.size:
        start = _below(stream, np.full(missing.size, t))
        good = _bernoulli_exp(stream, start, np.full_like(start, t))
        at = np.flatnonzero(good)
        size = start[at] + t * _successes_exp1(stream, at.size)
        negative = _below(stream, np.full(at.size, 2)) == 1
        right = ~(negative & (size == 0))
        done = at[right]
        result[missing[done]] = np.where(negative, -size, size)[right]
        missing = np.delete(missing, done)
    return result


def _successes_exp1(stream: RawStream, count: int) -> Int64:
    """Return how often in a row a coin of probability exp(-1) fell on heads."""
    result = np.zeros(count, dtype=np.int64)
    going = np.arange(count)
    while going.size:
        one = np.ones(going.size, dtype=np.int64)
        going = going[_bernoulli_exp(stream, one, one)]
        result[going] += 1
    return result


def _bernoulli_exp(stream: RawStream, top: Int64, bottom: Int64) -> Bools:
    """Return coins of probability exp(-top / bottom) (CKS20, Algorithm 1)."""
    result = _bernoulli_exp_fraction(stream, top % bottom, bottom)
    whole = top // bottom
    going = np.flatnonzero(result & (whole > 0))
    while going.size:
        one = np.ones(going.size, dtype=np.int64)
        heads = _bernoulli_exp_fraction(stream, one, one)
        result[going[~heads]] = False
        whole[going] -= 1
        going = going[heads & (whole[going] > 0)]
    return result


def _bernoulli_exp_fraction(stream: RawStream, top: Int64, bottom: Int64) -> Bools:
    """The same for top <= bottom: k counts how long coins of probability top / (bottom k) fall on heads."""
    k = np.ones(top.size, dtype=np.int64)
    going = np.arange(top.size)
    while going.size:
        heads = _below(stream, bottom[going] * k[going]) < top[going]
        going = going[heads]
        k[going] += 1
    result: Bools = k % 2 == 1
    return result


def _below(stream: RawStream, bounds: Int64) -> Int64:
    """Return uniform integers in [0, bound) for each of ``bounds``, by rejection."""
    mask = (bounds - 1).astype(np.uint64)
    for shift in (1, 2, 4, 8, 16, 32):
        mask |= mask >> np.uint64(shift)
    result = np.empty(bounds.size, dtype=np.int64)
    missing = np.arange(bounds.size)
    while missing.size:
        drawn = (stream.raw(8 * missing.size).view("<u8") & mask[missing]).astype(np.int64)
        good = drawn < bounds[missing]
        result[missing[good]] = drawn[good]
        missing = missing[~good]
    return result


def _checked(value: Fraction) -> tuple[int, int]:
    if not isinstance(value, Fraction) or value <= 0:
        raise ConfigError(f"Expected a positive fraction, got {value!r}.")
    if value.numerator >= 2**31 or value.denominator >= 2**31:
        raise ConfigError(f"Expected a numerator and a denominator below 2^31, got {value}.")
    return value.numerator, value.denominator
