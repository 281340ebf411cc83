"""The server's side of a session: collects one stage after another and ends with the sum.

A message that is refused changes nothing, so the session stays usable for the other clients. Masked vectors
are added into one running sum as they arrive; no single one is kept. A call that raises ``ThresholdError``
leaves its stage open: the caller may wait for more messages or give the round up.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from enum import Enum, auto
from hmac import compare_digest

import numpy as np

from privfed.errors import ProtocolError, ThresholdError
from privfed.secagg.keys import (
    PublicKeys,
    check_public,
    commit_seed,
    load_private,
    masked_tag,
    pairwise_mask_key,
    self_mask_key,
)
from privfed.secagg.keystream import apply_masks
from privfed.secagg.ring import UInt32, add_into
from privfed.secagg.session import SessionParams
from privfed.secagg.shamir import combine_bytes, lagrange_weights
from privfed.secagg.wire import Reveal, Wire, ids_digest, roster_digest, vector_digest


class _Step(Enum):
    """Which messages the server takes."""

    ADVERTISE = auto()
    SHARE = auto()
    MASKED = auto()
    UNMASK = auto()
    DONE = auto()


class ServerSession:
    """The server in one round.

    Args:
        params: The session's parameters.
    """

    def __init__(self, params: SessionParams) -> None:
        self._params, self._wire, self._step = params, Wire(params), _Step.ADVERTISE
        self._roster: dict[str, PublicKeys] = {}
        self._used: set[bytes] = set()  # public keys seen so far
        self._digest = b""  # of the roster
        self._sealed: dict[str, dict[str, bytes]] = {}  # src -> dst -> sealed shares
        self._sharers_digest = b""
        self._total_M: UInt32 = np.zeros(0, dtype=np.uint32)
        self._masked: dict[str, tuple[bytes, bytes]] = {}  # survivor -> digest of its vector, its tag
        self._replies: dict[str, Reveal] = {}

    def __repr__(self) -> str:
        return f"ServerSession(step={self._step.name}, clients={len(self._params.clients)})"

    def receive_advertise(self, message: bytes) -> str:
        """Take one client's public keys and return its id.

        Raises:
            ProtocolError: If the message is malformed, late, repeated, or has a key that is degenerate or
                that another client uses.
        """
        self._require(_Step.ADVERTISE)
        sender, public = self._wire.decode_advertise(message)
        _refuse_repeat(sender, self._roster)
        keys = {public.masking, public.channel}
        if keys & self._used:
            raise ProtocolError(f"Client {sender!r} advertised a public key that another client uses.")
        for key in sorted(keys):
            check_public(key, sender)
        self._used |= keys
        self._roster[sender] = public
        return sender

    def roster(self) -> bytes:
        """Close the first stage and return the message for every client that advertised.

        Raises:
            ProtocolError: If it was called before.
            ThresholdError: If fewer clients than the threshold advertised.
        """
        self._require(_Step.ADVERTISE)
        self._check_enough("advertised keys", len(self._roster))
        self._step = _Step.SHARE
        self._digest = roster_digest(self._roster)
        return self._wire.encode_roster(self._roster)

    def receive_share(self, message: bytes) -> str:
        """Take one client's sealed shares and return its id.

        Raises:
            ProtocolError: If the message is malformed, late, repeated, answers another roster, or has not
                exactly one sealed text for every other client of the roster.
        """
        self._require(_Step.SHARE)
        sender, digest, sealed = self._wire.decode_share(message)
        _refuse_repeat(sender, self._sealed)
        if sender not in self._roster or digest != self._digest:
            raise ProtocolError(f"Client {sender!r} answers a roster that this server did not send.")
        if sealed.keys() != self._roster.keys() - {sender}:
            raise ProtocolError(f"Client {sender!r} did not seal shares for exactly the other clients of the roster.")
        self._sealed[sender] = sealed
        return sender

    def shares_for(self, client_id: str) -> bytes:
        """Return the sealed shares for one client that shared; the first call closes the second stage.

        Raises:
            ProtocolError: If it is not the time for it, or the client did not share.
            ThresholdError: If fewer clients than the threshold shared.
        """
        if self._step is not _Step.MASKED:
            self._require(_Step.SHARE)
        if client_id not in self._sealed and len(self._sealed) >= self._params.threshold:
            raise ProtocolError(f"Client {client_id!r} did not share; there is nothing for it.")
        self._check_enough("shared", len(self._sealed))
        if self._step is _Step.SHARE:
            self._step = _Step.MASKED
            self._sharers_digest = ids_digest(self._sealed)
            self._total_M = np.zeros(self._params.length, dtype=np.uint32)
        sealed = {src: texts[client_id] for src, texts in self._sealed.items() if src != client_id}
        return self._wire.encode_shares(client_id, sealed)

    def receive_masked(self, message: bytes) -> str:
        """Add one client's masked vector to the running sum and return its id.

        Raises:
            ProtocolError: If the message is malformed, late, repeated, or masks against another set of
                clients.
        """
        self._require(_Step.MASKED)
        sender, digest, tag, masked_M = self._wire.decode_masked(message)
        _refuse_repeat(sender, self._masked)
        if sender not in self._sealed or digest != self._sharers_digest:
            raise ProtocolError(f"Client {sender!r} masked against other clients than those that shared.")
        evidence = vector_digest(masked_M), tag
        add_into(self._total_M, masked_M)
        self._masked[sender] = evidence
        return sender

    def survivors(self) -> bytes:
        """Close the third stage and return the message for every client whose vector is in the sum.

        Raises:
            ProtocolError: If it is not the time for it.
            ThresholdError: If fewer clients than the threshold sent a masked vector.
        """
        self._require(_Step.MASKED)
        self._check_enough("sent masked vectors", len(self._masked))
        self._step = _Step.UNMASK
        return self._wire.encode_survivors(self._masked)

    def receive_unmask(self, message: bytes) -> str:
        """Take one survivor's shares and return its id.

        Raises:
            ProtocolError: If the message is malformed, late, repeated, not from a survivor, or has not
                exactly the kinds of shares that the list of survivors asks for.
        """
        self._require(_Step.UNMASK)
        sender, reveal = self._wire.decode_unmask(message)
        _refuse_repeat(sender, self._replies)
        if sender not in self._masked:
            raise ProtocolError(f"Client {sender!r} is not a survivor; its answer is refused.")
        if reveal.seed_shares.keys() != self._masked.keys() or reveal.key_shares.keys() != self._dropped():
            raise ProtocolError(f"Client {sender!r} answered another list of survivors.")
        self._replies[sender] = reveal
        return sender

    def sum(self) -> tuple[UInt32, tuple[str, ...]]:
        """Remove the masks and return the sum modulo 2^32 of the survivors' vectors, and who they are.

        Raises:
            ProtocolError: If it is not the time for it, or the shares of one client's secret do not give what
                that client advertised, or a masked vector was altered; the message names the client, and no
                sum is released.
            ThresholdError: If fewer clients than the threshold answered.
        """
        self._require(_Step.UNMASK)
        self._check_enough("answered the list of survivors", len(self._replies))
        helpers = sorted(self._replies)[: self._params.threshold]
        weights = lagrange_weights(self._params.points(helpers))
        replies = [self._replies[client] for client in helpers]
        self_masks = [self._self_mask(peer, weights, replies) for peer in sorted(self._masked)]
        pairwise = [self._pairwise_masks(peer, weights, replies) for peer in sorted(self._dropped())]
        plus = [key for added, _ in pairwise for key in added]
        minus = self_masks + [key for _, removed in pairwise for key in removed]
        apply_masks(self._total_M, plus, minus)
        self._step = _Step.DONE
        total_M, self._total_M = self._total_M, np.zeros(0, dtype=np.uint32)
        self._replies, self._sealed = {}, {}
        return total_M, tuple(sorted(self._masked))

    def _self_mask(self, peer: str, weights: Sequence[int], replies: Sequence[Reveal]) -> bytes:
        """Return the key of a survivor's self mask, having checked its seed and its masked vector."""
        scope = self._params.scope
        seed = _recover(peer, "self-mask seed", weights, [reply.seed_shares[peer] for reply in replies])
        if commit_seed(seed, scope, peer) != self._roster[peer].seed_commitment:
            raise _wrong_secret(peer, "self-mask seed")
        vector, tag = self._masked[peer]
        if not compare_digest(tag, masked_tag(seed, scope, peer, self._sharers_digest, vector)):
            raise ProtocolError(f"The masked vector that came as client {peer!r}'s was altered; no sum is released.")
        return self_mask_key(seed, scope, peer)

    def _pairwise_masks(
        self, peer: str, weights: Sequence[int], replies: Sequence[Reveal]
    ) -> tuple[list[bytes], list[bytes]]:
        """Return the keys of the masks that a dropped client left: those to add and those to subtract."""
        raw = _recover(peer, "masking key", weights, [reply.key_shares[peer] for reply in replies])
        private, public = load_private(raw), self._roster[peer].masking
        if private.public_key().public_bytes_raw() != public:
            raise _wrong_secret(peer, "masking key")

        def keys(takes: Callable[[str], bool]) -> list[bytes]:
            return [
                pairwise_mask_key(private, self._params.scope, (peer, public), (other, self._roster[other].masking))
                for other in sorted(self._masked)
                if takes(other)
            ]

        return keys(lambda other: other > peer), keys(lambda other: other < peer)

    def _dropped(self) -> frozenset[str]:
        """Return who shared but sent no masked vector; the survivors' vectors have masks with these."""
        return frozenset(self._sealed.keys() - self._masked.keys())

    def _check_enough(self, what: str, count: int) -> None:
        """Refuse to close a stage with fewer clients than the threshold."""
        if count < self._params.threshold:
            raise ThresholdError(f"Only {count} clients {what}; the threshold is {self._params.threshold}.")

    def _require(self, step: _Step) -> None:
        """Refuse a call or message that belongs to another stage."""
        if self._step is not step:
            raise ProtocolError(f"The server is at stage {self._step.name}; this belongs to stage {step.name}.")


def _refuse_repeat(sender: str, seen: Container[str]) -> None:
    """Refuse a second message of one client in one stage; the first stands."""
    if sender in seen:
        raise ProtocolError(f"Client {sender!r} sent this stage twice; the first message stands.")


def _recover(peer: str, what: str, weights: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """Return a secret from its shares."""
    try:
        return combine_bytes(weights, shares)
    except ValueError as error:
        raise _wrong_secret(peer, what) from error


def _wrong_secret(peer: str, what: str) -> ProtocolError:
    """Return the error for a recovered secret that is not the one its owner advertised."""
    return ProtocolError(
        f"The shares of client {peer!r} do not give the {what} that it advertised: it dealt, or another"
        " client returned, a wrong share. No sum is released."
    )
