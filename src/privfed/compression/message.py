"""The plain (unmasked) message: header, positions where it is sparse, packed values. Its length counts as bytes up.

Whoever receives one knows from the codec how many values of which width it must hold (:class:`Wire`); the header is
compared with that, and the length with the header, before anything of that size is allocated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from privfed.compression import Codec, Wire
from privfed.compression.bits import pack_bits, packed_size, unpack_bits
from privfed.compression.positions import pack_positions, positions_size, unpack_positions
from privfed.errors import ProtocolError
from privfed.types import Encoded, EncodedSum

VERSION = 3
_MAX_HEADER = 4096
_KINDS = ("integer", "float32", "float16", "bfloat16")
_FLOAT_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
Signed = NDArray[np.float64] | NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One client's message as its receiver read it: the encoding, and what to add to the others'.

    Attributes:
        scale: What one of ``values`` is worth.
        values: The values as the server adds them: signed integers or floats [sum_length of the codec].
        trained: One bit a tensor, packed: whether the client trained it; empty where all train all.
    """

    client_id: str
    weight: float
    scale: float
    values: Signed = field(repr=False)
    trained: bytes = b""

    def alone(self, codec: Codec, length: int) -> EncodedSum:
        """Return the message as the sum of itself, of a vector of D = ``length`` values."""
        return EncodedSum(
            sum_M=self.values,
            codec=codec.name,
            scale=self.scale,
            length=length,
            survivors=1,
            total_weight=self.weight,
        )


def kind_of(encoded: Encoded) -> str:
    """Return how the values of an encoding travel."""
    if encoded.values_M.dtype == np.float16:
        return "float16"
    if encoded.values_M.dtype == np.float32:
        return "float32" if encoded.num_bits == 32 else "bfloat16"
    return "integer"


