"""The seven messages of a session, each with its encoder and its checking decoder.

========== ================== =============================================================================
stage      from -> to         fields (all lists sorted by client id); payload
========== ================== =============================================================================
ADVERTISE  client -> server   masking key, channel key, seed commitment
ROSTER     server -> client   [id, masking key, channel key, seed commitment] of each client that advertised
SHARE      client -> server   digest of the roster, [dst, sealed shares] for every other client of it
SHARES     server -> client   the recipient's id, [src, sealed shares] from every other client that shared
MASKED     client -> server   digest of the ids that shared, tag; the masked vector as payload
SURVIVORS  server -> client   ids whose masked vectors are in the sum
UNMASK     client -> server   [id, share of the seed] of survivors, [id, share of the masking key] of the rest
========== ================== =============================================================================

Source: Bonawitz et al. 2017, figure 4 (rounds 0 to 4). The two digests are this project's: they turn a roster
or a set of shares that differs between clients into a refusal where it would else give a wrong sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from privfed.errors import ProtocolError
from privfed.secagg.frame import Frame, Limits, Stage, context_digest, decode, encode
from privfed.secagg.keys import KEY_BYTES, SEAL_BYTES, PublicKeys
from privfed.secagg.ring import UInt32
from privfed.secagg.session import MAX_ID_BYTES, SessionParams
from privfed.secagg.shamir import SHARE_BYTES, is_share

SEALED_BYTES = 2 * SHARE_BYTES + SEAL_BYTES
"""A share of the masking key and a share of the seed, sealed."""
_FIELDS_BASE, _FIELDS_PER_CLIENT = 512, MAX_ID_BYTES + 128
_SERVER = ""

Roster = dict[str, PublicKeys]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reveal:
    """One client's answer to the list of survivors: one kind of share for each peer."""

    seed_shares: dict[str, bytes] = field(repr=False)
    key_shares: dict[str, bytes] = field(repr=False)


def roster_digest(roster: Mapping[str, PublicKeys]) -> bytes:
    """Return the digest that two parties share only if they saw the same roster."""
    return context_digest("roster", _roster_fields(roster))


def ids_digest(ids: Iterable[str]) -> bytes:
    """Return the digest that two parties share only if they mean the same set of clients."""
    return context_digest("ids", sorted(ids))


def vector_digest(masked_M: UInt32) -> bytes:
    """Return the SHA-256 of a masked vector as it travels."""
    return hashlib.sha256(_payload(masked_M)).digest()


