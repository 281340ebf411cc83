"""A client's side of a round: train, bound, charge, encode. Nothing leaves before the ledger has it on disk.

Shape suffix: D trained values.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

import msgpack
import numpy as np

from privfed.compression import Codec
from privfed.errors import ProtocolError
from privfed.federation.local import LocalTrainer, StepDone
from privfed.privacy.ledger import Charge, Ledger
from privfed.privacy.mechanisms import AtWork, Terms
from privfed.rng import PrivateStream
from privfed.types import Encoded, Float32, PrivacyEvent, Shard, Update

_HEADER_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Broadcast:
    """What the server sends to every client of a round.

    Attributes:
        terms: What the privacy mechanism tells the clients.
    """

    run_id: str
    phase: str
    round: int
    layout_digest: str
    params_D: Float32 = field(repr=False)
    terms: Terms = ()

    def to_bytes(self) -> bytes:
        """Return the message."""
        fields = [1, self.run_id, self.phase, self.round, self.layout_digest, *self.terms]
        header: bytes = msgpack.packb(fields)
        return len(header).to_bytes(_HEADER_BYTES, "little") + header + self.params_D.astype("<f4").tobytes()

    @staticmethod
    def from_bytes(message: bytes, *, size: int) -> Broadcast:
        """Return the broadcast of ``size`` parameters in ``message``.

        Raises:
            ProtocolError: If it is malformed or of another size.
        """
        end = _HEADER_BYTES + int.from_bytes(message[:_HEADER_BYTES], "little")
        try:
            version, run_id, phase, number, digest, *terms = msgpack.unpackb(message[_HEADER_BYTES:end])
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise ProtocolError(f"The broadcast's header cannot be read: {error}.") from error
        if version != 1 or len(message) - end != 4 * size:
            raise ProtocolError(f"The broadcast holds {(len(message) - end) // 4} values, expected {size}.")
        if not all(isinstance(term, float) and math.isfinite(term) for term in terms):
            raise ProtocolError(f"The broadcast's terms are {terms}, expected finite numbers.")
        params_D = np.frombuffer(message[end:], dtype="<f4").astype(np.float32)
        return Broadcast(
            run_id=run_id, phase=phase, round=number, layout_digest=digest, params_D=params_D, terms=tuple(terms)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The data holder that runs clients: its ledger, and the run's secret key.

    Attributes:
        key: 32 secret bytes; every batch and every noise of the run derives from it and from what it is used on.
        run_id: Names the run's streams.
        ledger_run_id: The run in the ledger.
    """

    ledger: Ledger
    key: bytes = field(repr=False)
    run_id: str
    ledger_run_id: str
    data_digest: str
    partition_digest: str
    project: str

    def stream(self, *names: str | int) -> PrivateStream:
        """Return the holder's private stream for ``names``."""
        return PrivateStream(self.key, self.run_id, *names)

    def charge(self, client_id: str, phase: str, round_number: int, input_digest: str, event: PrivacyEvent) -> None:
        """Write ``event`` to the ledger, durably, or raise.

        Raises:
            BudgetExceededError: If it would pass the cap.
        """
        self.ledger.charge(
            Charge(
                run_id=self.ledger_run_id,
                data_digest=self.data_digest,
                partition_digest=self.partition_digest,
                client_id=client_id,
                phase=phase,
                round=round_number,
                input_digest=input_digest,
                event=event,
                project=self.project,
            )
        )

    def recorded(self, client_id: str, phase: str, round_number: int) -> str | None:
        """Return the input digest of the first charge of a client's round, or None if it was never charged."""
        return self.ledger.first_input(self.ledger_run_id, client_id, phase, round_number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One client of one phase.

    Attributes:
        event: What a participation costs an example of this client, or None without example-level privacy.
        mechanism: What bounds the update under client-level privacy, or None.
        weight: Aggregation weight, at most 1.
    """

    shard: Shard
    trainer: LocalTrainer
    codec: Codec
    holder: Holder
    layout_digest: str
    size: int
    event: PrivacyEvent | None
    mechanism: AtWork | None
    weight: float

    def respond(self, broadcast: bytes, on_step: StepDone) -> Encoded:
        """Return the encoded, weighted update for ``broadcast``; its cost is in the ledger by then.

        The noise derives from the broadcast's digest: the same broadcast, after a crash, gives the same message
        and no new charge; another broadcast meets other noise and is charged anew.

        Raises:
            ClientError: If training fails.
            ProtocolError: If the broadcast does not fit this client's model.
            BudgetExceededError: If the charge would pass the cap.
        """
        received = Broadcast.from_bytes(broadcast, size=self.size)
        if received.layout_digest != self.layout_digest:
            raise ProtocolError("The broadcast is for another set of trained tensors than this client's.")
        digest = hashlib.sha256(broadcast).hexdigest()
        place = (self.shard.client_id, received.phase, received.round)
        stream = self.holder.stream("train", *place, digest)
        update = self._bounded(self.trainer.run(received.params_D, self.shard, stream, on_step), received.terms)
        rounding = self.holder.stream("encode", *place, digest)
        encoded = self.codec.encode(update.delta_D * np.float32(self.weight), rounding)
        if self.event is not None:
            self.holder.charge(*place, digest, self.event)
        return encoded

    def _bounded(self, delta_D: Float32, terms: Terms) -> Update:
        bound = None
        if self.mechanism is not None:
            delta_D, bound = self.mechanism.bounded(delta_D, terms)
        return Update(
            client_id=self.shard.client_id,
            delta_D=delta_D,
            layout_digest=self.layout_digest,
            l2_bound=bound,
            weight=self.weight,
        )
