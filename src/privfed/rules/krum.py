"""Krum: takes the one update that lies closest to its neighbours.

Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS, arXiv
1703.02757. Of K updates of which f may be anything, each scores the sum of the squared distances to its K - f - 2
nearest others; the lowest score wins. Proposition 4.2 needs 2 f + 2 < K. One client's update stands for all, so that
a round is as noisy as one client: ``multi_krum`` averages several, and a ``server.learning_rate`` of about 0.3 with as
many more rounds averages over rounds.

Shape suffixes: K updates of a round, M values of an update.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from privfed.rules import RULES
from privfed.rules.robust import Float64, Robust, neighbour_scores, too_few
from privfed.table import Table


class KrumConfig(Table):
    """Options.

    Attributes:
        byzantine: How many clients of a round may send anything (f); a round needs more than 2 f + 2 updates.
    """

    name: Literal["krum"] = "krum"
    byzantine: int = Field(default=1, ge=0)


@RULES.register("krum")
class Krum(Robust):
    """Picks an update."""

    config = KrumConfig

    def __init__(self, options: KrumConfig | None = None) -> None:
        super().__init__(options or KrumConfig())

    def refusal(self, updates: int) -> str | None:
        """Return why so many updates are too few."""
        f = self.options.byzantine
        return too_few(updates, 2 * f + 3, f"more than 2 f + 2 for byzantine = {f}")

    def combined(self, updates_KM: Float64) -> Float64:
        """Return the update with the lowest score; of equals the first."""
        best = int(neighbour_scores(updates_KM, self.options.byzantine).argmin())
        return np.array(updates_KM[best])
