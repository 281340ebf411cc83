"""Bounds on epsilon: published values, calibration on ideal mechanisms, and that they are not vacuous."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import ndtri
from scipy.stats import beta, binom

from privfed.errors import ConfigError
from privfed.privacy.accountant import epsilon
from privfed.types import PrivacyEvent
from privfed_audits.bounds import (
    Counts,
    clopper_pearson_epsilon,
    epsilon_to_mu,
    from_scores,
    gdp_epsilon,
    mu_to_epsilon,
)
from privfed_audits.one_run import (
    Guesses,
    best_provable,
    f_dp_epsilon,
    f_dp_rejects,
    guess_extremes,
    ideal_scores,
    one_run_epsilon,
    one_run_p_value,
)

DELTA = 1e-5
TRIALS, MOST_FAILURES = 200, 16  # 10 are to be expected at most; more than 16 has probability 0.02


def test_mu_and_epsilon_are_those_of_the_literature_and_of_our_accountant():
    assert mu_to_epsilon(1.0, DELTA) == pytest.approx(4.3772, rel=1e-4)
    found = [epsilon_to_mu(e, DELTA) for e in (1, 2, 4, 8)]
    np.testing.assert_allclose(found, [0.2681, 0.5016, 0.9249, 1.666], rtol=2e-4)
    for mu in (0.3, 1.0, 3.0):
        assert epsilon_to_mu(mu_to_epsilon(mu, DELTA), DELTA) == pytest.approx(mu, rel=1e-8)
        event = PrivacyEvent(unit="example", noise_multiplier=1 / mu, sampling_probability=1.0, steps=1)
        assert mu_to_epsilon(mu, DELTA) == pytest.approx(epsilon([event], DELTA, fine=True), rel=1e-3)
    assert mu_to_epsilon(0.0, DELTA) == 0
    assert mu_to_epsilon(1e-6, DELTA) == 0
    assert mu_to_epsilon(math.inf, DELTA) == math.inf


@pytest.mark.parametrize(
    ("canaries", "value"), [(100, 3.490), (1000, 5.782), (5000, 7.284), (10_000, 7.834), (100_000, 8.128)]
)
def test_the_largest_provable_epsilon_of_one_run(canaries, value):
    assert best_provable(canaries, delta=DELTA) == pytest.approx(value, rel=1e-4)
    exact = -math.log(0.05 ** (-1 / canaries) - 1)  # logit(0.05^(1/m))
    assert best_provable(canaries, delta=0.0) == pytest.approx(exact, rel=1e-4)


def hull(points):
    """Return the indices of the vertices of the upper hull of points (fn, tn), as jax_privacy reduces thresholds."""
    kept = list(range(len(points)))
    while len(kept) > 2:
        steps = np.diff(points[kept], axis=0)
        turns = steps[:-1, 1] * steps[1:, 0] - steps[1:, 1] * steps[:-1, 0]
        if (turns > 0).all():
            break
        kept = [k for k, keep in zip(kept, [True, *(turns > 0), True], strict=True) if keep]
    return kept


def deterministic_counts(shift, size=10_000):
    """Return [(guesses, right)] of jax_privacy's deterministic case: one-sided guesses at the hull's thresholds."""
    out = ndtri(np.linspace(0, 1, size, endpoint=False) + 1 / (2 * size))
    inside = out + shift
    thresholds = np.append(np.union1d(inside, out), np.inf)
    fn, tn = (np.searchsorted(np.sort(scores), thresholds) for scores in (inside, out))
    kept = hull(np.stack([fn, tn], axis=1))
    return [(2 * size - int(fn[k]) - int(tn[k]), size - int(fn[k])) for k in kept]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shift", "one_run", "f_dp"), [(1, 1.13346, 2.164749), (2, 2.311945, 4.7218075), (4, 4.395568, 9.133752)]
)
def test_the_deterministic_case_of_jax_privacy(shift, one_run, f_dp):
    delta, counts = 1e-6, deterministic_counts(shift)
    alpha = 0.05 / len(counts)
    each = [Guesses(canaries=20_000, guesses=n, correct=c) for n, c in counts if n and c / n > 0.5]
    best = max(one_run_epsilon(g, delta=delta, alpha=alpha).epsilon for g in each)
    assert best == pytest.approx(one_run, rel=1e-4)
    # the golden value divides the thresholds that reject from those that do not
    low, high = epsilon_to_mu(f_dp * (1 - 1e-4), delta), epsilon_to_mu(f_dp * (1 + 1e-4), delta)
    assert any(f_dp_rejects(g, low, alpha) for g in each)
    assert not any(f_dp_rejects(g, high, alpha) for g in each)


def test_the_p_value_is_the_sum_it_stands_for():
    for m, r, v, e, delta in [(100, 10, 9, 0.5, 1e-3), (50, 50, 30, 0.0, 1e-2), (20, 7, 1, 1.0, 1e-6)]:
        q = math.exp(e) / (1 + math.exp(e))
        tail = sum(binom.pmf(k, r, q) for k in range(v, r + 1))
        star = max(sum(binom.pmf(k, r, q) for k in range(v - i, v)) / i for i in range(1, v + 1))
        assert one_run_p_value(Guesses(canaries=m, guesses=r, correct=v), e, delta) == pytest.approx(
            min(1, tail + 2 * m * delta * star)
        )


def test_clopper_pearson_reads_both_directions_from_one_region():
    counts = Counts(true_positives=40, positives=100, false_positives=1, negatives=120)
    fpr, fnr = beta.ppf(0.975, 2, 119), beta.ppf(0.975, 61, 40)
    found = clopper_pearson_epsilon(counts, delta=DELTA)
    assert found.epsilon == pytest.approx(math.log((1 - fnr - DELTA) / fpr))
    mirrored = Counts(true_positives=119, positives=120, false_positives=60, negatives=100)
    assert clopper_pearson_epsilon(mirrored, delta=DELTA).epsilon == pytest.approx(found.epsilon)
    assert gdp_epsilon(counts, delta=DELTA).epsilon == pytest.approx(
        mu_to_epsilon(float(ndtri(1 - fpr) - ndtri(fnr)), DELTA)
    )
    nothing = Counts(true_positives=5, positives=100, false_positives=5, negatives=100)
    assert clopper_pearson_epsilon(nothing, delta=DELTA).epsilon == 0
    assert gdp_epsilon(nothing, delta=DELTA).epsilon == 0


def test_bounds_say_what_they_assume():
    counts = Counts(true_positives=90, positives=100, false_positives=1, negatives=100)
    guesses = Guesses(canaries=100, guesses=20, correct=19)
    assert not any("Gaussian" in a for a in clopper_pearson_epsilon(counts, delta=DELTA).assumptions)
    assert any("Gaussian" in a for a in gdp_epsilon(counts, delta=DELTA).assumptions)
    assert any("independent" in a for a in gdp_epsilon(counts, delta=DELTA).assumptions)
    assert not any("Gaussian" in a for a in one_run_epsilon(guesses, delta=DELTA).assumptions)
    assert any("Gaussian" in a for a in f_dp_epsilon(guesses, delta=DELTA).assumptions)
    assert any("fair coin" in a for a in f_dp_epsilon(guesses, delta=DELTA).assumptions)


def bounds_of(method, canaries, target, seed):
    """Return a bound from one ideal run; ``target`` is the mechanism's epsilon."""
    rng = np.random.default_rng([seed, canaries])
    scores, bits = ideal_scores(canaries, target, DELTA, rng)
    if method in ("one_run", "f_dp"):
        bound = one_run_epsilon if method == "one_run" else f_dp_epsilon
        return bound(guess_extremes(scores, bits, canaries // 5), delta=DELTA).epsilon
    name, strategy = method.split("/")
    return from_scores(
        scores[bits], scores[~bits], delta=DELTA, method=name, strategy=strategy, rng=rng, splits=5
    ).epsilon


ALL = [
    "one_run",
    "f_dp",
    "gdp/holdout",
    "gdp/bonferroni",
    "gdp/multisplit",
    "clopper_pearson/holdout",
    "clopper_pearson/bonferroni",
    "clopper_pearson/multisplit",
]


@pytest.mark.slow
@pytest.mark.parametrize("method", ALL)
def test_a_bound_exceeds_the_true_epsilon_in_few_of_200_ideal_runs(method):
    canaries, target = (200, 1.0) if method.endswith("multisplit") else (400, 1.0)
    failures = sum(bounds_of(method, canaries, target, seed) > target for seed in range(TRIALS))
    assert failures <= MOST_FAILURES
    # a mechanism four times as leaky as it claims is found out
    caught = sum(bounds_of(method, 2000, 16.0, seed) > 2.0 for seed in range(5))
    assert caught == 5


def test_a_coin_that_is_right_as_often_as_allowed_is_rejected_as_often_as_said():
    """Randomised response attains the one-run bound: right with probability q, independently."""
    rng = np.random.default_rng(4)
    q = math.exp(1.0) / (1 + math.exp(1.0))
    right = rng.binomial(300, q, TRIALS)
    found = [one_run_epsilon(Guesses(canaries=300, guesses=300, correct=int(v)), delta=0.0).epsilon for v in right]
    failures = sum(e > 1.0 for e in found)
    assert failures <= MOST_FAILURES
    assert failures >= 2  # and not far from 5%
    assert sum(e > 0.5 for e in found) > 150


@pytest.mark.parametrize(("method", "least"), [("one_run", 2.2), ("f_dp", 3.1), ("gdp/holdout", 5.3)])
def test_bounds_are_tight_enough_to_be_of_use(method, least):
    found = [bounds_of(method, 1000, 8.0, seed) for seed in range(20)]
    assert least <= np.mean(found) <= 8.0


def test_guesses_go_to_the_extremes():
    scores, bits = np.array([3.0, 2.0, 1.0, 0.0, -1.0]), np.array([True, True, False, True, False])
    assert guess_extremes(scores, bits, 3) == Guesses(canaries=5, guesses=3, correct=3)
    assert guess_extremes(scores, bits, 4) == Guesses(canaries=5, guesses=4, correct=3)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="1 <= guesses <= canaries"):
        Guesses(canaries=5, guesses=6, correct=1)
    with pytest.raises(ConfigError, match="between 1 and 3"):
        guess_extremes(np.zeros(3), np.zeros(3, dtype=bool), 4)
    with pytest.raises(ConfigError, match="with and without"):
        Counts(true_positives=0, positives=0, false_positives=0, negatives=3)
    with pytest.raises(ConfigError, match="hits"):
        Counts(true_positives=4, positives=3, false_positives=0, negatives=3)
    good = Guesses(canaries=5, guesses=5, correct=5)
    for bound in (one_run_epsilon, f_dp_epsilon):
        with pytest.raises(ConfigError, match="delta"):
            bound(good, delta=1.0)
        with pytest.raises(ConfigError, match="alpha"):
            bound(good, delta=0.1, alpha=0.0)
    scores = np.zeros(10)
    with pytest.raises(ConfigError, match="Unknown bound"):
        from_scores(scores, scores, delta=DELTA, method="none")
    with pytest.raises(ConfigError, match="Unknown strategy"):
        from_scores(scores, scores, delta=DELTA, strategy="none")
    with pytest.raises(ConfigError, match="give an rng"):
        from_scores(scores, scores, delta=DELTA, strategy="multisplit")
    with pytest.raises(ConfigError, match="at least 4"):
        from_scores(scores[:3], scores, delta=DELTA)
    with pytest.raises(ConfigError, match="at least 0"):
        epsilon_to_mu(-1.0, DELTA)
