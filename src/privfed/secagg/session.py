"""What all parties of a secure-aggregation session agree on before its first message.

What the parameters give, with t = ``threshold``, n = the number of clients, and c clients that collude with
the server by telling it all they know:

- *Secrets stay secret*: c < t shares say nothing about a client's masking key or self-mask seed.
- *Never both secrets*: an honest client answers once, with one kind of share for each peer. To have both
  secrets of one peer the server needs t shares of each kind, out of at most n + c; 2t > n + c rules this out.
  2t > n, enforced here, is this condition for c = 0; a larger t buys c < 2t - n.
- *A sum over at least t clients*, of which at least t - c are honest and hide among each other. If only one
  is honest, subtracting the others bares it: choose t >= c + 2. In particular, of two clients each learns the
  other's vector from the sum. No session has one client: its "sum" would be its plain vector.
- *Dropped clients*: up to n - t may leave, at any stages, and the sum of the rest is still had.

The last two hold for a server that follows the protocol (and may do anything with what it sees). They do not
hold for one that tells clients different lists of who shared or who survived: it can combine the answers into
a sum over fewer than t clients, and with t close to n / 2 and a large cohort over a single one. Signed lists
that clients compare prevent it; this version has none, and its keys are not signed either.

Source: Bonawitz et al. 2017, section 6 (security analysis, which also treats the choice of the threshold).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from privfed.errors import ConfigError
from privfed.secagg.keys import Scope
from privfed.secagg.ring import VALUE_BYTES, check_ring_bits

MIN_CLIENTS = 2
MAX_CLIENTS = 10_000
MAX_LENGTH = 2**30
MAX_ID_BYTES = 128
MAX_BINDING_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionParams:
    """What one session is about; equal at the server and at every client, or their messages are refused.

    Attributes:
        round_id: Unique per round; bound into every message and key. 1 to 64 bytes.
        config_digest: Digest of the run's configuration; bound as well. 1 to 64 bytes.
        clients: Ids of the cohort, sorted and unique, at least two.
        threshold: How many clients must answer for a sum to be released: at least 2, more than half, at most
            all.
        length: M, the number of values in a vector.
        ring_bits: Sums are taken modulo 2^ring_bits; 32 is the only choice so far.

    Raises:
        ConfigError: If a value is not as described.
    """

    round_id: bytes
    config_digest: bytes
    clients: tuple[str, ...]
    threshold: int
    length: int
    ring_bits: int = 32

    def __post_init__(self) -> None:
        _check_binding("round_id", self.round_id)
        _check_binding("config_digest", self.config_digest)
        _check_clients(self.clients)
        _check_threshold(self.threshold, len(self.clients))
        if type(self.length) is not int or not 0 <= self.length <= MAX_LENGTH:
            raise ConfigError(f"Got length = {self.length!r}; expected an integer between 0 and {MAX_LENGTH}.")
        check_ring_bits(self.ring_bits)

    @property
    def scope(self) -> Scope:
        """Round id and configuration digest, which every key and every sealed text is bound to."""
        return (self.round_id, self.config_digest)

    def points(self, ids: Iterable[str]) -> list[int]:
        """Return the point of each client in the sharing polynomials: its place in the cohort, from 1."""
        places = {client: place for place, client in enumerate(self.clients, start=1)}
        return [places[client] for client in ids]

    @property
    def payload_bytes(self) -> int:
        """Bytes of one masked vector on the wire."""
        return self.length * VALUE_BYTES


def default_threshold(n: int, fraction: float = 2 / 3) -> int:
    """Return the threshold for ``n`` clients: ``fraction`` of them, rounded up, and always more than half.

    With the default of two thirds up to a third of the clients may drop, and an equivocating server needs at
    least a third of the clients as accomplices to collect both secrets of one client (see the module's
    docstring, also for what this does not prevent).

    Args:
        n: Number of clients in the cohort, at least 2.
        fraction: Share of the cohort that must answer, above 0 and at most 1; raising it trades tolerance of
            dropped clients for tolerance of colluding ones.

    Raises:
        ConfigError: If ``n`` or ``fraction`` is out of range.
    """
    if n < MIN_CLIENTS:
        raise ConfigError(f"Got {n} clients; secure aggregation hides nothing below {MIN_CLIENTS}.")
    if not 0 < fraction <= 1:
        raise ConfigError(f"Got a threshold fraction of {fraction}; expected one above 0 and at most 1.")
    exact = Fraction(fraction).limit_denominator(10**6)
    return max(MIN_CLIENTS, n // 2 + 1, math.ceil(exact * n))


def _check_binding(name: str, value: bytes) -> None:
    """Refuse a round id or digest that is not a short, nonempty byte string."""
    if type(value) is not bytes or not 1 <= len(value) <= MAX_BINDING_BYTES:
        raise ConfigError(f"Got {name} = {value!r}; expected 1 to {MAX_BINDING_BYTES} bytes.")


def _check_clients(clients: tuple[str, ...]) -> None:
    """Refuse a cohort that is not a sorted tuple of distinct ids."""
    if type(clients) is not tuple or not all(_is_id(client) for client in clients):
        raise ConfigError(f"Expected clients to be a tuple of ids of 1 to {MAX_ID_BYTES} bytes of UTF-8.")
    if not MIN_CLIENTS <= len(clients) <= MAX_CLIENTS:
        raise ConfigError(
            f"Got {len(clients)} clients; a masked sum needs {MIN_CLIENTS} to {MAX_CLIENTS}"
            " (the sum of one client is its plain update)."
        )
    if list(clients) != sorted(set(clients)):
        raise ConfigError("Expected the client ids to be sorted and unique; pass tuple(sorted(set(ids))).")


def _check_threshold(threshold: int, n: int) -> None:
    """Refuse a threshold that would allow two contradictory unmaskings, or none at all."""
    if type(threshold) is not int or not (threshold >= MIN_CLIENTS and 2 * threshold > n and threshold <= n):
        least = max(MIN_CLIENTS, n // 2 + 1)
        raise ConfigError(f"Got threshold = {threshold!r} for {n} clients; expected an integer from {least} to {n}.")


def _is_id(client: object) -> bool:
    """Return whether ``client`` can be a client id: nonempty text that UTF-8 can encode, and not too long."""
    if type(client) is not str:
        return False
    try:
        return 1 <= len(client.encode()) <= MAX_ID_BYTES
    except UnicodeEncodeError:
        return False
