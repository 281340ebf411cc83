"""The server's ear: adds up what clients send. Under masking it never holds one client's values.

Both collectors add a message on arrival and forget it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from privfed.compression import Codec
from privfed.compression.message import read, to_bytes
from privfed.errors import ProtocolError, ThresholdError
from privfed.federation.collected import Collected, Flags
from privfed.federation.masking import Masking
from privfed.secagg import ClientSession, Identity, Requirements, ServerSession
from privfed.types import Encoded, EncodedSum

__all__ = ["Collected", "Flags", "Link", "MaskedLink", "PlainLink"]


class Link(Protocol):
    """The path of one round's messages between clients and the server, all of them bytes."""

    def open(self) -> None:
        """Exchange keys, where there are any."""

    def send(self, client_id: str, encoded: Encoded, weight: float, trained_T: Flags | None = None) -> None:
        """Carry one client's update to the server.

        Args:
            client_id: Whose it is.
            encoded: The update.
            weight: What its values were multiplied by.
            trained_T: Which tensors the client trained, where that differs from client to client.
        """

    @property
    def sent(self) -> tuple[str, ...]:
        """Whose vectors the server has: the survivors of ``close``, if it succeeds."""

    def close(self) -> Collected:
        """End the round and return the sum over the survivors."""


class PlainLink:
    """No masking: the server reads each message and adds its values.

    Args:
        codec: The codec of the round: it says what a message must look like, and decodes one where that comes first.
        length: D, the number of values that each client gave to the codec.
        keep: Whether to keep each message's values beside their sum.
        tensors: T, the number of tensors, where clients train different ones; else 0.
        record: Told each message that was added.
    """

    def __init__(
        self,
        codec: Codec,
        length: int,
        *,
        keep: bool = False,
        tensors: int = 0,
        record: Callable[[bytes], None] | None = None,
    ) -> None:
        self._codec = codec
        self._length = length
        self._keep = keep
        self._record = record
        self._weights_T = np.zeros(tensors) if tensors else None
        self._single: list[EncodedSum] = []
        self._scale = 1.0
        self._sum: NDArray[np.float64] | NDArray[np.int64] | None = None
        self._weight = 0.0
        self._survivors: list[str] = []
        self._bytes = 0

    def open(self) -> None:
        """Nothing to exchange."""

    def send(self, client_id: str, encoded: Encoded, weight: float, trained_T: Flags | None = None) -> None:
        """Serialise on the client's side, count the bytes, add on the server's."""
        self.receive(plain_message(client_id, encoded, weight, trained_T))

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
            weights_T=None if self._weights_T is None else self._weights_T.copy(),
        )

    def _encoded(self, values: NDArray[np.float64] | NDArray[np.int64], survivors: int, weight: float) -> EncodedSum:
        return EncodedSum(
            sum_M=values,
            codec=self._codec.name,
            scale=self._scale,
            length=self._length,
            survivors=survivors,
            total_weight=weight,
        )

    def receive(self, message: bytes, expected: tuple[str, float] | None = None) -> None:
        """Add one client's message.

        Args:
            message: As :func:`plain_message` makes it.
            expected: Who sent it and with what weight, where the server knows that from elsewhere.

        Raises:
            ProtocolError: If it is malformed, is the client's second one, or is not what was expected.
        """
        self._bytes += len(message)
        got = read(message, length=self._length, codec=self._codec)
        if expected not in (None, (got.client_id, got.weight)):
            raise ProtocolError(
                f"Got {got.client_id} with weight {got.weight:g}, expected (client, weight) {expected}."
            )
        if got.client_id in self._survivors:
            raise ProtocolError(f"{got.client_id} sent a second message; the first stands.")
        trained_T = self._trained(got.client_id, got.trained)
        if self._sum is None:
            self._sum, self._scale = got.values.copy(), got.scale
        elif got.scale != self._scale or got.values.dtype != self._sum.dtype:
            raise ProtocolError(f"{got.client_id} encoded in another way than the others: the sum would mean nothing.")
        else:
            self._sum += got.values
        if self._keep:
            self._single.append(self._encoded(got.values, 1, got.weight))
        self._weight += got.weight
        if self._weights_T is not None:
            self._weights_T += got.weight * trained_T
        self._survivors.append(got.client_id)
        if self._record:
            self._record(message)

    def _trained(self, client_id: str, packed: bytes) -> Flags:
        """Return which tensors a client says that it trained [T]."""
        count = 0 if self._weights_T is None else len(self._weights_T)
        if len(packed) != -(-count // 8):
            raise ProtocolError(
                f"{client_id} sent {len(packed)} bytes that say which tensors it trained, expected {-(-count // 8)}."
            )
        return np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=count).astype(bool)


def plain_message(client_id: str, encoded: Encoded, weight: float, trained_T: Flags | None = None) -> bytes:
    """Return one client's message where nothing is masked; the arguments are those of ``Link.send``."""
    trained = b"" if trained_T is None else np.packbits(trained_T).tobytes()
    return to_bytes(encoded, client_id=client_id, weight=weight, trained=trained)


class MaskedLink:
    """Secure aggregation: the server gets masked vectors and learns their sum only.

    Args:
        identities: The round's cohort, at least two: client to its signing key. In one process the link is the
            client's side as well, so it has the private halves; the server is given the public ones only.
        requirements: What the session has to stand.
        round_id: Unique for the round; bound into every message.
        config_digest: Bound into every message.
        codec: Name of the codec.
        length: D, the number of values that each client gave to the codec.
        values: The number of values that it made of them; None for D as well.
        weighted: Whether a masked weight travels beside the values.
        tensors: T, the number of tensors, where clients train different ones: then a masked weight of each travels, 0
            for one that the client did not train. Else 0.
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
        values: int | None = None,
        tensors: int = 0,
    ) -> None:
        self._masking = Masking(
            clients=len(identities),
            ring_bits=ring_bits,
            codec=codec,
            length=length,
            values=length if values is None else values,
            weighted=weighted,
            tensors=tensors,
        )
        roster = {client: identity.public for client, identity in identities.items()}
        params = self._masking.params(roster, requirements, round_id=round_id, config_digest=config_digest)
        self._server = ServerSession(params)
        self._clients = {client: ClientSession(params, client, one) for client, one in identities.items()}
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

    def send(self, client_id: str, encoded: Encoded, weight: float, trained_T: Flags | None = None) -> None:
        """Mask on the client's side; the server adds the masked vector on arrival.

        Raises:
            ProtocolError: If ``trained_T`` is not of as many tensors as the link was made for.
        """
        values_M = self._masking.vector(encoded, weight, trained_T)
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
        return self._masking.collected(sum_M, names, scale=self._scale, bytes_up=self._up, bytes_down=self._down)

    def _counted(self, message: bytes) -> bytes:
        self._up += len(message)
        return message

    def _fetched(self, message: bytes) -> bytes:
        self._down += len(message)
        return message
