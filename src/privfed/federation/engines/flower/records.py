"""Bytes as Flower's records: the message in chunks, each an array of its own, and its length and digest beside them.

A small message is one record with all three. Flower asks for every record, array and chunk on its own, at every hop:
the fewer there are, the sooner a message that carries little is there.
"""

from __future__ import annotations

import hashlib

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from privfed.errors import MessageError
from privfed.federation.engines.flower.envelope import MOST_BYTES

CHUNK_BYTES = 4 * 2**20
SMALL_BYTES = 2**18
_HEAD, _BODY = "privfed.head", "privfed.body"
_INLINE = "message"
_STYPE = "privfed.bytes"


def to_records(message: bytes) -> RecordDict:
    """Return a message as records."""
    about: dict[str, int | str] = {"bytes": len(message), "sha256": hashlib.sha256(message).hexdigest()}
    if len(message) <= SMALL_BYTES:
        return RecordDict({_HEAD: ConfigRecord({**about, _INLINE: message})})
    chunks = [message[at : at + CHUNK_BYTES] for at in range(0, len(message), CHUNK_BYTES)]
    arrays = {
        f"{number:06d}": Array(dtype="uint8", shape=(len(chunk),), stype=_STYPE, data=chunk)
        for number, chunk in enumerate(chunks)
    }
    return RecordDict({_HEAD: ConfigRecord({**about}), _BODY: ArrayRecord(arrays)})


def from_records(records: RecordDict) -> bytes:
    """Return the message in records.

    Raises:
        MessageError: If it is not whole, or too large.
    """
    head, body = records.get(_HEAD), records.get(_BODY)
    if head is None:
        raise MessageError("Got a Flower message that privfed did not make.")
    if not isinstance(head, ConfigRecord) or not isinstance(body, ArrayRecord | None):
        raise MessageError("Got a Flower message with records of other kinds than privfed makes.")
    size, inline = head.get("bytes"), head.get(_INLINE)
    if not isinstance(size, int) or not 0 <= size <= MOST_BYTES:
        raise MessageError(f"A Flower message claims {size!r} bytes, expected at most {MOST_BYTES}.")
    message = inline if isinstance(inline, bytes) else _joined(body)
    if len(message) != size or hashlib.sha256(message).hexdigest() != head.get("sha256"):
        raise MessageError("A Flower message was damaged on its way: its length or digest differs.")
    return message


def _joined(body: ArrayRecord | None) -> bytes:
    return b"" if body is None else b"".join(body[name].data for name in sorted(body))
