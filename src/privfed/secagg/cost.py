"""What a masked sum costs, as formulas: bytes, keystream and signatures, for a client and for the server.

With n clients, k neighbours, M values of b bits, words of w bytes (2 for b = 16, else 4) and a share x of clients that
drop after they shared:

- a client sends about M b / 8 + 131 k bytes (sealed shares 82, confirmation 16, revealed share 33 a neighbour) and
  receives about 258 k + 64 q (q signatures), plus bitmaps of n bits and headers; the functions count every byte;
- a client makes w M (k + 1) bytes of keystream, and the server w M n ((1 - x) + x k (1 - x)), since of a dropped
  client the masks with all its living neighbours are left.

Cohorts beyond one session are summed in groups: each group is a session of its own and the server adds their sums.
It then learns each group's sum, so a group has to be large enough to hide in.

Source: the wire format of `privfed.secagg.wire`; Bell et al. 2020, table 1 (the same terms, asymptotically).
"""

from __future__ import annotations

from dataclasses import dataclass

from privfed.secagg.degree import at_most
from privfed.secagg.frame import CRC_BYTES, HEADER
from privfed.secagg.identity import SIGNATURE_BYTES
from privfed.secagg.keys import KEY_BYTES, TAG_BYTES
from privfed.secagg.ring import packed_bytes, word_type
from privfed.secagg.session import Requirements, degree_and_threshold
from privfed.secagg.shamir import SHARE_BYTES
from privfed.secagg.wire import CARD_BYTES, SEALED_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the cost of a session depends on."""

    clients: int
    degree: int
    quorum: int
    length: int
    ring_bits: int

    @classmethod
    def plan(cls, clients: int, requirements: Requirements, *, length: int, ring_bits: int) -> Shape:
        """Return the shape of the session that `SessionParams.plan` would give.

        Raises:
            ConfigError: If the requirements cannot be met.
        """
        degree, _ = degree_and_threshold(clients, requirements)
        quorum = (clients + requirements.most_corrupt(clients)) // 2 + 1
        return cls(clients=clients, degree=degree, quorum=quorum, length=length, ring_bits=ring_bits)

    @property
    def word_bytes(self) -> int:
        """Bytes of keystream for one value."""
        return word_type(self.ring_bits)().itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Cost of one round for one party.

    Attributes:
        bytes_up: Bytes that clients send: of one client, or of all for the server.
        bytes_down: Bytes that clients receive.
        keystream_bytes: AES-256-CTR keystream made and added.
        signatures: Ed25519 signatures checked.
        agreements: X25519 agreements.
    """

    bytes_up: int
    bytes_down: int
    keystream_bytes: int
    signatures: int
    agreements: int


def client_work(shape: Shape, dropped: float = 0.0) -> Work:
    """Return the cost for a client that stays to the end, exact where nobody drops.

    Args:
        shape: The session.
        dropped: Share of the others that drop between sharing and the masked vector.
    """
    n, k = shape.clients, shape.degree
    bitmap, alive = _bin((n + 7) // 8), k - at_most(dropped, k)
    head, tagged = HEADER.size + 1, HEADER.size + 1 + TAG_BYTES
    up = HEADER.size + 1 + 3 * _bin(KEY_BYTES) + SIGNATURE_BYTES  # ADVERTISE
    up += tagged + bitmap + k * SEALED_BYTES  # SHARE
    up += tagged + bitmap + _bin(k * TAG_BYTES) + packed_bytes(shape.length, shape.ring_bits)  # MASKED
    up += head + 2 * bitmap + SIGNATURE_BYTES  # AGREE
    up += tagged + (k + 1) * SHARE_BYTES  # UNMASK
    down = head + _bin(KEY_BYTES) + bitmap + k * CARD_BYTES + CRC_BYTES  # ROSTER
    down += head + bitmap + k * SEALED_BYTES + CRC_BYTES  # SHARES
    down += head + bitmap + _bin(alive * TAG_BYTES) + CRC_BYTES  # SURVIVORS
    down += head + bitmap + shape.quorum * SIGNATURE_BYTES + CRC_BYTES  # AGREEMENT
    return Work(
        bytes_up=up,
        bytes_down=down,
        keystream_bytes=shape.word_bytes * shape.length * (k + 1),
        signatures=k + shape.quorum,
        agreements=2 * k + 1,
    )


def server_work(shape: Shape, dropped: float = 0.0) -> Work:
    """Return the cost for the server, exact where nobody drops.

    Args:
        shape: The session.
        dropped: Share of clients that drop between sharing and the masked vector.
    """
    n, gone = shape.clients, at_most(dropped, shape.clients)
    alive, one = n - gone, client_work(shape, dropped)
    near = shape.degree * alive / max(n - 1, 1)  # living neighbours of a dropped client
    partial = client_work(Shape(**{**_fields(shape), "length": 0}), dropped)
    masks = alive + round(gone * near)
    return Work(
        bytes_up=alive * one.bytes_up + gone * partial.bytes_up,
        bytes_down=n * one.bytes_down,
        keystream_bytes=shape.word_bytes * shape.length * masks,
        signatures=n + alive,
        agreements=2 * n + round(gone * near),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The cost of many clients in groups: for one client, one group's server, and all groups together."""

    clients: int
    groups: int
    group: Shape
    client: Work
    group_server: Work
    server: Work


def grouped(
    clients: int,
    group_size: int,
    requirements: Requirements,
    *,
    length: int,
    ring_bits: int,
    dropped: float = 0.0,
) -> Groups:
    """Return the cost of ``clients`` clients, in groups of at most ``group_size`` as equal as can be.

    Raises:
        ConfigError: If a group cannot meet the requirements.
    """
    groups = -(-clients // group_size)
    shape = Shape.plan(-(-clients // groups), requirements, length=length, ring_bits=ring_bits)
    one = server_work(shape, dropped)
    every = Work(**{name: value * groups for name, value in _fields(one).items()})
    client = client_work(shape, dropped)
    return Groups(clients=clients, groups=groups, group=shape, client=client, group_server=one, server=every)


def _fields(value: Shape | Work) -> dict[str, int]:
    """Return a dataclass's fields, which are all numbers."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _bin(size: int) -> int:
    """Return how many bytes a byte string of this size takes in msgpack."""
    return size + (2 if size < 1 << 8 else 3 if size < 1 << 16 else 5)
