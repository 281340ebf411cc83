"""Which K of D positions a sparse message speaks of, in the fewer bytes of two ways.

*Bitmap*: D bits. *Elias-Fano*: the low ``w`` bits of each position as they are, and the gaps between the rest in unary,
where w = floor(log2(D / K)): about 2 + log2(D / K) bits a position, half a bit above the entropy of a random set. Both
lengths follow from (D, K), so the receiver knows the way and checks the length before it allocates anything.

Source: Elias 1974 and Fano 1971; Vigna 2013, "Quasi-succinct indices" (arXiv 1206.4300), section 3.

Shape suffixes: D values of a vector, K positions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privfed.compression.bits import pack_bits, unpack_bits
from privfed.errors import ProtocolError

Positions = NDArray[np.int64]


def positions_size(length: int, count: int) -> int:
    """Return the bytes that ``count`` positions below ``length`` take."""
    return min(_bitmap_size(length), sum(_gap_sizes(length, count)))


def pack_positions(indices_K: Positions, length: int) -> bytes:
    """Return ascending distinct positions below ``length`` as bytes."""
    count = len(indices_K)
    if _bitmap_size(length) <= sum(_gap_sizes(length, count)):
        flags_D = np.zeros(length, dtype=np.uint8)
        flags_D[indices_K] = 1
        return np.packbits(flags_D, bitorder="little").tobytes()
    width = _width(length, count)
    low_K = (indices_K & ((1 << width) - 1)).astype(np.uint32)
    marks = np.zeros(_gap_sizes(length, count)[1] * 8, dtype=np.uint8)
    marks[(indices_K >> width) + np.arange(count)] = 1
    return (pack_bits(low_K, width) if width else b"") + np.packbits(marks, bitorder="little").tobytes()


def unpack_positions(data: bytes, length: int, count: int) -> Positions:
    """Return the ``count`` positions below ``length`` that :func:`pack_positions` packed.

    Raises:
        ProtocolError: If the data has another length, or does not hold that many ascending positions in range.
    """
    if not 0 <= count <= length:
        raise ProtocolError(f"The message speaks of {count} positions of a vector of {length}.")
    if len(data) != positions_size(length, count):
        raise ProtocolError(f"The positions take {len(data)} bytes, expected {positions_size(length, count)}.")
    low_bytes, high_bytes = _gap_sizes(length, count)
    if _bitmap_size(length) <= low_bytes + high_bytes:
        found = _set_bits(data)
    else:
        width = _width(length, count)
        marks = _set_bits(data[low_bytes:])
        if len(marks) != count:
            raise ProtocolError(f"The message holds {len(marks)} positions, expected {count}.")
        low_K = unpack_bits(data[:low_bytes], width, count).astype(np.int64) if width else np.int64(0)
        found = ((marks - np.arange(count)) << width) + low_K
    if len(found) != count or (count and (found[-1] >= length or (np.diff(found) <= 0).any())):
        raise ProtocolError(f"The message's positions are not {count} ascending numbers below {length}.")
    return found


def _set_bits(data: bytes) -> Positions:
    return np.flatnonzero(np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")).astype(np.int64)


def _bitmap_size(length: int) -> int:
    return -(-length // 8)


def _width(length: int, count: int) -> int:
    """Return w, how many low bits of a position are written as they are."""
    return max(0, (length // max(1, count)).bit_length() - 1)


def _gap_sizes(length: int, count: int) -> tuple[int, int]:
    """Return the bytes of the low bits and of the unary rest."""
    width = _width(length, count)
    return -(-width * count // 8), -(-(count + (length >> width) + 1) // 8) if count else 0
