"""ROC utilities against closed forms, simulated coverage, and accounted curves of real mechanisms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import ndtr, ndtri
from sklearn.metrics import roc_auc_score, roc_curve

from privfed.errors import ConfigError
from privfed.privacy.accountant import delta_for
from privfed.types import PrivacyEvent
from privfed_attacks.roc import (
    accounted,
    auc_interval,
    clopper_pearson,
    freeze_threshold,
    least_negatives,
    lower_band,
    roc,
    tpr_at_fpr,
)


def trials(rng, mu, each):
    members = np.arange(2 * each) % 2 == 0
    return rng.standard_normal(2 * each) + mu * members, members


def test_curve_and_area_are_scikit_learns():
    rng = np.random.default_rng(0)
    scores, members = trials(rng, 1.0, 300)
    scores = np.round(scores, 1)  # with ties
    found = roc(scores, members)
    fpr, tpr, thresholds = roc_curve(members, scores, drop_intermediate=False)
    np.testing.assert_allclose(found.fpr_T, fpr)
    np.testing.assert_allclose(found.tpr_T, tpr)
    np.testing.assert_allclose(found.thresholds_T, thresholds)
    assert found.auc == pytest.approx(roc_auc_score(members, scores))
    x, y = found.log_points()
    assert x[0] == pytest.approx(1 / 300)
    assert x[-1] == 1
    assert y[-1] == 1
    assert (np.diff(y) >= 0).all()


def test_the_bootstrap_interval_covers_the_area_about_as_often_as_it_says():
    truth = ndtr(0.8 / np.sqrt(2))
    hits, widths = 0, []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        found = auc_interval(*trials(rng, 0.8, 100), rng, resamples=200)
        hits += found.low <= truth <= found.high
        widths.append(found.high - found.low)
    assert 87 <= hits <= 100
    assert 0.09 < np.mean(widths) < 0.16  # Hanley and McNeil give 0.127


def test_scores_that_share_a_run_widen_the_interval():
    rng = np.random.default_rng(1)
    runs = np.repeat(np.arange(10), 100)
    members = np.arange(1000) % 2 == 0
    scores = (1.0 + rng.standard_normal(10))[runs] * members + rng.standard_normal(1000)
    apart = auc_interval(scores, members, rng, resamples=200)
    together = auc_interval(scores, members, rng, resamples=200, groups_N=runs)
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_clopper_pearson_is_the_textbook_interval():
    found = clopper_pearson(8, 10)
    assert (found.low, found.high) == pytest.approx((0.4439045, 0.9747893), abs=1e-6)
    assert clopper_pearson(0, 10).low == 0
    assert clopper_pearson(10, 10).high == 1
    assert clopper_pearson(0, 10).high == pytest.approx(1 - 0.025**0.1)
    with pytest.raises(ConfigError, match="successes"):
        clopper_pearson(11, 10)


def test_the_rate_at_a_frozen_threshold():
    rng = np.random.default_rng(2)
    calibration = trials(rng, 2.0, 20_000)
    found = tpr_at_fpr(*trials(rng, 2.0, 20_000), fpr=0.01, calibration=calibration)
    truth = ndtr(ndtri(0.01) + 2.0)
    assert found.tpr.low < truth < found.tpr.high
    assert found.fpr.low < 0.01 < found.fpr.high
    assert found.threshold == pytest.approx(-ndtri(0.01), abs=0.06)
    # other trials do not move it
    again = tpr_at_fpr(*trials(rng, 0.0, 5000), fpr=0.01, calibration=calibration)
    assert again.threshold == found.threshold
    assert again.tpr.high < 0.03


def test_a_rate_that_the_trials_are_too_few_for_is_refused():
    assert [least_negatives(rate) for rate in (0.001, 0.01, 0.1)] == [10_000, 2000, 200]
    rng = np.random.default_rng(3)
    few, many = trials(rng, 1.0, 9_999), trials(rng, 1.0, 10_000)
    with pytest.raises(ConfigError, match=r"rate of 0\.001 needs 10000 non-members, got 9999.*rate of 1%"):
        freeze_threshold(*few, 0.001)
    with pytest.raises(ConfigError, match="needs 10000 non-members"):
        tpr_at_fpr(*few, fpr=0.001, calibration=many)
    assert tpr_at_fpr(*many, fpr=0.001, calibration=many).fpr.value <= 0.001
    with pytest.raises(ConfigError, match="only one kind"):
        roc(np.zeros(3), np.ones(3, dtype=bool))
    with pytest.raises(ConfigError, match="not numbers"):
        roc(np.array([0.0, np.nan]), np.array([True, False]))
    with pytest.raises(ConfigError, match="one membership bit"):
        roc(np.zeros(3), np.ones(2, dtype=bool))


def event(sigma, q=1.0, steps=1, relation="add_or_remove_one"):
    return PrivacyEvent(unit="example", noise_multiplier=sigma, sampling_probability=q, steps=steps, relation=relation)


def test_the_accounted_curve_of_plain_gaussians_is_exact():
    curve = accounted([event(2.0, steps=4)])
    assert curve.mu == pytest.approx(1.0)
    x = np.array([0.001, 0.1, 0.5])
    np.testing.assert_allclose(curve.tpr(x), ndtr(ndtri(x) + 1.0))


def test_the_envelope_of_a_profile_touches_the_curve_from_above():
    curve = accounted([event(2.0, steps=4)])
    from privfed.privacy.accountant import epsilon_curve
    from privfed_attacks.roc import DELTAS, Accounted

    pairs = tuple((e, d) for d, e in epsilon_curve([event(2.0, steps=4)], DELTAS))
    envelope = Accounted(mu=None, profile=pairs)
    x = np.geomspace(1e-4, 0.999, 60)
    assert (envelope.tpr(x) >= curve.tpr(x) - 1e-9).all()
    assert (envelope.tpr(x) <= curve.tpr(x) + 0.01).all()


def test_the_accounted_curve_of_sampled_steps_bounds_the_best_test():
    """One Poisson-sampled step: the likelihood ratio of (1-q) N(0) + q N(1/sigma) against N(0) is the best attack."""
    sigma, q = 1.0, 0.3
    curve = accounted([event(sigma, q)])
    assert curve.mu is None
    threshold = np.linspace(-6, 7, 400)[::-1]
    fpr = ndtr(-threshold)
    tpr = (1 - q) * ndtr(-threshold) + q * ndtr(1 / sigma - threshold)
    assert (tpr <= curve.tpr(fpr) + 1e-9).all()
    # the accountant's curve holds for adding and for removing, so it is about the larger of the two
    x = np.linspace(0.001, 0.999, 200)
    best = np.maximum(np.interp(x, fpr, tpr), np.interp(x, (1 - tpr)[::-1], (1 - fpr)[::-1]))
    assert np.max(curve.tpr(x) - best) < 0.02
    assert curve.tpr(0.1) <= np.exp(1.0) * 0.1 + delta_for([event(sigma, q)], 1.0) + 0.02


def test_a_band_rarely_rises_above_the_truth_and_catches_less_noise_than_claimed():
    claim = accounted([event(1.0)])
    false_alarms = sum(
        bool(lower_band(*trials(np.random.default_rng(seed), 1.0, 400)).above(claim).size) for seed in range(100)
    )
    assert false_alarms <= 10  # at most 5% are to be expected; more than 10 has probability 0.01
    caught = sum(
        bool(lower_band(*trials(np.random.default_rng(seed), 2.0, 400)).above(claim).size) for seed in range(20)
    )
    assert caught == 20
