"""``site.toml``: what a data holder says of itself, its data, its caps and its conditions."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator

from privfed.data.config import DataConfig
from privfed.errors import ConfigError, nearest
from privfed.federation.engines.flower.policy import Accept, Caps, Policy
from privfed.table import Table


class SiteConfig(Table):
    """The whole file. Relative paths are relative to the current folder.

    Attributes:
        name: The site, as in the roster.
        superlink: host:port of the server's SuperLink.
        roster: The roster that the site pins, got from the operator by a way that the server cannot change.
        state: Folder for the site's keys, memory and logs: keep it like the data.
        ledger: The site's ledger; in ``state`` by default.
        root_certificates: The certificate of the authority that the server's was signed by.
        insecure: No TLS and no node authentication: for tests on one machine.
        part: With the run's own data set, in a lab: [i, n] hosts every n-th client from the i-th on.
        data: The site's own data, as in a run's ``[data]``; with ``client`` set, one client a value of that column.
        models: Where models are at this site, by the name that runs give them.
        caps: See :class:`Caps`.
        accept: See :class:`Accept`.
    """

    name: str = Field(min_length=1, max_length=128)
    superlink: str = "127.0.0.1:9092"
    roster: str = "roster.toml"
    state: str
    ledger: str | None = None
    root_certificates: str | None = None
    insecure: bool = False
    part: list[int] | None = Field(default=None, min_length=2, max_length=2)
    data: DataConfig | None = None
    models: dict[str, str] = Field(default_factory=dict)
    caps: Caps | None = None
    accept: Accept = Accept()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.part is None) == (self.data is None):
            raise ValueError("expected either part = [i, n], of the run's own data set, or a table [data] of its own")
        if self.insecure == (self.root_certificates is not None):
            raise ValueError("expected either root_certificates, for TLS, or insecure = true")
        return self

    @property
    def policy(self) -> Policy:
        """Caps and conditions."""
        return Policy(caps=self.caps, accept=self.accept)

    @property
    def folder(self) -> Path:
        """Where the site keeps what is its own."""
        return Path(self.state)


def read_site(path: Path) -> SiteConfig:
    """Return the configuration in a file.

    Raises:
        ConfigError: If it cannot be read, a key is unknown or a value cannot hold.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        return SiteConfig.model_validate(raw)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}.") from error
    except ValidationError as error:
        found = error.errors()
        # a key that is misspelt is missing as well: its name says more
        problem = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            hint = nearest(key.rpartition(".")[2], [*SiteConfig.model_fields, *Caps.model_fields, *Accept.model_fields])
            raise ConfigError(f"{path}: Unknown key {key!r}.{hint}") from error
        raise ConfigError(f"{path}: {key}{': ' if key else ''}{problem['msg']}.") from error
