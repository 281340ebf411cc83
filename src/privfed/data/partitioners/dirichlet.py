"""Label skew: class proportions drawn from a Dirichlet distribution; a small alpha is a strong skew.

Two forms are in use. By default each class is divided over the clients in proportions drawn from Dir(alpha)
(Yurochkin et al. 2019; Li et al. 2022, "Federated learning on non-IID data silos"), which skews the sizes of
the shards too. With ``equal_sizes`` each client draws its own class proportions from Dir(alpha * K * prior),
K the number of classes, and fills a shard of equal size by them (Hsu, Qi and Brown 2019; there alpha is ours
times K).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from privfed.data.sharding import PARTITIONERS, Labels, Partitioner, Parts, client_ids, require_rows
from privfed.table import Table

MAX_DRAWS = 50
"""How often the proportions are drawn again for the sake of ``min_size`` before rows are moved instead."""


class DirichletPartition(Table):
    """Label-skewed shards.

    Attributes:
        alpha: The concentration: 100 is nearly iid, 0.1 leaves most clients with few classes.
        min_size: The smallest shard. Proportions are drawn again until it holds; where they will not, rows
            are moved from the largest shards.
        equal_sizes: Whether all shards have the same size (Hsu et al.) or sizes vary with the draw.
    """

    name: Literal["dirichlet"] = "dirichlet"
    clients: int = Field(default=10, ge=1)
    alpha: float = Field(default=0.5, gt=0.0, allow_inf_nan=False)
    min_size: int = Field(default=1, ge=1)
    equal_sizes: bool = False


def split(labels: Labels, clients: Sequence[str] | None, spec: DirichletPartition, rng: np.random.Generator) -> Parts:
    """Return shards of skewed labels; every row is in exactly one."""
    del clients  # natural clients play no part here
    require_rows(len(labels), spec.clients, spec.min_size)
    pools = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    if spec.equal_sizes:
        owners = _equal_sizes(pools, spec, rng)
    else:
        owners = _draw(pools, spec, rng)
        for _ in range(MAX_DRAWS):
            if min(map(len, owners)) >= spec.min_size:
                break
            owners = _draw(pools, spec, rng)
        _repair(owners, spec.min_size)
    parts = [np.array(rows, dtype=np.int64) for rows in owners]
    return dict(zip(client_ids(spec.clients), parts, strict=True))


def _draw(pools: list[NDArray[np.int64]], spec: DirichletPartition, rng: np.random.Generator) -> list[list[int]]:
    """Divide each class over the clients by its own draw of proportions."""
    owners: list[list[int]] = [[] for _ in range(spec.clients)]
    for pool in pools:
        proportions = rng.dirichlet(np.full(spec.clients, spec.alpha))
        cuts = np.rint(np.cumsum(proportions)[:-1] * len(pool)).astype(np.int64)
        for owner, rows in zip(owners, np.split(pool, cuts), strict=True):
            owner.extend(rows.tolist())
    return owners


def _repair(owners: list[list[int]], min_size: int) -> None:
    """Move rows from the largest shard, one at a time, to shards below ``min_size``."""
    for owner in owners:
        while len(owner) < min_size:
            # Enough rows exist (checked before), so while one shard is short another has rows to spare.
            owner.append(max(owners, key=len).pop())


def _equal_sizes(pools: list[NDArray[np.int64]], spec: DirichletPartition, rng: np.random.Generator) -> list[list[int]]:
    """Fill shards of equal size, each by its own draw of class proportions."""
    left = np.array([len(pool) for pool in pools])
    total = int(left.sum())
    prior = left / total
    owners: list[list[int]] = []
    for client in range(spec.clients):
        proportions = rng.dirichlet(spec.alpha * len(pools) * prior)
        need = total * (client + 1) // spec.clients - total * client // spec.clients
        rows: list[int] = []
        while len(rows) < need:
            # Classes that have run out are left out of the proportions, as in the paper.
            weights = np.where(left > 0, np.maximum(proportions, 1e-12), 0.0)
            wanted = rng.multinomial(need - len(rows), weights / weights.sum())
            for number, count in enumerate(np.minimum(wanted, left).tolist()):
                start = len(pools[number]) - int(left[number])
                rows.extend(pools[number][start : start + count].tolist())
                left[number] -= count
        owners.append(rows)
    return owners


PARTITIONERS.register("dirichlet")(Partitioner(config=DirichletPartition, split=split, needs_labels=True))
