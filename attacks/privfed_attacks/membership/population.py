"""Attack-P: a threshold from the attacked model's losses on examples that are known not to be members.

Ye, Maddi, Murakonda, Bindschaedler and Shokri 2022, "Enhanced Membership Inference Attacks against Machine Learning
Models", arXiv 2111.09679, Attack P. On one model and without classes it orders queries as the loss does; its gain is a
threshold that holds for this model, and one for each class.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privfed_attacks.membership import Floats, attack


@attack("population")
def population(
    losses_Q: Floats,
    population_losses_Z: Floats,
    labels_Q: NDArray[np.int64] | None = None,
    population_labels_Z: NDArray[np.int64] | None = None,
) -> Floats:
    """Return one minus the query's p-value: the share of the population (of its class) with a larger loss.

    The adversary can run the released model, and has data of the same distribution that is not in the training set.
    """
    if labels_Q is None or population_labels_Z is None:
        return _shares(losses_Q, population_losses_Z)
    scores_Q = np.empty(len(losses_Q))
    for label in np.unique(labels_Q):
        mine = labels_Q == label
        same = population_losses_Z[population_labels_Z == label]
        scores_Q[mine] = _shares(losses_Q[mine], same if len(same) else population_losses_Z)
    return scores_Q


def _shares(losses_Q: Floats, population_Z: Floats) -> Floats:
    """Return (how many are larger + a share of one for the loss itself, which orders ties) / (Z + 1)."""
    larger = len(population_Z) - np.searchsorted(np.sort(population_Z), losses_Q, side="right")
    found: Floats = (larger + np.exp(-losses_Q)) / (len(population_Z) + 1)
    return found
