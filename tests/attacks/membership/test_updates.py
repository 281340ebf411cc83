"""Attacks on updates: each against a case whose answer is known, beside test_null.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from scipy.stats import kstest

from privfed.errors import ConfigError
from privfed_attacks.membership import MEMBERSHIP, Evidence
from privfed_attacks.membership.canary_client import canary_client, estimate, random_directions
from privfed_attacks.membership.canife import canife, optimise_canary
from privfed_attacks.membership.fed_cosine import fed_cosine
from privfed_attacks.membership.gradient_dot import gradient_dot, theoretical_auc, unit
from privfed_attacks.membership.subspace_residual import subspace_residual
from privfed_attacks.roc import roc

ROUNDS, CLIENTS, LENGTH = 3, 6, 40


def auc(scores_Q, members_Q):
    return roc(scores_Q, members_Q).auc


def world(rng, *, queries, strength):
    """Return (evidence, members) of one run: a member's gradient moved its client against it, by ``strength``."""
    gradients_RQD = rng.standard_normal((ROUNDS, queries, LENGTH))
    members_Q = rng.random(queries) < 0.5
    noise_RCD = rng.standard_normal((ROUNDS, CLIENTS, LENGTH))
    noise_RCD[:, 2] -= strength * np.einsum("rqd,q->rd", unit(gradients_RQD), members_Q.astype(float))
    evidence = Evidence(
        updates_RD=noise_RCD[:, 2],
        gradients_RQD=gradients_RQD,
        client_updates_RCD=noise_RCD,
        target_client=2,
    )
    return evidence, members_Q


@pytest.mark.parametrize("name", ["fed_cosine", "gradient_dot", "update_cosine"])
def test_a_member_shows_in_its_clients_update(name):
    rng = np.random.default_rng(6)
    scores, bits = [], []
    for _ in range(100):
        evidence, members_Q = world(rng, queries=6, strength=1.5)
        scores.append(MEMBERSHIP.get(name).score(evidence))
        bits.append(members_Q)
    assert auc(np.concatenate(scores), np.concatenate(bits)) > 0.85


def test_gradient_dot_reaches_its_closed_form_where_the_rest_is_known_and_not_where_it_is_unknown():
    rng = np.random.default_rng(7)
    z, trials = 1.0, 12_000
    gradients = rng.standard_normal((trials, LENGTH)) * np.exp(rng.standard_normal((trials, 1)))
    rest = 2.0 * rng.standard_normal((trials, LENGTH))
    members = rng.random(trials) < 0.5
    updates = -(rest + members[:, None] * unit(gradients) + z * rng.standard_normal((trials, LENGTH)))
    known = [gradient_dot(updates[[t]], gradients[None, [t]], -rest[[t]])[0] for t in range(trials)]
    blind = [gradient_dot(updates[[t]], gradients[None, [t]])[0] for t in range(trials)]
    assert auc(np.array(known), members) == pytest.approx(theoretical_auc(z), abs=0.012)
    assert auc(np.array(blind), members) == pytest.approx(ndtr(1 / math.sqrt(2 * 5)), abs=0.015)


def test_fedmia_takes_off_what_all_clients_share():
    rng = np.random.default_rng(8)
    shared_RD = 10 * rng.standard_normal((ROUNDS, LENGTH))
    scores, plain, bits = [], [], []
    for _ in range(200):
        evidence, members_Q = world(rng, queries=6, strength=1.5)
        moved = evidence.client_updates_RCD + shared_RD[:, None]
        scores.append(fed_cosine(moved, evidence.gradients_RQD, 2))
        plain.append(MEMBERSHIP.get("update_cosine").function(moved[:, 2], evidence.gradients_RQD))
        bits.append(members_Q)
    assert auc(np.concatenate(scores), np.concatenate(bits)) > auc(np.concatenate(plain), np.concatenate(bits)) + 0.05
    with pytest.raises(ConfigError, match="at least 3, got 2"):
        fed_cosine(moved[:, :3], evidence.gradients_RQD, 2)


