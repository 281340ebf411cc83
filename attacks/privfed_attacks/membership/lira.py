"""LiRA: the likelihood ratio of the confidence under models with and without the query.

Carlini, Chien, Nasr, Song, Terzis and Tramer 2022, "Membership Inference Attacks From First Principles", arXiv
2112.03570, Algorithm 1 (online) and section VI-C (offline). With fewer than 64 models the variances are pooled over the
queries (their "global variance", section VI-A); here around each query's own mean, so that hard and easy queries do
not widen it.
"""

from __future__ import annotations

import numpy as np

from privfed.errors import ConfigError
from privfed_attacks.membership import Bits, Floats, attack
from privfed_attacks.membership.signals import in_and_out, logit_confidence, masked_mean

OWN_VARIANCE_FROM = 64
_SMALLEST_VARIANCE = 1e-12


@attack("lira")
def lira(
    losses_Q: Floats, reference_losses_KQ: Floats, reference_members_KQ: Bits, *, pooled: bool | None = None
) -> Floats:
    """Return log N(phi; in) - log N(phi; out).

    The adversary can run the released model, and has trained models of the same kind, some with and some without
    each query: it knows the training procedure and has the queries themselves before it attacks.

    Args:
        losses_Q: On the attacked model.
        reference_losses_KQ: On the adversary's models.
        reference_members_KQ: Which of them had which query.
        pooled: One variance for all queries; None: below 64 models.

    Raises:
        ConfigError: If a query is in all or in none of the models, or no variance can be had.
    """
    in_and_out(reference_members_KQ, needed="both")
    phi_Q, phi_KQ = logit_confidence(losses_Q), logit_confidence(reference_losses_KQ)
    pooled = len(phi_KQ) < OWN_VARIANCE_FROM if pooled is None else pooled
    mean_in, var_in = _fit(phi_KQ, reference_members_KQ, pooled)
    mean_out, var_out = _fit(phi_KQ, ~reference_members_KQ, pooled)
    return _log_normal(phi_Q, mean_in, var_in) - _log_normal(phi_Q, mean_out, var_out)


@attack("lira_offline")
def lira_offline(
    losses_Q: Floats, reference_losses_KQ: Floats, reference_members_KQ: Bits, *, pooled: bool | None = None
) -> Floats:
    """Return how many standard deviations phi lies above its mean on models without the query.

    It orders queries as the paper's 1 - Pr[N(mean_out, var_out) > phi] does, without rounding to 1.

    The adversary can run the released model, and has models of the same kind without each query: it may have trained
    them before it knew what it would ask.

    Raises:
        ConfigError: If a query is in all of the models, or no variance can be had.
    """
    in_and_out(reference_members_KQ, needed="out")
    phi_Q, phi_KQ = logit_confidence(losses_Q), logit_confidence(reference_losses_KQ)
    pooled = len(phi_KQ) < OWN_VARIANCE_FROM if pooled is None else pooled
    mean, variance = _fit(phi_KQ, ~reference_members_KQ, pooled)
    return np.asarray((phi_Q - mean) / np.sqrt(variance), dtype=np.float64)


def _fit(phi_KQ: Floats, mask_KQ: Bits, pooled: bool) -> tuple[Floats, Floats]:
    """Return mean and variance of each query's phi over the masked models [Q]."""
    mean_Q = masked_mean(phi_KQ, mask_KQ)
    squares_Q = np.where(mask_KQ, np.square(phi_KQ - mean_Q), 0.0).sum(axis=0)
    freedom_Q = mask_KQ.sum(axis=0) - 1.0
    if pooled:
        total = float(freedom_Q.clip(min=0).sum())
        if total < 1:
            raise ConfigError(
                "LiRA needs a variance, and no query has two models on the same side: train at least 4 reference "
                "models, or use the attack 'rmia'."
            )
        return mean_Q, np.full_like(mean_Q, max(float(squares_Q.sum()) / total, _SMALLEST_VARIANCE))
    if (freedom_Q < 1).any():
        raise ConfigError("A variance of its own needs two models on each side for every query: set pooled=True.")
    return mean_Q, np.maximum(squares_Q / freedom_Q, _SMALLEST_VARIANCE)


def _log_normal(x: Floats, mean: Floats, variance: Floats) -> Floats:
    found: Floats = -0.5 * (np.square(x - mean) / variance + np.log(variance))
    return found
