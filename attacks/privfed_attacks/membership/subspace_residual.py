"""ProjRes: does the query's hidden state lie in the row space of the adapter's update?

Deng et al. 2026, "Toward Efficient Membership Inference Attacks against Federated Large Language Models: A Projection
Residual Approach", arXiv 2604.21197. The gradient of a linear layer is a sum of outer products with its inputs, so
the inputs of what was trained on lie in its row space while there are fewer of them than its rank.
"""

from __future__ import annotations

import numpy as np

from privfed.errors import ConfigError
from privfed_attacks.membership import Floats, attack

_RELATIVE = 1e-5


@attack("subspace_residual")
def subspace_residual(subspace_MH: Floats, inputs_QTH: Floats, *, rank: int | None = None) -> Floats:
    """Return minus the mean relative residual ||x - P x|| / ||x|| of the query's inputs.

    The adversary saw updates of one client, or sums, of a matrix whose input it can compute (the first trained layer
    of a public base): stacked rows of LoRA's A, or of the layer's weight. No reference model and no label is needed.

    Args:
        subspace_MH: Rows of the updates.
        inputs_QTH: Inputs of each query's tokens; rows of zeros after its end.
        rank: Dimensions of the subspace, largest singular values first; None: all above 1e-5 of the largest, which
            noise on the updates fills up.

    Raises:
        ConfigError: If the updates are all 0, or a query has no input.
    """
    _, values, rows = np.linalg.svd(np.asarray(subspace_MH, dtype=np.float64), full_matrices=False)
    if not values.size or values[0] == 0:
        raise ConfigError(
            "The updates of this matrix are all 0 (LoRA's A does not move in its first step): take a later round."
        )
    kept = int((values > _RELATIVE * values[0]).sum()) if rank is None else min(rank, len(values))
    basis_KH = rows[:kept]
    norms_QT = np.linalg.norm(inputs_QTH, axis=2)
    counts_Q = (norms_QT > 0).sum(axis=1)
    if (counts_Q == 0).any():
        raise ConfigError(f"Query {int(np.argmin(counts_Q))} has no input that is not 0.")
    inside_QT = np.linalg.norm(inputs_QTH @ basis_KH.T, axis=2)
    share_QT = np.clip(1 - np.square(inside_QT / np.where(norms_QT > 0, norms_QT, 1.0)), 0.0, 1.0)
    residual_QT = np.where(norms_QT > 0, np.sqrt(share_QT), 0.0)
    return np.asarray(-residual_QT.sum(axis=1) / counts_Q, dtype=np.float64)
