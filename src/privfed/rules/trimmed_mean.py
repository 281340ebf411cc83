"""Trimmed mean: of every coordinate the average without its largest and smallest values.

Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML, arXiv 1803.01498,
Definition 2: of K values the b K largest and the b K smallest (rounded up) are left out. What stays lies between values
of honest clients as long as at most b K updates are wrong, since each cut removes as many.

Shape suffixes: K updates of a round, M values of an update.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import Field

from privfed.rules import RULES
from privfed.rules.robust import Float64, Robust, too_few
from privfed.table import Table


class TrimmedMeanConfig(Table):
    """Options.

    Attributes:
        trim_share: The share of the updates that is cut from each end, rounded up to whole updates.
    """

    name: Literal["trimmed_mean"] = "trimmed_mean"
    trim_share: float = Field(default=0.2, ge=0, lt=0.5)


@RULES.register("trimmed_mean")
class TrimmedMean(Robust):
    """Averages each coordinate's middle."""

    config = TrimmedMeanConfig
    coordinatewise = True

    def __init__(self, options: TrimmedMeanConfig | None = None) -> None:
        super().__init__(options or TrimmedMeanConfig())

    def refusal(self, updates: int) -> str | None:
        """Return why so many updates are too few."""
        cut = self._cut(updates)
        return too_few(updates, 2 * cut + 1, f"trim_share = {self.options.trim_share:g} cuts {cut} from each end")

    def combined(self, updates_KM: Float64) -> Float64:
        """Return the average of what the cuts leave of each coordinate."""
        count, cut = len(updates_KM), self._cut(len(updates_KM))
        ordered_KM = np.partition(updates_KM, (cut, count - cut - 1), axis=0)
        return np.asarray(ordered_KM[cut : count - cut].mean(axis=0))

    def _cut(self, updates: int) -> int:
        # the slack keeps 0.07 * 100 = 7.000000000000001 from being 8
        share: float = self.options.trim_share
        return math.ceil(share * updates - 1e-9)
