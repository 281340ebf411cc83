"""From the scores of canaries to a verdict: what the best attack proves about epsilon, beside the claim.

A fifth of the canaries choose the attack and its threshold, the others give the bound, so that neither choice uses up
confidence. (For a Gaussian the bound hardly depends on the threshold, so a fifth chooses as well as a half, and the
others count for more: at 5000 canaries and epsilon 8 an ideal mechanism gives 7.2 rather than 6.9.) What the bound then
assumes goes beside it.

Shape suffixes: M canaries, P of them in, N out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from privfed.errors import ConfigError
from privfed_attacks.roc import auc_interval, clopper_pearson, least_negatives, lower_band, roc, tpr_at_fpr
from privfed_attacks.sealed import Sealed, unseal
from privfed_audits.bounds import (
    GAUSSIAN,
    INDEPENDENT,
    Counts,
    clopper_pearson_epsilon,
    gdp_epsilon,
    mu_to_epsilon,
    thresholds_of,
)
from privfed_audits.claims import Claim, epsilon_of, tradeoff_of, with_noise
from privfed_audits.one_run import f_dp_epsilon, guess_extremes, ideal_scores, one_run_epsilon

Floats = NDArray[np.float64]
Bits = NDArray[np.bool_]
Bound = Literal["gdp", "noise_scale"]

SCALED = "The mechanism is the accounted one up to the size of its noise."
COINS = (
    "Each canary was in or out by a fair coin of its own, tossed by the operating system (of an experiment with "
    "reproducible noise: drawn from its seed, which no attack reads)."
)
ADDED = (
    "epsilon is for adding or removing one unit; under replace_one the claim is the weaker one, and is held to that."
)
RATES = (0.01, 0.1, 0.25)
CHOOSE = 5
"""One in so many canaries chooses."""
LARGEST = 200.0
_WIDEST, _STEPS, _IDEAL, _POINTS = 8.0, 6, 20, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The attack and threshold that some of the canaries chose, and what the others gave.

    Attributes:
        attack: Name of the attack.
        threshold: Scores from here on are called "in".
        counts: Of those that did not choose.
    """

    attack: str
    threshold: float
    counts: Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A lower confidence bound on epsilon, and the largest epsilon that the same counts leave.

    Attributes:
        bound: Which bound.
        low: Lower bound.
        high: Upper limit for this attack's threshold; other attacks may find more.
        assumptions: What both rest on.
    """

    bound: Bound
    low: float
    high: float
    assumptions: tuple[str, ...]


def verdict(
    scores: Mapping[str, Floats],
    truth: Sealed[Bits],
    claim: Claim,
    *,
    alpha: float = 0.05,
    seed: int = 0,
) -> dict[str, Any]:
    """Return one view's entry of an audit.

    Args:
        scores: By attack, one score a canary [M], higher for "in".
        truth: The coins.
        claim: What is promised to this view.
        alpha: 1 - confidence of the bound.
        seed: Of the split into halves and the bootstrap.

    Raises:
        ConfigError: If there are too few canaries on either side.
    """
    bits_M = unseal(truth)
    rng = np.random.default_rng(seed)
    chosen = choose(scores, bits_M, claim.bound_delta, alpha, rng)
    estimate = estimate_of(chosen.counts, claim, alpha)
    best_M = scores[chosen.attack]
    entry = {
        "attack": chosen.attack,
        "bound": estimate.bound,
        "empirical_epsilon": estimate.low,
        "interval": [estimate.low, estimate.high],
        "ceiling": None if claim.epsilon is None else ceiling(len(bits_M), claim.epsilon, claim.bound_delta, alpha),
        "accounted_epsilon": claim.epsilon,
        "delta": claim.bound_delta,
        "unit": claim.unit,
        "canaries": len(bits_M),
        "confidence": 1 - alpha,
        "contradicted": rejects(chosen.counts, claim, alpha),
        **curve(best_M, bits_M, claim, rng),
        "attacks": {name: round(roc(values, bits_M).auc, 4) for name, values in scores.items()},
        "bounds": other_bounds(chosen, best_M, bits_M, claim.bound_delta, alpha),
        "assumptions": [COINS, *estimate.assumptions, ADDED],
    }
    return finite(entry)


def choose(scores: Mapping[str, Floats], bits_M: Bits, delta: float, alpha: float, rng: np.random.Generator) -> Choice:
    """Return the attack and threshold with the best bound on a fifth of the canaries, and the counts of the others.

    Raises:
        ConfigError: With fewer than 4 canaries in, or out.
    """
    if min(int(bits_M.sum()), int((~bits_M).sum())) < 4:
        raise ConfigError("A bound needs at least 4 canaries that were in the training data and 4 that were not.")
    chooses = _some(bits_M, rng, CHOOSE)
    best: tuple[float, str, float] | None = None
    for name, values_M in scores.items():
        own, inside = values_M[chooses], bits_M[chooses]
        for threshold in thresholds_of(own, 32):
            found = gdp_epsilon(counted(own, inside, threshold), delta=delta, alpha=alpha).epsilon
            if best is None or found > best[0]:
                best = (found, name, threshold)
    if best is None:
        raise ConfigError("There is no attack to choose from.")
    _, name, threshold = best
    rest = ~chooses
    return Choice(attack=name, threshold=threshold, counts=counted(scores[name][rest], bits_M[rest], threshold))


def counted(scores_M: Floats, bits_M: Bits, threshold: float) -> Counts:
    """Return how often scores from ``threshold`` on are right and wrong."""
    called = scores_M >= threshold
    return Counts(
        true_positives=int((called & bits_M).sum()),
        positives=int(bits_M.sum()),
        false_positives=int((called & ~bits_M).sum()),
        negatives=int((~bits_M).sum()),
    )


def estimate_of(counts: Counts, claim: Claim, alpha: float) -> Estimate:
    """Return the bound for a claim's mechanism.

    ``gdp`` where it is a Gaussian one (or nothing is claimed); with Poisson sampling ``noise_scale``: of the accounted
    mechanism with s times its noise, all s are rejected whose exact trade-off curve lies below the confidence region of
    (fpr, fnr); the bound is the epsilon of the largest s that is left. For a Gaussian mechanism the two are the same.
    """
    fpr, fnr = counts.rates(alpha)
    fpr_low, fnr_low = lowest_rates(counts, alpha)
    if claim.gaussian:
        delta = claim.bound_delta
        low = mu_to_epsilon(max(0.0, float(ndtri(1 - fpr) - ndtri(fnr))), delta)
        high = mu_to_epsilon(max(0.0, float(ndtri(1 - fpr_low) - ndtri(fnr_low))), delta)
        return Estimate(bound="gdp", low=low, high=high, assumptions=(INDEPENDENT, GAUSSIAN))
    largest, at_most = noise_scale(claim, fpr, 1 - fnr), noise_scale(claim, fpr_low, 1 - fnr_low)
    return Estimate(bound="noise_scale", low=largest, high=max(largest, at_most), assumptions=(INDEPENDENT, SCALED))


def lowest_rates(counts: Counts, alpha: float) -> tuple[float, float]:
    """Return lower limits of (fpr, fnr), each at alpha / 2."""
    misses = counts.positives - counts.true_positives
    fpr = clopper_pearson(counts.false_positives, counts.negatives, 1 - alpha).low
    return fpr, clopper_pearson(misses, counts.positives, 1 - alpha).low


def rejects(counts: Counts, claim: Claim, alpha: float) -> bool:
    """Return whether counts contradict a claim: as :func:`estimate_of`, at the price of one accounting."""
    if claim.epsilon is None:
        return False
    if claim.gaussian:
        return contradicts(estimate_of(counts, claim, alpha), claim)
    fpr, fnr = counts.rates(alpha)
    return bool(tradeoff_of(claim.events).tpr(fpr) < 1 - fnr)


def noise_scale(claim: Claim, fpr: float, tpr: float) -> float:
    """Return the epsilon of the accounted mechanism with the most noise that still allows (fpr, tpr).

    Noise down to an eighth of the accounted is looked at; 200 stands for less.
    """

    def allows(scale: float) -> bool:
        return bool(tradeoff_of(with_noise(claim.events, scale)).tpr(fpr) >= tpr)

    if tpr <= fpr:
        return 0.0
    if allows(1.0):
        low, high = 0.0, math.log(_WIDEST)
        if allows(_WIDEST):
            return 0.0
    else:
        low, high = -math.log(_WIDEST), 0.0
        if not allows(1 / _WIDEST):
            return LARGEST
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if allows(math.exp(middle)) else (low, middle)
    return epsilon_of(with_noise(claim.events, math.exp(high)), claim.bound_delta)


def contradicts(estimate: Estimate, claim: Claim) -> bool:
    """Return whether a lower bound exceeds the claim."""
    return claim.epsilon is not None and estimate.low > claim.epsilon


def ceiling(canaries: int, epsilon: float, delta: float, alpha: float) -> float:
    """Return what the bound yields on average for an ideal Gaussian mechanism of exactly this epsilon."""
    found = []
    for trial in range(_IDEAL):
        rng = np.random.default_rng([trial, canaries])
        scores, bits = ideal_scores(canaries, epsilon, delta, rng)
        if 4 <= bits.sum() <= len(bits) - 4:
            chosen = choose({"ideal": scores}, bits, delta, alpha, rng)
            found.append(gdp_epsilon(chosen.counts, delta=delta, alpha=alpha).epsilon)
    return float(np.mean(found)) if found else 0.0


def curve(scores_M: Floats, bits_M: Bits, claim: Claim | None, rng: np.random.Generator) -> dict[str, Any]:
    """Return AUC, the true positive rate at a small false positive rate, the ROC, and the check of its band."""
    whole = roc(scores_M, bits_M)
    fpr, tpr = whole.log_points(_POINTS)
    intervals = [clopper_pearson(round(rate * whole.positives), whole.positives) for rate in tpr]
    area = auc_interval(scores_M, bits_M, rng, resamples=200)
    accounted = None if claim is None else claim.tradeoff()
    above = None
    if accounted is not None and min(whole.positives, whole.negatives) >= 8:
        above = int(lower_band(scores_M, bits_M).above(accounted).size)
    return {
        "auc": whole.auc,
        "auc_interval": [area.low, area.high],
        "tpr_at_fpr": _rate(scores_M, bits_M),
        "roc": {
            "fpr": [float(x) for x in fpr],
            "tpr": [float(x) for x in tpr],
            "low": [each.low for each in intervals],
            "high": [each.high for each in intervals],
        },
        "above_accounted": above,
    }


def other_bounds(chosen: Choice, scores_M: Floats, bits_M: Bits, delta: float, alpha: float) -> dict[str, float]:
    """Return what other bounds say of the same scores: without a Gaussian assumption, and without independence."""
    guesses = guess_extremes(scores_M, bits_M, max(1, len(bits_M) // 5))
    return {
        "clopper_pearson": clopper_pearson_epsilon(chosen.counts, delta=delta, alpha=alpha).epsilon,
        "gdp": gdp_epsilon(chosen.counts, delta=delta, alpha=alpha).epsilon,
        "one_run": one_run_epsilon(guesses, delta=delta, alpha=alpha).epsilon,
        "f_dp": f_dp_epsilon(guesses, delta=delta, alpha=alpha).epsilon,
    }


def _rate(scores_M: Floats, bits_M: Bits) -> dict[str, float]:
    """Return the true positive rate at the smallest false positive rate that there are enough canaries for.

    With too few for any, at one half, which then says little: its interval tells.
    """
    chooses = _some(bits_M, None, 2)
    mine, rest = (scores_M[chooses], bits_M[chooses]), (scores_M[~chooses], bits_M[~chooses])
    negatives = min(int((~mine[1]).sum()), int((~rest[1]).sum()))
    for fpr in RATES:
        if negatives >= least_negatives(fpr):
            found = tpr_at_fpr(*rest, fpr=fpr, calibration=mine).tpr
            return {"fpr": fpr, "tpr": found.value, "low": found.low, "high": found.high}
    threshold = float(np.median(mine[0][~mine[1]]))
    found = clopper_pearson(int((rest[0][rest[1]] > threshold).sum()), int(rest[1].sum()))
    return {"fpr": 0.5, "tpr": found.value, "low": found.low, "high": found.high}


def _some(bits_M: Bits, rng: np.random.Generator | None, one_in: int) -> Bits:
    """Return a mask of one in so many of the canaries that were in, and of those that were not."""
    chosen = np.zeros(len(bits_M), dtype=np.bool_)
    for rows in (np.flatnonzero(bits_M), np.flatnonzero(~bits_M)):
        order = rows if rng is None else rng.permutation(rows)
        chosen[order[::one_in]] = True
    return chosen


def finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry with infinities replaced by the largest epsilon that is told apart; JSON has none."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return LARGEST if value > 0 else 0.0
        if isinstance(value, Mapping):
            return {key: plain(each) for key, each in value.items()}
        return [plain(each) for each in value] if isinstance(value, list | tuple) else value

    return {key: plain(value) for key, value in entry.items()}
