"""Gradient-dot: the matched filter for one example's gradient in what a step released.

A step of gradient descent moves the parameters by minus the sum of gradients; an example that took part moved them
along its own. Against DP-SGD it is the likelihood-ratio test where the adversary knows the rest: the released sum is
then N(0, s^2) or N(clip, s^2) along the unit gradient, so AUC = Phi(1 / (z sqrt 2)) for noise multiplier z = s / clip
(Nasr et al. 2021, arXiv 2101.04535, section IV; the same score without that knowledge in Jagielski, Ullman and Oprea
2020, arXiv 2006.07709).
"""

from __future__ import annotations

import math

import numpy as np

from privfed.errors import ConfigError
from privfed_attacks.membership import Floats, attack


@attack("gradient_dot")
def gradient_dot(updates_RD: Floats, gradients_RQD: Floats, known_RD: Floats | None = None) -> Floats:
    """Return the mean over rounds of minus the update's component along the query's gradient.

    The adversary saw updates of one client, or their sum or mean, or successive global models, and can compute the
    gradient of the query at the parameters that each round started from (a white box). With ``known_RD`` it knows what
    everybody else's data, or the rest of the batch, moved.

    Args:
        updates_RD: New minus old parameters.
        gradients_RQD: Gradients of the queries' losses, clipped or not: only their direction is used.
        known_RD: To be taken off the updates.

    Raises:
        ConfigError: If the shapes do not fit.
    """
    check_rounds(updates_RD, gradients_RQD)
    residual_RD = updates_RD if known_RD is None else updates_RD - known_RD
    units_RQD = unit(gradients_RQD)
    return np.asarray(-np.einsum("rd,rqd->q", residual_RD, units_RQD) / len(updates_RD), dtype=np.float64)


def theoretical_auc(noise_multiplier: float) -> float:
    """Return the AUC of gradient-dot on one step of DP-SGD with everything else known, Phi(1 / (z sqrt 2))."""
    from scipy.special import ndtr

    return float(ndtr(1 / (noise_multiplier * math.sqrt(2))))


def unit(vectors: Floats) -> Floats:
    """Return the vectors scaled to length 1 along the last axis; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1.0), dtype=np.float64)


def check_rounds(updates_RD: Floats, gradients_RQD: Floats) -> None:
    """Raise ``ConfigError`` unless there is one gradient of each query for each update, of the same length."""
    rounds, length = updates_RD.shape
    if gradients_RQD.shape[0] != rounds or gradients_RQD.shape[2] != length:
        raise ConfigError(
            f"Expected gradients of {rounds} rounds and {length} values, as the updates have, got "
            f"{gradients_RQD.shape[0]} and {gradients_RQD.shape[2]}."
        )
