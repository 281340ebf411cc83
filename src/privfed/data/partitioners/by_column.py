"""Natural clients: one shard for each value of the data set's client column."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from privfed.data.sharding import PARTITIONERS, Labels, Partitioner, Parts, client_ids
from privfed.errors import ConfigError
from privfed.table import Table

_log = logging.getLogger(__name__)

MERGED = "other"


class ByColumnPartition(Table):
    """The natural clients of the data set.

    Attributes:
        clients: Pack the natural clients into this many groups of nearly equal size; a natural client is
            never divided. A group is then the client that a client-level guarantee speaks of.
        min_size: Natural clients with fewer rows are dropped (with a note in the log), or merged.
        merge_small: Merge the natural clients below ``min_size`` into one client, ``"other"``.
    """

    name: Literal["by_column"] = "by_column"
    clients: int | None = Field(default=None, ge=1)
    min_size: int = Field(default=1, ge=1)
    merge_small: bool = False


def split(labels: Labels, clients: Sequence[str] | None, spec: ByColumnPartition, rng: np.random.Generator) -> Parts:
    """Return the rows of each natural client, or of each group of them."""
    del labels, rng  # the data decide
    if clients is None:
        raise ConfigError(
            "[partition] has name = 'by_column', but the data set has no natural clients: "
            "set [data] client to their column, or use name = 'dirichlet'."
        )
    rows: dict[str, list[int]] = {}
    for row, client in enumerate(clients):
        rows.setdefault(client, []).append(row)
    kept = _without_small(rows, spec) if spec.clients is None else _packed(rows, spec.clients, spec.min_size)
    return {client: np.array(indices, dtype=np.int64) for client, indices in kept.items()}


def _without_small(rows: Mapping[str, list[int]], spec: ByColumnPartition) -> dict[str, list[int]]:
    kept = {client: indices for client, indices in rows.items() if len(indices) >= spec.min_size}
    small = [row for client, indices in rows.items() if client not in kept for row in indices]
    if spec.merge_small and len(small) >= spec.min_size:
        merged = MERGED
        while merged in kept:  # a natural client may bear that very name
            merged += "_"
        kept[merged] = small
        small = []
    if not kept:
        largest = max(map(len, rows.values()), default=0)
        raise ConfigError(
            f"[partition] has min_size = {spec.min_size}, but the largest natural client has {largest} rows: "
            "lower min_size, or set clients to pack natural clients into groups."
        )
    if small:
        _log.warning("%d rows of natural clients below min_size = %d dropped", len(small), spec.min_size)
    return kept


def _packed(rows: Mapping[str, list[int]], count: int, min_size: int) -> dict[str, list[int]]:
    """Give the natural clients, largest first, each to the group that is smallest so far."""
    if count > len(rows):
        raise ConfigError(
            f"[partition] has clients = {count}, but the data set has {len(rows)} natural clients, "
            "which are never divided: lower clients, or use name = 'dirichlet'."
        )
    groups: dict[str, list[int]] = {name: [] for name in client_ids(count, "group")}
    sizes = [(0, name) for name in groups]
    for client in sorted(rows, key=lambda client: (-len(rows[client]), client)):
        size, name = heapq.heappop(sizes)
        groups[name].extend(rows[client])
        heapq.heappush(sizes, (size + len(rows[client]), name))
    smallest = min(map(len, groups.values()))
    if smallest < min_size:
        raise ConfigError(
            f"[partition] has clients = {count} and min_size = {min_size}, but the smallest of the groups of "
            f"natural clients has {smallest} rows: lower clients or min_size."
        )
    return groups


PARTITIONERS.register("by_column")(Partitioner(config=ByColumnPartition, split=split))
