"""Canaries in a run: their coins, and who holds them.

The coins are tossed once, by the operating system (from the seed where the noise is reproducible too), and written to
``coins.json`` in the run folder before any data is read; a resumed run reads them. Nothing but the division of the data
over clients depends on them, and only an audit's scorer opens the file.

Shape suffix: M canaries.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from privfed.data import check_shards
from privfed.data.canaries import CANARIES, Loss
from privfed.data.sharding import client_ids
from privfed.errors import ConfigError, ResumeError
from privfed.federation.material import Material, divided, gather
from privfed.federation.shared import NOTHING, SharedWork
from privfed.files import write_atomic
from privfed.rng import experiment_rng
from privfed.types import Shard

if TYPE_CHECKING:
    from privfed.run_config import RunConfig

Bits = NDArray[np.bool_]
COINS = "coins.json"
NOTE = (
    "{count} canaries ({kind}) were planted, each in the training data by the toss of a coin: the model has seen about "
    "{half} made-up records. This run is for an audit; its scores are those of such a model."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Canaries:
    """The canaries of a run, without their coins.

    Attributes:
        kind: Their name in ``privfed.data.canaries``.
        loss: Whether their loss is the model's, or a given gradient's.
        rows_M: Their rows in the planted training split.
        owners_M: The client that each is of, whether or not it is in its data.
    """

    kind: str
    loss: Loss
    rows_M: NDArray[np.int64] = field(repr=False)
    owners_M: tuple[str, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows_M)


def canaries_of(material: Material) -> Canaries:
    """Return the canaries of planted material.

    Raises:
        ConfigError: If there are none.
    """
    if material.canaries is None:
        raise ConfigError("This run has no canaries.")
    return material.canaries


def toss(folder: Path, config: RunConfig, *, started: bool) -> Bits:
    """Return a run's coins [M]: those in its folder, or fresh ones, which are then there.

    Args:
        folder: The run folder.
        config: The run.
        started: Whether the run has been under way before.

    Raises:
        ResumeError: If the coins of a run that is under way are gone, or are of another number.
    """
    count, path = config.audit.canaries, folder / COINS
    if path.exists():
        bits_M = read_coins(folder)
        if len(bits_M) != count:
            raise ResumeError(
                f"{path} holds {len(bits_M)} coins and the run has {count} canaries: it is another run's."
            )
        return bits_M
    if started:
        raise ResumeError(f"{path} is gone: the run cannot go on without its canaries' coins; start another.")
    size = (count + 7) // 8
    # coins of an experiment follow from its seed, as its noise does: configurations are then compared on the same ones
    seeded = config.privacy.reproducible_noise
    packed = experiment_rng(config.seed, "canaries", "coins").bytes(size) if seeded else secrets.token_bytes(size)
    content = {"canary": config.audit.canary, "count": count, "bits": packed.hex()}
    write_atomic(path, (json.dumps(content) + "\n").encode())
    path.chmod(0o600)
    return _bits(packed, count)


def read_coins(folder: Path) -> Bits:
    """Return the coins of a run: True where the canary was in the training data [M].

    Raises:
        ResumeError: If the folder has none, or they cannot be read.
    """
    try:
        content = json.loads((folder / COINS).read_text(encoding="utf-8"))
        return _bits(bytes.fromhex(content["bits"]), int(content["count"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"The coins of the canaries in {folder / COINS} cannot be read: {error}.") from error


def expected(config: RunConfig, shared: SharedWork = NOTHING) -> Material:
    """Return a run's data and their division as they can be told before its coins are tossed.

    No canary is in the training data, so that shards are the smallest and clients the fewest that the coins can make: a
    budget of this division is not below that of the run.

    Raises:
        ConfigError: If the configuration cannot work with the division.
        DataError: If the data cannot be used as described.
    """
    material = gather(config, shared)
    return plant(config, material) if config.audit.canaries else material


def plant(config: RunConfig, material: Material, bits_M: Bits | None = None) -> Material:
    """Return the material with canaries in its data set, and those whose coin says so in the clients' data.

    Args:
        config: The run.
        material: Its data and their division, without canaries.
        bits_M: The coins; None for no canary in the training data, as someone sees it who does not know them.

    Raises:
        ConfigError: If there are too many canaries for the data.
        DataError: If the data have no such canaries, or a client is left without a record.
    """
    count, kind = config.audit.canaries, CANARIES.get(config.audit.canary)
    first = len(material.dataset.train)
    rows = np.sort(np.concatenate([shard.indices for shard in material.shards]))
    planted = kind.make(material.dataset, rows, count, experiment_rng(config.seed, "canaries"))
    inside = np.zeros(count, dtype=np.bool_) if bits_M is None else bits_M
    alone = config.privacy.unit == "client"
    owners_M = _owners(config, material.shards, planted.rows_M, first, alone=alone)
    shards = _dealt(material.shards, planted.rows_M, owners_M, inside)
    check_shards(shards, planted.dataset.train, min_size=1)
    canaries = Canaries(kind=config.audit.canary, loss=kind.loss, rows_M=planted.rows_M, owners_M=owners_M)
    note = NOTE.format(count=count, kind=config.audit.canary, half=count // 2)
    found = replace(material, dataset=planted.dataset, notes=(*material.notes, note), canaries=canaries)
    return divided(config, found, shards)


def _owners(
    config: RunConfig, shards: Sequence[Shard], rows_M: NDArray[np.int64], first: int, *, alone: bool
) -> tuple[str, ...]:
    """Return each canary's client: a client of its own, that of the record whose place it took, or one in turn."""
    if alone:
        return tuple(client_ids(len(rows_M), prefix="canary"))
    by_row = {int(row): shard.client_id for shard in shards for row in shard.indices}
    order = experiment_rng(config.seed, "canaries", "owners").permutation(len(shards))
    return tuple(
        by_row[int(row)] if row < first else shards[order[i % len(shards)]].client_id for i, row in enumerate(rows_M)
    )


def _dealt(
    shards: Sequence[Shard], rows_M: NDArray[np.int64], owners_M: Sequence[str], inside: Bits
) -> tuple[Shard, ...]:
    """Return the shards without canaries whose coin says "out" and with those whose coin says "in"."""
    names = np.array(owners_M)
    kept = {shard.client_id: np.setdiff1d(shard.indices, rows_M) for shard in shards}
    for name in sorted(set(owners_M)):
        own = rows_M[inside & (names == name)]
        if name in kept or len(own):
            kept[name] = np.sort(np.concatenate([kept.get(name, own[:0]), own]))
    return tuple(Shard(client_id=name, indices=rows) for name, rows in sorted(kept.items()))


def _bits(packed: bytes, count: int) -> Bits:
    return np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=count).astype(np.bool_)
