"""A client's side of a round: train, bound, charge, encode. Nothing leaves before the ledger has it on disk.

Shape suffixes: D trained values, S shared values, M values sent in a round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from privfed.compression import Codec
from privfed.compression.feedback import corrected, residual
from privfed.compression.message import sum_of_one
from privfed.errors import ClientError, ProtocolError
from privfed.federation.codecs import (
    Downlink,
    Place,
    codec_at,
    received_params,
    residual_name,
    residuals,
    second_codec,
)
from privfed.federation.distributed import Shares
from privfed.federation.local import LocalTrainer, StepDone, Work
from privfed.federation.messages import Broadcast, Interim
from privfed.federation.personal import PERSONAL, PersonalStore
from privfed.federation.ranks import Support
from privfed.federation.sharing import Part, Selection, Sharing
from privfed.privacy.ledger import Charge, Ledger
from privfed.privacy.mechanisms import AtWork, Terms
from privfed.rng import PrivateStream
from privfed.rules.scaffold import CONTROL, variate_change
from privfed.types import Encoded, Float32, PrivacyEvent, Shard, Update


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a client sends in a round.

    Attributes:
        encoded: The message, or that of the first of two passes.
        codec: The codec of the round that made it.
        go_on: Maps the server's message between the passes to the answer of the second one; None after the last. The
            client holds its update until then.
    """

    encoded: Encoded = field(repr=False)
    codec: Codec = field(repr=False)
    go_on: Callable[[bytes], Answer] | None = field(default=None, repr=False)


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
        seed: The run's: the codec's public choices of each round follow from it.
        downlink: Reads the broadcast's parameters where they are encoded.
        support: The part of the adapter that a client of a lower rank has, or None.
        trained: Names of the tensors that it trains; None for all.
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
    seed: int = 0
    downlink: Downlink | None = None
    support: Support | None = None
    trained: frozenset[str] | None = None

    def respond(self, broadcast: bytes, on_step: StepDone, start_D: Float32 | None = None) -> Answer:
        """Return the encoded, weighted update for ``broadcast``; its cost is in the ledger by then.

        The noise derives from the digest of the broadcast and of the client's own state: the same ones, after a
        crash, give the same message and no new charge; others meet other noise and are charged anew.

        Under example-level privacy the gradient over shared and personal tensors is clipped and noised as one vector,
        so both are private; under client level only what is sent is clipped, and what stays is not protected.
        Under distributed noise what is returned has only the client's own share of it: it is masked before it leaves.
        With error feedback what is clipped and encoded is the update with what earlier messages left out added to it.

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
        received = replace(received, params_D=received_params(received, self.downlink), packed=None)
        part = sharing.part(received.round)
        from_D = self._start(received.params_D, own)
        delta_D = self.trainer.run(
            from_D,
            self.shard,
            self.holder.stream("train", *place, digest),
            on_step,
            self._work(received, own, self._active(part)),
        )
        codec = self._codec(received, part.sent, from_D)
        update, given_M = self._given(part.sent, delta_D, own, received.terms)
        encoded = codec.encode(given_M, self.holder.stream("encode", *place, digest))
        if self.event is not None:
            self.holder.charge(*place, digest, self.event)
        sent = _Sent(
            received=received, own=own, delta_D=delta_D, update=update, given_M=given_M, digest=digest, first=encoded
        )
        if codec.properties.second_pass:
            return Answer(encoded=encoded, codec=codec, go_on=partial(self._second, codec, sent))
        self._keep(sent, codec, encoded)
        return Answer(encoded=encoded, codec=codec)

    def _second(self, first: Codec, sent: _Sent, message: bytes) -> Answer:
        """Return the answer of a codec's second pass, on the update of the first; it was charged before that."""
        received = sent.received
        told = Interim.from_bytes(message, phase=received.phase, round_number=received.round)
        codec = second_codec(first, told.values, sent.given_M.size, first.linear_sum(sum_of_one(sent.first, first)))
        place = (self.shard.client_id, received.phase, received.round)
        again = hashlib.sha256(sent.digest.encode() + message).hexdigest()
        encoded = codec.encode(sent.given_M, self.holder.stream("encode", *place, again))
        self._keep(sent, codec, encoded)
        return Answer(encoded=encoded, codec=codec)

    def _shared_out(self, received: Broadcast, digest: str, shares: Shares, on_step: StepDone) -> Answer:
        """Return the client's residues, its share of the noise in them, charged at what ``n_min`` survivors give."""
        if self.event is None:
            raise ClientError("This client's share of the noise has no charge to go with it: nothing was sent.")
        place = (self.shard.client_id, received.phase, received.round)
        training = self.holder.stream("train", *place, digest)
        vector_D = shares.vector(self.trainer, received.params_D, self.shard, training, on_step)
        encoded = shares.encode(vector_D, received.run_id, received.round, self.holder.stream("share", *place, digest))
        self.holder.charge(*place, digest, self.event)
        return Answer(encoded=encoded, codec=self.codec)

    def _codec(self, received: Broadcast, sent: Selection, from_D: Float32) -> Codec:
        """Return the codec of the round, in which the client trains from ``from_D``."""
        place = Place(seed=self.seed, run_id=received.run_id, phase=received.phase, round=received.round)
        return codec_at(self.codec, place, sent, received.codec, from_D)

    def _given(
        self, sent: Selection, delta_D: Float32, own: Mapping[str, Float32], terms: Terms
    ) -> tuple[Update, Float32]:
        """Return the update, bounded where it has to be, and what is given to the codec [M].

        With error feedback the *corrected* vector is what is bounded; weights are 1 wherever anything is.
        """
        delta_M = sent.take(delta_D)
        update = self._bounded(delta_M, terms)
        weighted_M = update.delta_D * np.float32(self.weight)
        residual_M = own.get(residual_name(sent))
        if residual_M is None:
            return update, weighted_M
        corrected_M = corrected(delta_M * np.float32(self.weight), residual_M)
        return update, self._bounded(corrected_M, terms).delta_D

    def _own(self, round_number: int, start_D: Float32 | None) -> dict[str, Float32]:
        """Return what the client keeps, as it was before a round."""
        own = self.store.load(self.shard.client_id, before=round_number) if self.store else {}
        if self.sharing.personal.size and PERSONAL not in own:
            if start_D is None:
                raise ClientError("This client keeps tensors of its own and was not told where they start.")
            own[PERSONAL] = self.sharing.personal.take(start_D)
        return own

    def _start(self, shared_S: Float32, own: Mapping[str, Float32]) -> Float32:
        start_D = self.sharing.merged(shared_S, own.get(PERSONAL))
        return start_D if self.support is None else start_D * self.support.mask_D

    def _active(self, part: Part) -> frozenset[str] | None:
        """Return what the client trains in a round; None for all."""
        if self.trained is None or part.active is None:
            return self.trained if part.active is None else part.active
        return self.trained & part.active

    def _work(self, received: Broadcast, own: Mapping[str, Float32], active: frozenset[str] | None) -> Work:
        control_S = received.carried.get(CONTROL)
        if not self.sharing.rule.variates or control_S is None:
            return Work(active=active, frozen=received.carried, support=self.support.by_name if self.support else {})
        correction_S = control_S - own.get(CONTROL, np.zeros_like(control_S))
        return Work(
            active=active,
            frozen=received.carried,
            correction_D=self.sharing.merged(correction_S, np.zeros(self.sharing.personal.size, dtype=np.float32)),
        )

    def _keep(self, sent: _Sent, codec: Codec, encoded: Encoded) -> None:
        """Write what stays with the client; what it sends is on its way only after this."""
        if self.store is None:
            return
        received, own, update = sent.received, sent.own, sent.update
        kept = residuals(own)
        if codec.properties.stateful:
            kept[residual_name(self.sharing.part(received.round).sent)] = residual(codec, sent.given_M, encoded)
        if self.sharing.personal.size:
            kept[PERSONAL] = self.sharing.personal.take(self._start(received.params_D, own) + sent.delta_D)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    """What a client holds of a round from its training to its last message.

    Attributes:
        received: The broadcast, its parameters decoded.
        own: What the client kept before the round.
        given_M: What was given to the codec.
        digest: Of everything that the round depends on beside the data.
        first: The first message.
    """

    received: Broadcast
    own: Mapping[str, Float32] = field(repr=False)
    delta_D: Float32 = field(repr=False)
    update: Update
    given_M: Float32 = field(repr=False)
    digest: str
    first: Encoded = field(repr=False)


def _digest(broadcast: bytes, own: Mapping[str, Float32]) -> str:
    """Return the SHA-256 of everything, beside the data, that a client's round depends on."""
    state = hashlib.sha256(broadcast)
    for name in sorted(own):
        state.update(name.encode() + own[name].astype("<f4").tobytes())
    return state.hexdigest()
