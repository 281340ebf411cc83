"""Every registered attack finds nothing where there is nothing: a new one is covered once it is registered."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from privfed_attacks.membership import MEMBERSHIP, Evidence
from privfed_attacks.roc import roc

RUNS, QUERIES, POPULATION, MODELS = 40, 300, 150, 6
ROUNDS, CLIENTS, LENGTH, TOKENS = 2, 5, 30, 7


def nothing(rng):
    """Return evidence of one run, every field filled, and bits that it does not depend on."""
    hard_Q, hard_Z = 2 * rng.standard_normal(QUERIES), 2 * rng.standard_normal(POPULATION)

    def losses(hard, models):
        return np.logaddexp(0.0, -(hard + rng.standard_normal((models, len(hard)))))

    clients_RCD = rng.standard_normal((ROUNDS, CLIENTS, LENGTH))
    known = Evidence(
        losses_Q=losses(hard_Q, 1)[0],
        labels_Q=rng.integers(0, 3, QUERIES),
        features_QF=hard_Q[:, None] + rng.standard_normal((QUERIES, 2)),
        population_losses_Z=losses(hard_Z, 1)[0],
        population_labels_Z=rng.integers(0, 3, POPULATION),
        population_features_ZF=hard_Z[:, None] + rng.standard_normal((POPULATION, 2)),
        reference_losses_KQ=losses(hard_Q, MODELS),
        reference_members_KQ=np.argsort(rng.random((MODELS, QUERIES)), axis=0) < MODELS // 2,
        reference_population_losses_KZ=losses(hard_Z, MODELS),
        token_logprobs_QT=-rng.exponential(size=(QUERIES, TOKENS)),
        token_means_QT=-3 - rng.random((QUERIES, TOKENS)),
        token_deviations_QT=1 + rng.random((QUERIES, TOKENS)),
        updates_RD=clients_RCD[:, 1],
        gradients_RQD=rng.standard_normal((ROUNDS, QUERIES, LENGTH)),
        known_RD=0.1 * rng.standard_normal((ROUNDS, LENGTH)),
        client_updates_RCD=clients_RCD,
        target_client=1,
        subspace_MH=rng.standard_normal((8, LENGTH)),
        inputs_QTH=rng.standard_normal((QUERIES, 3, LENGTH)),
        canaries_QD=rng.standard_normal((QUERIES, LENGTH)),
    )
    return known, rng.random(QUERIES) < 0.5


@pytest.mark.parametrize("name", MEMBERSHIP.names())
def test_without_a_trace_of_membership_the_auc_is_one_half(name):
    rng = np.random.default_rng(12)
    scores, bits = [], []
    for _ in range(RUNS):
        evidence, members_Q = nothing(rng)
        assert all(getattr(evidence, field.name) is not None for field in fields(Evidence))
        scores.append(MEMBERSHIP.get(name).score(evidence))
        bits.append(members_Q)
    assert abs(roc(np.concatenate(scores), np.concatenate(bits)).auc - 0.5) < 0.02
