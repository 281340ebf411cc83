"""From real vectors to integers and on to residues of a ring, and back.

Shape legend: D values of a vector; M values after rotation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ClientError
from privfed.rng import PrivateStream

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
UInt32 = NDArray[np.uint32]
RETRIES = 64
_LARGEST = 2.0**31


def project(values_D: NDArray[np.floating[Any]], norm: float) -> Float64:
    """Return the nearest vector, in float64, whose L2 norm is at most ``norm``.

    Projection onto a ball moves no two vectors further apart, so a bound on what one unit adds to a sum holds for
    the projected sum too.

    Raises:
        ClientError: If a value is not finite.
    """
    result = np.asarray(values_D, dtype=np.float64)
    length = float(np.linalg.norm(result))
    if not np.isfinite(length):
        raise ClientError("The vector to encode has values that are not finite: nothing was sent; check the training.")
    return result * (norm / length) if length > norm else result.copy()


def stochastic_round(values_M: Float64, stream: PrivateStream) -> Int64:
    """Return each value rounded up with probability its fraction, down otherwise (to within 2^-52).

    With one uniform number u a value, the result is floor(value + 1 - u). Rounding a + v and a with the same u gives
    integers whose difference is distributed as the rounding of v by itself, for a + 1 - u is uniform modulo 1. So
    what one unit of a *sum* moves the rounded sum by is bounded as if it were rounded alone.

    Raises:
        ClientError: If a value is not finite or does not fit 31 bits.
    """
    if not (np.abs(values_M) < _LARGEST).all():
        raise ClientError("A value to round does not fit 31 bits: nothing was sent; lower the scale.")
    floor = np.floor(values_M)
    # the fraction is exact in float64, a sum with u would not be
    up = stream.uniform(values_M.size) < values_M - floor
    return floor.astype(np.int64) + up


def conditional_round(
    values_M: Float64, l2_squared: int, stream: PrivateStream, *, retries: int = RETRIES
) -> tuple[Int64, int]:
    """Return ``values_M`` stochastically rounded to integers of squared L2 norm at most ``l2_squared``.

    Rounding is repeated from the stream until the norm, computed in integers, is within the bound, which therefore
    holds for every result whatever the input. That makes it slightly biased towards short vectors.

    Args:
        values_M: Scaled values.
        l2_squared: The bound; see ``sensitivity.rounded_l2_squared``.
        stream: Where the rounding's random bits come from.
        retries: Times to try before giving up.

    Returns:
        The integers, and how often they were drawn.

    Raises:
        ClientError: If no rounding was within the bound, so that the vector was longer than its clip norm, or a
            value is not finite.

    Source: Kairouz, Liu and Steinke 2021 (arXiv 2102.06387), Algorithm 1.
    """
    for attempt in range(1, retries + 1):
        rounded_M = stochastic_round(values_M, stream)
        if squared_norm(rounded_M) <= l2_squared:
            return rounded_M, attempt
    raise ClientError(
        f"None of {retries} roundings has a squared norm of at most {l2_squared}: nothing was sent; clip the vector "
        "to l2_clip_norm before encoding it."
    )


def squared_norm(values_M: Int64) -> int:
    """Return the exact sum of squares of integers below 2^31 in size."""
    if values_M.size == 0:
        return 0
    largest = int(np.abs(values_M).max())
    if largest**2 * values_M.size < 2**63:
        return int(np.dot(values_M, values_M))
    return sum(int(value) ** 2 for value in values_M)


def wrap(values_M: Int64, ring_bits: int) -> UInt32:
    """Return the residues modulo 2^ring_bits (at most 32 bits)."""
    return (values_M & ((1 << ring_bits) - 1)).astype(np.uint32)


def unwrap(residues_M: NDArray[np.unsignedinteger[Any]], ring_bits: int) -> Int64:
    """Return the integers in [-2^(ring_bits - 1), 2^(ring_bits - 1)) with these residues; higher bits are dropped."""
    half, mask = 1 << (ring_bits - 1), (1 << ring_bits) - 1
    signed: Int64 = ((residues_M.astype(np.int64) + half) & mask) - half
    return signed
