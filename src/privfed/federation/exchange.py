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
from privfed.errors import BudgetExceededError, ConfigError, LedgerError, ThresholdError
from privfed.federation import ranks
from privfed.federation.client import Answer, Client, Holder
from privfed.federation.collect import Collected, Link, MaskedLink, PlainLink
from privfed.federation.layers import OTHERS, Layers
from privfed.federation.meter import Meter
from privfed.federation.progress import Progress
from privfed.federation.sharing import Selection
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
    saturated: int = 0
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
        if (refusal := self._laid_bare(cohort)) is not None:  # before anybody trains, and pays for it
            return NOTHING, refusal
        try:
            link = self._link(cohort, codec, requirements)
        except ConfigError as error:  # such as weights that so small a ring cannot sum
            return NOTHING, str(error)
        with _timed(self):
            link.open()
        for client_id in cohort:
            self._serve(link, phase.clients[client_id], ask)
        if phase.shares is not None:
            refusal = phase.shares.refusal(link.sent, self.broadcast, self.round, self.holder)
            if refusal is not None:
                return NOTHING, refusal
        if (refusal := self._laid_bare(link.sent)) is not None:
            return NOTHING, refusal
        try:
            with _timed(self):
                collected = link.close()
        except ThresholdError as error:
            return NOTHING, str(error)
        if collected.total is None and phase.central is None:
            return collected, "no client survived"
        return collected, None

    def _link(self, cohort: Sequence[str], codec: Codec, requirements: Requirements) -> Link:
        phase, length = self.phase, self.phase.message_size(self.round)
        tensors = len(self._sent.names) if self._counted else 0
        if not phase.masked:
            record = phase.recorder.message if phase.recorder else None
            keep = phase.sharing.rule.needs_individual
            return PlainLink(codec, length, keep=keep, tensors=tensors, record=record)
        # a fresh nonce: keys of a round that a crash cut short never meet those of its repetition
        label = f"{self.holder.run_id}/{phase.plan.name}/{self.round}/{time.time_ns()}"
        return MaskedLink(
            {client: phase.identities[client] for client in cohort},
            requirements=requirements,
            round_id=hashlib.sha256(label.encode()).digest(),
            config_digest=bytes.fromhex(phase.config_digest),
            codec=phase.codec_name,
            length=length,
            values=length if phase.shares is not None else codec.sum_length(length),
            weighted=phase.weighted,
            ring_bits=phase.ring_bits,
            tensors=tensors,
        )

    @property
    def _sent(self) -> Selection:
        return self.phase.sharing.part(self.round).sent

    @property
    def _counted(self) -> Layers | None:
        """Who trains what, where the sum says by how many each tensor was trained; None where it must not."""
        return None if self.phase.central else self.phase.layers

    def _laid_bare(self, clients: Sequence[str]) -> str | None:
        """Return why these clients let no masked sum of theirs be unmasked, if they do not."""
        phase, least = self.phase, self.corrupt + OTHERS
        if not phase.masked:
            return None
        if phase.layers is not None:
            return phase.layers.refusal(clients, self._sent, least)
        return (
            ranks.refusal((phase.clients[client].support for client in clients), least) if phase.server.ranks else None
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
            with _timed(self):
                trained_T = self._counted.trained(client_id, self._sent) if self._counted else None
                link.send(client_id, answer.encoded, client.weight, trained_T)
            self.saturated += answer.encoded.saturated
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


class _timed:  # noqa: N801
    """Add the body's time to the exchange's link seconds."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_exc: object) -> None:
        self._exchange.link_seconds += time.perf_counter() - self._started
