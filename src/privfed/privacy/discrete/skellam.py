"""The Renyi differential privacy of Skellam noise.

What is proven, and used: the bound below, for integer orders and integer shifts in any number of dimensions. What
is not used: a privacy-loss distribution. In one dimension it could be computed from the probabilities; in many, the
loss depends on how a shift spreads over the coordinates, and that the worst shift is a one-dimensional one is not
proven (for Skellam, unlike for the Gaussian, the noise is not rotationally symmetric). So the safe bound is Renyi's.

Source: Agarwal, Kairouz and Liu 2021 (arXiv 2110.04995), Theorem 3.5 and its multi-dimensional corollary, where
Sk(0, mu) has the *variance* mu: the difference of two Poisson variables of mean mu / 2. The same as ``_skellam_rdp`` of
google-research/federated, distributed_dp/accounting_utils.py, at a scale of 1. The tests compare the bound with
divergences computed from the probabilities themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError


def skellam_rdp(orders: Sequence[int] | NDArray[np.int64], mu: float, l1: float, l2: float) -> NDArray[np.float64]:
    """Return a bound on the Renyi divergence of each order between Skellam noise and the same noise shifted.

    alpha l2^2 / (2 mu) + min(((2 alpha - 1) l2^2 + 6 l1) / (4 mu^2), 3 l1 / (2 mu)), in either direction.

    Args:
        orders: Integers above 1.
        mu: *Variance* of the noise in each coordinate, in integer steps squared; 0 gives infinity.
        l1: Bound on the shift's L1 norm, in steps.
        l2: Bound on its L2 norm.

    Raises:
        ConfigError: If an order is not an integer above 1, or another argument is negative.
    """
    alpha = checked_orders(orders)
    if not (mu >= 0 and l1 >= 0 and l2 >= 0):
        raise ConfigError(f"Expected a variance and norms of at least 0, got {mu}, {l1} and {l2}.")
    if mu == 0:
        return np.full(alpha.shape, np.inf)
    gaussian = alpha * l2**2 / (2 * mu)
    first = ((2 * alpha - 1) * l2**2 + 6 * l1) / (4 * mu**2)
    second = 3 * l1 / (2 * mu)
    return gaussian + np.minimum(first, second)


def checked_orders(orders: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
    """Return ``orders`` as floats, each an integer above 1.

    Raises:
        ConfigError: If one is not.
    """
    alpha = np.asarray(orders, dtype=np.float64)
    if not ((alpha > 1) & (alpha == np.floor(alpha))).all():
        raise ConfigError(f"Expected Renyi orders that are integers above 1, got {list(orders)}.")
    return alpha
