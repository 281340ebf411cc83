"""A site's part of one session of secure aggregation: the sessions of the clients that it hosts.

What a session is about the site works out by itself: the cohort from the run's seed, the round's id from the place and
the attempt, the identities from the pinned roster, the requirements from the configuration. Of the server it takes the
number of the attempt, which only counts upwards, and the number of values, which is compared with the message that the
site then makes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from privfed.errors import ConfigError, ProtocolError, StageError
from privfed.federation.exchange import laid_bare, masking_of
from privfed.federation.masking import Masking
from privfed.federation.sites import Sites
from privfed.secagg import ClientSession, Identity, SessionParams

if TYPE_CHECKING:
    from privfed.federation.engines.flower.memory import SiteMemory
    from privfed.federation.engines.flower.run_at_site import SiteRun
    from privfed.federation.round import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What the server says of a session.

    Attributes:
        attempt: Counts the sessions of the whole run upwards, over restarts of the server too.
        cohort: Who takes part; compared with the site's own reckoning where it can be reckoned.
        values: M, the number of encoded values.
    """

    phase: str
    round: int
    attempt: int
    cohort: tuple[str, ...]
    values: int

    def packed(self) -> list[Any]:
        """Return the spec as msgpack takes it."""
        return [self.phase, self.round, self.attempt, list(self.cohort), self.values]

    @staticmethod
    def of(packed: object) -> Spec:
        """Return the spec that ``packed`` gave.

        Raises:
            ProtocolError: If it is none.
        """
        if not isinstance(packed, list) or len(packed) != 5:
            raise ProtocolError("The server describes a session in another way than expected.")
        phase, number, attempt, cohort, values = packed
        numbers = all(type(each) is int and each >= 0 for each in (number, attempt, values))
        if not (numbers and isinstance(phase, str) and isinstance(cohort, list)) or not all(
            isinstance(each, str) for each in cohort
        ):
            raise ProtocolError("The server describes a session with values of another type than expected.")
        return Spec(phase=phase, round=number, attempt=attempt, cohort=tuple(cohort), values=values)


def session_params(spec: Spec, phase: Phase, sites: Sites, run_id: str, digest: str) -> tuple[Masking, SessionParams]:
    """Return what a session's messages hold and its parameters; the same at the server and at every site.

    Args:
        spec: The session.
        phase: The phase, for what its messages look like.
        sites: The pinned roster.
        run_id: The run.
        digest: Of the configuration.

    Raises:
        ConfigError: If no session of the cohort meets the requirements.
    """
    strangers = sorted(set(spec.cohort) - set(sites.identities))
    if strangers:
        raise ConfigError(f"The roster has no client {strangers[0]!r}.")
    masking = masking_of(phase, spec.round, len(spec.cohort), spec.values)
    label = f"privfed session/{run_id}/{spec.phase}/{spec.round}/{spec.attempt}"
    return masking, masking.params(
        {client: sites.identities[client] for client in spec.cohort},
        phase.requirements,
        round_id=hashlib.sha256(label.encode()).digest(),
        config_digest=sites.bound(digest),
    )


@dataclass(slots=True)
class SiteSession:
    """The clients of one site in one session."""

    spec: Spec
    masking: Masking
    corrupt: int
    phase: Phase
    clients: dict[str, ClientSession]
    broadcast: bytes = field(default=b"", repr=False)

    @staticmethod
    def enter(spec: Spec, run: SiteRun, sites: Sites, identities: Mapping[str, Identity], least: int) -> SiteSession:
        """Return new sessions for the site's clients of the cohort.

        Args:
            spec: The session.
            run: The run.
            sites: The pinned roster.
            identities: The site's clients.
            least: Fewest clients in a cohort that the site takes part in.

        Raises:
            ProtocolError: If the cohort is not the one that follows from the run's seed.
            StageError: If none of the site's clients is in it.
            ConfigError: If the cohort cannot be masked, or would lay a client bare.
        """
        _, stage = run.stage(spec.phase)
        phase = stage.phase
        if not 1 <= spec.round <= phase.plan.rounds:
            raise ProtocolError(f"The server asks for round {spec.round} of {phase.plan.rounds}.")
        expected = run.cohort(spec.phase, spec.round)
        if expected is not None and spec.cohort != expected:
            raise ProtocolError(
                f"The server names {len(spec.cohort)} clients for round {spec.round} of {spec.phase}, and not those "
                "that follow from the run's seed: nothing was sent."
            )
        if len(spec.cohort) < least:
            raise ProtocolError(f"A cohort of {len(spec.cohort)} is below this site's minimum of {least}.")
        own = [client for client in spec.cohort if client in identities]
        if not own:
            raise StageError("None of this site's clients is in the cohort.")
        masking, params = session_params(spec, phase, sites, run.run_id, run.digest)
        bare = laid_bare(phase, spec.round, spec.cohort, params.corrupt)
        if bare is not None:
            raise ConfigError(f"{bare}.")
        clients = {client: ClientSession(params, client, identities[client]) for client in own}
        return SiteSession(spec=spec, masking=masking, corrupt=params.corrupt, phase=phase, clients=clients)

    def client(self, client_id: str) -> ClientSession:
        """Return one client's session.

        Raises:
            StageError: If it is not in this one.
        """
        if client_id not in self.clients:
            raise StageError(f"Client {client_id!r} is in no session of attempt {self.spec.attempt} at this site.")
        return self.clients[client_id]

    def agree(self, run: SiteRun, client: str, survivors: bytes, memory: SiteMemory) -> bytes:
        """Return a client's signature under the survivors, once they hide it and are on record.

        A round that is repeated after a crash has the same updates in it; so it is unmasked for the same survivors or
        not at all, or the difference of two sums would be the updates of a few.

        Raises:
            ProtocolError: If the sum over them must not be had, or the message is not for this client.
            StageError: If the site has signed another set of survivors of this round.
        """
        session = self.client(client)
        names = session.survivors_in(survivors)
        bare = laid_bare(self.phase, self.spec.round, names, self.corrupt)
        if bare is None and self.phase.shares is not None:
            bare = self.phase.shares.refusal(names, self.broadcast, self.spec.round, run.holder)
        if bare is not None:
            raise ProtocolError(f"{bare}; nothing was signed.")
        digest = hashlib.sha256("\x1f".join(sorted(names)).encode()).hexdigest()
        memory.sign(run.run_id, (run.stage(self.spec.phase)[0], self.spec.round), digest)
        return session.agree(survivors)
