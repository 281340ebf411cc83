"""The server's side of a session: collects one stage after another and ends with the sum.

A message that is refused changes nothing, so the session stays usable for the other clients. Masked vectors
are added into one running sum as they arrive; no single one is kept. A call that raises ``ThresholdError``
leaves its stage open: the caller may wait for more messages or give the round up.
"""

from __future__ import annotations

from collections.abc import Container
from enum import Enum, auto

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privfed.errors import EquivocationError, MessageError, StageError, ThresholdError
from privfed.secagg import keys as k
from privfed.secagg.frame import Frame, Stage
from privfed.secagg.keystream import apply_masks, in_parallel, spans
from privfed.secagg.recover import mask_keys
from privfed.secagg.ring import UInt32, Words, add_packed, reduced, word_type
from privfed.secagg.session import SessionParams
from privfed.secagg.wire import Card, Wire


class _Step(Enum):
    """Which messages the server takes."""

    ADVERTISE = auto()
    SHARE = auto()
    MASKED = auto()
    AGREE = auto()
    UNMASK = auto()
    DONE = auto()


class ServerSession:
    """The server in one round.

    Args:
        params: The session's parameters.
    """

    def __init__(self, params: SessionParams) -> None:
        self._params, self._wire, self._step = params, Wire(params), _Step.ADVERTISE
        self._key = X25519PrivateKey.generate()  # agrees with each client on the keys of its tags
        self._cards: dict[int, Card] = {}
        self._used: set[bytes] = set()  # public keys seen so far
        self._shared: dict[int, bytes] = {}  # client -> the secret of its channel key and the server's
        self._sealed: dict[int, dict[int, bytes]] = {}  # src -> dst -> sealed shares
        self._total_M: Words = np.zeros(0, dtype=np.uint32)
        self._confirmed: dict[int, dict[int, bytes]] = {}  # survivor -> peer -> confirmation
        self._signatures: dict[int, bytes] = {}
        self._chosen: dict[int, bytes] = {}  # the quorum of signatures that everybody is sent
        self._replies: dict[int, dict[int, bytes]] = {}

    def __repr__(self) -> str:
        return f"ServerSession(step={self._step.name}, clients={len(self._params.clients)})"

    def receive_advertise(self, message: bytes) -> str:
        """Take one client's public keys and return its id.

        Raises:
            StageError: If the message is late or repeated.
            MessageError: If it is malformed, or has a key that is degenerate or that another client uses.
            AuthenticityError: If it is not signed by the identity that the roster pins.
        """
        self._require(_Step.ADVERTISE)
        sender, card = self._wire.decode_advertise(message)
        self._refuse_repeat(sender, self._cards)
        keys, name = {card.keys.masking, card.keys.channel}, self._wire.name(sender)
        if keys & self._used:
            raise MessageError(f"Client {name!r} advertised a public key that another client uses.")
        k.agree(self._key, card.keys.masking, name)  # a degenerate key is found before anyone else meets it
        self._shared[sender] = k.agree(self._key, card.keys.channel, name)
        self._used |= keys
        self._cards[sender] = card
        return name

    def roster_for(self, client_id: str) -> bytes:
        """Return the neighbours' keys for one client that advertised; the first call closes the first stage.

        Raises:
            StageError: If it is not the time for it, or the client did not advertise.
            ThresholdError: If fewer than ``n_min`` clients advertised.
        """
        self._close(_Step.ADVERTISE, _Step.SHARE, "advertised keys", len(self._cards))
        number = self._number(client_id, self._cards)
        return self._wire.encode_roster(number, self._key.public_key().public_bytes_raw(), self._cards)

    def receive_share(self, message: bytes) -> str:
        """Take one client's sealed shares and return its id.

        Raises:
            StageError: If the message is late, repeated, or from a client that did not advertise.
            MessageError: If it is malformed.
            AuthenticityError: If its tag is wrong.
            EquivocationError: If it answers another roster.
        """
        self._require(_Step.SHARE)
        got, advertised, sealed = self._wire.decode_share(message)
        self._check_sender(got, Stage.SHARE, self._cards, self._sealed)
        if advertised != tuple(sorted(self._cards)):
            raise EquivocationError(
                f"Client {self._wire.name(got.party)!r} answers a roster that this server did not send."
            )
        self._sealed[got.party] = sealed
        return self._wire.name(got.party)

    def shares_for(self, client_id: str) -> bytes:
        """Return the sealed shares for one client that shared; the first call closes the second stage.

        Raises:
            StageError: If it is not the time for it, or the client did not share.
            ThresholdError: If fewer than ``n_min`` clients shared.
        """
        if self._close(_Step.SHARE, _Step.MASKED, "shared", len(self._sealed)):
            self._total_M = np.zeros(self._params.length, dtype=word_type(self._params.ring_bits))
        number = self._number(client_id, self._sealed)
        sealed = {src: self._sealed[src][number] for src in self._wire.near(number, self._sealed)}
        return self._wire.encode_shares(number, self._sealed, sealed)

    def receive_masked(self, message: bytes) -> str:
        """Add one client's masked vector to the running sum and return its id.

        Raises:
            StageError: If the message is late, repeated, or from a client that did not share.
            MessageError: If it is malformed.
            AuthenticityError: If its tag is wrong.
            EquivocationError: If it masks against other clients than those that shared.
        """
        self._require(_Step.MASKED)
        got = self._wire.decode_masked(message)
        self._check_sender(got.frame, Stage.MASKED, self._sealed, self._confirmed)
        if got.sharers != tuple(sorted(self._sealed)):
            raise EquivocationError(
                f"Client {self._wire.name(got.sender)!r} masked against other clients than those that shared."
            )
        self._add(got.frame)
        self._confirmed[got.sender] = got.confirmations
        return self._wire.name(got.sender)

    def survivors_for(self, client_id: str) -> bytes:
        """Return whose vector is in the sum, for one of these; the first call closes the third stage.

        Raises:
            StageError: If it is not the time for it, or the client sent no masked vector.
            ThresholdError: If fewer than ``n_min`` clients sent one.
        """
        self._close(_Step.MASKED, _Step.AGREE, "sent masked vectors", len(self._confirmed))
        number = self._number(client_id, self._confirmed)
        near = self._wire.near(number, self._confirmed)
        return self._wire.encode_survivors(number, self._confirmed, {src: self._confirmed[src][number] for src in near})

    def receive_agree(self, message: bytes) -> str:
        """Take one survivor's signature under the survivors and return its id.

        Raises:
            StageError: If the message is late, repeated, or from a client that is not a survivor.
            MessageError: If it is malformed.
            AuthenticityError: If the signature is wrong.
            EquivocationError: If it is under other sharers or survivors.
        """
        self._require(_Step.AGREE)
        sender, sharers, survivors, signature = self._wire.decode_agree(message)
        self._refuse_stranger(sender, self._confirmed)
        self._refuse_repeat(sender, self._signatures)
        if sharers != tuple(sorted(self._sealed)) or survivors != tuple(sorted(self._confirmed)):
            raise EquivocationError(f"Client {self._wire.name(sender)!r} signed another list of survivors.")
        self._signatures[sender] = signature
        return self._wire.name(sender)

    def agreement_for(self, client_id: str) -> bytes:
        """Return a quorum of signatures for one client that signed; the first call closes the fourth stage.

        Raises:
            StageError: If it is not the time for it, or the client did not sign.
            ThresholdError: If fewer clients than the quorum signed.
        """
        if self._close(_Step.AGREE, _Step.UNMASK, "signed", len(self._signatures), self._params.quorum):
            chosen = sorted(self._signatures)[: self._params.quorum]
            self._chosen = {signer: self._signatures[signer] for signer in chosen}
        return self._wire.encode_agreement(self._number(client_id, self._signatures), self._chosen)

    def receive_unmask(self, message: bytes) -> str:
        """Take one survivor's shares and return its id.

        Raises:
            StageError: If the message is late, repeated, or from a client that did not sign.
            MessageError: If it is malformed.
            AuthenticityError: If its tag is wrong.
        """
        self._require(_Step.UNMASK)
        got, shares = self._wire.decode_unmask(message, tuple(self._sealed))
        self._check_sender(got, Stage.UNMASK, self._signatures, self._replies)
        self._replies[got.party] = shares
        return self._wire.name(got.party)

    def sum(self) -> tuple[UInt32, tuple[str, ...]]:
        """Remove the masks and return the survivors' sum modulo 2^ring_bits, and who they are.

        Raises:
            StageError: If it is not the time for it.
            ShareError: If the shares of one client's secret do not give what it advertised; no sum is released.
            ThresholdError: If too few holders of some client's shares answered.
        """
        self._require(_Step.UNMASK)
        plus, minus = mask_keys(self._wire, self._cards, self._sealed.keys(), self._confirmed.keys(), self._replies)
        apply_masks(self._total_M, plus, minus)
        self._step = _Step.DONE
        total_M, self._total_M = self._total_M, np.zeros(0, dtype=np.uint32)
        self._replies, self._sealed, self._shared = {}, {}, {}
        names = tuple(self._wire.name(number) for number in sorted(self._confirmed))
        return reduced(total_M, self._params.ring_bits), names

    def _add(self, got: Frame) -> None:
        """Add a packed vector to the running sum, by threads where it is long."""
        bits, message, start = self._params.ring_bits, got.message, got.payload_at
        parts = spans(self._total_M.size, self._total_M.itemsize)
        in_parallel(
            lambda part: add_packed(self._total_M[slice(*part)], message, start + part[0] * bits // 8, bits), parts
        )

    def _check_sender(self, got: Frame, stage: Stage, known: Container[int], seen: Container[int]) -> None:
        """Refuse a tagged message of a stranger, a second one, and one that its client did not make."""
        self._refuse_stranger(got.party, known)
        self._refuse_repeat(got.party, seen)
        shared, name = self._shared[got.party], self._wire.name(got.party)
        self._wire.check_tag(got, k.message_key(shared, self._params.scope, name, stage))

    def _close(self, step: _Step, after: _Step, what: str, count: int, least: int | None = None) -> bool:
        """Close a stage where it is open and complete; return whether this call did."""
        if self._step is after:
            return False
        self._require(step)
        needed = self._params.n_min if least is None else least
        if count < needed:
            raise ThresholdError(f"Only {count} clients {what}; at least {needed} are needed.")
        self._step = after
        return True

    def _number(self, client_id: str, known: Container[int]) -> int:
        """Return the number of a client that did the stage before."""
        if client_id in self._params.clients:
            number = self._params.clients.index(client_id)
            if number in known:
                return number
        raise StageError(f"Client {client_id!r} did not do the stage before; there is nothing for it.")

    def _require(self, step: _Step) -> None:
        """Refuse a call or message that belongs to another stage."""
        if self._step is not step:
            raise StageError(f"The server is at stage {self._step.name}; this belongs to stage {step.name}.")

    def _refuse_stranger(self, sender: int, known: Container[int]) -> None:
        """Refuse a message of a client that did not do the stage before."""
        if sender not in known:
            raise StageError(f"Client {self._wire.name(sender)!r} did not do the stage before this message's.")

    def _refuse_repeat(self, sender: int, seen: Container[int]) -> None:
        """Refuse a second message of one client in one stage; the first stands."""
        if sender in seen:
            raise StageError(f"Client {self._wire.name(sender)!r} sent this stage twice; the first message stands.")
