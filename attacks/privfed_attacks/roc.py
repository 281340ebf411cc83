"""From scores and membership bits to ROC curves with their uncertainty, beside what the accountant allows.

A number at a fixed false positive rate is read at a threshold that was frozen on other trials, and comes with an exact
interval; curves are for looking at. Shape suffixes: N trials, T points of a curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import beta

from privfed.errors import ConfigError
from privfed.privacy.accountant import Events, epsilon_curve, gaussian_mu

Floats = NDArray[np.float64]
Bits = NDArray[np.bool_]

DELTAS = tuple(float(d) for d in (*np.logspace(-12, -2, 41), *np.linspace(0.015, 0.995, 99)))
"""Where the accounted privacy profile is read for a trade-off curve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its interval at ``confidence``."""

    value: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Roc:
    """An empirical ROC: at threshold t, trials with a score of at least t are called members.

    Attributes:
        fpr_T: False positive rates, from 0 to 1.
        tpr_T: True positive rates.
        thresholds_T: Descending; the first is infinite.
        positives: Number of members.
        negatives: Number of non-members.
    """

    fpr_T: Floats = field(repr=False)
    tpr_T: Floats = field(repr=False)
    thresholds_T: Floats = field(repr=False)
    positives: int
    negatives: int

    @property
    def auc(self) -> float:
        """Area under the curve; ties count half."""
        return float(np.trapezoid(self.tpr_T, self.fpr_T))

    def log_points(self, most: int = 200) -> tuple[Floats, Floats]:
        """Return at most ``most`` points (fpr, tpr) for logarithmic axes: spread evenly in log, none at 0.

        What happens below one false positive is not in the data, so the curve starts at 1 / negatives.
        """
        grid = np.geomspace(1 / self.negatives, 1.0, most)
        at = np.searchsorted(self.fpr_T, grid, side="right") - 1
        return np.asarray(grid), self.tpr_T[at]


def roc(scores_N: Floats, members_N: Bits) -> Roc:
    """Return the ROC.

    Raises:
        ConfigError: If there are only members or only non-members, or scores and bits differ in number.
    """
    scores, members = _checked(scores_N, members_N)
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], members[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    positives = int(hits.sum())
    negatives = len(hits) - positives
    tpr = np.cumsum(hits)[last] / positives
    fpr = np.cumsum(~hits)[last] / negatives
    return Roc(
        fpr_T=np.concatenate([[0.0], fpr]),
        tpr_T=np.concatenate([[0.0], tpr]),
        thresholds_T=np.concatenate([[np.inf], ordered[last]]),
        positives=positives,
        negatives=negatives,
    )


def auc_interval(
    scores_N: Floats,
    members_N: Bits,
    rng: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    groups_N: NDArray[np.int64] | None = None,
) -> Interval:
    """Return the AUC with a percentile bootstrap interval.

    Args:
        scores_N: Higher for "member".
        members_N: The truth.
        rng: Draws the resamples.
        confidence: Of the interval.
        resamples: How many.
        groups_N: The run (trial) that each score comes from: whole runs are resampled first, then scores within, since
            scores of one run share its model. None: members and non-members are resampled apart.
    """
    scores, members = _checked(scores_N, members_N)
    ranks = _ranks(scores)
    value = _auc(scores[members], scores[~members])
    draws = []
    for _ in range(resamples):
        rows = _resample(members, groups_N, rng)
        inside = members[rows]
        if inside.any() and not inside.all():
            picked = ranks[rows]
            draws.append(_auc(picked[inside], picked[~inside]))
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(value=value, low=float(low), high=float(high), confidence=confidence)


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Return a rate with its exact two-sided interval (Clopper and Pearson 1934).

    Raises:
        ConfigError: Without trials, or with more successes than trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ConfigError(f"Expected between 0 and {trials} successes of at least one trial, got {successes}.")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(beta.ppf(1 - tail, successes + 1, trials - successes))
    return Interval(value=successes / trials, low=low, high=high, confidence=confidence)


def least_negatives(fpr: float) -> int:
    """Return how many non-members a true positive rate at ``fpr`` needs: 10^4 at 0.1%, 2000 at 1%, 20 / fpr above."""
    return max(2000, math.ceil(10 / fpr)) if fpr <= 0.01 else math.ceil(20 / fpr)


def freeze_threshold(scores_N: Floats, members_N: Bits, fpr: float) -> float:
    """Return the lowest threshold whose false positive rate on these trials is at most ``fpr``.

    Raises:
        ConfigError: With fewer non-members than ``least_negatives(fpr)``.
    """
    scores, members = _checked(scores_N, members_N)
    negatives = np.sort(scores[~members])[::-1]
    if len(negatives) < least_negatives(fpr):
        at = ", or report it at a false positive rate of 1%" if fpr < 0.01 else ""
        raise ConfigError(
            f"A true positive rate at a false positive rate of {fpr:g} needs {least_negatives(fpr)} non-members, got "
            f"{len(negatives)}: take more{at}."
        )
    allowed = math.floor(fpr * len(negatives) * (1 + 1e-12))
    return float(np.nextafter(negatives[allowed], np.inf))


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenRate:
    """Rates at a threshold that other trials chose.

    Attributes:
        wanted_fpr: What the threshold was chosen for.
        tpr: True positive rate, with its Clopper-Pearson interval.
        fpr: The false positive rate that it really has here, with its own.
    """

    wanted_fpr: float
    threshold: float
    tpr: Interval
    fpr: Interval


def tpr_at_fpr(
    scores_N: Floats,
    members_N: Bits,
    *,
    fpr: float,
    calibration: tuple[Floats, Bits],
    confidence: float = 0.95,
) -> FrozenRate:
    """Return the true positive rate at a threshold frozen on ``calibration`` for ``fpr``.

    Args:
        scores_N: Of the trials that count.
        members_N: Their truth.
        fpr: The false positive rate to aim at.
        calibration: (scores, members) of other trials.
        confidence: Of the intervals.

    Raises:
        ConfigError: With fewer non-members than ``least_negatives(fpr)``, in the calibration or here.
    """
    scores, members = _checked(scores_N, members_N)
    threshold = freeze_threshold(*calibration, fpr)
    if int((~members).sum()) < least_negatives(fpr):
        freeze_threshold(scores, members, fpr)  # says so
    called = scores >= threshold
    return FrozenRate(
        wanted_fpr=fpr,
        threshold=threshold,
        tpr=clopper_pearson(int(called[members].sum()), int(members.sum()), confidence),
        fpr=clopper_pearson(int(called[~members].sum()), int((~members).sum()), confidence),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounted:
    """The largest true positive rate that the accountant leaves, as a function of the false positive rate.

    Attributes:
        mu: The curve is that of N(0, 1) against N(mu, 1), exactly; else None and ``profile`` holds.
        profile: (epsilon, delta) pairs, each of which bounds the curve.
    """

    mu: float | None
    profile: tuple[tuple[float, float], ...] = field(repr=False)

    def tpr(self, fpr: Floats | float) -> Floats:
        """Return the bound at each false positive rate.

        From (epsilon, delta): tpr <= e^epsilon fpr + delta and 1 - fpr <= e^epsilon (1 - tpr) + delta (Wasserman and
        Zhou 2010; Kairouz, Oh and Viswanath 2015); the smallest over the profile.
        """
        x = np.asarray(fpr, dtype=np.float64)
        if self.mu is not None:
            return np.asarray(ndtr(ndtri(x) + self.mu), dtype=np.float64)
        best = np.ones_like(x)
        for epsilon, delta in self.profile:
            if epsilon < 700:
                best = np.minimum(best, math.exp(epsilon) * x + delta)
                best = np.minimum(best, 1 - math.exp(-epsilon) * np.maximum(0.0, 1 - delta - x))
        return best


def accounted(events: Events, deltas: Sequence[float] = DELTAS) -> Accounted:
    """Return the f-DP curve of privacy events: exact for Gaussians without sampling, else an envelope of PLD's profile.

    The envelope lies on or above the true curve, so a ROC above it contradicts the accounting.

    Args:
        events: What the ledger says happened.
        deltas: Where to read the profile.
    """
    mu = gaussian_mu(events)
    if mu is not None and mu.exact:
        return Accounted(mu=mu.mu, profile=())
    pairs = [(epsilon, delta) for delta, epsilon in epsilon_curve(events, deltas) if math.isfinite(epsilon)]
    return Accounted(mu=None, profile=tuple(pairs))


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Simultaneous lower bounds on a ROC: with ``confidence``, all points at once.

    Attributes:
        fpr_T: Upper confidence limits of the false positive rates.
        tpr_T: Lower confidence limits of the true positive rates.
    """

    fpr_T: Floats = field(repr=False)
    tpr_T: Floats = field(repr=False)
    confidence: float

    def above(self, curve: Accounted) -> NDArray[np.int64]:
        """Return the points that lie above what is accounted: each contradicts the claim at ``confidence``."""
        return np.flatnonzero(self.tpr_T > curve.tpr(self.fpr_T) + 1e-12)


