"""The messages of one round: who is asked, who answers, and the sum that the server gets of it.

A codec with two passes exchanges twice. The second time only those are asked whose first messages are in the first
sum, and the update is made of the second sum over *its* survivors.

* Without masking a client that drops between the passes is missing from the second sum alone. What was made public
  between them still holds its share: a direction, of which the rest make the best they can.
* Under masking some may drop as well, for the second sum says nothing that the first one did (the codec sees to that:
  ``privfed.compression.powersgd``). Each sum hides a client among its own survivors, of which each has to have as many
  as [secagg] demands; with too few the round is lost. That the second sum's roster is the survivors it signed in the
  first is so by construction here; in a deployment every client has to compare the two.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from privfed.compression import Codec
from privfed.errors import BudgetExceededError, ConfigError, LedgerError, SecAggError, ThresholdError
from privfed.federation import ranks
from privfed.federation.client import Answer, Client, Holder
from privfed.federation.collect import Collected, Flags, Link, MaskedLink, PlainLink
from privfed.federation.layers import OTHERS, Layers
from privfed.federation.masking import Masking
from privfed.federation.meter import Meter
from privfed.federation.progress import Progress
from privfed.federation.state import ServerState
from privfed.secagg import Requirements

if TYPE_CHECKING:
    from privfed.federation.round import Phase

Heard = tuple[Collected, str | None]
"""What the server got, and why the round is lost where it is."""
NOTHING = Collected(total=None, survivors=(), bytes_up=0, bytes_down=0)


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One round's messages, and running figures of them.

    Attributes:
        given: The state with the parameters that clients train from.
        broadcast: What every client is sent.
        held: Answers of the first pass, at the clients, until the second one.
        corrupt: How many of the cohort may be corrupt.
        saturated: How many values clients cut to the codec's range; None where they do not say.
    """

    phase: Phase
    holder: Holder
    progress: Progress
    given: ServerState
    broadcast: bytes
    meter: Meter | None
    dropped: list[tuple[str, str]] = field(default_factory=list)
    held: dict[str, Answer] = field(default_factory=dict, repr=False)
    corrupt: int = 0
    saturated: int | None = 0
    train_seconds: float = 0.0
    link_seconds: float = 0.0

    @property
    def round(self) -> int:
        """The round, counted from 1."""
        return self.given.round + 1

    def first(self, cohort: Sequence[str], codec: Codec) -> Heard:
        """Send the broadcast to a cohort and return what came of it."""
        self.corrupt = self.phase.requirements.most_corrupt(len(cohort))
        return self._heard(cohort, codec, self.phase.requirements, self._respond)

    def second(self, heard: Sequence[str], codec: Codec, interim: bytes) -> Heard:
        """Send what lies between the passes to those who were heard in the first one, and return what came of it."""

        def go_on(client: Client) -> Answer:
            answer = self.held.pop(client.shard.client_id)
            if answer.go_on is None:
                raise ConfigError(f"The first answer of {client.shard.client_id} was its last.")
            return answer.go_on(interim)

        collected, lost = self._heard(heard, codec, self._of_the_rest(len(heard)), go_on)
        return replace(collected, bytes_down=collected.bytes_down + len(interim) * len(heard)), lost

    def _of_the_rest(self, heard: int) -> Requirements:
        """Return what the second sum has to stand: as many may drop of those who were heard as the shares allow.

        All of the cohort's corrupt clients may be among those who were heard.
        """
        wanted = self.phase.requirements
        if not self.phase.masked or heard < 2:
            return wanted
        corrupt, dropped = min(self.corrupt, heard - 1) / heard, wanted.dropped
        if wanted.n_min is not None:
            dropped = min(dropped, (heard - wanted.n_min) / heard)
        if 2 * dropped + corrupt >= 1:  # too few for anybody else to drop
            return replace(wanted, dropped=0.0, n_min=heard, corrupt=corrupt)
        return replace(wanted, dropped=dropped, corrupt=corrupt)

    def _heard(
        self, cohort: Sequence[str], codec: Codec, requirements: Requirements, ask: Callable[[Client], Answer]
    ) -> Heard:
        phase = self.phase
        if not cohort or (phase.masked and not requirements.met_by(len(cohort))):
            return NOTHING, None if phase.central else f"a masked sum over {len(cohort)} clients cannot meet [secagg]"
        refusal = laid_bare(phase, self.round, cohort, self.corrupt)  # before anybody trains, and pays for it
        if refusal is not None:
            return NOTHING, refusal
        try:
            link = self._link(cohort, codec, requirements)
            with timed(self):
                link.open()
        except (ConfigError, ThresholdError) as error:  # such as weights that so small a ring cannot sum
            return NOTHING, str(error)
        self._serve_all(link, cohort, ask)
        if phase.shares is not None:
            refusal = phase.shares.refusal(link.sent, self.broadcast, self.round, self.holder)
            if refusal is not None:
                return NOTHING, refusal
        if (refusal := laid_bare(phase, self.round, link.sent, self.corrupt)) is not None:
            return NOTHING, refusal
        try:
            with timed(self):
                collected = link.close()
        except SecAggError as error:  # too few, or shares that give no secret: nothing was unmasked
            return NOTHING, str(error)
        if collected.total is None and phase.central is None:
            return collected, "no client survived"
        return collected, None

    def _link(self, cohort: Sequence[str], codec: Codec, requirements: Requirements) -> Link:
        phase = self.phase
        if not phase.masked:
            return self._plain_link(codec)
        # a fresh nonce: keys of a round that a crash cut short never meet those of its repetition
        label = f"{self.holder.run_id}/{phase.plan.name}/{self.round}/{time.time_ns()}"
        masking = masking_of(phase, self.round, len(cohort), values_of(phase, codec, self.round))
        return MaskedLink(
            {client: phase.identities[client] for client in cohort},
            requirements=requirements,
            round_id=hashlib.sha256(label.encode()).digest(),
            config_digest=bytes.fromhex(phase.config_digest),
            codec=masking.codec,
            length=masking.length,
            values=masking.values,
            weighted=masking.weighted,
            ring_bits=masking.ring_bits,
            tensors=masking.tensors,
        )

    def _serve_all(self, link: Link, cohort: Sequence[str], ask: Callable[[Client], Answer]) -> None:
        """Let the cohort's clients send."""
        for client_id in cohort:
            self._serve(link, self.phase.clients[client_id], ask)

    def extra_seconds(self) -> dict[str, float]:
        """Return what else there is to say of where time went."""
        return {}

    def _plain_link(self, codec: Codec) -> PlainLink:
        phase = self.phase
        return PlainLink(
            codec,
            phase.message_size(self.round),
            keep=phase.sharing.rule.needs_individual,
            tensors=counted_tensors(phase, self.round),
            record=phase.recorder.message if phase.recorder else None,
        )

    def _respond(self, client: Client) -> Answer:
        """Let one client train."""
        client_id, started = client.shard.client_id, time.perf_counter()
        answer = client.respond(
            self.broadcast, lambda step, steps: self.progress.step_done(client_id, step, steps), self.given.params_D
        )
        self.train_seconds += time.perf_counter() - started
        return answer

    def _serve(self, link: Link, client: Client, ask: Callable[[Client], Answer]) -> None:
        """Let one client send; whatever goes wrong in it drops it from the round."""
        client_id = client.shard.client_id
        try:
            answer = ask(client)
            with timed(self):
                link.send(client_id, answer.encoded, client.weight, trained_by(self.phase, client_id, self.round))
            self.saturated = (self.saturated or 0) + answer.encoded.saturated
            if answer.go_on is not None:
                self.held[client_id] = answer
                return
            if self.meter:
                self.meter.sent(self.given, answer, client.weight, len(client.shard))
        except (BudgetExceededError, LedgerError):
            raise
        except Exception as error:  # noqa: BLE001  (any failure of one client must cost the round only that client)
            # under client level a message could carry a figure of the protected client: its kind has to do
            guarded = client.mechanism is not None or client.shares is not None
            reason = type(error).__name__ if guarded else f"{type(error).__name__}: {error}"
            self.dropped.append((client_id, reason))
            self.progress.client_dropped(client_id, reason)
        self.progress.client_done(client_id)


