"""Quantile regression: what confidence would a non-member like this one have?

Bertran, Tang, Roth, Kearns, Morgenstern and Wu 2023, "Scalable Membership Inference Attacks via Quantile Regression",
arXiv 2307.03694. Needs no reference model: one regression on the attacked model's own outputs.
"""

from __future__ import annotations

import numpy as np

from privfed.errors import ConfigError
from privfed_attacks.membership import Floats, attack
from privfed_attacks.membership.signals import logit_confidence

LEAST_POPULATION = 100
_SMALLEST_SCALE = 0.05


@attack("quantile")
def quantile(
    losses_Q: Floats,
    features_QF: Floats,
    population_losses_Z: Floats,
    population_features_ZF: Floats,
    *,
    level: float = 0.9,
    seed: int = 0,
) -> Floats:
    """Return how far the confidence lies above the median of non-members like the query, in units of their spread.

    Two gradient-boosted regressions on the population predict the median and the ``level`` quantile of the logit
    confidence from the features; the spread is the distance between the two. The paper thresholds at one predicted
    quantile; a location and a scale give one score for the whole ROC (its section 4 fits a Gaussian to the same
    end).

    The adversary can run the released model, and has data of the same distribution that is not in the training set
    and features of all queries (the public base's, for instance).

    Raises:
        ConfigError: With fewer than 100 population examples.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    if len(population_losses_Z) < LEAST_POPULATION:
        raise ConfigError(
            f"The attack 'quantile' fits a regression on the population: expected at least {LEAST_POPULATION} examples "
            f"in it, got {len(population_losses_Z)}."
        )
    phi_Z = logit_confidence(population_losses_Z)

    def predicted(q: float) -> Floats:
        model = HistGradientBoostingRegressor(
            loss="quantile", quantile=q, max_iter=60, max_leaf_nodes=8, random_state=seed
        )
        return np.asarray(model.fit(population_features_ZF, phi_Z).predict(features_QF), dtype=np.float64)

    middle_Q = predicted(0.5)
    floor = _SMALLEST_SCALE * float(np.std(phi_Z)) + 1e-12
    scale_Q = np.maximum(predicted(level) - middle_Q, floor)
    found: Floats = (logit_confidence(losses_Q) - middle_Q) / scale_Q
    return found
