"""The messages between the server and a site: one msgpack map each, a site's signed with its long-lived key.

Flower's own node authentication signs no message, so a reply carries a signature of the site that the roster pins. It
covers the digest of what was asked: a reply to one message is worth nothing as a reply to another.

What clients send in masked rounds has signatures and tags of its own inside (`privfed.secagg`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgpack

from privfed.errors import MessageError
from privfed.secagg.identity import SIGNATURE_BYTES, Identity, check_signature

VERSION = 1
MOST_BYTES = 2**31
KINDS = ("hello", "open", "keys", "shares", "train", "agree", "unmask", "close")
Status = Literal["ok", "refused", "unopened"]
STATUSES = ("ok", "refused", "unopened")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What the server asks of a site.

    Attributes:
        kind: One of ``KINDS``.
        run_id: The run.
        body: What the kind needs, in msgpack's types.
    """

    kind: str
    run_id: str
    body: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def to_bytes(self) -> bytes:
        """Return the message."""
        return bytes(msgpack.packb([VERSION, self.kind, self.run_id, dict(self.body)], use_bin_type=True))

    @staticmethod
    def from_bytes(message: bytes) -> Ask:
        """Return the ask in a message.

        Raises:
            MessageError: If it is malformed or of another version.
        """
        version, kind, run_id, body = _unpacked(message, 4, "server's message")
        if version != VERSION or kind not in KINDS or not isinstance(run_id, str) or not isinstance(body, dict):
            raise MessageError(
                f"Got a message of version {version!r} and kind {kind!r}; run one version of privfed everywhere."
            )
        return Ask(kind=kind, run_id=run_id, body=body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a site answers.

    Attributes:
        status: ``ok``; ``refused``, with the reason; or ``unopened``: the site does not know the run (any more).
        reason: Why, where it is not ok.
        body: What the kind of ask gives.
    """

    site: str
    status: Status = "ok"
    reason: str = ""
    body: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def to_bytes(self, ask: bytes, identity: Identity) -> bytes:
        """Return the message, signed as the reply to ``ask``."""
        packed: bytes = msgpack.packb(
            [VERSION, self.site, self.status, self.reason, dict(self.body)], use_bin_type=True
        )
        return packed + identity.sign(_context(ask), packed)

    @staticmethod
    def from_bytes(message: bytes, ask: bytes, roster: Mapping[str, bytes]) -> Reply:
        """Return the reply in a message.

        Args:
            message: As ``to_bytes`` made it.
            ask: What it answers.
            roster: The sites' pinned identities.

        Raises:
            MessageError: If it is malformed, or from a site that the roster does not have.
            AuthenticityError: If that site did not sign it as an answer to this ask.
        """
        packed, signature = message[:-SIGNATURE_BYTES], message[-SIGNATURE_BYTES:]
        version, site, status, reason, body = _unpacked(packed, 5, "site's reply")
        if version != VERSION or status not in STATUSES or not isinstance(reason, str) or not isinstance(body, dict):
            raise MessageError(f"Got a site's reply of version {version!r}; run one version of privfed everywhere.")
        if site not in roster:
            raise MessageError(f"Got a reply of site {site!r}, which the roster does not have.")
        check_signature(roster[site], signature, _context(ask), packed, who=site, what="reply")
        return Reply(site=site, status=status, reason=reason, body=body)


def _context(ask: bytes) -> bytes:
    return hashlib.sha256(b"privfed site reply\0" + ask).digest()


def _unpacked(message: bytes, parts: int, what: str) -> list[Any]:
    if len(message) > MOST_BYTES:
        raise MessageError(f"The {what} has {len(message)} bytes, expected at most {MOST_BYTES}.")
    try:
        found = msgpack.unpackb(message, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise MessageError(f"The {what} cannot be read: {error}.") from error
    if not isinstance(found, list) or len(found) != parts:
        raise MessageError(f"The {what} is not a list of {parts} parts.")
    return found


def bytes_by_client(body: Mapping[str, Any], name: str) -> dict[str, bytes]:
    """Return a map from client to bytes out of a body; empty where it is not there.

    Raises:
        MessageError: If it is anything else.
    """
    found = body.get(name, {})
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, bytes) for k, v in found.items()):
        raise MessageError(f"Expected {name} as bytes by client.")
    return found
