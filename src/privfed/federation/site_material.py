"""The data of a run whose clients are at sites: what each party has of them.

With *shared* data every party loads the run's own data set, and a site trains on its clients' parts only: bits are then
those of the same run in one process. With sites' *own* data a site loads its files and nobody else does; the server's
``[data]`` is a set of its own, of the same form, which gives the classes and the test rows and never trains anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from privfed.config import RunConfig
from privfed.data import Dataset, TextDataset, load_dataset
from privfed.data.config import DataConfig
from privfed.errors import ConfigError, DataError
from privfed.federation.material import Material, check_material, gather
from privfed.federation.sites import Sites
from privfed.types import Shard


def server_material(config: RunConfig, sites: Sites) -> Material:
    """Return what the server has: its data set, and the clients' sizes from the roster.

    Raises:
        ConfigError: If the roster is not that of this run's partition, or does not fit the cohort.
        DataError: If the server's data cannot be used.
    """
    if sites.data == "shared":
        return _shared(config, sites)
    dataset = load_dataset(config.data, seed=config.seed, task=config.model.task)
    unknown = sorted(set(sites.classes) - set(dataset.label_names))
    if unknown:
        raise ConfigError(
            f"Sites have the classes {', '.join(unknown)}, which the server's data set {dataset.name} has not: give it "
            "at least one row of each class."
        )
    return _hollow(config, dataset, sites, {})


def site_material(
    config: RunConfig, sites: Sites, name: str, label_names: Sequence[str], own: DataConfig | None
) -> Material:
    """Return what one site has.

    Args:
        config: The run, as the server sent it.
        sites: The roster that the site pinned.
        name: The site.
        label_names: The classes, in the server's order; used with own data.
        own: The site's ``[data]`` table, with own data.

    Raises:
        ConfigError: If the roster does not fit the data.
        DataError: If the data cannot be used.
    """
    if sites.data == "shared":
        return _shared(config, sites)
    if own is None:
        raise ConfigError(f'The roster says that site {name} has data of its own, and its file has no "[data]" path.')
    dataset, rows = own_rows(config, own, name)
    dataset = _relabelled(dataset, label_names)
    for member in sites.card(name).clients:
        if len(rows.get(member.id, ())) != member.examples:
            raise ConfigError(
                f"The roster says that {member.id} has {member.examples} examples, and the data have "
                f"{len(rows.get(member.id, ()))}: make a new card and hand out a new roster."
            )
    return _hollow(config, dataset, sites, rows)


def own_rows(config: RunConfig, own: DataConfig, name: str) -> tuple[TextDataset, dict[str, np.ndarray]]:
    """Return a site's own data set and each of its clients' rows: one client a value of ``own.client``, or one in all.

    Raises:
        DataError: If the data are not texts.
    """
    dataset = load_dataset(own, seed=config.seed, task=config.model.task)
    if not isinstance(dataset, TextDataset):
        raise DataError("A site's own data have to be texts in this version; images are for shared data.")
    clients = dataset.train.clients
    if clients is None:
        return dataset, {name: np.arange(len(dataset.train))}
    column = np.array(clients)
    return dataset, {f"{name}/{each}": np.flatnonzero(column == each) for each in sorted(set(clients))}


def _shared(config: RunConfig, sites: Sites) -> Material:
    material = gather(config)
    found = {shard.client_id: len(shard) for shard in material.shards}
    if found != sites.sizes:
        differing = sorted(set(found.items()) ^ set(sites.sizes.items()))[:2]
        raise ConfigError(
            f"The roster's clients are not those of this run's partition ({len(sites.sizes)} and {len(found)} clients; "
            f"first differences: {differing}): make the sites' cards for this configuration."
        )
    return replace(material, simulated=False)


def _hollow(config: RunConfig, dataset: Dataset, sites: Sites, rows: Mapping[str, np.ndarray]) -> Material:
    """Return a material whose other clients' shards have the right size and nothing in them."""
    shards = tuple(
        Shard(client_id=client, indices=rows.get(client, np.zeros(size, dtype=np.int64)))
        for client, size in sites.sizes.items()
    )
    material = Material(
        dataset=dataset,
        shards=shards,
        partition_digest=hashlib.sha256(f"privfed own data/{sites.digest()}".encode()).hexdigest(),
        notes=tuple(dataset.notes),
        simulated=False,
    )
    check_material(config, material)
    return material


def _relabelled(dataset: TextDataset, label_names: Sequence[str]) -> TextDataset:
    """Return a data set with its classes numbered as the server numbers them."""
    if dataset.train.labels is None:
        return dataset
    missing = sorted(set(dataset.label_names) - set(label_names))
    if missing:
        raise ConfigError(f"The run has no class {missing[0]!r}, which this site's data have: ask for it to be added.")
    number = np.array([list(label_names).index(each) for each in dataset.label_names], dtype=np.int64)

    def again(split: object) -> object:
        return replace(split, labels=number[split.labels])  # type: ignore[type-var,attr-defined]

    return replace(dataset, label_names=tuple(label_names), train=again(dataset.train), test=again(dataset.test))  # type: ignore[arg-type]
