"""A data holder's side of a deployment: bytes in, bytes out. It holds data, keys, ledger and model, and decides.

Flower's processes only carry its messages. It trusts nothing that they bring: a run is opened only as the site's policy
and caps allow, sessions and rounds happen once, and what leaves has been charged to the site's own ledger before.

It is one process over the whole run: model, data and sessions are made once, and no stage but training computes.
"""

from __future__ import annotations

import hashlib
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from privfed import __version__
from privfed.errors import MessageError, PrivfedError, ProtocolError, StageError
from privfed.federation.engines.flower.envelope import Ask, Reply, Status, bytes_by_client
from privfed.federation.engines.flower.memory import SiteMemory
from privfed.federation.engines.flower.site_session import SiteSession, Spec
from privfed.federation.engines.flower.site_training import Training
from privfed.federation.progress import Progress, Silent

if TYPE_CHECKING:
    from privfed.federation.engines.flower.run_at_site import SiteFacts, SiteRun
    from privfed.privacy.ledger import Ledger

Log = Callable[[Mapping[str, Any]], None]
KEPT_SESSIONS = 2  # the one of this round, and the next round's


class Site:
    """One data holder.

    Args:
        facts: The site.
        ledger: Its ledger.
        memory: What it remembers of runs.
        watch: Told what takes long.
        log: Told what was asked and what came of it; never told a value that depends on data.
    """

    def __init__(
        self,
        facts: SiteFacts,
        ledger: Ledger,
        memory: SiteMemory,
        watch: Progress | None = None,
        log: Log | None = None,
    ) -> None:
        self._facts, self._ledger, self._memory = facts, ledger, memory
        self._watch, self._log = watch or Silent(), log or (lambda _record: None)
        self._run: SiteRun | None = None
        self._sessions: dict[int, SiteSession] = {}
        self._bound = ""

    def handle(self, message: bytes) -> bytes:
        """Return the signed reply to one message of the server; whatever goes wrong is said in it."""
        started = time.perf_counter()
        kind, run_id, reason = "?", "?", ""
        status: Status = "ok"
        body: dict[str, Any] = {}
        try:
            ask = Ask.from_bytes(message)
            kind, run_id = ask.kind, ask.run_id
            body = self._handled(ask)
        except _UnopenedError:
            status = "unopened"
        except PrivfedError as error:
            status, reason = "refused", str(error)
        except Exception as error:  # noqa: BLE001  (a site answers whatever happens in it; only the kind of error leaves)
            status, reason = "refused", f"{type(error).__name__} at the site"
            self._watch.message(f"Unexpected: {error!r}")
        if status == "refused":
            self._watch.message(f"Refused {kind!r} of run {run_id[:12]}: {reason}")
        seconds = round(time.perf_counter() - started, 4)
        told = {"errors": body["errors"]} if body.get("errors") else {}
        self._log({"asked": kind, "run_id": run_id, "status": status, "reason": reason, "seconds": seconds, **told})
        reply = Reply(site=self._facts.name, status=status, reason=reason, body={**body, "busy": seconds})
        return reply.to_bytes(message, self._facts.identity)

    def _handled(self, ask: Ask) -> dict[str, Any]:
        if ask.kind == "hello":
            return {"version": __version__}
        if ask.kind == "open":
            return self._open(ask)
        if self._run is None or self._run.run_id != ask.run_id:
            raise _UnopenedError
        handlers: dict[str, Callable[[SiteRun, Mapping[str, Any]], dict[str, Any]]] = {
            "keys": self._keys,
            "shares": self._shares,
            "train": self._train,
            "agree": self._agree,
            "unmask": self._unmask,
            "close": self._close,
        }
        return handlers[ask.kind](self._run, ask.body)

    def _open(self, ask: Ask) -> dict[str, Any]:
        """Approve a run and make it ready; a run that is open stays as it is."""
        from privfed.federation.engines.flower.run_at_site import approved_run  # loads torch

        body = ask.body
        if body.get("version") != __version__:
            raise ProtocolError(f"The server runs privfed {body.get('version')!r}, this site {__version__}.")
        sites = self._facts.sites
        if body.get("roster") != sites.digest():
            raise ProtocolError("The server has another roster than the one this site pinned: nothing was opened.")
        text, classes = body.get("config"), body.get("classes")
        if not isinstance(text, str) or not isinstance(classes, list):
            raise MessageError("The server sent no configuration.")
        try:
            toml = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise MessageError(f"The server's configuration is not TOML: {error}.") from error
        bound = hashlib.sha256(f"{text}\x1f{sites.digest()}".encode()).hexdigest()
        if self._run is None or self._run.run_id != ask.run_id or self._bound != bound:
            run = approved_run(self._facts, self._ledger, ask.run_id, toml, tuple(classes), self._watch)
            self._memory.open_run(ask.run_id, bound)
            self._run, self._sessions, self._bound = run, {}, bound
            self._watch.message(f"Opened run {ask.run_id[:12]}, configuration {run.digest[:12]}")
        return {"layouts": {name: stage.phase.layout.digest for name, stage in self._run.stages.items()}}

    def _keys(self, run: SiteRun, body: Mapping[str, Any]) -> dict[str, Any]:
        """Enter a session: fresh keys of each client that the site hosts."""
        session = self._entered(run, Spec.of(body.get("session")))
        return _each(session.clients, lambda client: session.clients[client].advertise())

    def _entered(self, run: SiteRun, spec: Spec) -> SiteSession:
        session = SiteSession.enter(
            spec, run, self._facts.sites, self._facts.clients, self._facts.policy.accept.min_cohort
        )
        self._memory.enter(run.run_id, spec.attempt)
        self._sessions[spec.attempt] = session
        for attempt in sorted(self._sessions)[:-KEPT_SESSIONS]:
            del self._sessions[attempt]
        return session

    def _shares(self, _run: SiteRun, body: Mapping[str, Any]) -> dict[str, Any]:
        """Seal shares for the neighbours that the rosters name."""
        session = self._session(body.get("session"))
        rosters = bytes_by_client(body, "rosters")
        return _each(rosters, lambda client: session.client(client).share(rosters[client]))

    def _train(self, run: SiteRun, body: Mapping[str, Any]) -> dict[str, Any]:
        """Train the clients that are asked for, mask what they send, and enter the next round's session."""
        found: dict[str, Any] = {}
        shares = bytes_by_client(body, "shares")
        clients = _names(body.get("clients", list(shares)))
        if clients:
            session = self._session(body.get("session")) if shares else None
            training = Training(run, _bytes(body, "broadcast"), _place(body), session, self._memory)
            found = _each(
                clients,
                lambda client: training.message(self._own(client), shares.get(client)),
                guarded=run.guarded,
            )
            found |= {"scales": training.scales, "seconds": training.seconds}
        if body.get("next") is not None:
            found["next"] = self._guarded(lambda: self._keys(run, {"session": body["next"]}))
        return found

    def _agree(self, run: SiteRun, body: Mapping[str, Any]) -> dict[str, Any]:
        """Sign who survived; seal shares for the next round's neighbours."""
        survivors = bytes_by_client(body, "survivors")
        found: dict[str, Any] = {}
        if survivors:
            session = self._session(body.get("session"))
            found = _each(survivors, lambda client: session.agree(run, client, survivors[client], self._memory))
        if body.get("next") is not None:
            found["next"] = self._guarded(lambda: self._shares(run, body["next"]))
        return found

    def _unmask(self, _run: SiteRun, body: Mapping[str, Any]) -> dict[str, Any]:
        """Give one share of each peer, of the kind that follows from who survived."""
        session = self._session(body.get("session"))
        agreements = bytes_by_client(body, "agreements")
        return _each(agreements, lambda client: session.client(client).unmask(agreements[client]))

    def _close(self, run: SiteRun, _body: Mapping[str, Any]) -> dict[str, Any]:
        """End a run: its key is erased, and it is not opened again."""
        self._memory.close_run(run.run_id)
        self._ledger.erase_run_key(run.run_id)
        self._run, self._sessions = None, {}
        self._watch.message(f"Closed run {run.run_id[:12]}")
        return {}

    def _guarded(self, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what preparing the next round gives; its failure costs this round nothing."""
        try:
            return step()
        except PrivfedError as error:
            return {"refused": str(error)}

    def _session(self, attempt: object) -> SiteSession:
        found = self._sessions.get(attempt) if isinstance(attempt, int) else None
        if found is None:
            raise StageError(f"This site is in no session of attempt {attempt!r}: it was started again, or it is over.")
        return found

    def _own(self, client: str) -> str:
        if client not in self._facts.clients:
            raise ProtocolError(f"This site does not host client {client!r}.")
        return client


class _UnopenedError(Exception):
    """The run is not open at this site (any more)."""


def _each(clients: Iterable[str], step: Callable[[str], bytes], *, guarded: bool = False) -> dict[str, Any]:
    """Return each client's message, and why others have none: one client's failure is no other's.

    ``guarded``: under client level a message could carry a figure of the protected client; its kind has to do.
    """
    messages, errors = {}, {}
    for client in clients:
        try:
            messages[client] = step(client)
        except PrivfedError as error:
            errors[client] = type(error).__name__ if guarded else f"{type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001  (only the kind leaves: a message could hold data)
            errors[client] = type(error).__name__
    return {"messages": messages, "errors": errors}


def _names(found: object) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise MessageError("Expected clients as a list of names.")
    return found


def _bytes(body: Mapping[str, Any], name: str) -> bytes:
    found = body.get(name)
    if not isinstance(found, bytes):
        raise MessageError(f"The server's message has no {name}.")
    return found


def _place(body: Mapping[str, Any]) -> tuple[str, int]:
    found = body.get("place")
    if not isinstance(found, list) or len(found) != 2 or not isinstance(found[0], str) or type(found[1]) is not int:
        raise MessageError("The server's message does not say which round it is for.")
    return found[0], found[1]
