"""A client's side of a round: train, bound, charge, encode. Nothing leaves before the ledger has it on disk.

Shape suffixes: D trained values, S shared values, M values sent in a round.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgpack
import numpy as np

from privfed.compression import Codec
from privfed.errors import ClientError, ProtocolError
from privfed.federation.distributed import Shares
from privfed.federation.local import LocalTrainer, StepDone, Work
from privfed.federation.personal import PERSONAL, PersonalStore
from privfed.federation.sharing import Sharing
from privfed.privacy.ledger import Charge, Ledger
from privfed.privacy.mechanisms import AtWork, Terms
from privfed.rng import PrivateStream
from privfed.rules.scaffold import CONTROL, variate_change
from privfed.types import Encoded, Float32, PrivacyEvent, Shard, Update

_HEADER_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Broadcast:
    """What the server sends to every client of a round.

    Attributes:
        params_D: The shared parameters.
        carried: Tensors by name that the server changes and no client trains, and a rule's own vectors.
        terms: What the privacy mechanism tells the clients.
    """

    run_id: str
    phase: str
    round: int
    layout_digest: str
    params_D: Float32 = field(repr=False)
    carried: Mapping[str, Float32] = field(default_factory=dict, repr=False)
    terms: Terms = ()

    def to_bytes(self) -> bytes:
        """Return the message."""
        names = [[name, list(value.shape)] for name, value in self.carried.items()]
        fields = [2, self.run_id, self.phase, self.round, self.layout_digest, names, list(self.terms)]
        header: bytes = msgpack.packb(fields)
        parts = [self.params_D, *self.carried.values()]
        payload = b"".join(np.ascontiguousarray(part).astype("<f4").tobytes() for part in parts)
        return len(header).to_bytes(_HEADER_BYTES, "little") + header + payload

    @staticmethod
    def from_bytes(message: bytes, *, size: int) -> Broadcast:
        """Return the broadcast of ``size`` parameters in ``message``.

        Raises:
            ProtocolError: If it is malformed or of another size.
        """
        end = _HEADER_BYTES + int.from_bytes(message[:_HEADER_BYTES], "little")
        try:
            version, run_id, phase, number, digest, names, terms = msgpack.unpackb(message[_HEADER_BYTES:end])
            sizes = [math.prod(shape) for _, shape in names]
            sound = all(isinstance(term, float) and math.isfinite(term) for term in terms)
        except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
            raise ProtocolError(f"The broadcast's header cannot be read: {error}.") from error
        if version != 2 or len(message) - end != 4 * (size + sum(sizes)):
            raise ProtocolError(
                f"The broadcast holds {(len(message) - end) // 4} values, expected {size + sum(sizes)}."
            )
        if not sound:
            raise ProtocolError(f"The broadcast's terms are {terms}, expected finite numbers.")
        values = np.frombuffer(message[end:], dtype="<f4").astype(np.float32)
        params_D, *parts = np.split(values, np.cumsum([size, *sizes])[:-1])
        carried = {name: part.reshape(shape) for (name, shape), part in zip(names, parts, strict=True)}
        return Broadcast(
            run_id=run_id,
            phase=phase,
            round=number,
            layout_digest=digest,
            params_D=params_D,
            carried=carried,
            terms=tuple(terms),
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
        sharing: What it trains, sends and keeps.
        store: Where it keeps its own state, where it has any.
        event: What a participation is charged to this client's account, or None where the client charges nothing.
        mechanism: What bounds the update under client-level privacy at a trusted server, or None.
        shares: How the client adds its share of distributed noise, or None.
        weight: Aggregation weight, at most 1.
    """

    shard: Shard
    trainer: LocalTrainer
    codec: Codec
    holder: Holder
    sharing: Sharing
    store: PersonalStore | None
    event: PrivacyEvent | None
    mechanism: AtWork | None
    weight: float
    shares: Shares | None = None

    def respond(self, broadcast: bytes, on_step: StepDone, start_D: Float32 | None = None) -> Encoded:
        """Return the encoded, weighted update for ``broadcast``; its cost is in the ledger by then.

        The noise derives from the digest of the broadcast and of the client's own state: the same ones, after a
        crash, give the same message and no new charge; others meet other noise and are charged anew.

        Under example-level privacy the gradient over shared and personal tensors is clipped and noised as one vector,
        so both are private; under client level only what is sent is clipped, and what stays is not protected.
        Under distributed noise what is returned has only the client's own share of it: it is masked before it leaves.

        Args:
            broadcast: The server's message.
            on_step: Told (step, steps) after each step.
            start_D: The trained tensors at the start of the phase, which every client has: where its personal ones
                start. Needed only where some are personal.

        Raises:
            ClientError: If training fails.
            ProtocolError: If the broadcast does not fit this client's model.
            BudgetExceededError: If the charge would pass the cap.
        """
        sharing = self.sharing
        received = Broadcast.from_bytes(broadcast, size=sharing.shared.size)
        if received.layout_digest != sharing.layout.digest:
            raise ProtocolError("The broadcast is for another set of trained tensors than this client's.")
        own = self._own(received.round, start_D)
        digest = _digest(broadcast, own)
        place = (self.shard.client_id, received.phase, received.round)
        if self.shares is not None:
            return self._shared_out(received, digest, self.shares, on_step)
        part = sharing.part(received.round)
        delta_D = self.trainer.run(
            self._start(received.params_D, own),
            self.shard,
            self.holder.stream("train", *place, digest),
            on_step,
            self._work(received, own, part.active),
        )
        update = self._bounded(part.sent.take(delta_D), received.terms)
        rounding = self.holder.stream("encode", *place, digest)
        encoded = self.codec.encode(update.delta_D * np.float32(self.weight), rounding)
        if self.event is not None:
            self.holder.charge(*place, digest, self.event)
        self._keep(received, own, delta_D, update)
        return encoded

    def _shared_out(self, received: Broadcast, digest: str, shares: Shares, on_step: StepDone) -> Encoded:
        """Return the client's residues, its share of the noise in them, charged at what ``n_min`` survivors give."""
        if self.event is None:
            raise ClientError("This client's share of the noise has no charge to go with it: nothing was sent.")
        place = (self.shard.client_id, received.phase, received.round)
        training = self.holder.stream("train", *place, digest)
        vector_D = shares.vector(self.trainer, received.params_D, self.shard, training, on_step)
        encoded = shares.encode(vector_D, received.run_id, received.round, self.holder.stream("share", *place, digest))
        self.holder.charge(*place, digest, self.event)
        return encoded

    def _own(self, round_number: int, start_D: Float32 | None) -> dict[str, Float32]:
        """Return what the client keeps, as it was before a round."""
        own = self.store.load(self.shard.client_id, before=round_number) if self.store else {}
        if self.sharing.personal.size and PERSONAL not in own:
            if start_D is None:
                raise ClientError("This client keeps tensors of its own and was not told where they start.")
            own[PERSONAL] = self.sharing.personal.take(start_D)
        return own

    def _start(self, shared_S: Float32, own: Mapping[str, Float32]) -> Float32:
        return self.sharing.merged(shared_S, own.get(PERSONAL))

    def _work(self, received: Broadcast, own: Mapping[str, Float32], active: frozenset[str] | None) -> Work:
        control_S = received.carried.get(CONTROL)
        if not self.sharing.rule.variates or control_S is None:
            return Work(active=active, frozen=received.carried)
        correction_S = control_S - own.get(CONTROL, np.zeros_like(control_S))
        return Work(
            active=active,
            frozen=received.carried,
            correction_D=self.sharing.merged(correction_S, np.zeros(self.sharing.personal.size, dtype=np.float32)),
        )

    def _keep(self, received: Broadcast, own: Mapping[str, Float32], delta_D: Float32, update: Update) -> None:
        """Write what stays with the client; what it sends is on its way only after this."""
        if self.store is None:
            return
        kept: dict[str, Float32] = {}
        if self.sharing.personal.size:
            kept[PERSONAL] = self.sharing.personal.take(self._start(received.params_D, own) + delta_D)
        if self.sharing.rule.variates:
            control_S = received.carried[CONTROL]
            change_S = variate_change(control_S, update.delta_D[: control_S.size], self.sharing.rates_S)
            kept[CONTROL] = (own.get(CONTROL, np.zeros_like(control_S)) + change_S).astype(np.float32)
        self.store.save(self.shard.client_id, received.round, kept)

    def _bounded(self, delta_M: Float32, terms: Terms) -> Update:
        bound = None
        if self.mechanism is not None:
            delta_M, bound = self.mechanism.bounded(delta_M, terms)
        return Update(
            client_id=self.shard.client_id,
            delta_D=delta_M,
            layout_digest=self.sharing.layout.digest,
            l2_bound=bound,
            weight=self.weight,
        )


def _digest(broadcast: bytes, own: Mapping[str, Float32]) -> str:
    """Return the SHA-256 of everything, beside the data, that a client's round depends on."""
    state = hashlib.sha256(broadcast)
    for name in sorted(own):
        state.update(name.encode() + own[name].astype("<f4").tobytes())
    return state.hexdigest()
