"""The outer form of every message: fixed header, sender, canonical msgpack fields, raw payload, checksum.

::

    offset  size  field
    0       4     magic "PFSA"
    4       1     version
    5       1     stage
    6       2     length of the sender's id (0: the server)
    8       4     length of the fields
    12      8     length of the payload
    20      32    SHA-256 of the session's parameters
    52      ...   sender (UTF-8), fields (msgpack), payload (little-endian), CRC-32 of all before it

All numbers are little-endian. The lengths are compared with the message and with what the session allows
before anything is parsed, and the fields must be in msgpack's one shortest form. The CRC finds accidents
(every single changed byte among them); it is no protection from an attacker, who can compute it as well.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import msgpack

from privfed.errors import ProtocolError

MAGIC = b"PFSA"
VERSION = 1
HEADER = struct.Struct("<4sBBHIQ32s")
CHECKSUM = struct.Struct("<I")


class Stage(IntEnum):
    """Which message this is; the odd ones travel to the server, the even ones to a client."""

    ADVERTISE = 1
    ROSTER = 2
    SHARE = 3
    SHARES = 4
    MASKED = 5
    SURVIVORS = 6
    UNMASK = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a receiver accepts of one stage.

    Attributes:
        sender_bytes: The longest id.
        fields_bytes: The longest fields.
        payload_bytes: The exact length of the payload.
    """

    sender_bytes: int
    fields_bytes: int
    payload_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A message whose outer form was checked; the meaning of its fields was not."""

    sender: str
    fields: Any = field(repr=False)
    payload: memoryview = field(repr=False)


def canonical(value: Any) -> bytes:
    """Return ``value`` (lists, text, bytes, integers) in msgpack's shortest form."""
    return bytes(msgpack.packb(value, use_bin_type=True))


def context_digest(*parts: Any) -> bytes:
    """Return the SHA-256 of ``parts``, which no two different sessions share."""
    return hashlib.sha256(canonical(list(parts))).digest()


def encode(stage: Stage, context: bytes, sender: str, fields: Any, payload: bytes | memoryview = b"") -> bytes:
    """Return one message as bytes."""
    name, packed = sender.encode(), canonical(fields)
    header = HEADER.pack(MAGIC, VERSION, stage, len(name), len(packed), len(payload), context)
    head = header + name + packed
    checksum = zlib.crc32(payload, zlib.crc32(head))
    return b"".join((head, payload, CHECKSUM.pack(checksum)))


def decode(message: bytes, stage: Stage, context: bytes, limits: Limits) -> Frame:
    """Return the parts of a message of this stage and session.

    Raises:
        ProtocolError: If the message is malformed, damaged, of another stage, or of another round or
            configuration.
    """
    if not isinstance(message, bytes) or len(message) < HEADER.size + CHECKSUM.size:
        raise ProtocolError(f"Expected a {stage.name} message; got something shorter than its header.")
    magic, version, kind, sender_size, fields_size, payload_size, got_context = HEADER.unpack_from(message)
    if magic != MAGIC or version != VERSION:
        raise ProtocolError(f"Expected a secure-aggregation message of version {VERSION}; run one version everywhere.")
    if kind != stage:
        raise ProtocolError(f"Expected a {stage.name} message; got stage {kind}.")
    if got_context != context:
        raise ProtocolError(f"The {stage.name} message belongs to another round, configuration or cohort.")
    if sender_size > limits.sender_bytes or fields_size > limits.fields_bytes or payload_size != limits.payload_bytes:
        raise ProtocolError(f"The {stage.name} message claims sizes that this session does not allow.")
    if HEADER.size + sender_size + fields_size + payload_size + CHECKSUM.size != len(message):
        raise ProtocolError(f"The {stage.name} message is shorter or longer than its header says.")
    body = memoryview(message)
    if CHECKSUM.unpack(body[-CHECKSUM.size :])[0] != zlib.crc32(body[: -CHECKSUM.size]):
        raise ProtocolError(f"The {stage.name} message was damaged on its way; its checksum differs.")
    at_fields = HEADER.size + sender_size
    at_payload = at_fields + fields_size
    return Frame(
        sender=_text(bytes(body[HEADER.size : at_fields])),
        fields=_unpack(bytes(body[at_fields:at_payload])),
        payload=body[at_payload : -CHECKSUM.size],
    )


def _text(raw: bytes) -> str:
    """Return UTF-8 as text."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError("The sender's id is not UTF-8.") from error


def _unpack(raw: bytes) -> Any:
    """Return msgpack fields, refusing maps, extension types, claims beyond the input and long forms."""
    most = len(raw)
    try:
        fields = msgpack.unpackb(
            raw,
            raw=False,
            use_list=True,
            strict_map_key=True,
            max_str_len=most,
            max_bin_len=most,
            max_array_len=most,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError("The fields of a message are not valid msgpack.") from error
    if canonical(fields) != raw:
        raise ProtocolError("The fields of a message are not in canonical form.")
    return fields