def to_bytes(encoded: Encoded, *, client_id: str, weight: float, trained: bytes = b"") -> bytes:
    """Return the message a client sends where updates are not masked; ``trained`` as in :class:`Received`."""
    kind, values_M = kind_of(encoded), encoded.values_M
    if kind == "integer":
        payload = pack_bits(values_M.astype(np.uint32, copy=False), encoded.num_bits)
    elif kind == "bfloat16":
        payload = (values_M.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()
    else:
        payload = values_M.astype("<f4" if kind == "float32" else "<f2", copy=False).tobytes()
    sparse = encoded.indices_M is not None
    positions = pack_positions(encoded.indices_M, encoded.length) if encoded.indices_M is not None else b""
    fields = [VERSION, client_id, encoded.codec, _KINDS.index(kind), encoded.num_bits, encoded.scale]
    header: bytes = msgpack.packb([*fields, encoded.length, len(values_M), weight, sparse, trained])
    return len(header).to_bytes(2, "little") + header + positions + payload


def read(message: bytes, *, length: int, codec: Codec) -> Received:
    """Return a client's message for a vector of D = ``length`` values, as the server adds it.

    Args:
        message: What the client sent.
        length: D.
        codec: The codec of this round: it says what the message must look like, and decodes it where it has to be
            decoded before it is added.

    Raises:
        ProtocolError: If the message is malformed, or not what this codec sends.
    """
    header, body = _opened(message)
    wire = codec.wire(length)
    given = (header.codec, header.length, header.values, header.num_bits, header.kind, header.sparse)
    expected = (codec.name, length, wire.values, wire.num_bits, wire.kind, wire.sparse)
    if given != expected:
        raise ProtocolError(f"The message is {_words(given)}, expected {_words(expected)}.")
    encoded = _encoded(header, body)
    alone = codec.properties.needs_individual
    return Received(
        client_id=header.client_id,
        weight=header.weight,
        scale=1.0 if alone else header.scale,
        values=codec.decode_one(encoded) if alone else signed(encoded),
        trained=header.trained,
    )


def signed(encoded: Encoded) -> Signed:
    """Return the values of an encoding without a ring, ready to add: signed integers, or floats."""
    if encoded.values_M.dtype == np.uint32:
        # as from_ring, in half the memory: the sign bit moved to the top and back
        unused = 32 - encoded.num_bits
        words = np.left_shift(encoded.values_M, np.uint32(unused), dtype=np.uint32).view(np.int32)
        return np.right_shift(words, unused, out=words).astype(np.int64)
    return encoded.values_M.astype(np.float64)


def sum_of_one(encoded: Encoded, codec: Codec, weight: float = 1.0) -> EncodedSum:
    """Return one encoding as the sum of itself, with or without a ring."""
    individual = codec.properties.needs_individual
    return EncodedSum(
        sum_M=codec.decode_one(encoded) if individual else signed(encoded),
        codec=encoded.codec,
        scale=1.0 if individual else encoded.scale,
        length=encoded.length,
        survivors=1,
        total_weight=weight,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    client_id: str
    codec: str
    kind: str
    num_bits: int
    scale: float
    length: int
    values: int
    weight: float
    sparse: bool
    trained: bytes


def _opened(message: bytes) -> tuple[_Header, memoryview]:
    """Return the header, checked field by field, and the rest, whose length fits it."""
    size = int.from_bytes(message[:2], "little")
    if size > _MAX_HEADER or len(message) < 2 + size:
        raise ProtocolError("The message is shorter than its header says.")
    try:
        fields = msgpack.unpackb(message[2 : 2 + size], strict_map_key=True)
        version, client_id, codec, kind, bits, scale, length, values, weight, sparse, trained = fields
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"The message's header cannot be read: {error}") from error
    if type(version) is not int or version != VERSION:
        raise ProtocolError(f"The message has version {version!r}, expected {VERSION}.")
    _check_fields(client_id, codec, kind, bits, scale, length, values, weight, sparse, trained)
    header = _Header(
        client_id=client_id,
        codec=codec,
        kind=_KINDS[kind],
        num_bits=bits,
        scale=scale,
        length=length,
        values=values,
        weight=weight,
        sparse=sparse,
        trained=trained,
    )
    body = memoryview(message)[2 + size :]
    wanted = packed_size(bits, values) + (positions_size(length, values) if sparse else 0)
    if len(body) != wanted:
        raise ProtocolError(f"The payload has {len(body)} bytes, expected {wanted}.")
    return header, body


def _check_fields(
    client_id: Any,
    codec: Any,
    kind: Any,
    bits: Any,
    scale: Any,
    length: Any,
    values: Any,
    weight: Any,
    sparse: Any,
    trained: Any,
) -> None:
    """Refuse a header whose values could crash or poison the sum: a client may send anything.

    Raises:
        ProtocolError: If a field is of another type or out of range.
    """
    sound = (
        isinstance(client_id, str)
        and isinstance(codec, str)
        and type(kind) is int
        and 0 <= kind < len(_KINDS)
        and type(bits) is int
        and 1 <= bits <= 32
        and bits == _FLOAT_BITS.get(_KINDS[kind], bits)
        and type(length) is int
        and type(values) is int
        and values >= 0
        and length >= 0
        and type(sparse) is bool
        and (not sparse or values <= length)
        and isinstance(scale, float)
        and 0 < scale < math.inf
        and isinstance(weight, float)
        and 0 <= weight < math.inf
        and isinstance(trained, bytes)
    )
    if not sound:
        raise ProtocolError("The message's header holds a value of another type or out of range.")


def _encoded(header: _Header, body: memoryview) -> Encoded:
    """Return the encoding in a body of the right length."""
    positions = positions_size(header.length, header.values) if header.sparse else 0
    data, indices_M = bytes(body[positions:]), None
    if header.sparse:
        indices_M = unpack_positions(bytes(body[:positions]), header.length, header.values)
    return Encoded(
        values_M=_values(data, header),
        codec=header.codec,
        num_bits=header.num_bits,
        scale=header.scale,
        length=header.length,
        l2_bound=None,
        indices_M=indices_M,
    )


def _values(data: bytes, header: _Header) -> Any:
    if header.kind == "integer":
        return unpack_bits(data, header.num_bits, header.values)
    if header.kind == "bfloat16":
        values_M = (np.frombuffer(data, dtype="<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        values_M = np.frombuffer(data, dtype="<f4" if header.kind == "float32" else "<f2")
    if not np.isfinite(values_M).all():
        raise ProtocolError(f"The message of {header.client_id} holds NaN or infinity, expected finite values.")
    return values_M


def _words(shape: tuple[str, int, int, int, str, bool]) -> str:
    codec, length, values, bits, kind, sparse = shape
    return (
        f"{values} {bits}-bit {kind} values of a vector of {length} by {codec!r}{', with positions' if sparse else ''}"
    )


__all__ = [
    "Received",
    "Wire",
    "kind_of",
    "pack_bits",
    "packed_size",
    "read",
    "signed",
    "sum_of_one",
    "to_bytes",
    "unpack_bits",
]