class Wire:
    """Encoders and decoders for one session.

    A decoder returns only values of the right type, size and order that name clients of the cohort; whether
    they fit what happened before is for the session to check. Every decoder raises ``ProtocolError``
    otherwise.

    Args:
        params: The session's parameters; their digest is part of every header.
    """

    def __init__(self, params: SessionParams) -> None:
        self._params = params
        self._known = frozenset(params.clients)
        self._context = context_digest(*params.scope, params.clients, params.threshold, params.length, params.ring_bits)

    def encode_advertise(self, sender: str, public: PublicKeys) -> bytes:
        """Return an ADVERTISE message."""
        return self._encode(Stage.ADVERTISE, sender, _key_fields(public))

    def decode_advertise(self, message: bytes) -> tuple[str, PublicKeys]:
        """Return the sender and its public keys."""
        frame = self._decode(Stage.ADVERTISE, message)
        return frame.sender, _keys(frame.fields)

    def encode_roster(self, roster: Roster) -> bytes:
        """Return a ROSTER message."""
        return self._encode(Stage.ROSTER, _SERVER, _roster_fields(roster))

    def decode_roster(self, message: bytes) -> Roster:
        """Return the advertised keys by client id; no public key occurs twice."""
        rows = _rows(self._decode(Stage.ROSTER, message).fields, 4)
        self._check_ids([row[0] for row in rows])
        roster = {row[0]: _keys(row[1:]) for row in rows}
        used = [key for keys in roster.values() for key in (keys.masking, keys.channel)]
        if len(set(used)) != len(used):
            raise ProtocolError("A public key occurs twice in the roster; every client needs its own.")
        return roster

    def encode_share(self, sender: str, digest: bytes, sealed: Mapping[str, bytes]) -> bytes:
        """Return a SHARE message."""
        return self._encode(Stage.SHARE, sender, [digest, _pair_fields(sealed)])

    def decode_share(self, message: bytes) -> tuple[str, bytes, dict[str, bytes]]:
        """Return the sender, the digest of the roster it saw, and its sealed shares by recipient."""
        frame = self._decode(Stage.SHARE, message)
        digest, pairs = _list(frame.fields, 2)
        return frame.sender, _bytes(digest, KEY_BYTES), self._pairs(pairs, SEALED_BYTES)

    def encode_shares(self, recipient: str, sealed: Mapping[str, bytes]) -> bytes:
        """Return a SHARES message."""
        return self._encode(Stage.SHARES, _SERVER, [recipient, _pair_fields(sealed)])

    def decode_shares(self, message: bytes) -> tuple[str, dict[str, bytes]]:
        """Return the recipient and the sealed shares by sender."""
        recipient, pairs = _list(self._decode(Stage.SHARES, message).fields, 2)
        self._check_ids([recipient])
        return recipient, self._pairs(pairs, SEALED_BYTES)

    def encode_masked(self, sender: str, digest: bytes, tag: bytes, masked_M: UInt32) -> bytes:
        """Return a MASKED message."""
        return self._encode(Stage.MASKED, sender, [digest, tag], _payload(masked_M))

    def decode_masked(self, message: bytes) -> tuple[str, bytes, bytes, UInt32]:
        """Return the sender, the digest of the ids it masked against, its tag and a view of its vector."""
        frame = self._decode(Stage.MASKED, message)
        digest, tag = (_bytes(one, KEY_BYTES) for one in _list(frame.fields, 2))
        return frame.sender, digest, tag, np.frombuffer(frame.payload, dtype="<u4")

    def encode_survivors(self, survivors: Iterable[str]) -> bytes:
        """Return a SURVIVORS message."""
        return self._encode(Stage.SURVIVORS, _SERVER, sorted(survivors))

    def decode_survivors(self, message: bytes) -> tuple[str, ...]:
        """Return the ids of the survivors."""
        ids = _list(self._decode(Stage.SURVIVORS, message).fields)
        self._check_ids(ids)
        return tuple(ids)

    def encode_unmask(self, sender: str, reveal: Reveal) -> bytes:
        """Return an UNMASK message."""
        fields = [_pair_fields(reveal.seed_shares), _pair_fields(reveal.key_shares)]
        return self._encode(Stage.UNMASK, sender, fields)

    def decode_unmask(self, message: bytes) -> tuple[str, Reveal]:
        """Return the sender and its shares, each a field element, of disjoint sets of peers."""
        frame = self._decode(Stage.UNMASK, message)
        seeds, keys = (self._pairs(pairs, SHARE_BYTES) for pairs in _list(frame.fields, 2))
        if not seeds.keys().isdisjoint(keys):
            raise ProtocolError(f"Client {frame.sender!r} revealed both shares of one peer; its answer is refused.")
        if not all(map(is_share, [*seeds.values(), *keys.values()])):
            raise ProtocolError(f"Client {frame.sender!r} revealed a share outside the field.")
        return frame.sender, Reveal(seed_shares=seeds, key_shares=keys)

    def _encode(self, stage: Stage, sender: str, fields: Any, payload: bytes | memoryview = b"") -> bytes:
        return encode(stage, self._context, sender, fields, payload)

    def _decode(self, stage: Stage, message: bytes) -> Frame:
        """Check the outer form and that the sender can have sent such a message."""
        from_client = stage % 2 == 1
        limits = Limits(
            sender_bytes=MAX_ID_BYTES if from_client else 0,
            fields_bytes=_FIELDS_BASE + _FIELDS_PER_CLIENT * len(self._params.clients),
            payload_bytes=self._params.payload_bytes if stage is Stage.MASKED else 0,
        )
        frame = decode(message, stage, self._context, limits)
        if from_client and frame.sender not in self._known:
            raise ProtocolError(f"Client {frame.sender!r} is not in this round's cohort.")
        return frame

    def _check_ids(self, ids: list[Any]) -> None:
        """Refuse ids that are not sorted, distinct members of the cohort."""
        if not all(type(one) is str and one in self._known for one in ids):
            raise ProtocolError("A message names a client that is not in this round's cohort.")
        if any(a >= b for a, b in pairwise(ids)):
            raise ProtocolError("A message names clients twice or out of order.")

    def _pairs(self, value: Any, size: int) -> dict[str, bytes]:
        """Return a list of [id, bytes of this size] as a mapping."""
        rows = _rows(value, 2)
        self._check_ids([row[0] for row in rows])
        return {row[0]: _bytes(row[1], size) for row in rows}


def _payload(masked_M: UInt32) -> bytes | memoryview:
    """Return a vector as little-endian bytes, without a copy where the processor is little-endian."""
    return masked_M.astype("<u4", copy=False).data.cast("B") if masked_M.size else b""


def _key_fields(public: PublicKeys) -> list[bytes]:
    return [public.masking, public.channel, public.seed_commitment]


def _roster_fields(roster: Mapping[str, PublicKeys]) -> list[Any]:
    return [[client, *_key_fields(roster[client])] for client in sorted(roster)]


def _pair_fields(values: Mapping[str, bytes]) -> list[Any]:
    return [[client, values[client]] for client in sorted(values)]


def _keys(value: Any) -> PublicKeys:
    """Return three fields as public keys."""
    masking, channel, commitment = (_bytes(one, KEY_BYTES) for one in _list(value, 3))
    if masking == channel:
        raise ProtocolError("A client advertised one key for masking and for sealing; it needs two.")
    return PublicKeys(masking=masking, channel=channel, seed_commitment=commitment)


def _rows(value: Any, width: int) -> list[list[Any]]:
    """Return a list of lists of this width."""
    return [_list(row, width) for row in _list(value)]


def _list(value: Any, width: int | None = None) -> list[Any]:
    """Return a list, of this width if one is given."""
    if type(value) is not list or (width is not None and len(value) != width):
        raise ProtocolError("The fields of a message do not have the form of its stage.")
    return value


def _bytes(value: Any, size: int) -> bytes:
    """Return bytes of this size."""
    if type(value) is not bytes or len(value) != size:
        raise ProtocolError(f"A field of a message is not {size} bytes long.")
    return value
