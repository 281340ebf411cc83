"""`privfed join`: a data holder's site. Makes its keys and its card, starts a SuperNode, and answers the server."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from privfed.config import load_config
from privfed.deployment.certificates import node_keys
from privfed.deployment.processes import Process, environment, flower, free_port, shown, start
from privfed.deployment.site_config import SiteConfig
from privfed.deployment.watch import JsonLog
from privfed.errors import ConfigError, PrivfedError
from privfed.federation.engines.flower.enrol import SiteKeys, make_card
from privfed.federation.engines.flower.memory import SiteMemory
from privfed.federation.engines.flower.run_at_site import SiteFacts
from privfed.federation.engines.flower.site import Site
from privfed.federation.progress import Progress
from privfed.federation.sites import read_sites
from privfed.privacy.ledger import Ledger

Say = Callable[[str], None]
AGAIN_SECONDS = 3.0


class _Told(Progress):
    """Says what a site says."""

    def __init__(self, say: Say) -> None:
        self._say = say

    def message(self, text: str) -> None:
        """Say one line."""
        self._say(text)


def card_of(site: SiteConfig, source: str, settings: tuple[str, ...], say: Say) -> str:
    """Return a site's card for a run, as TOML; its keys are made where they are missing.

    Raises:
        ConfigError: If the site's file does not fit the run.
        DataError: If its data cannot be used.
    """
    node_key = "" if site.insecure else node_keys(site.folder)[1]
    keys = SiteKeys.load(site.folder)
    config = load_config(source, settings)
    part = (site.part[0], site.part[1]) if site.part else None
    card = make_card(config, site.name, keys, own=site.data, part=part, node_key=node_key)
    say(f"{site.name} hosts {len(card.clients)} clients with {sum(c.examples for c in card.clients)} examples.")
    return card.to_toml()


def join(site: SiteConfig, say: Say) -> dict[str, Any]:
    """Be a site until stopped.

    Raises:
        ConfigError: If the roster does not have this site, or pins other keys for it.
        LedgerError: If its ledger cannot be used.
    """
    from privfed.federation.engines.flower.node import NodeTasks

    with opened_site(site, say) as opened, _until_told() as going:
        while going():
            port = free_port()
            node = _supernode(site, port, say)
            try:
                tasks = NodeTasks(f"127.0.0.1:{port}", opened.handle, site.accept.bundles, _Told(say))
                reason = tasks.serve(lambda: going() and node.running)  # noqa: B023  (called within the loop's body)
            finally:
                node.stop()
            if going():  # or it ended by itself, such as one that a new SuperLink did not know
                why = reason or f"it ended, and its log is {node.log}"
                say(f"Starting the SuperNode again in {AGAIN_SECONDS:g} s: {why}.")
                time.sleep(AGAIN_SECONDS)
    say("Stopped.")
    return {"stopped": True}


def join_at_socket(site: SiteConfig, path: Path, say: Say) -> dict[str, Any]:
    """Be a site until stopped, for a SuperNode that somebody else runs: it forwards its messages to a Unix socket.

    Raises:
        ConfigError: As :func:`join`.
        LedgerError: If its ledger cannot be used.
    """
    from privfed.federation.engines.flower.client_app import SOCKET_KEY, receive, send

    with ExitStack() as stack:
        handle = stack.enter_context(opened_site(site, say)).handle
        path.unlink(missing_ok=True)
        listening = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listening.bind(str(path))
        path.chmod(0o660)  # the SuperNode's account may be another one, in the same group
        listening.listen()
        listening.settimeout(0.5)
        stack.callback(path.unlink, missing_ok=True)
        say(f"Start the SuperNode with --node-config '{SOCKET_KEY}=\"{path.resolve()}\"'.")
        with _until_told() as going:
            while going():
                try:
                    connection, _ = listening.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.settimeout(None)
                    try:
                        send(connection, handle(receive(connection)))
                    except (OSError, PrivfedError) as error:
                        say(f"A message was not answered: {error}")
    say("Stopped.")
    return {"stopped": True}


@contextmanager
def opened_site(site: SiteConfig, say: Say) -> Iterator[Site]:
    """Open a site's ledger and memory, and check that the roster is of its keys.

    Raises:
        ConfigError: If the roster does not have this site, or pins other keys for it.
        LedgerError: If its ledger cannot be used.
    """
    keys, sites = SiteKeys.load(site.folder), read_sites(Path(site.roster))
    card = sites.card(site.name)
    clients = {member.id: keys.client(member.id) for member in card.clients}
    pinned = {member.id: member.identity for member in card.clients}
    if keys.identity.public.hex() != card.identity or any(pinned[c] != k.public.hex() for c, k in clients.items()):
        raise ConfigError(
            f"The roster {site.roster} pins other keys for {site.name} than {site.folder} has: make a new card."
        )
    facts = SiteFacts(
        name=site.name,
        identity=keys.identity,
        clients=clients,
        sites=sites,
        policy=site.policy,
        own=site.data,
        models=site.models,
        folder=site.folder,
    )
    ledger_path = Path(site.ledger) if site.ledger else site.folder / "ledger.sqlite"
    ledger_path.parent.mkdir(parents=True, exist_ok=True)
    memory = SiteMemory(site.folder / "memory.sqlite")
    with Ledger.open(ledger_path) as ledger:
        say(f"{site.name}: {len(clients)} clients, ledger {ledger_path}, roster {sites.digest()[:12]}.")
        try:
            yield Site(facts, ledger, memory, _Told(say), JsonLog(site.folder / "site.jsonl"))
        finally:
            memory.close()


def _supernode(site: SiteConfig, port: int, say: Say) -> Process:
    command = [flower("flower-supernode"), "--superlink", site.superlink, "--isolation", "process"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    if site.insecure:
        command.append("--insecure")
    else:
        command += ["--root-certificates", str(site.root_certificates)]
        command += ["--auth-supernode-private-key", str(node_keys(site.folder)[0])]
    say(shown(command))
    return start("The SuperNode", command, log=site.folder / "supernode.log", env=environment(site.folder / "flower"))


@contextmanager
def _until_told() -> Iterator[Callable[[], bool]]:
    """Give what says whether to go on: until SIGTERM or Ctrl-C, which let the task at hand end."""
    told: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        if told:  # the second one does not wait
            raise KeyboardInterrupt
        told.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: not told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
