"""The client's side of a session: four calls, each at most once, bytes in and bytes out.

A call out of turn, or with a message that is malformed or of another round, is refused and changes nothing.
Any other failure ends the session for this client and drops its secrets; the round goes on without it. A
session can be neither copied nor pickled, for two copies could give both shares of a peer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Literal, NoReturn

import numpy as np

from privfed.errors import ConfigError, ProtocolError, ThresholdError
from privfed.secagg.frame import Stage
from privfed.secagg.keys import (
    ClientKeys,
    channel_key,
    generate_keys,
    masked_tag,
    pack,
    pairwise_mask_key,
    seal,
    self_mask_key,
    unseal,
)
from privfed.secagg.keystream import apply_masks
from privfed.secagg.ring import UInt32, check_vector
from privfed.secagg.session import MIN_CLIENTS, SessionParams
from privfed.secagg.shamir import SHARE_BYTES, deal_bytes, is_share
from privfed.secagg.wire import Reveal, Roster, Wire, ids_digest, roster_digest, vector_digest

Kind = Literal["seed", "key"]


class _Step(Enum):
    """How far a client has come."""

    NEW = auto()
    ADVERTISED = auto()
    SHARED = auto()
    MASKED = auto()
    DONE = auto()
    ENDED = auto()


class ClientSession:
    """One client in one round.

    Args:
        params: The session's parameters, from the client's own configuration rather than from the server.
        client_id: This client.

    Raises:
        ConfigError: If the cohort does not have this client.
    """

    def __init__(self, params: SessionParams, client_id: str) -> None:
        if client_id not in params.clients:
            raise ConfigError(f"Client {client_id!r} is not in the cohort of this session.")
        self._params, self._id, self._wire = params, client_id, Wire(params)
        self._step, self._lock = _Step.NEW, threading.Lock()
        self._keys: ClientKeys | None = None
        self._roster: Roster = {}
        self._digest = b""  # of the roster
        self._held: dict[str, tuple[bytes, bytes]] = {}  # peer -> its key share and its seed share
        self._answered: dict[str, Kind] = {}

    def __repr__(self) -> str:
        return f"ClientSession(client_id={self._id!r}, step={self._step.name})"

    def __reduce__(self) -> NoReturn:
        raise ProtocolError("A client session cannot be copied or stored; start a new one in a new round.")

    @property
    def answered(self) -> dict[str, Kind]:
        """Which one kind of share was given out for each peer; empty before ``unmask``."""
        return dict(self._answered)

    def advertise(self) -> bytes:
        """Return this client's fresh public keys (Bonawitz et al. 2017, figure 4, round 0).

        Raises:
            ProtocolError: If it was called before.
        """
        with self._advance(_Step.NEW, _Step.ADVERTISED):
            self._keys = generate_keys(self._params.scope, self._id)
            return self._wire.encode_advertise(self._id, self._keys.public)

    def share(self, roster: bytes) -> bytes:
        """Return shares of this client's secrets, sealed for each client of the roster (figure 4, round 1).

        Args:
            roster: The server's ROSTER message.

        Raises:
            ProtocolError: If the call is out of order, or the roster is malformed or has not this client's
                own keys.
            ThresholdError: If the roster has fewer clients than the threshold.
        """
        advertised = self._wire.decode_roster(roster)
        with self._advance(_Step.ADVERTISED, _Step.SHARED):
            self._roster = advertised
            self._check_enough("advertised keys", len(self._roster))
            if self._roster.get(self._id) != self._secrets().public:
                raise ProtocolError(f"The roster does not have the keys that client {self._id!r} advertised.")
            self._digest = roster_digest(self._roster)
            return self._wire.encode_share(self._id, self._digest, self._deal())

    def masked_input(self, shares: bytes, values_M: UInt32) -> bytes:
        """Return ``values_M`` under this client's self mask and its pairwise masks (figure 4, round 2).

        Args:
            shares: The server's SHARES message for this client.
            values_M: The vector to sum: flat uint32, as long as the session says. It is not changed.

        Raises:
            SecAggError: If ``values_M`` does not fit; the session goes on, and the call may be repeated.
            ProtocolError: If the call is out of order or the shares are malformed or not authentic.
            ThresholdError: If fewer clients than the threshold shared.
        """
        check_vector(values_M, self._params.length)
        recipient, sealed = self._wire.decode_shares(shares)
        if recipient != self._id:
            raise ProtocolError(f"Client {self._id!r} was given the shares for client {recipient!r}.")
        with self._advance(_Step.SHARED, _Step.MASKED):
            if self._id in sealed or not sealed.keys() <= self._roster.keys():
                raise ProtocolError("There are shares from a client that is not on the roster.")
            self._check_enough("shared", len(sealed) + 1)
            for peer, text in sealed.items():
                self._held[peer] = self._open(peer, text)
            masked_M = self._mask(values_M, list(sealed))
            digest, seed = ids_digest(self._held), self._secrets().seed
            tag = masked_tag(seed, self._params.scope, self._id, digest, vector_digest(masked_M))
            self._keys = None  # from here on only the shares are needed
            return self._wire.encode_masked(self._id, digest, tag, masked_M)

    def unmask(self, survivors: bytes) -> bytes:
        """Return one share for each peer: of its seed if it survived, else of its key (figure 4, round 4).

        Args:
            survivors: The server's SURVIVORS message.

        Raises:
            ProtocolError: If the call is out of order, or the list is malformed, leaves out this client or
                names one that it has no share of.
            ThresholdError: If fewer clients than the threshold, or fewer than two, survived.
        """
        alive = frozenset(self._wire.decode_survivors(survivors))
        with self._advance(_Step.MASKED, _Step.DONE):
            if not alive <= self._held.keys():
                raise ProtocolError("The server names survivors that never shared with this client; nothing was sent.")
            if self._id not in alive:
                raise ProtocolError(f"The server leaves client {self._id!r} out of the sum; nothing was sent.")
            self._check_enough("survived", len(alive))
            reveal = self._choose(alive)
            return self._wire.encode_unmask(self._id, reveal)

    def _choose(self, alive: frozenset[str]) -> Reveal:
        """Record which share of each peer is given out, forget the other, and return the answer."""
        self._answered = {peer: "seed" if peer in alive else "key" for peer in self._held}
        held, self._held = self._held, {}
        return Reveal(
            seed_shares={peer: seed for peer, (_, seed) in held.items() if self._answered[peer] == "seed"},
            key_shares={peer: key for peer, (key, _) in held.items() if self._answered[peer] == "key"},
        )

    def _deal(self) -> dict[str, bytes]:
        """Split both secrets among the roster, keep the own shares and return the others sealed."""
        keys, threshold = self._secrets(), self._params.threshold
        ids = list(self._roster)
        points = self._params.points(ids)
        key_shares = deal_bytes(keys.masking.private_bytes_raw(), threshold, points)
        seed_shares = deal_bytes(keys.seed, threshold, points)
        pairs = dict(zip(ids, zip(key_shares, seed_shares, strict=True), strict=True))
        self._held = {self._id: pairs.pop(self._id)}
        return {
            peer: seal(self._channel(self._id, peer), b"".join(pair), self._associated(self._id, peer))
            for peer, pair in pairs.items()
        }

    def _open(self, peer: str, sealed: bytes) -> tuple[bytes, bytes]:
        """Return the two shares that ``peer`` sealed for this client."""
        associated = self._associated(peer, self._id)
        text = unseal(self._channel(peer, self._id), sealed, associated, peer)
        pair = text[:SHARE_BYTES], text[SHARE_BYTES:]
        if not all(map(is_share, pair)):
            raise ProtocolError(f"Client {peer!r} sealed a share outside the field; leave it out.")
        return pair

    def _mask(self, values_M: UInt32, peers: list[str]) -> UInt32:
        """Return the masked vector: of two clients, the one with the lower id adds their common mask."""
        keys, scope = self._secrets(), self._params.scope
        own = (self._id, keys.public.masking)
        pairwise = {
            peer: pairwise_mask_key(keys.masking, scope, own, (peer, self._roster[peer].masking)) for peer in peers
        }
        plus = [self_mask_key(keys.seed, scope, self._id)]
        plus += [key for peer, key in pairwise.items() if self._id < peer]
        minus = [key for peer, key in pairwise.items() if self._id > peer]
        masked_M = np.array(values_M, dtype=np.uint32, order="C")
        apply_masks(masked_M, plus, minus)
        return masked_M

    def _channel(self, src: str, dst: str) -> bytes:
        """Return the sealing key from ``src`` to ``dst``, one of which is this client."""
        peer = dst if src == self._id else src
        return channel_key(self._secrets().channel, self._params.scope, src, dst, (peer, self._roster[peer].channel))

    def _associated(self, src: str, dst: str) -> bytes:
        """Return what a sealed share is bound to: round, configuration, stage, both ends and the roster."""
        return pack(*self._params.scope, int(Stage.SHARE), src, dst, self._digest)

    def _secrets(self) -> ClientKeys:
        """Return the keys, which exist from ``advertise`` until ``masked_input``."""
        if self._keys is None:
            raise ProtocolError("This client has no keys at this stage.")
        return self._keys

    def _check_enough(self, what: str, count: int) -> None:
        """Refuse to go on with fewer clients than the threshold."""
        least = max(self._params.threshold, MIN_CLIENTS)
        if count < least:
            raise ThresholdError(f"Only {count} clients {what}; client {self._id!r} needs at least {least}.")

    @contextmanager
    def _advance(self, before: _Step, after: _Step) -> Iterator[None]:
        """Take one step exactly once; on any failure end the session and forget its secrets."""
        with self._lock:
            if self._step is not before:
                raise ProtocolError(
                    f"Client {self._id!r} is at step {self._step.name}; this call belongs to {before.name}."
                )
            self._step = _Step.ENDED
        try:
            yield
        except BaseException:
            self._keys, self._held = None, {}
            raise
        self._step = after
