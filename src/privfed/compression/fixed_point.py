"""Signed fixed-point numbers in a ring Z_{2^b}: what every summable codec shares.

A value is an integer number of steps; negatives wrap. The sum of up to n values decodes exactly as long as n times
the largest magnitude stays below 2^(b-1), which :func:`largest_step_count` guarantees.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ClientError
from privfed.types import EncodedSum, Float32


def largest_step_count(ring_bits: int, clients: int) -> int:
    """Return the largest |integer| such that ``clients`` of them add up without wrapping."""
    return ((1 << (ring_bits - 1)) - 1) // max(1, clients)


def least_ring(largest: int, clients: int) -> int:
    """Return the smallest ring (16, 20, 24 or 32 bits) in which ``clients`` integers up to ``largest`` never wrap.

    Where not even 32 bits will do, 32: the codec's own check then says so.
    """
    fitting = [bits for bits in (16, 20, 24, 32) if largest <= largest_step_count(bits, clients)]
    return fitting[0] if fitting else 32


def check_finite(vector_D: Float32) -> None:
    """Refuse NaN and infinity: no integer stands for them.

    Raises:
        ClientError: If a value is not finite.
    """
    if not np.isfinite(vector_D).all():
        raise ClientError("The update holds NaN or infinity and cannot be encoded: lower client.learning_rate.")


def to_ring(steps_M: NDArray[np.int64], bits: int) -> NDArray[np.uint32]:
    """Return signed step counts as residues modulo 2^bits (two's complement)."""
    return (steps_M & ((1 << bits) - 1)).astype(np.uint32)


def from_ring(sum_M: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """Return the signed integers whose residues modulo 2^bits are ``sum_M``."""
    half = 1 << (bits - 1)
    signed: NDArray[np.int64] = sum_M.astype(np.int64)
    return np.where(signed >= half, signed - (1 << bits), signed)


def scaled_sum(encoded_sum: EncodedSum, bits: int | None) -> NDArray[np.float64]:
    """Return the decoded sum [D]; ``bits`` is the ring's, or None where integers were added without one."""
    total = encoded_sum.sum_M.astype(np.int64) if bits is None else from_ring(encoded_sum.sum_M.astype(np.uint64), bits)
    return total.astype(np.float64) * encoded_sum.scale
