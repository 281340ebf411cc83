"""Median: of every coordinate the median of the clients' values.

Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML, arXiv 1803.01498,
Definition 1. Each value lies between values of honest clients as long as fewer than half of the updates are wrong.

Shape suffixes: K updates of a round, M values of an update.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from privfed.rules import RULES
from privfed.rules.robust import Float64, Robust
from privfed.table import Table


class MedianConfig(Table):
    """No options."""

    name: Literal["median"] = "median"


@RULES.register("median")
class Median(Robust):
    """Takes each coordinate's median."""

    config = MedianConfig
    coordinatewise = True

    def combined(self, updates_KM: Float64) -> Float64:
        """Return the medians; of an even number of values the average of the two in the middle."""
        return np.asarray(np.median(updates_KM, axis=0))
