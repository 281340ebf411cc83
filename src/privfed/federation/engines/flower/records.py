"""Bytes as Flower's records: the message in chunks, each an array of its own, and its length and digest beside them."""

from __future__ import annotations

import hashlib

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from privfed.errors import MessageError
from privfed.federation.engines.flower.envelope import MOST_BYTES

CHUNK_BYTES = 4 * 2**20
_HEAD, _BODY = "privfed.head", "privfed.body"
_STYPE = "privfed.bytes"


def to_records(message: bytes) -> RecordDict:
    """Return a message as records."""
    chunks = [message[at : at + CHUNK_BYTES] for at in range(0, len(message), CHUNK_BYTES)]
    arrays = {
        f"{number:06d}": Array(dtype="uint8", shape=(len(chunk),), stype=_STYPE, data=chunk)
        for number, chunk in enumerate(chunks)
    }
    head = ConfigRecord({"bytes": len(message), "sha256": hashlib.sha256(message).hexdigest()})
    return RecordDict({_HEAD: head, _BODY: ArrayRecord(arrays)})


def from_records(records: RecordDict) -> bytes:
    """Return the message in records.

    Raises:
        MessageError: If it is not whole, or too large.
    """
    try:
        head, body = records[_HEAD], records[_BODY]
    except KeyError as error:
        raise MessageError("Got a Flower message that privfed did not make.") from error
    if not isinstance(head, ConfigRecord) or not isinstance(body, ArrayRecord):
        raise MessageError("Got a Flower message with records of other kinds than privfed makes.")
    size = head.get("bytes")
    if not isinstance(size, int) or not 0 <= size <= MOST_BYTES:
        raise MessageError(f"A Flower message claims {size!r} bytes, expected at most {MOST_BYTES}.")
    message = b"".join(body[name].data for name in sorted(body))
    if len(message) != size or hashlib.sha256(message).hexdigest() != head.get("sha256"):
        raise MessageError("A Flower message was damaged on its way: its length or digest differs.")
    return message
