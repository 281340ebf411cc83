"""Banded lower-triangular Toeplitz matrices C for correlated noise: their inverse, error and sensitivity.

C is given by its first column, c_0 .. c_{b-1}, over n rounds; c is non-negative and decreasing throughout. A mechanism
that adds C^-1 z to the rounds' contributions x releases C x + z up to an invertible map, so its privacy is that of a
Gaussian mechanism with the sensitivity of C, and running sums of its output are off by A C^-1 z, where A sums prefixes
(Denisov et al. 2022, arXiv 2202.08312; Choquette-Choo et al. 2023, arXiv 2306.08153).

Shape suffixes: B bands, N rounds.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError

Vector = NDArray[np.float64]

LONGEST_OPTIMISED = 2048
"""Coefficients are optimised for at most so many rounds; the optimum hardly moves beyond."""
_GRID = 2.0**-20


def square_root(bands: int) -> Vector:
    """Return the first ``bands`` coefficients of the square root of the prefix-sum matrix, scaled to norm 1 [B].

    They are binom(2i, i) / 4^i, the series of (1 - x)^-1/2 (Kalinin and Lampert 2024, arXiv 2405.13763).
    """
    steps_B = np.arange(1, bands, dtype=np.float64)
    return _normal(np.concatenate([[1.0], np.cumprod((2 * steps_B - 1) / (2 * steps_B))]))


@lru_cache(maxsize=64)
def optimised(bands: int, rounds: int, participations: int, separation: int) -> tuple[float, ...]:
    """Return the decreasing coefficients of norm 1 [B] that minimise error times sensitivity.

    A local search from the square root (L-BFGS over the logits of c_i / c_{i-1}), on the objective of arXiv
    2306.08153, restricted to Toeplitz matrices. The result is cut to a grid before it is scaled, so that the last
    bits of the search do not matter.
    """
    from scipy.optimize import minimize

    start_B = square_root(bands)
    if bands == 1:
        return (1.0,)
    length = min(rounds, LONGEST_OPTIMISED)

    def coefficients(logits_B: Vector) -> Vector:
        return np.concatenate([[1.0], np.cumprod(1 / (1 + np.exp(-logits_B)))])

    def objective(logits_B: Vector) -> float:
        c_B = coefficients(logits_B)
        most = min(participations, math.ceil(length / separation))
        return math.log(prefix_error(c_B, length) * sensitivity(c_B, length, most, separation))

    ratios_B = start_B[1:] / start_B[:-1]
    found = minimize(objective, np.log(ratios_B / (1 - ratios_B)), method="L-BFGS-B", bounds=[(-12, 12)] * (bands - 1))
    best_B = found.x if found.fun < objective(np.log(ratios_B / (1 - ratios_B))) else np.log(ratios_B / (1 - ratios_B))
    cut_B = np.floor(coefficients(best_B) / _GRID) * _GRID
    return tuple(float(value) for value in _normal(cut_B))


def inverse(c_B: Vector, rounds: int) -> Vector:
    """Return the first column of C^-1 [N]: the series of 1 / (c_0 + c_1 x + ...)."""
    from scipy.signal import lfilter

    impulse_N = np.zeros(rounds)
    impulse_N[0] = 1.0
    return np.asarray(lfilter([1.0], c_B, impulse_N), dtype=np.float64)


def prefix_error(c_B: Vector, rounds: int) -> float:
    """Return the root mean square error, over ``rounds`` running sums, for z of standard deviation 1.

    It is ||A C^-1||_F / sqrt(N); A C^-1 is Toeplitz with the running sums of ``inverse`` as its first column.
    """
    column_N = np.cumsum(inverse(c_B, rounds))
    return math.sqrt(float(np.sum(np.arange(rounds, 0, -1) * column_N**2)) / rounds)


def sensitivity(c_B: Vector, rounds: int, participations: int, separation: int) -> float:
    """Return the exact L2 sensitivity of C for a unit that takes part at most so often and so far apart.

    max ||sum_t C[:, t] u_t|| over all sets of at most k rounds t, any two at least ``separation`` apart, and all
    contributions u_t (vectors of any dimension) of norm at most 1. Two steps:

    * For a fixed set of rounds all contributions are best equal and of norm 1, since the columns of C are
      non-negative and so are all their inner products: ||sum C[:,t] u_t||^2 = sum_st <C_s, C_t> <u_s, u_t>.
    * The set is best 0, b, 2b, ...: <C_s, C_t> = sum_{i < N - t} c_i c_{i + t - s} for s <= t falls with the distance
      t - s, since c decreases, and with t, since terms are cut off; and the i-th and j-th round of any allowed set are
      at least i b from the start and (j - i) b apart. So this set's inner products are the largest, each of them
      (Kalinin and Lampert 2024, arXiv 2405.13763, on b-min-separated participation).

    Args:
        c_B: The coefficients.
        rounds: N.
        participations: k.
        separation: b; 1 where a unit may take part in every round.

    Raises:
        ConfigError: If the coefficients are not non-negative and decreasing, or a count is below 1.
    """
    if min(rounds, participations, separation) < 1:
        raise ConfigError(
            f"Expected at least one round, participation and round of separation, got {rounds}, {participations} and "
            f"{separation}."
        )
    check_decreasing(c_B)
    most = min(participations, math.ceil(rounds / separation))
    rows_KB = np.arange(most)[:, None] * separation + np.arange(len(c_B))[None, :]
    weights_KB = np.broadcast_to(c_B, rows_KB.shape)
    inside_KB = rows_KB < rounds
    sums_N = np.bincount(rows_KB[inside_KB], weights=weights_KB[inside_KB])
    return float(np.linalg.norm(sums_N))


def check_decreasing(c_B: Vector) -> None:
    """Raise ConfigError unless the coefficients are finite, non-negative, decreasing and start above 0."""
    sound = len(c_B) > 0 and np.isfinite(c_B).all() and c_B[0] > 0 and c_B.min() >= 0 and (np.diff(c_B) <= 0).all()
    if not sound:
        raise ConfigError(f"Expected non-negative, decreasing coefficients, got {list(c_B)[:8]}.")


def _normal(c_B: Vector) -> Vector:
    return c_B / np.linalg.norm(c_B)
