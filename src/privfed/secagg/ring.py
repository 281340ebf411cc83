"""Arithmetic in the ring Z_2^b for b of 16, 20, 24 and 32 bits, and its packed form on the wire.

Masks and vectors live in the integers modulo a power of two, where adding a uniform mask hides a value perfectly
and where the processor's own overflow is the reduction. Work is done in whole words, of 16 bits for the smallest
ring and 32 for the others; since 2^b divides 2^32, bits above b are reduced once, when a vector is packed or the
sum is released.

On the wire values follow each other without gaps, least significant bit first (for 16, 24 and 32 bits that is
plain little-endian), and the last byte is filled up with zeros.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017,
section 4 (masking in Z_R, for an R that all parties share).

Shape legend: M values of a vector.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError, SecAggError

UInt32 = NDArray[np.uint32]
Words = NDArray[Any]
"""Words of the ring: uint32, or uint16 for a ring of 16 bits."""
RING_BITS = (16, 20, 24, 32)
"""The ring sizes, in bits."""
READ_AHEAD = 4
"""Bytes behind a payload that must be readable: values are read as whole words."""
_CHUNK = 1 << 15  # values packed at a time, so that they stay in cache; a multiple of 8

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("Secure aggregation is written for little-endian processors; this one is not.")


def check_ring_bits(ring_bits: int) -> None:
    """Refuse a ring that is not supported.

    Raises:
        ConfigError: If ``ring_bits`` is not in ``RING_BITS``.
    """
    if type(ring_bits) is not int or ring_bits not in RING_BITS:
        known = ", ".join(map(str, RING_BITS))
        raise ConfigError(f"Got ring_bits = {ring_bits!r}; secure aggregation supports {known}.")


def check_vector(values_M: Any, length: int, ring_bits: int = 32) -> None:
    """Refuse anything but a flat uint32 array of ``length`` ring elements; nothing is converted silently.

    Raises:
        SecAggError: If the type, the dtype or the shape differs, or a value is outside the ring.
    """
    if not isinstance(values_M, np.ndarray) or values_M.dtype != np.uint32:
        kind = getattr(values_M, "dtype", type(values_M).__name__)
        raise SecAggError(f"Got values of type {kind}; encode them as a numpy uint32 array first.")
    if values_M.shape != (length,):
        raise SecAggError(f"Got values of shape {values_M.shape}; this session sums vectors of shape ({length},).")
    if ring_bits < 32 and values_M.size and int(values_M.max()) >> ring_bits:
        raise SecAggError(f"A value is outside the ring of {ring_bits} bits; encode it modulo 2^{ring_bits} first.")


def wrap(values_M: NDArray[np.integer[Any]], ring_bits: int = 32) -> UInt32:
    """Return integers of any width and sign reduced modulo 2^ring_bits, as a new uint32 array.

    Raises:
        SecAggError: If the values are not integers.
    """
    if not np.issubdtype(values_M.dtype, np.integer):
        raise SecAggError(f"Got values of dtype {values_M.dtype}; only integers have a residue modulo 2^{ring_bits}.")
    return np.bitwise_and(values_M.astype(np.uint32), mask_of(ring_bits))


def mask_of(ring_bits: int) -> np.uint32:
    """Return the word whose ``ring_bits`` low bits are set."""
    return np.uint32((1 << ring_bits) - 1)


def word_type(ring_bits: int) -> type[np.uint16] | type[np.uint32]:
    """Return the word that the ring is computed in."""
    return np.uint16 if ring_bits == 16 else np.uint32


def packed_bytes(length: int, ring_bits: int) -> int:
    """Return how many bytes ``length`` values take on the wire."""
    return (length * ring_bits + 7) // 8


def pack(words_M: Words, ring_bits: int) -> bytes:
    """Return the values modulo 2^ring_bits in packed form."""
    packed = bytearray(packed_bytes(words_M.size, ring_bits))
    out = np.frombuffer(packed, dtype=np.uint8)
    for start in range(0, words_M.size, _CHUNK):
        pack_into(words_M[start : start + _CHUNK], ring_bits, out[start * ring_bits // 8 :])
    return bytes(packed)


def pack_into(part_M: Words, ring_bits: int, out: NDArray[np.uint8]) -> None:
    """Write values modulo 2^ring_bits to the start of ``out`` in packed form."""
    size = packed_bytes(part_M.size, ring_bits)
    if ring_bits in (16, 32):
        out[:size] = part_M.view(np.uint8)
        return
    if ring_bits == 24:
        columns = part_M.view(np.uint8).reshape(-1, 4)
    else:  # 20 bits: two values fill five bytes
        pairs = np.zeros((part_M.size + 1) // 2, dtype=np.uint64)
        pairs |= part_M[0::2] & mask_of(20)
        pairs[: part_M.size // 2] |= (part_M[1::2] & mask_of(20)).astype(np.uint64) << np.uint64(20)
        columns = pairs.view(np.uint8).reshape(-1, 8)
    width = 3 if ring_bits == 24 else 5
    whole = size // width
    for place in range(width):
        out[place : whole * width : width] = columns[:whole, place]
    out[whole * width : size] = columns[whole:, : size - whole * width].ravel()


def add_packed(total_M: Words, buffer: bytes | memoryview, offset: int, ring_bits: int) -> None:
    """Add the packed values that start at ``offset`` of ``buffer`` to ``total_M``, in place.

    Bits of ``total_M`` above ``ring_bits`` end up as nonsense, which the last reduction removes.

    Args:
        total_M: The running sum, in words of the ring.
        buffer: The packed values and at least ``READ_AHEAD`` bytes behind them.
        offset: Where the values start.
        ring_bits: Bits of a value.
    """
    period = 8 // math.gcd(8, ring_bits)  # after so many values a value starts on a whole byte again
    for phase in range(period):
        lane = total_M[phase::period]
        byte, shift = divmod(phase * ring_bits, 8)
        stride = period * ring_bits // 8
        values: Words = np.ndarray(lane.shape, dtype=total_M.dtype, buffer=buffer, offset=offset + byte, strides=stride)
        np.add(lane, values >> np.uint32(shift) if shift else values, out=lane)


def padding_is_zero(payload: memoryview, length: int, ring_bits: int) -> bool:
    """Return whether the bits that fill up the last byte are zero."""
    used = length * ring_bits % 8
    return used == 0 or payload[-1] >> used == 0


def reduced(total_M: Words, ring_bits: int) -> UInt32:
    """Return ``total_M`` modulo 2^ring_bits as uint32."""
    if ring_bits == 16:
        return total_M.astype(np.uint32)
    words: UInt32 = total_M.astype(np.uint32, copy=False)
    if ring_bits < 32:
        np.bitwise_and(words, mask_of(ring_bits), out=words)
    return words


def add_into(total_M: Words, values_M: Words) -> None:
    """Add ``values_M`` to ``total_M`` modulo the word, in place."""
    np.add(total_M, values_M, out=total_M)


def subtract_into(total_M: Words, values_M: Words) -> None:
    """Subtract ``values_M`` from ``total_M`` modulo the word, in place."""
    np.subtract(total_M, values_M, out=total_M)
