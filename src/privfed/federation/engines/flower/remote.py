"""A round's exchange with clients at sites: the same checks in the same order as in one process, other messages.

Masked, a round takes three stages. Keys and shares of the next round travel with them, so that no round waits for its
own: ``train`` carries the broadcast and the sealed shares, and brings masked vectors and the next round's keys;
``agree`` carries survivors and the next round's rosters, and brings signatures and the next round's shares; ``unmask``
carries the agreement and brings shares. A phase's first round, and one whose preparation failed, takes two more.
Unmasked, a round takes one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from privfed.compression import Codec
from privfed.errors import ConfigError, PrivfedError, ThresholdError
from privfed.federation.client import Answer, Client
from privfed.federation.codecs import Place, codec_at
from privfed.federation.cohort import cohort_of, with_cohort
from privfed.federation.collect import Collected, Link, PlainLink
from privfed.federation.engines.flower.envelope import bytes_by_client
from privfed.federation.engines.flower.fleet import seconds_in
from privfed.federation.engines.flower.site_session import Spec, session_params
from privfed.federation.exchange import Exchange, laid_bare, values_of
from privfed.federation.messages import Broadcast
from privfed.secagg import Requirements, ServerSession

if TYPE_CHECKING:
    from privfed.federation.engines.flower.fleet import Fleet
    from privfed.federation.round import Phase

NO_ANSWER = "no answer in time"


@dataclass(slots=True, kw_only=True)
class RemoteExchange(Exchange):
    """An exchange over a fleet of sites."""

    fleet: Fleet
    saturated: int | None = None
    mask_seconds: float = 0.0

    def _link(self, cohort: Sequence[str], codec: Codec, requirements: Requirements) -> Link:
        self.fleet.stages.clear()
        if not self.phase.masked:
            needed = self.phase.requirements
            self.fleet.wait_for(cohort, needed.least_survivors(len(cohort)) if needed.met_by(len(cohort)) else 1)
            return self._plain_link(codec)
        found = self.fleet.prepared
        values = values_of(self.phase, codec, self.round)
        if not isinstance(found, Session) or not found.fits(self.phase, self.round, cohort, values):
            found = None
        self.fleet.prepared = None
        link = FleetLink(self, cohort, values, found)
        self.fleet.wait_for(cohort, requirements.least_survivors(len(cohort)))
        return link

    def _serve_all(self, link: Link, cohort: Sequence[str], ask: Callable[[Client], Answer]) -> None:  # noqa: ARG002
        """Let the cohort's clients train and send, all at once."""
        charged = hashlib.sha256(self.broadcast).hexdigest()
        for client_id in cohort:
            client = self.phase.clients[client_id]
            if client.event is not None:  # what the sites' own ledgers say at most: some of those asked may not train
                self.holder.charge(client_id, self.phase.plan.name, self.round, charged, client.event)
        if isinstance(link, FleetLink):
            heard = link.serve()
        elif isinstance(link, PlainLink):
            heard = self._plain(link, cohort)
        else:
            raise TypeError(type(link))
        for client_id in cohort:
            reason = heard.get(client_id, NO_ANSWER)
            if reason:
                self.dropped.append((client_id, reason))
                self.progress.client_dropped(client_id, reason)
            self.progress.client_done(client_id)

    def _plain(self, link: PlainLink, cohort: Sequence[str]) -> dict[str, str]:
        """Ask for updates without masks; return why each client that answered was dropped, ``""`` where it was not."""
        asks = {
            site: {"place": self.place, "broadcast": self.broadcast, "clients": sorted(clients)}
            for site, clients in self.fleet.sites.grouped(dict.fromkeys(cohort, b"")).items()
        }
        replies = self.fleet.stage("train", asks, self.training_seconds(cohort))
        heard: dict[str, str] = {}
        for site, body in sorted(replies.items()):
            self.took(body)
            for client_id, sent in messages_of(body, asks[site]["clients"], heard).items():
                weight = self.phase.clients[client_id].weight
                heard[client_id] = taken(lambda s=sent, c=client_id, w=weight: link.receive(s, (c, w)))  # type: ignore[misc]
        return heard

    @property
    def place(self) -> list[Any]:
        """Which round this is, as messages say it."""
        return [self.phase.plan.name, self.round]

    def training_seconds(self, cohort: Sequence[str]) -> float:
        """Return how long the busiest site may train."""
        hosted = self.fleet.sites.grouped(dict.fromkeys(cohort, b""))
        return self.fleet.config.client.deadline_s * max(map(len, hosted.values()))

    def took(self, body: Mapping[str, Any]) -> None:
        """Add what a site says that training and masking took."""
        seconds = body.get("seconds")
        if isinstance(seconds, dict):
            self.train_seconds += seconds_in(seconds, "train")
            self.mask_seconds += seconds_in(seconds, "mask")

    def upcoming(self) -> Spec | None:
        """Return the next round's session as far as it can be known now; None where there is none to prepare."""
        phase, number = self.phase, self.round + 1
        if number > phase.plan.rounds:
            return None
        now = cohort_of(phase, self.holder, self.given.taken, self.round)
        cohort = cohort_of(phase, self.holder, with_cohort(self.given.taken, now), number)
        corrupt = phase.requirements.most_corrupt(len(cohort)) if cohort else 0
        if not phase.requirements.met_by(len(cohort)) or laid_bare(phase, number, cohort, corrupt):
            return None
        place = Place(seed=phase.seed, run_id=self.holder.run_id, phase=phase.plan.name, round=number)
        public = Broadcast.from_bytes(self.broadcast, size=phase.sharing.shared.size).codec
        codec = codec_at(phase.codec, place, phase.sharing.part(number).sent, public)
        return self.fleet.spec(phase.plan.name, number, cohort, values_of(phase, codec, number))

    def extra_seconds(self) -> dict[str, float]:
        """Return what each stage took, and how much of it the busiest site worked."""
        found: dict[str, float] = {}
        for stage in self.fleet.stages:
            found[f"stage_{stage.kind}"] = found.get(f"stage_{stage.kind}", 0.0) + stage.seconds
            found[f"busy_{stage.kind}"] = found.get(f"busy_{stage.kind}", 0.0) + stage.busy
        return {**found, "mask": self.mask_seconds}


