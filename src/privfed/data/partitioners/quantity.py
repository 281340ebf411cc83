"""Shards of very different size with the same distribution of labels (quantity skew)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from privfed.data.sharding import PARTITIONERS, Labels, Partitioner, Parts, client_ids, require_rows
from privfed.table import Table


class QuantityPartition(Table):
    """Every client gets ``min_size`` rows; the rest is divided by proportions drawn from Dir(``alpha``).

    A small alpha gives a few large clients and many small ones.
    """

    name: Literal["quantity"] = "quantity"
    clients: int = Field(default=10, ge=1)
    alpha: float = Field(default=0.5, gt=0.0, allow_inf_nan=False)
    min_size: int = Field(default=1, ge=1)


def split(labels: Labels, clients: Sequence[str] | None, spec: QuantityPartition, rng: np.random.Generator) -> Parts:
    """Return a random permutation of the rows, cut into parts of the drawn sizes."""
    del clients  # natural clients play no part here
    require_rows(len(labels), spec.clients, spec.min_size)
    proportions = rng.dirichlet(np.full(spec.clients, spec.alpha))
    spare = len(labels) - spec.clients * spec.min_size
    sizes = spec.min_size + rng.multinomial(spare, proportions)
    parts = np.split(rng.permutation(len(labels)), np.cumsum(sizes)[:-1])
    return dict(zip(client_ids(spec.clients), parts, strict=True))


PARTITIONERS.register("quantity")(Partitioner(config=QuantityPartition, split=split))
