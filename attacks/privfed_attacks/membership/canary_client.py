"""Canary clients: clients that send a random direction, looked for in the model.

Andrew, Kairouz, Oh, Oprea, McMahan and Suriyakumar 2024, "One-shot Empirical Privacy Estimation for Federated
Learning", arXiv 2302.03098. In d dimensions the cosine of a random direction with anything that is independent of it is
near N(0, 1/d) (their Proposition 3.1), so no reference model is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from privfed.errors import ConfigError
from privfed_attacks.membership import Floats, attack
from privfed_attacks.membership.gradient_dot import unit


@attack("canary_client")
def canary_client(updates_RD: Floats, canaries_QD: Floats) -> Floats:
    """Return sqrt(d) times the cosine of each canary with the whole change of the model: N(0, 1) if it is unseen.

    The adversary controls clients that send their direction, scaled to the clip, instead of an update; it sees the
    model before and after (a release is enough).

    Args:
        updates_RD: Changes of the global model; they are added up.
        canaries_QD: The directions, sent or held back.

    Raises:
        ConfigError: If the model did not change.
    """
    total_D = updates_RD.sum(axis=0)
    if not np.any(total_D):
        raise ConfigError("The model did not change between what was seen of it: there is nothing to look at.")
    return np.asarray(math.sqrt(len(total_D)) * (unit(canaries_QD) @ unit(total_D)), dtype=np.float64)


@attack("canary_client_iterates")
def canary_client_iterates(updates_RD: Floats, canaries_QD: Floats) -> Floats:
    """Return the largest over rounds of the same score.

    For an adversary that sees the model after every round (the paper's section 4.2): of use where a canary takes part
    in few rounds.
    """
    scores_RQ = [canary_client(update_D[None], canaries_QD) for update_D in updates_RD if np.any(update_D)]
    if not scores_RQ:
        raise ConfigError("The model did not change in any round: there is nothing to look at.")
    return np.asarray(np.max(scores_RQ, axis=0), dtype=np.float64)


def random_directions(count: int, length: int, rng: np.random.Generator) -> Floats:
    """Return ``count`` independent directions, uniform on the unit sphere [count, length]."""
    return unit(rng.standard_normal((count, length)))


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryEstimate:
    """An estimate, with no confidence level: for a bound, hand the scores to an audit.

    Attributes:
        mean: Of the inserted canaries' scores, against 0 for unseen ones.
        deviation: Of the inserted canaries' scores, against 1.
        epsilon: Of telling N(mean, deviation^2) from N(0, 1) at ``delta``.
    """

    mean: float
    deviation: float
    delta: float
    epsilon: float


def estimate(inserted_scores_Q: Floats, delta: float) -> CanaryEstimate:
    """Return the paper's Algorithm 1's estimate from the scores of inserted canaries.

    Args:
        inserted_scores_Q: Of ``canary_client``, all of canaries that were sent.
        delta: Where to read epsilon.

    Raises:
        ConfigError: With fewer than two canaries.
    """
    if len(inserted_scores_Q) < 2:
        raise ConfigError("An estimate needs the scores of at least two canaries that were sent.")
    mean, deviation = float(np.mean(inserted_scores_Q)), float(np.std(inserted_scores_Q, ddof=1))
    found = max(_epsilon(mean, deviation, delta), _epsilon(-mean / deviation, 1 / deviation, delta))
    return CanaryEstimate(mean=mean, deviation=deviation, delta=delta, epsilon=found)


def _epsilon(mean: float, deviation: float, delta: float) -> float:
    """Return the epsilon at which N(mean, deviation^2) exceeds e^epsilon N(0, 1) by ``delta``, by bisection."""
    grid = np.linspace(-40, 40, 200_001)
    one = np.exp(-0.5 * np.square((grid - mean) / deviation)) / deviation
    zero = np.exp(-0.5 * np.square(grid))
    step = (grid[1] - grid[0]) / math.sqrt(2 * math.pi)

    def excess(epsilon: float) -> float:
        return float(np.maximum(one - math.exp(epsilon) * zero, 0).sum() * step)

    low, high = 0.0, 60.0
    if excess(low) <= delta:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > delta else (low, middle)
    return high
