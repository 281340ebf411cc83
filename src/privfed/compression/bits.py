"""Integers of 1 to 32 bits packed without gaps, least significant bit first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ProtocolError

_GROUP = 8  # so many values of b bits fill b whole bytes


def packed_size(bits: int, count: int) -> int:
    """Return the bytes that ``count`` values of ``bits`` bits take."""
    return (bits * count + 7) // 8


def pack_bits(values_M: NDArray[np.uint32], bits: int) -> bytes:
    """Return ``bits`` low bits of each value, least significant first, without gaps."""
    if bits in (8, 16, 32):
        return values_M.astype(f"<u{bits // 8}").tobytes()
    if bits == 1:
        return np.packbits((values_M & np.uint32(1)).astype(np.uint8), bitorder="little").tobytes()
    if bits in (2, 4):
        return _fold(values_M, bits)
    groups = -(-values_M.size // _GROUP)
    columns = np.zeros((_GROUP, groups), dtype=np.uint64)
    for place in range(_GROUP):
        part = values_M[place::_GROUP]
        columns[place, : part.size] = part
    columns &= np.uint64((1 << bits) - 1)
    words = np.zeros((groups, -(-bits * _GROUP // 64)), dtype="<u8")
    for place in range(_GROUP):
        word, shift = divmod(place * bits, 64)
        words[:, word] |= columns[place] << np.uint64(shift)
        if shift + bits > 64:
            words[:, word + 1] |= columns[place] >> np.uint64(64 - shift)
    packed = words.view(np.uint8)[:, :bits].reshape(-1)
    return packed[: packed_size(bits, values_M.size)].tobytes()


def unpack_bits(data: bytes, bits: int, count: int) -> NDArray[np.uint32]:
    """Return the ``count`` values that :func:`pack_bits` packed.

    Raises:
        ProtocolError: If the data has another length.
    """
    if len(data) != packed_size(bits, count):
        raise ProtocolError(f"The payload has {len(data)} bytes, expected {packed_size(bits, count)}.")
    if bits in (8, 16, 32):
        return np.frombuffer(data, dtype=f"<u{bits // 8}").astype(np.uint32)
    raw = np.frombuffer(data, dtype=np.uint8)
    if bits == 1:
        return np.unpackbits(raw, count=count, bitorder="little").astype(np.uint32)
    if bits in (2, 4):
        return _unfold(raw, bits)[:count].astype(np.uint32)
    groups = -(-count // _GROUP)
    padded = np.zeros((groups, -(-bits * _GROUP // 64) * 8), dtype=np.uint8)
    whole = raw.size // bits
    padded[:whole, :bits] = raw[: whole * bits].reshape(whole, bits)
    if whole < groups:
        padded[whole, : raw.size - whole * bits] = raw[whole * bits :]
    words = padded.view("<u8")
    out = np.empty((groups, _GROUP), dtype=np.uint32)
    for place in range(_GROUP):
        word, shift = divmod(place * bits, 64)
        value = words[:, word] >> np.uint64(shift)
        if shift + bits > 64:
            value |= words[:, word + 1] << np.uint64(64 - shift)
        out[:, place] = value & np.uint64((1 << bits) - 1)
    return out.reshape(-1)[:count]


def _fold(values_M: NDArray[np.uint32], bits: int) -> bytes:
    """Return :func:`pack_bits` of 2 or 4 bits: neighbouring bytes move together until each is full."""
    per_byte = 8 // bits
    parts = np.zeros(-(-values_M.size // per_byte) * per_byte, dtype=np.uint8)
    np.copyto(parts[: values_M.size], values_M, casting="unsafe")  # the lowest byte of each value
    parts &= np.uint8((1 << bits) - 1)
    while bits < 8:
        pairs = parts.view("<u2")
        parts = (pairs | (pairs >> (8 - bits))).astype(np.uint8)
        bits *= 2
    return parts.tobytes()


def _unfold(raw: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return the values in the bytes that :func:`_fold` filled, those in the padding included."""
    width = 8
    while width > bits:
        width //= 2
        pairs = raw.astype("<u2")
        raw = (pairs | (pairs << (8 - width))).view(np.uint8) & np.uint8((1 << width) - 1)
    return raw
