"""Lower bounds on epsilon from an attack's hits and misses over many independent trials.

Each bound says what it assumes; a bound is only as good as its assumptions, and they go beside the figure. Trials are
independent runs of the mechanism, or, with the assumption stated, canaries of one run.

Shape suffixes: P trials with the canary, N without it, T thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import beta

from privfed.errors import ConfigError

Floats = NDArray[np.float64]
Strategy = Literal["holdout", "bonferroni", "multisplit"]

INDEPENDENT = (
    "The trials are independent given the membership bits: runs of their own, or canaries that do not interact."
)
GAUSSIAN = "The mechanism's trade-off curve lies on or above that of a Gaussian mechanism with the same mu."
LARGEST_EPSILON = 200.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LowerBound:
    """A lower confidence bound on epsilon.

    Attributes:
        epsilon: With ``confidence``, the mechanism is not (epsilon', delta)-DP for any epsilon' below this.
        delta: The delta that it is stated at.
        confidence: 1 - alpha.
        method: Which bound.
        assumptions: What has to hold for it; empty would mean nothing but the counts.
        detail: What it was read from.
    """

    epsilon: float
    delta: float
    confidence: float
    method: str
    assumptions: tuple[str, ...]
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a threshold test got on trials that did not choose it.

    Attributes:
        true_positives: Trials with the canary that were called so.
        positives: Trials with the canary.
        false_positives: Trials without it that were called so.
        negatives: Trials without it.
    """

    true_positives: int
    positives: int
    false_positives: int
    negatives: int

    def __post_init__(self) -> None:
        if self.positives < 1 or self.negatives < 1:
            raise ConfigError("A bound needs trials with and without the canary.")
        if not (0 <= self.true_positives <= self.positives and 0 <= self.false_positives <= self.negatives):
            raise ConfigError(f"Expected hits between 0 and the number of trials, got {self}.")

    def rates(self, alpha: float) -> tuple[float, float]:
        """Return upper limits of (fpr, fnr), each at alpha / 2 (Clopper and Pearson 1934): jointly at 1 - alpha."""
        misses = self.positives - self.true_positives
        return _upper(self.false_positives, self.negatives, alpha / 2), _upper(misses, self.positives, alpha / 2)


def clopper_pearson_epsilon(counts: Counts, *, delta: float, alpha: float = 0.05) -> LowerBound:
    """Return log((1 - fnr - delta) / fpr) and its mirror image log((1 - fpr - delta) / fnr) at the upper limits.

    Both directions are read off one joint confidence region of (fpr, fnr), so neither needs a correction of its own
    (Jagielski, Ullman and Oprea 2020, arXiv 2006.07709; Nasr et al. 2021, arXiv 2101.04535).
    """
    _check(delta, alpha)
    fpr, fnr = counts.rates(alpha)
    found = max(0.0, _log_ratio(1 - fnr - delta, fpr), _log_ratio(1 - fpr - delta, fnr))
    return LowerBound(
        epsilon=found,
        delta=delta,
        confidence=1 - alpha,
        method="clopper_pearson",
        assumptions=(INDEPENDENT,),
        detail=f"fpr <= {fpr:.4g}, fnr <= {fnr:.4g}",
    )


def gdp_epsilon(counts: Counts, *, delta: float, alpha: float = 0.05) -> LowerBound:
    """Return the epsilon of the smallest mu that (fpr, fnr) leaves (Nasr et al. 2023, arXiv 2302.07956, section 3)."""
    _check(delta, alpha)
    fpr, fnr = counts.rates(alpha)
    mu = max(0.0, float(ndtri(1 - fpr) - ndtri(fnr)))
    return LowerBound(
        epsilon=mu_to_epsilon(mu, delta),
        delta=delta,
        confidence=1 - alpha,
        method="gdp",
        assumptions=(INDEPENDENT, GAUSSIAN),
        detail=f"mu >= {mu:.4g}",
    )


METHODS: dict[str, Callable[..., LowerBound]] = {
    "clopper_pearson": clopper_pearson_epsilon,
    "gdp": gdp_epsilon,
}


def from_scores(
    with_P: Floats,
    without_N: Floats,
    *,
    delta: float,
    method: str = "gdp",
    alpha: float = 0.05,
    strategy: Strategy = "holdout",
    splits: int = 9,
    thresholds: int = 32,
    rng: np.random.Generator | None = None,
) -> LowerBound:
    """Return a bound from scores, with a threshold whose choice does not use up the confidence unseen.

    ``holdout``: half of the trials choose the threshold of the best bound, the other half gives the bound.
    ``bonferroni``: ``thresholds`` quantiles of all scores, fixed beforehand by rank among *both* kinds together, each
    at alpha / thresholds; the best counts. ``multisplit``: ``splits`` random holdouts, each at alpha / 2, and the lower
    median of their bounds: were the true epsilon below it, at least half of the splits would be wrong at once, which
    by Markov's inequality has probability at most 2 (alpha / 2) (Meinshausen et al. 2009, arXiv 0811.2177).

    Args:
        with_P: Scores of trials with the canary, higher for "there".
        without_N: Scores of trials without it.
        delta: Where to state epsilon.
        method: ``clopper_pearson`` or ``gdp``.
        alpha: 1 - confidence.
        strategy: As above.
        splits: For ``multisplit``.
        thresholds: How many are tried, at quantiles.
        rng: Shuffles trials; needed for ``multisplit``. None: every second trial is held out.

    Raises:
        ConfigError: If there are fewer than 4 trials of a kind, or a name is unknown.
    """
    _check(delta, alpha)
    if method not in METHODS:
        raise ConfigError(f"Unknown bound {method!r}: expected one of {', '.join(sorted(METHODS))}.")
    if min(len(with_P), len(without_N)) < 4:
        raise ConfigError("A threshold and a bound need at least 4 trials with and 4 without the canary.")
    bound = METHODS[method]
    if strategy == "holdout":
        return _holdout(with_P, without_N, bound, delta, alpha, thresholds, rng)
    if strategy == "bonferroni":
        grid = thresholds_of(np.concatenate([with_P, without_N]), thresholds)
        found = [bound(_counted(with_P, without_N, t), delta=delta, alpha=alpha / len(grid)) for t in grid]
        best = max(found, key=lambda each: each.epsilon)
        return _renamed(best, alpha, f"{len(grid)} thresholds by Bonferroni; {best.detail}", RANKED)
    if strategy == "multisplit":
        if rng is None:
            raise ConfigError("The strategy 'multisplit' draws its splits: give an rng.")
        each = [_holdout(with_P, without_N, bound, delta, alpha / 2, thresholds, rng) for _ in range(splits)]
        middle = sorted(each, key=lambda one: one.epsilon)[(splits - 1) // 2]
        return _renamed(middle, alpha, f"lower median of {splits} splits; {middle.detail}")
    raise ConfigError(f"Unknown strategy {strategy!r}: expected holdout, bonferroni or multisplit.")


RANKED = (
    "Thresholds at ranks of the pooled scores behave like fixed ones (they are chosen without the membership bits)."
)


def mu_to_epsilon(mu: float, delta: float) -> float:
    """Return the epsilon of mu-GDP: delta = Phi(-e/mu + mu/2) - e^e Phi(-e/mu - mu/2) (Dong et al. 2022)."""
    if mu <= 0:
        return 0.0
    if mu == math.inf:
        return math.inf
    if gdp_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gdp_delta(mu, high) > delta:
        high *= 2
    return float(brentq(lambda e: gdp_delta(mu, e) - delta, 0.0, high, xtol=1e-12, rtol=1e-12))


def epsilon_to_mu(epsilon: float, delta: float) -> float:
    """Return the mu at which mu-GDP has ``epsilon`` at ``delta``."""
    if epsilon < 0:
        raise ConfigError(f"Expected an epsilon of at least 0, got {epsilon}.")
    high = 1.0
    while gdp_delta(high, epsilon) < delta:
        high *= 2
    return float(brentq(lambda mu: gdp_delta(mu, epsilon) - delta, 1e-12, high, xtol=1e-13, rtol=1e-12))


def gdp_delta(mu: float, epsilon: float) -> float:
    """Return the delta of mu-GDP at ``epsilon``, free of overflow."""
    from scipy.special import log_ndtr

    second = epsilon + float(log_ndtr(-epsilon / mu - mu / 2))
    return float(ndtr(-epsilon / mu + mu / 2)) - math.exp(second)


def _holdout(
    with_P: Floats,
    without_N: Floats,
    bound: Callable[..., LowerBound],
    delta: float,
    alpha: float,
    thresholds: int,
    rng: np.random.Generator | None,
) -> LowerBound:
    choose_P, count_P = _halves(with_P, rng)
    choose_N, count_N = _halves(without_N, rng)
    grid = thresholds_of(np.concatenate([choose_P, choose_N]), thresholds)
    chosen = max(grid, key=lambda t: bound(_counted(choose_P, choose_N, t), delta=delta, alpha=alpha).epsilon)
    found = bound(_counted(count_P, count_N, chosen), delta=delta, alpha=alpha)
    return _renamed(found, alpha, f"threshold {chosen:.4g} from held-out trials; {found.detail}")


def _halves(scores: Floats, rng: np.random.Generator | None) -> tuple[Floats, Floats]:
    order = np.arange(len(scores)) if rng is None else rng.permutation(len(scores))
    return scores[order[::2]], scores[order[1::2]]


def thresholds_of(scores: Floats, count: int) -> Sequence[float]:
    """Return at most ``count`` thresholds at quantiles of the scores, denser towards both ends."""
    half = np.geomspace(1 / len(scores), 0.5, count // 2 + 1)[: count // 2]
    wanted = np.unique(np.concatenate([half, 1 - half]))
    return [float(t) for t in np.unique(np.quantile(scores, wanted))]


def _counted(with_P: Floats, without_N: Floats, threshold: float) -> Counts:
    return Counts(
        true_positives=int((with_P >= threshold).sum()),
        positives=len(with_P),
        false_positives=int((without_N >= threshold).sum()),
        negatives=len(without_N),
    )


def _renamed(found: LowerBound, alpha: float, detail: str, *more: str) -> LowerBound:
    from dataclasses import replace

    return replace(found, confidence=1 - alpha, detail=detail, assumptions=(*found.assumptions, *more))


def _upper(successes: int, trials: int, alpha: float) -> float:
    return 1.0 if successes >= trials else float(beta.ppf(1 - alpha, successes + 1, trials - successes))


def _log_ratio(above: float, below: float) -> float:
    if above <= 0:
        return 0.0
    return math.inf if below <= 0 else math.log(above / below)


def _check(delta: float, alpha: float) -> None:
    if not 0 <= delta < 1:
        raise ConfigError(f"Expected a delta in [0, 1), got {delta}.")
    if not 0 < alpha < 1:
        raise ConfigError(f"Expected an alpha between 0 and 1, got {alpha}.")
