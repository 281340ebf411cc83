"""Equal shards of rows drawn at random: every client sees the whole distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from privfed.data.sharding import PARTITIONERS, Labels, Partitioner, Parts, client_ids, require_rows
from privfed.table import Table


class IidPartition(Table):
    """``clients`` shards whose sizes differ by one row at most."""

    name: Literal["iid"] = "iid"
    clients: int = Field(default=10, ge=1)
    min_size: int = Field(default=1, ge=1)


def split(labels: Labels, clients: Sequence[str] | None, spec: IidPartition, rng: np.random.Generator) -> Parts:
    """Return a random permutation of the rows, cut into equal parts."""
    del clients  # natural clients play no part here
    require_rows(len(labels), spec.clients, spec.min_size)
    parts = np.array_split(rng.permutation(len(labels)), spec.clients)
    return dict(zip(client_ids(spec.clients), parts, strict=True))


PARTITIONERS.register("iid")(Partitioner(config=IidPartition, split=split))
