"""A deployment without Flower: real sites with their own ledgers and memories, and a channel that can be broken."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from privfed.config import RunConfig
from privfed.data.config import DataConfig
from privfed.deployment.watch import JsonLog
from privfed.federation.engines.flower.enrol import SiteKeys, make_card
from privfed.federation.engines.flower.envelope import Ask
from privfed.federation.engines.flower.memory import SiteMemory
from privfed.federation.engines.flower.policy import Accept, Caps, Policy
from privfed.federation.engines.flower.run_at_site import SiteFacts
from privfed.federation.engines.flower.site import Site
from privfed.federation.sites import Card, Sites
from privfed.privacy.ledger import Ledger

Break = Callable[[str, Ask, "Lab"], bool]
"""Told (site, ask) before it is delivered; True if it is lost."""


class Lab:
    """Sites and the channel to them, in this process; bytes in, bytes out.

    Args:
        config: The run that the sites are enrolled for.
        count: Sites.
        folder: One folder a site below it.
        accept: The sites' conditions, on top of the model and reproducible noise.
        caps: Their caps.
        own: Each site's own data; parts of the run's by default.
    """

    def __init__(
        self,
        config: RunConfig,
        count: int,
        folder: Path,
        accept: Mapping[str, Any] | None = None,
        caps: Caps | None = None,
        own: Mapping[str, DataConfig] | None = None,
    ) -> None:
        self.folder, self.own = folder, dict(own or {})
        given = {"models": [config.model.name], "reproducible_noise": True, **(accept or {})}
        self.policy = Policy(accept=Accept(**given), caps=caps)
        self.names = [f"site-{number}" for number in range(count)]
        cards: list[Card] = []
        for number, name in enumerate(self.names):
            keys = SiteKeys.load(folder / name)
            part = None if self.own else (number, count)
            cards.append(make_card(config, name, keys, own=self.own.get(name), part=part))
        self.sites = Sites(cards=tuple(cards))
        self.running: dict[str, tuple[Site, Ledger, SiteMemory]] = {}
        self.asks: list[tuple[str, Ask]] = []
        self.broken: Break | None = None
        self.delivered: dict[str, bytes] = {}
        self._replies: dict[str, bytes] = {}
        self._tickets = itertools.count()
        for name in self.names:
            self.start(name)

    def start(self, name: str) -> Site:
        """Start a site, as a new process would."""
        folder = self.folder / name
        keys = SiteKeys.load(folder)
        clients = {member.id: keys.client(member.id) for member in self.sites.card(name).clients}
        facts = SiteFacts(
            name=name,
            identity=keys.identity,
            clients=clients,
            sites=self.sites,
            policy=self.policy,
            own=self.own.get(name),
            models={},
            folder=folder,
        )
        ledger, memory = Ledger.open(folder / "ledger.sqlite"), SiteMemory(folder / "memory.sqlite")
        site = Site(facts, ledger, memory, log=JsonLog(folder / "site.jsonl"))
        self.running[name] = (site, ledger, memory)
        return self.running[name][0]

    def kill(self, name: str) -> None:
        """End a site's process: what it had in memory is gone."""
        _, ledger, memory = self.running.pop(name)
        ledger.close()
        memory.close()

    def close(self) -> None:
        """End all sites."""
        for name in list(self.running):
            self.kill(name)

    def ledger(self, name: str) -> Ledger:
        """Return a running site's ledger."""
        return self.running[name][1]

    # the channel

    def sites_now(self) -> Collection[str]:
        """Return who can be reached."""
        return list(self.running)

    def post(self, asks: Mapping[str, bytes], seconds: float) -> dict[str, str]:
        """Deliver at once, unless it is broken."""
        tickets = {}
        for name, raw in asks.items():
            ask = Ask.from_bytes(raw)
            self.asks.append((name, ask))
            ticket = str(next(self._tickets))
            tickets[ticket] = name
            lost = self.broken is not None and self.broken(name, ask, self)
            if not lost and name in self.running:
                self._replies[ticket] = self.running[name][0].handle(raw)
        return tickets

    def poll(self, tickets: Collection[str]) -> list[tuple[str, bytes]]:
        """Return the replies that there are."""
        return [(ticket, self._replies.pop(ticket)) for ticket in list(tickets) if ticket in self._replies]

    def pause(self) -> None:
        """Wait a moment."""
        time.sleep(0.01)


class LabChannel:
    """A lab as the engine's channel."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.post, self.poll, self.pause = lab.post, lab.poll, lab.pause

    def sites(self) -> Collection[str]:
        """Return who can be reached."""
        return self.lab.sites_now()
