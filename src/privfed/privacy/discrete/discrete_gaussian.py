"""The Renyi differential privacy of a sum of discrete Gaussians.

A sum of discrete Gaussians is not one. It is near one: tau, below, bounds the logarithm of the ratio of their
probabilities, and shrinks as exp(-pi^2 sigma^2) with the parameter of one share.

Source: Kairouz, Liu and Steinke 2021 (arXiv 2102.06387), Theorem 1 and Proposition 14 (its "ddgauss" bound).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError
from privfed.privacy.discrete.skellam import checked_orders

SMALLEST_SHARE_VARIANCE = 0.5


def tau(share_variance: float, shares: int) -> float:
    """Return 10 * sum over k = 1 .. shares - 1 of exp(-2 pi^2 sigma^2 k / (k + 1)).

    Args:
        share_variance: The parameter sigma^2 of one share, at least 1/2.
        shares: How many independent shares are summed.

    Raises:
        ConfigError: If the shares are too narrow for the bound, or there are none.
    """
    if shares < 1:
        raise ConfigError(f"Expected at least one share of noise, got {shares}.")
    if shares > 1 and not share_variance >= SMALLEST_SHARE_VARIANCE:
        raise ConfigError(
            f"A share of discrete Gaussian noise has variance {share_variance:g}, expected at least "
            f'{SMALLEST_SHARE_VARIANCE:g} for its sums to be accounted: raise the scale, or take noise = "skellam".'
        )
    k = np.arange(1, shares)
    return 10 * float(np.exp(-2 * math.pi**2 * share_variance * (k / (k + 1))).sum())


def discrete_gaussian_rdp(
    orders: Sequence[int] | NDArray[np.int64],
    share_variance: float,
    shares: int,
    length: int,
    l1: float,
    l2: float,
) -> NDArray[np.float64]:
    """Return a bound on the Renyi divergence of each order between a sum of discrete Gaussians and its shift.

    With s^2 = shares * share_variance, the smallest of alpha/2 (l2/s)^2 + tau M,
    alpha/2 ((l2/s)^2 + 2 tau l1/s + tau^2 M) and alpha/2 (l2/s + tau sqrt(M))^2.

    Args:
        orders: Integers above 1.
        share_variance: The parameter sigma^2 of one share, in steps squared; 0 gives infinity.
        shares: How many honest shares are in the sum.
        length: M, the number of coordinates.
        l1: Bound on the shift's L1 norm, in steps.
        l2: Bound on its L2 norm.

    Raises:
        ConfigError: As ``tau``; if an order is not an integer above 1 or another argument is negative.
    """
    alpha = checked_orders(orders)
    if not (share_variance >= 0 and l1 >= 0 and l2 >= 0 and length >= 0):
        raise ConfigError(f"Expected norms of at least 0, got {l1} and {l2}, and a variance, got {share_variance}.")
    if share_variance == 0:
        return np.full(alpha.shape, np.inf)
    excess, s = tau(share_variance, shares), math.sqrt(shares * share_variance)
    added = alpha / 2 * (l2 / s) ** 2 + excess * length
    mixed = alpha / 2 * ((l2 / s) ** 2 + 2 * excess * l1 / s + excess**2 * length)
    whole = alpha / 2 * (l2 / s + math.sqrt(length) * excess) ** 2
    smallest: NDArray[np.float64] = np.minimum(np.minimum(added, mixed), whole)
    return smallest
