"""One bit a client: was this client in the training, given scores of examples that are its own?

Kandpal et al. 2023, "User Inference Attacks on Large Language Models", arXiv 2310.09266: the mean over a user's
examples of a score of each.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError
from privfed_attacks.membership import Floats


def user_scores(
    scores_Q: Floats, owners_Q: NDArray[np.int64], *, combine: Literal["mean", "sum", "max"] = "mean"
) -> tuple[NDArray[np.int64], Floats]:
    """Return (owners, one score each) from the scores of their examples under any attack on examples.

    The adversary has some examples of each client, not necessarily those that were trained on.

    Args:
        scores_Q: Higher for "member".
        owners_Q: Whose example each query is.
        combine: ``"mean"``; ``"sum"``, which of log-likelihood ratios (``lira``, ``bavaria``) is again one; ``"max"``.

    Raises:
        ConfigError: If there is no score for each owner.
    """
    if len(scores_Q) != len(owners_Q):
        raise ConfigError(f"Expected an owner for each of {len(scores_Q)} scores, got {len(owners_Q)}.")
    owners, index_Q = np.unique(owners_Q, return_inverse=True)
    if combine == "max":
        best = np.full(len(owners), -np.inf)
        np.maximum.at(best, index_Q, scores_Q)
        return owners, best
    found = np.asarray(np.bincount(index_Q, weights=scores_Q, minlength=len(owners)), dtype=np.float64)
    if combine == "mean":
        found /= np.bincount(index_Q)
    return owners, found
