"""A run's data and their division over clients, before any model is loaded."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from privfed.config import RunConfig
from privfed.data import Dataset, check_shards, partition, single_class_clients
from privfed.errors import ConfigError, DataError
from privfed.federation.phases import phase_plans, phases
from privfed.federation.shared import NOTHING, SharedWork
from privfed.models import resolve
from privfed.privacy.plan import PhasePlan, Plan, make_plan
from privfed.rules import check_cohort
from privfed.tuning import check as check_tuning
from privfed.types import Shard

if TYPE_CHECKING:
    from privfed.federation.canaries import Canaries


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """Data and their division, before any model is loaded.

    Attributes:
        canaries: What was planted for an audit, or None.
        simulated: Whether the clients are played by this process, so that figures of theirs can be shown.
    """

    dataset: Dataset
    shards: tuple[Shard, ...]
    partition_digest: str
    notes: tuple[str, ...]
    canaries: Canaries | None = None
    simulated: bool = True


def check_before_data(config: RunConfig) -> None:
    """Find what can be found wrong without reading any data.

    Raises:
        ModelError: If the model or the device is not there.
        ConfigError: If two tables contradict each other, the tuning's options cannot hold, or a package that is
            asked for is not there.
    """
    check_tuning(config.tuning, config.model.task)
    if not resolve(config.model).local:
        from privfed.models.loading import check_available  # loads transformers, which a local model does not need yet

        check_available(config.model)
    if config.model.device != "auto":
        from privfed.models.loading import find_device

        find_device(config.model.device)
    if config.evaluate.generate:
        from privfed.federation.generation import check_generation

        check_generation(config.evaluate.generate)
    if config.data.messages is not None:
        from privfed.models.loading import check_conversations

        check_conversations(config.model)
    if config.head_warm_start.name != "none" and getattr(config.tuning, "name", "") == "head":
        raise ConfigError('head_warm_start with tuning.name = "head" trains the head twice: leave one of them out.')


def gather(config: RunConfig, shared: SharedWork = NOTHING) -> Material:
    """Load the data and divide it over clients; ``shared`` may have the data already.

    Raises:
        DataError: If the data cannot be used as described, or a shard is too small for the batch.
        ConfigError: If the partition cannot be had.
    """
    dataset = shared.dataset(config)
    shards = partition(dataset.train, config.partition, seed=config.seed)
    check_shards(shards, dataset.train, min_size=1)
    notes = list(dataset.notes)
    labels = dataset.train.labels
    single = () if labels is None else single_class_clients(shards, labels)
    if single:
        notes.append(f"{len(single)} clients hold a single class: {', '.join(single[:5])}")
    return divided(config, Material(dataset=dataset, shards=(), partition_digest="", notes=tuple(notes)), shards)


def divided(config: RunConfig, material: Material, shards: tuple[Shard, ...]) -> Material:
    """Return the material under this division.

    Raises:
        DataError: If a shard is too small for the batch.
        ConfigError: If there are too few clients.
    """
    found = replace(material, shards=shards, partition_digest=_partition_digest(shards))
    check_material(config, found)
    return found


def check_material(config: RunConfig, material: Material) -> None:
    """Refuse a division that the configuration cannot work with.

    Raises:
        ConfigError: If the cohort or the masks do not fit the number of clients.
        DataError: If a shard is too small for the batch.
    """
    shards = material.shards
    cohort = config.server.cohort_size
    if cohort is not None and cohort > len(shards):
        raise ConfigError(f"server.cohort_size = {cohort}, but the partition has {len(shards)} clients: lower it.")
    _check_cohort(config, cohort or len(shards))
    if config.secagg.name == "masked" and len(shards) < 2:
        raise ConfigError('A masked sum needs two clients and the partition has one: set secagg.name = "none".')
    _check_batches(config, shards)


def plans(config: RunConfig, material: Material, lengths: Mapping[str, int] | None = None) -> list[PhasePlan]:
    """Return the run's phases over its clients, as the accountant needs them; ``lengths`` as in ``phase_plans``."""
    return phase_plans(config, {shard.client_id: len(shard) for shard in material.shards}, lengths)


def plan_privacy(config: RunConfig, material: Material, lengths: Mapping[str, int] | None = None) -> Plan | None:
    """Return what the run will cost, or None for a run without privacy.

    Args:
        config: The run.
        material: Its data.
        lengths: Values that a client sends, by phase; needed with distributed noise only.

    Warns:
        UserWarning: If delta is at least one over the number of protected units: it then promises nothing.
    """
    if not config.privacy.on:
        return None
    units = sum(map(len, material.shards)) if config.privacy.unit == "example" else len(material.shards)
    if config.privacy.target_delta >= 1 / units:
        warnings.warn(
            f"privacy.target_delta = {config.privacy.target_delta:g} is not below 1 / {units} {config.privacy.unit}s: "
            "releasing one of them in full would satisfy it, so the guarantee is meaningless; lower it.",
            stacklevel=2,
        )
    return make_plan(config.privacy, plans(config, material, lengths), masks=config.secagg.masks())


def _check_cohort(config: RunConfig, clients: int) -> None:
    try:
        check_cohort(config.server, clients)
    except ValueError as error:
        raise ConfigError(f"{error}.") from error


def _check_batches(config: RunConfig, shards: tuple[Shard, ...]) -> None:
    smallest = min(shards, key=len)
    for name, client, _server in phases(config):
        if config.privacy.unit == "example" and client.probability(len(smallest)) > 1:
            raise DataError(
                f"client.batch_size = {client.batch_size} is larger than the shard of {smallest.client_id} "
                f"({len(smallest)} examples) in phase {name}: Poisson sampling needs batch_size <= shard; lower it, "
                "raise partition.min_size, or give client.sampling_probability instead."
            )


def _partition_digest(shards: tuple[Shard, ...]) -> str:
    state = hashlib.sha256()
    for shard in shards:
        state.update(f"{shard.client_id}\x1f".encode())
        state.update(np.ascontiguousarray(shard.indices, dtype="<i8").tobytes())
    return state.hexdigest()
