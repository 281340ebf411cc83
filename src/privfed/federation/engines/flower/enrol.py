"""A site's keys, and the card by which it enters a roster."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from privfed.config import RunConfig
from privfed.data.config import DataConfig
from privfed.errors import ConfigError
from privfed.federation.material import gather
from privfed.federation.site_material import own_rows
from privfed.federation.sites import Card, Member
from privfed.rng import KEY_BYTES, PrivateStream, secret_key
from privfed.secagg import Identity

SECRET = "site.secret"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteKeys:
    """The long-lived keys of a site and its clients; all follow from one secret that never leaves the site."""

    secret: bytes = field(repr=False)

    @staticmethod
    def load(folder: Path) -> SiteKeys:
        """Return the keys kept in a folder; drawn from the operating system where there are none yet.

        Raises:
            ConfigError: If the file is not a secret of the right length.
        """
        path = folder / SECRET
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(secret_key())
                file.flush()
                os.fsync(file.fileno())
        secret = path.read_bytes()
        if len(secret) != KEY_BYTES:
            raise ConfigError(f"{path} has {len(secret)} bytes, expected a secret of {KEY_BYTES}: restore it.")
        return SiteKeys(secret=secret)

    @property
    def identity(self) -> Identity:
        """The site's own key: signs its replies."""
        return Identity.from_seed(PrivateStream(self.secret, "site identity").bytes(32))

    def client(self, client_id: str) -> Identity:
        """Return a client's key: signs what it stands for in secure aggregation."""
        return Identity.from_seed(PrivateStream(self.secret, "client identity", client_id).bytes(32))


def make_card(
    config: RunConfig,
    name: str,
    keys: SiteKeys,
    *,
    own: DataConfig | None = None,
    part: tuple[int, int] | None = None,
    node_key: str = "",
) -> Card:
    """Return a site's card for a run.

    Args:
        config: The run: its seed and partition say who the clients are, with shared data.
        name: The site.
        keys: Its keys.
        own: Its ``[data]`` table, where it has data of its own.
        part: With shared data (i, n): the site hosts every n-th client, from the i-th on.
        node_key: The public key of its SuperNode.

    Raises:
        ConfigError: If it has neither or both, or the part is empty.
        DataError: If its data cannot be used.
    """
    if (own is None) == (part is None):
        raise ConfigError("A site has either data of its own ([data] path) or a part of the run's ([data] part).")
    classes: tuple[str, ...] = ()
    if own is not None:
        dataset, rows = own_rows(config, own, name)
        sizes, classes = {client: len(each) for client, each in rows.items()}, dataset.label_names
    else:
        sizes = _part(config, part or (0, 1))
    members = [Member(id=c, examples=n, identity=keys.client(c).public.hex()) for c, n in sorted(sizes.items())]
    return Card(
        name=name,
        identity=keys.identity.public.hex(),
        node_key=node_key,
        data="shared" if own is None else "own",
        classes=list(classes),
        clients=members,
    )


def _part(config: RunConfig, part: tuple[int, int]) -> dict[str, int]:
    first, step = part
    if not 0 <= first < step:
        raise ConfigError(f"[data] part = [{first}, {step}], expected [i, n] with i from 0 to n - 1.")
    shards = sorted(gather(config).shards, key=lambda shard: shard.client_id)[first::step]
    if not shards:
        raise ConfigError(f"[data] part = [{first}, {step}] leaves this site no client: use fewer sites.")
    return {shard.client_id: len(shard) for shard in shards}
