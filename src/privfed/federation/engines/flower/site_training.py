"""A site's training in a round: each client's answer, remembered and charged, then masked or packed to be sent."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

from privfed.errors import ProtocolError
from privfed.federation.collect import plain_message
from privfed.federation.exchange import trained_by, values_of
from privfed.federation.messages import Broadcast

if TYPE_CHECKING:
    from privfed.federation.client import Answer, Client
    from privfed.federation.engines.flower.memory import SiteMemory
    from privfed.federation.engines.flower.run_at_site import SiteRun
    from privfed.federation.engines.flower.site_session import SiteSession


class Training:
    """What a site's clients do with one broadcast.

    Args:
        run: The run.
        broadcast: The server's message, the same for all clients.
        place: (phase, round) that it is said to be for.
        session: The session that masks what is sent, or None.
        memory: Where answers are remembered.

    Raises:
        ProtocolError: If the broadcast is for another place, run or session, or the round is not this cohort's.
    """

    def __init__(
        self, run: SiteRun, broadcast: bytes, place: tuple[str, int], session: SiteSession | None, memory: SiteMemory
    ) -> None:
        self._run, self._broadcast, self._session, self._memory = run, broadcast, session, memory
        self._number, stage = run.stage(place[0])
        self._phase, self._round = stage.phase, place[1]
        self._cohort = run.cohort(place[0], self._round) if 1 <= self._round <= stage.phase.plan.rounds else ()
        got = Broadcast.from_bytes(broadcast, size=self._phase.sharing.shared.size)
        of_session = place if session is None else (session.spec.phase, session.spec.round)
        if (got.phase, got.round) != place or of_session != place or got.run_id != run.holder.run_id:
            raise ProtocolError(f"The broadcast is not of round {self._round} of {place[0]} of this run.")
        if session is not None:
            session.broadcast = broadcast
        if self._phase.store is not None:
            self._phase.store.settle(self._round - 1)  # a round is sent once the one before is durable at the server
        run.use(place[0])
        self.seconds = {"train": 0.0, "mask": 0.0}
        self.scales: dict[str, float] = {}

    def message(self, client_id: str, shares: bytes | None) -> bytes:
        """Return what a client sends.

        Args:
            client_id: One of the site's.
            shares: The server's SHARES message for it, where what is sent is masked.

        Raises:
            StageError: If the client answered the round, or a later one, before.
            ClientError: If training fails.
            BudgetExceededError: If the charge passes a cap.
            SecAggError: If the message cannot be masked.
        """
        if self._run.masked and (self._session is None or shares is None):
            raise ProtocolError("The server asks for an update without a mask: nothing was computed.")
        started = time.perf_counter()
        client, answer = self._answer(client_id)
        trained_T = trained_by(self._phase, client_id, self._round)
        between = time.perf_counter()
        self.seconds["train"] += between - started
        if self._session is None:
            sent = plain_message(client_id, answer.encoded, client.weight, trained_T)
        else:
            sent = self._masked(self._session, client_id, answer, client.weight, shares)
        self.seconds["mask"] += time.perf_counter() - between
        return sent

    def _answer(self, client_id: str) -> tuple[Client, Answer]:
        if self._cohort is not None and client_id not in self._cohort:
            raise ProtocolError(f"Client {client_id!r} is not in the cohort of round {self._round}.")
        plan = self._phase.plan
        most = plan.rounds if self._phase.central else plan.participations
        digest = hashlib.sha256(self._broadcast).hexdigest()
        self._memory.answer(self._run.run_id, client_id, (self._number, self._round), digest, most)
        client = self._phase.clients[client_id]
        return client, client.respond(self._broadcast, lambda _step, _steps: None)

    def _masked(
        self, session: SiteSession, client_id: str, answer: Answer, weight: float, shares: bytes | None
    ) -> bytes:
        if shares is None:
            raise ProtocolError("There are no shares to mask with: nothing was sent.")
        if values_of(self._phase, answer.codec, self._round) != session.masking.values:
            raise ProtocolError("The session was made for another number of values than the codec of the round makes.")
        values_M = session.masking.vector(answer.encoded, weight, trained_by(self._phase, client_id, self._round))
        self.scales[client_id] = answer.encoded.scale
        return session.client(client_id).masked_input(shares, values_M)
