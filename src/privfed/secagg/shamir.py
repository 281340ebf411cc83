"""Shamir secret sharing of 32-byte secrets over the prime field of order 2^256 + 297.

A secret is the constant term of a random polynomial of degree ``threshold - 1``; a share is its value at a
nonzero point. Any ``threshold`` shares give the polynomial, and fewer are independent of the secret. The
prime is the smallest above 2^256, so every 32-byte string is a field element and a share takes 33 bytes.

Python's integers are not constant-time: whoever can time this process to the microsecond is outside the
threat model.

Source: Shamir, "How to Share a Secret", CACM 1979; used as in Bonawitz et al. 2017, section 3 and figure 4.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33


def deal(secret: int, threshold: int, points: Sequence[int], prime: int = PRIME) -> list[int]:
    """Return one share of ``secret`` for each of ``points``; any ``threshold`` of them reconstruct.

    The coefficients come from the operating system's CSPRNG.

    Args:
        secret: The secret, below ``prime``.
        threshold: How many shares reconstruct, between 1 and the number of points.
        points: Distinct nonzero field elements.
        prime: Order of the field.

    Raises:
        ValueError: If the arguments are not as described.
    """
    if not 0 <= secret < prime:
        raise ValueError("Expected a secret between 0 and the order of the field.")
    if not 1 <= threshold <= len(points):
        raise ValueError(f"Expected a threshold between 1 and {len(points)}, got {threshold}.")
    _check_points(points, prime)
    tail = [secrets.randbelow(prime) for _ in range(threshold - 1)]
    return evaluate([secret, *tail], points, prime)


def evaluate(coefficients: Sequence[int], points: Sequence[int], prime: int = PRIME) -> list[int]:
    """Return the polynomial with these ``coefficients`` (constant term first) at each of ``points``."""
    values = []
    for point in points:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % prime
        values.append(value)
    return values


def lagrange_weights(points: Sequence[int], prime: int = PRIME) -> list[int]:
    """Return the weights whose dot product with the shares at ``points`` is the secret.

    They depend on the points only, so one call serves every secret that the same clients hold shares of.

    Raises:
        ValueError: If the points are not distinct nonzero field elements.
    """
    _check_points(points, prime)
    # w_i = prod_j x_j / (x_i prod_{j != i} (x_j - x_i)); the points are small, so plain products come first
    numerator = math.prod(points) % prime
    bottoms = [point * math.prod(other - point for other in points if other != point) % prime for point in points]
    return [numerator * inverse % prime for inverse in _inverses(bottoms, prime)]


def _inverses(values: Sequence[int], prime: int) -> list[int]:
    """Return the inverses of nonzero field elements by a single inversion (Montgomery's trick)."""
    before = [1]
    for value in values:
        before.append(before[-1] * value % prime)
    running, inverses = pow(before[-1], -1, prime), []
    for value, product in zip(reversed(values), reversed(before[:-1]), strict=True):
        inverses.append(running * product % prime)
        running = running * value % prime
    return inverses[::-1]


def combine(weights: Sequence[int], shares: Sequence[int], prime: int = PRIME) -> int:
    """Return the secret: the dot product of the ``lagrange_weights`` of the points with the shares there."""
    return sum(weight * share for weight, share in zip(weights, shares, strict=True)) % prime


def deal_bytes(secret: bytes, threshold: int, points: Sequence[int]) -> list[bytes]:
    """Return shares of a 32-byte ``secret``, each as ``SHARE_BYTES`` little-endian bytes; see ``deal``."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"Expected a secret of {SECRET_BYTES} bytes, got {len(secret)}.")
    shares = deal(int.from_bytes(secret, "little"), threshold, points)
    return [share.to_bytes(SHARE_BYTES, "little") for share in shares]


def combine_bytes(weights: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """Return the 32-byte secret that these shares give under ``weights``.

    Raises:
        ValueError: If the result is no 32-byte string, so at least one share is wrong.
    """
    secret = combine(weights, [int.from_bytes(share, "little") for share in shares])
    if secret >> (8 * SECRET_BYTES):
        raise ValueError("The shares do not combine to a 32-byte secret.")
    return secret.to_bytes(SECRET_BYTES, "little")


def is_share(value: bytes) -> bool:
    """Return whether ``value`` encodes a field element."""
    return len(value) == SHARE_BYTES and int.from_bytes(value, "little") < PRIME


def _check_points(points: Sequence[int], prime: int) -> None:
    """Refuse points at which a polynomial cannot be shared."""
    if len(set(points)) != len(points) or not all(0 < point < prime for point in points):
        raise ValueError("Expected distinct points between 1 and the order of the field.")
