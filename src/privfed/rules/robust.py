"""What robust rules share: they combine single updates so that a few wrong ones cannot move the result far.

They are not sums, so they go with neither masking nor noise that was scaled for a sum; noise that a client added to
its own update (example level) stays, and what the server computes from such updates is post-processing. Every client
counts once: a weight that a client claims would be the cheapest attack. An update that is not finite is left out
before a rule sees it.

Shape suffixes: K updates of a round, M values of an update.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from privfed.rules import Rule

Float64 = NDArray[np.float64]


class Robust(Rule):
    """A rule on single updates of equal weight."""

    needs_individual = True
    combines = True


def too_few(updates: int, needed: int, why: str) -> str | None:
    """Return the clause that refuses fewer than ``needed`` updates, or None."""
    return None if updates >= needed else f"it needs at least {needed} updates ({why}); {_REMEDY}"


_REMEDY = 'raise server.cohort_size, change the rule\'s options, or use aggregation = "fedavg"'


def neighbour_scores(updates_KM: Float64, byzantine: int) -> Float64:
    """Return Krum's score of each update [K]: the squared distances to its K - f - 2 nearest others, added up.

    Blanchard et al. 2017, section 4. Distances are taken pair by pair and not from inner products, which would lose
    the digits in which honest updates differ.
    """
    from scipy.spatial.distance import pdist, squareform

    count = len(updates_KM)
    distances_KK = squareform(pdist(updates_KM, "sqeuclidean"))
    np.fill_diagonal(distances_KK, np.inf)
    nearest_KN = np.sort(distances_KK, axis=1)[:, : count - byzantine - 2]
    return np.asarray(nearest_KN.sum(axis=1))


def mean_of(updates_KM: Float64, chosen: Sequence[int] | NDArray[np.intp]) -> Float64:
    """Return the average [M] of the chosen updates."""
    return np.asarray(updates_KM[np.asarray(chosen, dtype=np.intp)].mean(axis=0))
