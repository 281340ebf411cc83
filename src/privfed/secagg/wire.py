"""The nine messages of a session, each with its encoder and its checking decoder.

========== ================== =============================================================================
stage      from -> to         fields; payload; trailer
========== ================== =============================================================================
ADVERTISE  client -> server   masking key, channel key, seed commitment; none; signature
ROSTER     server -> client   server's key, who advertised; keys and signature of each neighbour that did
SHARE      client -> server   who advertised; sealed shares for each neighbour that did; tag
SHARES     server -> client   who shared; sealed shares from each neighbour that did
MASKED     client -> server   who shared, confirmations for each neighbour that did; the masked vector; tag
SURVIVORS  server -> client   whose vector is in the sum; confirmations from each neighbour of these
AGREE      client -> server   who shared, who survived; none; signature
AGREEMENT  server -> client   who signed; their AGREE signatures
UNMASK     client -> server   none; one share for itself and each neighbour that shared; tag
========== ================== =============================================================================

A set of clients ("who") is a bitmap of the whole cohort. What belongs to several clients is in the order of their
numbers, which are their places in the sorted cohort. An UNMASK message has no room for two shares of one client:
it holds the seed's share of those that survived and the key's share of those that did not.

Source: Bonawitz et al. 2017, figure 4 (rounds 0 to 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.errors import AuthenticityError, MessageError
from privfed.secagg import frame
from privfed.secagg.frame import Frame, Limits, Stage
from privfed.secagg.graph import from_bitmap, session_graph, to_bitmap
from privfed.secagg.identity import SIGNATURE_BYTES, Identity, check_signature
from privfed.secagg.keys import KEY_BYTES, TAG_BYTES, PublicKeys, same, tag
from privfed.secagg.ring import padding_is_zero
from privfed.secagg.session import SessionParams
from privfed.secagg.shamir import SHARE_BYTES, is_share

SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES
"""A share of the masking key and a share of the seed, sealed."""
CARD_BYTES = 3 * KEY_BYTES + SIGNATURE_BYTES
"""What a client advertised, and its signature."""
_FIELDS_BASE = 128  # more than the fixed parts of any fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a client advertised, with its signature, as other clients receive it."""

    keys: PublicKeys
    signature: bytes

    def to_bytes(self) -> bytes:
        """Return the card as it travels in a roster."""
        return self.keys.masking + self.keys.channel + self.keys.seed_commitment + self.signature

    @classmethod
    def from_bytes(cls, raw: bytes) -> Card:
        """Return the card that ``to_bytes`` gave."""
        masking, channel, commitment = (raw[at : at + KEY_BYTES] for at in range(0, 3 * KEY_BYTES, KEY_BYTES))
        keys = PublicKeys(masking=masking, channel=channel, seed_commitment=commitment)
        return cls(keys=keys, signature=raw[3 * KEY_BYTES :])


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedInput:
    """A MASKED message: who sent it, the sharers and confirmations, and where the packed vector is."""

    sender: int
    sharers: tuple[int, ...]
    confirmations: dict[int, bytes] = field(repr=False)
    frame: Frame = field(repr=False)


