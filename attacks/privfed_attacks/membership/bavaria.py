"""BaVarIA: LiRA with a prior on each query's variance, for few reference models.

Brannvall 2026, "Exponential-Family Membership Inference: From LiRA and RMIA to BaVarIA", arXiv 2603.11799: a conjugate
normal-inverse-gamma prior replaces the switch from pooled to own variances; the predictive distribution is a
Student t (BaVarIA-t) or a normal with the posterior's mean variance (BaVarIA-n). The prior's four values are fitted
here by matching moments over the queries (empirical Bayes); the paper may choose them otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import norm, t

from privfed.errors import ConfigError
from privfed_attacks.membership import Bits, Floats, attack
from privfed_attacks.membership.signals import in_and_out, logit_confidence, masked_mean

_MOST_ALPHA = 1e3
_SMALLEST_VARIANCE = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """sigma^2 ~ InverseGamma(alpha, beta), mean ~ N(mean, sigma^2 / kappa)."""

    mean: float
    kappa: float
    alpha: float
    beta: float


@attack("bavaria")
def bavaria(
    losses_Q: Floats,
    reference_losses_KQ: Floats,
    reference_members_KQ: Bits,
    *,
    predictive: Literal["t", "normal"] = "t",
) -> Floats:
    """Return the log ratio of the predictive densities of phi with and without the query.

    The adversary is that of ``lira``.

    Args:
        losses_Q: On the attacked model.
        reference_losses_KQ: On the adversary's models.
        reference_members_KQ: Which of them had which query.
        predictive: ``"t"``, or ``"normal"`` with the posterior's mean variance.

    Raises:
        ConfigError: If a query is in all or in none of the models, or no query has two models on a side.
    """
    in_and_out(reference_members_KQ, needed="both")
    phi_Q, phi_KQ = logit_confidence(losses_Q), logit_confidence(reference_losses_KQ)
    inside = _log_predictive(phi_Q, phi_KQ, reference_members_KQ, predictive)
    return inside - _log_predictive(phi_Q, phi_KQ, ~reference_members_KQ, predictive)


def fit_prior(values_KQ: Floats, mask_KQ: Bits) -> Prior:
    """Return the prior whose moments are those of the queries' means and variances.

    Raises:
        ConfigError: If no query has two values.
    """
    mean_Q, squares_Q, counts_Q = _summary(values_KQ, mask_KQ)
    some = counts_Q >= 2
    if not some.any():
        raise ConfigError(
            "BaVarIA learns its prior from queries with two models on a side, and there is none: train at least 4 "
            "reference models, or use the attack 'rmia'."
        )
    freedom = counts_Q[some] - 1
    variance_Q = squares_Q[some] / freedom
    within = max(float(squares_Q[some].sum() / freedom.sum()), _SMALLEST_VARIANCE)
    # a sample variance of n values has E[s^4] = sigma^4 (1 + 2 / (n - 1))
    spread = float(np.mean(np.square(variance_Q) / (1 + 2 / freedom))) - within**2
    alpha = min(2 + within**2 / spread, _MOST_ALPHA) if spread > 0 else _MOST_ALPHA
    seen = counts_Q >= 1
    between = float(np.var(mean_Q[seen])) - within * float(np.mean(1 / counts_Q[seen]))
    kappa = within / max(between, 1e-3 * within)
    return Prior(mean=float(np.mean(mean_Q[seen])), kappa=kappa, alpha=alpha, beta=within * (alpha - 1))


def _log_predictive(phi_Q: Floats, phi_KQ: Floats, mask_KQ: Bits, predictive: str) -> Floats:
    """Return the posterior predictive log-density (Murphy 2007, "Conjugate Bayesian analysis of the Gaussian")."""
    prior = fit_prior(phi_KQ, mask_KQ)
    mean_Q, squares_Q, n_Q = _summary(phi_KQ, mask_KQ)
    kappa_Q = prior.kappa + n_Q
    centre_Q = (prior.kappa * prior.mean + n_Q * mean_Q) / kappa_Q
    alpha_Q = prior.alpha + n_Q / 2
    shift_Q = prior.kappa * n_Q * np.square(mean_Q - prior.mean) / kappa_Q
    beta_Q = prior.beta + 0.5 * (squares_Q + shift_Q)
    widened_Q = (kappa_Q + 1) / kappa_Q
    if predictive == "t":
        scale_Q = np.sqrt(beta_Q * widened_Q / alpha_Q)
        return np.asarray(t.logpdf(phi_Q, 2 * alpha_Q, loc=centre_Q, scale=scale_Q), dtype=np.float64)
    scale_Q = np.sqrt(beta_Q * widened_Q / (alpha_Q - 1))
    return np.asarray(norm.logpdf(phi_Q, loc=centre_Q, scale=scale_Q), dtype=np.float64)


def _summary(values_KQ: Floats, mask_KQ: Bits) -> tuple[Floats, Floats, Floats]:
    """Return mean, sum of squared deviations and count over the masked models [Q]."""
    mean_Q = masked_mean(values_KQ, mask_KQ)
    squares_Q = np.where(mask_KQ, np.square(values_KQ - mean_Q), 0.0).sum(axis=0)
    return mean_Q, squares_Q, mask_KQ.sum(axis=0).astype(np.float64)
