"""RMIA: is the query's probability raised by training more than that of population examples?

Zarifzadeh, Liu and Shokri 2024, "Low-Cost High-Power Membership Inference Attacks", arXiv 2312.03262, equations 2-4;
strong with one to four reference models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from privfed.errors import ConfigError
from privfed_attacks.membership import Bits, Floats, attack
from privfed_attacks.membership.signals import in_and_out, masked_mean

DEFAULT_A = 0.3
_SMALLEST = 1e-300


@attack("rmia")
def rmia(
    losses_Q: Floats,
    population_losses_Z: Floats,
    reference_losses_KQ: Floats,
    reference_members_KQ: Bits,
    reference_population_losses_KZ: Floats,
    *,
    gamma: float = 1.0,
    offline_a: float = DEFAULT_A,
) -> Floats:
    """Return Pr_z[(p(x|t) / p(x)) / (p(z|t) / p(z)) >= gamma] with p(x) from models with and without x.

    p(x) is the mean of both sides; p(z), of examples that no model has, is had as in ``rmia_offline``.

    The adversary can run the released model, has data of the same distribution outside of the training set, and has
    trained models of the same kind, at least one with and one without each query.

    Args:
        losses_Q: On the attacked model.
        population_losses_Z: The same, of the population.
        reference_losses_KQ: On the adversary's models.
        reference_members_KQ: Which of them had which query.
        reference_population_losses_KZ: The population's losses on them.
        gamma: How much more the query's probability has to be raised than that of z.
        offline_a: For p(z).

    Raises:
        ConfigError: If a query is in all or in none of the models, or ``offline_a`` or ``gamma`` is out of range.
    """
    in_and_out(reference_members_KQ, needed="both")
    p_KQ = np.exp(-reference_losses_KQ)
    p_Q = (masked_mean(p_KQ, reference_members_KQ) + masked_mean(p_KQ, ~reference_members_KQ)) / 2
    p_Z = _from_out(np.exp(-reference_population_losses_KZ).mean(axis=0), offline_a)
    return _pairwise(losses_Q, p_Q, population_losses_Z, p_Z, gamma)


@attack("rmia_offline")
def rmia_offline(
    losses_Q: Floats,
    population_losses_Z: Floats,
    reference_losses_KQ: Floats,
    reference_members_KQ: Bits,
    reference_population_losses_KZ: Floats,
    *,
    gamma: float = 1.0,
    offline_a: float = DEFAULT_A,
) -> Floats:
    """Return the same with p(x) = ((1 + a) p_out(x) + (1 - a)) / 2, from models without x alone.

    The adversary is that of ``rmia``, but its models need not have seen the queries.

    Args:
        losses_Q: On the attacked model.
        population_losses_Z: The same, of the population.
        reference_losses_KQ: On the adversary's models.
        reference_members_KQ: Which of them had which query: those are left out.
        reference_population_losses_KZ: The population's losses on them.
        gamma: How much more the query's probability has to be raised than that of z.
        offline_a: How much less models without x say about p(x) than all would; see ``tuned_a``.

    Raises:
        ConfigError: If a query is in all of the models, or ``offline_a`` or ``gamma`` is out of range.
    """
    in_and_out(reference_members_KQ, needed="out")
    p_Q = _from_out(masked_mean(np.exp(-reference_losses_KQ), ~reference_members_KQ), offline_a)
    p_Z = _from_out(np.exp(-reference_population_losses_KZ).mean(axis=0), offline_a)
    return _pairwise(losses_Q, p_Q, population_losses_Z, p_Z, gamma)


def tuned_a(
    reference_losses_KQ: Floats,
    reference_members_KQ: Bits,
    reference_population_losses_KZ: Floats,
    choices: Sequence[float] = tuple(np.linspace(0, 1, 11)),
) -> float:
    """Return the ``offline_a`` of the largest AUC when each reference model in turn plays the attacked one.

    Uses the adversary's own models alone, whose membership it knows (the paper's appendix B.2.2 tunes it on a pair of
    them).

    Raises:
        ConfigError: With fewer than two reference models.
    """
    from sklearn.metrics import roc_auc_score

    if len(reference_losses_KQ) < 2:
        raise ConfigError("Tuning offline_a needs two reference models, one to attack and one to attack with: got one.")

    def area(a: float) -> float:
        areas = []
        for k in range(len(reference_losses_KQ)):
            rest = np.arange(len(reference_losses_KQ)) != k
            seen = ~reference_members_KQ[rest].all(axis=0)  # some model is without the query
            scores_Q = rmia_offline(
                reference_losses_KQ[k, seen],
                reference_population_losses_KZ[k],
                reference_losses_KQ[rest][:, seen],
                reference_members_KQ[rest][:, seen],
                reference_population_losses_KZ[rest],
                offline_a=a,
            )
            members = reference_members_KQ[k, seen]
            areas.append(roc_auc_score(members, scores_Q) if 0 < members.sum() < len(members) else 0.5)
        return float(np.mean(areas))

    return float(max(choices, key=area))


def _from_out(p_out: Floats, a: float) -> Floats:
    if not 0 <= a <= 1:
        raise ConfigError(f"Expected an offline_a between 0 and 1, got {a}.")
    return ((1 + a) * p_out + (1 - a)) / 2


def _pairwise(losses_Q: Floats, p_Q: Floats, losses_Z: Floats, p_Z: Floats, gamma: float) -> Floats:
    """Return the share of z that x beats by ``gamma``.

    For a given gamma it is a step function of the query's own ratio; within a step, queries are ordered by that.
    """
    if not gamma > 0:
        raise ConfigError(f"Expected a gamma above 0, got {gamma}.")
    ratio_Q = np.exp(-losses_Q) / np.maximum(p_Q, _SMALLEST)
    ratio_Z = np.sort(np.exp(-losses_Z) / np.maximum(p_Z, _SMALLEST))
    beaten_Q = np.searchsorted(ratio_Z, ratio_Q / gamma, side="right")
    found: Floats = (beaten_Q + ratio_Q / (1 + ratio_Q)) / (len(ratio_Z) + 1)
    return found
