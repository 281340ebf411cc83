"""The client's side of a session: five calls, each at most once, bytes in and bytes out.

A call out of turn, or with a message that is malformed or of another round, is refused and changes nothing.
Any other failure ends the session for this client and drops its secrets; the round goes on without it. A
session can be neither copied nor pickled, for two copies could give both shares of a peer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from typing import Literal, NoReturn, TypeVar

from privfed.errors import (
    AuthenticityError,
    ConfigError,
    EquivocationError,
    MessageError,
    StageError,
    ThresholdError,
)
from privfed.secagg import keys as k
from privfed.secagg.frame import Stage
from privfed.secagg.graph import to_bitmap
from privfed.secagg.identity import Identity
from privfed.secagg.keystream import in_parallel, mask_packed
from privfed.secagg.ring import UInt32, check_vector
from privfed.secagg.session import SessionParams
from privfed.secagg.shamir import SHARE_BYTES, deal_bytes, is_share
from privfed.secagg.wire import Card, Wire

Kind = Literal["seed", "key"]
_T = TypeVar("_T")
_WORTH_THREADS = 16


class _Step(Enum):
    """How far a client has come."""

    NEW = auto()
    ADVERTISED = auto()
    SHARED = auto()
    MASKED = auto()
    AGREED = auto()
    DONE = auto()
    ENDED = auto()


class ClientSession:
    """One client in one round.

    Args:
        params: The session's parameters, from the client's own configuration rather than from the server.
        client_id: This client.
        identity: Its long-lived signing key.

    Raises:
        ConfigError: If the cohort does not have this client, or pins another identity for it.
    """

    def __init__(self, params: SessionParams, client_id: str, identity: Identity) -> None:
        if client_id not in params.clients:
            raise ConfigError(f"Client {client_id!r} is not in the cohort of this session.")
        self._params, self._id, self._wire = params, client_id, Wire(params)
        self._number = params.clients.index(client_id)
        if not k.same(params.identities[self._number], identity.public):
            raise ConfigError(f"The roster pins another identity for client {client_id!r} than the one it has.")
        self._identity = identity
        self._step, self._lock = _Step.NEW, threading.Lock()
        self._keys: k.ClientKeys | None = None
        self._advertised: tuple[int, ...] = ()
        self._cards: dict[int, Card] = {}
        self._shared: dict[int, bytes] = {}  # peer -> the secret of both channel keys
        self._server_tag: dict[Stage, bytes] = {}  # keys of the tags on the messages to the server
        self._sharers: tuple[int, ...] = ()
        self._survivors: tuple[int, ...] = ()
        self._expected: dict[int, bytes] = {}  # peer -> the confirmation it would send
        self._held: dict[int, tuple[bytes, bytes]] = {}  # peer -> its key share and its seed share
        self._answered: dict[str, Kind] = {}

    def __repr__(self) -> str:
        return f"ClientSession(client_id={self._id!r}, step={self._step.name})"

    def __reduce__(self) -> NoReturn:
        raise StageError("A client session cannot be copied or stored; start a new one in a new round.")

    @property
    def answered(self) -> dict[str, Kind]:
        """Which one kind of share was given out for each peer; empty before ``unmask``."""
        return dict(self._answered)

    def advertise(self) -> bytes:
        """Return this client's fresh public keys, signed (Bonawitz et al. 2017, figure 4, round 0).

        Raises:
            StageError: If it was called before, or the identity took part in a session with the same parameters.
        """
        with self._advance(_Step.NEW, _Step.ADVERTISED):
            self._identity.enter(self._wire.context)
            self._keys = k.generate_keys(self._params.scope, self._id)
            return self._wire.encode_advertise(self._number, self._keys.public, self._identity)

    def share(self, roster: bytes) -> bytes:
        """Return shares of this client's secrets, sealed for each neighbour that advertised (figure 4, round 1).

        Args:
            roster: The server's ROSTER message for this client.

        Raises:
            StageError: If the call is out of order.
            MessageError: If the roster is malformed or for another client.
            AuthenticityError: If a key in it is not signed, for this round, by the client it names.
            EquivocationError: If it leaves this client out.
            ThresholdError: If it has too few clients.
        """
        recipient, server_key, advertised, cards = self._wire.decode_roster(roster)
        self._check_recipient(recipient, "roster")
        with self._advance(_Step.ADVERTISED, _Step.SHARED):
            self._check_included(advertised, "roster")
            self._check_enough("advertised keys", advertised)
            _each(lambda card: self._wire.check_card(*card), list(cards.items()))
            self._check_distinct(cards)
            self._advertised, self._cards = advertised, cards
            self._agree_on_keys(server_key)
            tag_key = self._server_tag.pop(Stage.SHARE)
            return self._wire.encode_share(self._number, tag_key, advertised, self._deal())

    def masked_input(self, shares: bytes, values_M: UInt32) -> bytes:
        """Return ``values_M`` under this client's self mask and its pairwise masks (figure 4, round 2).

        Args:
            shares: The server's SHARES message for this client.
            values_M: The vector to sum: flat uint32 below 2^ring_bits, as long as the session says. It is not
                changed.

        Raises:
            SecAggError: If ``values_M`` does not fit; the session goes on, and the call may be repeated.
            StageError: If the call is out of order.
            MessageError: If the shares are malformed or for another client.
            AuthenticityError: If shares were not sealed by the client they come from.
            EquivocationError: If the shares are of clients that never advertised, or leave this one out.
            ThresholdError: If too few clients shared.
        """
        check_vector(values_M, self._params.length, self._params.ring_bits)
        recipient, sharers, sealed = self._wire.decode_shares(shares)
        self._check_recipient(recipient, "shares")
        with self._advance(_Step.SHARED, _Step.MASKED):
            if not frozenset(sharers) <= frozenset(self._advertised):
                raise EquivocationError("There are shares from a client that is not on the roster; nothing was sent.")
            self._check_included(sharers, "shares")
            self._check_enough("shared", sharers)
            for peer, text in sealed.items():
                self._held[peer] = self._open(peer, text)
            self._sharers = sharers
            plus, minus = self._mask_keys(list(sealed))
            told = to_bitmap(sharers, self._wire.n)
            scope, me = self._params.scope, self._id
            names = {peer: self._wire.name(peer) for peer in sealed}
            confirmations = {peer: k.confirmation(self._shared[peer], scope, me, names[peer], told) for peer in sealed}
            self._expected = {peer: k.confirmation(self._shared[peer], scope, names[peer], me, told) for peer in sealed}
            self._keys, self._shared, self._cards = None, {}, {}  # from here on only the shares are needed
            tag_key = self._server_tag.pop(Stage.MASKED)
            bits = self._params.ring_bits
            return self._wire.encode_masked(
                self._number, tag_key, sharers, confirmations, lambda out: mask_packed(values_M, plus, minus, bits, out)
            )

    def survivors_in(self, survivors: bytes) -> tuple[str, ...]:
        """Return whom a SURVIVORS message for this client names; nothing is signed and the session stays where it is.

        Raises:
            MessageError: If the list is malformed or for another client.
        """
        recipient, alive, _ = self._wire.decode_survivors(survivors)
        self._check_recipient(recipient, "list of survivors")
        return tuple(self._wire.name(number) for number in alive)

    def agree(self, survivors: bytes) -> bytes:
        """Return this client's signature under who shared and who survived (figure 4, round 3).

        Args:
            survivors: The server's SURVIVORS message for this client.

        Raises:
            StageError: If the call is out of order.
            MessageError: If the list is malformed or for another client.
            EquivocationError: If the list leaves this client out, names one that never shared, or one that was
                told of other sharers.
            ThresholdError: If fewer than ``n_min`` clients survived.
        """
        recipient, alive, confirmations = self._wire.decode_survivors(survivors)
        self._check_recipient(recipient, "list of survivors")
        with self._advance(_Step.MASKED, _Step.AGREED):
            if not frozenset(alive) <= frozenset(self._sharers):
                raise EquivocationError("The server names survivors that never shared; nothing was revealed.")
            self._check_included(alive, "sum")
            self._check_enough("survived", alive)
            for peer, confirmation in confirmations.items():
                if not k.same(confirmation, self._expected[peer]):
                    raise EquivocationError(
                        f"Client {self._wire.name(peer)!r} did not confirm that it masked against the same clients;"
                        " nothing was revealed."
                    )
            self._survivors = alive
            return self._wire.encode_agree(self._number, self._sharers, alive, self._identity)

    def unmask(self, agreement: bytes) -> bytes:
        """Return one share for each peer: of its seed if it survived, else of its key (figure 4, round 4).

        Args:
            agreement: The server's AGREEMENT message for this client.

        Raises:
            StageError: If the call is out of order.
            MessageError: If the agreement is malformed, for another client, or has too few signatures.
            EquivocationError: If a signature is not its client's under what this client itself signed.
        """
        recipient, signatures = self._wire.decode_agreement(agreement)
        self._check_recipient(recipient, "agreement")
        with self._advance(_Step.AGREED, _Step.DONE):
            self._check_agreement(signatures)
            shares = self._choose()
            return self._wire.encode_unmask(self._number, self._server_tag.pop(Stage.UNMASK), shares)

    def _check_agreement(self, signatures: Mapping[int, bytes]) -> None:
        """Refuse signatures of clients that did not survive, or under other sharers or survivors than this one's."""
        if not signatures.keys() <= frozenset(self._survivors):
            raise EquivocationError("A client that did not survive is said to have signed; nothing was revealed.")

        def check(signed: tuple[int, bytes]) -> None:
            self._wire.check_agree(signed[0], self._sharers, self._survivors, signed[1])

        try:
            _each(check, list(signatures.items()))
        except AuthenticityError as error:
            raise EquivocationError(f"{error} It signed another list, or none; nothing was revealed.") from error

    def _choose(self) -> dict[int, bytes]:
        """Record which share of each peer is given out, forget the other, and return the ones to give."""
        alive = frozenset(self._survivors)
        self._answered = {self._wire.name(peer): "seed" if peer in alive else "key" for peer in self._held}
        held, self._held = self._held, {}
        return {peer: seed if peer in alive else key for peer, (key, seed) in held.items()}

    def _agree_on_keys(self, server_key: bytes) -> None:
        """Work out the secrets shared with each neighbour and, for the tags, with the server."""
        channel = self._secrets().channel
        for peer, card in self._cards.items():
            self._shared[peer] = k.agree(channel, card.keys.channel, self._wire.name(peer))
        shared = k.agree(channel, server_key, "server")
        self._server_tag = {
            stage: k.message_key(shared, self._params.scope, self._id, stage)
            for stage in (Stage.SHARE, Stage.MASKED, Stage.UNMASK)
        }

    def _deal(self) -> dict[int, bytes]:
        """Split both secrets among the holders, keep the own shares and return the others sealed."""
        secret, threshold = self._secrets(), self._params.threshold
        holders = sorted([self._number, *self._cards])
        if len(holders) < threshold:
            raise ThresholdError(f"Only {len(holders)} clients can hold shares of {self._id!r}; it needs {threshold}.")
        points = [holder + 1 for holder in holders]
        key_shares = deal_bytes(secret.masking.private_bytes_raw(), threshold, points)
        seed_shares = deal_bytes(secret.seed, threshold, points)
        pairs = dict(zip(holders, zip(key_shares, seed_shares, strict=True), strict=True))
        self._held = {self._number: pairs.pop(self._number)}
        return {
            peer: k.seal(self._sealing_key(self._id, self._wire.name(peer), peer), b"".join(pair), self._bound(to=peer))
            for peer, pair in pairs.items()
        }

    def _open(self, peer: int, sealed: bytes) -> tuple[bytes, bytes]:
        """Return the two shares that ``peer`` sealed for this client."""
        name = self._wire.name(peer)
        text = k.unseal(self._sealing_key(name, self._id, peer), sealed, self._bound(of=peer), name)
        pair = text[:SHARE_BYTES], text[SHARE_BYTES:]
        if not all(map(is_share, pair)):
            raise MessageError(f"Client {name!r} sealed a share outside the field; leave it out.")
        return pair

    def _mask_keys(self, peers: list[int]) -> tuple[list[bytes], list[bytes]]:
        """Return the keys of the masks to add and to subtract: of two clients, the one with the lower id adds."""
        secret, scope = self._secrets(), self._params.scope
        own = (self._id, secret.public.masking)
        pairwise = {
            peer: k.pairwise_mask_key(
                secret.masking, scope, own, (self._wire.name(peer), self._cards[peer].keys.masking)
            )
            for peer in peers
        }
        plus = [k.self_mask_key(secret.seed, scope, self._id)]
        plus += [key for peer, key in pairwise.items() if self._number < peer]
        minus = [key for peer, key in pairwise.items() if self._number > peer]
        return plus, minus

    def _sealing_key(self, src: str, dst: str, peer: int) -> bytes:
        return k.sealing_key(self._shared[peer], self._params.scope, src, dst)

    def _bound(self, *, to: int | None = None, of: int | None = None) -> bytes:
        """Return what a sealed share is bound to: round, configuration, stage and both ends."""
        src = self._id if of is None else self._wire.name(of)
        dst = self._id if to is None else self._wire.name(to)
        return k.pack(*self._params.scope, int(Stage.SHARE), src, dst)

    def _secrets(self) -> k.ClientKeys:
        """Return the keys, which exist from ``advertise`` until ``masked_input``."""
        if self._keys is None:
            raise StageError("This client has no keys at this stage.")
        return self._keys

    def _check_distinct(self, cards: Mapping[int, Card]) -> None:
        """Refuse a public key that two clients use."""
        every = [self._secrets().public, *(card.keys for card in cards.values())]
        used = [key for public in every for key in (public.masking, public.channel)]
        if len(set(used)) != len(used):
            raise MessageError("A public key occurs twice in the roster; every client needs its own.")

    def _check_recipient(self, recipient: int, what: str) -> None:
        """Refuse a message for another client; the session goes on."""
        if recipient != self._number:
            raise MessageError(f"Client {self._id!r} was given the {what} for client {self._wire.name(recipient)!r}.")

    def _check_included(self, clients: Iterable[int], what: str) -> None:
        """Refuse a stage that this client is left out of."""
        if self._number not in clients:
            raise EquivocationError(f"The server leaves client {self._id!r} out of the {what}; nothing was sent.")

    def _check_enough(self, what: str, clients: tuple[int, ...]) -> None:
        """Refuse to go on with fewer clients than ``n_min``."""
        if len(clients) < self._params.n_min:
            raise ThresholdError(
                f"Only {len(clients)} clients {what}; client {self._id!r} needs at least n_min = {self._params.n_min}."
            )

    @contextmanager
    def _advance(self, before: _Step, after: _Step) -> Iterator[None]:
        """Take one step exactly once; on any failure end the session and forget its secrets."""
        with self._lock:
            if self._step is not before:
                raise StageError(
                    f"Client {self._id!r} is at step {self._step.name}; this call belongs to {before.name}."
                )
            self._step = _Step.ENDED
        try:
            yield
        except BaseException:
            self._keys, self._held, self._shared, self._server_tag = None, {}, {}, {}
            raise
        self._step = after


def _each(check: Callable[[_T], None], items: Sequence[_T]) -> None:
    """Make a check of each item, by threads where they save more than they cost: a signature takes 0.1 ms."""
    if len(items) >= _WORTH_THREADS:
        in_parallel(check, items)
    else:
        for item in items:
            check(item)
