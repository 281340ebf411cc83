"""What is written down of a run beside its rounds: who holds what, and the versions that it ran with."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed import __version__
from privfed.config import RunConfig
from privfed.federation.material import Material

SIMULATED = "Simulation only: computed from the clients' data without noise. Not part of the release."
PACKAGES = ("torch", "transformers", "peft", "opacus", "dp-accounting", "numpy", "cryptography")


def partition_record(config: RunConfig, material: Material) -> dict[str, Any]:
    """Return partition.json: who holds what. Known only because the clients are simulated on one machine."""
    # at sites nobody but they knows the labels
    labels = material.dataset.train.labels if material.simulated else None
    names = material.dataset.label_names if material.simulated else ()
    return {
        "label_names": list(names),
        "clients": [
            {
                "client_id": shard.client_id,
                "size": len(shard),
                "label_counts": _counts(labels, shard.indices, len(names)),
            }
            for shard in material.shards
        ],
        "partitioner": getattr(config.partition, "name", ""),
        "note": SIMULATED if material.simulated else "Public: sizes as the roster states them.",
    }


def _counts(labels: NDArray[np.int64] | None, rows: NDArray[np.int64], classes: int) -> list[int]:
    """Return how many of ``rows`` each class has; nothing where records have no class."""
    return [] if labels is None else [int((labels[rows] == k).sum()) for k in range(classes)]


def versions() -> dict[str, str]:
    """Return the versions that matter for a guarantee."""
    found = {"privfed": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    return found | {name: metadata.version(name) for name in PACKAGES}
