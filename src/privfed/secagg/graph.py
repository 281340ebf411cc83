"""Who masks with whom: a Harary graph on a random ring, the same for everybody who knows the session.

The clients are put on a ring in the order of SHA-256(label, session context, number) and each is linked to its
k / 2 nearest on both sides; with k = n - 1 to all. The context covers the round id and the roster of identities.

Source: Bell et al. 2020, section 3 (k-regular graph by a random permutation of a Harary graph).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache

from privfed.errors import MessageError

_LABEL = b"privfed secagg v2 ring\0"


class Graph:
    """The neighbours of each of ``n`` clients, who are numbered from 0.

    Args:
        context: The session's context digest.
        n: Number of clients.
        degree: k; n - 1, or an even number below it.
    """

    def __init__(self, context: bytes, n: int, degree: int) -> None:
        self._n, self._degree = n, degree
        self._ring: list[int] = []
        self._place: dict[int, int] = {}
        if degree < n - 1:
            self._ring = sorted(
                range(n), key=lambda i: hashlib.sha256(_LABEL + context + i.to_bytes(4, "little")).digest()
            )
            self._place = {client: place for place, client in enumerate(self._ring)}

    def neighbours(self, client: int) -> tuple[int, ...]:
        """Return the numbers of a client's neighbours, in order."""
        if not self._ring:
            return tuple(other for other in range(self._n) if other != client)
        place, half = self._place[client], self._degree // 2
        steps = [*range(-half, 0), *range(1, half + 1)]
        return tuple(sorted(self._ring[(place + step) % self._n] for step in steps))

    def holders(self, client: int) -> tuple[int, ...]:
        """Return who holds shares of a client's secrets: its neighbours and itself, in order."""
        return tuple(sorted((*self.neighbours(client), client)))


@lru_cache(maxsize=8)
def session_graph(context: bytes, n: int, degree: int) -> Graph:
    """Return the graph of a session; sessions of one process share it."""
    return Graph(context, n, degree)


def to_bitmap(numbers: Iterable[int], n: int) -> bytes:
    """Return a set of clients as n bits, the lowest number first, filled up with zeros to whole bytes."""
    bits = 0
    for number in numbers:
        bits |= 1 << number
    return bits.to_bytes((n + 7) // 8, "little")


def from_bitmap(bitmap: object, n: int) -> tuple[int, ...]:
    """Return the numbers that a bitmap stands for, in order.

    Raises:
        MessageError: If it is not n bits filled up with zeros.
    """
    if type(bitmap) is not bytes or len(bitmap) != (n + 7) // 8:
        raise MessageError(f"Expected a set of clients as {(n + 7) // 8} bytes.")
    bits = int.from_bytes(bitmap, "little")
    if bits >> n:
        raise MessageError(f"A set of clients names one beyond the {n} of this round.")
    return tuple(number for number in range(n) if bits >> number & 1)
