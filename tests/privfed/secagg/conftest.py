"""Drives whole sessions in one process, with hooks for dropped clients and altered messages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from privfed.errors import SecAggError
from privfed.secagg import ClientSession, Identity, ServerSession, SessionParams

Tamper = Callable[[str, str, bytes], bytes]
STAGES = ["advertise", "roster", "share", "shares", "masked", "survivors", "agree", "agreement", "unmask"]


def identity_of(client: str) -> Identity:
    """Return the identity that tests give a client; from its name, so that both sides find it."""
    return Identity.from_seed(hashlib.sha256(b"test identity " + client.encode(errors="replace")).digest())


def _params(n: int = 3, threshold: int | None = None, length: int = 5, **changes: Any) -> SessionParams:
    """Return parameters of a complete graph; ``threshold`` is n_min as well where the test does not say."""
    clients = changes.get("clients", tuple(sorted(f"c{i:02d}" if n > 10 else f"c{i}" for i in range(n))))
    least = threshold if threshold is not None else len(clients) // 2 + 1
    values: dict[str, Any] = {
        "round_id": b"round-1",
        "config_digest": bytes(32),
        "clients": clients,
        "identities": tuple(identity_of(str(c)).public for c in clients),
        "degree": len(clients) - 1,
        "threshold": least,
        "n_min": least,
        "length": length,
    }
    return SessionParams(**{**values, **changes})


class Drive:
    """One round: ``drops`` maps a client to the last stage it does (0 none .. 4 agree); others do all five.

    A message that is refused costs the round its sender or receiver, as it would behind a network;
    ``refused`` has the errors and ``seen`` what travelled.
    """

    def __init__(
        self, params: SessionParams, vectors: dict[str, np.ndarray], drops: dict[str, int], tamper: Tamper
    ) -> None:
        self.params = params
        self.server = ServerSession(params)
        self.clients = {client: ClientSession(params, client, identity_of(client)) for client in params.clients}
        self.vectors, self.drops, self.tamper = vectors, drops, tamper
        self.refused: list[SecAggError] = []
        self.seen: dict[tuple[str, str], bytes] = {}

    def carry(self, stage: str, client: str, message: bytes) -> bytes:
        message = self.tamper(stage, client, message)
        self.seen[stage, client] = message
        return message

    def step(self, clients: Collection[str], number: int, act: Callable[[str], None]) -> list[str]:
        """Let each client that is still there act; return those for which it worked."""
        done = []
        for client in clients:
            if self.drops.get(client, 5) >= number:
                try:
                    act(client)
                    done.append(client)
                except SecAggError as error:
                    self.refused.append(error)
        return done

    def relay(
        self,
        alive: list[str],
        number: int,
        names: tuple[str, str],
        fetch: Callable[[str], bytes],
        answer: Callable[[str, bytes], bytes],
        receive: Callable[[bytes], str],
    ) -> list[str]:
        """Fetch the server's message for each, let it answer, and give the server the answer."""
        waiting = {client: fetch(client) for client in alive or list(self.clients)}

        def act(client: str) -> None:
            given = self.carry(names[0], client, waiting[client])
            receive(self.carry(names[1], client, answer(client, given)))

        return self.step(alive, number, act)

    def run(self) -> tuple[np.ndarray, tuple[str, ...]]:
        alive = self.collect()
        server, clients = self.server, self.clients
        self.relay(
            alive,
            5,
            ("agreement", "unmask"),
            server.agreement_for,
            lambda client, given: clients[client].unmask(given),
            server.receive_unmask,
        )
        return server.sum()

    def collect(self) -> list[str]:
        """Run all stages but the last; return who did them."""
        server, clients = self.server, self.clients

        def advertise(client: str) -> None:
            server.receive_advertise(self.carry("advertise", client, clients[client].advertise()))

        alive = self.step(list(clients), 1, advertise)
        alive = self.relay(
            alive, 2, ("roster", "share"), server.roster_for, lambda c, m: clients[c].share(m), server.receive_share
        )
        alive = self.relay(
            alive,
            3,
            ("shares", "masked"),
            server.shares_for,
            lambda c, m: clients[c].masked_input(m, self.vectors[c]),
            server.receive_masked,
        )
        return self.relay(
            alive,
            4,
            ("survivors", "agree"),
            server.survivors_for,
            lambda c, m: clients[c].agree(m),
            server.receive_agree,
        )


@pytest.fixture(scope="session")
def make_params() -> Callable[..., SessionParams]:
    return _params


@pytest.fixture(scope="session")
def identify() -> Callable[[str], Identity]:
    return identity_of


@pytest.fixture(scope="session")
def random_vectors() -> Callable[[SessionParams], dict[str, np.ndarray]]:
    def draw(params: SessionParams) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(11)
        return {c: rng.integers(0, 2**params.ring_bits, params.length, dtype=np.uint32) for c in params.clients}

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
    def total(vectors: dict[str, np.ndarray], survivors: Collection[str], ring_bits: int = 32) -> np.ndarray:
        return sum(vectors[client].astype(object) for client in survivors) % 2**ring_bits

    return total


@pytest.fixture
def at_stage(make_drive: Any) -> Callable[..., SimpleNamespace]:
    """Return a function that runs a round up to a stage, whose messages it makes but does not deliver."""

    def build(params: SessionParams, stage: str) -> SimpleNamespace:
        drive = make_drive(params)
        server, clients, ids = drive.server, drive.clients, params.clients
        now = SimpleNamespace(server=server, clients=clients, vectors=drive.vectors)
        makers: dict[str, Callable[[str], bytes]] = {
            "advertise": lambda c: clients[c].advertise(),
            "roster": server.roster_for,
            "share": lambda c: clients[c].share(now.roster[c]),
            "shares": server.shares_for,
            "masked": lambda c: clients[c].masked_input(now.shares[c], now.vectors[c]),
            "survivors": server.survivors_for,
            "agree": lambda c: clients[c].agree(now.survivors[c]),
            "agreement": server.agreement_for,
            "unmask": lambda c: clients[c].unmask(now.agreement[c]),
        }
        for name, make in makers.items():
            setattr(now, name, {c: make(c) for c in ids})
            if name == stage:
                return now
            if name in ("advertise", "share", "masked", "agree", "unmask"):
                for c in ids:
                    getattr(server, f"receive_{name}")(getattr(now, name)[c])
        raise ValueError(stage)

    return build
