"""Multi-Krum: averages the updates that lie closest to their neighbours.

Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS, arXiv
1703.02757, section 5: the average of the m updates with the lowest scores of Krum. Of K updates of which f may be
anything, m <= K - f - 2 is what El-Mhamdi et al. 2018 (arXiv 1802.07927) prove resilient.

Shape suffixes: K updates of a round, M values of an update.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from privfed.rules import RULES
from privfed.rules.robust import Float64, Robust, mean_of, neighbour_scores, too_few
from privfed.table import Table


class MultiKrumConfig(Table):
    """Options.

    Attributes:
        byzantine: How many clients of a round may send anything (f); a round needs more than 2 f + 2 updates.
        selected: How many updates are averaged (m); unset: all but f + 2.
    """

    name: Literal["multi_krum"] = "multi_krum"
    byzantine: int = Field(default=1, ge=0)
    selected: int | None = Field(default=None, ge=1)


@RULES.register("multi_krum")
class MultiKrum(Robust):
    """Averages some updates."""

    config = MultiKrumConfig

    def __init__(self, options: MultiKrumConfig | None = None) -> None:
        super().__init__(options or MultiKrumConfig())

    def refusal(self, updates: int) -> str | None:
        """Return why so many updates are too few."""
        f, m = self.options.byzantine, self.options.selected or 1
        why = f"more than 2 f + 2, and m + f + 2, for byzantine = {f} and selected = {m}"
        return too_few(updates, max(2 * f + 3, m + f + 2), why)

    def combined(self, updates_KM: Float64) -> Float64:
        """Return the average of the updates with the lowest scores; of equals the first."""
        f = self.options.byzantine
        count = self.options.selected or len(updates_KM) - f - 2
        return mean_of(updates_KM, np.argsort(neighbour_scores(updates_KM, f), kind="stable")[:count])