class timed:  # noqa: N801
    """Add the body's time to the exchange's link seconds."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_exc: object) -> None:
        self._exchange.link_seconds += time.perf_counter() - self._started


def laid_bare(phase: Phase, number: int, clients: Sequence[str], corrupt: int) -> str | None:
    """Return why these clients let no masked sum of theirs be unmasked, if they do not.

    Args:
        phase: The phase.
        number: The round.
        clients: Whose sum it would be.
        corrupt: How many of the round's cohort may be corrupt.
    """
    least = corrupt + OTHERS
    if not phase.masked:
        return None
    if phase.layers is not None:
        return phase.layers.refusal(clients, phase.sharing.part(number).sent, least)
    if phase.server.ranks:
        return ranks.refusal((phase.clients[client].support for client in clients), least)
    return None


def counted(phase: Phase) -> Layers | None:
    """Return who trains what, where the sum says by how many each tensor was trained; None where it must not."""
    return None if phase.central else phase.layers


def counted_tensors(phase: Phase, number: int) -> int:
    """Return of how many tensors a message of a round says whether its client trained them."""
    return len(phase.sharing.part(number).sent.names) if counted(phase) else 0


def trained_by(phase: Phase, client_id: str, number: int) -> Flags | None:
    """Return what a client's message of a round says of what it trained [T], where it says anything."""
    layers = counted(phase)
    return layers.trained(client_id, phase.sharing.part(number).sent) if layers else None


def values_of(phase: Phase, codec: Codec, number: int) -> int:
    """Return how many encoded values a masked message of a round holds, by the codec of the round or of its pass."""
    length = phase.message_size(number)
    return length if phase.shares is not None else codec.sum_length(length)


def masking_of(phase: Phase, number: int, clients: int, values: int) -> Masking:
    """Return what the masked messages of a round hold.

    Args:
        phase: The phase.
        number: The round.
        clients: How many take part.
        values: As :func:`values_of` says.

    Raises:
        ConfigError: If the ring cannot sum the weights of so many.
    """
    return Masking(
        clients=clients,
        ring_bits=phase.ring_bits,
        codec=phase.codec_name,
        length=phase.message_size(number),
        values=values,
        weighted=phase.weighted,
        tensors=counted_tensors(phase, number),
    )


Connect = Callable[..., Exchange]
"""Makes the exchange of a round from the arguments of :class:`Exchange`: how its messages travel."""
