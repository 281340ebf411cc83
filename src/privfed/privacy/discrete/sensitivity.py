"""How far one unit moves a rounded sum, and how likely a sum is to leave its ring.

Everything is in integer steps: a real vector has been multiplied by the scale already.

Shape legend: D values of a vector; M values after rotation (D, or the next power of two).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.optimize import minimize_scalar

from privfed.errors import ConfigError
from privfed.privacy.discrete.laws import LawName

STEPS_PER_COORDINATE = 5.0
"""A clip norm of this many sqrt(D) steps makes Skellam's epsilon the Gaussian's to three decimals."""
RING_BITS = (16, 20, 24, 32)
NORM_SLACK = 1e-6
"""Relative room for sums of single-precision values; it enters every bound on the real side."""


def recommended_scale(l2_clip_norm: float, length: int) -> float:
    """Return the scale at which the clip norm is ``STEPS_PER_COORDINATE`` * sqrt(``length``) steps.

    Raises:
        ConfigError: If an argument is not positive.
    """
    if not (0 < l2_clip_norm < math.inf and length > 0):
        raise ConfigError(f"Expected a positive clip norm and length, got {l2_clip_norm} and {length}.")
    return STEPS_PER_COORDINATE * math.sqrt(length) / l2_clip_norm


def rounded_l2_squared(l2: float, length: int, beta: float) -> int:
    """Return a bound on the squared L2 norm of a stochastically rounded vector.

    It is the smaller of (l2 + sqrt(M))^2, which always holds, and l2^2 + M/4 + sqrt(2 ln(1/beta)) (l2 + sqrt(M)/2),
    which holds with probability at least 1 - ``beta`` over the rounding; rounded down, the norm being an integer.

    Args:
        l2: Bound on the norm before rounding, in steps.
        length: M.
        beta: In [0, 1); 0 asks for the bound that always holds.

    Raises:
        ConfigError: If an argument is out of range.

    Source: Kairouz, Liu and Steinke 2021 (arXiv 2102.06387), Theorem 1 and Proposition 22, at a granularity of 1.
    """
    if not 0 < l2 < 2.0**30:
        raise ConfigError(f"Expected an L2 norm above 0 and below 2^30 steps, got {l2:g}: take another scale.")
    if length < 1:
        raise ConfigError(f"Expected at least one value, got a length of {length}.")
    if not 0 <= beta < 1:
        raise ConfigError(f"Expected beta in [0, 1), got {beta}.")
    always = (l2 + math.sqrt(length)) ** 2
    if beta == 0:
        return math.floor(always)
    likely = l2**2 + length / 4 + math.sqrt(-2 * math.log(beta)) * (l2 + math.sqrt(length) / 2)
    return math.floor(min(always, likely))


def rounded_l1(l2_squared: int, length: int) -> float:
    """Return a bound on the L1 norm of integers whose squared L2 norm is at most ``l2_squared``.

    The smaller of sqrt(M) times the L2 norm (Cauchy and Schwarz) and the squared norm itself (|k| <= k^2).
    """
    return min(math.sqrt(length * l2_squared), float(l2_squared))


def overflow_bound(
    *, clients: int, contribution: float, variance: float, noise: LawName, length: int, ring_bits: int, rotated: bool
) -> float:
    """Return an upper bound on the probability that any of the M summed values leaves +-2^(ring_bits - 1).

    Rounding moves a sum of n vectors by less than n in each value. Noise has its law's moment generating function.
    The signal of one value is at most n times the contribution; after a rotation with random signs it is also
    sub-Gaussian with parameter n times the contribution over sqrt(M) (Hoeffding; over the choice of the signs,
    for vectors that do not depend on them). One Chernoff bound over the sum, one union bound over the values.

    Args:
        clients: How many vectors are summed.
        contribution: Bound on the L2 norm of each before rounding, in steps.
        variance: Of the noise of the *whole* sum, in steps squared.
        noise: Its law.
        length: M.
        ring_bits: Bits of the ring.
        rotated: Whether the vectors were rotated.
    """
    signal = clients * contribution
    room = 2.0 ** (ring_bits - 1) - clients
    spread = signal / math.sqrt(length) if rotated else 0.0
    plain = _tail(room - signal, 0.0, variance, noise)
    one = min(plain, _tail(room, spread, variance, noise)) if rotated else plain
    return min(1.0, length * one)


def smallest_ring(
    most: float,
    *,
    clients: int,
    contribution: float,
    variance: float,
    noise: LawName,
    length: int,
    rotated: bool,
    rings: Sequence[int] = RING_BITS,
) -> int:
    """Return the smallest of ``rings`` whose ``overflow_bound`` is at most ``most``.

    Raises:
        ConfigError: If none is large enough.
    """
    for bits in sorted(rings):
        bound = overflow_bound(
            clients=clients,
            contribution=contribution,
            variance=variance,
            noise=noise,
            length=length,
            ring_bits=bits,
            rotated=rotated,
        )
        if bound <= most:
            return bits
    raise ConfigError(
        f"A sum of {clients} vectors of up to {contribution:.3g} steps with noise of standard deviation "
        f"{math.sqrt(variance):.3g} leaves a ring of {max(rings)} bits with probability {bound:.1g}, more than "
        f"{most:g}: lower the scale."
    )


def _tail(room: float, spread: float, variance: float, noise: LawName) -> float:
    """Return 2 exp(-max over t > 0 of [t room - t^2 spread^2 / 2 - log E exp(t noise)]), at most 1."""
    if room <= 0:
        return 1.0
    if variance == 0 and spread == 0:
        return 0.0

    def exponent(t: float) -> float:
        growth = variance * (2 * math.sinh(t / 2) ** 2 if noise == "skellam" else t**2 / 2)
        return growth + (t * spread) ** 2 / 2 - t * room

    # any t gives a bound: it need not be the best to the last digit
    width = spread**2 + variance
    reach = min(600.0, 2 * room / width)
    found = minimize_scalar(exponent, bounds=(0.0, reach), method="bounded", options={"xatol": 1e-9 * reach})
    return min(1.0, 2 * math.exp(min(0.0, float(found.fun))))
