"""The server's view of its sites: who is there, who has the run open, and one stage of messages at a time.

Deadlines are privfed's own. A site that does not answer in time costs a round its clients and nothing else; it is asked
to open the run again, without waiting for it, and is back in the first round after it has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from privfed import __version__
from privfed.config import RunConfig
from privfed.errors import ConfigError, PrivfedError, RoundError
from privfed.federation.engines.flower.envelope import Ask, Reply
from privfed.federation.engines.flower.site_session import Spec
from privfed.federation.exchange import Connect
from privfed.federation.progress import Progress
from privfed.federation.sites import Sites
from privfed.files import write_atomic

LOOK_SECONDS = 5.0


def seconds_in(body: Mapping[str, Any], name: str) -> float:
    """Return a number of seconds that a site states; 0 where it states none that can be."""
    found = body.get(name)
    return found if isinstance(found, float) and 0 <= found < 1e9 else 0.0


class Channel(Protocol):
    """How messages reach sites; what lies between asking and answering is its own affair."""

    def sites(self) -> Collection[str]:
        """Return the sites that can be reached now."""

    def post(self, asks: Mapping[str, bytes], seconds: float) -> dict[str, str]:
        """Send a message to each site, worth ``seconds``; return ticket -> site."""

    def poll(self, tickets: Collection[str]) -> list[tuple[str, bytes]]:
        """Return the (ticket, reply) that have come since; each once."""

    def pause(self) -> None:
        """Wait a moment between two polls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Seconds that the server waits.

    Attributes:
        stage: For a stage without training, and on top of ``client.deadline_s`` for one with it.
        opening: For a site to make a run ready: to load its model and its data.
        patience: For enough sites to be there, before the run is given up until ``--resume``.
    """

    stage: float = 60.0
    opening: float = 900.0
    patience: float = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """What one stage took.

    Attributes:
        seconds: From the first message out to the last reply in.
        busy: The longest that a site worked on it; the rest is transport and Flower's polling.
    """

    kind: str
    seconds: float
    busy: float
    bytes_up: int
    bytes_down: int
    asked: int
    answered: int


@dataclass(slots=True)
class _Open:
    """A request to open the run that is under way."""

    site: str
    ask: bytes = field(repr=False)
    until: float = 0.0


class Fleet:
    """The sites of one run.

    Args:
        config: The run.
        sites: The roster.
        channel: Carries the messages.
        run_id: The run's id.
        folder: Where the number of the last session is kept, durably.
        classes: The classes in the server's order, for sites with data of their own.
        deadlines: How long to wait.
        watch: Told who comes and goes.
        log: Told every stage; never a value that depends on data.
    """

    def __init__(
        self,
        config: RunConfig,
        sites: Sites,
        channel: Channel,
        *,
        run_id: str,
        folder: Path,
        classes: Sequence[str],
        deadlines: Deadlines,
        watch: Progress,
        log: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.config, self.sites, self.run_id, self.deadlines = config, sites, run_id, deadlines
        self.digest = config.digest()
        self.prepared: Any = None  # the next round's session, made by the stages of this one
        self.stages: list[StageTime] = []
        self._channel, self._watch, self._log = channel, watch, log
        self._file = folder / "sessions.txt"
        self._opened: set[str] = set()
        self._opening: dict[str, _Open] = {}
        self._refusals: dict[str, str] = {}
        self._look_again = 0.0
        body = {
            "config": config.to_toml(),
            "roster": sites.digest(),
            "classes": list(classes),
            "version": __version__,
        }
        self._open_ask = Ask(kind="open", run_id=run_id, body=body).to_bytes()

    @property
    def connect(self) -> Connect:
        """What makes the exchange of each round."""
        from privfed.federation.engines.flower.remote import RemoteExchange

        return partial(RemoteExchange, fleet=self)

    @property
    def opened(self) -> frozenset[str]:
        """The sites that have the run open."""
        return frozenset(self._opened)

    def open(self, layouts: Mapping[str, str]) -> None:
        """Ask every site to open the run, and wait for all of them.

        Args:
            layouts: Digest of what is trained, by phase, as the server has it.

        Raises:
            ConfigError: If a site refuses, or has another model than the server.
            RoundError: If sites are missing when patience ends.
        """
        names = {card.name for card in self.sites.cards}
        deadline = time.monotonic() + self.deadlines.patience
        while self._opened != names:
            self.refresh(layouts)
            if self._refusals:
                told = " ".join(f"{site}: {reason}" for site, reason in sorted(self._refusals.items()))
                raise ConfigError(f"Not every site takes part in this run. {told}")
            if time.monotonic() > deadline:
                missing = ", ".join(sorted(names - self._opened))
                raise RoundError(
                    f"After {self.deadlines.patience:g} s these sites have not opened the run: {missing}. Start "
                    "them with privfed join, and the run again."
                )
            if self._opened != names:
                self._channel.pause()

    def refresh(self, layouts: Mapping[str, str] | None = None) -> None:
        """Take in who has opened the run by now, and ask those who are back to do so; nobody is waited for."""
        for ticket, raw in self._channel.poll(list(self._opening)):
            waiting = self._opening.pop(ticket)
            reply = self._read(waiting.site, waiting.ask, raw)
            if reply is None:
                continue
            if reply.status == "ok" and layouts is not None and reply.body.get("layouts") != dict(layouts):
                reply = Reply(site=reply.site, status="refused", reason="it trains other tensors than the server.")
            if reply.status == "ok":
                self._opened.add(waiting.site)
                self._refusals.pop(waiting.site, None)
                self._watch.message(f"{waiting.site} has opened the run")
            elif self._refusals.get(waiting.site) != reply.reason:
                self._refusals[waiting.site] = reply.reason
                self._watch.message(f"{waiting.site} refuses: {reply.reason}")
        now = time.monotonic()
        self._opening = {ticket: each for ticket, each in self._opening.items() if each.until > now}
        asked = {each.site for each in self._opening.values()}
        missing = [s for s in self._channel.sites() if s not in self._opened | asked and s not in self._refusals]
        if missing:
            asks = dict.fromkeys(missing, self._open_ask)
            for ticket, site in self._channel.post(asks, self.deadlines.opening).items():
                self._opening[ticket] = _Open(site, self._open_ask, now + self.deadlines.opening)

    def wait_for(self, cohort: Sequence[str], least: int) -> None:
        """Wait until sites of at least ``least`` clients of a cohort have the run open.

        Raises:
            RoundError: If patience ends before; the run can be resumed.
        """
        deadline = time.monotonic() + self.deadlines.patience
        while True:
            self.refresh()
            there = sum(1 for client in cohort if self.sites.site_of[client] in self._opened)
            if there >= least:
                return
            if time.monotonic() > deadline:
                raise RoundError(
                    f"Only {there} of {len(cohort)} clients are there after {self.deadlines.patience:g} s and {least} "
                    "are needed: see to the sites, then continue with --resume."
                )
            self._channel.pause()

    def stage(
        self, kind: str, bodies: Mapping[str, Mapping[str, Any]], extra: float = 0.0
    ) -> dict[str, Mapping[str, Any]]:
        """Send one message to each site and return the bodies of the replies that came in time and were not refused.

        Args:
            kind: What is asked.
            bodies: By site.
            extra: Seconds to wait on top of the deadline of a stage.
        """
        asks = {site: Ask(kind=kind, run_id=self.run_id, body=body).to_bytes() for site, body in bodies.items()}
        asks = {site: ask for site, ask in asks.items() if site in self._opened}
        started = time.monotonic()
        seconds = self.deadlines.stage + extra
        waiting = self._channel.post(asks, seconds) if asks else {}
        found: dict[str, Mapping[str, Any]] = {}
        up, busy = 0, 0.0
        silent = dict(waiting)
        while silent:
            late = time.monotonic() - started >= seconds  # looked at before the last poll, not after it
            for ticket, raw in self._channel.poll(list(silent)):
                site = silent.pop(ticket)
                up += len(raw)
                reply = self._read(site, asks[site], raw)
                if reply is not None and self._sound(reply, kind):
                    found[site] = reply.body
                    busy = max(busy, seconds_in(reply.body, "busy"))
            if late:
                break
            if silent:
                self._channel.pause()
            silent = self._without_those_gone(silent, kind)
        for site in silent.values():
            self._lose(site, f"no answer to {kind!r} within {seconds:g} s")
        self._note(kind, asks, found, time.monotonic() - started, busy, up)
        return found

    def _without_those_gone(self, silent: dict[str, str], kind: str) -> dict[str, str]:
        """Return whom to wait for: a site that the channel counts as gone does not hold up a stage until its end."""
        if not silent or time.monotonic() < self._look_again:
            return silent
        self._look_again = time.monotonic() + LOOK_SECONDS
        there = self._channel.sites()
        for site in set(silent.values()).difference(there):
            self._lose(site, f"it went away during {kind!r}")
        return {ticket: site for ticket, site in silent.items() if site in there}

    def spec(self, phase: str, number: int, cohort: Sequence[str], values: int) -> Spec:
        """Return a new session; its attempt is above every earlier one of the run, and durable before it is used."""
        attempt = 1 + (int(self._file.read_text()) if self._file.exists() else 0)
        write_atomic(self._file, f"{attempt}\n".encode())
        return Spec(phase=phase, round=number, attempt=attempt, cohort=tuple(cohort), values=values)

    def close(self) -> None:
        """Tell the sites that the run is over."""
        self.stage("close", {site: {} for site in self._opened})

    def _read(self, site: str, ask: bytes, raw: bytes) -> Reply | None:
        """Return a reply, or None where it is not authentic or the channel says that the site could not answer."""
        if not raw:
            self._lose(site, "Flower could not bring its reply")
            return None
        try:
            reply = Reply.from_bytes(raw, ask, self.sites.site_identities)
        except PrivfedError as error:
            self._lose(site, str(error))
            return None
        if reply.site != site:
            self._lose(site, f"its place answers as {reply.site}")
            return None
        return reply

    def _sound(self, reply: Reply, kind: str) -> bool:
        if reply.status == "ok":
            return True
        if reply.status == "unopened":
            self._lose(reply.site, "it was started again")
        else:
            self._watch.message(f"{reply.site} refuses {kind!r}: {reply.reason}")
        return False

    def _lose(self, site: str, why: str) -> None:
        if site in self._opened:
            self._opened.discard(site)
            self._watch.message(f"Lost {site}: {why}")

    def _note(
        self, kind: str, asks: Mapping[str, bytes], found: Collection[str], seconds: float, busy: float, up: int
    ) -> None:
        down = sum(map(len, asks.values()))
        self.stages.append(
            StageTime(
                kind=kind,
                seconds=seconds,
                busy=busy,
                bytes_up=up,
                bytes_down=down,
                asked=len(asks),
                answered=len(found),
            )
        )
        missing = sorted(set(asks) - set(found))
        record = {"stage": kind, "seconds": round(seconds, 3), "busy": round(busy, 3), "bytes_up": up}
        self._log({**record, "bytes_down": down, "asked": len(asks), "answered": len(found), "missing": missing})