def lower_band(
    scores_N: Floats,
    members_N: Bits,
    *,
    calibration: tuple[Floats, Bits] | None = None,
    confidence: float = 0.95,
    points: int = 20,
) -> Band:
    """Return a lower band by Clopper-Pearson at ``points`` thresholds, Bonferroni-corrected over them and both rates.

    Exact where trials are independent and the thresholds do not depend on them.

    Args:
        scores_N: Of the trials that count.
        members_N: Their truth.
        calibration: (scores, members) of other trials, whose quantiles are the thresholds. None: every second trial of
            each kind.
        confidence: Of the whole band.
        points: Thresholds, at quantiles of all scores spread evenly in log from both ends.
    """
    scores, members = _checked(scores_N, members_N)
    if calibration is None:
        chosen = _every_second(members)
        calibration, scores, members = (scores[chosen], members[chosen]), scores[~chosen], members[~chosen]
    pool = np.sort(_checked(*calibration)[0])
    half = np.geomspace(1 / len(pool), 0.5, points // 2 + 1)
    thresholds = np.unique(np.quantile(pool, np.concatenate([half, 1 - half])))
    called_TN = scores[None, :] >= thresholds[:, None]
    tail = (1 - confidence) / (2 * len(thresholds))
    hits_T = called_TN[:, members].sum(axis=1)
    false_T = called_TN[:, ~members].sum(axis=1)
    positives, negatives = int(members.sum()), int((~members).sum())
    with np.errstate(invalid="ignore"):
        low_T = np.where(hits_T > 0, beta.ppf(tail, hits_T, positives - hits_T + 1), 0.0)
        high_T = np.where(false_T < negatives, beta.ppf(1 - tail, false_T + 1, negatives - false_T), 1.0)
    return Band(fpr_T=high_T, tpr_T=low_T, confidence=confidence)


def _every_second(members: Bits) -> Bits:
    """Return a mask of every second member and every second non-member."""
    chosen = np.zeros(len(members), dtype=np.bool_)
    for rows in (np.flatnonzero(members), np.flatnonzero(~members)):
        chosen[rows[::2]] = True
    return chosen


def _resample(members: Bits, groups: NDArray[np.int64] | None, rng: np.random.Generator) -> NDArray[np.int64]:
    if groups is None:
        parts = [np.flatnonzero(members), np.flatnonzero(~members)]
    else:
        names = np.unique(groups)
        parts = [np.flatnonzero(groups == name) for name in rng.choice(names, len(names))]
    return np.concatenate([rng.choice(part, len(part)) for part in parts])


def _ranks(scores: Floats) -> Floats:
    return np.unique(scores, return_inverse=True)[1].astype(np.float64)


def _auc(inside: Floats, outside: Floats) -> float:
    """Return Pr[inside > outside] + Pr[equal] / 2 (Mann-Whitney)."""
    ordered = np.sort(outside)
    below = np.searchsorted(ordered, inside, side="left") + np.searchsorted(ordered, inside, side="right")
    return float(below.mean() / (2 * len(ordered)))


def _checked(scores_N: Floats, members_N: Bits) -> tuple[Floats, Bits]:
    scores, members = np.asarray(scores_N, dtype=np.float64), np.asarray(members_N, dtype=np.bool_)
    if scores.shape != members.shape or scores.ndim != 1:
        raise ConfigError(f"Expected one membership bit a score, got {members.shape} for {scores.shape}.")
    if np.isnan(scores).any():
        raise ConfigError("Some scores are not numbers.")
    if members.all() or not members.any():
        raise ConfigError("A ROC needs members and non-members, and got only one kind.")
    return scores, members
