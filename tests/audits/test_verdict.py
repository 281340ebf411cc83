"""From scores to a verdict: calibrated, near its ceiling for an ideal attack, and honest about what it assumes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from privfed.errors import ConfigError
from privfed.privacy.accountant import epsilon
from privfed.types import PrivacyEvent
from privfed_attacks.sealed import Sealed
from privfed_audits.bounds import Counts, epsilon_to_mu, gdp_epsilon, mu_to_epsilon
from privfed_audits.claims import Claim, curve_points, tradeoff_of, with_noise
from privfed_audits.one_run import ideal_scores
from privfed_audits.verdict import ceiling, choose, contradicts, estimate_of, finite, noise_scale, rejects, verdict

DELTA = 1e-5
TRIALS, MOST_FAILURES = 200, 16


def claim_of_noise(z, q=1.0, steps=1):
    events = (PrivacyEvent(unit="example", noise_multiplier=z, sampling_probability=q, steps=steps),)
    return Claim(view="individual", epsilon=epsilon(events, DELTA), delta=DELTA, unit="example", events=events)


def sampled_scores(canaries, z, q, rng):
    """Return (scores, bits) of one Poisson-sampled step of noise ``z``."""
    bits = rng.random(canaries) < 0.5
    return bits * (rng.random(canaries) < q) + z * rng.standard_normal(canaries), bits


def counts_of(scores, bits, rng):
    return choose({"only": scores}, bits, DELTA, 0.05, rng).counts


def test_an_ideal_attack_comes_near_the_ceiling_and_not_above_the_claim():
    mu = epsilon_to_mu(8.0, DELTA)
    claim = claim_of_noise(1 / mu)
    found = []
    for seed in range(5):
        scores, bits = ideal_scores(1000, 8.0, DELTA, np.random.default_rng(seed))
        found.append(verdict({"ideal": scores}, Sealed(bits), claim, seed=seed))
    low = [entry["empirical_epsilon"] for entry in found]
    top = found[0]["ceiling"]
    assert 5.6 < top < 6.6
    assert np.mean(low) == pytest.approx(top, abs=0.8)
    assert not any(entry["contradicted"] for entry in found)
    assert all(entry["interval"][0] < 8.0 < entry["interval"][1] for entry in found)
    assert all(entry["above_accounted"] == 0 for entry in found)
    json.dumps(found, allow_nan=False)
    assert all(entry["bounds"]["one_run"] < entry["bounds"]["f_dp"] for entry in found)
    assert all(entry["bounds"]["clopper_pearson"] < entry["empirical_epsilon"] for entry in found)


def test_a_claim_of_a_quarter_is_contradicted():
    scores, bits = ideal_scores(1000, 8.0, DELTA, np.random.default_rng(1))
    claim = claim_of_noise(1 / epsilon_to_mu(2.0, DELTA))
    found = verdict({"ideal": scores, "coin": np.random.default_rng(2).random(1000)}, Sealed(bits), claim)
    assert found["contradicted"] is True
    assert found["attack"] == "ideal"
    assert found["above_accounted"] > 0


@pytest.mark.slow
def test_many_useless_attacks_prove_nothing():
    """The attack is chosen on others, so 15 tries do not make a bound out of chance."""
    claim, wrong = claim_of_noise(100.0), 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        bits = rng.random(120) < 0.5
        chosen = choose({str(i): rng.random(120) for i in range(15)}, bits, DELTA, 0.05, rng)
        wrong += rejects(chosen.counts, claim, 0.05)
    assert wrong <= 5  # 1.5 are to be expected; more than 5 has probability 0.003


@pytest.mark.slow
@pytest.mark.parametrize("q", [0.5, 0.1])
def test_the_bound_of_a_sampled_mechanism_exceeds_its_epsilon_in_few_of_200_runs(q):
    claim = claim_of_noise(0.6, q)
    failures = 0
    for seed in range(TRIALS):
        rng = np.random.default_rng([seed, 7])
        failures += rejects(counts_of(*sampled_scores(2000, 0.6, q, rng), rng), claim, 0.05)
    assert failures <= MOST_FAILURES
    # with a third of the noise it is found out, unless hardly any canary takes part
    caught = 0
    for seed in range(5):
        rng = np.random.default_rng([seed, 8])
        caught += rejects(counts_of(*sampled_scores(4000, 0.2, q, rng), rng), claim, 0.05)
    assert caught == 5


def test_without_sampling_both_bounds_are_the_same():
    claim = claim_of_noise(0.8)
    counts = Counts(true_positives=300, positives=500, false_positives=10, negatives=500)
    gdp = gdp_epsilon(counts, delta=DELTA).epsilon
    fpr, fnr = counts.rates(0.05)
    assert noise_scale(claim, fpr, 1 - fnr) == pytest.approx(gdp, rel=0.06)
    assert estimate_of(counts, claim, 0.05).bound == "gdp"
    assert estimate_of(counts, claim, 0.05).low == gdp


def test_rejection_and_bound_agree():
    claim = claim_of_noise(0.8, q=0.5)
    for hits in (120, 200, 260, 320):
        counts = Counts(true_positives=hits, positives=500, false_positives=15, negatives=500)
        found = estimate_of(counts, claim, 0.05)
        assert found.low <= found.high
        if contradicts(found, claim):
            assert rejects(counts, claim, 0.05)
        # the bound is found by halving an interval, so that it may lie at the claim where the claim is just rejected
        assert not rejects(counts, claim, 0.05) or found.low >= claim.epsilon


def test_the_accounted_curve_is_the_exact_one_of_both_directions():
    """Of one sampled Gaussian step, (1 - q) N(0) + q N(1) against N(0) and the other way round, whose curves are known.

    A claim is about both, so its curve is the least concave one above the two.
    """
    z, q = 1.0, 0.3
    events = (PrivacyEvent(unit="example", noise_multiplier=z, sampling_probability=q, steps=1),)
    at = np.linspace(-8, 9, 4000)
    added = np.stack([ndtr(-at / z), (1 - q) * ndtr(-at / z) + q * ndtr((1 - at) / z)])
    removed = np.stack([(1 - q) * ndtr(at / z) + q * ndtr((at - 1) / z), ndtr(at / z)])
    points = np.concatenate([added, removed], axis=1)
    slopes = np.geomspace(1e-4, 1e4, 4000)  # a concave curve is the least of its tangents
    offsets = np.max(points[1][None] - slopes[:, None] * points[0][None], axis=1)
    fpr = np.linspace(0.01, 0.99, 50)
    exact = np.min(offsets[:, None] + slopes[:, None] * fpr[None], axis=0)
    found = tradeoff_of(events).tpr(fpr)
    assert (found >= exact - 1e-3).all()
    assert found == pytest.approx(exact, abs=0.01)
    whole, tpr = curve_points(claim_of_noise(1.0))
    np.testing.assert_allclose(tpr[1:-1], ndtr(ndtri(whole[1:-1]) + 1.0))


def test_noise_is_scaled_and_nothing_else():
    (event,) = with_noise((PrivacyEvent(unit="example", noise_multiplier=2.0, sampling_probability=0.1, steps=9),), 0.5)
    assert (event.noise_multiplier, event.sampling_probability, event.steps) == (1.0, 0.1, 9)
    assert mu_to_epsilon(1.0, DELTA) == pytest.approx(4.3772, rel=1e-4)


def test_what_proves_nothing_is_said_so():
    bits = np.array([True, True, True, False, False, False, False, False])
    with pytest.raises(ConfigError, match="at least 4 canaries"):
        verdict({"a": np.arange(8.0)}, Sealed(bits), claim_of_noise(1.0))
    unclaimed = Claim(view="individual", epsilon=None, delta=None, unit="none")
    scores, coins = ideal_scores(400, 4.0, DELTA, np.random.default_rng(0))
    found = verdict({"a": scores}, Sealed(coins), unclaimed)
    assert found["accounted_epsilon"] is None
    assert found["ceiling"] is None
    assert found["contradicted"] is False
    assert found["empirical_epsilon"] > 0


def test_json_gets_no_infinity():
    found = finite({"a": math.inf, "b": [math.inf, -math.inf], "c": {"d": 1.5}})
    assert found == {"a": 200.0, "b": [200.0, 0.0], "c": {"d": 1.5}}
    assert ceiling(8, 1.0, DELTA, 0.05) == 0.0


@pytest.mark.parametrize(("canaries", "fpr"), [(20, 0.5), (400, 0.25), (1000, 0.1), (9000, 0.01)])
def test_the_true_positive_rate_is_at_the_smallest_rate_that_there_are_canaries_for(canaries, fpr):
    bits = np.arange(canaries) % 2 == 0
    scores = np.random.default_rng(3).standard_normal(canaries) + 2.0 * bits
    found = verdict({"a": scores}, Sealed(bits), claim_of_noise(0.5))["tpr_at_fpr"]
    assert found["fpr"] == fpr
    # the threshold is frozen on other canaries, and hits its false positive rate about
    assert found["low"] - 0.06 <= ndtr(ndtri(fpr) + 2.0) <= found["high"] + 0.06
    assert found["low"] <= found["tpr"] <= found["high"]
