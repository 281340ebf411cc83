"""Flower's grid as the engine's channel: finds out which node is which site, posts messages, polls for replies.

Polling is privfed's own, several times a second; Flower's ``send_and_receive`` looks once in three.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from privfed.errors import PrivfedError
from privfed.federation.engines.flower.envelope import Ask, Reply
from privfed.federation.engines.flower.records import from_records, to_records
from privfed.federation.progress import Progress
from privfed.federation.sites import Sites

MESSAGE_TYPE = "train.privfed"
PAUSE = 0.25
HELLO_SECONDS = 300.0  # a reply that comes later is dropped by Flower, however busy the node was
AGAIN_SECONDS = 30.0


class GridChannel:
    """The nodes of one Flower run.

    Args:
        grid: Flower's.
        sites: The roster.
        watch: Told of nodes that are nobody's.
    """

    def __init__(self, grid: Grid, sites: Sites, watch: Progress) -> None:
        self._grid, self._roster, self._watch = grid, sites, watch
        self._site_of: dict[int, str] = {}
        self._greeted: dict[str, tuple[int, bytes, float]] = {}  # message -> node, what was asked, until when

    def sites(self) -> Collection[str]:
        """Return the sites whose nodes Flower counts as online; others are asked who they are."""
        online = set(self._grid.get_node_ids())
        self._site_of = {node: site for node, site in self._site_of.items() if node in online}
        self._take_greetings()
        now = time.monotonic()
        self._greeted = {key: each for key, each in self._greeted.items() if each[2] > now}
        waiting = {node for node, _, until in self._greeted.values() if until - HELLO_SECONDS + AGAIN_SECONDS > now}
        for node in sorted(online - self._site_of.keys() - waiting):
            ask = Ask(kind="hello", run_id="", body={"nonce": secrets.token_bytes(16)}).to_bytes()
            for sent in self._push([(node, ask)], HELLO_SECONDS):
                if sent:
                    self._greeted[sent] = (node, ask, now + HELLO_SECONDS)
        return set(self._site_of.values())

    def post(self, asks: Mapping[str, bytes], seconds: float) -> dict[str, str]:
        """Send each site its message; Flower drops those that no node fetched within ``seconds``."""
        nodes = {site: node for node, site in self._site_of.items()}
        known = [site for site in asks if site in nodes]
        ids = self._push([(nodes[site], asks[site]) for site in known], seconds)
        return {ticket: site for ticket, site in zip(ids, known, strict=True) if ticket}

    def poll(self, tickets: Collection[str]) -> list[tuple[str, bytes]]:
        """Return what has come; b"" where Flower says that there will be no reply."""
        if not tickets:
            return []
        found = []
        for message in self._grid.pull_messages(list(tickets)):
            raw = b""
            if message.has_error():
                self._watch.message(f"Flower: {message.error.reason}")
            else:
                try:
                    raw = from_records(message.content)
                except PrivfedError as error:
                    self._watch.message(str(error))
            found.append((message.metadata.reply_to_message_id, raw))
        return found

    def pause(self) -> None:
        """Wait a quarter of a second."""
        time.sleep(PAUSE)

    def _push(self, asks: list[tuple[int, bytes]], seconds: float) -> list[str]:
        messages = [
            Message(content=to_records(ask), dst_node_id=node, message_type=MESSAGE_TYPE, ttl=seconds)
            for node, ask in asks
        ]
        return [ticket or "" for ticket in self._grid.push_messages(messages)] if messages else []

    def _take_greetings(self) -> None:
        for ticket, raw in self.poll(list(self._greeted)):
            node, ask, _ = self._greeted.pop(ticket)
            if not raw:  # Flower has said why; it is asked again
                continue
            try:
                site = Reply.from_bytes(raw, ask, self._roster.site_identities).site
            except PrivfedError as error:
                self._watch.message(f"Node {node} is no site of the roster: {error}")
                continue
            # a node that was started again without node authentication has a new number: the newest counts
            self._site_of = {other: name for other, name in self._site_of.items() if name != site}
            self._site_of[node] = site
