"""Score-level attacks, each against a case whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, ndtr
from scipy.stats import norm

from privfed.errors import ConfigError, UnknownNameError
from privfed_attacks.membership import MEMBERSHIP, Evidence, MembershipAttack
from privfed_attacks.membership.bavaria import bavaria, fit_prior
from privfed_attacks.membership.lira import lira, lira_offline
from privfed_attacks.membership.min_k import min_k
from privfed_attacks.membership.population import population
from privfed_attacks.membership.quantile import quantile
from privfed_attacks.membership.reference import reference
from privfed_attacks.membership.rmia import rmia, rmia_offline, tuned_a
from privfed_attacks.membership.signals import logit_confidence, losses, token_statistics
from privfed_attacks.membership.user_level import user_scores
from privfed_attacks.roc import roc

QUERIES, POPULATION = 3000, 1500


def worlds(rng, *, references, gap, queries=QUERIES, spread=2.0, noise=1.0):
    """Return (evidence, members): phi of a query on a model is its difficulty + ``gap`` if trained on + noise."""
    hard_Q, hard_Z = spread * rng.standard_normal(queries), spread * rng.standard_normal(POPULATION)

    def loss(phi):
        return np.logaddexp(0.0, -phi)

    members_Q = rng.random(queries) < 0.5
    in_KQ = np.argsort(np.argsort(rng.random((references, queries)), axis=0), axis=0) < references / 2
    phi_Q = hard_Q + gap * members_Q + noise * rng.standard_normal(queries)
    phi_KQ = hard_Q + gap * in_KQ + noise * rng.standard_normal(in_KQ.shape)
    evidence = Evidence(
        losses_Q=loss(phi_Q),
        population_losses_Z=loss(hard_Z + noise * rng.standard_normal(POPULATION)),
        reference_losses_KQ=loss(phi_KQ),
        reference_members_KQ=in_KQ,
        reference_population_losses_KZ=loss(hard_Z + noise * rng.standard_normal((references, POPULATION))),
        features_QF=np.stack([hard_Q + 0.3 * rng.standard_normal(queries), rng.standard_normal(queries)], axis=1),
        population_features_ZF=np.stack(
            [hard_Z + 0.3 * rng.standard_normal(POPULATION), rng.standard_normal(POPULATION)], axis=1
        ),
        labels_Q=rng.integers(0, 3, queries),
        population_labels_Z=rng.integers(0, 3, POPULATION),
    )
    return evidence, members_Q


def auc(scores_Q, members_Q):
    return roc(scores_Q, members_Q).auc


SCORE_LEVEL = ["bavaria", "lira", "lira_offline", "loss", "population", "quantile", "reference", "rmia", "rmia_offline"]


@pytest.mark.parametrize("name", SCORE_LEVEL)
def test_without_a_trace_of_membership_the_auc_is_one_half(name):
    evidence, members_Q = worlds(np.random.default_rng(1), references=8, gap=0.0, queries=8000)
    found = auc(MEMBERSHIP.get(name).score(evidence), members_Q)
    assert abs(found - 0.5) < 0.02
    # the test has the power to see one: a gap of a quarter of the noise is already outside
    evidence, members_Q = worlds(np.random.default_rng(1), references=8, gap=1.5, queries=8000)
    assert auc(MEMBERSHIP.get(name).score(evidence), members_Q) > 0.52


def test_attacks_that_know_the_querys_difficulty_beat_the_loss_and_online_lira_is_near_the_optimum():
    evidence, members_Q = worlds(np.random.default_rng(2), references=16, gap=1.5)
    plain = auc(MEMBERSHIP.get("loss").score(evidence), members_Q)
    best = ndtr(1.5 / np.sqrt(2))  # knowing each query's difficulty exactly
    for name in ("lira", "lira_offline", "bavaria", "rmia", "rmia_offline", "reference", "quantile"):
        found = auc(MEMBERSHIP.get(name).score(evidence), members_Q)
        assert plain + 0.02 < found < best + 0.02, name
    assert auc(MEMBERSHIP.get("lira").score(evidence), members_Q) > best - 0.03


def test_lira_is_the_ratio_of_normals_with_the_pooled_variance():
    rng = np.random.default_rng(3)
    evidence, _ = worlds(rng, references=6, gap=1.0, queries=40)
    phi_Q = logit_confidence(evidence.losses_Q)
    phi_KQ, in_KQ = logit_confidence(evidence.reference_losses_KQ), evidence.reference_members_KQ
    pooled = {
        side: sum(np.var(phi_KQ[mask[:, q], q]) * mask[:, q].sum() for q in range(40)) / (mask.sum() - 40)
        for side, mask in (("in", in_KQ), ("out", ~in_KQ))
    }
    expected = [
        norm.logpdf(phi_Q[q], phi_KQ[in_KQ[:, q], q].mean(), np.sqrt(pooled["in"]))
        - norm.logpdf(phi_Q[q], phi_KQ[~in_KQ[:, q], q].mean(), np.sqrt(pooled["out"]))
        for q in range(40)
    ]
    arguments = (evidence.losses_Q, evidence.reference_losses_KQ, in_KQ)
    np.testing.assert_allclose(lira(*arguments), expected, rtol=1e-9)
    own = [
        norm.logpdf(phi_Q[q], phi_KQ[in_KQ[:, q], q].mean(), phi_KQ[in_KQ[:, q], q].std(ddof=1))
        - norm.logpdf(phi_Q[q], phi_KQ[~in_KQ[:, q], q].mean(), phi_KQ[~in_KQ[:, q], q].std(ddof=1))
        for q in range(40)
    ]
    np.testing.assert_allclose(lira(*arguments, pooled=False), own, rtol=1e-9)
    tails = [norm.cdf(phi_Q[q], phi_KQ[~in_KQ[:, q], q].mean(), np.sqrt(pooled["out"])) for q in range(40)]
    np.testing.assert_allclose(ndtr(lira_offline(*arguments)), tails, rtol=1e-9)


def test_rmia_is_the_share_of_population_pairs():
    rng = np.random.default_rng(4)
    evidence, _ = worlds(rng, references=4, gap=1.0, queries=60)
    p_Q, p_Z = np.exp(-evidence.losses_Q), np.exp(-evidence.population_losses_Z)
    in_KQ = evidence.reference_members_KQ
    p_KQ, p_KZ = np.exp(-evidence.reference_losses_KQ), np.exp(-evidence.reference_population_losses_KZ)
    arguments = (
        evidence.losses_Q,
        evidence.population_losses_Z,
        evidence.reference_losses_KQ,
        in_KQ,
        evidence.reference_population_losses_KZ,
    )
    a, gamma = 0.4, 1.5
    mean_Z = ((1 + a) * p_KZ.mean(axis=0) + (1 - a)) / 2
    for function, mean in (
        (rmia, lambda q: (p_KQ[in_KQ[:, q], q].mean() + p_KQ[~in_KQ[:, q], q].mean()) / 2),
        (rmia_offline, lambda q: ((1 + a) * p_KQ[~in_KQ[:, q], q].mean() + (1 - a)) / 2),
    ):
        expected = [np.mean((p_Q[q] / mean(q)) / (p_Z / mean_Z) >= gamma) for q in range(60)]
        found = function(*arguments, gamma=gamma, offline_a=a)
        np.testing.assert_allclose(found, expected, atol=1.5 / POPULATION)  # but for what orders ties


def test_rmia_tunes_its_a_on_the_adversarys_own_models():
    evidence, members_Q = worlds(np.random.default_rng(5), references=4, gap=1.5)
    a = tuned_a(evidence.reference_losses_KQ, evidence.reference_members_KQ, evidence.reference_population_losses_KZ)
    attack = MEMBERSHIP.get("rmia_offline")
    areas = {choice: auc(attack.score(evidence, offline_a=choice), members_Q) for choice in np.linspace(0, 1, 11)}
    assert areas[a] > max(areas.values()) - 0.01
    assert areas[a] > min(areas.values()) + 0.01


def test_bavaria_finds_its_prior_and_becomes_pooled_lira_where_variances_are_equal():
    rng = np.random.default_rng(6)
    sigma2_Q = 1 / rng.gamma(5.0, 1 / 8.0, 20_000)  # inverse gamma with alpha 5, beta 8
    values_KQ = 3.0 + np.sqrt(sigma2_Q / 0.5) * rng.standard_normal(20_000)
    values_KQ = values_KQ + np.sqrt(sigma2_Q) * rng.standard_normal((8, 20_000))
    prior = fit_prior(values_KQ, np.ones((8, 20_000), dtype=bool))
    assert prior.alpha == pytest.approx(5.0, rel=0.15)
    assert prior.beta == pytest.approx(8.0, rel=0.2)
    assert prior.kappa == pytest.approx(0.5, rel=0.1)
    assert prior.mean == pytest.approx(3.0, abs=0.05)
    evidence, _ = worlds(rng, references=400, gap=1.0, queries=50)
    arguments = (evidence.losses_Q, evidence.reference_losses_KQ, evidence.reference_members_KQ)
    np.testing.assert_allclose(bavaria(*arguments), lira(*arguments, pooled=True), atol=0.15)
    np.testing.assert_allclose(bavaria(*arguments, predictive="normal"), lira(*arguments, pooled=True), atol=0.15)


def test_bavaria_is_no_worse_than_lira_with_few_models_and_unequal_variances():
    rng = np.random.default_rng(7)
    noise_Q = np.exp(0.8 * rng.standard_normal(6000))
    evidence, members_Q = worlds(rng, references=8, gap=1.5, queries=6000)
    hard_Q = rng.standard_normal(6000)
    in_KQ = evidence.reference_members_KQ
    phi_Q = hard_Q + 1.5 * members_Q + noise_Q * rng.standard_normal(6000)
    phi_KQ = hard_Q + 1.5 * in_KQ + noise_Q * rng.standard_normal(in_KQ.shape)
    arguments = (np.logaddexp(0, -phi_Q), np.logaddexp(0, -phi_KQ), in_KQ)
    assert auc(bavaria(*arguments), members_Q) > auc(lira(*arguments), members_Q) + 0.005


def test_population_scores_are_p_values_within_a_class():
    rng = np.random.default_rng(8)
    evidence, _ = worlds(rng, references=2, gap=0.0)
    scores_Q = population(evidence.losses_Q, evidence.population_losses_Z)
    order = np.argsort(evidence.losses_Q)
    assert (np.diff(scores_Q[order]) <= 0).all()
    above = (evidence.population_losses_Z > evidence.losses_Q[0]).mean()
    assert scores_Q[0] == pytest.approx(above, abs=1 / POPULATION)
    labels_Q, labels_Z = np.array([0, 1]), np.repeat([0, 1], 50)
    losses_Z = np.concatenate([rng.random(50), 10 + rng.random(50)])
    by_class = population(np.array([5.0, 5.0]), losses_Z, labels_Q, labels_Z)
    assert by_class[0] < 0.05
    assert by_class[1] > 0.95


def test_reference_counts_models_without_the_query():
    losses_KQ = np.array([[1.0, 1.0], [2.0, 0.1], [0.5, 3.0]])
    members_KQ = np.array([[False, True], [False, False], [True, False]])
    scores_Q = reference(np.array([0.7, 0.7]), losses_KQ, members_KQ)
    assert scores_Q[0] == pytest.approx((2 + expit(1.5 - 0.7)) / 3)
    assert scores_Q[1] == pytest.approx((1 + expit(1.55 - 0.7)) / 3)


def test_losses_and_confidences_keep_their_precision_where_models_are_sure():
    logits = np.array([[80.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    found = losses(logits, np.array([0, 1]))
    assert found[0] == pytest.approx(2 * np.exp(-80.0), rel=1e-12)
    assert found[1] == pytest.approx(-np.log(np.exp(2) / (np.exp(2) + 2)))
    np.testing.assert_allclose(logit_confidence(found), [80 - np.log(2), 2 - np.log(2)], rtol=1e-12)
    assert logit_confidence(np.zeros(1))[0] == pytest.approx(25 * np.log(2), rel=1e-6)  # not infinite


def test_min_k_standardises_and_takes_the_lowest_share():
    rng = np.random.default_rng(9)
    logits, tokens = rng.standard_normal((10, 7)), rng.integers(0, 7, 10)
    logprobs, means, deviations = token_statistics(logits, tokens)
    logs = np.log(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logprobs, logs[np.arange(10), tokens])
    np.testing.assert_allclose(means, (np.exp(logs) * logs).sum(axis=1))
    np.testing.assert_allclose(deviations**2, (np.exp(logs) * (logs - means[:, None]) ** 2).sum(axis=1))
    padded = [np.stack([part, np.where(np.arange(10) < 4, part, np.nan)]) for part in (logprobs, means, deviations)]
    z = (logprobs - means) / deviations
    expected = [np.sort(z)[:3].mean(), np.sort(z[:4])[:1].mean()]
    np.testing.assert_allclose(min_k(*padded, share=0.3), expected)
    with pytest.raises(ConfigError, match="no token"):
        min_k(*[np.full((1, 3), np.nan)] * 3)
    with pytest.raises(ConfigError, match="share of tokens"):
        min_k(*padded, share=0.0)


def test_users_are_scored_by_the_mean_of_their_examples():
    owners, scores = user_scores(np.array([1.0, 3.0, 10.0]), np.array([7, 7, 2]))
    assert owners.tolist() == [2, 7]
    assert scores.tolist() == [10.0, 2.0]
    assert user_scores(np.array([1.0, 3.0, 10.0]), np.array([7, 7, 2]), combine="max")[1].tolist() == [10.0, 3.0]
    with pytest.raises(ConfigError, match="owner"):
        user_scores(np.zeros(3), np.zeros(2, dtype=np.int64))
    # a faint trace in each example is a strong one in a user
    rng = np.random.default_rng(10)
    members_U = rng.random(400) < 0.5
    owners_Q = np.repeat(np.arange(400), 25)
    scores_Q = 0.3 * members_U[owners_Q] + rng.standard_normal(10_000)
    assert auc(scores_Q, members_U[owners_Q]) < 0.62
    assert auc(user_scores(scores_Q, owners_Q)[1], members_U) > 0.8


def test_what_an_adversary_lacks_or_asks_wrongly_is_said():
    evidence, _ = worlds(np.random.default_rng(11), references=4, gap=0.0, queries=50)
    with pytest.raises(ConfigError, match="needs reference_losses_KQ, reference_members_KQ"):
        MEMBERSHIP.get("lira").score(Evidence(losses_Q=evidence.losses_Q))
    with pytest.raises(UnknownNameError, match="Did you mean 'rmia'"):
        MEMBERSHIP.get("rmias")
    all_in = np.ones_like(evidence.reference_members_KQ)
    for attack in (lira, lira_offline, bavaria, reference):
        with pytest.raises(ConfigError, match="has no reference model"):
            attack(evidence.losses_Q, evidence.reference_losses_KQ, all_in)
    two = (evidence.losses_Q, evidence.reference_losses_KQ[:2], np.array([[True] * 50, [False] * 50]))
    with pytest.raises(ConfigError, match="at least 4 reference models"):
        lira(*two)
    with pytest.raises(ConfigError, match="at least 4 reference models"):
        bavaria(*two)
    with pytest.raises(ConfigError, match="offline_a"):
        MEMBERSHIP.get("rmia").score(evidence, offline_a=1.5)
    with pytest.raises(ConfigError, match="gamma"):
        MEMBERSHIP.get("rmia").score(evidence, gamma=0.0)
    with pytest.raises(ConfigError, match="at least 100"):
        quantile(evidence.losses_Q, evidence.features_QF, np.zeros(5), np.zeros((5, 2)))
    with pytest.raises(ConfigError, match="not numbers"):
        MEMBERSHIP.get("loss").score(Evidence(losses_Q=np.array([1.0, np.nan])))


def test_every_attack_says_what_it_takes_and_where_it_is_from():
    names = MEMBERSHIP.names()
    assert set(SCORE_LEVEL) < set(names)
    for name, entry in MEMBERSHIP.items():
        assert isinstance(entry, MembershipAttack)
        assert entry.needs, name
        assert "adversary" in (entry.function.__doc__ or ""), name
