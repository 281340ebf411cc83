"""Signed fixed-point numbers in a ring Z_{2^b}: what every summable codec shares.

A value is an integer number of steps; negatives wrap. The sum of up to n values decodes exactly as long as n times
the largest magnitude stays below 2^(b-1), which :func:`largest_step_count` guarantees.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ClientError
from privfed.rng import PrivateStream
from privfed.types import EncodedSum, Float32

_BLOCK = 1 << 16  # values worked on at a time: 256 KiB, what a core's cache holds beside its sources
_DITHER_BITS = 16


def largest_step_count(ring_bits: int, clients: int) -> int:
    """Return the largest |integer| such that ``clients`` of them add up without wrapping."""
    return ((1 << (ring_bits - 1)) - 1) // max(1, clients)


def least_ring(largest: int, clients: int) -> int:
    """Return the smallest ring (16, 20, 24 or 32 bits) in which ``clients`` integers up to ``largest`` never wrap.

    Where not even 32 bits will do, 32: the codec's own check then says so.
    """
    fitting = [bits for bits in (16, 20, 24, 32) if largest <= largest_step_count(bits, clients)]
    return fitting[0] if fitting else 32


def check_finite(vector_D: NDArray[np.floating]) -> float:
    """Return the largest magnitude; refuse NaN and infinity, for no integer stands for them.

    Raises:
        ClientError: If a value is not finite.
    """
    if not vector_D.size:
        return 0.0
    # NaN passes through both reductions, which are faster than a test of each value
    high, low = float(vector_D.max()), float(vector_D.min())
    if not (math.isfinite(high) and math.isfinite(low)):
        raise ClientError("The update holds NaN or infinity and cannot be encoded: lower client.learning_rate.")
    return max(high, -low)


def norm_of(vector_D: Float32) -> float:
    """Return the norm, added up in float64."""
    parts = (vector_D[start : start + _BLOCK].astype(np.float64) for start in range(0, vector_D.size, _BLOCK))
    return math.sqrt(sum(float(part @ part) for part in parts))


def to_ring(steps_M: NDArray[np.int64], bits: int) -> NDArray[np.uint32]:
    """Return signed step counts as residues modulo 2^bits (two's complement)."""
    return (steps_M & ((1 << bits) - 1)).astype(np.uint32)


def from_ring(sum_M: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """Return the signed integers whose residues modulo 2^bits are ``sum_M``."""
    # the sign bit moved to the top of the word and back: the arithmetic shift extends it
    signed = np.left_shift(sum_M, np.uint64(64 - bits), dtype=np.uint64).view(np.int64)
    return np.right_shift(signed, 64 - bits, out=signed)


def scaled_sum(encoded_sum: EncodedSum, bits: int | None) -> NDArray[np.float64]:
    """Return the decoded sum [D]; ``bits`` is the ring's, or None where integers were added without one."""
    total = encoded_sum.sum_M
    if bits is not None:
        total = from_ring(total.astype(np.uint64, copy=False), bits)
    return np.multiply(total, encoded_sum.scale, dtype=np.float64)


def stochastic_steps(
    vector_M: Float32, step: float, levels: int, stream: PrivateStream, bits: int, *, largest: float
) -> NDArray[np.uint32]:
    """Return each value rounded up or down at random to a whole number of steps, as residues modulo 2^bits.

    A value becomes an integer of steps / 2^16, a random integer below 2^16 is added and the lower half is dropped: the
    expectation is the value, to 2^-16 of a step (and to float32's own rounding of value / step). Results are within
    [-levels, levels] and less than one step from the value, after that rounding (at most 2^-22 of the value).

    Args:
        vector_M: Finite values, of magnitude at most ``step * levels``; larger ones are cut.
        step: Width of a step.
        levels: Largest number of steps, below 2^15.
        stream: Source of the random bits.
        bits: Size of the residues.
        largest: Magnitude of the largest value.
    """
    out_M = np.empty(vector_M.size, dtype=np.int32)
    scale = np.float32(2.0**_DITHER_BITS / step)
    top = np.float32(levels * 2.0**_DITHER_BITS)  # exact; with the random part it stays below 2^31
    fits = np.float32(largest) * scale <= top
    scaled = np.empty(min(_BLOCK, vector_M.size), dtype=np.float32)
    dither_M = stream.raw(2 * vector_M.size).view(np.uint16)
    for start in range(0, vector_M.size, _BLOCK):
        out = out_M[start : start + _BLOCK]
        part = scaled[: out.size]
        np.multiply(vector_M[start : start + _BLOCK], scale, out=part)
        if not fits:
            np.clip(part, -top, top, out=part)
        np.copyto(out, part, casting="unsafe")
        np.add(out, dither_M[start : start + _BLOCK], out=out)
        np.right_shift(out, _DITHER_BITS, out=out)
        if bits < 32:
            np.bitwise_and(out, (1 << bits) - 1, out=out)
    return out_M.view(np.uint32)


def stochastic_signs(vector_M: Float32, top: float, stream: PrivateStream) -> NDArray[np.bool_]:
    """Return for each value whether it becomes -top instead of +top: with probability (1 - value / top) / 2, to 2^-16.

    Values beyond ``top`` become what they are nearest to.
    """
    out_M = np.empty(vector_M.size, dtype=np.bool_)
    scale = np.float32(2.0 ** (_DITHER_BITS - 1) / top)
    scaled, draws = np.empty((2, min(_BLOCK, vector_M.size)), dtype=np.float32)
    dither_M = stream.raw(2 * vector_M.size).view(np.int16)  # uniform from -2^15 to 2^15 - 1
    for start in range(0, vector_M.size, _BLOCK):
        out = out_M[start : start + _BLOCK]
        part, draw = scaled[: out.size], draws[: out.size]
        with np.errstate(over="ignore"):  # infinity is beyond every draw, as it should be
            np.multiply(vector_M[start : start + _BLOCK], scale, out=part)
        np.copyto(draw, dither_M[start : start + _BLOCK])
        np.greater_equal(draw, part, out=out)
    return out_M