class Session:
    """The server's side of one session, and which of its clients have done what."""

    def __init__(self, spec: Spec, phase: Phase, fleet: Fleet) -> None:
        self.spec, self._fleet = spec, fleet
        self.masking, params = session_params(spec, phase, fleet.sites, fleet.run_id, fleet.digest)
        self.server = ServerSession(params)
        self.n_min = params.n_min
        self.advertised: list[str] = []
        self.shared: list[str] = []
        self.bytes_up = self.bytes_down = 0

    def fits(self, phase: Phase, number: int, cohort: Sequence[str], values: int) -> bool:
        """Return whether this session, prepared in the round before, is ready for a round."""
        spec = self.spec
        there = sum(1 for client in self.shared if self._fleet.sites.site_of[client] in self._fleet.opened)
        wanted = (phase.plan.name, number, tuple(cohort), values)
        return (spec.phase, spec.round, spec.cohort, spec.values) == wanted and there >= self.n_min

    def take(self, body: Mapping[str, Any], clients: Sequence[str], receive: Callable[[bytes], str]) -> dict[str, str]:
        """Give one site's messages to the session; return why each client of ``clients`` was dropped, ``""`` if not."""
        heard: dict[str, str] = {}
        for client_id, sent in messages_of(body, clients, heard).items():
            self.bytes_up += len(sent)
            heard[client_id] = taken(lambda s=sent: receive(s))  # type: ignore[misc]
        return heard

    def advertise(self, body: Mapping[str, Any], site: str) -> None:
        """Take a site's fresh keys."""
        heard = self.take(body, self.hosted(site, self.spec.cohort), self.server.receive_advertise)
        self.advertised += [client for client, reason in heard.items() if not reason]

    def rosters(self) -> dict[str, dict[str, bytes]]:
        """Return the rosters by site; this closes the stage of keys.

        Raises:
            ThresholdError: If too few clients advertised.
        """
        return self.sent({client: self.server.roster_for(client) for client in self.advertised})

    def share(self, body: Mapping[str, Any], site: str) -> None:
        """Take a site's sealed shares."""
        heard = self.take(body, self.hosted(site, self.advertised), self.server.receive_share)
        self.shared += [client for client, reason in heard.items() if not reason]

    def hosted(self, site: str, clients: Sequence[str]) -> list[str]:
        """Return which of these clients a site hosts."""
        return [client for client in clients if self._fleet.sites.site_of[client] == site]

    def sent(self, by_client: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
        """Return messages for clients by site, and count their bytes."""
        self.bytes_down += sum(map(len, by_client.values()))
        return self._fleet.sites.grouped(by_client)


class FleetLink:
    """Secure aggregation with clients at sites; see the module.

    Args:
        exchange: The round.
        cohort: Who takes part.
        values: M, the encoded values in a message.
        session: What the round before prepared, or None.

    Raises:
        ConfigError: If no session of this cohort meets the requirements.
    """

    def __init__(self, exchange: RemoteExchange, cohort: Sequence[str], values: int, session: Session | None) -> None:
        self._exchange, self._fleet, self._phase = exchange, exchange.fleet, exchange.phase
        self._cohort, self._values = tuple(cohort), values
        self._session = session
        self._next: Session | None = None
        self._sent: list[str] = []
        self._scale: float | None = None

    @property
    def sent(self) -> tuple[str, ...]:
        """Whose masked vectors were received; nothing is unmasked yet."""
        return tuple(self._sent)

    def open(self) -> None:
        """Exchange keys and shares, where the round before has not.

        Raises:
            ThresholdError: If too few clients are there.
        """
        if self._session is not None:
            return
        spec = self._fleet.spec(self._phase.plan.name, self._exchange.round, self._cohort, self._values)
        session = self._session = Session(spec, self._phase, self._fleet)
        hosts = {self._fleet.sites.site_of[client] for client in self._cohort}
        asked = {site: {"session": spec.packed()} for site in hosts}
        for site, body in self._fleet.stage("keys", asked).items():
            session.advertise(body, site)
        rosters = session.rosters()
        asks = {site: {"session": spec.attempt, "rosters": each} for site, each in rosters.items()}
        for site, body in self._fleet.stage("shares", asks).items():
            session.share(body, site)

    def send(self, *_: object) -> None:
        """Clients send by themselves."""
        raise ConfigError("Clients at sites send by themselves.")

    def serve(self) -> dict[str, str]:
        """Let clients train and send masked vectors; return why each that answered was dropped, ``""`` if not."""
        session = self._opened()
        try:
            shares = session.sent({client: session.server.shares_for(client) for client in session.shared})
        except ThresholdError as error:
            return dict.fromkeys(self._cohort, str(error))
        following = self._prepare()
        asks: dict[str, dict[str, Any]] = {
            site: {
                "place": self._exchange.place,
                "session": session.spec.attempt,
                "broadcast": self._exchange.broadcast,
                "shares": each,
            }
            for site, each in shares.items()
        }
        if following is not None:
            for site in {self._fleet.sites.site_of[client] for client in following.spec.cohort}:
                asks.setdefault(site, {})["next"] = following.spec.packed()
        replies = self._fleet.stage("train", asks, self._exchange.training_seconds(self._cohort))
        heard: dict[str, str] = {}
        for site, body in sorted(replies.items()):
            self._exchange.took(body)
            self._take_masked(session, body, site, heard)
            if following is not None:
                following.advertise(_part(body, "next"), site)
        return heard

    def close(self) -> Collected:
        """Agree on the survivors, unmask the sum over them, and have the next round's shares sealed.

        Raises:
            ThresholdError: If too few survived or answered; nothing is revealed then.
        """
        session = self._opened()
        if not self._sent:
            raise ThresholdError("No client sent a masked vector; there is nothing to unmask.")
        survivors = session.sent({client: session.server.survivors_for(client) for client in self._sent})
        signed = self._agree(session, survivors)
        agreements = session.sent({client: session.server.agreement_for(client) for client in signed})
        asks = {site: {"session": session.spec.attempt, "agreements": each} for site, each in agreements.items()}
        for site, body in self._fleet.stage("unmask", asks).items():
            session.take(body, session.hosted(site, signed), session.server.receive_unmask)
        sum_M, names = session.server.sum()
        if self._next is not None and len(self._next.shared) >= self._next.n_min:
            self._fleet.prepared = self._next
        return session.masking.collected(
            sum_M, names, scale=self._scale or 1.0, bytes_up=session.bytes_up, bytes_down=session.bytes_down
        )

    def _agree(self, session: Session, survivors: Mapping[str, Mapping[str, bytes]]) -> list[str]:
        """Carry survivors and the next rosters; return who signed."""
        asks: dict[str, dict[str, Any]] = {
            site: {"session": session.spec.attempt, "survivors": each} for site, each in survivors.items()
        }
        following = self._next
        if following is not None:
            try:
                for site, each in following.rosters().items():
                    asks.setdefault(site, {})["next"] = {"session": following.spec.attempt, "rosters": each}
            except ThresholdError:
                following = self._next = None
        signed: list[str] = []
        for site, body in sorted(self._fleet.stage("agree", asks).items()):
            heard = session.take(body, session.hosted(site, self._sent), session.server.receive_agree)
            signed += [client for client, reason in heard.items() if not reason]
            if following is not None:
                following.share(_part(body, "next"), site)
        return signed

    def _take_masked(self, session: Session, body: Mapping[str, Any], site: str, heard: dict[str, str]) -> None:
        """Add the masked vectors of one site."""
        scales = body.get("scales")
        for client_id, sent in messages_of(body, session.hosted(site, session.shared), heard).items():
            scale = scales.get(client_id) if isinstance(scales, dict) else None
            if not isinstance(scale, float) or scale != (self._scale or scale):
                heard[client_id] = "it encoded in another way than the others: the sum would mean nothing"
                continue
            heard[client_id] = taken(lambda s=sent: session.server.receive_masked(s))  # type: ignore[misc]
            if not heard[client_id]:
                session.bytes_up += len(sent)
                self._scale = scale
                self._sent.append(client_id)

    def _prepare(self) -> Session | None:
        """Return the next round's session at the server, where there is one to prepare."""
        try:
            spec = self._exchange.upcoming()
            self._next = None if spec is None else Session(spec, self._phase, self._fleet)
        except ConfigError:  # that round will say so itself
            self._next = None
        return self._next

    def _opened(self) -> Session:
        if self._session is None:
            raise ConfigError("The session is not open yet.")
        return self._session


def _part(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = body.get(name)
    return found if isinstance(found, dict) else {}


def messages_of(body: Mapping[str, Any], clients: Sequence[str], heard: dict[str, str]) -> dict[str, bytes]:
    """Return the messages in a site's reply, of these clients only, and note in ``heard`` why others sent none."""
    errors = body.get("errors")
    if isinstance(errors, dict):
        heard |= {client: str(errors[client]) for client in clients if client in errors}
    try:
        found = bytes_by_client(body, "messages")
    except PrivfedError as error:
        heard |= dict.fromkeys(clients, str(error))
        return {}
    return {client: found[client] for client in clients if client in found}


def taken(receive: Callable[[], object]) -> str:
    """Return ``""`` where a message was taken, else why it was not."""
    try:
        receive()
    except PrivfedError as error:
        return f"{type(error).__name__}: {error}"
    return ""
