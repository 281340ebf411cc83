"""Gaussian noise from a cryptographic stream, rounded to a grid so that its low bits say nothing.

Mironov 2012 ("On Significance of the Least Significant Bits for Differential Privacy") recovers a private
value from textbook floating-point noise: which doubles can occur as ``value + noise`` depends on ``value``.
Here the noisy sum is rounded to multiples of one power of two, at most 2^-GRID_BITS of the standard
deviation, so the *set* of possible outputs is the same for all inputs. Rounding is post-processing: it costs
no privacy, and adds 1/12 of a squared grid step of variance.

What is left, stated because it is not in the accounted delta: the probability of a grid point differs a
little from that of an ideal rounded Gaussian.

* Tails: a draw lies within 11.96 standard deviations; an ideal one leaves that range with probability 2^-107,
  which over 10^9 released values is a total variation of 2^-77. (52 bits a value, as one uniform double has,
  would cut at 8.2 deviations and give 2^-22 there.)
* Body: the error of double precision (ndtri and the sum, a few 2^-53 of their values) against a grid step of
  2^-12 is about 2^-40 of a point's probability where the sum is of the noise's size, and grows with the sum.

It is an approximation of a continuous Gaussian to that precision, not an exact sampler of the discrete
Gaussian (Canonne, Kamath and Steinke 2020), and nothing here runs in constant time.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from privfed.errors import ConfigError, SentinelError
from privfed.rng import PrivateStream

GRID_BITS: Final = 12
"""The grid is the largest power of two that is at most 2^-GRID_BITS of the standard deviation."""
TAIL: Final = 11.96
"""No draw lies further out than this many standard deviations."""
NOISE_DESCRIPTION: Final = (
    f"Gaussian by inverse CDF of 107 random bits a value (AES-256 in counter mode) in float64, "
    f"rounded to a power of two of at most 2^-{GRID_BITS} of the standard deviation"
)
"""What a receipt says about the noise."""
_HALF_BITS: Final = 53


def gaussian_noise(stream: PrivateStream, count: int, standard_deviation: float) -> NDArray[np.float64]:
    """Return ``count`` independent draws of N(0, standard_deviation^2), not rounded.

    A sign and a tail probability, each from fresh bits, go through the inverse normal CDF. The tail
    probability is at least 2^-108 and has the relative precision of a double, so the tails are as fine as the
    body.

    Raises:
        ConfigError: If ``standard_deviation`` is not positive and finite or ``count`` is negative.
    """
    _check_deviation(standard_deviation)
    if count < 0:
        raise ConfigError(f"Expected to draw at least 0 values, got {count}.")
    words = np.frombuffer(stream.bytes(16 * count), dtype=np.uint64).reshape(2, count)
    drop = np.uint64(64 - _HALF_BITS)
    low = ((words[1] >> drop).astype(np.float64) + 0.5) * 2.0**-_HALF_BITS
    tail = ((words[0] >> drop).astype(np.float64) + low) * 2.0 ** -(_HALF_BITS + 1)  # in (0, 1/2]
    negative = (words[0] & np.uint64(1)).astype(bool)
    size = np.asarray(-ndtri(tail), dtype=np.float64) * standard_deviation
    return np.where(negative, -size, size)


def grid(standard_deviation: float) -> float:
    """Return the largest power of two that is at most 2^-GRID_BITS of ``standard_deviation``."""
    _check_deviation(standard_deviation)
    return 2.0 ** (math.floor(math.log2(standard_deviation)) - GRID_BITS)


def privatise_sum(
    sum_D: NDArray[np.float64], *, standard_deviation: float, stream: PrivateStream, sensitivity: float
) -> NDArray[np.float64]:
    """Return ``sum_D`` with Gaussian noise, rounded to multiples of ``grid(standard_deviation)``.

    Args:
        sum_D: A sum of clipped contributions.
        standard_deviation: Of the noise of each value.
        stream: A private stream whose names cover everything that ``sum_D`` depends on.
        sensitivity: How far, in L2 norm, one unit moves ``sum_D``; the noise multiplier that an event may
            claim is ``standard_deviation / sensitivity``.

    Raises:
        ConfigError: If ``standard_deviation`` or ``sensitivity`` is not positive and finite.
        SentinelError: If ``sum_D`` is not finite, or so large that doubles near it are coarser than the grid.
            No clipped sum is, so the training is at fault; and such a value would show through the noise.
    """
    if not 0 < sensitivity < math.inf:
        raise ConfigError(f"Expected a positive, finite sensitivity, got {sensitivity}.")
    noise_D = gaussian_noise(stream, np.size(sum_D), standard_deviation).reshape(np.shape(sum_D))
    return on_grid(sum_D, noise_D, standard_deviation=standard_deviation)


def on_grid(
    sum_D: NDArray[np.float64], noise_D: NDArray[np.float64], *, standard_deviation: float
) -> NDArray[np.float64]:
    """Return ``sum_D + noise_D``, rounded to multiples of ``grid(standard_deviation)``.

    Args:
        sum_D: A sum of clipped contributions.
        noise_D: Noise that was drawn for it.
        standard_deviation: Of what is new in each value of the noise, given all that was released before.

    Raises:
        ConfigError: If ``standard_deviation`` is not positive and finite.
        SentinelError: As ``privatise_sum``.
    """
    step = grid(standard_deviation)
    total_D = np.asarray(sum_D, dtype=np.float64)
    if not np.isfinite(total_D).all():
        raise SentinelError("The sum to release has values that are not finite: nothing was released.")
    if total_D.size and float(np.abs(total_D).max()) >= step * 2.0**50:
        raise SentinelError(
            "The sum to release is too large for its noise to hide it in float64: nothing was released; "
            "check the clipping."
        )
    released_D: NDArray[np.float64] = np.rint((total_D + noise_D) / step) * step
    return released_D + 0.0  # -0.0 becomes 0.0: the sign of a zero is a bit too


def _check_deviation(standard_deviation: float) -> None:
    if not 0 < standard_deviation < math.inf:
        raise ConfigError(f"Expected a positive, finite standard deviation, got {standard_deviation}.")