class Wire:
    """Encoders and decoders for one session; clients are numbers, their places in the cohort.

    A decoder returns only values of the right type, size and order that name clients of the cohort; whether they
    fit what happened before is for the session to check. Every decoder raises ``MessageError`` otherwise, and
    ``AuthenticityError`` where a signature or tag is wrong.

    Args:
        params: The session's parameters; their digest is part of every header and signature.
    """

    def __init__(self, params: SessionParams) -> None:
        self.params = params
        self.n = len(params.clients)
        self.context = params.context()
        self.graph = session_graph(self.context, self.n, params.degree)

    def near(self, client: int, among: Iterable[int]) -> tuple[int, ...]:
        """Return the neighbours of a client that are in ``among``, in order."""
        chosen = frozenset(among)
        return tuple(other for other in self.graph.neighbours(client) if other in chosen)

    def encode_advertise(self, sender: int, keys: PublicKeys, identity: Identity) -> bytes:
        """Return an ADVERTISE message."""
        body = self._advertise_body(sender, keys)
        return body + identity.sign(self.context, body)

    def decode_advertise(self, message: bytes) -> tuple[int, Card]:
        """Return the sender and its keys, whose signature is checked."""
        got = self._decode(Stage.ADVERTISE, message)
        masking, channel, commitment = (_bytes(one, KEY_BYTES) for one in _list(got.fields, 3))
        keys = PublicKeys(masking=masking, channel=channel, seed_commitment=commitment)
        card = Card(keys=keys, signature=got.trailer)
        self.check_card(got.party, card)
        return got.party, card

    def check_card(self, client: int, card: Card) -> None:
        """Refuse keys that a client did not sign for this round, or that serve two purposes."""
        self._check_signature(client, card.signature, self._advertise_body(client, card.keys), "advertised key")
        if card.keys.masking == card.keys.channel:
            raise MessageError("A client advertised one key for masking and for sealing; it needs two.")

    def encode_roster(self, recipient: int, server_key: bytes, cards: Mapping[int, Card]) -> bytes:
        """Return a ROSTER message: who advertised, and the cards of the recipient's neighbours."""
        payload = b"".join(cards[other].to_bytes() for other in self.near(recipient, cards))
        return self._server(Stage.ROSTER, recipient, [server_key, to_bitmap(cards, self.n)], payload)

    def decode_roster(self, message: bytes) -> tuple[int, bytes, tuple[int, ...], dict[int, Card]]:
        """Return recipient, server's key, who advertised, and its neighbours' cards (signatures not checked)."""
        got = self._decode(Stage.ROSTER, message)
        key, bitmap = _list(got.fields, 2)
        advertised = from_bitmap(bitmap, self.n)
        cards = self._parts(got, self.near(got.party, advertised), CARD_BYTES)
        opened = {other: Card.from_bytes(raw) for other, raw in cards.items()}
        return got.party, _bytes(key, KEY_BYTES), advertised, opened

    def encode_share(self, sender: int, key: bytes, advertised: Iterable[int], sealed: Mapping[int, bytes]) -> bytes:
        """Return a SHARE message, tagged with ``key``."""
        payload = b"".join(sealed[other] for other in sorted(sealed))
        return self._tagged(Stage.SHARE, sender, key, [to_bitmap(advertised, self.n)], payload)

    def decode_share(self, message: bytes) -> tuple[Frame, tuple[int, ...], dict[int, bytes]]:
        """Return the frame, who advertised as the sender was told, and its sealed shares by recipient."""
        got = self._decode(Stage.SHARE, message)
        advertised = from_bitmap(_list(got.fields, 1)[0], self.n)
        return got, advertised, self._parts(got, self.near(got.party, advertised), SEALED_BYTES)

    def encode_shares(self, recipient: int, sharers: Iterable[int], sealed: Mapping[int, bytes]) -> bytes:
        """Return a SHARES message."""
        payload = b"".join(sealed[other] for other in sorted(sealed))
        return self._server(Stage.SHARES, recipient, [to_bitmap(sharers, self.n)], payload)

    def decode_shares(self, message: bytes) -> tuple[int, tuple[int, ...], dict[int, bytes]]:
        """Return the recipient, who shared, and the sealed shares by sender."""
        got = self._decode(Stage.SHARES, message)
        sharers = from_bitmap(_list(got.fields, 1)[0], self.n)
        return got.party, sharers, self._parts(got, self.near(got.party, sharers), SEALED_BYTES)

    def encode_masked(
        self,
        sender: int,
        key: bytes,
        sharers: Iterable[int],
        confirmations: Mapping[int, bytes],
        fill: Callable[[NDArray[np.uint8]], None],
    ) -> bytes:
        """Return a MASKED message, tagged with ``key``; ``fill`` writes the packed vector to where it is told."""
        joined = b"".join(confirmations[other] for other in sorted(confirmations))
        size = self.params.payload_bytes
        start = frame.head(Stage.MASKED, self.context, sender, [to_bitmap(sharers, self.n), joined], size)
        message = bytearray(len(start) + size + TAG_BYTES)
        message[: len(start)] = start
        fill(np.frombuffer(message, dtype=np.uint8)[len(start) : len(start) + size])
        message[-TAG_BYTES:] = tag(key, memoryview(message)[:-TAG_BYTES])
        return bytes(message)

    def decode_masked(self, message: bytes) -> MaskedInput:
        """Return a MASKED message's parts; the vector stays packed, in the frame."""
        got = self._decode(Stage.MASKED, message)
        bitmap, joined = _list(got.fields, 2)
        sharers = from_bitmap(bitmap, self.n)
        near = self.near(got.party, sharers)
        if not padding_is_zero(got.payload, self.params.length, self.params.ring_bits):
            raise MessageError("A masked vector does not end in zeros; it is not in its one packed form.")
        return MaskedInput(sender=got.party, sharers=sharers, confirmations=_split(joined, near, TAG_BYTES), frame=got)

    def encode_survivors(self, recipient: int, survivors: Iterable[int], confirmations: Mapping[int, bytes]) -> bytes:
        """Return a SURVIVORS message."""
        joined = b"".join(confirmations[other] for other in sorted(confirmations))
        return self._server(Stage.SURVIVORS, recipient, [to_bitmap(survivors, self.n), joined])

    def decode_survivors(self, message: bytes) -> tuple[int, tuple[int, ...], dict[int, bytes]]:
        """Return the recipient, the survivors, and the confirmations of its neighbours among them."""
        got = self._decode(Stage.SURVIVORS, message)
        bitmap, joined = _list(got.fields, 2)
        survivors = from_bitmap(bitmap, self.n)
        return got.party, survivors, _split(joined, self.near(got.party, survivors), TAG_BYTES)

    def encode_agree(self, sender: int, sharers: Iterable[int], survivors: Iterable[int], identity: Identity) -> bytes:
        """Return an AGREE message."""
        body = self._agree_body(sender, sharers, survivors)
        return body + identity.sign(self.context, body)

    def decode_agree(self, message: bytes) -> tuple[int, tuple[int, ...], tuple[int, ...], bytes]:
        """Return the sender, the sharers and survivors it signed, and the signature, which is checked."""
        got = self._decode(Stage.AGREE, message)
        sharers, survivors = (from_bitmap(one, self.n) for one in _list(got.fields, 2))
        self.check_agree(got.party, sharers, survivors, got.trailer)
        return got.party, sharers, survivors, got.trailer

    def check_agree(self, signer: int, sharers: Iterable[int], survivors: Iterable[int], signature: bytes) -> None:
        """Refuse a signature that is not this client's under these sharers and survivors."""
        body = self._agree_body(signer, sharers, survivors)
        self._check_signature(signer, signature, body, "agreement on the survivors")

    def encode_agreement(self, recipient: int, signatures: Mapping[int, bytes]) -> bytes:
        """Return an AGREEMENT message."""
        payload = b"".join(signatures[signer] for signer in sorted(signatures))
        return self._server(Stage.AGREEMENT, recipient, [to_bitmap(signatures, self.n)], payload)

    def decode_agreement(self, message: bytes) -> tuple[int, dict[int, bytes]]:
        """Return the recipient and the signatures by signer, as many as the quorum and not checked."""
        got = self._decode(Stage.AGREEMENT, message)
        signers = from_bitmap(_list(got.fields, 1)[0], self.n)
        if len(signers) != self.params.quorum:
            raise MessageError(f"An agreement has {len(signers)} signatures; expected {self.params.quorum}.")
        return got.party, self._parts(got, signers, SIGNATURE_BYTES)

    def encode_unmask(self, sender: int, key: bytes, shares: Mapping[int, bytes]) -> bytes:
        """Return an UNMASK message, tagged with ``key``."""
        payload = b"".join(shares[owner] for owner in sorted(shares))
        return self._tagged(Stage.UNMASK, sender, key, [], payload)

    def decode_unmask(self, message: bytes, sharers: Sequence[int]) -> tuple[Frame, dict[int, bytes]]:
        """Return the frame and one share for each of its neighbours among the sharers and itself."""
        got = self._decode(Stage.UNMASK, message)
        _list(got.fields, 0)
        owners = sorted({got.party, *self.near(got.party, sharers)})
        shares = self._parts(got, owners, SHARE_BYTES)
        if not all(map(is_share, shares.values())):
            raise MessageError(f"Client {self.name(got.party)!r} revealed a share outside the field.")
        return got, shares

    def check_tag(self, got: Frame, key: bytes) -> None:
        """Refuse a client's message whose tag was not made with ``key``.

        Raises:
            AuthenticityError: If it was altered on its way, or does not come from the client it names.
        """
        if not same(tag(key, got.body), got.trailer):
            raise AuthenticityError(
                f"A message that came as client {self.name(got.party)!r}'s was altered or is not its own."
            )

    def name(self, client: int) -> str:
        """Return a client's id."""
        return self.params.clients[client]

    def _advertise_body(self, sender: int, keys: PublicKeys) -> bytes:
        fields = [keys.masking, keys.channel, keys.seed_commitment]
        return frame.head(Stage.ADVERTISE, self.context, sender, fields)

    def _agree_body(self, sender: int, sharers: Iterable[int], survivors: Iterable[int]) -> bytes:
        fields = [to_bitmap(sharers, self.n), to_bitmap(survivors, self.n)]
        return frame.head(Stage.AGREE, self.context, sender, fields)

    def _check_signature(self, client: int, signature: bytes, body: bytes, what: str) -> None:
        public = self.params.identities[client]
        check_signature(public, signature, self.context, body, who=self.name(client), what=what)

    def _server(self, stage: Stage, recipient: int, fields: Any, payload: bytes = b"") -> bytes:
        return frame.with_checksum(frame.head(stage, self.context, recipient, fields, len(payload)) + payload)

    def _tagged(self, stage: Stage, sender: int, key: bytes, fields: Any, payload: bytes) -> bytes:
        start = frame.head(stage, self.context, sender, fields, len(payload))
        return b"".join((start, payload, tag(key, start, payload)))

    def _decode(self, stage: Stage, message: bytes) -> Frame:
        """Check the outer form against the most that this stage can need."""
        k = self.params.degree
        payload = {
            Stage.ROSTER: k * CARD_BYTES,
            Stage.SHARE: k * SEALED_BYTES,
            Stage.SHARES: k * SEALED_BYTES,
            Stage.MASKED: self.params.payload_bytes,
            Stage.AGREEMENT: self.params.quorum * SIGNATURE_BYTES,
            Stage.UNMASK: (k + 1) * SHARE_BYTES,
        }
        limits = Limits(
            parties=self.n,
            fields_bytes=_FIELDS_BASE + 2 * ((self.n + 7) // 8) + k * TAG_BYTES,
            payload_bytes=payload.get(stage, 0),
            exact_payload=stage is Stage.MASKED,
        )
        return frame.decode(message, stage, self.context, limits)

    def _parts(self, got: Frame, owners: Sequence[int], size: int) -> dict[int, bytes]:
        """Return the payload cut into one part for each of ``owners``."""
        return _split(bytes(got.payload), owners, size)


def _split(raw: Any, owners: Sequence[int], size: int) -> dict[int, bytes]:
    """Return bytes cut into one part of ``size`` for each of ``owners``."""
    if type(raw) is not bytes or len(raw) != size * len(owners):
        raise MessageError(f"Expected {size} bytes for each of {len(owners)} clients.")
    return {owner: raw[place * size : (place + 1) * size] for place, owner in enumerate(owners)}


def _list(value: Any, width: int) -> list[Any]:
    """Return a list of this width."""
    if type(value) is not list or len(value) != width:
        raise MessageError("The fields of a message do not have the form of its stage.")
    return value


def _bytes(value: Any, size: int) -> bytes:
    """Return bytes of this size."""
    if type(value) is not bytes or len(value) != size:
        raise MessageError(f"A field of a message is not {size} bytes long.")
    return value
