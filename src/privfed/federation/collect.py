"""The server's ear: adds up what clients send. Under masking it never holds one client's values.

Both collectors add a message on arrival and forget it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privfed.compression.message import signed_values, to_bytes
from privfed.errors import ConfigError, ProtocolError, ThresholdError
from privfed.secagg import ClientSession, Identity, Requirements, ServerSession, SessionParams
from privfed.types import Encoded, EncodedSum

# weights travel as integers of this resolution beside the values, so that their sum is masked too
WEIGHT_STEPS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What a round's exchange gave the server.

    Attributes:
        single: The encoding of each survivor, where a rule needs them and nothing is masked.
    """

    total: EncodedSum | None
    survivors: tuple[str, ...]
    bytes_up: int
    bytes_down: int
    single: tuple[EncodedSum, ...] = ()


class Link(Protocol):
    """The path of one round's messages between clients and the server, all of them bytes."""

    def open(self) -> None:
        """Exchange keys, where there are any."""

    def send(self, client_id: str, encoded: Encoded, weight: float) -> None:
        """Carry one client's update to the server."""

    @property
    def sent(self) -> tuple[str, ...]:
        """Whose vectors the server has: the survivors of ``close``, if it succeeds."""

    def close(self) -> Collected:
        """End the round and return the sum over the survivors."""


class PlainLink:
    """No masking: the server reads each message and adds its values.

    Args:
        codec: Name of the codec.
        length: Number of values.
        keep: Whether to keep each message's values beside their sum.
        record: Told each message that was added.
    """

    def __init__(
        self, codec: str, length: int, *, keep: bool = False, record: Callable[[bytes], None] | None = None
    ) -> None:
        self._codec = codec
        self._length = length
        self._keep = keep
        self._record = record
        self._single: list[EncodedSum] = []
        self._scale = 1.0
        self._sum: NDArray[np.float64] | NDArray[np.int64] | None = None
        self._weight = 0.0
        self._survivors: list[str] = []
        self._bytes = 0

    def open(self) -> None:
        """Nothing to exchange."""

    def send(self, client_id: str, encoded: Encoded, weight: float) -> None:
        """Serialise on the client's side, count the bytes, add on the server's."""
        self._receive(to_bytes(encoded, client_id=client_id, weight=weight))

    @property
    def sent(self) -> tuple[str, ...]:
        """Whose vectors were received."""
        return tuple(self._survivors)

    def close(self) -> Collected:
        """Return the sum of the values received."""
        total = None
        if self._sum is not None:
            total = self._encoded(self._sum, len(self._survivors), self._weight)
        return Collected(
            total=total,
            survivors=tuple(self._survivors),
            bytes_up=self._bytes,
            bytes_down=0,
            single=tuple(self._single),
        )

    def _encoded(self, values: NDArray[np.float64] | NDArray[np.int64], survivors: int, weight: float) -> EncodedSum:
        return EncodedSum(
            sum_M=values,
            codec=self._codec,
            scale=self._scale,
            length=self._length,
            survivors=survivors,
            total_weight=weight,
        )

    def _receive(self, message: bytes) -> None:
        self._bytes += len(message)
        client_id, weight, scale, values = signed_values(message, length=self._length)
        if self._sum is None:
            self._sum, self._scale = values.copy(), scale
        elif scale != self._scale or values.dtype != self._sum.dtype:
            raise ProtocolError(f"{client_id} encoded in another way than the others: the sum would mean nothing.")
        else:
            self._sum += values
        if self._keep:
            self._single.append(self._encoded(values, 1, weight))
        self._weight += weight
        self._survivors.append(client_id)
        if self._record:
            self._record(message)


