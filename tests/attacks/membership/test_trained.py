"""Attacks on adapters that were really trained: overfitted without privacy, and with DP."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from privfed.federation.local import ExampleDp, LocalTrainer
from privfed.models.examples import FeatureExamples
from privfed.rng import PrivateStream, experiment_rng
from privfed.schedule import ClientConfig
from privfed.tuning.layout import read_flat, write_flat
from privfed.types import PrivacyEvent, Shard
from privfed_attacks.membership import MEMBERSHIP, Evidence
from privfed_attacks.membership.rmia import rmia_offline
from privfed_attacks.roc import accounted, lower_band, roc, tpr_at_fpr
from privfed_attacks.shadows import in_out_matrix, train_side_by_side

SHADOWS, QUERIES, POPULATION, WIDTH, CLASSES = 44, 400, 400, 48, 4
DP_EXAMPLES, DP_WIDTH = 500, 256


@pytest.fixture(scope="module")
def overfitted():
    """Return losses [K, Q + Z] of heads trained for long on half of the queries each, and the in/out matrix [K, Q].

    Labels are those of a noisy linear rule, so some examples are hard and what is fitted of them is memorised.
    """
    draw = torch.Generator().manual_seed(4)
    features = torch.randn(QUERIES + POPULATION, WIDTH, generator=draw)
    rule = torch.randn(WIDTH, CLASSES, generator=draw)
    logits = features @ rule / WIDTH**0.5 + 0.7 * torch.randn(len(features), CLASSES, generator=draw)
    examples = FeatureExamples(features, logits.argmax(dim=1))
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, CLASSES)
    members_KQ = in_out_matrix(SHADOWS, QUERIES, experiment_rng(1, "in-out"))
    padded = np.concatenate([members_KQ, np.zeros((SHADOWS, POPULATION), dtype=bool)], axis=1)
    config = ClientConfig(optimizer="adamw", learning_rate=0.05, batch_size=64, local_steps=150)
    rngs = [experiment_rng(1, "rows", k) for k in range(SHADOWS)]
    found = train_side_by_side(head, examples, padded, config, rngs, head_prefix="")
    return found.losses(examples, size=800), members_KQ


def evidence(losses_KN, members_KQ, target, references):
    return Evidence(
        losses_Q=losses_KN[target, :QUERIES],
        population_losses_Z=losses_KN[target, QUERIES:],
        reference_losses_KQ=losses_KN[references, :QUERIES],
        reference_members_KQ=members_KQ[references],
        reference_population_losses_KZ=losses_KN[references, QUERIES:],
    )


def balanced(members_KQ, target, count, seed):
    """Return ``count`` reference models other than the target, and the queries that both sides have a model for."""
    rng = experiment_rng(seed, "references", target, count)
    chosen = rng.permutation(np.delete(np.arange(SHADOWS), target))[:count]
    inside = members_KQ[chosen].sum(axis=0)
    return chosen, (inside > 0) & (inside < count)


def all_scores(overfitted, name, count):
    """Return scores and bits over all models in turn as the attacked one, as (calibration, rest): even and odd ones."""
    losses_KN, members_KQ = overfitted
    parts = ([], [])
    for target in range(SHADOWS):
        chosen, usable = balanced(members_KQ, target, count, 0)
        whole = evidence(losses_KN, members_KQ, target, chosen)
        cut = Evidence(
            losses_Q=whole.losses_Q[usable],
            population_losses_Z=whole.population_losses_Z,
            reference_losses_KQ=whole.reference_losses_KQ[:, usable],
            reference_members_KQ=whole.reference_members_KQ[:, usable],
            reference_population_losses_KZ=whole.reference_population_losses_KZ,
        )
        scores = MEMBERSHIP.get(name).score(cut)
        parts[target % 2].append((scores, members_KQ[target, usable]))
    return [tuple(np.concatenate(column) for column in zip(*part, strict=True)) for part in parts]


def rate(overfitted, name, count):
    calibration, rest = all_scores(overfitted, name, count)
    return tpr_at_fpr(*rest, fpr=0.01, calibration=calibration)


def test_lira_with_16_shadows_beats_the_loss_at_one_percent_false_positives(overfitted):
    by_loss, by_lira = rate(overfitted, "loss", 16), rate(overfitted, "lira", 16)
    assert by_lira.tpr.low > by_loss.tpr.high
    assert by_lira.tpr.value > 2 * by_loss.tpr.value
    assert by_lira.fpr.high < 0.02


def test_rmia_with_2_references_is_not_behind_lira_with_4(overfitted):
    two, four = all_scores(overfitted, "rmia", 2), all_scores(overfitted, "lira", 4)
    assert roc(*two[1]).auc > roc(*four[1]).auc
    assert rate(overfitted, "rmia", 2).tpr.high > rate(overfitted, "lira", 4).tpr.low
    losses_KN, members_KQ = overfitted  # nor is it without the queries in any reference
    areas = []
    for target in range(SHADOWS):
        chosen = balanced(members_KQ, target, 2, 0)[0]
        outside = ~members_KQ[chosen].all(axis=0)
        whole = evidence(losses_KN, members_KQ, target, chosen)
        arguments = (whole.losses_Q[outside], whole.population_losses_Z, whole.reference_losses_KQ[:, outside])
        scores = rmia_offline(*arguments, members_KQ[chosen][:, outside], whole.reference_population_losses_KZ)
        areas.append(roc(scores, members_KQ[target, outside]).auc)
    assert np.mean(areas) > roc(*four[1]).auc


def test_bavaria_with_4_references_is_not_behind_lira_with_4(overfitted):
    mine, other = all_scores(overfitted, "bavaria", 4), all_scores(overfitted, "lira", 4)
    assert roc(*mine[1]).auc > roc(*other[1]).auc


@pytest.fixture(scope="module")
def dp_run():
    """Return a function from a noise multiplier to (scores by attack, bits) of a real DP-SGD run of 8 steps."""
    draw = torch.Generator().manual_seed(5)
    features = torch.randn(DP_EXAMPLES, DP_WIDTH, generator=draw)
    examples = FeatureExamples(features, torch.randint(0, CLASSES, (DP_EXAMPLES,), generator=draw))  # nothing to learn
    steps, q = 8, 0.5

    def run(noise_multiplier):
        torch.manual_seed(0)
        head = nn.Linear(DP_WIDTH, CLASSES)
        config = ClientConfig(
            optimizer="sgd", learning_rate=4.0, sampling_probability=q, local_steps=1, physical_batch_size=DP_EXAMPLES
        )
        trainer = LocalTrainer(
            head, "", examples, config, ExampleDp(l2_clip_norm=1.0, noise_multiplier=noise_multiplier)
        )
        members_Q = np.arange(DP_EXAMPLES) % 2 == 0
        shard = Shard(client_id="a", indices=np.flatnonzero(members_Q))
        params_D = read_flat(head)
        updates, gradients = [], []
        for step in range(steps):
            write_flat(head, params_D)
            gradients.append(_gradients(head, examples))
            updates.append(trainer.run(params_D, shard, PrivateStream(bytes(32), "dp", step), lambda *_: None))
            params_D = params_D + updates[-1]
        trainer.close()
        write_flat(head, params_D)
        with torch.no_grad():
            losses_Q = examples.losses(head, examples.batch(np.arange(DP_EXAMPLES))).double().numpy()
        given = Evidence(
            losses_Q=losses_Q, updates_RD=np.array(updates, dtype=float), gradients_RQD=np.array(gradients)
        )
        scores = {name: MEMBERSHIP.get(name).score(given) for name in ("loss", "gradient_dot", "update_cosine")}
        event = PrivacyEvent(unit="example", noise_multiplier=noise_multiplier, sampling_probability=q, steps=steps)
        return scores, members_Q, event

    return run


def _gradients(head, examples):
    batch = examples.batch(np.arange(DP_EXAMPLES))
    errors = torch.softmax(head(batch.inputs), dim=1) - nn.functional.one_hot(batch.labels_B, CLASSES)
    weight = torch.einsum("bc,bf->bcf", errors, batch.inputs).flatten(1)
    return torch.cat([weight, errors], dim=1).detach().double().numpy()


@pytest.mark.parametrize("noise_multiplier", [1.0, 4.0])
def test_no_roc_of_a_dp_run_lies_above_what_is_accounted(dp_run, noise_multiplier):
    scores, members_Q, event = dp_run(noise_multiplier)
    curve = accounted([event])
    for name, found in scores.items():
        assert not lower_band(found, members_Q).above(curve).size, name


def test_a_run_that_forgets_its_noise_does_lie_above_what_it_claims(dp_run):
    scores, members_Q, _ = dp_run(1e-3)
    claim = PrivacyEvent(unit="example", noise_multiplier=8.0, sampling_probability=0.5, steps=8)
    curve = accounted([claim])
    assert any(lower_band(found, members_Q).above(curve).size for found in scores.values())
