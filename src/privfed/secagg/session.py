"""What all parties of a secure-aggregation session agree on before its first message.

With n clients of which at most c (``corrupt``) tell the server all they know, ``n_min``, and the quorum
q = floor((n + c) / 2) + 1, the server, whatever it does, gets no sum of honest clients but this one:

- *One set of survivors.* A client reveals shares only for a set U of survivors that q clients signed, and an honest
  client signs one set. Two quorums share an honest client, so all honest clients reveal for the same U.
- *At least n_min of them.* An honest client signs no smaller set, nor one that leaves it out.
- *Never both secrets.* For one U an honest client reveals one kind of share of each peer; the c others hold fewer
  than t. In a complete graph 2 t > n + c holds as well, which says the same without any signature.
- *No part of U.* A client's mask is removed only if it told its holders, by a tag that the server cannot make, that
  it masked against the same clients as the signers; then every mask between two survivors is in both their
  vectors, and a sum over a part of U keeps those between the part and the rest. In a complete graph that is all of
  U; in a sparser one see `privfed.secagg.degree` for the odds that the graph holds together.

So the sum has at least n_min - c honest addends, which hide among each other; n_min >= c + 2 is enforced. The sum
itself is known to the server: what it says of one client is for differential privacy to bound. Up to n - n_min
clients may drop, at any stages, and in a complete graph the sum of the rest is still had.

The clients' order on the ring depends on the round id: take it from the number of the round and of the attempt, not
from the server. A round that is repeated needs a new id, for signatures of the first attempt would count in the second.

Source: Bonawitz et al. 2017, section 6 (active adversaries, consistency check); Bell et al. 2020, section 4. The
confirmation tags are this project's: they stop a server that shows one client fewer sharers than it shows the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from privfed.errors import ConfigError
from privfed.secagg.degree import COMPLETE_UP_TO, at_least, at_most, find_degree
from privfed.secagg.frame import context_digest
from privfed.secagg.identity import PUBLIC_BYTES
from privfed.secagg.keys import LABEL, Scope
from privfed.secagg.ring import check_ring_bits, packed_bytes

MIN_CLIENTS = 2
MAX_CLIENTS = 10_000
MAX_LENGTH = 2**28
MAX_ID_BYTES = 128
MAX_BINDING_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a session has to stand, as shares of its cohort; `SessionParams.plan` works out the rest.

    Shares become whole clients on the safe side. The corrupt are rounded up: a tenth of all clients may well be one of
    any five. The dropped are rounded down, which keeps ``n_min`` up; where that still leaves no honest majority of
    survivors, one client fewer may drop. Distributed noise counts the corrupt in the same way.

    Attributes:
        dropped: Largest share of clients that may drop, at any stages, without losing the sum.
        corrupt: Largest share of clients that may tell the server all they know.
        n_min: Fewest survivors that a client takes part in a sum of; None for those that ``dropped`` leaves.
        sigma: Bits of statistical security of a sparse graph.
        eta: Bits of correctness of a sparse graph.
        server: ``malicious``: it may name anyone as dropped. ``curious``: those that drop are random. Decides only
            how sparse a graph of more than 50 clients may be; every check is made in both cases.

    Raises:
        ConfigError: If no cohort can be safe with these values.
    """

    dropped: float = 0.3
    corrupt: float = 0.1
    n_min: int | None = None
    sigma: float = 40.0
    eta: float = 20.0
    server: Literal["curious", "malicious"] = "malicious"

    def __post_init__(self) -> None:
        if not (0 <= self.dropped < 1 and 0 <= self.corrupt < 1) or 2 * self.dropped + self.corrupt >= 1:
            raise ConfigError(
                f"secagg.dropped = {self.dropped:g} and secagg.corrupt = {self.corrupt:g} leave no honest majority of"
                " survivors that could agree who survived: 2 dropped + corrupt has to be below 1; lower one of them."
            )
        if not (self.sigma >= 20 and self.eta >= 1 and math.isfinite(self.sigma + self.eta)):
            raise ConfigError(f"Got sigma = {self.sigma:g} and eta = {self.eta:g}; expected at least 20 and 1 bits.")

    def most_corrupt(self, n: int) -> int:
        """Return how many of ``n`` clients may be corrupt: the share of them, rounded up."""
        return at_least(self.corrupt, n)

    def met_by(self, n: int) -> bool:
        """Return whether a cohort of ``n`` clients, which may be 0, can meet them."""
        try:
            return n > 1 and self.least_survivors(n) <= n
        except ConfigError:
            return False

    def least_survivors(self, n: int) -> int:
        """Return n_min for a cohort of ``n``.

        Raises:
            ConfigError: If that many cannot be had, or would be too few to be safe.
        """
        _check_count(n)
        left, corrupt = n - at_most(self.dropped, n), self.most_corrupt(n)
        least = left if self.n_min is None else self.n_min
        safe = max((n + corrupt) // 2 + 1, corrupt + 2)
        if safe > n:
            raise ConfigError(
                f"Of {n} clients {corrupt} may be corrupt (secagg.corrupt = {self.corrupt:g}): the other one's vector"
                " would be the sum less theirs; use a larger cohort, or secagg.corrupt = 0.0 where all are trusted."
            )
        if self.n_min is None:
            return max(least, safe)
        if least < safe:
            raise ConfigError(
                f"secagg.n_min = {least} of {n} clients with {corrupt} corrupt is not safe: two such sets of survivors"
                f" could share no honest client, and a server could have both; use at least {safe}."
            )
        if least > left:
            raise ConfigError(
                f"secagg.n_min = {least}, but with secagg.dropped = {self.dropped:g} only {left} of {n} clients may"
                " survive: lower one of them."
            )
        return least


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionParams:
    """What one session is about; equal at the server and at every client, or their messages are refused.

    Attributes:
        round_id: Unique per round and attempt; bound into every message and key. 1 to 64 bytes.
        config_digest: Digest of the run's configuration; bound as well. 1 to 64 bytes.
        clients: Ids of the cohort, sorted and unique, at least two.
        identities: The pinned Ed25519 public key of each client, in the same order.
        degree: k, each client's neighbours: n - 1, or an even number below it.
        threshold: t, how many shares recover a secret, of k + 1 that there are.
        n_min: Fewest survivors that a client takes part in a sum of.
        corrupt: c, most clients that work with the server.
        length: M, the number of values in a vector.
        ring_bits: Sums are taken modulo 2^ring_bits; 16, 20, 24 or 32.

    Raises:
        ConfigError: If a value is not as described, or the values together are not safe.
    """

    round_id: bytes
    config_digest: bytes
    clients: tuple[str, ...]
    identities: tuple[bytes, ...]
    degree: int
    threshold: int
    n_min: int
    corrupt: int = 0
    length: int
    ring_bits: int = 32

    def __post_init__(self) -> None:
        _check_binding("round_id", self.round_id)
        _check_binding("config_digest", self.config_digest)
        _check_clients(self.clients)
        _check_identities(self.identities, len(self.clients))
        for name in ("degree", "threshold", "n_min", "corrupt", "length"):
            if type(getattr(self, name)) is not int:
                raise ConfigError(f"Got {name} = {getattr(self, name)!r}; expected an integer.")
        _check_survivors(self.n_min, self.corrupt, len(self.clients))
        _check_shares(self.degree, self.threshold, self.corrupt, len(self.clients))
        if not 0 <= self.length <= MAX_LENGTH:
            raise ConfigError(f"Got length = {self.length!r}; expected an integer between 0 and {MAX_LENGTH}.")
        check_ring_bits(self.ring_bits)

    @classmethod
    def plan(
        cls,
        roster: Mapping[str, bytes],
        requirements: Requirements,
        *,
        round_id: bytes,
        config_digest: bytes,
        length: int,
        ring_bits: int = 32,
    ) -> SessionParams:
        """Return the parameters of a session of these clients that meet the requirements.

        Args:
            roster: The cohort's pinned identities: client to Ed25519 public key.
            requirements: What the session has to stand.
            round_id: As the attribute; so are the others.

        Raises:
            ConfigError: If they cannot be met.
        """
        clients = tuple(sorted(roster))
        degree, threshold = degree_and_threshold(len(clients), requirements)
        return cls(
            round_id=round_id,
            config_digest=config_digest,
            clients=clients,
            identities=tuple(roster[client] for client in clients),
            degree=degree,
            threshold=threshold,
            n_min=requirements.least_survivors(len(clients)),
            corrupt=requirements.most_corrupt(len(clients)),
            length=length,
            ring_bits=ring_bits,
        )

    @property
    def scope(self) -> Scope:
        """Round id and configuration digest, which every key and every sealed text is bound to."""
        return (self.round_id, self.config_digest)

    @property
    def quorum(self) -> int:
        """How many clients have to sign the same survivors before any share is revealed."""
        return (len(self.clients) + self.corrupt) // 2 + 1

    @property
    def payload_bytes(self) -> int:
        """Bytes of one masked vector on the wire."""
        return packed_bytes(self.length, self.ring_bits)

    def context(self) -> bytes:
        """Return the SHA-256 of all parameters, which every message and signature is bound to."""
        whom = (list(self.clients), list(self.identities))
        numbers = (self.degree, self.threshold, self.n_min, self.corrupt, self.length, self.ring_bits)
        return context_digest(LABEL, *self.scope, *whom, *numbers)


def degree_and_threshold(n: int, requirements: Requirements) -> tuple[int, int]:
    """Return (k, t) for a cohort of ``n``: the complete graph up to 50 clients and where no sparser one will do.

    Raises:
        ConfigError: If the requirements cannot be met.
    """
    least = requirements.least_survivors(n)
    corrupt = requirements.most_corrupt(n)
    complete = n - 1, (n + corrupt) // 2 + 1
    if n <= COMPLETE_UP_TO:
        return complete
    try:
        found = find_degree(
            n,
            corrupt=corrupt,
            dropped=at_most(requirements.dropped, n),
            chosen=n - least,
            sigma=requirements.sigma,
            eta=requirements.eta,
            server=requirements.server,
        )
    except ConfigError:
        return complete
    return found.degree, found.threshold


def _check_binding(name: str, value: bytes) -> None:
    """Refuse a round id or digest that is not a short, nonempty byte string."""
    if type(value) is not bytes or not 1 <= len(value) <= MAX_BINDING_BYTES:
        raise ConfigError(f"Got {name} = {value!r}; expected 1 to {MAX_BINDING_BYTES} bytes.")


def _check_count(n: int) -> None:
    """Refuse a cohort that is too small to hide anyone, or too large for one session."""
    if not MIN_CLIENTS <= n <= MAX_CLIENTS:
        raise ConfigError(
            f"Got {n} clients; a masked sum needs {MIN_CLIENTS} to {MAX_CLIENTS}"
            " (the sum of one client is its plain update)."
        )


def _check_clients(clients: tuple[str, ...]) -> None:
    """Refuse a cohort that is not a sorted tuple of distinct ids."""
    if type(clients) is not tuple or not all(_is_id(client) for client in clients):
        raise ConfigError(f"Expected clients to be a tuple of ids of 1 to {MAX_ID_BYTES} bytes of UTF-8.")
    _check_count(len(clients))
    if list(clients) != sorted(set(clients)):
        raise ConfigError("Expected the client ids to be sorted and unique; pass tuple(sorted(set(ids))).")


def _check_identities(identities: tuple[bytes, ...], n: int) -> None:
    """Refuse a roster that does not pin one key of its own for each client."""
    if type(identities) is not tuple or len(identities) != n or len(set(identities)) != n:
        raise ConfigError(f"Expected the identities of {n} clients, each its own.")
    if not all(type(one) is bytes and len(one) == PUBLIC_BYTES for one in identities):
        raise ConfigError(f"Expected each identity to be an Ed25519 public key of {PUBLIC_BYTES} bytes.")


def _check_survivors(n_min: int, corrupt: int, n: int) -> None:
    """Refuse survivors so few that two sets of them need not share an honest client, or that hide nobody."""
    least = max((n + corrupt) // 2 + 1, corrupt + 2)
    if corrupt < 0 or not least <= n_min <= n:
        raise ConfigError(
            f"Got n_min = {n_min} for {n} clients of which {corrupt} are corrupt; expected an integer from {least}"
            f" to {n}."
        )


def _check_shares(degree: int, threshold: int, corrupt: int, n: int) -> None:
    """Refuse a graph that cannot be built, and shares that too few or more than there are could join."""
    complete = degree == n - 1
    if not complete and not (degree % 2 == 0 and 2 <= degree < n - 1):
        raise ConfigError(f"Got degree = {degree} for {n} clients; expected {n - 1} or an even number from 2 below it.")
    least = (n + corrupt) // 2 + 1 if complete else 2
    if not least <= threshold <= degree + 1:
        raise ConfigError(
            f"Got threshold = {threshold} for degree {degree}; expected an integer from {least} to {degree + 1}."
        )


def _is_id(client: object) -> bool:
    """Return whether ``client`` can be a client id: nonempty text that UTF-8 can encode, and not too long."""
    if type(client) is not str:
        return False
    try:
        return 1 <= len(client.encode()) <= MAX_ID_BYTES
    except UnicodeEncodeError:
        return False
