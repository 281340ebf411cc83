"""The plain (unmasked) message: header + packed integers or floats. Its length is what counts as bytes up."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from privfed.compression.fixed_point import from_ring
from privfed.errors import ProtocolError
from privfed.types import Encoded

_MAX_HEADER = 4096


def pack_bits(values_M: NDArray[np.uint32], bits: int) -> bytes:
    """Return ``bits`` low bits of each value, least significant first, without gaps."""
    if bits == 32:
        return values_M.astype("<u4").tobytes()
    if bits == 16:
        return values_M.astype("<u2").tobytes()
    if bits == 8:
        return values_M.astype("u1").tobytes()
    planes = ((values_M[:, None] >> np.arange(bits, dtype=np.uint32)) & 1).astype(np.uint8)
    return np.packbits(planes.ravel(), bitorder="little").tobytes()


def unpack_bits(data: bytes, bits: int, count: int) -> NDArray[np.uint32]:
    """Return the ``count`` values that :func:`pack_bits` packed.

    Raises:
        ProtocolError: If the data has another length.
    """
    if len(data) != (bits * count + 7) // 8:
        raise ProtocolError(f"The payload has {len(data)} bytes, expected {(bits * count + 7) // 8}.")
    if bits in (8, 16, 32):
        return np.frombuffer(data, dtype=f"<u{bits // 8}").astype(np.uint32)
    planes = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=bits * count, bitorder="little")
    weights = (np.uint32(1) << np.arange(bits, dtype=np.uint32)).astype(np.uint32)
    return planes.reshape(count, bits).astype(np.uint32) @ weights


def to_bytes(encoded: Encoded, *, client_id: str, weight: float) -> bytes:
    """Return the message a client sends where updates are not masked."""
    floats = encoded.values_M.dtype == np.float32
    payload = (
        encoded.values_M.astype("<f4").tobytes()
        if floats
        else pack_bits(encoded.values_M.astype(np.uint32), encoded.num_bits)
    )
    header: bytes = msgpack.packb(
        [1, client_id, encoded.codec, encoded.num_bits, encoded.scale, encoded.length, weight, floats]
    )
    return len(header).to_bytes(2, "little") + header + payload


def signed_values(message: bytes, *, length: int) -> tuple[str, float, float, NDArray[np.float64] | NDArray[np.int64]]:
    """Return (client id, weight, scale, values) of a plain message, values signed and ready to add.

    Raises:
        ProtocolError: If the message is malformed or not of ``length`` values.
    """
    size = int.from_bytes(message[:2], "little")
    if size > _MAX_HEADER or len(message) < 2 + size:
        raise ProtocolError("The message is shorter than its header says.")
    try:
        fields = msgpack.unpackb(message[2 : 2 + size], strict_map_key=True)
        version, client_id, _codec, bits, scale, count, weight, floats = fields
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"The message's header cannot be read: {error}") from error
    if version != 1 or count != length:
        raise ProtocolError(f"The message holds {count} values in version {version}, expected {length} in version 1.")
    _check_fields(client_id, bits, scale, count, weight, floats)
    payload = message[2 + size :]
    if floats:
        if len(payload) != 4 * count:
            raise ProtocolError(f"The payload has {len(payload)} bytes, expected {4 * count}.")
        values_D = np.frombuffer(payload, dtype="<f4").astype(np.float64)
        if not np.isfinite(values_D).all():
            raise ProtocolError(f"The message of {client_id} holds NaN or infinity, expected finite values.")
        return client_id, weight, scale, values_D
    return client_id, weight, scale, from_ring(unpack_bits(payload, bits, count).astype(np.uint64), bits)


def _check_fields(client_id: Any, bits: Any, scale: Any, count: Any, weight: Any, floats: Any) -> None:
    """Refuse a header whose values could crash or poison the sum: a client may send anything.

    Raises:
        ProtocolError: If a field is of another type or out of range.
    """
    sound = (
        isinstance(client_id, str)
        and type(bits) is int
        and 1 <= bits <= 32
        and type(count) is int
        and type(floats) is bool
        and isinstance(scale, float)
        and 0 < scale < math.inf
        and isinstance(weight, float)
        and 0 <= weight < math.inf
    )
    if not sound:
        raise ProtocolError("The message's header holds a value of another type or out of range.")
