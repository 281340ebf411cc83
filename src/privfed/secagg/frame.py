"""The outer form of every message: fixed header, canonical msgpack fields, raw payload, trailer.

::

    offset  size  field
    0       4     magic "PFSA"
    4       1     version, 2
    5       1     stage
    6       2     party: number of the client that sends (odd stage) or receives (even stage)
    8       4     length of the fields
    12      8     length of the payload
    20      16    the first bytes of the SHA-256 of the session's parameters
    36      ...   fields (msgpack), payload (little-endian), trailer over all before it

All numbers are little-endian. The trailer is the client's Ed25519 signature (64 bytes) where other clients read
the message, a tag that only this client and the server can make (16 bytes) where the server alone reads it, and a
CRC-32 (4 bytes) on messages of the server, whose parts that matter are signed or sealed by clients. The lengths are
compared with the message and with what the session allows before anything is parsed, and the fields must be in
msgpack's one shortest form.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import msgpack

from privfed.errors import MessageError
from privfed.secagg.identity import SIGNATURE_BYTES
from privfed.secagg.keys import TAG_BYTES

MAGIC = b"PFSA"
VERSION = 2
HEADER = struct.Struct("<4sBBHIQ16s")
CRC_BYTES = 4
_CONTEXT_BYTES = 16


class Stage(IntEnum):
    """Which message this is; the odd ones travel to the server, the even ones to a client."""

    ADVERTISE = 1
    ROSTER = 2
    SHARE = 3
    SHARES = 4
    MASKED = 5
    SURVIVORS = 6
    AGREE = 7
    AGREEMENT = 8
    UNMASK = 9


TRAILER_BYTES = {stage: TAG_BYTES if stage % 2 else CRC_BYTES for stage in Stage} | {
    Stage.ADVERTISE: SIGNATURE_BYTES,
    Stage.AGREE: SIGNATURE_BYTES,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a receiver accepts of one stage: parties below ``parties``, and the lengths of fields and payload."""

    parties: int
    fields_bytes: int
    payload_bytes: int
    exact_payload: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A message whose outer form was checked; its trailer and the meaning of its fields were not.

    Attributes:
        party: Number of the client that sends or receives.
        fields: As msgpack gives them.
        message: The whole message.
        payload_at: Where in it the payload starts; the trailer follows it.
        payload_end: Where the payload ends.
    """

    party: int
    fields: Any = field(repr=False)
    message: bytes = field(repr=False)
    payload_at: int
    payload_end: int

    @property
    def payload(self) -> memoryview:
        """The raw payload."""
        return memoryview(self.message)[self.payload_at : self.payload_end]

    @property
    def body(self) -> memoryview:
        """All that the trailer covers."""
        return memoryview(self.message)[: self.payload_end]

    @property
    def trailer(self) -> bytes:
        """The signature, tag or checksum."""
        return self.message[self.payload_end :]


def canonical(value: Any) -> bytes:
    """Return ``value`` (lists, text, bytes, integers) in msgpack's shortest form."""
    return bytes(msgpack.packb(value, use_bin_type=True))


def context_digest(*parts: Any) -> bytes:
    """Return the SHA-256 of ``parts``, which no two different sessions share."""
    return hashlib.sha256(canonical(list(parts))).digest()


def head(stage: Stage, context: bytes, party: int, fields: Any, payload_bytes: int = 0) -> bytes:
    """Return a message up to its payload."""
    packed = canonical(fields)
    start = HEADER.pack(MAGIC, VERSION, stage, party, len(packed), payload_bytes, context[:_CONTEXT_BYTES])
    return start + packed


def with_checksum(body: bytes) -> bytes:
    """Return a server's message: ``body`` and its CRC-32."""
    return body + zlib.crc32(body).to_bytes(CRC_BYTES, "little")


def decode(message: bytes, stage: Stage, context: bytes, limits: Limits) -> Frame:
    """Return the parts of a message of this stage and session.

    The trailer of a server's message is checked here; a client's signature or tag is for the caller to check.

    Raises:
        MessageError: If the message is malformed, damaged, of another stage, or of another round or configuration.
    """
    trailer = TRAILER_BYTES[stage]
    if not isinstance(message, bytes) or len(message) < HEADER.size + trailer:
        raise MessageError(f"Expected a {stage.name} message; got something shorter than its header.")
    magic, version, kind, party, fields_size, payload_size, got_context = HEADER.unpack_from(message)
    if magic != MAGIC or version != VERSION:
        raise MessageError(f"Expected a secure-aggregation message of version {VERSION}; run one version everywhere.")
    if kind != stage:
        raise MessageError(f"Expected a {stage.name} message; got stage {kind}.")
    if got_context != context[:_CONTEXT_BYTES]:
        raise MessageError(f"The {stage.name} message belongs to another round, configuration or cohort.")
    if party >= limits.parties:
        raise MessageError(f"The {stage.name} message names client number {party} of a cohort of {limits.parties}.")
    fits = payload_size == limits.payload_bytes if limits.exact_payload else payload_size <= limits.payload_bytes
    if fields_size > limits.fields_bytes or not fits:
        raise MessageError(f"The {stage.name} message claims sizes that this session does not allow.")
    at_payload = HEADER.size + fields_size
    end = at_payload + payload_size
    if end + trailer != len(message):
        raise MessageError(f"The {stage.name} message is shorter or longer than its header says.")
    if stage % 2 == 0 and zlib.crc32(memoryview(message)[:end]) != int.from_bytes(message[end:], "little"):
        raise MessageError(f"The {stage.name} message was damaged on its way; its checksum differs.")
    fields = _unpack(message[HEADER.size : at_payload])
    return Frame(party=party, fields=fields, message=message, payload_at=at_payload, payload_end=end)


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
        raise MessageError("The fields of a message are not valid msgpack.") from error
    if canonical(fields) != raw:
        raise MessageError("The fields of a message are not in canonical form.")
    return fields