class MaskedLink:
    """Secure aggregation: the server gets masked vectors and learns their sum only.

    Args:
        identities: The round's cohort, at least two: client to its signing key. In one process the link is the
            client's side as well, so it has the private halves; the server is given the public ones only.
        requirements: What the session has to stand.
        round_id: Unique for the round; bound into every message.
        config_digest: Bound into every message.
        codec: Name of the codec.
        length: D.
        weighted: Whether a masked weight travels beside the values.
        ring_bits: Size of the ring.

    Raises:
        ConfigError: If no session of this cohort meets the requirements.
    """

    def __init__(
        self,
        identities: Mapping[str, Identity],
        *,
        requirements: Requirements,
        round_id: bytes,
        config_digest: bytes,
        codec: str,
        length: int,
        weighted: bool,
        ring_bits: int,
    ) -> None:
        self._digits = _WeightDigits(len(identities), ring_bits) if weighted else None
        params = SessionParams.plan(
            {client: identity.public for client, identity in identities.items()},
            requirements,
            round_id=round_id,
            config_digest=config_digest,
            length=length + (self._digits.count if self._digits else 0),
            ring_bits=ring_bits,
        )
        self._server = ServerSession(params)
        self._clients = {client: ClientSession(params, client, one) for client, one in identities.items()}
        self._codec, self._length = codec, length
        self._shares: dict[str, bytes] = {}
        self._sent: list[str] = []
        self._scale = 1.0
        self._up = self._down = 0

    def open(self) -> None:
        """Exchange keys and sealed shares between all clients, through the server."""
        for session in self._clients.values():
            self._server.receive_advertise(self._counted(session.advertise()))
        for client, session in self._clients.items():
            roster = self._fetched(self._server.roster_for(client))
            self._server.receive_share(self._counted(session.share(roster)))
        for client in self._clients:
            self._shares[client] = self._fetched(self._server.shares_for(client))

    def send(self, client_id: str, encoded: Encoded, weight: float) -> None:
        """Mask on the client's side; the server adds the masked vector on arrival."""
        values_M = encoded.values_M.astype(np.uint32, copy=False)
        if self._digits:
            values_M = np.append(values_M, self._digits.split(weight))
        self._scale = encoded.scale
        message = self._clients[client_id].masked_input(self._shares[client_id], values_M)
        self._server.receive_masked(self._counted(message))
        self._sent.append(client_id)

    @property
    def sent(self) -> tuple[str, ...]:
        """Whose masked vectors were received; nothing is unmasked yet."""
        return tuple(self._sent)

    def close(self) -> Collected:
        """Unmask the sum over the survivors.

        Raises:
            ThresholdError: If fewer survived than ``n_min``; nothing is revealed then.
        """
        for client in self._sent:
            survivors = self._fetched(self._server.survivors_for(client))
            self._server.receive_agree(self._counted(self._clients[client].agree(survivors)))
        for client in self._sent:
            agreement = self._fetched(self._server.agreement_for(client))
            self._server.receive_unmask(self._counted(self._clients[client].unmask(agreement)))
        if not self._sent:
            raise ThresholdError("No client sent a masked vector; there is nothing to unmask.")
        sum_M, names = self._server.sum()
        weight = float(len(names))
        if self._digits:
            weight = self._digits.join(sum_M[self._length :])
            sum_M = sum_M[: self._length]
        total = EncodedSum(
            sum_M=sum_M.astype(np.uint64),
            codec=self._codec,
            scale=self._scale,
            length=self._length,
            survivors=len(names),
            total_weight=weight,
        )
        return Collected(total=total, survivors=names, bytes_up=self._up, bytes_down=self._down)

    def _counted(self, message: bytes) -> bytes:
        self._up += len(message)
        return message

    def _fetched(self, message: bytes) -> bytes:
        self._down += len(message)
        return message


def weight_values(clients: int, ring_bits: int) -> int:
    """Return how many values of the ring a masked weight takes.

    Raises:
        ConfigError: If the ring is too small for the weights of so many clients.
    """
    return _WeightDigits(clients, ring_bits).count


class _WeightDigits:
    """A weight as values of the ring: digits so short that those of all clients add up without wrapping."""

    def __init__(self, clients: int, ring_bits: int) -> None:
        self._bits = ring_bits - clients.bit_length()
        if self._bits < 1:
            raise ConfigError(
                f"A ring of {ring_bits} bits cannot sum the weights of {clients} clients: raise ring_bits."
            )
        self.count = -(-WEIGHT_STEPS.bit_length() // self._bits)

    def split(self, weight: float) -> NDArray[np.uint32]:
        """Return a weight of at most 1 as digits, the lowest first."""
        steps, low = round(weight * WEIGHT_STEPS), (1 << self._bits) - 1
        return np.array([steps >> (place * self._bits) & low for place in range(self.count)], dtype=np.uint32)

    def join(self, sums: NDArray[np.uint32]) -> float:
        """Return the sum of the weights from the sums of their digits."""
        return sum(int(digit) << (place * self._bits) for place, digit in enumerate(sums)) / WEIGHT_STEPS
