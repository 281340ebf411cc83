"""The roster of a deployment: which sites there are, which clients each hosts, and the keys that everybody pins.

A site writes its own part, its *card*, from its data and its keys; the roster is the cards put together, one
``[[sites]]`` table each, and every party gets the same file by a way that the server cannot change. How many examples
a client has is public: sampling probabilities and weights follow from it.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import tomli_w
from pydantic import Field, ValidationError, field_validator

from privfed.errors import ConfigError
from privfed.secagg.identity import PUBLIC_BYTES
from privfed.table import Table

Data = Literal["shared", "own"]


class Member(Table):
    """One client of a site.

    Attributes:
        id: The client.
        examples: How many training records it has.
        identity: Its public signing key, as hex.
    """

    id: str = Field(min_length=1, max_length=128)
    examples: int = Field(ge=1)
    identity: str

    @field_validator("identity")
    @classmethod
    def _check_identity(cls, value: str) -> str:
        return _public_key(value)


class Card(Table):
    """One site.

    Attributes:
        name: The site.
        identity: Its public signing key, as hex: signs its replies.
        node_key: The public key of its SuperNode, in OpenSSH's format; empty without node authentication.
        data: ``shared``: its clients are parts of the run's own data set, which every site can load (a lab);
            ``own``: it trains on files that nobody else has.
        classes: With ``own`` data, the names of the classes that occur.
        clients: Whom it hosts.
    """

    name: str = Field(min_length=1, max_length=128)
    identity: str
    node_key: str = ""
    data: Data = "own"
    classes: list[str] = Field(default_factory=list)
    clients: list[Member] = Field(min_length=1)

    @field_validator("identity")
    @classmethod
    def _check_identity(cls, value: str) -> str:
        return _public_key(value)

    def to_toml(self) -> str:
        """Return the card as a roster of one."""
        return tomli_w.dumps({"sites": [self.model_dump(mode="python")]})


class _RosterFile(Table):
    sites: list[Card] = Field(min_length=1)


@dataclass(frozen=True)
class Sites:
    """All sites of a deployment, in the order of their names.

    Raises:
        ConfigError: If a site, a client or a key is there twice, or some sites' data are shared and others' their own.
    """

    cards: tuple[Card, ...]

    def __post_init__(self) -> None:
        members = [member for card in self.cards for member in card.clients]
        for what, found in (
            ("site", [card.name for card in self.cards]),
            ("client", [member.id for member in members]),
            ("identity", [*(card.identity for card in self.cards), *(member.identity for member in members)]),
        ):
            twice = sorted({each for each in found if found.count(each) > 1})
            if twice:
                raise ConfigError(f"The roster has the {what} {twice[0]!r} twice: each party needs its own.")
        if len({card.data for card in self.cards}) > 1:
            raise ConfigError('The roster mixes sites with data = "shared" and data = "own": use one of them.')

    @property
    def data(self) -> Data:
        """Whether clients are parts of one data set or sites bring their own."""
        return self.cards[0].data

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Examples of each client, clients in the order of their ids."""
        return dict(sorted((m.id, m.examples) for card in self.cards for m in card.clients))

    @cached_property
    def site_of(self) -> dict[str, str]:
        """The site that hosts each client."""
        return {member.id: card.name for card in self.cards for member in card.clients}

    @cached_property
    def identities(self) -> dict[str, bytes]:
        """The pinned public key of each client."""
        return {m.id: bytes.fromhex(m.identity) for card in self.cards for m in card.clients}

    @cached_property
    def site_identities(self) -> dict[str, bytes]:
        """The pinned public key of each site."""
        return {card.name: bytes.fromhex(card.identity) for card in self.cards}

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of all classes that sites with data of their own have."""
        return tuple(sorted({name for card in self.cards for name in card.classes}))

    def card(self, name: str) -> Card:
        """Return one site's card.

        Raises:
            ConfigError: If there is no such site.
        """
        for card in self.cards:
            if card.name == name:
                return card
        raise ConfigError(f"The roster has no site {name!r}: it has {', '.join(card.name for card in self.cards)}.")

    def digest(self) -> str:
        """Return the SHA-256 of the roster, whatever its layout in the file."""
        cards = [card.model_dump(mode="json") for card in self.cards]
        return hashlib.sha256(json.dumps(cards, sort_keys=True).encode()).hexdigest()

    def bound(self, config_digest: str) -> bytes:
        """Return what sessions are bound to: the configuration and this roster."""
        return hashlib.sha256(f"privfed roster/{self.digest()}/{config_digest}".encode()).digest()

    def grouped(self, by_client: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
        """Return what is meant for clients, by site."""
        found: dict[str, dict[str, bytes]] = {}
        for client, value in by_client.items():
            found.setdefault(self.site_of[client], {})[client] = value
        return found


def read_sites(path: Path) -> Sites:
    """Return the roster in a file.

    Raises:
        ConfigError: If it cannot be read or does not hold.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        cards = _RosterFile.model_validate(raw).sites
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"The roster {path} cannot be read: {error}. Put the sites' cards together in it.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"The roster {path} does not hold: {place}: {first['msg']}.") from error
    return Sites(cards=tuple(sorted(cards, key=lambda card: card.name)))


def _public_key(value: str) -> str:
    try:
        raw = bytes.fromhex(value)
    except ValueError:
        raw = b""
    if len(raw) != PUBLIC_BYTES:
        raise ValueError(f"expected a public key of {PUBLIC_BYTES} bytes as hex, got {value!r}")
    return value.lower()