def test_inputs_that_were_trained_on_lie_in_the_span_of_the_update():
    rng = np.random.default_rng(9)
    inputs_QTH = rng.standard_normal((12, 4, LENGTH))
    inputs_QTH[3, 2:] = 0.0  # a short text
    trained = [0, 3, 7]
    rows = inputs_QTH[trained].reshape(-1, LENGTH)
    update_MH = rng.standard_normal((16, len(rows))) @ rows
    scores_Q = subspace_residual(update_MH, inputs_QTH)
    assert (scores_Q[trained] > -1e-6).all()
    assert (np.delete(scores_Q, trained) < -0.5).all()
    share = 1 - 10 / LENGTH  # a random vector's residual beside a subspace of 10 dimensions
    assert np.delete(scores_Q, trained).mean() == pytest.approx(-math.sqrt(share), abs=0.05)
    noisy = update_MH + rng.standard_normal(update_MH.shape)
    assert (subspace_residual(noisy, inputs_QTH, rank=10)[trained] > -0.5).all()
    with pytest.raises(ConfigError, match="all 0"):
        subspace_residual(np.zeros((2, LENGTH)), inputs_QTH)
    with pytest.raises(ConfigError, match="Query 0 has no input"):
        subspace_residual(update_MH, np.zeros((1, 2, LENGTH)))


def test_unseen_canaries_are_standard_normal_and_seen_ones_are_not():
    rng = np.random.default_rng(10)
    length, count = 4000, 500
    canaries_QD = random_directions(count, length, rng)
    update_D = rng.standard_normal(length)
    unseen = canary_client(update_D[None], canaries_QD)
    assert kstest(unseen, "norm").pvalue > 0.01
    assert kstest(1.2 * unseen, "norm").pvalue < 0.01  # a wrong scale is rejected
    mu = 2.0
    seen = canary_client((update_D + mu * canaries_QD.sum(axis=0))[None] / 1.0, canaries_QD)
    own = mu * math.sqrt(length) / np.linalg.norm(update_D + mu * canaries_QD.sum(axis=0))
    assert seen.mean() == pytest.approx(own, abs=0.2)
    found = estimate(mu + rng.standard_normal(20_000), delta=1e-5)
    assert found.mean == pytest.approx(2.0, abs=0.03)
    assert found.epsilon == pytest.approx(9.9977, rel=0.02)  # of a Gaussian mechanism with mu = 2
    with pytest.raises(ConfigError, match="did not change"):
        canary_client(np.zeros((1, length)), canaries_QD)
    with pytest.raises(ConfigError, match="at least two"):
        estimate(np.array([1.0]), 1e-5)


def test_an_optimised_canary_is_large_and_away_from_the_others_and_found():
    draw = torch.Generator().manual_seed(0)
    weight = 0.3 * torch.randn(4, 12, generator=draw)
    label = torch.tensor([1])

    def gradient(x):
        probabilities = torch.softmax(weight @ x, dim=0)
        error = probabilities - torch.nn.functional.one_hot(label, 4)[0]
        return torch.outer(error, x).ravel()

    others_ND = torch.stack([gradient(torch.randn(12, generator=draw)) for _ in range(8)])
    start = torch.randn(12, generator=draw)
    made = optimise_canary(gradient, start, others_ND, l2_clip_norm=1.0, steps=300)

    def overlap(x):
        g = gradient(x)
        units = others_ND / others_ND.norm(dim=1, keepdim=True)
        return float((units @ (g / g.norm())).abs().max())

    assert overlap(made) < 0.3 * overlap(start)
    assert float(gradient(made).norm()) > 0.9
    # in a sum of clipped updates it is found where the start is lost
    rng = np.random.default_rng(11)
    units = unit(others_ND.double().numpy())
    areas = {}
    for name, x in (("made", made), ("start", start)):
        canary_QD = -unit(gradient(x).double().numpy())[None]
        scores, bits = [], []
        for _ in range(400):
            bit = rng.random() < 0.5
            total = rng.choice([-1.0, 1.0], 8) @ units * 3 + bit * canary_QD[0] + 0.5 * rng.standard_normal(48)
            scores.append(canife(total[None], canary_QD)[0])
            bits.append(bit)
        areas[name] = auc(np.array(scores), np.array(bits))
    assert areas["made"] > 0.88
    assert areas["made"] > areas["start"] + 0.1


def test_shapes_that_do_not_fit_are_said():
    with pytest.raises(ConfigError, match="gradients of 2 rounds and 5 values"):
        gradient_dot(np.zeros((2, 5)), np.zeros((1, 3, 5)))
