"""Lower bounds on epsilon from many canaries in one run.

Every canary is in or out by a fair coin of its own; the auditor guesses some of the coins after looking. The bounds are
structural: even a perfect auditor of an ideal mechanism stays below the true epsilon (``best_provable``), and that gap
is no slack in the mechanism.

Shape suffixes: M canaries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from privfed.errors import ConfigError
from privfed_audits.bounds import GAUSSIAN, LARGEST_EPSILON, LowerBound, epsilon_to_mu, mu_to_epsilon

COINS = "Each canary was in or out by an independent fair coin, and guesses depend on the coins through the run alone."
ADD_REMOVE = "epsilon is for adding or removing one canary, and the run is private with respect to each of them."
NUMBER_FIXED = "The number of guesses was fixed before the coins were looked at."


@dataclass(frozen=True, slots=True, kw_only=True)
class Guesses:
    """How an auditor's guesses of coins came out.

    Attributes:
        canaries: m, how many coins were tossed.
        guesses: r, how many were guessed; the auditor abstained from the rest.
        correct: v, how many guesses were right.
    """

    canaries: int
    guesses: int
    correct: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.guesses <= self.canaries or self.guesses < 1:
            raise ConfigError(
                f"Expected 1 <= guesses <= canaries and at most as many right, got {self.correct} right of "
                f"{self.guesses} guesses on {self.canaries} canaries."
            )


def one_run_epsilon(found: Guesses, *, delta: float, alpha: float = 0.05) -> LowerBound:
    """Return the bound of Steinke, Nasr and Jagielski 2023 ("Privacy Auditing with One (1) Training Run", 2305.08846).

    Theorem 5.2: were the run (epsilon, delta)-DP, at least v right of r guesses would have probability at most
    beta + 2 m delta a*, with q = e^eps / (1 + e^eps), beta = Pr[Bin(r, q) >= v] and
    a* = max_i Pr[v > Bin(r, q) >= v - i] / i. The bound is the largest epsilon at which that is at most alpha.
    """
    _check(delta, alpha)

    def p_value(epsilon: float) -> float:
        return one_run_p_value(found, epsilon, delta)

    low = 0.0
    if p_value(low) > alpha:
        value = 0.0
    else:
        high = 1.0
        while high < LARGEST_EPSILON and p_value(high) <= alpha:
            high *= 2
        value = float(brentq(lambda e: p_value(e) - alpha, low, high, xtol=1e-10, rtol=1e-10))
    return LowerBound(
        epsilon=value,
        delta=delta,
        confidence=1 - alpha,
        method="one_run",
        assumptions=(COINS, ADD_REMOVE, NUMBER_FIXED),
        detail=f"{found.correct} right of {found.guesses} guesses on {found.canaries} canaries",
    )


def one_run_p_value(found: Guesses, epsilon: float, delta: float) -> float:
    """Return the largest probability of at least so many right guesses under (epsilon, delta)-DP."""
    r, v = found.guesses, found.correct
    q = 1 / (1 + math.exp(-epsilon))
    at_least = float(binom.sf(v - 1, r, q))
    if delta == 0 or v == 0:
        return min(1.0, at_least)
    steps = np.arange(1, v + 1)
    between = binom.sf(v - steps - 1, r, q) - at_least
    return min(1.0, at_least + 2 * found.canaries * delta * float(np.max(between / steps)))


def f_dp_epsilon(found: Guesses, *, delta: float, alpha: float = 0.05) -> LowerBound:
    """Return the bound of Mahloujifar, Melis and Chaudhuri 2024 ("Auditing f-DP in One Run", arXiv 2410.22235).

    The largest mu whose Gaussian trade-off curve is rejected, read at ``delta``.
    """
    _check(delta, alpha)
    if not f_dp_rejects(found, 1e-9, alpha):
        mu = 0.0
    else:
        high = 1.0
        while high < 64 and f_dp_rejects(found, high, alpha):
            high *= 2
        low = 1e-9
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if f_dp_rejects(found, middle, alpha) else (low, middle)
        mu = low
    return LowerBound(
        epsilon=mu_to_epsilon(mu, delta),
        delta=delta,
        confidence=1 - alpha,
        method="f_dp",
        assumptions=(COINS, ADD_REMOVE, NUMBER_FIXED, GAUSSIAN),
        detail=f"mu >= {mu:.4g}: {found.correct} right of {found.guesses} guesses on {found.canaries} canaries",
    )


def f_dp_rejects(found: Guesses, mu: float, alpha: float) -> bool:
    """Return whether so many right guesses contradict mu-GDP: the recursion over the number of right guesses."""
    m, n, c = found.canaries, found.guesses, found.correct
    if c == 0:
        return False
    right, wrong = alpha * c / m, alpha * (n - c) / m
    for i in range(c - 1, -1, -1):
        raised = max(wrong, float(ndtr(ndtri(min(right, 1.0)) - mu)))
        if raised == wrong:  # then nothing changes any more
            break
        right += i / (n - i) * (raised - wrong)
        wrong = raised
        if right + wrong > n / m:
            return True
    return right + wrong > n / m


def best_provable(canaries: int, *, delta: float, alpha: float = 0.05) -> float:
    """Return the largest epsilon that ``one_run_epsilon`` can give with so many canaries: all guessed, all right."""
    perfect = Guesses(canaries=canaries, guesses=canaries, correct=canaries)
    return one_run_epsilon(perfect, delta=delta, alpha=alpha).epsilon


def guess_extremes(scores_M: NDArray[np.float64], bits_M: NDArray[np.bool_], guesses: int) -> Guesses:
    """Guess "in" for the highest half of ``guesses`` scores and "out" for the lowest, and count.

    Args:
        scores_M: Of the canaries, higher for "in".
        bits_M: The coins.
        guesses: How many, fixed beforehand.

    Raises:
        ConfigError: If there are fewer canaries than guesses.
    """
    if not 1 <= guesses <= len(scores_M):
        raise ConfigError(f"Expected between 1 and {len(scores_M)} guesses, got {guesses}.")
    order = np.argsort(-scores_M, kind="stable")
    top, bottom = order[: (guesses + 1) // 2], order[len(order) - guesses // 2 :]
    right = int(bits_M[top].sum()) + int((~bits_M[bottom]).sum())
    return Guesses(canaries=len(scores_M), guesses=guesses, correct=right)


def ideal_scores(
    canaries: int, epsilon: float, delta: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return (scores, bits) of an ideal Gaussian mechanism of exactly (epsilon, delta), to calibrate bounds on."""
    bits = rng.random(canaries) < 0.5
    return epsilon_to_mu(epsilon, delta) * bits + rng.standard_normal(canaries), bits


def _check(delta: float, alpha: float) -> None:
    if not 0 <= delta < 1:
        raise ConfigError(f"Expected a delta in [0, 1), got {delta}.")
    if not 0 < alpha < 1:
        raise ConfigError(f"Expected an alpha between 0 and 1, got {alpha}.")
