"""Geometric median (RFA): the point whose distances to all updates add up to the least.

Pillutla et al. 2022, "Robust Aggregation for Federated Learning", IEEE Transactions on Signal Processing, arXiv
1912.13445: found by the smoothed Weiszfeld algorithm, z <- sum(w_i x_i) / sum(w_i) with w_i = 1 / max(nu, |z - x_i|).
The start is the coordinate-wise median, where the paper leaves it open: from the mean, one huge update would cost tens
of iterations to come back from. Less than half of the updates, whatever they hold, cannot move it out of reach.

Shape suffixes: K updates of a round, M values of an update.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from privfed.rules import RULES
from privfed.rules.robust import Float64, Robust
from privfed.table import Table

# a step so small beside the distances to the updates no longer changes a float32
_SETTLED = 1e-10


class GeometricMedianConfig(Table):
    """Options.

    Attributes:
        iterations: The most iterations; fewer where it settles earlier.
        smoothing: Distances below it count as it (nu), so that no update ever weighs infinitely much.
    """

    name: Literal["geometric_median"] = "geometric_median"
    iterations: int = Field(default=100, ge=1)
    smoothing: float = Field(default=1e-6, gt=0)


@RULES.register("geometric_median")
class GeometricMedian(Robust):
    """Minimises the sum of distances."""

    config = GeometricMedianConfig

    def __init__(self, options: GeometricMedianConfig | None = None) -> None:
        super().__init__(options or GeometricMedianConfig())

    def combined(self, updates_KM: Float64) -> Float64:
        """Return the geometric median, to within its smoothing and what the iterations leave."""
        z_M = np.asarray(np.median(updates_KM, axis=0))
        for _ in range(self.options.iterations):
            distances_K = np.linalg.norm(updates_KM - z_M, axis=1)
            weights_K = 1 / np.maximum(self.options.smoothing, distances_K)
            before_M, z_M = z_M, weights_K @ updates_KM / weights_K.sum()
            if np.linalg.norm(z_M - before_M) <= _SETTLED * np.median(distances_K):
                break
        return z_M
