"""The two laws of integer noise, to as many digits as the samplers' tables need.

Skellam: the difference of two independent Poisson variables of mean variance / 2, with
P(k) = exp(-v) I_k(v) for the variance v. Closed under sums.
Discrete Gaussian: P(k) proportional to exp(-k^2 / (2 v)); its variance is at most v (Canonne, Kamath and
Steinke 2020, arXiv 2004.00010, Fact 19), and its sums are *not* discrete Gaussians.

All arithmetic is decimal with ``DIGITS`` digits; nothing here is fast, and every result is cached by its user.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Context, Decimal
from fractions import Fraction
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError

LawName = Literal["skellam", "discrete_gaussian"]

DIGITS = 80
CUT_DEVIATIONS = 12
"""Values are cut off at no less than this many standard deviations."""
CUT_TAIL = 2.0**-100
"""... and at no larger a tail than this, which binds for small Skellam variances, whose tails are heavier."""
LARGEST_VARIANCE = 2.0**44
EXPANSION_FROM = 2.0**16
"""From this Skellam variance on the uniform expansion has at least 45 correct digits (see the tests)."""
_EXPANSION_TERMS = 12

_context = Context(prec=DIGITS, Emin=-(10**9), Emax=10**9)


class Law:
    """A symmetric, unimodal law on the integers.

    Args:
        name: ``"skellam"`` or ``"discrete_gaussian"``.
        variance: The parameter v above, in integer steps squared.

    Attributes:
        cut: The samplers return no value beyond +-cut (or, with blocks, beyond the block that holds it).
        tail: An upper bound on the probability of the values beyond, to be charged to delta.

    Raises:
        ConfigError: If the name is unknown or the variance is not in (0, ``LARGEST_VARIANCE``].
    """

    def __init__(self, name: LawName, variance: float) -> None:
        if name not in ("skellam", "discrete_gaussian"):
            raise ConfigError(f"Expected the noise 'skellam' or 'discrete_gaussian', got {name!r}.")
        if not 0 < variance <= LARGEST_VARIANCE:
            raise ConfigError(
                f"Expected a noise variance above 0 and at most 2^44 (in integer steps squared), got {variance:g}: "
                "take another scale."
            )
        self.name: LawName = name
        self.variance = float(variance)
        self.cut = self._find_cut()
        self.tail = math.exp(self.log_tail(self.cut + 1))

    def log_tail(self, size: float) -> float:
        """Return the log of an upper bound on P(|X| >= size), by the Chernoff bound.

        The moment generating function at t is exp(v (cosh t - 1)) for Skellam and at most exp(v t^2 / 2) for the
        discrete Gaussian (Canonne, Kamath and Steinke 2020, Lemma 9).
        """
        v = self.variance
        if self.name == "discrete_gaussian":
            return math.log(2) - size**2 / (2 * v)
        return math.log(2) + _log_saddle(size, v)

    def half_weights(self) -> Sequence[Decimal]:
        """Return numbers proportional to P(0), ..., P(cut), to about 75 digits.

        Skellam: Miller's backward recurrence I_{k-1} = I_{k+1} + (2k / v) I_k (NIST DLMF 10.29.1 and 3.6).
        """
        if self.name == "discrete_gaussian":
            return self._gaussian_weights()
        v = Decimal(self.variance)
        start = self.cut
        while self.log_tail(start) > -250:
            start += max(1, self.cut // 8)
        after, here, weights = Decimal(0), Decimal(1), []
        for k in range(start, 0, -1):
            if k <= self.cut:
                weights.append(here)
            after, here = here, _context.add(after, _context.divide(_context.multiply(Decimal(2 * k), here), v))
        weights.append(here)
        return weights[::-1]

    def exact_log_weight(self, value: int) -> Decimal:
        """Return log P(value) up to one constant for all values, to at least 45 digits.

        Skellam: the uniform expansion of the Bessel function (NIST DLMF 10.41.3), from ``EXPANSION_FROM`` on only.
        """
        v, y = Decimal(self.variance), Decimal(abs(value))
        c = _context
        if self.name == "discrete_gaussian":
            return c.divide(c.multiply(-y, y), c.multiply(Decimal(2), v))
        radius = c.sqrt(c.add(c.multiply(v, v), c.multiply(y, y)))
        slope = c.ln(c.divide(c.add(y, radius), v))  # asinh(y / v)
        series = _expansion(radius, c.divide(y, radius))
        result = c.subtract(c.subtract(radius, v), c.multiply(y, slope))
        return c.add(c.subtract(result, c.divide(c.ln(radius), Decimal(2))), c.ln(series))

    def log_ratio(self, values: NDArray[np.int64], inner: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return log(P(values) / P(inner)) in float64, to an absolute error below 1e-11."""
        v = self.variance
        if self.name == "discrete_gaussian":
            difference = (inner - values).astype(np.float64)
            result: NDArray[np.float64] = difference * (inner + values) / (2 * v)
            return result
        return self._float_log_weight(values) - self._float_log_weight(inner)

    def _find_cut(self) -> int:
        cut = math.ceil(CUT_DEVIATIONS * math.sqrt(self.variance))
        while self.log_tail(cut + 1) > math.log(CUT_TAIL):
            cut += max(1, cut // 50)
        return cut

    def _gaussian_weights(self) -> Sequence[Decimal]:
        c = _context
        step = c.exp(c.divide(Decimal(-1), c.multiply(Decimal(2), Decimal(self.variance))))
        square, weights = c.multiply(step, step), [Decimal(1)]
        for _ in range(self.cut):
            weights.append(c.multiply(weights[-1], step))
            step = c.multiply(step, square)
        return weights

    def _float_log_weight(self, values: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the expansion of ``exact_log_weight`` to three terms, without cancellation."""
        v, y = self.variance, values.astype(np.float64)
        square = (y / v) ** 2
        radius = v * np.sqrt(1 + square)
        p2 = square / (1 + square)
        first = (3 - 5 * p2) / (24 * radius)
        second = (81 - 462 * p2 + 385 * p2**2) / (1152 * radius**2)
        result: NDArray[np.float64] = (
            y**2 / (radius + v) - y * np.arcsinh(y / v) - np.log1p(square) / 4 + np.log1p(first + second)
        )
        return result


def _log_saddle(size: float, variance: float) -> float:
    """Return min over t of v (cosh t - 1) - t size."""
    ratio = size / variance
    return variance * (ratio**2 / (1 + math.sqrt(1 + ratio**2))) - size * math.asinh(ratio)


def _expansion(radius: Decimal, p: Decimal) -> Decimal:
    """Return the sum of U_k(p) / (p radius)^k, with U_k of DLMF 10.41.9."""
    c, total, p2 = _context, Decimal(0), _context.multiply(p, p)
    for k in range(_EXPANSION_TERMS, -1, -1):
        inner = Decimal(0)
        for coefficient in reversed(_coefficients()[k]):
            value = c.divide(Decimal(coefficient.numerator), Decimal(coefficient.denominator))
            inner = c.add(c.multiply(inner, p2), value)
        total = c.add(c.divide(total, radius), inner)
    return total


@cache
def _coefficients() -> tuple[tuple[Fraction, ...], ...]:
    """Return for each k the coefficients of U_k(p) / p^k in powers of p^2 (the recurrence of DLMF 10.41.9)."""
    rows: list[tuple[Fraction, ...]] = [(Fraction(1),)]
    for k in range(_EXPANSION_TERMS):
        row = [Fraction(0)] * (k + 2)
        for j, coefficient in enumerate(rows[k]):
            power = k + 2 * j
            row[j] += coefficient * (Fraction(power, 2) + Fraction(1, 8 * (power + 1)))
            row[j + 1] -= coefficient * (Fraction(power, 2) + Fraction(5, 8 * (power + 3)))
        rows.append(tuple(row))
    return tuple(rows)
