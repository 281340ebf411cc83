"""Drives whole sessions in one process, with hooks for dropped clients and altered messages."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from privfed.errors import SecAggError
from privfed.secagg import ClientSession, ServerSession, SessionParams

Tamper = Callable[[str, str, bytes], bytes]


def _params(n: int = 3, threshold: int = 2, length: int = 5, **changes: Any) -> SessionParams:
    values: dict[str, Any] = {
        "round_id": b"round-1",
        "config_digest": bytes(32),
        "clients": tuple(sorted(f"c{i}" for i in range(n))),
        "threshold": threshold,
        "length": length,
    }
    return SessionParams(**{**values, **changes})


class Drive:
    """One round: ``drops`` maps a client to the last stage it does (0 none .. 3 masked); others do all four.

    A message that is refused costs the round its sender or receiver, as it would behind a network;
    ``refused`` has the errors and ``seen`` what travelled.
    """

    def __init__(
        self, params: SessionParams, vectors: dict[str, np.ndarray], drops: dict[str, int], tamper: Tamper
    ) -> None:
        self.server = ServerSession(params)
        self.clients = {client: ClientSession(params, client) for client in params.clients}
        self.vectors, self.drops, self.tamper = vectors, drops, tamper
        self.refused: list[SecAggError] = []
        self.seen: dict[tuple[str, str], bytes] = {}

    def carry(self, stage: str, client: str, message: bytes) -> bytes:
        message = self.tamper(stage, client, message)
        self.seen[stage, client] = message
        return message

    def does(self, client: str, stage: int) -> bool:
        return self.drops.get(client, 4) >= stage

    def step(self, clients: Collection[str], number: int, act: Callable[[str], None]) -> list[str]:
        done = []
        for client in clients:
            if self.does(client, number):
                try:
                    act(client)
                    done.append(client)
                except SecAggError as error:
                    self.refused.append(error)
        return done

    def run(self) -> tuple[np.ndarray, tuple[str, ...]]:
        alive, survivors = self.collect()

        def unmask(client: str) -> None:
            message = self.clients[client].unmask(self.carry("survivors", client, survivors))
            self.server.receive_unmask(self.carry("unmask", client, message))

        self.step(alive, 4, unmask)
        return self.server.sum()

    def collect(self) -> tuple[list[str], bytes]:
        """Run the first three stages; return who did them and the server's list of survivors."""
        server, clients = self.server, self.clients

        def advertise(client: str) -> None:
            server.receive_advertise(self.carry("advertise", client, clients[client].advertise()))

        def share(client: str) -> None:
            message = clients[client].share(self.carry("roster", client, roster))
            server.receive_share(self.carry("share", client, message))

        def mask(client: str) -> None:
            sealed = self.carry("shares", client, shares[client])
            message = clients[client].masked_input(sealed, self.vectors[client])
            server.receive_masked(self.carry("masked", client, message))

        alive = self.step(list(clients), 1, advertise)
        roster = server.roster()
        alive = self.step(alive, 2, share)
        shares = {client: server.shares_for(client) for client in alive or clients}
        alive = self.step(alive, 3, mask)
        return alive, server.survivors()


@pytest.fixture(scope="session")
def make_params() -> Callable[..., SessionParams]:
    return _params


@pytest.fixture(scope="session")
def random_vectors() -> Callable[[SessionParams], dict[str, np.ndarray]]:
    def draw(params: SessionParams) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(11)
        return {c: rng.integers(0, 2**32, params.length, dtype=np.uint32) for c in params.clients}

    return draw


@pytest.fixture(scope="session")
def make_drive(random_vectors: Any) -> Callable[..., Drive]:
    def make(
        params: SessionParams,
        vectors: dict[str, np.ndarray] | None = None,
        drops: dict[str, int] | None = None,
        tamper: Tamper = lambda stage, client, message: message,
    ) -> Drive:
        return Drive(params, vectors or random_vectors(params), drops or {}, tamper)

    return make


@pytest.fixture(scope="session")
def plain_sum() -> Callable[..., np.ndarray]:
    def total(vectors: dict[str, np.ndarray], survivors: Collection[str]) -> np.ndarray:
        return sum(vectors[client].astype(object) for client in survivors) % 2**32

    return total


@pytest.fixture
def at_stage(make_drive: Any) -> Callable[..., SimpleNamespace]:
    """Return a function that runs a round up to a stage, whose messages it makes but does not deliver."""

    def build(params: SessionParams, stage: str) -> SimpleNamespace:
        drive = make_drive(params)
        server, clients, ids = drive.server, drive.clients, params.clients
        now = SimpleNamespace(server=server, clients=clients, vectors=drive.vectors)
        now.advertise = {c: clients[c].advertise() for c in ids}
        if stage == "advertise":
            return now
        for c in ids:
            server.receive_advertise(now.advertise[c])
        now.roster = server.roster()
        if stage == "roster":
            return now
        now.share = {c: clients[c].share(now.roster) for c in ids}
        if stage == "share":
            return now
        for c in ids:
            server.receive_share(now.share[c])
        now.shares = {c: server.shares_for(c) for c in ids}
        if stage == "shares":
            return now
        now.masked = {c: clients[c].masked_input(now.shares[c], now.vectors[c]) for c in ids}
        if stage == "masked":
            return now
        for c in ids:
            server.receive_masked(now.masked[c])
        now.survivors = server.survivors()
        if stage == "survivors":
            return now
        now.unmask = {c: clients[c].unmask(now.survivors) for c in ids}
        return now

    return build
