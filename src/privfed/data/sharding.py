"""From a training split to one shard per client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.data.dataset import AnySplit
from privfed.errors import ConfigError, DataError
from privfed.registry import Registry
from privfed.rng import experiment_rng
from privfed.table import Table
from privfed.types import Shard

Labels = NDArray[np.int64]
Parts = Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Partitioner:
    """A way to divide the training rows over clients.

    Attributes:
        config: The ``[partition]`` table of this partitioner; its ``name`` is the registered one.
        split: The function from labels, natural clients (or None), that table and a random stream to the row
            numbers of each client id. No row may be in two shards; a function of its arguments alone.
        needs_labels: Whether it divides by class; of records without classes the labels are all 0 otherwise.
    """

    config: type[Table]
    # Any: each partitioner takes its own table, and a field of a function type is contravariant in it.
    split: Callable[[Labels, Sequence[str] | None, Any, np.random.Generator], Parts]
    needs_labels: bool = False

    def __call__(self, labels: Labels, clients: Sequence[str] | None, spec: Table, rng: np.random.Generator) -> Parts:
        """Return the row numbers of each client id."""
        return self.split(labels, clients, spec, rng)


PARTITIONERS: Registry[Partitioner] = Registry("partitioner", "privfed.data.partitioners")
"""Partitioners by the ``name`` of their table."""


def partition(dataset_train: AnySplit, spec: Table, *, seed: int) -> tuple[Shard, ...]:
    """Return the shards of the training split: sorted by client id, row numbers ascending.

    Args:
        dataset_train: The training split.
        spec: The ``[partition]`` table.
        seed: The run's seed; equal arguments give equal shards.

    Raises:
        ConfigError: If the rows cannot be divided as asked.
        UnknownNameError: If there is no partitioner of the table's name.
    """
    name = getattr(spec, "name", None)
    partitioner = PARTITIONERS.get(str(name))
    labels = dataset_train.labels
    if labels is None:
        if partitioner.needs_labels:
            raise ConfigError(no_classes(str(name)))
        labels = np.zeros(len(dataset_train), dtype=np.int64)
    parts = partitioner(labels, dataset_train.clients, spec, experiment_rng(seed, "partition"))
    return tuple(
        Shard(client_id=client, indices=np.sort(np.asarray(parts[client], dtype=np.int64))) for client in sorted(parts)
    )


def no_classes(name: str) -> str:
    """Return the sentence that refuses a partitioner by class where records have none."""
    return (
        f'[partition] has name = "{name}", which divides by class, but the records of a causal language model have '
        'none: use "iid", "quantity", or "by_column" with [data] client.'
    )


def check_shards(shards: Sequence[Shard], records: Sized, *, min_size: int = 1) -> None:
    """Check that every client has at least ``min_size`` of ``records``, none of them shared.

    Raises:
        DataError: If not; the message names the client.
    """
    if not shards:
        raise DataError("The partition has no clients, expected one at least: lower its min_size.")
    owners: dict[int, str] = {}
    for shard in shards:
        if len(shard) < max(1, min_size):
            held = "no rows" if len(shard) == 0 else f"{len(shard)} rows"
            raise DataError(
                f"Client {shard.client_id!r} has {held}, expected at least {max(1, min_size)}: "
                "give fewer clients or more rows."
            )
        for row in shard.indices.tolist():
            if not 0 <= row < len(records):
                raise DataError(
                    f"Client {shard.client_id!r} has row {row}, expected rows below {len(records)}: "
                    "partition this data set again."
                )
            owner = owners.setdefault(row, shard.client_id)
            if owner != shard.client_id:
                raise DataError(
                    f"Row {row} belongs to clients {owner!r} and {shard.client_id!r}, expected one owner: "
                    "partition this data set again."
                )


def single_class_clients(shards: Sequence[Shard], labels: Labels) -> tuple[str, ...]:
    """Return the ids of clients whose rows are all of one class: legal, and worth a warning."""
    return tuple(shard.client_id for shard in shards if len(np.unique(labels[shard.indices])) == 1)


def client_ids(count: int, prefix: str = "client") -> list[str]:
    """Return ``count`` ids such as ``"client-07"`` whose order as strings is that of their numbers."""
    width = len(str(count - 1))
    return [f"{prefix}-{number:0{width}d}" for number in range(count)]


def require_rows(rows: int, clients: int, min_size: int) -> None:
    """Check that ``rows`` suffice for ``clients`` shards of ``min_size``.

    Raises:
        ConfigError: If they do not.
    """
    if clients * min_size > rows:
        fit = max(1, rows // min_size)
        raise ConfigError(
            f"[partition] has clients = {clients} and min_size = {min_size}, which need "
            f"{clients * min_size} rows, but there are {rows}: "
            f"set clients to {fit} or fewer, or lower min_size."
        )
